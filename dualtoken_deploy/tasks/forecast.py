"""Forecasting: one output (N, H, M), the steps that follow a series (N, L, M); mean squared and absolute error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.data.series import example_windows, load_series, open_series
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import CROP, InputContract
from dualtoken_deploy.tasks.base import (
    Ask,
    Found,
    JointMeter,
    OutputKind,
    Outputs,
    Pair,
    Size,
    Task,
    same_tolerance,
)

EXAMPLES = 16  # windows that export checks on


@dataclass(frozen=True)
class Ahead:
    """One variate's forecast: its values, the next step first."""

    variate: str
    values: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        shown = ", ".join(f"{v:.4g}" for v in self.values[:4]) + (", ..." if len(self.values) > 4 else "")
        return self.variate, shown, f"{min(self.values):.4g}", f"{max(self.values):.4g}"


def prepare(sample: Sample, contract: InputContract) -> Array:
    """The last L steps of what was seen, float32 (L, M). Raises DatasetError where there are fewer, or other
    variates."""
    length, variates = contract.size
    series = sample.series
    if series is None:
        raise DatasetError("a forecast needs a series, and this sample is a picture; give a .csv file")
    if series.shape[1] != variates or len(series) < length:
        raise DatasetError(
            f"the series has {len(series)} steps of {series.shape[1]} variates; the model takes {length} of {variates}"
        )
    return np.ascontiguousarray(series[-length:], np.float32)


def interpret(outputs: Outputs, _model_size: Size, _size: Size) -> Found:
    """The forecast as it is, (H, M)."""
    (ahead,) = outputs.values()
    return Found(tensors={"forecast": ahead[0]})


def errors(pairs: Sequence[Pair]) -> tuple[Array, Array]:
    """(pairs, H, M): forecast less what came, and the last value less what came. Raises DatasetError where the future
    is too short."""
    model, last = [], []
    for sample, found in pairs:
        assert found.tensors is not None  # noqa: S101  # interpret gave it
        ahead = found.tensors["forecast"].astype(np.float64)
        if sample.future is None or sample.series is None or len(sample.future) < len(ahead):
            raise DatasetError(f"a future of {len(ahead)} steps is needed, and the data has fewer")
        came = sample.future[: len(ahead)].astype(np.float64)
        model.append(ahead - came)
        last.append(sample.series[-1:].astype(np.float64) - came)
    return np.stack(model), np.stack(last)


def match(data: SampleSet, labels: Sequence[str]) -> SampleSet:
    """The set as it is. Raises DatasetError where it has another number of variates than the model."""
    if len(data.labels or ()) != len(labels):
        raise DatasetError(f"{data.name} has {len(data.labels or ())} variates, the model {len(labels)}")
    return data


def score(pairs: Sequence[Pair], _classes: int) -> dict[str, float]:
    """{"mse", "mae"} over all steps and variates, and those of the last value, in the units of the data."""
    model, last = errors(pairs)
    return {
        "mse": float((model**2).mean()),
        "mae": float(np.abs(model).mean()),
        "last_value_mse": float((last**2).mean()),
        "last_value_mae": float(np.abs(last).mean()),
    }


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """MSE of each variate."""
    means = (errors(pairs)[0] ** 2).mean((0, 1))
    return dict(zip(labels, means.tolist(), strict=True))


def describe(found: Found, labels: Sequence[str], _size: Size, _ask: Ask) -> tuple[tuple[Ahead, ...], Found]:
    assert found.tensors is not None  # noqa: S101  # interpret gave it
    columns = found.tensors["forecast"].astype(np.float64).T
    names = labels or [f"variate {i + 1}" for i in range(len(columns))]
    return tuple(Ahead(name, tuple(values.tolist())) for name, values in zip(names, columns, strict=True)), found


FORECAST = Task(
    name="forecast",
    classes=False,
    resize=CROP,
    agreement="agreement",
    alike="",
    metrics=("mse", "mae"),
    rows="forecast",
    columns=("variate", "next steps", "least", "largest"),
    open=open_series,
    match=match,
    known=lambda data: data.labels is not None,
    meter=lambda: JointMeter(None),
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=None,
    tolerance=same_tolerance,
    outputs=((OutputKind("forecast", 3, layout="NLC"),),),
    kinds=("series",),
    prepare=prepare,
    load=load_series,
    examples=lambda contract: example_windows(contract.size[1], EXAMPLES),
    plain=("mse", "mae", "last_value_mse", "last_value_mae"),
    lower=True,
    pipeline_tag="time-series-forecasting",
)
