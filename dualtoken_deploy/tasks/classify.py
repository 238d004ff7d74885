"""Classification: one output, logits (N, classes); top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dualtoken_deploy.data.folders import match_classes
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.numerics import Array, softmax, top_k_hits
from dualtoken_deploy.spec import CROP
from dualtoken_deploy.tasks.base import Ask, Found, JointMeter, OutputKind, Outputs, Pair, Size, Task, same_tolerance


@dataclass(frozen=True)
class Guess:
    """A class, its label and its softmax probability."""

    index: int
    label: str
    probability: float

    def cells(self) -> tuple[str, ...]:
        return self.label, f"{self.probability:.4f}"


def logits_of(outputs: Outputs) -> Array:
    """(N, classes): the one output, whatever it is called."""
    (logits,) = outputs.values()
    return logits


def same_top1(expected: Outputs, actual: Outputs) -> Array:
    """(N,): whether the largest logit is the same one."""
    same: Array = logits_of(expected).argmax(-1) == logits_of(actual).argmax(-1)
    return same


STEPS = 2  # each of two numbers is rounded by half a step where it is written, and by as much before that


def level_top1(expected: Outputs, step: float) -> Array:
    """(N,): whether the two largest logits are nearer than STEPS steps of a number format at their size. `step`: the
    format's, at one."""
    logits = logits_of(expected).astype(np.float64)
    if logits.shape[-1] < 2:
        return np.zeros(len(logits), bool)
    best = np.sort(logits, -1)[:, -2:]
    at_size = step * 2.0 ** np.floor(np.log2(np.maximum(np.abs(best).max(-1), 1e-30)))
    near: Array = best[:, 1] - best[:, 0] < STEPS * at_size
    return near


@dataclass(frozen=True)
class _Renumbered:
    """Samples of `data` whose labels are indices of another list."""

    data: SampleSet
    labels: tuple[int, ...]

    @property
    def paths(self) -> Sequence[Path]:
        return self.data.read.paths

    def __call__(self, index: int) -> Sample:
        sample = self.data.read(index)
        return sample if sample.label is None else replace(sample, label=self.labels[sample.label])


def match(data: SampleSet, labels: Sequence[str]) -> SampleSet:
    """The set with its labels as indices of the model's; one without labels as it is."""
    if data.labels is None:
        return data
    known = match_classes(data.labels, labels, data.name)
    return replace(data, labels=tuple(labels), read=_Renumbered(data, known))


def interpret(outputs: Outputs, _model_size: Size, _size: Size) -> Found:
    """The logits of one picture."""
    return Found(logits=logits_of(outputs)[0])


def score(pairs: Sequence[Pair], _classes: int) -> dict[str, float]:
    """{"top1", "top5"} in 0..1."""
    logits, labels = _arrays(pairs)
    return {f"top{k}": top_k_hits(logits, labels, k) / len(labels) for k in (1, 5)}


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """Top-1 of each class that occurs."""
    rows = confusion(pairs, len(labels))
    counted = enumerate(zip(labels, rows, strict=True))
    return {name: int(row[i]) / int(row.sum()) for i, (name, row) in counted if row.any()}


def confusion(pairs: Sequence[Pair], classes: int) -> Array:
    """(classes, classes): how many pictures of class i were taken for class j."""
    logits, labels = _arrays(pairs)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return counts


def _arrays(pairs: Sequence[Pair]) -> tuple[Array, Array]:
    logits = [found.logits for _, found in pairs if found.logits is not None]
    return np.stack(logits), np.array([sample.label for sample, _ in pairs])


def describe(found: Found, labels: Sequence[str], _size: Size, ask: Ask) -> tuple[tuple[Guess, ...], Found]:
    """The `ask.top` likeliest classes."""
    assert found.logits is not None  # noqa: S101  # interpret gave them
    shares = softmax(found.logits.astype(np.float64))
    best = np.argsort(-shares, kind="stable")[: ask.top]
    return tuple(Guess(int(i), labels[i], float(shares[i])) for i in best), found


CLASSIFY = Task(
    name="classify",
    classes=True,
    resize=CROP,
    agreement="top1_agreement",
    alike="top-1",
    metrics=("top1", "top5"),
    rows="guesses",
    columns=("label", "probability"),
    open=open_pictures,
    match=match,
    known=lambda data: data.labels is not None,
    meter=lambda: JointMeter(same_top1),
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=None,
    tolerance=same_tolerance,
    outputs=((OutputKind("logits", 2, layout="NC"),),),
    level=level_top1,
    pipeline_tag="image-classification",
)
