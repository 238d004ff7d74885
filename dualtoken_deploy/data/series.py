"""Time series as samples: what was seen up to a moment, and what came after it. No torch.

A series is (T, M): a row a step, a column a variate, each with the train part's mean taken out and divided by its
standard deviation. The first SHARE of the steps are the train part, the others the val part, whose pasts reach back
into the first.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.errors import DatasetError, missing_extra
from dualtoken_deploy.files import read_bytes

SHARE = 0.8
PAST, FUTURE = 96, 24  # steps that every sample has at least
MOST_PAST, MOST_FUTURE = 512, 96
MAX_BYTES, MAX_VALUES = 64 << 20, 8 << 20  # of a file
LORENZ = (8, 8000, 0.05, 8.0, 0.02)  # variates, steps, the time of one, forcing, observation noise in deviations

Values = NDArray[np.float64]
NO_PICTURE: NDArray[np.uint8] = np.zeros((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Series:
    """`values` (T, M), a name for each variate."""

    values: Values
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Windows:
    values: NDArray[np.float32]  # standardised
    first: int  # the step whose forecast sample 0 is

    @property
    def paths(self) -> tuple[Path, ...]:
        return ()

    def __call__(self, index: int) -> Sample:
        at = self.first + index
        past, future = self.values[max(at - MOST_PAST, 0) : at], self.values[at : at + MOST_FUTURE]
        return Sample(NO_PICTURE, series=past, future=future)


def open_series(source: str | Path, part: str = "val") -> SampleSet:
    """The windows of a word of SERIES or of a CSV file; `part` "train" or "val".

    Raises DatasetError on a file that is no series of numbers, or too short; MissingError where a word needs a package.
    """
    word = isinstance(source, str) and source in SERIES
    series = SERIES[str(source)]() if word else read_csv(Path(source))
    split, steps = int(len(series.values) * SHARE), len(series.values)
    first, last = (PAST, split - FUTURE) if part == "train" else (split, steps - FUTURE)
    if split <= PAST + FUTURE or last <= first:
        raise DatasetError(f"{source} has {steps} steps; at least {round((PAST + 2 * FUTURE) / SHARE) + 1} are needed")
    mean, std = series.values[:split].mean(0), series.values[:split].std(0)
    values = ((series.values - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
    if part == "train":
        values = values[:split]  # nothing of the val part, not even as a future
    digest = hashlib.sha256(f"{part} {series.names}".encode() + values.tobytes()).hexdigest()
    return SampleSet(
        f"{source} ({part})", series.names, _Windows(values, first), tuple(range(last - first + 1)), digest
    )


def read_csv(path: Path) -> Series:
    """A CSV file with a head line of names; columns that hold no numbers, such as dates, are left out.

    Raises DatasetError.
    """
    mend = f"give a .csv file, or one of: {', '.join(SERIES)}"
    data = read_bytes(path, MAX_BYTES, DatasetError, mend)
    try:
        head, *rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as CSV ({error}); {mend}") from error
    rows = [row for row in rows if row]
    if not head or any(len(row) != len(head) for row in rows) or len(rows) * len(head) > MAX_VALUES:
        raise DatasetError(f"{path} is no table: a head line of names, and as many values in each line after it")
    columns: dict[str, Values] = {}
    for place, name in enumerate(head):
        try:
            column = np.array([float(row[place]) for row in rows])
        except ValueError:
            continue
        if not (np.abs(column) <= np.finfo(np.float32).max).all():  # what a model takes; NaN is not either
            raise DatasetError(f"{path}: {name} has values that are no finite numbers of float32; fill or remove them")
        columns[name.strip() or f"column {place}"] = column
    if not columns or not rows:
        raise DatasetError(f"{path} has no column of numbers; a series needs one for each variate")
    return Series(np.stack(list(columns.values()), axis=1), tuple(columns))


def load_series(path: str | Path) -> Sample:
    """A CSV file whole, as what was seen up to its last line. Raises DatasetError."""
    series = read_csv(Path(path))
    return Sample(NO_PICTURE, series=series.values.astype(np.float32))


def example_windows(variates: int, count: int) -> SampleSet:
    """`count` windows of `lorenz`, of as many variates as a model takes: its own over again where there are more."""
    data = open_series("lorenz").limit(count)
    assert isinstance(data.read, _Windows)  # noqa: S101  # open_series made it
    columns = np.arange(variates) % data.read.values.shape[1]
    return replace(data, read=replace(data.read, values=data.read.values[:, columns]), labels=None)


@cache
def _lorenz() -> Series:
    """Lorenz's model of 1996, dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F on a ring: chaotic, and each variate is
    driven by products of its neighbours, which no linear model has. By fourth-order Runge-Kutta, with noise added."""
    variates, steps, time, forcing, noise = LORENZ
    random = np.random.default_rng(0)
    start = forcing + random.normal(0, 0.1, int(variates))
    values = lorenz_steps(start, int(steps) + 500, time, forcing)[500:]  # the first ones lead to the attractor
    values += noise * values.std(0) * random.normal(size=values.shape)
    return Series(values, tuple(f"x{i + 1}" for i in range(int(variates))))


def lorenz_steps(x: Values, steps: int, time: float, forcing: float) -> Values:
    """(steps, M): the states that follow x (M,)."""

    def slope(x: Values) -> Values:
        out: Values = (np.roll(x, -1) - np.roll(x, 2)) * np.roll(x, 1) - x + forcing
        return out

    found = []
    for _ in range(steps):
        k1 = slope(x)
        k2 = slope(x + time / 2 * k1)
        k3 = slope(x + time / 2 * k2)
        k4 = slope(x + time * k3)
        x = x + time / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(x)
    return np.array(found)


@cache
def _eeg() -> Series:
    """matplotlib's sample of an electroencephalogram: four electrodes, 800 samples of float64."""
    spec = importlib.util.find_spec("matplotlib")  # finds without importing
    if spec is None or spec.origin is None:
        raise missing_extra("plots", "the series eeg")
    path = Path(spec.origin).parent / "mpl-data" / "sample_data" / "eeg.dat"
    try:
        values = np.fromfile(path, dtype="<f8")
    except OSError as error:
        raise DatasetError(f"{path} is not there; install the matplotlib of constraints.txt") from error
    if values.size != 3200 or not np.isfinite(values).all():
        raise DatasetError(f"{path} is not the recording that was expected; install the matplotlib of constraints.txt")
    return Series(values.reshape(800, 4), ("PG3", "PG5", "PG7", "PG9"))


SERIES: Mapping[str, Callable[[], Series]] = MappingProxyType({"lorenz": _lorenz, "eeg": _eeg})
