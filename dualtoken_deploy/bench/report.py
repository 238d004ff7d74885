"""What a bench found, as data, as JSON and as one table. Pure arithmetic: nothing is timed here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.9  # of the interval of a median ratio
NOISY_SPREAD = 1.2  # highest over lowest per-round ratio; a quiet machine stays below 1.05


@dataclass(frozen=True)
class Ratio:
    """A ratio taken round by round: median, lowest and highest. Above 1 means faster than the baseline."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return self.high / self.low

    def __str__(self) -> str:
        return f"{_number(self.median)}x ({_number(self.low)}-{_number(self.high)})"


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call, over all runs of all rounds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    runs: int


def latency(laps_ns: Sequence[int]) -> Latency:
    """Percentiles (linear between neighbours) and mean of call times in nanoseconds. Raises ValueError on none."""
    if not laps_ns:
        raise ValueError("no call was timed")
    laps_ms = np.asarray(laps_ns, np.float64) / 1e6
    p50, p90, p99 = (float(p) for p in np.percentile(laps_ms, (50, 90, 99)))
    return Latency(p50, p90, p99, float(laps_ms.mean()), len(laps_ns))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Bounds of the median of what the values are drawn from, of any distribution: the order statistics between which
    it lies with at least this confidence, by the sign test (Conover, Practical Nonparametric Statistics, 3.2).

    None of fewer values than that takes: five for 90 %.
    """
    ordered, below = sorted(values), 0.0
    count = len(ordered)
    place = -1
    while place + 1 < count / 2:
        below += math.comb(count, place + 1) / 2**count
        if 2 * below > 1 - confidence:
            break
        place += 1
    return None if place < 0 else (ordered[place], ordered[count - 1 - place])


def ratio_of(reference_ms: Sequence[float], rounds_ms: Sequence[float]) -> Ratio:
    """reference / own p50 of each round, then median, lowest and highest. Raises ValueError on unequal lengths."""
    ratios = ratios_of(reference_ms, rounds_ms)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def ratios_of(reference_ms: Sequence[float], rounds_ms: Sequence[float]) -> list[float]:
    """reference / own p50 of each round. Raises ValueError on unequal lengths."""
    return [reference / own for reference, own in zip(reference_ms, rounds_ms, strict=True)]


@dataclass(frozen=True)
class Tail:
    """Milliseconds from arrival to answer with requests that come at random, at a `load` of the capacity."""

    load: float
    p50_ms: float
    p99_ms: float
    requests: int


@dataclass(frozen=True)
class Contestant:
    """One row. `kind`: "bundle", "eager" or "limit" (the model's matrix products alone). None where there is no figure.

    `ratio` is the baseline's p50 over this p50, `gemm_limit_ratio` the median of the limit's p50 over this p50 (1.0: at
    the limit, 0.5: twice as slow as its matrix products alone). `cold_start_ms`: importing the runtime and loading the
    artifact (in the page cache by then), without Python's own start; `first_inference_ms`: the first call after it.
    """

    name: str
    kind: str
    target: str
    precision: str
    bundle: str | None
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    runs: int
    rounds_p50_ms: tuple[float, ...]
    images_per_s: float
    async_images_per_s: float | None
    ratio: Ratio
    gemm_limit_ratio: float | None
    cold_start_ms: float | None
    first_inference_ms: float | None
    peak_rss_mib: float
    size_mib: float | None
    threads: int
    batch: int
    device: str
    ratio_interval: tuple[float, float] | None = None  # in which the median ratio lies, with CONFIDENCE
    tails: tuple[Tail, ...] = ()  # mode server

    def to_json(self) -> dict[str, Any]:
        """Plain data; units are in the names."""
        return asdict(self)


def _number(value: float | None) -> str:
    """Four significant digits at most, none after the point from 100 on; "-" for None."""
    if value is None:
        return "-"
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}" if value >= 0.01 or value == 0 else f"{value:.{1 - math.floor(math.log10(value))}f}"


# Title and cell of each column, in order: the terminal's table and the Markdown one are both made of these.
_COLUMNS: Mapping[str, Any] = {
    "contestant": lambda c: c.name,
    "p50 ms": lambda c: _number(c.p50_ms),
    "p90 ms": lambda c: _number(c.p90_ms),
    "p99 ms": lambda c: _number(c.p99_ms),
    "mean ms": lambda c: _number(c.mean_ms),
    "images/s": lambda c: _number(c.images_per_s),
    "async images/s": lambda c: _number(c.async_images_per_s),
    "vs baseline": lambda c: str(c.ratio),
    "90 %": lambda c: "-" if c.ratio_interval is None else "{}-{}".format(*map(_number, c.ratio_interval)),
    "of limit": lambda c: _number(c.gemm_limit_ratio),
    "cold start ms": lambda c: _number(c.cold_start_ms),
    "first ms": lambda c: _number(c.first_inference_ms),
    "peak MiB": lambda c: _number(c.peak_rss_mib),
    "size MiB": lambda c: _number(c.size_mib),
}


@dataclass(frozen=True)
class BenchReport:
    """All rows of one bench, with the machine and what the reader should know before believing them.

    `command` is the command line that repeats it, `notes` the reasons for doubt.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    baseline: str
    threads: int
    batch: int
    rounds: int
    seconds: float
    contestants: tuple[Contestant, ...]
    notes: tuple[str, ...]
    mode: str = "latency"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `ratio` is baseline p50 over this p50, round by round."""
        data = {f: getattr(self, f) for f in self.__dataclass_fields__}
        lists = {"contestants": [c.to_json() for c in self.contestants], "notes": list(self.notes)}
        return data | {"machine": dict(self.machine), "versions": dict(self.versions)} | lists

    def columns(self) -> tuple[str, ...]:
        """Titles of the table."""
        return (*_COLUMNS, *(f"p99 ms at {100 * load:.0f} %" for load in self._loads()))

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, one tuple a contestant, as long as `columns()`."""
        out = []
        for c in self.contestants:
            tails = {tail.load: tail.p99_ms for tail in c.tails}
            out.append((*(cell(c) for cell in _COLUMNS.values()), *(_number(tails.get(x)) for x in self._loads())))
        return out

    def _loads(self) -> list[float]:
        return sorted({tail.load for c in self.contestants for tail in c.tails})

    def machine_line(self) -> str:
        """The machine in one line."""
        m = self.machine
        memory = f"{m['memory_mib'] / 1024:.0f} GiB" if m.get("memory_mib") else "memory unknown"
        isa = " ".join(m["isa"]) or "no known instruction sets"
        governor = m.get("governor") or "unknown"
        return (
            f"{m['cpu']} ({m['architecture']}: {isa}), {m['cores']} cores, {memory}, governor {governor}, "
            f"{m['os']}, {m['kernel']}, Python {m['python']}"
        )

    def setting_line(self) -> str:
        """How it was measured, in one line."""
        libraries = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"mode {self.mode}, threads {self.threads}, batch {self.batch}, {self.rounds} interleaved rounds of "
            f"{self.seconds:g} s each; "
            f"baseline {self.baseline}; {libraries}"
        )

    def to_markdown(self) -> str:
        """Machine, command, settings, table and notes as Markdown."""
        lines = [
            f"Machine: {self.machine_line()}.",
            "",
            f"`{self.command}`: {self.setting_line()}.",
            "",
            _line(self.columns()),
            _line(["---", *["---:"] * (len(self.columns()) - 1)]),
            *(_line(row) for row in self.rows()),
        ]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def noise_notes(contestants: Sequence[Contestant]) -> list[str]:
    """A line for each contestant whose ratio moved by more than NOISY_SPREAD between rounds."""
    return [
        f"{c.name} is noisy: its ratio went from {_number(c.ratio.low)} to {_number(c.ratio.high)} between rounds; "
        "give more rounds on a quieter machine"
        for c in contestants
        if c.ratio.spread > NOISY_SPREAD
    ]
