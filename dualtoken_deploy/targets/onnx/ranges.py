"""Ranges of activations from calibration pictures: lowest and highest, a percentile, or least information lost.

Counted over all pictures with one histogram a value, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from onnx import numpy_helper

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.histogram import BINS, METHODS, Range, add_counts, check_method
from dualtoken_deploy.targets.onnx.values import Prober


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
            add_counts(counts[name], value, found[name])
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


# Beyond these an activation gives (nearly) the same for all: exactly, or but for less than a thousandth.
SATURATES: Mapping[str, Range] = MappingProxyType(
    {
        "Relu": (0.0, np.inf),
        "HardSwish": (-3.0, np.inf),
        "Gelu": (-3.5, np.inf),  # -3.5 gives -0.0008, and less gives less
    }
)


def bounds_of_readers(model: onnx.ModelProto, names: Iterable[str], smooth: bool = True) -> dict[str, Range]:
    """What the activation that alone reads a value lets through: of the named values that have such a reader.

    Integers saturate at the ends of their range, as those operators do, so nothing is lost; a range with the rest in it
    spends most of its 256 steps on values that count as one (MobileNet's: -20..40 for 0..6). `smooth`: of a Gelu too.
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

    out = {}
    for name in names:
        nodes = readers.get(name, [])
        if name in kept or len(nodes) != 1 or nodes[0].input[0] != name:
            continue
        kind = nodes[0].op_type
        if kind == "Clip":
            out[name] = bound(nodes[0], 1, -np.inf), bound(nodes[0], 2, np.inf)
        elif kind == "HardSigmoid":
            slope = next((a.f for a in nodes[0].attribute if a.name == "alpha"), 0.2)
            out[name] = -0.5 / slope, 0.5 / slope
        elif kind in SATURATES and (smooth or kind != "Gelu"):
            out[name] = SATURATES[kind]
    return out


def cut(bounds: Range, within: Range) -> Range:
    """A range without what lies beyond another; as it was where nothing would be left."""
    low, high = max(bounds[0], within[0]), min(bounds[1], within[1])
    return (low, high) if low < high else bounds


def cut_channels(bounds: tuple[Array, Array], within: Range) -> tuple[Array, Array]:
    """The same for the extremes of each channel; of a channel of which nothing is left they are one of its ends."""
    low, high = (np.clip(side, *within) for side in bounds)
    return (low, high) if (low < high).any() else bounds
