"""How much worse than its baseline a bundle may be, from a small TOML file; every key is known or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.errors import InputError
from dualtoken_deploy.files import line_of, read_toml
from dualtoken_deploy.tasks.table import TASKS

MAX_FILE = 1 << 20
METRICS = tuple(dict.fromkeys(metric for task in TASKS.values() for metric in task.metrics))
LATENCY = "latency_ratio"
# What more is worse; of everything else, less is.
SMALLER_IS_BETTER = frozenset({"size_mib"})
ROWS = ("sqnr_db", "agreement", *METRICS, "int8_mac_share", "size_mib", LATENCY)


@dataclass(frozen=True)
class Allowed:
    """An amount in the row's own unit, or a share of the baseline's value."""

    amount: float
    relative: bool = False

    def of(self, baseline: float) -> float:
        return self.amount * abs(baseline) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{100 * self.amount:g} %" if self.relative else f"{self.amount:g}"


# dB; shares of 1; the size and the latency as a share of the baseline's. Latency's is what a shared machine's rounds
# differ by (docs/ci.md).
DEFAULTS: Mapping[str, Allowed] = MappingProxyType(
    {
        "sqnr_db": Allowed(1.0),
        "agreement": Allowed(0.0),
        **{metric: Allowed(0.005) for metric in METRICS},
        "int8_mac_share": Allowed(0.005),
        "size_mib": Allowed(0.02, relative=True),
        LATENCY: Allowed(0.15, relative=True),
    }
)


@dataclass(frozen=True)
class Tolerances:
    """`allow`: by row, against the baseline; `at_least` and `at_most`: by row, whatever the baseline says."""

    allow: Mapping[str, Allowed] = field(default_factory=lambda: DEFAULTS)
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Tolerances:
        """Raises InputError that names the line, and the keys that there are."""
        data, text = read_toml(path, MAX_FILE, InputError, "see docs/ci.md")
        where = _Where(path, text)
        tables = ("allow", "at_least", "at_most")
        for name in data:
            if name not in tables or not isinstance(data[name], dict):
                raise InputError(f"{where(name)}: {name!r} is no table here; the tables are {', '.join(tables)}")
        for name in tables:
            for key in data.get(name, {}):
                if key not in ROWS:
                    raise InputError(f"{where(key)}: there is no row {key!r} in [{name}]; rows: {', '.join(ROWS)}")
        allow = {key: _allowed(value, where(key)) for key, value in data.get("allow", {}).items()}
        limits = {
            name: {key: _number(value, where(key)) for key, value in data.get(name, {}).items()} for name in tables[1:]
        }
        return Tolerances({**DEFAULTS, **allow}, limits["at_least"], limits["at_most"])


@dataclass(frozen=True)
class _Where:
    """The line that a key stands in, which tomllib does not keep."""

    path: Path
    text: str

    def __call__(self, key: str) -> str:
        return line_of(self.path, self.text, rf'\s*\[?\s*["\']?{re.escape(key)}["\']?\s*[\]=.]')


def _allowed(value: Any, where: str) -> Allowed:
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)):
        return Allowed(float(found[1]) / 100, relative=True)
    number = _number(value, where)
    if number < 0:
        raise InputError(f"{where}: {number:g} is less than 0; a tolerance is how much worse a row may be")
    return Allowed(number)


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):  # nothing would pass such a limit, or everything
        said = f"{value!r}"[:60]
        raise InputError(f'{where}: {said} is no number (in [allow] also a share, as "2 %")')
    return number
