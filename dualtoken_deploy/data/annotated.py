"""Sets for dense tasks: generated scenes, folders in COCO's format, folders of pictures and label maps. No torch.

COCO's format:    DIR/annotations/instances_<part>*.json (or DIR/annotations/<part>.json), pictures in DIR/<part>* or
                  DIR/images; polygons and run lengths
label maps:       DIR/<part>/images/ and DIR/<part>/masks/ with one indexed PNG a picture, DIR/labels.txt with one class
                  name a line, index 0 first; 255 is no class
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualtoken_deploy.data import scenes
from dualtoken_deploy.data.coco import BACKGROUND, CocoSet, open_coco
from dualtoken_deploy.data.folders import IMAGE_SUFFIXES, PARTS
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.data.objects import IGNORE, Objects
from dualtoken_deploy.errors import DatasetError, ImageError, UsageError

TASKS = ("detect", "segment")

SCENES = MappingProxyType({"train": (0, 1500), "val": (1_000_000, 200)})  # first seed, scenes


@dataclass(frozen=True)
class DenseSample:
    """`image` uint8 (H, W, 3). For detection `boxes` and, where the set has them, `masks`: the same objects; for
    segmentation `label_map` uint8 (H, W) of indices into the set's labels, IGNORE where there is none."""

    image: NDArray[np.uint8]
    boxes: Objects | None = None
    masks: Objects | None = None
    label_map: NDArray[np.uint8] | None = None


class Reader(Protocol):
    """Makes the samples of a set; `paths` are their pictures, empty where they are generated."""

    @property
    def paths(self) -> Sequence[Path]: ...
    def __call__(self, index: int) -> DenseSample: ...


@dataclass(frozen=True)
class DenseSet:
    """Samples for one task. `read(i)` makes sample i; `digest` says whether two sets are the same; `notes` what was
    left out and why."""

    name: str
    labels: tuple[str, ...]
    read: Reader
    indices: tuple[int, ...]
    digest: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> DenseSample:
        return self.read(self.indices[index])

    def where(self, index: int) -> str:
        """What sample `index` is called: its picture's path, or the set and its number."""
        paths = self.read.paths
        return str(paths[self.indices[index]]) if paths else f"{self.name} {self.indices[index]}"

    def limit(self, count: int) -> DenseSet:
        """At most `count` samples, spread evenly over the set. Raises UsageError on a count below 1."""
        if count < 1:
            raise UsageError(f"a limit of {count} images leaves none; give at least 1")
        total = len(self)
        if count >= total:
            return self
        return replace(self, indices=tuple(self.indices[i * total // count] for i in range(count)))


def open_dense(source: str | Path, task: str, part: str = "val") -> DenseSet:
    """The set for a task (detect or segment) that a folder names, or `scenes` (a folder of that name is ./scenes).

    Raises UsageError on another task or part, DatasetError that names the file and what to mend.
    """
    if task not in TASKS or part not in PARTS:
        raise UsageError(f"no task {task!r} with a part {part!r}; tasks: {', '.join(TASKS)}; parts: {', '.join(PARTS)}")
    if isinstance(source, str) and source in WORDS:
        return WORDS[source](task, part)
    folder = Path(source)
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no folder at {folder}"
        raise DatasetError(f"{what}; give a folder in COCO's format or of images and masks, or: {', '.join(WORDS)}")
    try:
        if (folder / "annotations").is_dir():
            return _coco(folder, task, part)
        if (folder / part / "masks").is_dir():
            return _label_maps(folder, task, part)
    except OSError as error:
        raise DatasetError(f"{error.filename or folder} cannot be read ({error.strerror}); check it") from error
    raise DatasetError(f"{folder} has neither annotations/ (COCO's format) nor {part}/masks/ (label maps)")


def _scenes(task: str, part: str) -> DenseSet:
    first, count = SCENES[part]
    labels = scenes.CLASSES if task == "detect" else (scenes.CLUTTER, *scenes.CLASSES)
    digest = hashlib.sha256(f"scenes {scenes.VERSION} {first} {count}".encode()).hexdigest()
    return DenseSet(f"scenes ({part})", labels, _SceneReader(task, first), tuple(range(count)), digest)


@dataclass(frozen=True)
class _SceneReader:
    task: str
    first: int
    paths: tuple[Path, ...] = ()

    def __call__(self, index: int) -> DenseSample:
        scene = scenes.make_scene(self.first + index)
        if self.task == "segment":
            return DenseSample(scene.image, label_map=scene.labels)
        return DenseSample(scene.image, scene.boxes, scene.masks)


WORDS: Mapping[str, Callable[[str, str], DenseSet]] = MappingProxyType({"scenes": _scenes})


def _coco(folder: Path, task: str, part: str) -> DenseSet:
    found = open_coco(folder, part)
    labels = found.labels if task == "detect" else (BACKGROUND, *found.labels)
    name = f"{folder} ({part})"
    return DenseSet(name, labels, _CocoReader(task, found), tuple(range(len(found.images))), found.digest, found.notes)


@dataclass(frozen=True)
class _CocoReader:
    task: str
    found: CocoSet

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(image.path for image in self.found.images)

    def __call__(self, index: int) -> DenseSample:
        entry = self.found.images[index]
        image = load_image(entry.path)
        if image.shape[:2] != entry.size:
            raise DatasetError(
                f"{entry.path} has {image.shape[0]} x {image.shape[1]} pixels (H x W), its entry in "
                f"{self.found.path} {entry.size[0]} x {entry.size[1]}; mend one of them"
            )
        if self.task == "segment":
            return DenseSample(image, label_map=entry.label_map())
        return DenseSample(image, entry.boxes(), entry.masks())


def _label_maps(folder: Path, task: str, part: str) -> DenseSet:
    if task != "segment":
        raise DatasetError(f"{folder} has label maps only, no objects; it is for --task segment")
    labels = _read_labels(folder / "labels.txt")
    pictures, masks = folder / part / "images", folder / part / "masks"
    if not pictures.is_dir():
        raise DatasetError(f"{folder / part} has masks/ but no images/; put the pictures there")
    images = sorted(p for p in pictures.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if not images:
        raise DatasetError(f"{pictures} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    pairs = tuple((image, masks / f"{image.stem}.png") for image in images)
    if lacking := [mask for _, mask in pairs if not mask.is_file()]:
        raise DatasetError(f"{len(lacking)} of {len(pairs)} pictures have no label map, first: no file {lacking[0]}")
    digest = hashlib.sha256(repr(labels).encode())
    for pair in pairs:
        digest.update("\0".join(f"{p.name} {p.stat().st_size}" for p in pair).encode())
    reader = _LabelMapReader(pairs, len(labels))
    return DenseSet(f"{folder} ({part})", labels, reader, tuple(range(len(pairs))), digest.hexdigest())


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except FileNotFoundError as error:
        raise DatasetError(f"no {path}; write the class names there, one a line, that of index 0 first") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no UTF-8 text; save it as such") from error
    if "" in labels:
        raise DatasetError(f"{path} has no name in line {labels.index('') + 1}; each line names the class of its index")
    if not 2 <= len(labels) <= IGNORE:
        raise DatasetError(f"{path} names {len(labels)} classes; a label map has 2 to {IGNORE}")
    return labels


@dataclass(frozen=True)
class _LabelMapReader:
    pairs: tuple[tuple[Path, Path], ...]
    classes: int

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(picture for picture, _ in self.pairs)

    def __call__(self, index: int) -> DenseSample:
        picture, mask = self.pairs[index]
        image, label_map = load_image(picture), read_label_map(mask)
        if image.shape[:2] != label_map.shape:
            sizes = [f"{a.shape[0]} x {a.shape[1]}" for a in (label_map, image)]
            raise DatasetError(f"{mask} has {sizes[0]} pixels (H x W), its picture {picture} {sizes[1]}; make them fit")
        strange = label_map[(label_map >= self.classes) & (label_map != IGNORE)]
        if strange.size:
            raise DatasetError(
                f"{mask} holds the index {strange.max()}, but labels.txt names {self.classes} classes (0 to "
                f"{self.classes - 1}; {IGNORE} is no class); mend one of them"
            )
        return DenseSample(image, label_map=label_map)


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """The indices (H, W) of a PNG with a palette or 8-bit grey. Raises DatasetError on anything else."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise DatasetError(f"{path} is a PNG of mode {picture.mode}; a label map is indexed or 8-bit grey")
            return np.array(picture, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as a PNG ({error}); save it again") from error


def read_or_none(data: DenseSet, index: int) -> DenseSample | None:
    """Sample `index`, or None where its picture cannot be decoded; what is wrong with its truth still raises."""
    try:
        return data[index]
    except ImageError:
        return None
