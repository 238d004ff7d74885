"""Any named outputs, judged by their SQNR alone: what a model means is the user's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.spec import CROP
from dualtoken_deploy.tasks.base import Ask, Found, JointMeter, Outputs, Pair, Size, Task, any_labels, same_tolerance


@dataclass(frozen=True)
class TensorSummary:
    """An output's name, dtype and shape, and the least, mean and largest of its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float
    mean: float
    maximum: float

    def cells(self) -> tuple[str, ...]:
        shape = "x".join(map(str, self.shape))
        return f"{self.name} {self.dtype} {shape}", f"{self.minimum:.4g}", f"{self.mean:.4g}", f"{self.maximum:.4g}"


def interpret(outputs: Outputs, _model_size: Size, _size: Size) -> Found:
    """The outputs as they are."""
    return Found(tensors=outputs)


def describe(found: Found, _labels: Sequence[str], _size: Size, _ask: Ask) -> tuple[tuple[TensorSummary, ...], Found]:
    assert found.tensors is not None  # noqa: S101  # interpret gave them
    rows = []
    for name, array in found.tensors.items():
        values = array.astype(np.float64)
        numbers = (float(values.min()), float(values.mean()), float(values.max()))
        rows.append(TensorSummary(name, str(array.dtype), array.shape, *numbers))
    return tuple(rows), found


def _no_score(_pairs: Sequence[Pair], _classes: object) -> dict[str, float]:
    raise DatasetError("outputs of the task tensors have no accuracy; compare them by SQNR: dualtoken validate BUNDLE")


TENSORS = Task(
    name="tensors",
    classes=False,
    resize=CROP,
    agreement="agreement",
    alike="",
    metrics=(),
    rows="outputs",
    columns=("output", "least", "mean", "largest"),
    open=lambda data, part: replace(open_pictures(data, part), labels=None),
    match=any_labels,
    known=lambda _: False,
    meter=lambda: JointMeter(None),
    interpret=interpret,
    score=_no_score,
    score_classes=_no_score,
    describe=describe,
    paint=None,
    tolerance=same_tolerance,
    check_images=4,  # outputs may be large
)
