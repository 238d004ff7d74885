"""What an INT8 file loses on pictures that calibration did not see, against eager, in points of one measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.quantize.calibration import HeldOut
from dualtoken_deploy.quantize.search import Score
from dualtoken_deploy.tasks.base import Outputs, Pair, Task

AGREEMENT, SQNR = "agreement", "sqnr"  # measures of every task, beside its own
BY_PICTURE = frozenset({AGREEMENT, "top1"})  # means over pictures
ENOUGH_DB = 30.0  # sqnr: points lost are the dB below this


@dataclass(frozen=True)
class Judge:
    """Held-out inputs, what eager made of them, and what is lost against that: points of `metric`, and SQNR.

    `size`: the model's (H, W); `classes`: how many it has.
    """

    task: Task
    held_out: HeldOut
    expected: tuple[Outputs, ...]
    metric: str
    size: tuple[int, int]
    classes: int

    @property
    def by_picture(self) -> bool:
        """Whether the metric is a mean over pictures, so that a part of them says something of all."""
        return self.metric in BY_PICTURE

    def loss(self, picture: int, outputs: Outputs) -> float:
        """What one picture loses, -1..1, where the metric goes by picture."""
        if self.metric == AGREEMENT:
            return 1 - (self.task.compare(self.expected[picture], outputs).agreement or 0.0)
        at = (picture,)
        return self._lost(self._measure([self.expected[picture]], at), self._measure([outputs], at))

    def score(self, outputs: Sequence[Outputs], chosen: Sequence[int] | None = None) -> Score:
        """Of what the runner gave for the `chosen` held-out inputs; None: for all."""
        at = range(len(self.expected)) if chosen is None else chosen
        expected = [self.expected[i] for i in at]
        meter = self.task.meter()
        noise = []
        for want, got in zip(expected, outputs, strict=True):
            meter.add(want, got)
            if self.task.check_images is not None:  # large outputs: each picture counts alike
                noise.append(10 ** (-self.task.compare(want, got).sqnr_db / 10))
        found = meter.likeness()
        sqnr = float(-10 * np.log10(np.mean(noise))) if noise else found.sqnr_db
        if self.metric == SQNR:
            return Score(max(ENOUGH_DB - sqnr, 0.0), sqnr)
        if self.metric == AGREEMENT:
            return Score(100 * (1 - (found.agreement or 0.0)), sqnr)
        return Score(100 * self._lost(self._measure(expected, at), self._measure(outputs, at)), sqnr)

    def _lost(self, expected: float, actual: float) -> float:
        """How much worse a figure is; of one without a scale of its own, as a share of what eager has."""
        worse = actual - expected if self.task.lower and self.metric in self.task.metrics else expected - actual
        return worse / max(abs(expected), 1e-12) if self.metric in self.task.plain else worse

    def _measure(self, outputs: Sequence[Outputs], at: Sequence[int]) -> float:
        truth = [self.held_out.truth[i] for i in at]
        pairs: list[Pair] = [
            (sample, self.task.interpret(got, self.size, shape))
            for (sample, shape), got in zip(truth, outputs, strict=True)
        ]
        return self.task.score(pairs, self.classes)[self.metric]


def make_judge(
    task: Task,
    held_out: HeldOut,
    expected: Sequence[Outputs],
    metric: str | None,
    size: tuple[int, int],
    classes: int,
) -> Judge:
    """A judge by `metric`; None: the task's own where the truth of the pictures is known, else one that needs none.

    Raises UsageError on a measure whose truth the pictures lack.
    """
    valid = measures(task)
    chosen = metric or (valid[0] if held_out.known else next(m for m in valid if m not in task.metrics))
    if chosen in task.metrics and not held_out.known:
        without = " or ".join(m for m in valid if m not in task.metrics)
        raise UsageError(f"{held_out.name} has no labels, so {chosen} cannot be measured; take --metric {without}")
    return Judge(task, held_out, tuple(expected), chosen, size, classes)


def measures(task: Task) -> tuple[str, ...]:
    """By which INT8 of a task can be judged: its own metric, agreement where it has one, SQNR."""
    return (*task.metrics[:1], *([AGREEMENT] if task.agrees else []), SQNR)
