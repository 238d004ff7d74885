"""Accuracy-gated mixed precision: which layers stay in float so that the loss holds a budget. Knows no backend.

What each layer's rounding does to the outputs is known beforehand (Sensitivity), so an assignment's noise is predicted
for nothing, and for any noise allowed the layers that go to float follow. What noise the budget allows is all that has
to be found out by running files: all layers in INT8 first, then by bisection. What was put back without need is tried
in INT8 again while scores are left.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dualtoken_deploy.bundle.blocks import SearchResult, Step
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.files import write_atomically
from dualtoken_deploy.quantize.sensitivity import Sensitivity

Tell = Callable[[str], None]
SCORES = 6  # assignments that are scored at most, unless none of them holds the budget
HOPELESS = 12  # and then
CLOSE = 0.003  # of the MACs: what is left to gain when bisection ends


@dataclass(frozen=True)
class Unit:
    """A layer that is quantized as a whole, in the model's own name, with its multiplications at batch 1."""

    name: str
    macs: int


@dataclass(frozen=True)
class Score:
    """What an assignment loses: `drop` in points of the metric (0 or less: nothing), and the SQNR of its outputs.

    `images`: of how many pictures, where the budget was broken before all were seen.
    """

    drop: float
    sqnr_db: float
    images: int | None = None


class Scorer(Protocol):
    """Quantizes all but `in_float`, runs it and compares."""

    def __call__(self, in_float: frozenset[str]) -> Score: ...


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

    def __call__(self, in_float: frozenset[str]) -> Score:
        key = f"full:{','.join(sorted(in_float))}"
        if key not in self._known:
            self._known[key] = self._scorer(in_float)
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
    sensitivity: Callable[[], Sensitivity],
    tell: Tell | None = None,
    time_limit_s: float | None = None,
    cache: Path | None = None,
    guess: frozenset[str] | None = None,
) -> SearchResult:
    """The assignment with the most MACs in INT8 that was found to lose at most `budget` points.

    `sensitivity` is asked only where not all layers can be INT8. `total_macs`: those of the whole model, with products
    that are never quantized. `guess`: what a search with a quantizer alike ended in; it is tried before others. `met`
    of the result is False where even all units in float do not hold the budget, or where `time_limit_s` ran out before;
    it then is the best assignment seen.
    """
    run = _Search(units, ScoreCache(scorer, cache), budget, total_macs, sensitivity, tell, time_limit_s)
    return run.run(guess)


def assigned(
    units: Sequence[Unit], scorer: Scorer, budget: float, total_macs: int, in_float: Sequence[str], tell: Tell
) -> SearchResult:
    """An assignment that is known, scored once; nothing is searched for. Raises UsageError on a layer that is none of
    `units`."""
    if unknown := set(in_float) - {unit.name for unit in units}:
        raise UsageError(f"{sorted(unknown)[0]} is no layer that is quantized here; leave in_float to the search")

    def never() -> Sensitivity:
        raise NotImplementedError  # what each layer does is not asked for

    return _Search(units, ScoreCache(scorer), budget, total_macs, never, tell, None).take(frozenset(in_float))


class _Search:
    def __init__(
        self, units: Sequence[Unit], scorer: ScoreCache, budget: float, total: int,
        sensitivity: Callable[[], Sensitivity], tell: Tell | None, limit: float | None,
    ) -> None:  # fmt: skip
        self.units, self.scorer, self.budget, self.total = {u.name: u for u in units}, scorer, budget, total
        self.macs = {u.name: u.macs for u in units}
        self.ask, self.tell = sensitivity, tell or (lambda _: None)
        self.began, self.limit = time.monotonic(), limit
        self.timed_out: bool | None = None
        self.spent = 0.0  # seconds in the scorer
        self.noise: dict[str, float] = {}
        self.trace: list[Step] = []

    def run(self, guess: frozenset[str] | None) -> SearchResult:
        first = self._try("all in INT8", frozenset())
        if first.drop > self.budget and not self._late():
            self.tell("measuring what each layer does to the outputs")
            known = self.ask()
            self.noise = known.alone()
            kept = self._bisect(known, first, guess)
            if kept is not None:
                self._prune(kept)
        return self._result()

    def take(self, kept: frozenset[str]) -> SearchResult:
        """Scores one assignment alone."""
        self._try("the layers in float that were given", kept)
        return self._result()

    def _bisect(self, known: Sensitivity, first: Score, guess: frozenset[str] | None) -> frozenset[str] | None:
        """Looks for the most noise that holds the budget; what is in float then. None: no assignment holds it."""
        broken, holds = known.noise(), 0.0
        noisy = known.choose(self.macs, 0.0)  # of the others nothing is known that they do
        best: frozenset[str] | None = None
        tried = frozenset[str]()
        allowed = broken * min(max(self.budget / first.drop, 0.05), 0.5)  # loss grows with noise, and faster
        while len(self.trace) < (SCORES - 1 if best is not None else HOPELESS) and not self._late():
            last = best is None and len(self.trace) == HOPELESS - 1
            kept = guess if guess is not None else frozenset(self.units) if last else known.choose(self.macs, allowed)
            if guess is None and kept in (tried, best):
                if best is not None or len(kept) == len(self.units):
                    break
                if kept != noisy:
                    allowed /= 4
                    continue
                kept = frozenset(self.units)
            holding = self._try(self._action(known, kept), kept).drop <= self.budget
            tried = tried if holding else kept
            predicted, guess = known.noise(kept), None
            if holding:
                best, holds = kept, max(predicted, holds)
            else:
                broken = min(predicted, broken)
            if best is not None and self._share(best) > self._share(tried) - CLOSE:
                break
            allowed = math.sqrt(holds * broken) if holds and holds < broken else broken / 4
        return best

    def _action(self, known: Sensitivity, kept: frozenset[str]) -> str:
        worst = sorted(kept, key=lambda n: -self.noise.get(n, 0.0))
        predicted = -10 * math.log10(max(known.noise(kept), 1e-30))
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        return f"{worst[0]}{more} in float, {predicted:.0f} dB predicted" if worst else "all in INT8"

    def _prune(self, kept: frozenset[str]) -> None:
        """Takes back what the budget does not need, the units with most MACs first."""
        for name in sorted(kept, key=lambda n: -self.macs[n]):
            if len(kept) > 1 and len(self.trace) < SCORES and not self._late():
                without = kept - {name}
                if self._try(f"{name} in INT8 again", without).drop <= self.budget:
                    kept = without

    def _try(self, action: str, kept: frozenset[str]) -> Score:
        self.tell(f"trying {action}{self._left()}")
        began = time.monotonic()
        score = self.scorer(kept)
        self.spent += time.monotonic() - began
        in_float = tuple(n for n in self.units if n in kept)
        step = Step(action, in_float, score.drop, score.sqnr_db, self._share(kept))
        self.trace.append(step)
        early = f" (clear after {score.images} pictures)" if score.images else ""
        self.tell(
            f"{action}: {score.drop:.2f} points lost{early}, {score.sqnr_db:.1f} dB, "
            f"{100 * step.int8_share:.1f} % of MACs"
        )
        return score

    def _left(self) -> str:
        """A guess at what is left of the whole search: an end that comes early is the usual one."""
        if not self.trace:
            return ""
        most = SCORES if any(step.drop <= self.budget for step in self.trace) else HOPELESS
        left = most - len(self.trace)
        return f" (at most {left} more, about {self.spent / len(self.trace) * left:.0f} s of the search left at most)"

    def _share(self, kept: frozenset[str]) -> float:
        return sum(u.macs for u in self.units.values() if u.name not in kept) / self.total

    def _result(self) -> SearchResult:
        holding = [s for s in self.trace if s.drop <= self.budget]
        best = max(holding, key=lambda s: s.int8_share) if holding else min(self.trace, key=lambda s: s.drop)
        return SearchResult(
            best.in_float, best.drop, best.sqnr_db, best.int8_share, bool(holding),
            round(time.monotonic() - self.began, 1), self.scorer.calls, self.noise, tuple(self.trace), self.timed_out,
        )  # fmt: skip

    def _late(self) -> bool:
        """Whether the time is up; asked only where there would be more to try."""
        late = self.limit is not None and time.monotonic() - self.began > self.limit
        self.timed_out = late or self.timed_out or None
        return late
