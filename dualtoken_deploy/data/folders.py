"""Where pictures come from: folders, with or without classes, and words for sets that need no download."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.data.built_in import BUILT_IN, built_in_folder
from dualtoken_deploy.errors import DatasetError, UsageError, missing_extra

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
)

PARTS = ("train", "val")

PHOTOGRAPHS = (  # of scikit-image's bundled pictures those that a camera, a microscope or a scanner took
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "camera.png", "coins.png", "brick.png", "grass.png"),
    *("gravel.png", "moon.png", "page.png"),
)


@dataclass(frozen=True)
class ImageSet:
    """Paths of pictures; `labels` are indices into `classes`, both None where the set has no labels."""

    name: str
    images: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.labels is None) != (self.classes is None):
            raise DatasetError(f"{self.name} has labels without classes, or the other way round; give both or neither")
        if self.labels is not None and len(self.labels) != len(self.images):
            raise DatasetError(
                f"{self.name} has {len(self.labels)} labels for {len(self.images)} images; give one each"
            )

    def __len__(self) -> int:
        return len(self.images)

    def limit(self, count: int) -> ImageSet:
        """At most `count` images in their order, spread evenly over the set, so that they come from all its classes.

        Raises UsageError on a count below 1.
        """
        if count < 1:
            raise UsageError(f"a limit of {count} images leaves none; give at least 1")
        total = len(self.images)
        if count >= total:
            return self
        kept = [i * total // count for i in range(count)]
        labels = None if self.labels is None else tuple(self.labels[i] for i in kept)
        return replace(self, images=tuple(self.images[i] for i in kept), labels=labels)

    def digest(self, contents: bool = False) -> str:
        """sha256 over classes, file names, labels and sizes; over the files' contents too where asked."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for i, path in enumerate(self.images):
            label = None if self.labels is None else self.labels[i]
            digest.update(os.fsencode(path.name) + f"\0{label}\0".encode())
            digest.update(path.read_bytes() if contents else str(path.stat().st_size).encode())
        return digest.hexdigest()


def open_dataset(source: str | Path, part: str = "val") -> ImageSet:
    """The set that a folder names, or a word of WORDS (a folder of that name is reached by ./word).

    A folder holds images (no labels), or class folders of images: classes are their sorted names, as in ImageNet's
    validation layout; of a folder with `train` and `val` in it the `part` is taken. Files with other suffixes than
    IMAGE_SUFFIXES and hidden ones are left out.
    Raises DatasetError that names the folder, MissingError where a word needs a package that is not here.
    """
    if isinstance(source, str) and source in WORDS:
        return WORDS[source](part)
    folder = Path(source)
    try:
        if all((folder / name).is_dir() for name in PARTS):
            folder = folder / part
        if folder.is_dir():
            return _folder(folder)
        is_file = folder.exists()
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    what = f"{folder} is a file" if is_file else f"no folder at {folder}"
    raise DatasetError(f"{what}; give a folder of images, or one of: {', '.join(WORDS)}")


def _folder(folder: Path) -> ImageSet:
    loose = _images(folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = {path.name: _images(path) for path in inner}
    if not any(classes.values()):
        if loose:
            return ImageSet(str(folder), loose)
        hint = f"; name one of its folders ({', '.join([*classes][:3])}), or fill them" if classes else ""
        raise DatasetError(
            f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}) and no class folders of them{hint}"
        )
    if loose:
        raise DatasetError(
            f"{folder} mixes class folders with {len(loose)} loose images ({loose[0].name}); move these into a class"
        )
    if empty := [name for name, images in classes.items() if not images]:
        raise DatasetError(f"{folder} has class folders without images: {', '.join(empty[:3])}; fill or remove them")
    images = tuple(path for paths in classes.values() for path in paths)
    labels = tuple(label for label, paths in enumerate(classes.values()) for _ in paths)
    return ImageSet(str(folder), images, labels, tuple(classes))


def _images(folder: Path) -> tuple[Path, ...]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return tuple(sorted(path for path in found if not path.name.startswith(".") and path.is_file()))


def open_parts(source: str | Path) -> tuple[ImageSet, ImageSet]:
    """The labelled `train` and `val` parts of a set, with the same two or more classes.

    Raises DatasetError where one of them is absent, has no labels, one class only, or other classes than its fellow.
    """
    train, val = (open_dataset(source, part) for part in PARTS)
    if train.images == val.images:
        raise DatasetError(f"{source} has no folders train/ and val/ of class folders; training needs both")
    for images in (train, val):
        if images.classes is None:
            raise DatasetError(f"{images.name} has no class folders; put each class's images into a folder of its own")
    if train.classes != val.classes:
        odd = sorted(set(train.classes or ()) ^ set(val.classes or ()))
        raise DatasetError(
            f"{source}: train/ and val/ have different classes ({', '.join(odd[:5])}); give both the same class folders"
        )
    if len(train.classes or ()) < 2:
        raise DatasetError(f"{train.name} has one class only ({(train.classes or ('',))[0]}); training needs two")
    return train, val


def match_classes(classes: Sequence[str], labels: Sequence[str], name: str) -> tuple[int, ...]:
    """For each class of a set called `name` its index in a model's `labels`: by name, else by order where the counts
    agree. Raises DatasetError where neither fits."""
    at = {label: i for i, label in enumerate(labels)}
    if all(label in at for label in classes):
        return tuple(at[label] for label in classes)
    if len(classes) == len(labels):
        return tuple(range(len(classes)))
    strange = [label for label in classes if label not in at]
    raise DatasetError(
        f"{name} has {len(classes)} class folders, the model {len(labels)} classes, and none is called "
        f"{strange[0]!r}; use the data that the model was trained for"
    )


def match_labels(images: ImageSet, labels: Sequence[str]) -> tuple[int, ...]:
    """For each image the index of its class in a model's `labels` (match_classes).

    Raises DatasetError where there are no class folders, or they do not fit.
    """
    if images.labels is None or images.classes is None:
        raise DatasetError(f"{images.name} has no class folders; labelled images are needed")
    known = match_classes(images.classes, labels, images.name)
    return tuple(known[label] for label in images.labels)


def _built_in(name: str) -> Callable[[str], ImageSet]:
    return lambda part: replace(open_dataset(built_in_folder(name), part), name=f"{name} ({part})")


def _photographs(_part: str) -> ImageSet:
    spec = importlib.util.find_spec("skimage")  # finds without importing: scikit-image takes a second to import
    if spec is None or spec.origin is None:
        raise missing_extra("export", "the set of photographs")
    data = Path(spec.origin).parent / "data"
    images = tuple(data / name for name in PHOTOGRAPHS)
    if absent := [path.name for path in images if not path.is_file()]:
        raise DatasetError(f"{data} lacks {', '.join(absent)}; install the scikit-image of constraints.txt")
    return ImageSet("photographs", images)


WORDS: Mapping[str, Callable[[str], ImageSet]] = MappingProxyType(
    {"photographs": _photographs, **{name: _built_in(name) for name in BUILT_IN}}
)
