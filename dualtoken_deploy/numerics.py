"""How far one array is from another: the measures that every report and every gate uses. float64 throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SQNR_LIMIT_DB = 300.0  # stands for "equal" (and -300 for "nothing in common"): float64 itself resolves about 313 dB


@dataclass(frozen=True)
class Difference:
    """`actual` against `expected`, over all their elements."""

    sqnr_db: float
    max_abs_error: float
    mean_abs_error: float
    cosine: float
    worst_index: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"SQNR {self.sqnr_db:.1f} dB, max error {self.max_abs_error:.3g} at {self.worst_index}, "
            f"mean error {self.mean_abs_error:.3g}, cosine {self.cosine:.9f}"
        )


class Running:
    """A Difference over arrays that come one after another; their values are not kept."""

    def __init__(self) -> None:
        self._signal = self._noise = self._errors = self._dot = self._power = 0.0
        self._count, self._seen, self._worst = 0, 0, -1.0
        self._at: tuple[int, ...] = ()
        self._finite = True

    def add(self, expected: Array, actual: Array) -> None:
        """Raises ValueError on unequal shapes or an empty array."""
        if expected.shape != actual.shape or expected.size == 0:
            raise ValueError(f"cannot compare shapes {expected.shape} and {actual.shape}")
        rows, self._seen = self._seen, self._seen + (expected.shape[0] if expected.ndim else 1)
        if not self._finite:
            return
        want, got = expected.astype(np.float64), actual.astype(np.float64)
        if not np.isfinite(got).all():
            self._finite, self._at = False, _place(int(np.argmin(np.isfinite(got))), got.shape, rows)
            return
        error = np.abs(got - want)
        self._noise += float((error**2).sum())
        self._signal += float((want**2).sum())
        self._power += float((got**2).sum())
        self._dot += float((want * got).sum())
        self._errors += float(error.sum())
        self._count += error.size
        if float(error.max()) > self._worst:
            self._worst, self._at = float(error.max()), _place(int(error.argmax()), error.shape, rows)

    def difference(self) -> Difference:
        """Of all that was added, joined along the first axis. Raises ValueError where nothing was."""
        if not self._seen:
            raise ValueError("nothing was compared")
        if not self._finite:
            return Difference(-SQNR_LIMIT_DB, np.inf, np.inf, 0.0, self._at)
        ratio = np.inf if self._noise == 0 else self._signal / self._noise
        sqnr = np.clip(10 * np.log10(max(ratio, 1e-30)), -SQNR_LIMIT_DB, SQNR_LIMIT_DB)
        norm = float(np.sqrt(self._signal) * np.sqrt(self._power))
        cosine = self._dot / norm if norm else float(self._noise == 0)
        return Difference(float(sqnr), self._worst, self._errors / self._count, cosine, self._at)


def _place(flat: int, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Where a flat index lies in an array that came behind `rows` rows of others."""
    place = [int(i) for i in np.unravel_index(flat, shape)]
    if place:
        place[0] += rows
    return tuple(place)


def compare(expected: Array, actual: Array) -> Difference:
    """Difference of two arrays of one shape. Equal arrays give SQNR_LIMIT_DB, a non-finite actual -SQNR_LIMIT_DB.

    SQNR = 10 log10(sum expected^2 / sum (actual - expected)^2).
    Raises ValueError on unequal shapes or an empty array.
    """
    running = Running()
    running.add(expected, actual)
    return running.difference()


def top_k_hits(logits: Array, labels: Array, k: int) -> int:
    """How many rows of `logits` (N, classes) have their label among the k largest."""
    k = min(k, logits.shape[1])
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return int((best == labels[:, None]).any(axis=1).sum())


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return out
