"""Where pictures come from: folders, with or without classes, and words for sets that need no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.errors import DatasetError, UsageError, missing_extra

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

PHOTOGRAPHS = (  # of scikit-image's bundled pictures those that a camera or a microscope took
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

    def __len__(self) -> int:
        return len(self.images)

    def limit(self, count: int) -> ImageSet:
        """At most `count` pictures, spread evenly over the set, so that no class is left out by its place."""
        if count < 1:
            raise UsageError(f"a limit of {count} images leaves none; give at least 1")
        total = len(self.images)
        kept = range(total) if count >= total else [i * total // count for i in range(count)]
        labels = None if self.labels is None else tuple(self.labels[i] for i in kept)
        return ImageSet(self.name, tuple(self.images[i] for i in kept), labels, self.classes)


def open_dataset(source: str | Path) -> ImageSet:
    """The set that a word of WORDS or a folder names.

    A folder holds pictures (no labels), or class folders of pictures: classes are their sorted names, as in ImageNet's
    layout. Raises DatasetError that names the folder, MissingError where a word needs a package that is not here.
    """
    if isinstance(source, str) and source in WORDS:
        return WORDS[source]()
    folder = Path(source)
    if not folder.is_dir():
        raise DatasetError(f"no folder of pictures at {folder}; give a folder, or one of: {', '.join(WORDS)}")
    loose = _pictures(folder)
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = {p.name: _pictures(p) for p in folders}
    if not any(classes.values()):
        if not loose:
            raise DatasetError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) and no class folders")
        return ImageSet(str(folder), tuple(loose))
    if loose:
        raise DatasetError(
            f"{folder} mixes class folders with loose pictures ({loose[0].name}); move these into a class"
        )
    if empty := [name for name, pictures in classes.items() if not pictures]:
        raise DatasetError(f"{folder} has class folders without pictures: {', '.join(empty)}; fill or remove them")
    pairs = [(picture, label) for label, pictures in enumerate(classes.values()) for picture in pictures]
    return ImageSet(str(folder), tuple(p for p, _ in pairs), tuple(i for _, i in pairs), tuple(classes))


def _pictures(folder: Path) -> list[Path]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def _photographs() -> ImageSet:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise missing_extra("export", "the set of photographs")
    data = Path(spec.origin).parent / "data"
    images = tuple(data / name for name in PHOTOGRAPHS)
    if absent := [path.name for path in images if not path.is_file()]:
        raise DatasetError(
            f"this scikit-image does not bundle {', '.join(absent)}; install the version in constraints.txt"
        )
    return ImageSet("photographs", images)


WORDS: Mapping[str, Callable[[], ImageSet]] = MappingProxyType({"photographs": _photographs})
