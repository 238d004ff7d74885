"""Sets for dense tasks: masks against pycocotools and pixel by pixel, folders that are whole and that are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy.data.coco import decode_mask, fill_polygon, unpack_runs
from dualtoken_deploy.data.objects import IGNORE
from dualtoken_deploy.data.samples import SampleSet, read_or_none
from dualtoken_deploy.errors import DatasetError, UsageError
from dualtoken_deploy.tasks.table import get_task

SIZE = (40, 60)  # (H, W)
SQUARE = [[10, 5, 20, 5, 20, 15, 10, 15]]  # x 10..20, y 5..15


def open_dense(source: str | Path, task: str, part: str = "val") -> SampleSet:
    return get_task(task).open(source, part)


def blob(seed: int) -> np.ndarray[Any, Any]:
    """A mask with holes and pieces."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((SIZE[0] // 4, SIZE[1] // 4)) < 0.4
    return np.kron(coarse, np.ones((4, 4), bool)).astype(bool)


# Masks


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_pycocotools(seed: int) -> None:
    coding = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    mask = blob(seed)
    packed = coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    plain = np.diff(np.flatnonzero(np.diff(np.r_[-1, mask.T.ravel(), -1])))
    counts = [0, *plain] if mask[0, 0] else [*plain]  # the first run is outside
    assert unpack_runs(packed["counts"]) == counts
    text = {"size": list(SIZE), "counts": packed["counts"].decode()}
    for segmentation in (packed, text, {"size": list(SIZE), "counts": [int(c) for c in counts]}):
        assert (decode_mask(segmentation, SIZE) == mask).all()


@pytest.mark.parametrize("seed", range(5))
def test_polygons_are_what_lies_inside(seed: int) -> None:
    """Against an angle sum at every pixel's centre, and pycocotools, which differs at borders alone."""
    coding = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(seed)
    turn = np.sort(rng.uniform(0, 2 * np.pi, 9))
    reach = rng.uniform(6, 17, 9)
    points = np.stack((30 + reach * np.cos(turn) * 1.5, 20 + reach * np.sin(turn)), axis=1)
    wanted = np.zeros(SIZE, bool)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            to = points - (column + 0.5, row + 0.5)
            angle = np.arctan2(to[:, 1], to[:, 0])
            around = (np.diff(np.r_[angle, angle[0]]) + np.pi) % (2 * np.pi) - np.pi
            wanted[row, column] = abs(around.sum()) > np.pi
    mask = fill_polygon(points, SIZE)
    assert (mask == wanted).all()
    theirs = coding.decode(coding.merge(coding.frPyObjects([points.ravel().tolist()], *SIZE))).astype(bool)
    border = np.zeros(SIZE, bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:-1] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    assert not ((theirs != mask) & ~border).any()


def test_pieces_of_a_segmentation_are_joined() -> None:
    mask = decode_mask([*SQUARE, [30, 20, 34, 20, 34, 24, 30, 24]], SIZE)
    wanted = np.zeros(SIZE, bool)
    wanted[5:15, 10:20] = wanted[20:24, 30:34] = True
    assert (mask == wanted).all()


# COCO's format


def coco(folder: Path, **changes: Any) -> Path:
    """Two pictures a part: a square of category 7 and a blob of category 3; a crowd; a picture without anything."""
    blobs = np.diff(np.flatnonzero(np.diff(np.r_[-1, blob(0).T.ravel(), -1])))
    runs = {"size": list(SIZE), "counts": ([0] if blob(0)[0, 0] else []) + [int(b) for b in blobs]}
    data: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in (4, 9)],
        "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "blob"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 7, "bbox": [10, 5, 10, 10], "segmentation": SQUARE, "iscrowd": 0},
            {"id": 2, "image_id": 4, "category_id": 3, "bbox": [0, 0, 60, 40], "segmentation": runs},
            {"id": 3, "image_id": 4, "category_id": 3, "bbox": [50, 30, 5, 5], "iscrowd": 1,
             "segmentation": [[50, 30, 55, 30, 55, 35, 50, 35]]},
        ],
    }  # fmt: skip
    data |= changes
    (folder / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(data))
        (folder / f"{part}2017").mkdir()
        for n in (4, 9):
            Image.new("RGB", (SIZE[1], SIZE[0]), (n, 0, 0)).save(folder / f"{part}2017" / f"{n}.png")
    return folder


def test_a_folder_in_cocos_format(tmp_path: Path) -> None:
    data = open_dense(coco(tmp_path), "detect", "train")
    assert (data.labels, len(data), data.notes) == (("blob", "square"), 2, ())
    assert data.where(1).endswith("train2017/9.png")
    sample = data[0]
    assert sample.boxes is not None
    assert sample.masks is not None
    assert sample.boxes.shapes.tolist() == [[10, 5, 20, 15], [0, 0, 60, 40]]  # the crowd is no object
    assert sample.boxes.classes.tolist() == sample.masks.classes.tolist() == [1, 0]
    assert (sample.masks.shapes[1] == blob(0)).all()
    empty = data[1]
    assert empty.boxes is not None
    assert empty.masks is not None
    assert (empty.boxes.shapes.shape, empty.masks.shapes.shape) == ((0, 4), (0, *SIZE))


def test_instances_as_a_label_map(tmp_path: Path) -> None:
    data = open_dense(coco(tmp_path), "segment")
    assert data.labels == ("background", "blob", "square")
    wanted = blob(0).astype(np.uint8)
    wanted[5:15, 10:20] = 2  # the smaller is in front
    wanted[30:35, 50:55] = IGNORE
    label_map = data[0].label_map
    assert label_map is not None
    assert (label_map == wanted).all()


def note(**changes: Any) -> dict[str, Any]:
    return {"id": 8, "image_id": 4, "category_id": 7, "bbox": [1, 2, 3, 4], "segmentation": SQUARE} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "2 images and 0 annotations"), ({"annotations": [{}]}, "annotation without id is empty"),
        ({"annotations": [note(bbox=[])]}, "annotation 8 is empty or not whole"),
        ({"annotations": [note(bbox=[1, 2, 0, 4])]}, "every one of its 1 annotations has an empty box"),
        ({"annotations": [note(category_id=5)]}, "annotation 8 has category 5, which the file does not list"),
        ({"annotations": [note(image_id=[4])]}, "annotation 8 is empty or not whole"),
        ({"annotations": [note(image_id=1)]}, "annotation 8 is of image 1, which"), ({"images": None}, "COCO's format"),
        ({"annotations": [note(bbox=[1, 2, float("nan"), 4])]}, "is not JSON"),
        ({"annotations": [note(bbox=[1, 2, "nan", 4])]}, "a box that is no number"),
        ({"annotations": [note(bbox=[1, 2, 10**400, 4])]}, "annotation 8 is empty or not whole"),
        ({"images": [{"id": 4, "file_name": "../4.png", "height": 4, "width": 6}]}, r"'\.\./4\.png', which is none"),
        ({"images": [{"id": 4, "file_name": "/4.png", "height": 4, "width": 6}]}, r"'/4\.png', which is none"),
        ({"images": [{"id": 4, "file_name": "4.png", "height": 10**9, "width": 6}]}, "which no picture has"),
        ({"images": [{"id": 4, "file_name": "4.png", "height": -1, "width": 6}]}, "which no picture has"),
        ({"images": [{"id": 4, "file_name": "no.png", "height": 4, "width": 6}]}, r"names the picture no\.png"),
    ],
)  # fmt: skip
def test_annotation_files_that_are_not_whole(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dense(coco(tmp_path, **changes), "detect")


def test_an_annotation_file_that_is_nested_too_deep_or_a_pipe(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    (folder / "annotations/instances_val2017.json").write_text("[" * 5000)
    with pytest.raises(DatasetError, match="is not JSON"):
        open_dense(folder, "detect")
    (folder / "annotations/instances_val2017.json").unlink()
    os.mkfifo(folder / "annotations/instances_val2017.json")
    with pytest.raises(DatasetError, match="is no regular file"):
        open_dense(folder, "detect")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 4], "counts": [12]}, "run lengths of 3 x 4 pixels .* in a picture of 40 x 60"),
        ({"size": [*SIZE], "counts": [5, 6]}, "add up to 11 pixels of 2400"), ({"size": [*SIZE]}, "cannot be read"),
        ({"size": [*SIZE], "counts": "P"}, "cannot be read"), ([[1, 2, 3]], "neither polygons nor run lengths"),
        ({"size": [], "counts": [2400]}, "cannot be read"), ({"size": [*SIZE], "counts": "o" * 10**6}, "more bits"),
        ({"size": ["a" * 99, 2], "counts": [2400]}, "run lengths of a{20} x 2 pixels"),
        ([[1, 2, 3, "nan", 5, 6]], "neither polygons nor run lengths"), ([[1e300] * 6], "neither polygons"),
        ([[10**400] * 6], "neither polygons"), ({"size": [*SIZE], "counts": [1e300]}, "add up to"),
    ],
)  # fmt: skip
def test_segmentations_that_are_not_whole(tmp_path: Path, segmentation: Any, message: str) -> None:
    data = open_dense(coco(tmp_path, annotations=[note(segmentation=segmentation)]), "detect")
    with pytest.raises(DatasetError, match=rf"4\.png: annotation 8: .*{message}"):
        data[0]


def test_empty_boxes_are_left_out_and_counted(tmp_path: Path) -> None:
    data = open_dense(coco(tmp_path, annotations=[note(), note(id=11, bbox=[70, 5, 5, 5])]), "detect")
    (said,) = data.notes
    assert said.endswith("1 annotations with an empty box left out (first: id 11)")
    assert data[0].boxes is not None
    assert len(data[0].boxes.classes) == 1


def test_without_segmentations_there_are_boxes_and_no_masks(tmp_path: Path) -> None:
    folder = coco(tmp_path, annotations=[note(segmentation=[])])
    assert open_dense(folder, "detect")[0].masks is None
    with pytest.raises(DatasetError, match="annotation 8 has no segmentation"):
        open_dense(folder, "segment")[0]


def test_pictures_that_are_missing_or_of_another_size(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    Image.new("RGB", (5, 7)).save(folder / "val2017/4.png")
    with pytest.raises(DatasetError, match=r"4\.png has 7 x 5 pixels .*, its entry in .* 40 x 60"):
        open_dense(folder, "detect")[0]
    (folder / "val2017/9.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 pictures .* are not there, first: .*9\.png"):
        open_dense(folder, "detect")
    (folder / "annotations/val.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"has instances_val2017\.json, val\.json; it needs one file"):
        open_dense(folder, "detect")


# Label maps


def maps(folder: Path) -> Path:
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for n in range(2):
            Image.new("RGB", (6, 4), (n, 0, 0)).save(folder / part / "images" / f"{n}.jpg")
            labels = Image.fromarray(np.array([[0, 1, 2, 0, 0, IGNORE]] * 4, np.uint8)).convert("P")
            labels.putdata([0, 1, 2, 0, 0, IGNORE] * 4)
            labels.save(folder / part / "masks" / f"{n}.png")
    (folder / "labels.txt").write_text("nothing\ncat\ndog\n")
    return folder


def test_a_folder_of_label_maps(tmp_path: Path) -> None:
    data = open_dense(maps(tmp_path), "segment", "train")
    assert (data.labels, len(data)) == (("nothing", "cat", "dog"), 2)
    label_map = data[1].label_map
    assert label_map is not None
    assert label_map.tolist() == [[0, 1, 2, 0, 0, IGNORE]] * 4
    assert (len(data.limit(1)), len(data.limit(5))) == (1, 2)
    with pytest.raises(UsageError, match="leaves none"):
        data.limit(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "val/masks/1.png").unlink(), r"1 of 2 pictures have no label map, first: no file .*1\.png"),
        (lambda d: (d / "labels.txt").unlink(), r"labels\.txt cannot be read .*; write the class names"),
        (lambda d: (d / "labels.txt").write_text("one\n"), "names 1 classes"),
        (lambda d: (d / "labels.txt").write_text("one\n\ntwo\n"), "line 2 has no name"),
        (lambda d: Image.new("L", (5, 4)).save(d / "val/masks/1.png"), r"has 4 x 5 pixels .*, its picture .* 4 x 6"),
        (lambda d: Image.new("L", (6, 4), 3).save(d / "val/masks/1.png"), r"the index 3, but labels\.txt names 3"),
        (lambda d: Image.new("RGB", (6, 4)).save(d / "val/masks/1.png"), "a PNG of mode RGB; a label map is indexed"),
        (lambda d: (d / "val/masks/1.png").write_bytes(b"no"), r"1\.png cannot be read as a PNG"),
        (lambda d: [p.unlink() for p in (d / "val/images").iterdir()], "holds no images"),
    ],
)  # fmt: skip
def test_label_maps_that_are_not_whole(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(maps(tmp_path))
    with pytest.raises(DatasetError, match=message):
        open_dense(tmp_path, "segment")[1]


def test_what_is_no_set(tmp_path: Path) -> None:
    for source, message in ((tmp_path / "none", "no folder at"), (tmp_path, "neither annotations/")):
        with pytest.raises(DatasetError, match=message):
            open_dense(source, "detect")
    with pytest.raises(DatasetError, match="label maps only"):
        open_dense(maps(tmp_path), "detect")
    with pytest.raises(UsageError, match="no part 'guess'"):
        open_dense("scenes", "detect", "guess")


def test_a_picture_that_cannot_be_decoded_is_none(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    (folder / "val2017/4.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert read_or_none(open_dense(folder, "detect"), 0) is None


# Scenes


def test_scenes_of_the_two_parts_are_others() -> None:
    train, val = (open_dense("scenes", "segment", part) for part in ("train", "val"))
    assert train.labels == ("clutter", "disc", "square", "triangle", "cross")
    assert open_dense("scenes", "detect").labels == train.labels[1:]
    assert train.digest != val.digest
    seen = {train[i].image.tobytes() for i in range(20)}
    assert len(seen) == 20
    assert not seen & {val[i].image.tobytes() for i in range(20)}
