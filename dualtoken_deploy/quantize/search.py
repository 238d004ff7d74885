"""Accuracy-gated mixed precision: which layers stay in float so that the loss holds a budget. Knows no backend.

Every layer's own quantization noise is measured at the logits with that layer alone in INT8; such noises add up, to
first order, so the layers that make most of it for their MACs go back to float first. Blocks are measured before the
layers in them, and layers are measured only in the blocks that matter. What was put back without need is tried in INT8
again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dualtoken_deploy.bundle.blocks import SearchResult, Step
from dualtoken_deploy.files import write_atomically

Tell = Callable[[str], None]
LAYERS_MEASURED = 24  # at most so many layers are measured one at a time; the rest is ranked by its statistics


@dataclass(frozen=True)
class Unit:
    """A layer that is quantized as a whole, in the model's own name, with its multiplications at batch 1."""

    name: str
    macs: int

    @property
    def block(self) -> str:
        """The part of the model that it lies in: `stem`, `stage2.block3`, `head`, ..."""
        name = self.name.removeprefix("model.").removeprefix("backbone.model.")  # of a dense model's classifier
        parts = name.split("/")[0].split(".")
        return ".".join(parts[:2]) if parts[0].startswith("stage") else parts[0]


@dataclass(frozen=True)
class Score:
    """What an assignment loses: `drop` in points of the metric (0 or less: nothing), and the SQNR of its logits."""

    drop: float
    sqnr_db: float


class Scorer(Protocol):
    """Quantizes all but `in_float`, runs it and compares. `quick`: a few inputs, for the SQNR alone."""

    def __call__(self, in_float: frozenset[str], quick: bool) -> Score: ...


class ScoreCache:
    """Remembers scores in a file, so that an interrupted search goes on where it was."""

    def __init__(self, scorer: Scorer, path: Path | None = None) -> None:
        self._scorer, self._path, self.calls = scorer, path, 0
        self._known: dict[str, Score] = {}
        if path is not None and path.is_file():
            try:
                self._known = {k: Score(**v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
            except (ValueError, TypeError, AttributeError):
                self._known = {}  # a file that was cut short is measured again

    def __call__(self, in_float: frozenset[str], quick: bool) -> Score:
        key = f"{'quick' if quick else 'full'}:{','.join(sorted(in_float))}"
        if key not in self._known:
            self._known[key] = self._scorer(in_float, quick)
            self.calls += 1
            self._save()
        return self._known[key]

    def _save(self) -> None:
        if self._path is None:
            return
        text = json.dumps({k: asdict(v) for k, v in self._known.items()})
        write_atomically(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def search(
    units: Sequence[Unit],
    scorer: Scorer,
    budget: float,
    total_macs: int,
    statistics: Mapping[str, float] | None = None,
    tell: Tell | None = None,
    time_limit_s: float | None = None,
    cache: Path | None = None,
) -> SearchResult:
    """The assignment with the most MACs in INT8 that was found to lose at most `budget` points.

    `statistics`: an estimate of each unit's noise, for the order in which units are measured. `total_macs`: those of
    the whole model, with products that are never quantized. `met` of the result is False where even all units in float
    do not hold the budget, or where `time_limit_s` ran out before; it then is the best assignment seen.
    """
    return _Search(units, ScoreCache(scorer, cache), budget, total_macs, statistics or {}, tell, time_limit_s).run()


class _Search:
    def __init__(
        self, units: Sequence[Unit], scorer: ScoreCache, budget: float, total: int, statistics: Mapping[str, float],
        tell: Tell | None, limit: float | None,
    ) -> None:  # fmt: skip
        self.units, self.scorer, self.budget, self.total = {u.name: u for u in units}, scorer, budget, total
        self.statistics, self.tell = statistics, tell or (lambda _: None)
        self.began = time.monotonic()
        self.limit = limit
        self.noise: dict[str, float] = {}
        self.trace: list[Step] = []

    def run(self) -> SearchResult:
        kept: set[str] = set()
        score = self._try("all in INT8", kept)
        if score.drop > self.budget:
            for name in self._ranking():
                if self._late():
                    break
                kept.add(name)
                score = self._try(f"{name} back to float", kept)
                if score.drop <= self.budget:
                    break
            if score.drop <= self.budget:
                self._prune(kept)
        return self._result()

    def _ranking(self) -> list[str]:
        """All units, those first that make most noise for their MACs."""
        blocks: dict[str, list[str]] = {}
        for unit in self.units.values():
            blocks.setdefault(unit.block, []).append(unit.name)
        for number, (block, names) in enumerate(blocks.items()):
            if self._late():
                break
            self._tell(f"measuring blocks, {number + 1} of {len(blocks)}", number, len(blocks) + LAYERS_MEASURED)
            self.noise[block] = self._alone(names)
        worst = sorted(blocks, key=lambda b: -self.noise.get(b, 0.0))
        measured = 0
        for block in worst:
            for name in sorted(blocks[block], key=lambda n: -self.statistics.get(n, 0.0)):
                if measured < LAYERS_MEASURED and not self._late():
                    measured += 1
                    self._tell(
                        f"measuring layers, {measured}: {name}", len(blocks) + measured, len(blocks) + LAYERS_MEASURED
                    )
                    self.noise[name] = self._alone([name])
        return sorted(self.units, key=self._rank)

    def _rank(self, name: str) -> tuple[float, float]:
        """Measured noise for a MAC, as in a knapsack: what buys most accuracy for the least of INT8 comes first. For a
        unit that was not measured its block's noise, shared out by the statistics."""
        macs = self.units[name].macs
        if name in self.noise:
            return -self.noise[name] / macs, 0.0
        block = self.units[name].block
        fellows = [u.name for u in self.units.values() if u.block == block]
        sum_of_all = sum(self.statistics.get(n, 1.0) for n in fellows) or 1.0
        share = self.statistics.get(name, 1.0) / sum_of_all
        return -self.noise.get(block, 0.0) * share / macs, -self.statistics.get(name, 0.0)

    def _alone(self, names: Sequence[str]) -> float:
        """Noise-to-signal ratio of the logits with only these units in INT8."""
        others = frozenset(self.units) - frozenset(names)
        return float(10 ** (-self.scorer(others, True).sqnr_db / 10))

    def _prune(self, kept: set[str]) -> None:
        """Takes back what the budget does not need, the units with most MACs first."""
        for name in sorted(kept, key=lambda n: -self.units[n].macs):
            if len(kept) > 1 and not self._late():
                without = kept - {name}
                if self._try(f"{name} in INT8 again", without).drop <= self.budget:
                    kept = without

    def _try(self, action: str, kept: set[str]) -> Score:
        score = self.scorer(frozenset(kept), False)
        in_float = tuple(n for n in self.units if n in kept)
        step = Step(action, in_float, score.drop, score.sqnr_db, self._share(kept))
        self.trace.append(step)
        self.tell(
            f"{action}: {score.drop:.2f} points lost, {score.sqnr_db:.1f} dB, {100 * step.int8_share:.1f} % of MACs"
        )
        return score

    def _share(self, kept: set[str]) -> float:
        return sum(u.macs for u in self.units.values() if u.name not in kept) / self.total

    def _result(self) -> SearchResult:
        holding = [s for s in self.trace if s.drop <= self.budget]
        best = max(holding, key=lambda s: s.int8_share) if holding else min(self.trace, key=lambda s: s.drop)
        return SearchResult(
            best.in_float, best.drop, best.sqnr_db, best.int8_share, bool(holding),
            round(time.monotonic() - self.began, 1), self.scorer.calls, self.noise, tuple(self.trace),
        )  # fmt: skip

    def _late(self) -> bool:
        return self.limit is not None and time.monotonic() - self.began > self.limit

    def _tell(self, text: str, done: int, of: int) -> None:
        spent = time.monotonic() - self.began
        left = f", about {spent / done * (of - done):.0f} s of measuring left" if done else ""
        self.tell(f"{text}{left}")
