"""How good dense predictions are: COCO's average precision for boxes and masks, mean IoU for label maps. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.objects import IGNORE, Objects
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.tasks.boxes import Array, iou_matrix

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's ten overlaps
RECALLS = np.linspace(0, 1, 101)  # at which it reads the precision
LIMIT = 100  # detections of a class and an image that it looks at


def average_precision(truth: Sequence[Objects], found: Sequence[Objects]) -> dict[str, float]:
    """{"ap": mean over ten overlaps, "ap50", "ap75"} over images and the classes that occur in `truth`, in 0..1.

    As pycocotools computes it over all areas with 100 detections, without crowds.
    Raises DatasetError where the lists do not fit or nothing is true.
    """
    _, table = precision_table(truth, found)
    by_threshold = table.mean(0)
    return {
        "ap": float(by_threshold.mean()),
        "ap50": float(by_threshold[THRESHOLDS.index(0.5)]),
        "ap75": float(by_threshold[THRESHOLDS.index(0.75)]),
    }


def precision_table(
    truth: Sequence[Objects], found: Sequence[Objects]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The classes (C,) that occur in `truth` and the average precision of each at each of THRESHOLDS (C, 10)."""
    if len(truth) != len(found):
        raise DatasetError(f"{len(truth)} images of truth and {len(found)} of detections; give one each")
    classes = np.unique(np.concatenate([t.classes for t in truth])) if truth else np.zeros(0)
    if not len(classes):
        raise DatasetError("there is no object in the truth, so precision means nothing")
    table = np.array([[_class_ap(truth, found, c, t) for t in THRESHOLDS] for c in classes])
    return classes.astype(np.int64), table


def mean_iou(truth: Sequence[Array], found: Sequence[Array], classes: int, ignore: int = IGNORE) -> float:
    """Mean over the classes that occur of intersection over union, counted over all pixels that are not `ignore`."""
    shares = class_iou(truth, found, classes, ignore)
    if np.isnan(shares).all():
        raise DatasetError("no pixel has a class, so mean IoU means nothing")
    return float(np.nanmean(shares))


def class_iou(
    truth: Sequence[Array], found: Sequence[Array], classes: int, ignore: int = IGNORE
) -> NDArray[np.float64]:
    """Intersection over union of each class over all pixels that are not `ignore`; NaN where it occurs nowhere."""
    counts = np.zeros((classes, classes), np.int64)
    for want, got in zip(truth, found, strict=True):
        seen = want != ignore
        pairs = want[seen].astype(np.int64) * classes + got[seen].astype(np.int64)
        counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    inner = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - inner
    out: NDArray[np.float64] = np.divide(inner, union, out=np.full(classes, np.nan), where=union > 0)
    return out


def mask_iou(a: Array, b: Array) -> NDArray[np.float64]:
    """Intersection over union of masks (N, H, W) with masks (M, H, W): (N, M)."""
    left, right = (m.reshape(len(m), -1).astype(np.float64) for m in (a, b))
    inner = left @ right.T
    union = left.sum(1)[:, None] + right.sum(1)[None] - inner
    out: NDArray[np.float64] = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
    return out


def _class_ap(truth: Sequence[Objects], found: Sequence[Objects], kind: Any, threshold: float) -> float:
    scores, hits, total = [], [], 0
    for want, got in zip(truth, found, strict=True):
        if got.scores is None:
            raise DatasetError("detections need scores")
        mine = np.flatnonzero(got.classes == kind)
        mine = mine[np.argsort(-got.scores[mine], kind="stable")][:LIMIT]
        true = np.flatnonzero(want.classes == kind)
        total += len(true)
        scores.append(got.scores[mine])
        hits.append(_match(got.shapes[mine], want.shapes[true], threshold))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _area(np.concatenate(hits)[order], total)


def _match(found: Array, truth: Array, threshold: float) -> NDArray[np.bool_]:
    """Whether each detection, best first, takes a true object that none took before: of those the best overlap."""
    hits = np.zeros(len(found), bool)
    if not len(found) or not len(truth):
        return hits
    overlap: Callable[[Array, Array], NDArray[np.float64]] = iou_matrix if found.ndim == 2 else mask_iou
    free = overlap(found, truth)
    for i in range(len(found)):
        best = int(free[i].argmax())
        if free[i, best] >= threshold:
            hits[i] = True
            free[:, best] = -1.0
    return hits


def _area(hits: NDArray[np.bool_], total: int) -> float:
    """Mean over RECALLS of the best precision at that recall or above."""
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.where(at < len(best), best[np.minimum(at, len(best) - 1)], 0.0).mean()) if len(best) else 0.0
