"""RetinaNet's anchors and what turns its raw outputs into detections, in numpy: the same on every target. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.tasks.boxes import decode, make_anchors, suppress_by_class

STRIDES = (8, 16, 32, 64, 128)
SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))  # three an octave, the smallest four strides wide (section 4)
RATIOS = (0.5, 1.0, 2.0)

# Section 4: at most 1000 of the best scores above 0.05 are decoded, overlaps above 0.5 are suppressed.
SCORE, CANDIDATES, OVERLAP, DETECTIONS = 0.05, 1000, 0.5, 100


@dataclass(frozen=True)
class Detections:
    """Of one image, best first: boxes (N, 4) in pixels, scores (N,) in 0..1, classes (N,)."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]


def anchors(image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Anchors (A, 4) of an image of (H, W) in the order of RetinaNet's outputs: level by level, the finest first."""
    height, width = (side + -side % 32 for side in image_size)
    grids = [(height // s, width // s) for s in (8, 16, 32)]
    for _ in range(2):  # a 3x3 stride-2 convolution with padding 1 rounds up
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    return np.concatenate([make_anchors(g, s, SCALES, RATIOS) for g, s in zip(grids, STRIDES, strict=True)])


def detect(
    logits: NDArray[Any],
    deltas: NDArray[Any],
    image_size: tuple[int, int],
    score: float = SCORE,
    overlap: float = OVERLAP,
    limit: int = DETECTIONS,
) -> Detections:
    """Detections of one image of (H, W) from class logits (A, classes) and box offsets (A, 4)."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    flat = np.flatnonzero(scores.ravel() > score)
    best = flat[np.argsort(-scores.ravel()[flat], kind="stable")][:CANDIDATES]
    which, classes = np.divmod(best, logits.shape[1])
    boxes = decode(deltas[which], anchors(image_size)[which], image_size)
    values = scores.ravel()[best]
    kept = suppress_by_class(boxes, values, classes, overlap, limit)
    return Detections(boxes[kept], values[kept], classes[kept])
