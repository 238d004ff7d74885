"""A bundle against its baseline: every row with a verdict, and an error that names those that fell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dualtoken_deploy.errors import InputError, ToleranceError
from dualtoken_deploy.prove.measure import Report, Setting, Subject
from dualtoken_deploy.prove.tolerances import LATENCY, SMALLER_IS_BETTER, Tolerances
from dualtoken_deploy.use.inspect import product_precision

HELD, FELL, NEW, LEFT_OUT, CANNOT_TELL = "held", "fell", "new", "left out", "cannot tell"


@dataclass(frozen=True)
class Row:
    """One row; `baseline` and `now` are numbers, or dtypes; `allowed` in words."""

    name: str
    baseline: float | str | None
    now: float | str | None
    allowed: str
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """`rows` in the order of the report; `notes`: what a reader should know."""

    bundle: str
    baseline: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def fell(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == FELL)

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "baseline": self.baseline,
            "held": not self.fell,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }

    def gate(self) -> None:
        """Raises ToleranceError that names the rows that fell."""
        if self.fell:
            said = "; ".join(f"{r.name} {_show(r.baseline)} -> {_show(r.now)} (allowed {r.allowed})" for r in self.fell)
            raise ToleranceError(f"{self.bundle} fell behind {self.baseline}: {said}")


def check_same(baseline: Report, subject: Subject, where: str) -> None:
    """Raises InputError where a baseline is of another model, task, target, precision or shape."""
    for part in fields(Subject):
        was, now = getattr(baseline.subject, part.name), getattr(subject, part.name)
        if was != now:
            raise InputError(
                f"{where} is the baseline of another bundle: its {part.name} is {_show(was)}, here it is {_show(now)}; "
                "give that bundle's own, or make one with --update"
            )


def check_setting(baseline: Setting, asked: Setting, where: str) -> None:
    """Raises InputError where pictures or reference differ: the figures could not be compared."""
    for name in ("data", "limit", "reference"):
        was, now = getattr(baseline, name), getattr(asked, name)
        if was != now:
            raise InputError(f"{where} was measured with {name} {was}, not {now}; leave the option out, or --update")


def compare(bundle: str, where: str, baseline: Report, now: Report, tolerances: Tolerances) -> Verification:
    """Every row of either report."""
    rows = [*_figures(baseline, now, tolerances), *_executed(baseline, now), *_latency(baseline, now, tolerances)]
    notes = [*now.notes]
    if baseline.machine.get("cpu") != now.machine.get("cpu"):
        notes.append(f"the baseline was measured on {baseline.machine.get('cpu')}, this is {now.machine.get('cpu')}")
    return Verification(bundle, where, tuple(rows), tuple(dict.fromkeys(notes)))


def _figures(baseline: Report, now: Report, tolerances: Tolerances) -> Iterable[Row]:
    for name in dict.fromkeys((*baseline.figures, *now.figures)):
        was, found = baseline.figures.get(name), now.figures.get(name)
        if was is None or found is None:
            yield Row(name, was, found, "-", NEW if was is None else FELL)
            continue
        worse = found - was if name in SMALLER_IS_BETTER else was - found
        allowed = tolerances.allow[name]
        fell = worse > allowed.of(was) + 1e-12
        said = [f"{allowed} {'more' if name in SMALLER_IS_BETTER else 'less'}"]
        if (least := tolerances.at_least.get(name)) is not None:
            fell, said = fell or found < least, [*said, f"at least {least:g}"]
        if (most := tolerances.at_most.get(name)) is not None:
            fell, said = fell or found > most, [*said, f"at most {most:g}"]
        yield Row(name, was, found, ", ".join(said), FELL if fell else HELD)


def _executed(baseline: Report, now: Report) -> Iterable[Row]:
    was_all, now_all = product_precision(baseline.executed), product_precision(now.executed)
    yield Row("matrix products run in", was_all, now_all, "the same", HELD if was_all == now_all else FELL)
    for kind in dict.fromkeys((*baseline.executed, *now.executed)):
        was, found = baseline.executed.get(kind), now.executed.get(kind)
        # a newer runtime fuses otherwise: a kind that comes or goes is told and is no loss
        verdict = HELD if was == found else NEW if was is None else LEFT_OUT if found is None else FELL
        yield Row(f"{kind} runs in", was, found, "the same", verdict)


def _latency(baseline: Report, now: Report, tolerances: Tolerances) -> Iterable[Row]:
    """Rounds of one run differ. Only where the best of them is too slow did it surely fall; where the median alone is,
    nobody can tell."""
    was, found = baseline.latency, now.latency
    if was is None and found is None:
        return
    allowed = tolerances.allow[LATENCY]
    name = LATENCY
    said = f"{allowed} less"
    if was is None or found is None:
        verdict = NEW if was is None else LEFT_OUT
        before, after = (None if one is None else one.ratio for one in (was, found))
        yield Row(name, before, after, said, verdict)
        return
    least = max(was.ratio - allowed.of(was.ratio), tolerances.at_least.get(LATENCY, 0.0))
    verdict = FELL if found.high < least else CANNOT_TELL if found.ratio < least else HELD
    yield Row(name, was.ratio, found.ratio, said, verdict)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
