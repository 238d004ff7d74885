"""Outputs of dense bundles: the forms they come in, how far two of them are apart, and what they say of a picture.

Torch-free: what a device needs to read its bundle's outputs is here and in `detection.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy import numerics
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.data.stretch import Scale, boxes_to_picture, resize_map
from dualtoken_deploy.tasks.anchors import Detections, detect
from dualtoken_deploy.tasks.boxes import Array, paste_mask

RAW, LABELS, DETECTED = "raw", "labels", "detections"
TASKS = ("detect", "segment")

# Two detections of one class are the same one where no edge differs by more than a share of the longer side and half a
# pixel, and no score by more than this. (Overlap would not do: a box beyond the image's edge is clipped to nothing.)
SAME_EDGES, SAME_SCORE = 0.05, 0.02
MASK_LEVEL = 0.5  # probability from which a pixel belongs to an object
GOLDEN_VALUES = 2**18  # kept of each output in golden.npz; the logits of a whole picture would be up to 150 MB

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Found:
    """What was found in one picture, in its own pixels: `boxes` and (Mask R-CNN) `masks`, best first, or `label_map`
    uint8 (h, w) of a segmenter."""

    boxes: Objects | None = None
    masks: Objects | None = None
    label_map: NDArray[np.uint8] | None = None


def interpret(outputs: Outputs, task: str, model_size: tuple[int, int], size: tuple[int, int]) -> Found:
    """What the outputs for one image of the model's (H, W) say of the picture of (h, w) that it was stretched from."""
    scale: Scale = (model_size[0] / size[0], model_size[1] / size[1])
    if task == "segment":
        labels = outputs["labels"][0] if "labels" in outputs else outputs["logits"][0].argmax(0)
        return Found(label_map=resize_map(labels.astype(np.uint8), size))
    found = _detections(outputs, model_size)
    boxes = Objects(boxes_to_picture(found.boxes, scale), found.classes, found.scores)
    if "masks" not in outputs:
        return Found(boxes)
    pasted = [
        paste_mask(mask, box, size) >= MASK_LEVEL
        for mask, box in zip(outputs["masks"][0], boxes.shapes, strict=False)  # empty places have a mask too
    ]
    masks = np.array(pasted, bool).reshape(len(boxes.shapes), *size)
    return Found(boxes, Objects(masks, found.classes, found.scores))


def _detections(outputs: Outputs, size: tuple[int, int]) -> Detections:
    if "logits" in outputs:
        return detect(outputs["logits"][0], outputs["deltas"][0], size)
    there = outputs["classes"][0] >= 0
    boxes, scores, classes = (outputs[name][0][there] for name in ("boxes", "scores", "classes"))
    return Detections(boxes.astype(np.float64), scores.astype(np.float64), classes.astype(np.int64))


@dataclass(frozen=True)
class Likeness:
    """How near outputs come to the expected ones; `agreement` in 0..1."""

    sqnr_db: float
    max_abs_error: float
    agreement: float


def compare(expected: Outputs, actual: Outputs) -> Likeness:
    """Outputs against the expected ones, the worst of all of them.

    Raw outputs: over their values, agreement is that of the largest logit (pixels of a segmenter, anchors of a
    detector). Label maps: equal pixels. Detections: SQNR over boxes and scores of those that both found, agreement is
    the smaller share that the other one found as well.
    """
    if "boxes" in expected:
        return _compare_detections(expected, actual)
    if "labels" in expected:
        want, got = (outputs["labels"].astype(np.float64) + 1 for outputs in (expected, actual))
        return Likeness(
            numerics.compare(want, got).sqnr_db, float(np.abs(want - got).max()), float((want == got).mean())
        )
    found = [numerics.compare(expected[name], actual[name]) for name in expected]
    axis = {4: 1, 3: 2}.get(expected["logits"].ndim)  # 1-D where golden keeps every n-th value alone
    same = np.ones(1, bool) if axis is None else expected["logits"].argmax(axis) == actual["logits"].argmax(axis)
    return Likeness(min(d.sqnr_db for d in found), max(d.max_abs_error for d in found), float(same.mean()))


def _compare_detections(expected: Outputs, actual: Outputs) -> Likeness:
    """Pairs each expected detection with the nearest actual one of its class."""
    there = [outputs["classes"][0] >= 0 for outputs in (expected, actual)]
    (boxes, scores, classes), (others, other_scores, other_classes) = (
        tuple(outputs[name][0][t] for name in ("boxes", "scores", "classes"))
        for outputs, t in zip((expected, actual), there, strict=True)
    )
    most = max(len(boxes), len(others))
    if not most:
        return Likeness(numerics.SQNR_LIMIT_DB, 0.0, 1.0)
    shift = np.abs(boxes[:, None] - others[None]).max(2) if len(boxes) and len(others) else np.zeros((len(boxes), 0))
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0.0)
    possible = shift <= SAME_EDGES * longest[:, None] + 0.5
    if len(others):
        possible &= (classes[:, None] == other_classes) & (np.abs(scores[:, None] - other_scores) <= SAME_SCORE)
    pairs: list[tuple[int, int]] = []
    for i in range(len(boxes)):
        candidates = np.flatnonzero(possible[i])
        if len(candidates):
            j = int(candidates[shift[i, candidates].argmin()])
            pairs.append((i, j))
            possible[:, j] = False
    if not pairs:
        return Likeness(-numerics.SQNR_LIMIT_DB, float("inf"), 0.0)
    left, right = (list(side) for side in zip(*pairs, strict=True))
    names = [name for name in ("boxes", "scores", "masks") if name in expected]
    found = [numerics.compare(expected[n][0][there[0]][left], actual[n][0][there[1]][right]) for n in names]
    return Likeness(min(d.sqnr_db for d in found), max(d.max_abs_error for d in found), len(pairs) / most)


def worst(found: Sequence[Likeness]) -> Likeness:
    """Of several images: the worst of each figure, the mean of the agreements."""
    return Likeness(
        min(f.sqnr_db for f in found), max(f.max_abs_error for f in found), float(np.mean([f.agreement for f in found]))
    )


def thin(outputs: Outputs) -> dict[str, Any]:
    """What golden keeps of outputs: each as it is, or where it is large every n-th of its values, (N,)."""
    return {name: _thin(array) for name, array in outputs.items()}


def _thin(array: Array) -> Array:
    return array if array.size <= GOLDEN_VALUES else array.ravel()[:: -(-array.size // GOLDEN_VALUES)]
