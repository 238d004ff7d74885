"""How good a detector or segmenter is on a set: one judge for the eager model and for bundles. No torch.

Judged in the picture's own pixels against what the set says, whatever size the model takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.annotated import DenseSample, DenseSet
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.data.stretch import Size, prepare
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.tasks.boxes import Array
from dualtoken_deploy.tasks.metrics import average_precision, class_iou, mean_iou, precision_table

BATCH = 16


class Found(Protocol):
    """What was found in a picture, in its own pixels: boxes and perhaps masks of the same objects, or a label map."""

    @property
    def boxes(self) -> Objects | None: ...
    @property
    def masks(self) -> Objects | None: ...
    @property
    def label_map(self) -> NDArray[np.uint8] | None: ...


# Pictures stretched to the model's size, uint8 (B, H, W, 3), and their own sizes (h, w), to what is found in each.
Predict = Callable[[NDArray[np.uint8], Sequence[Size]], Sequence[Found]]
Pair = tuple[DenseSample, Found]  # truth and answer


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
    pairs: list[Pair] = []
    seconds = 0.0
    for start in range(0, len(data), BATCH):
        if progress:
            progress(f"evaluating {start}/{len(data)}")
        samples = [data[i] for i in range(start, min(start + BATCH, len(data)))]
        batch = np.stack([prepare(sample.image, size)[0] for sample in samples])
        began = time.perf_counter()
        found = predict(batch, [image_size(sample) for sample in samples])
        seconds += time.perf_counter() - began
        pairs += zip(samples, found, strict=True)
    scores, per_class = score(pairs, task, len(labels)), score_classes(pairs, task, labels)
    rate = round(len(data) / seconds, 2)
    return DenseEvaluation(source, data.name, task, len(data), scores, per_class, rate, tuple(labels))


def image_size(sample: DenseSample) -> Size:
    height, width = sample.image.shape[:2]
    return height, width


def check_labels(data: DenseSet, labels: Sequence[str]) -> None:
    """Raises DatasetError where the data's classes are not the model's, in the same order."""
    if tuple(data.labels) != tuple(labels):
        raise DatasetError(
            f"{data.name} has the classes {_few(data.labels)}, the model {_few(labels)}; use data with the same classes"
        )


def score(pairs: Sequence[Pair], task: str, classes: int) -> dict[str, float]:
    """{"ap", "ap50", "ap75"} of boxes and, where both sides have masks, "mask_ap" and so on; or {"miou"}; in 0..1."""
    if task == "segment":
        return {"miou": mean_iou(*_maps(pairs), classes)}
    scores = average_precision(*_objects(pairs, "boxes"))
    if all(side.masks is not None for pair in pairs for side in pair):
        masks = average_precision(*_objects(pairs, "masks"))
        scores |= {f"mask_{name}": value for name, value in masks.items()}
    return scores


def score_classes(pairs: Sequence[Pair], task: str, labels: Sequence[str]) -> dict[str, float]:
    """AP of boxes over ten overlaps, or IoU, of each class that occurs."""
    if task == "detect":
        classes, table = precision_table(*_objects(pairs, "boxes"))
        return {labels[c]: float(row.mean()) for c, row in zip(classes, table, strict=True)}
    shares = class_iou(*_maps(pairs), len(labels))
    return {name: float(value) for name, value in zip(labels, shares, strict=True) if not np.isnan(value)}


def _objects(pairs: Sequence[Pair], kind: str) -> tuple[list[Objects], list[Objects]]:
    return [getattr(t, kind) for t, _ in pairs], [getattr(f, kind) for _, f in pairs]


def _maps(pairs: Sequence[Pair]) -> tuple[list[Array], list[Array]]:
    out: tuple[list[Array], list[Array]] = ([], [])
    for pair in pairs:
        for side, maps in zip(pair, out, strict=True):
            if side.label_map is None:
                raise DatasetError("label maps are needed to judge a segmenter; give data and a model for segmentation")
            maps.append(side.label_map)
    return out


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
