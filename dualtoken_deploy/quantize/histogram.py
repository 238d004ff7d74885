"""The range of an activation from a histogram of it: all that was seen, a percentile, or least information lost.

Own code: the histograms of onnxruntime's calibrators raise on a value that hardly varies, and every quantizer of this
project shares these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import Array

BINS = 2048
PERCENTILE = 99.99  # of all entries of a value lie within
LEVELS = 128  # of one sign of an int8

Range = tuple[float, float]


def check_method(method: str) -> None:
    """Raises UsageError where METHODS has no such method."""
    if method not in METHODS:
        raise UsageError(f"unknown calibrator {method!r}; valid calibrators: {', '.join(METHODS)}")


def add_counts(counts: Array, value: Array, bounds: Range) -> None:
    """Adds a value's entries to its histogram of BINS bins over `bounds`."""
    low, high = bounds
    scale = BINS / max(high - low, 1e-30)
    at = np.clip(((value.astype(np.float64) - low) * scale).astype(np.int64), 0, BINS - 1)
    counts += np.bincount(at.ravel(), minlength=BINS)


def percentile_range(counts: Array, bounds: Range) -> Range:
    """The narrowest of the histogram's edges that leave (100 - PERCENTILE) % out, half of it at either end."""
    edges = np.linspace(*bounds, len(counts) + 1)
    below = np.concatenate(([0], np.cumsum(counts))) / max(counts.sum(), 1)
    tail = (1 - PERCENTILE / 100) / 2
    first = int(np.searchsorted(below, tail, side="right")) - 1
    last = int(np.searchsorted(below, 1 - tail, side="left"))
    return float(edges[max(first, 0)]), float(edges[min(last, len(counts))])


def entropy_range(counts: Array, bounds: Range) -> Range:
    """The symmetric clipping of |x| whose int8 histogram has the least Kullback-Leibler divergence from the float one
    (Migacz, "8-bit inference with TensorRT", 2017); signs keep their own extremes."""
    edges = np.linspace(*bounds, len(counts) + 1)
    middle = np.abs((edges[1:] + edges[:-1]) / 2)
    top = max(abs(bounds[0]), abs(bounds[1]))
    magnitude, _ = np.histogram(middle, bins=BINS, range=(0, max(top, 1e-30)), weights=counts)
    best, limit = np.inf, top
    for stop in range(LEVELS, BINS + 1, 16):
        divergence = _divergence(magnitude, stop)
        if divergence < best:
            best, limit = divergence, top * stop / BINS
    return max(bounds[0], -limit), min(bounds[1], limit)


def _divergence(counts: Array, stop: int) -> float:
    """Of the first `stop` bins, with what lies beyond in the last of them, from the same after int8."""
    kept = counts[:stop].astype(np.float64)
    reference = kept.copy()
    reference[-1] += counts[stop:].sum()
    group = np.arange(stop) * LEVELS // stop
    filled = kept > 0
    sums = np.bincount(group, weights=kept, minlength=LEVELS)
    sizes = np.bincount(group, weights=filled, minlength=LEVELS)
    quantized = np.where(filled, sums[group] / np.maximum(sizes[group], 1), 0.0)
    p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1e-30)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())


def _whole(_counts: Array, bounds: Range) -> Range:
    return bounds


METHODS: Mapping[str, Callable[[Array, Range], Range]] = MappingProxyType(
    {"minmax": _whole, "entropy": entropy_range, "percentile": percentile_range}
)
