"""Ranges of activations from calibration pictures: lowest and highest, a percentile, or least information lost.

Counted over all pictures with one histogram a value, so that their order does not matter. Own code: the histograms of
onnxruntime's calibrators raise on a value that hardly varies, and every quantizer of this project shares these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from onnx import numpy_helper

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.onnx.values import Prober

BINS = 2048
PERCENTILE = 99.99  # of all entries of a value lie within
LEVELS = 128  # of one sign of an int8

Range = tuple[float, float]


def check_method(method: str) -> None:
    """Raises UsageError where METHODS has no such method."""
    if method not in METHODS:
        raise UsageError(f"unknown calibrator {method!r}; valid calibrators: {', '.join(METHODS)}")


def collect_ranges(
    model: onnx.ModelProto,
    names: Sequence[str],
    inputs: Array,
    method: str,
    tell: Callable[[str], None] | None = None,
    extremes: Mapping[str, Range] | None = None,
) -> dict[str, Range]:
    """(lowest, highest) of each named value over float `inputs` (N, ...), by a method of METHODS.

    `extremes`: those of the values, where they are known. Raises UsageError on another method.
    """
    check_method(method)
    found = dict(extremes or collect_extremes(model, names, {}, inputs, tell)[0])
    if method == "minmax":
        return found
    prober = Prober(model, names)
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in names}
    for i in range(len(inputs)):
        if tell:
            tell(f"calibrating, second pass: image {i + 1} of {len(inputs)}")
        for name, value in prober.run(inputs[i : i + 1]).items():
            low, high = found[name]
            scale = BINS / max(high - low, 1e-30)
            at = np.clip(((value.astype(np.float64) - low) * scale).astype(np.int64), 0, BINS - 1)
            counts[name] += np.bincount(at.ravel(), minlength=BINS)
    return {name: METHODS[method](counts[name], found[name]) for name in names}


def collect_extremes(
    model: onnx.ModelProto,
    names: Sequence[str],
    axes: Mapping[str, int],
    inputs: Array,
    tell: Callable[[str], None] | None = None,
) -> tuple[dict[str, Range], dict[str, tuple[Array, Array]]]:
    """Lowest and highest of each named value, and of each of its channels where `axes` names their axis."""
    prober = Prober(model, names)
    low: dict[str, Array] = {}
    high: dict[str, Array] = {}
    for i in range(len(inputs)):
        if tell:
            tell(f"calibrating: image {i + 1} of {len(inputs)}")
        for name, value in prober.run(inputs[i : i + 1]).items():
            kept = axes[name] % value.ndim if name in axes else None
            others = tuple(k for k in range(value.ndim) if k != kept)
            least, most = value.min(others), value.max(others)
            low[name] = np.minimum(low.get(name, least), least)
            high[name] = np.maximum(high.get(name, most), most)
    whole = {name: (float(low[name].min()), float(high[name].max())) for name in names}
    return whole, {name: (low[name], high[name]) for name in axes if name in low}


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


def cut_by_readers(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, without what a Relu or a Clip that alone reads a value throws away.

    Integers saturate at the ends of their range, as those operators do, so nothing is lost; a range with the rest in it
    spends most of its 256 steps on values that count as one (MobileNet's: -20..40 for 0..6).
    """
    constants = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {output.name: [] for output in model.graph.output}
    kept = set(readers)
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def bound(node: onnx.NodeProto, place: int, default: float) -> float:
        if len(node.input) <= place or not node.input[place]:
            return default
        constant = constants.get(node.input[place])
        return default if constant is None else float(numpy_helper.to_array(constant))

    out = dict(ranges)
    for name, (low, high) in ranges.items():
        nodes = readers.get(name, [])
        if name in kept or len(nodes) != 1 or nodes[0].op_type not in ("Relu", "Clip") or nodes[0].input[0] != name:
            continue
        least = 0.0 if nodes[0].op_type == "Relu" else bound(nodes[0], 1, -np.inf)
        most = np.inf if nodes[0].op_type == "Relu" else bound(nodes[0], 2, np.inf)
        if max(low, least) < min(high, most):
            out[name] = max(low, least), min(high, most)
    return out
