"""The one helper that compares arrays: on failure it prints SQNR, largest error, where, and what was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from dualtoken_deploy.bundle.blocks import Figures
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.targets.runner import Array


def assert_close(actual: Any, expected: Any, sqnr_db: float | None = None, relative: float | None = None) -> None:
    """Holds `actual` to an SQNR in dB, or to a relative error ||a - e|| / ||e||, against `expected`."""
    got, want = np.asarray(actual), np.asarray(expected)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    difference = compare(want, got)
    if sqnr_db is not None:
        assert difference.sqnr_db >= sqnr_db, f"{difference}; at least {sqnr_db} dB were asked for ({got.dtype})"
    if relative is not None:
        error = float(np.linalg.norm(_wide(got) - _wide(want)) / np.linalg.norm(_wide(want)))
        assert error <= relative, f"relative error {error:.3g} > {relative:g}; {difference}"


def shown(bundle: Bundle) -> Figures:
    """What the export measured on photographs."""
    figures = bundle.manifest.measured.photographs
    assert figures is not None, f"{bundle.path} was not measured on photographs"
    return figures


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
