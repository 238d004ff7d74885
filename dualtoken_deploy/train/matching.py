"""What RetinaNet's outputs should have been: anchors matched to objects (arXiv:1708.02002, section 4). No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.tasks.boxes import Array, encode, iou_matrix

FOREGROUND, BACKGROUND = 0.5, 0.4  # overlap from which an anchor takes an object, and below which it takes none
NOTHING, UNDECIDED = -1, -2  # in the place of a class: background, and an anchor that counts in no loss


def match(anchors: Array, boxes: Array, classes: Array) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For anchors (A, 4) the classes (A,) and box offsets (A, 4) of boxes (N, 4) with classes (N,).

    An anchor takes the object that it overlaps most, from FOREGROUND on; below BACKGROUND it is NOTHING, between them
    UNDECIDED. The anchors that overlap an object most take it in any case, as common implementations have it, so that
    small objects are learnt too; of two objects with the same such anchors the one that is harder to reach has them.
    Offsets are zero without an object.
    """
    wanted = np.full(len(anchors), NOTHING, np.int64)
    deltas = np.zeros((len(anchors), 4))
    if not len(boxes):
        return wanted, deltas
    overlap = iou_matrix(anchors, boxes)  # (A, N)
    taken = overlap.argmax(1)
    most = overlap[np.arange(len(anchors)), taken]
    wanted[most >= BACKGROUND] = UNDECIDED
    positive = most >= FOREGROUND
    best = overlap.max(0)
    for i in np.argsort(-best, kind="stable"):
        if best[i] > 0:
            own = overlap[:, i] == best[i]
            taken[own], positive[own] = i, True
    wanted[positive] = classes[taken[positive]]
    deltas[positive] = encode(boxes[taken[positive]], anchors[positive])
    return wanted, deltas
