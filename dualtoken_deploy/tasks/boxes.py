"""Boxes, anchors, suppression and masks by their definitions, in numpy: what follows a detector on any device.

A box is (x1, y1, x2, y2) in pixels of the image, x to the right and y down, with x2 and y2 exclusive: its area is
(x2 - x1) * (y2 - y1). Everything is float64 inside, whatever comes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Largest log-scale that a decoded box may grow by: a side of 16 pixels can become 1000 (Fast R-CNN's own bound).
MAX_LOG_SCALE = float(np.log(1000 / 16))


def make_anchors(
    grid: tuple[int, int], stride: int, scales: tuple[float, ...], ratios: tuple[float, ...]
) -> NDArray[np.float64]:
    """Anchors of one level: (rows * columns * ratios * scales, 4), cells row by row, in each ratios, then scales.

    An anchor has its centre in the middle of its cell, area (scale * stride)^2 and height / width = ratio.
    """
    root = np.sqrt(np.array(ratios))[:, None]
    heights, widths = stride * root * np.array(scales), stride / root * np.array(scales)  # (ratios, scales)
    sides = np.stack((widths.ravel(), heights.ravel()), axis=1)  # (A, 2)
    rows, columns = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    centres = (np.stack((columns, rows), axis=-1).reshape(-1, 1, 2) + 0.5) * stride  # (cells, 1, 2)
    out: NDArray[np.float64] = np.concatenate((centres - sides / 2, centres + sides / 2), axis=-1).reshape(-1, 4)
    return out


def encode(boxes: Array, anchors: Array) -> NDArray[np.float64]:
    """Boxes (N, 4) as offsets from anchors (N, 4): centre shift over the anchor's sides, log of the ratio of sides."""
    (centre, sides), (origin, scale) = _centre_and_sides(boxes), _centre_and_sides(anchors)
    out: NDArray[np.float64] = np.concatenate(((centre - origin) / scale, np.log(sides / scale)), axis=1)
    return out


def decode(deltas: Array, anchors: Array, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes (N, 4) from offsets (N, 4), clipped to the image of (H, W)."""
    origin, scale = _centre_and_sides(anchors)
    deltas = deltas.astype(np.float64)
    centre = origin + deltas[:, :2] * scale
    sides = scale * np.exp(np.minimum(deltas[:, 2:], MAX_LOG_SCALE))
    boxes = np.concatenate((centre - sides / 2, centre + sides / 2), axis=1)
    height, width = image_size
    out: NDArray[np.float64] = np.clip(boxes, 0, np.array([width, height, width, height]))
    return out


def iou_matrix(a: Array, b: Array) -> NDArray[np.float64]:
    """Intersection over union of every box of a (N, 4) with every one of b (M, 4): (N, M); 0 where both are empty."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = np.clip(high - low, 0, None).prod(axis=2)
    union = _area(a)[:, None] + _area(b)[None] - inner
    out: NDArray[np.float64] = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
    return out


def suppress(boxes: Array, scores: Array, iou: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: kept indices, best score first; ties keep the order of the input.

    A box goes where its overlap with a kept, better one is above `iou`.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        order = rest[iou_matrix(boxes[best : best + 1], boxes[rest])[0] <= iou]
    return np.array(kept, dtype=np.int64)


def suppress_by_class(boxes: Array, scores: Array, classes: Array, iou: float, limit: int) -> NDArray[np.int64]:
    """Suppression within each class, then the best `limit` of all classes, best first."""
    kept = [np.zeros(0, np.int64)]
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        kept.append(members[suppress(boxes[members], scores[members], iou)])
    together = np.sort(np.concatenate(kept))  # so that equal scores keep the order of the input
    out: NDArray[np.int64] = together[np.argsort(-scores[together], kind="stable")][:limit]
    return out


def paste_mask(mask: Array, box: Array, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """A mask (h, w) of probabilities over its box, laid into an image of (H, W): bilinear at pixel centres, 0 outside.

    Pixel (r, c) has its centre at (r + 0.5, c + 0.5); cell (i, j) of the mask has its at the middle of its share of the
    box. Beyond the outermost cell centres the mask fades to zero over one cell, as if zeros surrounded it.
    """
    height, width = image_size
    x1, y1, x2, y2 = (float(v) for v in box)
    out = np.zeros(image_size)
    if x2 <= x1 or y2 <= y1:
        return out
    rows = (np.arange(height) + 0.5 - y1) / (y2 - y1) * mask.shape[0] - 0.5
    columns = (np.arange(width) + 0.5 - x1) / (x2 - x1) * mask.shape[1] - 0.5
    out += _hat(rows, mask.shape[0]) @ mask.astype(np.float64) @ _hat(columns, mask.shape[1]).T
    return out


def mask_of(mask: Array, box: Array, image_size: tuple[int, int], level: float) -> NDArray[np.bool_]:
    """Where a pasted mask is at least `level`, which is above 0: worked out around the box alone."""
    height, width = image_size
    reach = [(side / cells) for side, cells in zip((box[3] - box[1], box[2] - box[0]), mask.shape, strict=True)]
    top, bottom = (int(np.clip(v, 0, height)) for v in (box[1] - reach[0], box[3] + reach[0] + 1))
    left, right = (int(np.clip(v, 0, width)) for v in (box[0] - reach[1], box[2] + reach[1] + 1))
    out = np.zeros(image_size, bool)
    if bottom > top and right > left:
        moved = np.asarray(box, np.float64) - (left, top, left, top)
        out[top:bottom, left:right] = paste_mask(mask, moved, (bottom - top, right - left)) >= level
    return out


def _hat(positions: Array, count: int) -> NDArray[np.float64]:
    """Linear interpolation weights (positions, count): 1 at a cell's centre, 0 from the next one on."""
    out: NDArray[np.float64] = np.clip(1 - np.abs(positions[:, None] - np.arange(count)), 0, None)
    return out


def _centre_and_sides(boxes: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    boxes = boxes.astype(np.float64)
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    return out
