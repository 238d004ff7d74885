"""CSV files of numbers, as a series to forecast."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from hypothesis import strategies as st

from dualtoken_deploy.data.series import load_series, open_series
from dualtoken_deploy.errors import DualTokenError
from tests.fuzz.inputs import edited
from tests.fuzz.place import filed

TOKENS = [
    *(b"nan", b"inf", b"1e999", b"1e300", b"-1e300", b"1_0", b'"', b"\x00", b"\xff", b",", b"\r", b"\n\n"),
    *(b"\xe2\x80\xa8", b"'=1+1"),
]


def seeds() -> list[bytes]:
    lines = [f"2026-01-{i % 28 + 1},{i * 0.5},{(-1) ** i}" for i in range(200)]
    return [b"when,a,b\n" + "\n".join(lines).encode() + b"\n", b"a\n" + b"1\n2\n" * 100, b"a,b\n1,2\n"]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError; what is read is finite."""
    file = filed(data, ".csv")
    found = open_series(file)
    for sample in (load_series(file), found.read(0), found.read(len(found.indices) - 1)):
        if sample.series is None or not np.isfinite(sample.series).all():
            raise AssertionError("a series that is not finite")


CASES = edited(seeds(), TOKENS) | st.binary(max_size=100)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
