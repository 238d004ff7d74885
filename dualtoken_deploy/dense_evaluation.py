"""How good a detector or segmenter is on a set: one judge for the eager model and for bundles. No torch.

Judged in the picture's own pixels against what the set says, whatever size the model takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.dense_data import DenseSample, DenseSet
from dualtoken_deploy.dense_images import Size, boxes_to_picture, prepare, resize_map
from dualtoken_deploy.dense_metrics import Objects, average_precision, class_iou, mean_iou, precision_table
from dualtoken_deploy.detection import Detections
from dualtoken_deploy.errors import DatasetError

BATCH = 16

# What a model says of a picture, in the pixels of its own size: Detections, or a label map (H, W). A predictor takes
# uint8 (B, H, W, 3) of that size.
Answer = Detections | NDArray[np.uint8]
Predict = Callable[[NDArray[np.uint8]], Sequence[Answer]]


@dataclass(frozen=True)
class Finding:
    """Truth and answer of one picture in its own pixels: boxes, or label maps."""

    truth: Any
    found: Any


@dataclass(frozen=True)
class DenseEvaluation:
    """`scores` are fractions of 1: ap, ap50, ap75 of boxes, or miou; `per_class` AP or IoU of each class that occurs.

    `images_per_s` is that of the model and what follows it, on pictures that are prepared already.
    """

    source: str
    data: str
    task: str
    images: int
    scores: dict[str, float]
    per_class: dict[str, float]
    images_per_s: float
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "scores"} | self.scores


def judge(
    source: str,
    data: DenseSet,
    task: str,
    predict: Predict,
    size: Size,
    labels: Sequence[str],
    progress: Callable[[str], None] | None = None,
) -> DenseEvaluation:
    """Judges what `predict` finds in the pictures of `data`, stretched to (H, W), by a model with `labels`.

    Raises DatasetError where the data has other classes than the model, or no object at all.
    """
    check_labels(data, labels)
    findings, seconds = [], 0.0
    for start in range(0, len(data), BATCH):
        if progress:
            progress(f"evaluating {start}/{len(data)}")
        samples = [data[i] for i in range(start, min(start + BATCH, len(data)))]
        batch = np.stack([prepare(sample.image, size)[0] for sample in samples])
        began = time.perf_counter()
        answers = predict(batch)
        seconds += time.perf_counter() - began
        findings += [find(sample, answer, size) for sample, answer in zip(samples, answers, strict=True)]
    scores = score(findings, task, len(labels))
    per_class = score_classes(findings, task, labels)
    rate = round(len(data) / seconds, 2)
    return DenseEvaluation(source, data.name, task, len(data), scores, per_class, rate, tuple(labels))


def check_labels(data: DenseSet, labels: Sequence[str]) -> None:
    """Raises DatasetError where the data's classes are not the model's, in the same order."""
    if tuple(data.labels) != tuple(labels):
        raise DatasetError(
            f"{data.name} has the classes {_few(data.labels)}, the model {_few(labels)}; use data with the same classes"
        )


def find(sample: DenseSample, answer: Answer, size: Size) -> Finding:
    """Truth and answer of one picture, the answer brought back from the model's (H, W) to the picture's pixels."""
    height, width = sample.image.shape[:2]
    if not isinstance(answer, Detections):
        return Finding(sample.label_map, resize_map(answer, (height, width)))
    boxes = boxes_to_picture(answer.boxes, (size[0] / height, size[1] / width))
    return Finding(sample.boxes, Objects(boxes, answer.classes, answer.scores))


def score(findings: Iterable[Finding], task: str, classes: int) -> dict[str, float]:
    """{"ap", "ap50", "ap75"} or {"miou"}, in 0..1."""
    truth, found = _sides(findings)
    return average_precision(truth, found) if task == "detect" else {"miou": mean_iou(truth, found, classes)}


def score_classes(findings: Iterable[Finding], task: str, labels: Sequence[str]) -> dict[str, float]:
    """AP over ten overlaps, or IoU, of each class that occurs."""
    truth, found = _sides(findings)
    if task == "detect":
        classes, table = precision_table(truth, found)
        return {labels[c]: float(row.mean()) for c, row in zip(classes, table, strict=True)}
    shares = class_iou(truth, found, len(labels))
    return {name: float(value) for name, value in zip(labels, shares, strict=True) if not np.isnan(value)}


def _sides(findings: Iterable[Finding]) -> tuple[list[Any], list[Any]]:
    pairs = [(f.truth, f.found) for f in findings]
    return [t for t, _ in pairs], [f for _, f in pairs]


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
