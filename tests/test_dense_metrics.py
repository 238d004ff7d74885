"""Average precision against pycocotools, mean IoU against a loop over pixels."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.tasks.metrics import average_precision, mask_iou, mean_iou

SIDE = 60


def scene(rng: np.random.Generator, masks: bool) -> tuple[Objects, Objects]:
    """A few true objects; detections are jittered copies, doubles and inventions, some of the wrong class."""
    count = int(rng.integers(0, 6))
    low = rng.integers(0, SIDE - 30, (count, 2))
    boxes = np.concatenate((low, low + rng.integers(8, 30, (count, 2))), axis=1).astype(float)
    classes = rng.integers(0, 3, count)
    copies = np.repeat(boxes, 2, axis=0) + rng.integers(-5, 6, (2 * count, 4))
    low = rng.integers(0, SIDE - 30, (4, 2))
    inventions = np.concatenate((low, low + rng.integers(8, 30, (4, 2))), axis=1)
    found = np.clip(np.concatenate((copies, inventions)), 0, SIDE).astype(float)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    kinds = np.concatenate((np.repeat(classes, 2), rng.integers(0, 3, 4)))
    kinds = np.where(rng.random(len(kinds)) < 0.1, rng.integers(0, 3, len(kinds)), kinds)
    scores = rng.permutation(1000)[: len(found)] / 1000  # no ties: their order is pycocotools' own affair
    if not masks:
        return Objects(boxes, classes), Objects(found, kinds, scores)
    return Objects(drawn(boxes), classes), Objects(drawn(found), kinds, scores)


def drawn(boxes: Any) -> Any:
    out = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (x1, y1, x2, y2) in zip(out, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
        mask[y1 : y1 + 3, x1 : x1 + 3] = False  # no rectangle
    return out


def by_pycocotools(truth: list[Objects], found: list[Objects], masks: bool) -> dict[str, float]:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools import mask as coding
    from pycocotools.cocoeval import COCOeval

    def annotation(objects: Objects, image: int, i: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"image_id": image, "category_id": int(objects.classes[i]) + 1, "iscrowd": 0}
        if masks:
            entry["segmentation"] = coding.encode(np.asfortranarray(objects.shapes[i].astype(np.uint8)))
            entry["area"] = float(objects.shapes[i].sum())
        else:
            x1, y1, x2, y2 = objects.shapes[i]
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        if objects.scores is not None:
            entry["score"] = float(objects.scores[i])
        return entry

    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        entries = [annotation(t, k, i) for k, t in enumerate(truth) for i in range(len(t.classes))]
        data.dataset = {
            "images": [{"id": k, "height": SIDE, "width": SIDE} for k in range(len(truth))],
            "annotations": [entry | {"id": n + 1} for n, entry in enumerate(entries)],
            "categories": [{"id": c + 1} for c in range(3)],
        }
        data.createIndex()
        results = data.loadRes([annotation(f, k, i) for k, f in enumerate(found) for i in range(len(f.classes))])
        evaluation = COCOeval(data, results, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), (float(s) for s in evaluation.stats[:3]), strict=True))


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_cocos(seed: int, masks: bool) -> None:
    rng = np.random.default_rng(seed)
    truth, found = (list(side) for side in zip(*(scene(rng, masks) for _ in range(25)), strict=True))
    wanted = by_pycocotools(truth, found, masks)
    assert 0.05 < wanted["ap"] < 0.95
    assert average_precision(truth, found) == pytest.approx(wanted, abs=1e-9)


def test_perfect_and_useless_detections() -> None:
    boxes, classes = np.array([[0.0, 0, 5, 5], [10, 10, 30, 20]]), np.array([0, 1])
    truth = [Objects(boxes, classes)]
    assert average_precision(truth, [Objects(boxes, classes, np.array([0.9, 0.2]))])["ap"] == 1.0
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert average_precision(truth, [nothing]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with pytest.raises(DatasetError, match="no object"):
        average_precision([nothing], [nothing])
    with pytest.raises(DatasetError, match="one each"):
        average_precision(truth, [])


def test_mask_iou_counts_pixels() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 7, 5)) < 0.5, rng.random((4, 7, 5)) < 0.5
    wanted = [[(p & q).sum() / (p | q).sum() for q in b] for p in a]
    np.testing.assert_allclose(mask_iou(a, b), wanted, rtol=1e-12)


def test_mean_iou_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    truth = [rng.integers(0, 4, (9, 11)) for _ in range(3)]
    found = [np.where(rng.random((9, 11)) < 0.6, t, rng.integers(0, 4, (9, 11))) for t in truth]
    truth[0][:2] = 255
    shares = []
    for kind in range(5):  # the fifth occurs nowhere and does not count
        both = either = 0
        for want, got in zip(truth, found, strict=True):
            for w, g in zip(want.ravel(), got.ravel(), strict=True):
                if w != 255:
                    both += w == kind and g == kind
                    either += w == kind or g == kind
        if either:
            shares.append(both / either)
    assert len(shares) == 4
    assert mean_iou(truth, found, 5) == pytest.approx(np.mean(shares), rel=1e-12)
