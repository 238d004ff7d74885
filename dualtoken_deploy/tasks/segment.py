"""Semantic segmentation: logits (N, classes, H, W), or the label map (N, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualtoken_deploy.data.annotated import MAPS, open_annotated
from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.data.stretch import resize_map
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.spec import STRETCH, Tolerance
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
from dualtoken_deploy.tasks.boxes import Array
from dualtoken_deploy.tasks.draw import paint_areas
from dualtoken_deploy.tasks.metrics import class_iou, mean_iou

MOST_CLASSES = 255  # that a label map of bytes can hold, beside the value for none
# Pixels that label maps must share with eager's: they jump where two classes are level.
NEAREST, NARROWER = Tolerance(0.0, 0.99), Tolerance(0.0, 0.9)


@dataclass(frozen=True)
class Area:
    """A class that a segmenter sees, and its share of the picture's pixels."""

    index: int
    label: str
    share: float

    def cells(self) -> tuple[str, ...]:
        return self.label, f"{100 * self.share:.2f} %"


def interpret(outputs: Outputs, _model_size: Size, size: Size) -> Found:
    """The label map of one image, in the pixels of the picture of (h, w)."""
    labels = outputs["labels"][0] if "labels" in outputs else _logits(outputs)[0].argmax(0)
    return Found(label_map=resize_map(labels.astype(np.uint8), size))


def compare(expected: Outputs, actual: Outputs) -> Likeness:
    """Logits: over their values, agreement is that of the largest one of each pixel. Label maps: equal pixels."""
    if "labels" in expected:
        want, got = (outputs["labels"].astype(np.float64) + 1 for outputs in (expected, actual))  # class 0 counts too
        return Likeness(*worst_of({"labels": want}, {"labels": got}), float((want == got).mean()))
    want, got = _logits(expected), _logits(actual)
    same = np.ones(1, bool) if want.ndim < 4 else want.argmax(1) == got.argmax(1)  # golden keeps every n-th value alone
    return Likeness(*worst_of(expected, actual), float(same.mean()))


def _logits(outputs: Outputs) -> Array:
    """The first output: a user's model may call it otherwise, and have more behind it."""
    return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


def score(pairs: Sequence[Pair], classes: int) -> dict[str, float]:
    """{"miou"} in 0..1."""
    return {"miou": mean_iou(*_maps(pairs), classes)}


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """IoU of each class that occurs."""
    shares = class_iou(*_maps(pairs), len(labels))
    return {name: float(value) for name, value in zip(labels, shares, strict=True) if not np.isnan(value)}


def _maps(pairs: Sequence[Pair]) -> tuple[list[Array], list[Array]]:
    out: tuple[list[Array], list[Array]] = ([], [])
    for sample, found in pairs:
        for label_map, maps in zip((sample.label_map, found.label_map), out, strict=True):
            if label_map is None:
                raise DatasetError("label maps are needed to judge a segmenter; give data and a model for segmentation")
            maps.append(label_map)
    return out


def describe(found: Found, labels: Sequence[str], _size: Size, _ask: Ask) -> tuple[tuple[Area, ...], Found]:
    """The classes in the picture, largest first."""
    assert found.label_map is not None  # noqa: S101  # interpret gave it
    counts = np.bincount(found.label_map.ravel(), minlength=len(labels))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return tuple(Area(i, labels[i], float(counts[i] / counts.sum())) for i in order), found


def tolerance(base: Tolerance, precision: str, gated: bool, outputs: Sequence[str]) -> Tolerance:
    """SQNR over logits as for classifiers, whatever the largest one; label maps by agreement alone."""
    if "labels" not in outputs:
        return Tolerance(base.sqnr_db, 0.0)
    return gated_or(NEAREST if precision == "fp32" else NARROWER, gated)


def _open(data: str | Path, part: str) -> SampleSet:
    return open_annotated(data, MAPS, part)


SEGMENT = Task(
    name="segment",
    classes=True,
    resize=STRETCH,
    agreement="agreement",
    alike="pixels",
    metrics=("miou",),
    rows="areas",
    columns=("label", "of its pixels"),
    open=_open,
    match=check_labels,
    known=lambda _: True,
    meter=lambda: WorstMeter(compare),
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=paint_areas,
    tolerance=tolerance,
    outputs=((OutputKind("logits", 4, layout="NCHW"),), (OutputKind("labels", 3, indices=True, layout="NHW"),)),
    check_images=4,  # an image has as many values as a thousand classifications
    held_out=100,  # a metric of fewer jumps by points
    most_classes=MOST_CLASSES,
    by_pixel=True,
    pipeline_tag="image-segmentation",
)
