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


def compare(expected: Array, actual: Array) -> Difference:
    """Difference of two arrays of one shape. Equal arrays give SQNR_LIMIT_DB, a non-finite actual -SQNR_LIMIT_DB.

    SQNR = 10 log10(sum expected^2 / sum (actual - expected)^2).
    Raises ValueError on unequal shapes or an empty array.
    """
    if expected.shape != actual.shape or expected.size == 0:
        raise ValueError(f"cannot compare shapes {expected.shape} and {actual.shape}")
    want, got = expected.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(got).all():
        worst = np.unravel_index(int(np.argmin(np.isfinite(got))), got.shape)
        return Difference(-SQNR_LIMIT_DB, np.inf, np.inf, 0.0, tuple(int(i) for i in worst))
    error = np.abs(got - want)
    noise, signal = float((error**2).sum()), float((want**2).sum())
    ratio = np.inf if noise == 0 else signal / noise
    sqnr = np.clip(10 * np.log10(max(ratio, 1e-30)), -SQNR_LIMIT_DB, SQNR_LIMIT_DB)
    norm = float(np.linalg.norm(want) * np.linalg.norm(got))
    cosine = float((want * got).sum() / norm) if norm else float(noise == 0)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    return Difference(float(sqnr), float(error.max()), float(error.mean()), cosine, tuple(int(i) for i in worst))


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
