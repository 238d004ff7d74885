"""Where pictures come from: folders, with or without classes, and words for sets that need no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.errors import DatasetError, UsageError, missing_extra

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

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


def open_dataset(source: str | Path) -> ImageSet:
    """The set that a folder names, or a word of WORDS (a folder of that name is reached by ./word).

    A folder holds images (no labels), or class folders of images: classes are their sorted names, as in ImageNet's
    validation layout. Files with other suffixes than IMAGE_SUFFIXES and hidden ones are left out.
    Raises DatasetError that names the folder, MissingError where a word needs a package that is not here.
    """
    if isinstance(source, str) and source in WORDS:
        return WORDS[source]()
    folder = Path(source)
    try:
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


def _photographs() -> ImageSet:
    spec = importlib.util.find_spec("skimage")  # finds without importing: scikit-image takes a second to import
    if spec is None or spec.origin is None:
        raise missing_extra("export", "the set of photographs")
    data = Path(spec.origin).parent / "data"
    images = tuple(data / name for name in PHOTOGRAPHS)
    if absent := [path.name for path in images if not path.is_file()]:
        raise DatasetError(f"{data} lacks {', '.join(absent)}; install the scikit-image of constraints.txt")
    return ImageSet("photographs", images)


WORDS: Mapping[str, Callable[[], ImageSet]] = MappingProxyType({"photographs": _photographs})
