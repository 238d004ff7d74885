"""Scales a channel for the activations of convolutions, which integer kernels do not take, moved into the weights.

A kernel reads its activation with one scale, so a channel of small values next to one of large ones keeps few of its
levels, and a filter that takes differences makes noise of what is left. What follows is exact in float:

    input:   y = sum_c w[:, c] x[c]  =  sum_c (w[:, c] / s[c]) (s[c] x[c])
    output:  y[k] = (1 / t[k]) (sum_c (t[k] w[k, c]) x[c] + t[k] b[k])

with s or t bringing all channels to one range. A depth-wise convolution has a weight scale for each channel, so its
weights lose nothing, whatever s is, and no weight loses by t; elsewhere s shares out the load between activation and
weight as SmoothQuant does (Xiao et al., arXiv:2211.10438, eq. 4, alpha 0.5).

The multiplications stay Mul in the graph: OpenVINO and TensorRT join them to their neighbours. A QuantizeLinear with a
scale for each channel would say the same, but ONNX Runtime 1.31 takes six times the time for the whole of T (mix) with
it, and OpenVINO 2026.4 computes something else (5 dB). Matrix products are left alone: no gain was measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dualtoken_deploy.numerics import Array

ALPHA = 0.5  # of SmoothQuant: how much of a channel's range goes into the weight
TINY = 1e-6
Channels = tuple[Array, Array]  # lowest and highest of each channel


@dataclass(frozen=True)
class Migration:
    """Factors for the inputs and the outputs of products, by the value's name."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def channel_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The channel axis of every value that a convolution with constant weights reads or makes."""
    weights = {t.name for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] in weights]
    return {value: 1 for node in nodes for value in (node.input[0], node.output[0])}


def plan_migration(
    model: onnx.ModelProto, eligible: Iterable[str], channels: Mapping[str, Channels], outputs: bool
) -> Migration:
    """Factors for all values whose channels have ranges. `outputs`: those behind convolutions too."""
    constants = {t.name: t for t in model.graph.initializer}
    chosen = set(eligible)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for place, value in enumerate(node.input[:2]):
            if node.name in chosen and value not in constants:
                readers[value].append(node if place == 0 else onnx.NodeProto())
    made_by_conv = {n.output[0] for n in model.graph.node if n.op_type == "Conv" and n.name in chosen}
    inputs = {}
    for value, nodes in readers.items():
        convolutions = all(n.op_type == "Conv" and n.input[1] in constants for n in nodes)
        if convolutions and value in channels and not (outputs and value in made_by_conv):
            factors = _input_factors(channels[value], nodes, constants)
            if factors is not None:
                inputs[value] = factors
    behind = {}
    for node in model.graph.node:
        value = node.output[0]
        if outputs and value in made_by_conv and value in channels and value not in readers and len(node.input) > 2:
            low, high = channels[value]
            behind[value] = _to_one_range(np.maximum(high, 0) - np.minimum(low, 0))
    return Migration(inputs, behind)


def _to_one_range(ranges: Array) -> Array:
    """Factors that bring every channel to the widest one's range. A channel that is (nearly) empty stays so."""
    widest = max(float(ranges.max()), TINY)
    factors: Array = widest / np.maximum(ranges, widest * 1e-3)
    return factors


def _input_factors(
    bounds: Channels, nodes: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> Array | None:
    reach = np.maximum(np.abs(bounds[0]), np.abs(bounds[1]))
    if all(_depthwise(n, constants) for n in nodes):
        return _to_one_range(reach)
    columns = [_columns(n, constants) for n in nodes]
    if any(c is None or len(c) != len(reach) for c in columns):
        return None
    widest = np.max([c for c in columns if c is not None], axis=0)
    reach, widest = (np.maximum(v, max(float(v.max()), TINY) * 1e-3) for v in (reach, widest))
    factors = widest ** (1 - ALPHA) / reach**ALPHA
    out: Array = factors / math.exp(float(np.log(factors).mean()))
    return out


def _depthwise(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    return node.op_type == "Conv" and constants[node.input[1]].dims[1] == 1


def _columns(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Array | None:
    """Largest weight that each input channel meets; None where channels are grouped."""
    weight = np.abs(numpy_helper.to_array(constants[node.input[1]]))
    grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
    return None if grouped else weight.max((0, *range(2, weight.ndim)))


def migrate(model: onnx.ModelProto, plan: Migration, quantized: Iterable[str]) -> onnx.ModelProto:
    """A copy that computes the same with the factors in it, for the products (by node name) that are `quantized`.

    A value keeps its name; its scaled form is called `<value>/scaled`.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    chosen, constants = set(quantized), {t.name: t for t in out.graph.initializer}
    shared = _shared(out)
    nodes: list[onnx.NodeProto] = []
    scaled: set[str] = set()
    for node in out.graph.node:
        takes = node.op_type == "Conv" and node.name in chosen and node.input[1] in constants
        rank = len(constants[node.input[1]].dims) - 2 if takes else 0
        if takes and node.input[0] in plan.inputs:
            value, factors = node.input[0], plan.inputs[node.input[0]]
            if value not in scaled:
                scaled.add(value)
                nodes.append(_mul(out, value, f"{value}/scaled", _along(factors, rank), f"{value}/factors"))
            node.input[0] = f"{value}/scaled"
            _set(out, node, 1, _divided(_constant(out, node.input[1]), factors), shared)
        nodes.append(node)
        if takes and node.output[0] in plan.outputs:
            value, factors = node.output[0], plan.outputs[node.output[0]]
            weight, bias = (_constant(out, node.input[place]) for place in (1, 2))
            _set(out, node, 1, weight * factors.reshape(-1, 1, *(1,) * rank), shared)
            _set(out, node, 2, bias * factors, shared)
            node.output[0] = f"{value}/scaled"
            nodes.append(_mul(out, node.output[0], value, _along(1 / factors, rank), f"{value}/unscale"))
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    del out.graph.value_info[:]
    return out


def _shared(model: onnx.ModelProto) -> set[str]:
    """Constants that more than one node reads: they are copied before they are changed."""
    seen: set[str] = set()
    twice: set[str] = set()
    for node in model.graph.node:
        for name in node.input:
            (twice if name in seen else seen).add(name)
    return twice


def _along(factors: Array, rank: int) -> Array:
    return factors.reshape(1, -1, *(1,) * rank)


def _divided(weight: Array, factors: Array) -> Array:
    rank = weight.ndim - 2
    if weight.shape[1] == 1:  # depth-wise: axis 0 has the channel, perhaps several times
        each: Array = np.repeat(factors, len(weight) // len(factors))
        return weight / each.reshape(-1, 1, *(1,) * rank)
    return weight / _along(factors, rank)


def _constant(model: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def _set(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: Array, shared: set[str]) -> None:
    name = node.input[place]
    new = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name)
    if name in shared:
        new.name = node.input[place] = f"{name}/{node.name}"
        model.graph.initializer.append(new)
        return
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(new)


def _mul(model: onnx.ModelProto, value: str, out: str, factors: Array, name: str) -> onnx.NodeProto:
    model.graph.initializer.append(numpy_helper.from_array(factors.astype(np.float32), name))
    return helper.make_node("Mul", [value, name], [out], name=name)
