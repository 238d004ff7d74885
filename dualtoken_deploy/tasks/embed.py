"""Embedding: one output, a vector (N, D) a picture; judged by its direction, and by the classes of the nearest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import CROP
from dualtoken_deploy.tasks.base import (
    Ask,
    Found,
    JointMeter,
    OutputKind,
    Outputs,
    Pair,
    Size,
    Task,
    any_labels,
    same_tolerance,
)

ALIKE = 0.99  # cosine from which two vectors count as one direction


@dataclass(frozen=True)
class Vector:
    """An embedding: its length, and its values."""

    norm: float
    values: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        shown = ", ".join(f"{v:.3f}" for v in self.values[:4])
        return str(len(self.values)), f"{self.norm:.4f}", shown + (", ..." if len(self.values) > 4 else "")


def vectors_of(outputs: Outputs) -> Array:
    """(N, D): the one output, flattened."""
    (out,) = outputs.values()
    rows: Array = out.reshape(len(out), -1)
    return rows


def same_direction(expected: Outputs, actual: Outputs) -> Array:
    """(N,): whether the cosine of two vectors is ALIKE."""
    want, got = (_unit(vectors_of(outputs)) for outputs in (expected, actual))
    same: Array = (want * got).sum(1) >= ALIKE
    return same


def _unit(rows: Array) -> Array:
    values = rows.astype(np.float64)
    out: Array = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)
    return out


def interpret(outputs: Outputs, _model_size: Size, _size: Size) -> Found:
    """The vector of one picture."""
    return Found(vector=vectors_of(outputs)[0])


def score(pairs: Sequence[Pair], _classes: int) -> dict[str, float]:
    """{"neighbour_top1"} in 0..1: how often the nearest other picture, by cosine, is of the same class."""
    nearest, labels = _nearest(pairs)
    return {"neighbour_top1": float((labels[nearest] == labels).mean())}


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """The same of each class that occurs."""
    nearest, known = _nearest(pairs)
    hits = known[nearest] == known
    return {labels[c] if c < len(labels) else f"class {c}": float(hits[known == c].mean()) for c in np.unique(known)}


def _nearest(pairs: Sequence[Pair]) -> tuple[Array, Array]:
    """For each picture the index of its nearest other one; and the labels."""
    if len(pairs) < 2:
        raise DatasetError("a nearest neighbour needs two pictures at least; give more data")
    rows = _unit(np.stack([found.vector for _, found in pairs if found.vector is not None]))
    near = rows @ rows.T
    np.fill_diagonal(near, -np.inf)
    return near.argmax(1), np.array([sample.label for sample, _ in pairs])


def describe(found: Found, _labels: Sequence[str], _size: Size, _ask: Ask) -> tuple[tuple[Vector, ...], Found]:
    assert found.vector is not None  # noqa: S101  # interpret gave it
    values = found.vector.astype(np.float64)
    return (Vector(float(np.linalg.norm(values)), tuple(values.tolist())),), found


EMBED = Task(
    name="embed",
    classes=False,
    resize=CROP,
    agreement="agreement",
    alike="directions",
    metrics=("neighbour_top1",),
    rows="embedding",
    columns=("values", "norm", "begins with"),
    open=open_pictures,
    match=any_labels,
    known=lambda data: data.labels is not None,
    meter=lambda: JointMeter(same_direction),
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=None,
    tolerance=same_tolerance,
    outputs=((OutputKind("embedding", 2, layout="NC"),),),
    pipeline_tag="image-feature-extraction",
)
