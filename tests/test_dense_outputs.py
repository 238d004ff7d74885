"""What outputs of dense models say of a picture, and how two of them are compared: no bundle, no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.data.scenes import CLASSES, make_scene
from dualtoken_deploy.tasks.anchors import anchors
from dualtoken_deploy.tasks.base import GOLDEN_VALUES
from dualtoken_deploy.tasks.boxes import encode
from dualtoken_deploy.tasks.detect import DETECT
from dualtoken_deploy.tasks.segment import SEGMENT
from tests.numerics import assert_close

MODEL = (64, 128)  # (H, W); pictures of 96 x 96 are stretched by other factors in each direction
PICTURE = (96, 96)
STRETCH = np.tile((MODEL[1] / PICTURE[1], MODEL[0] / PICTURE[0]), 2)  # of a box


def truth() -> Any:
    from dualtoken_deploy.data.samples import Sample

    scenes = [make_scene(seed, most=2) for seed in range(6)]  # of more, some of one class overlap and suppress
    return [Sample(s.image, boxes=s.boxes, masks=s.masks) for s in scenes]


def raw_of(boxes: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """RetinaNet's outputs that mean these boxes: each is said by one anchor of its own."""
    grid = anchors(MODEL)
    logits, deltas = np.full((1, len(grid), len(CLASSES)), -12.0, np.float32), np.zeros((1, len(grid), 4), np.float32)
    scaled = boxes * STRETCH
    for i, (box, kind) in enumerate(zip(scaled, classes, strict=True)):
        at = 9 * 40 + i  # any anchor will do: what it says is relative to itself
        logits[0, at, kind] = 4.0 - 0.1 * i
        deltas[0, at] = encode(box[None], grid[at : at + 1])[0]
    return {"logits": logits, "deltas": deltas}


def test_raw_outputs_that_mean_the_truth_score_one() -> None:
    pairs = [(s, DETECT.interpret(raw_of(s.boxes.shapes, s.boxes.classes), MODEL, PICTURE)) for s in truth()]
    assert DETECT.score(pairs, len(CLASSES))["ap"] == pytest.approx(1.0)


def test_masks_are_pasted_into_the_pictures_own_pixels() -> None:
    """Masks of 28 x 28 cut out of the true ones come back: nearly the same, whatever the picture was stretched to."""
    pairs = []
    for sample in truth():
        boxes, count = sample.boxes.shapes, len(sample.boxes.shapes)
        outputs = {
            "boxes": np.zeros((1, 10, 4), np.float32),
            "scores": np.zeros((1, 10), np.float32),
            "classes": np.full((1, 10), -1, np.int32),
            "masks": np.zeros((1, 10, 28, 28), np.float32),
        }
        outputs["boxes"][0, :count] = boxes * STRETCH
        outputs["scores"][0, :count] = 0.9
        outputs["classes"][0, :count] = sample.boxes.classes
        for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
            rows = (y1 + (np.arange(28) + 0.5) * (y2 - y1) / 28).astype(int)
            columns = (x1 + (np.arange(28) + 0.5) * (x2 - x1) / 28).astype(int)
            outputs["masks"][0, i] = sample.masks.shapes[i][rows[:, None], columns[None]]
        pairs.append((sample, DETECT.interpret(outputs, MODEL, PICTURE)))
    scores = DETECT.score(pairs, len(CLASSES))
    assert scores["ap"] == pytest.approx(1.0)
    assert scores["mask_ap75"] == pytest.approx(1.0)


@pytest.mark.parametrize("form", ["logits", "labels"])
def test_label_maps_come_back_to_the_pictures_size(form: str) -> None:
    labels = np.zeros((1, *MODEL), np.int32)
    labels[0, 16:32, 64:96] = 3
    outputs = {"labels": labels} if form == "labels" else {"logits": np.eye(5)[labels].transpose(0, 3, 1, 2)}
    wanted = np.zeros((48, 256), np.uint8)
    wanted[12:24, 128:192] = 3
    found = SEGMENT.interpret(outputs, MODEL, (48, 256)).label_map
    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def detections(*rows: tuple[float, float, float, float, float, int]) -> dict[str, np.ndarray[Any, Any]]:
    array = np.array(rows, np.float32).reshape(-1, 6)
    fill = [np.zeros((3, 4)), np.zeros(3), np.full(3, -1)]
    boxes, scores, classes = (
        np.concatenate((a, b))[None] for a, b in zip((array[:, :4], array[:, 4], array[:, 5]), fill, strict=True)
    )
    return {"boxes": boxes, "scores": scores, "classes": classes.astype(np.int32)}


def test_detections_are_compared_in_pairs_whatever_their_order() -> None:
    one, two, other = (10, 10, 30, 40, 0.9, 1), (50, 20, 60, 30, 0.8, 2), (50, 20, 60, 30, 0.8, 3)
    same = DETECT.compare(detections(one, two), detections(two, one))
    assert (same.agreement, same.max_abs_error, same.sqnr_db) == (1.0, 0.0, 300.0)
    assert DETECT.compare(detections(one, two), detections(one, other)).agreement == 0.5  # another class
    assert DETECT.compare(detections(one, two), detections(one)).agreement == 0.5  # one is not found
    assert DETECT.compare(detections(one), detections(one, two)).agreement == 0.5  # one too many
    assert (
        DETECT.compare(detections(one), detections((10, 10, 30, 45, 0.9, 1))).agreement == 0.0
    )  # an edge 5 pixels off
    near = DETECT.compare(detections(one), detections((10, 10, 30, 40.5, 0.9, 1)))
    assert near.agreement == 1.0
    assert near.max_abs_error == pytest.approx(0.5)
    assert DETECT.compare(detections(), detections()).agreement == 1.0
    assert DETECT.compare(detections(), detections(one)).agreement == 0.0


def test_raw_outputs_take_the_worst_of_their_outputs() -> None:
    rng = np.random.default_rng(0)
    want = {"logits": rng.normal(size=(1, 50, 4)), "deltas": rng.normal(size=(1, 50, 4))}
    got = want | {"deltas": want["deltas"] + 1e-3 * rng.normal(size=(1, 50, 4))}
    assert 55 < DETECT.compare(want, got).sqnr_db < 65
    assert DETECT.compare(want, got).agreement == 1.0


def test_golden_keeps_small_outputs_whole_and_thins_large_ones() -> None:
    large = np.arange(5 * GOLDEN_VALUES, dtype=np.float32).reshape(1, 5, -1)
    kept = DETECT.thin({"small": np.ones((1, 3)), "logits": large})
    assert_close(kept["small"], np.ones((1, 3)), relative=0)
    assert kept["logits"].shape == (GOLDEN_VALUES,)
    np.testing.assert_array_equal(np.diff(kept["logits"]), 5)
    assert DETECT.compare({"logits": kept["logits"]}, DETECT.thin({"logits": large + 1.0})).max_abs_error == 1.0
