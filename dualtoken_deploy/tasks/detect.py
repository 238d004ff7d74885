"""Detection: raw outputs of RetinaNet (logits, deltas), or detections (boxes, scores, classes and perhaps masks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.annotated import OBJECTS, open_annotated
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.data.stretch import Scale, boxes_to_picture
from dualtoken_deploy.numerics import SQNR_LIMIT_DB
from dualtoken_deploy.spec import STRETCH, Tolerance
from dualtoken_deploy.tasks.anchors import Detections, detect
from dualtoken_deploy.tasks.base import (
    Ask,
    Found,
    Likeness,
    OutputKind,
    Outputs,
    Pair,
    Size,
    Task,
    WorstMeter,
    check_labels,
    gated_or,
    worst_of,
)
from dualtoken_deploy.tasks.boxes import mask_of
from dualtoken_deploy.tasks.draw import paint_objects
from dualtoken_deploy.tasks.metrics import average_precision, precision_table

# Two detections of one class are the same one where no edge differs by more than a share of the longer side and half a
# pixel, and no score by more than this. (Overlap would not do: a box beyond the image's edge is clipped to nothing.)
SAME_EDGES, SAME_SCORE = 0.05, 0.02
MASK_LEVEL = 0.5  # probability from which a pixel belongs to an object
# SQNR in dB of detections and the share of them that eager must find too: they jump where two candidates are level, and
# the nearer the numbers are, the fewer of them do.
NEAREST, NARROWER = Tolerance(60.0, 0.99), Tolerance(30.0, 0.9)


@dataclass(frozen=True)
class FoundObject:
    """`box` (x1, y1, x2, y2) in the picture's pixels; `mask_pixels`: how many belong to it, where there are masks."""

    index: int
    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_pixels: int | None = None

    def cells(self) -> tuple[str, ...]:
        return self.label, f"{self.score:.3f}", ", ".join(f"{v:.1f}" for v in self.box)


def interpret(outputs: Outputs, model_size: Size, size: Size) -> Found:
    """The boxes (and masks) for one image of the model's (H, W), in the pixels of the picture of (h, w)."""
    scale: Scale = (model_size[0] / size[0], model_size[1] / size[1])
    found = _detections(outputs, model_size)
    boxes = Objects(boxes_to_picture(found.boxes, scale), found.classes, found.scores)
    if "masks" not in outputs:
        return Found(boxes=boxes)
    pasted = [
        mask_of(mask, box, size, MASK_LEVEL)
        for mask, box in zip(outputs["masks"][0], boxes.shapes, strict=False)  # empty places have a mask too
    ]
    masks = np.array(pasted, bool).reshape(len(boxes.shapes), *size)
    return Found(boxes=boxes, masks=Objects(masks, found.classes, found.scores))


def _detections(outputs: Outputs, size: tuple[int, int]) -> Detections:
    if "logits" in outputs:
        return detect(outputs["logits"][0], outputs["deltas"][0], size)
    there = outputs["classes"][0] >= 0
    boxes, scores, classes = (outputs[name][0][there] for name in ("boxes", "scores", "classes"))
    return Detections(boxes.astype(np.float64), scores.astype(np.float64), classes.astype(np.int64))


def compare(expected: Outputs, actual: Outputs) -> Likeness:
    """Outputs of one image against the expected ones.

    Raw: over their values, agreement is that of the largest logit of each anchor. Detections: SQNR over boxes and
    scores of those that both found, agreement is the smaller share that the other one found as well.
    """
    if "boxes" in expected:
        return _compare_detections(expected, actual)
    want, got = expected["logits"], actual["logits"]
    same = np.ones(1, bool) if want.ndim < 3 else want.argmax(2) == got.argmax(2)  # golden keeps every n-th value alone
    return Likeness(*worst_of(expected, actual), float(same.mean()))


def _compare_detections(expected: Outputs, actual: Outputs) -> Likeness:
    """Pairs each expected detection with the nearest actual one of its class."""
    there = [outputs["classes"][0] >= 0 for outputs in (expected, actual)]
    (boxes, scores, classes), (others, other_scores, other_classes) = (
        tuple(outputs[name][0][t] for name in ("boxes", "scores", "classes"))
        for outputs, t in zip((expected, actual), there, strict=True)
    )
    most = max(len(boxes), len(others))
    if not most:
        return Likeness(SQNR_LIMIT_DB, 0.0, 1.0)
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
        return Likeness(-SQNR_LIMIT_DB, float("inf"), 0.0)
    left, right = (list(side) for side in zip(*pairs, strict=True))
    names = [name for name in ("boxes", "scores", "masks") if name in expected]
    ours, theirs = (
        {n: outputs[n][0][t][chosen] for n in names}
        for outputs, t, chosen in ((expected, there[0], left), (actual, there[1], right))
    )
    return Likeness(*worst_of(ours, theirs), len(pairs) / most)


def score(pairs: Sequence[Pair], _classes: int) -> dict[str, float]:
    """{"ap", "ap50", "ap75"} of boxes and, where both sides have masks, "mask_ap" and so on; in 0..1."""
    scores = average_precision(*_objects(pairs, "boxes"))
    if all(side.masks is not None for pair in pairs for side in pair):
        masks = average_precision(*_objects(pairs, "masks"))
        scores |= {f"mask_{name}": value for name, value in masks.items()}
    return scores


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """AP of boxes over ten overlaps of each class that occurs."""
    classes, table = precision_table(*_objects(pairs, "boxes"))
    return {labels[c]: float(row.mean()) for c, row in zip(classes, table, strict=True)}


def _objects(pairs: Sequence[Pair], kind: str) -> tuple[list[Objects], list[Objects]]:
    return [getattr(t, kind) for t, _ in pairs], [getattr(f, kind) for _, f in pairs]


def describe(found: Found, labels: Sequence[str], _size: Size, ask: Ask) -> tuple[tuple[FoundObject, ...], Found]:
    """Objects of at least `ask.min_score`, best first."""
    assert found.boxes is not None  # noqa: S101  # interpret gave them
    assert found.boxes.scores is not None  # noqa: S101
    chosen = np.flatnonzero(found.boxes.scores >= ask.min_score)
    boxes = _take(found.boxes, chosen)
    masks = None if found.masks is None else _take(found.masks, chosen)
    objects = []
    for i, index in enumerate(chosen):
        kind, value = int(found.boxes.classes[index]), float(found.boxes.scores[index])
        x1, y1, x2, y2 = (float(v) for v in boxes.shapes[i])
        pixels = None if masks is None else int(masks.shapes[i].sum())
        objects.append(FoundObject(kind, labels[kind], value, (x1, y1, x2, y2), pixels))
    return tuple(objects), Found(boxes=boxes, masks=masks)


def _take(objects: Objects, chosen: NDArray[np.int64]) -> Objects:
    scores = None if objects.scores is None else objects.scores[chosen]
    return Objects(objects.shapes[chosen], objects.classes[chosen], scores)


def tolerance(base: Tolerance, precision: str, gated: bool, outputs: Sequence[str]) -> Tolerance:
    """SQNR over raw outputs as for classifiers, whatever the largest logit; detections by agreement too."""
    if "boxes" not in outputs:
        return Tolerance(base.sqnr_db, 0.0)
    return gated_or(NEAREST if precision == "fp32" else NARROWER, gated)


def _open(data: str | Path, part: str) -> SampleSet:
    return open_annotated(data, OBJECTS, part)


DETECT = Task(
    name="detect",
    classes=True,
    resize=STRETCH,
    agreement="agreement",
    alike="answers",
    metrics=("ap", "ap50", "ap75"),
    rows="objects",
    columns=("label", "score", "box (x1, y1, x2, y2)"),
    open=_open,
    match=check_labels,
    known=lambda _: True,
    meter=lambda: WorstMeter(compare),
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=paint_objects,
    tolerance=tolerance,
    outputs=(
        (
            OutputKind("boxes", 3, layout="ND4"),
            OutputKind("scores", 2, layout="ND"),
            OutputKind("classes", 2, indices=True, layout="ND"),
        ),
    ),
    check_images=4,  # an image has as many values as a thousand classifications
    held_out=100,  # a metric of fewer jumps by points
    by_pixel=True,
    pipeline_tag="object-detection",
)
