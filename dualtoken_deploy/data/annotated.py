"""Annotated pictures: generated scenes, folders in COCO's format, folders of pictures and label maps. No torch.

COCO's format:    DIR/annotations/instances_<part>*.json (or DIR/annotations/<part>.json), pictures in DIR/<part>* or
                  DIR/images; polygons and run lengths
label maps:       DIR/<part>/images/ and DIR/<part>/masks/ with one indexed PNG a picture, DIR/labels.txt with one class
                  name a line, index 0 first; 255 is no class
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.labels import read_labels
from dualtoken_deploy.data import scenes
from dualtoken_deploy.data.coco import BACKGROUND, CocoSet, open_coco
from dualtoken_deploy.data.folders import IMAGE_SUFFIXES, PARTS
from dualtoken_deploy.data.images import load_image, opened_picture
from dualtoken_deploy.data.objects import IGNORE
from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.errors import DatasetError, ImageError, UsageError

OBJECTS, MAPS = "objects", "label maps"  # what a sample's truth is

SCENES = MappingProxyType({"train": (0, 1500), "val": (1_000_000, 200)})  # first seed, scenes


def open_annotated(source: str | Path, truth: str, part: str = "val") -> SampleSet:
    """The set with OBJECTS or MAPS that a folder names, or `scenes` (a folder of that name is ./scenes).

    Raises UsageError on another part, DatasetError that names the file and what to mend.
    """
    if part not in PARTS:
        raise UsageError(f"no part {part!r}; valid parts: {', '.join(PARTS)}")
    if isinstance(source, str) and source in WORDS:
        return WORDS[source](truth, part)
    folder = Path(source)
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no folder at {folder}"
        raise DatasetError(f"{what}; give a folder in COCO's format or of images and masks, or: {', '.join(WORDS)}")
    try:
        if (folder / "annotations").is_dir():
            return _coco(folder, truth, part)
        if (folder / part / "masks").is_dir():
            return _label_maps(folder, truth, part)
    except OSError as error:
        raise DatasetError(f"{error.filename or folder} cannot be read ({error.strerror}); check it") from error
    raise DatasetError(f"{folder} has neither annotations/ (COCO's format) nor {part}/masks/ (label maps)")


def _scenes(truth: str, part: str) -> SampleSet:
    first, count = SCENES[part]
    labels = scenes.CLASSES if truth == OBJECTS else (scenes.CLUTTER, *scenes.CLASSES)
    digest = hashlib.sha256(f"scenes {scenes.VERSION} {first} {count}".encode()).hexdigest()
    return SampleSet(f"scenes ({part})", labels, _SceneReader(truth, first), tuple(range(count)), digest)


@dataclass(frozen=True)
class _SceneReader:
    truth: str
    first: int
    paths: tuple[Path, ...] = ()

    def __call__(self, index: int) -> Sample:
        scene = scenes.make_scene(self.first + index)
        if self.truth == MAPS:
            return Sample(scene.image, label_map=scene.labels)
        return Sample(scene.image, boxes=scene.boxes, masks=scene.masks)


WORDS: Mapping[str, Callable[[str, str], SampleSet]] = MappingProxyType({"scenes": _scenes})


def _coco(folder: Path, truth: str, part: str) -> SampleSet:
    found = open_coco(folder, part)
    labels = found.labels if truth == OBJECTS else (BACKGROUND, *found.labels)
    name = f"{folder} ({part})"
    return SampleSet(
        name, labels, _CocoReader(truth, found), tuple(range(len(found.images))), found.digest, found.notes
    )


@dataclass(frozen=True)
class _CocoReader:
    truth: str
    found: CocoSet

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(image.path for image in self.found.images)

    def __call__(self, index: int) -> Sample:
        entry = self.found.images[index]
        image = load_image(entry.path)
        if image.shape[:2] != entry.size:
            raise DatasetError(
                f"{entry.path} has {image.shape[0]} x {image.shape[1]} pixels (H x W), its entry in "
                f"{self.found.path} {entry.size[0]} x {entry.size[1]}; mend one of them"
            )
        if self.truth == MAPS:
            return Sample(image, label_map=entry.label_map())
        return Sample(image, boxes=entry.boxes(), masks=entry.masks())


def _label_maps(folder: Path, truth: str, part: str) -> SampleSet:
    if truth != MAPS:
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
        digest.update(os.fsencode("\0".join(f"{p.name} {p.stat().st_size}" for p in pair)))
    reader = _LabelMapReader(pairs, len(labels))
    return SampleSet(f"{folder} ({part})", labels, reader, tuple(range(len(pairs))), digest.hexdigest())


def _read_labels(path: Path) -> tuple[str, ...]:
    labels = read_labels(path, DatasetError)  # that of index 0 first
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

    def __call__(self, index: int) -> Sample:
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
        return Sample(image, label_map=label_map)


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """The indices (H, W) of a PNG with a palette or 8-bit grey. Raises DatasetError on anything else."""
    try:
        with opened_picture(path, "PNG") as picture:
            if picture.mode not in ("P", "L", "1"):
                raise DatasetError(f"{path} is a PNG of mode {picture.mode}; a label map is indexed or 8-bit grey")
            return np.array(picture, dtype=np.uint8)
    except ImageError as error:
        raise DatasetError(f"{path} cannot be read as a PNG ({error})") from error
