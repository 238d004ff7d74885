"""COCO's annotation format (https://cocodataset.org/#format-data): instances with boxes, polygons and run lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.decode import parse
from dualtoken_deploy.data.images import MAX_PIXELS
from dualtoken_deploy.data.objects import IGNORE, Objects
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.files import read_bytes

BACKGROUND = "background"  # class 0 of the label maps that are made of instances

MAX_FILE_BYTES = 2 << 30  # instances_train2017.json, the largest of COCO's own, has 448 MB
FARTHEST = 1e9  # pixels from the picture that a polygon may reach
RUN_BITS = 40
MAX_MASK_BYTES = 4 << 30  # of one picture's objects

Size = tuple[int, int]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Instance:
    """`box` (x1, y1, x2, y2) in pixels; `segmentation` as in the file, or None; a crowd is a region and no object."""

    id: Any
    category: int
    box: tuple[float, float, float, float]
    segmentation: Any
    crowd: bool


@dataclass(frozen=True)
class CocoImage:
    """A picture of (H, W) with its instances."""

    path: Path
    size: Size
    instances: tuple[Instance, ...]

    def boxes(self) -> Objects:
        """The boxes (N, 4) of the instances that are no crowds."""
        own = self._objects()
        boxes = np.array([i.box for i in own], np.float64).reshape(-1, 4)
        return Objects(boxes, np.array([i.category for i in own], np.int64))

    def masks(self) -> Objects | None:
        """The masks (N, H, W) of the same instances; None where one of them has no segmentation."""
        own = self._objects()
        if any(i.segmentation is None for i in own):
            return None
        if len(own) * self.size[0] * self.size[1] > MAX_MASK_BYTES:
            raise DatasetError(f"{self.path} has {len(own)} objects, too many for masks of its size; mend it")
        masks = np.array([self._mask(i) for i in own], bool).reshape(-1, *self.size)
        return Objects(masks, np.array([i.category for i in own], np.int64))

    def label_map(self) -> NDArray[np.uint8]:
        """Category + 1 (H, W), 0 behind the instances, IGNORE in crowds; of two instances the smaller is in front."""
        out = np.zeros(self.size, np.uint8)
        parts = []
        for instance in self.instances:
            if instance.segmentation is None:
                raise DatasetError(f"{self.path}: annotation {instance.id} has no segmentation to make a label map of")
            parts.append((self._mask(instance), IGNORE if instance.crowd else instance.category + 1))
        for mask, value in sorted(parts, key=lambda part: -int(part[0].sum())):
            out[mask] = value
        return out

    def _mask(self, instance: Instance) -> Mask:
        try:
            return decode_mask(instance.segmentation, self.size)
        except DatasetError as error:
            raise DatasetError(f"{self.path}: annotation {instance.id}: {error}") from error

    def _objects(self) -> list[Instance]:
        return [i for i in self.instances if not i.crowd]


@dataclass(frozen=True)
class CocoSet:
    """The pictures of one annotation file in its order; `labels` are the categories by id."""

    path: Path
    labels: tuple[str, ...]
    images: tuple[CocoImage, ...]
    digest: str
    notes: tuple[str, ...]


def open_coco(folder: Path, part: str) -> CocoSet:
    """The `part` of a folder in COCO's format. Raises DatasetError that names file and entry."""
    path = _annotation_file(folder / "annotations", part)
    text = read_bytes(path, MAX_FILE_BYTES, DatasetError, "split it")
    data = parse(text, str(path), DatasetError, "export it anew")
    try:
        categories = {c["id"]: str(c["name"]) for c in data["categories"]}
        pictures = {p["id"]: (str(p["file_name"]), (int(p["height"]), int(p["width"]))) for p in data["images"]}
        entries = list(data["annotations"])
        order = {number: i for i, number in enumerate(sorted(categories))}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DatasetError(
            f"{path} is not in COCO's format ({type(error).__name__}: {error}); export it anew"
        ) from error
    for name, size in pictures.values():
        check_picture(path, name, size)
    if not pictures or not entries:
        raise DatasetError(f"{path} has {len(pictures)} images and {len(entries)} annotations; it needs some of both")
    grouped: dict[Any, list[Instance]] = {number: [] for number in pictures}
    empty = []
    for entry in entries:
        instance = _instance(entry, path, pictures, order)
        if instance.box[2] <= instance.box[0] or instance.box[3] <= instance.box[1]:
            empty.append(instance.id)
        else:
            grouped[entry["image_id"]].append(instance)
    if len(empty) == len(entries):
        raise DatasetError(f"{path}: every one of its {len(entries)} annotations has an empty box")
    place = _image_folder(folder, path, part, next(iter(pictures.values()))[0])
    images = tuple(CocoImage(place / n, size, tuple(grouped[key])) for key, (n, size) in pictures.items())
    if lacking := [image.path for image in images if not image.path.is_file()]:
        raise DatasetError(f"{len(lacking)} of {len(images)} pictures of {path} are not there, first: {lacking[0]}")
    notes = (f"{path}: {len(empty)} annotations with an empty box left out (first: id {empty[0]})",) if empty else ()
    labels = tuple(categories[number] for number in order)
    return CocoSet(path, labels, images, hashlib.sha256(text).hexdigest(), notes)


def check_picture(path: Path, name: str, size: Size) -> None:
    """Raises DatasetError on a picture outside of the folder of pictures, or of a size that none has."""
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DatasetError(f"{path} names the picture {name!r}, which is none in its folder; mend it")
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DatasetError(f"{path}: {name} has {size[0]} x {size[1]} pixels (H x W), which no picture has; mend it")


def _annotation_file(folder: Path, part: str) -> Path:
    found = sorted({*folder.glob(f"instances_{part}*.json"), *folder.glob(f"{part}.json")})
    if len(found) != 1:
        names = f"has {', '.join(p.name for p in found)}" if found else "has none"
        raise DatasetError(f"{folder} {names}; it needs one file instances_{part}*.json or {part}.json")
    return found[0]


def _image_folder(folder: Path, path: Path, part: str, first: str) -> Path:
    """The folder that has the first picture: named as the annotation file is, or after the part, or images/."""
    name = path.stem.removeprefix("instances_")
    places = [folder / p for p in dict.fromkeys((name, f"images/{name}", part, f"images/{part}", "images"))]
    for place in places:
        if (place / first).is_file():
            return place
    tried = ", ".join(str(p.relative_to(folder)) for p in places)
    raise DatasetError(f"{path} names the picture {first}, and none of {tried} in {folder} has it")


def _instance(entry: Any, path: Path, pictures: Mapping[Any, tuple[str, Size]], order: Mapping[Any, int]) -> Instance:
    number = entry.get("id", "without id") if isinstance(entry, dict) else "that is no object"
    try:
        picture, category = entry["image_id"], entry["category_id"]
        left, top, width, height = (float(v) for v in entry["bbox"])
        crowd, listed = bool(entry.get("iscrowd", 0)), (picture in pictures, category in order)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(
            f"{path}: annotation {number} is empty or not whole (image_id, category_id, bbox of four); mend it"
        ) from error
    if not listed[0]:
        raise DatasetError(f"{path}: annotation {number} is of image {picture}, which the file does not list")
    if not listed[1]:
        raise DatasetError(f"{path}: annotation {number} has category {category}, which the file does not list")
    if not all(np.isfinite((left, top, width, height))):
        raise DatasetError(f"{path}: annotation {number} has a box that is no number: {entry['bbox']}")
    rows, columns = pictures[picture][1]
    box = (max(left, 0.0), max(top, 0.0), min(left + width, columns), min(top + height, rows))
    segmentation = entry.get("segmentation") or None
    return Instance(number, order[category], box, segmentation, crowd)


def decode_mask(segmentation: Any, size: Size) -> Mask:
    """A COCO segmentation as a mask (H, W): polygons [[x, y, ...], ...], or run lengths {"size", "counts"}.

    Raises DatasetError on anything else, or run lengths of another size.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, size)
    try:
        polygons = [np.array(p, np.float64).reshape(-1, 2) for p in segmentation]
        if not all((np.abs(polygon) < FARTHEST).all() for polygon in polygons):  # of NaN this is false too
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"a segmentation is neither polygons nor run lengths: {str(segmentation)[:60]}") from error
    out = np.zeros(size, bool)
    for polygon in polygons:
        out |= fill_polygon(polygon, size)
    return out


def fill_polygon(points: NDArray[np.float64], size: Size) -> Mask:
    """The pixels (H, W) whose centres lie inside a polygon (N, 2) of x and y, by the even-odd rule."""
    height, width = size
    crossings = np.zeros((height, width + 1), np.int64)
    rows = np.arange(height) + 0.5
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        cut = np.flatnonzero((rows >= min(y1, y2)) & (rows < max(y1, y2)))
        x = x1 + (rows[cut] - y1) * (x2 - x1) / (y2 - y1) if len(cut) else np.zeros(0)
        np.add.at(crossings, (cut, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), 1)
    out: Mask = np.cumsum(crossings[:, :width], axis=1) % 2 == 1
    return out


def _from_runs(segmentation: Mapping[str, Any], size: Size) -> Mask:
    try:
        counts, (height, width) = segmentation["counts"], segmentation["size"]
        runs = unpack_runs(counts) if isinstance(counts, (str, bytes)) else [int(c) for c in counts]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DatasetError(f"run lengths {str(segmentation)[:60]} cannot be read ({error})") from error
    if (height, width) != size:
        said = f"{height!s:.20} x {width!s:.20}"
        raise DatasetError(f"run lengths of {said} pixels (H x W) in a picture of {size[0]} x {size[1]}")
    if sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
        raise DatasetError(f"run lengths add up to {sum(runs)} pixels of {size[0] * size[1]}")
    values = np.arange(len(runs)) % 2 == 1  # the first run is outside
    out: Mask = np.repeat(values, runs).reshape(size[::-1]).T  # column by column
    return out


def unpack_runs(packed: str | bytes) -> list[int]:
    """COCO's compressed run lengths: five bits a character, from the second run of each kind on as differences."""
    text = packed.encode() if isinstance(packed, str) else packed
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = text[at] - 48
            if shift > RUN_BITS:
                raise ValueError("a run has more bits than any picture")
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            at, shift = at + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
