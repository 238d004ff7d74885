"""An ONNX graph that torch computes, so that what its logits owe to any value inside has a gradient.

Only what quantizing needs: graphs with known shapes, one input, the operators that torch.onnx leaves after onnxsim.
What has no translation, such as the suppression of boxes, ends the graph: its inputs are outputs then.
"""
# ruff: noqa: ARG001, ARG005 (all translations take a node's inputs and its attributes, whether they need both or not)

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor

from dualtoken_deploy.numerics import Array

Attributes = Mapping[str, Any]
Translation = Callable[[list[Any], Attributes], Any]


class TorchGraph:
    """Computes the values of an ONNX graph in torch, float32."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.feed = model.graph.input[0].name
        self.outputs = [o.name for o in model.graph.output]
        self.constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
        self.nodes = [
            (node, {a.name: helper.get_attribute_value(a) for a in node.attribute}) for node in model.graph.node
        ]
        self.unknown = sorted({node.op_type for node, _ in self.nodes} - set(OPERATORS))

    def lockstep(self, inputs: Array) -> Lockstep:
        """Of several inputs (N, ...), to be computed a node at a time."""
        return Lockstep(self, inputs)

    def run(self, inputs: Array, watch: Callable[[onnx.NodeProto, Attributes, list[Any], Any], Any]) -> dict[str, Any]:
        """What the graph ends in, for one input: its outputs, and what goes into nodes that cannot be computed here.

        `watch` sees every node with its inputs and what it gave, and returns what goes on instead.
        """
        values: dict[str, Any] = {**self.constants, self.feed: torch.from_numpy(np.ascontiguousarray(inputs))}
        ends = dict.fromkeys(self.outputs)
        for node, attributes in self.nodes:
            given = [values.get(name) if name else None for name in node.input]
            missing = any(name and name not in values for name in node.input)
            if missing or node.op_type not in OPERATORS:
                ends.update((n, None) for n in node.input if n in values and n not in self.constants)
                continue
            made = watch(node, attributes, given, OPERATORS[node.op_type](given, attributes))
            values.update(zip(node.output, made if isinstance(made, tuple) else (made,), strict=False))
        return {name: values[name] for name in ends if name in values}


class Lockstep:
    """All values of several inputs, a node at a time; what nothing reads any more is let go."""

    def __init__(self, graph: TorchGraph, inputs: Array) -> None:
        self._constants = graph.constants
        last: dict[str, int] = {name: len(graph.nodes) for name in graph.outputs}
        for at, (node, _) in enumerate(graph.nodes):
            last.update((name, at) for name in node.input if last.get(name, at) <= at)
        self._last, self._at = last, 0
        self._values: dict[str, list[Any]] = {
            graph.feed: [torch.from_numpy(np.ascontiguousarray(inputs[i : i + 1])) for i in range(len(inputs))]
        }
        self._count = len(inputs)

    def inputs(self, node: onnx.NodeProto) -> list[list[Any]]:
        """What a node reads, for each of the inputs."""
        return [[self._value(name, i) if name else None for name in node.input] for i in range(self._count)]

    def step(self, node: onnx.NodeProto, attributes: Attributes) -> list[Any] | None:
        """Computes the next node; None, and nothing, where it or what it reads cannot be computed here."""
        known = all(not n or n in self._values or n in self._constants for n in node.input)
        if not known or node.op_type not in OPERATORS:
            return self.give(node, None)
        return self.give(node, [compute(node, attributes, given) for given in self.inputs(node)])

    def give(self, node: onnx.NodeProto, made: list[Any] | None) -> list[Any] | None:
        """Takes these for what the next node makes."""
        if made is not None:
            several = [m if isinstance(m, tuple) else (m,) for m in made]
            for place, name in enumerate(node.output):
                self._values[name] = [outputs[place] for outputs in several]
        for name in {*node.input, *node.output}:
            if self._last.get(name, -1) <= self._at:
                self._values.pop(name, None)
        self._at += 1
        return made

    def _value(self, name: str, i: int) -> Any:
        return self._constants[name] if name in self._constants else self._values[name][i]


def compute(node: onnx.NodeProto, attributes: Attributes, inputs: list[Any]) -> Any:
    """One node anew, for other inputs."""
    return OPERATORS[node.op_type](inputs, attributes)


def _ints(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(v) for v in value.flatten().tolist()]


def padded(x: Tensor, a: Attributes, rank: int, value: float = 0.0) -> Tensor:
    """With the padding that ONNX gives as all begins, then all ends."""
    pads = a.get("pads") or [0] * (2 * rank)
    if a.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = _same(x, a, rank)
    if not any(pads):
        return x
    order = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    return F.pad(x, order, value=value)


def _same(x: Tensor, a: Attributes, rank: int) -> list[int]:
    begins, ends = [], []
    for axis in range(rank):
        side, stride = x.shape[2 + axis], (a.get("strides") or [1] * rank)[axis]
        span = (a["kernel_shape"][axis] - 1) * (a.get("dilations") or [1] * rank)[axis] + 1
        whole = max((-(-side // stride) - 1) * stride + span - side, 0)
        less, more = whole // 2, whole - whole // 2
        begins.append(less if a["auto_pad"] == b"SAME_UPPER" else more)
        ends.append(more if a["auto_pad"] == b"SAME_UPPER" else less)
    return begins + ends


def _conv(i: list[Any], a: Attributes) -> Any:
    rank = i[0].ndim - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    bias = i[2] if len(i) > 2 else None
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    return function(padded(i[0], a, rank), i[1], bias, strides, 0, dilations, a.get("group", 1))


def _gemm(i: list[Any], a: Attributes) -> Any:
    left = i[0].mT if a.get("transA") else i[0]
    right = i[1].mT if a.get("transB") else i[1]
    out = a.get("alpha", 1.0) * (left @ right)
    return out if len(i) < 3 or i[2] is None else out + a.get("beta", 1.0) * i[2]


def _reshape(i: list[Any], a: Attributes) -> Any:
    shape = _ints(i[1])
    if not a.get("allowzero", 0):
        shape = [i[0].shape[k] if side == 0 else side for k, side in enumerate(shape)]
    return i[0].reshape(shape)


def _transpose(i: list[Any], a: Attributes) -> Any:
    return i[0].permute(a.get("perm") or list(reversed(range(i[0].ndim))))


def _split(i: list[Any], a: Attributes) -> Any:
    axis = a.get("axis", 0)
    if len(i) > 1 and i[1] is not None:
        return tuple(torch.split(i[0], _ints(i[1]), axis))
    return tuple(torch.split(i[0], -(-i[0].shape[axis] // a["num_outputs"]), axis))


def _layer_norm(i: list[Any], a: Attributes) -> Any:
    axis = a.get("axis", -1) % i[0].ndim
    bias = i[2] if len(i) > 2 else None
    return F.layer_norm(i[0], i[0].shape[axis:], i[1], bias, a.get("epsilon", 1e-5))


def _batch_norm(i: list[Any], a: Attributes) -> Any:
    return F.batch_norm(i[0], i[3], i[4], i[1], i[2], False, 0.0, a.get("epsilon", 1e-5))


def _reduce(function: Callable[..., Any]) -> Translation:
    def translated(i: list[Any], a: Attributes) -> Any:
        axes = _ints(i[1]) if len(i) > 1 else list(a.get("axes", []))
        axes = axes or list(range(i[0].ndim))
        return function(i[0], axes, bool(a.get("keepdims", 1)))

    return translated


def _average_pool(i: list[Any], a: Attributes) -> Any:
    rank = i[0].ndim - 2
    counted = bool(a.get("count_include_pad", 0))
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    strides, ceil = a.get("strides") or [1] * rank, bool(a.get("ceil_mode", 0))
    out = function(padded(i[0], a, rank), a["kernel_shape"], strides, 0, ceil)
    if counted or not any(a.get("pads") or [0]):
        return out
    share = function(padded(torch.ones_like(i[0]), a, rank), a["kernel_shape"], strides, 0, ceil)
    return out / share


def _max_pool(i: list[Any], a: Attributes) -> Any:
    rank = i[0].ndim - 2
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    wide = padded(i[0], a, rank, -torch.inf)
    dilations, ceil = a.get("dilations") or [1] * rank, bool(a.get("ceil_mode", 0))
    return function(wide, a["kernel_shape"], a.get("strides") or [1] * rank, 0, dilations, ceil)


def _resize(i: list[Any], a: Attributes) -> Any:
    sizes = _ints(i[3]) if len(i) > 3 and i[3] is not None else None
    if sizes is None:
        sizes = [int(side * scale) for side, scale in zip(i[0].shape, i[2].tolist(), strict=True)]
    mode = {b"nearest": "nearest", b"linear": "bilinear", b"cubic": "bicubic"}[a.get("mode", b"nearest")]
    corners = (
        {"align_corners": a.get("coordinate_transformation_mode") == b"align_corners"} if mode != "nearest" else {}
    )
    return F.interpolate(i[0], sizes[2:], mode=mode, **corners)


def _slice(i: list[Any], a: Attributes) -> Any:
    starts, ends = _ints(i[1]), _ints(i[2])
    axes = _ints(i[3]) if len(i) > 3 and i[3] is not None else list(range(len(starts)))
    steps = _ints(i[4]) if len(i) > 4 else [1] * len(starts)
    out = i[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = list(range(out.shape[axis]))[start:end:step]  # as Python and ONNX both clip it
        out = out.index_select(axis, torch.tensor(at, dtype=torch.int64))
    return out


def _gather(i: list[Any], a: Attributes) -> Any:
    axis = a.get("axis", 0) % i[0].ndim
    index = i[1].long()
    index = torch.where(index < 0, index + i[0].shape[axis], index)
    out = i[0].index_select(axis, index.flatten())
    return out.reshape(*i[0].shape[:axis], *index.shape, *i[0].shape[axis + 1 :])


def _squeeze(i: list[Any], a: Attributes) -> Any:
    axes = _ints(i[1]) if len(i) > 1 else [k for k, side in enumerate(i[0].shape) if side == 1]
    return i[0].squeeze(tuple(axes))


def _unsqueeze(i: list[Any], a: Attributes) -> Any:
    out = i[0]
    axes = _ints(i[1])
    for axis in sorted(x % (i[0].ndim + len(axes)) for x in axes):
        out = out.unsqueeze(axis)
    return out


def _pad(i: list[Any], a: Attributes) -> Any:
    rank, pads = i[0].ndim, _ints(i[1])
    order = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}[a.get("mode", b"constant")]
    if mode == "constant":
        return F.pad(i[0], order, value=float(i[2]) if len(i) > 2 and i[2] is not None else 0.0)
    return F.pad(i[0], order[:4], mode=mode)


def _clip(i: list[Any], a: Attributes) -> Any:
    low, high = ([*i[1:], None, None])[:2]
    return torch.clamp(i[0], low, high)


def _cast(i: list[Any], a: Attributes) -> Any:
    return i[0].to(torch.from_numpy(np.zeros(0, helper.tensor_dtype_to_np_dtype(a["to"]))).dtype)


def _flatten(i: list[Any], a: Attributes) -> Any:
    axis = a.get("axis", 1)
    return i[0].reshape(int(np.prod(i[0].shape[:axis])), -1)


def _expand(i: list[Any], a: Attributes) -> Any:
    return i[0] * torch.ones(_ints(i[1]), dtype=i[0].dtype)


OPERATORS: Mapping[str, Translation] = MappingProxyType(
    {
        "Add": lambda i, a: i[0] + i[1],
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_norm,
        "Cast": _cast,
        "CastLike": lambda i, a: i[0].to(i[1].dtype),
        "Clip": _clip,
        "Concat": lambda i, a: torch.cat(i, a["axis"]),
        "Conv": _conv,
        "Div": lambda i, a: i[0] / i[1],
        "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
        "Erf": lambda i, a: torch.erf(i[0]),
        "Exp": lambda i, a: torch.exp(i[0]),
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": _gather,
        "Gelu": lambda i, a: F.gelu(i[0], approximate=a.get("approximate", b"none").decode()),
        "Gemm": _gemm,
        "GlobalAveragePool": lambda i, a: i[0].mean(tuple(range(2, i[0].ndim)), keepdim=True),
        "Greater": lambda i, a: i[0] > i[1],
        "GreaterOrEqual": lambda i, a: i[0] >= i[1],
        "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
        "HardSwish": lambda i, a: F.hardswish(i[0]),
        "Identity": lambda i, a: i[0],
        "LayerNormalization": _layer_norm,
        "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
        "Less": lambda i, a: i[0] < i[1],
        "LessOrEqual": lambda i, a: i[0] <= i[1],
        "Log": lambda i, a: torch.log(i[0]),
        "MatMul": lambda i, a: i[0] @ i[1],
        "MaxPool": _max_pool,
        "Mul": lambda i, a: i[0] * i[1],
        "Neg": lambda i, a: -i[0],
        "Pad": _pad,
        "Pow": lambda i, a: i[0] ** i[1],
        "PRelu": lambda i, a: torch.where(i[0] < 0, i[0] * i[1], i[0]),
        "Reciprocal": lambda i, a: 1 / i[0],
        "ReduceMax": _reduce(torch.amax),
        "ReduceMean": _reduce(torch.mean),
        "ReduceSum": _reduce(torch.sum),
        "Relu": lambda i, a: F.relu(i[0]),
        "Reshape": _reshape,
        "Resize": _resize,
        "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
        "Slice": _slice,
        "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
        "Softplus": lambda i, a: F.softplus(i[0]),
        "Split": _split,
        "Sqrt": lambda i, a: torch.sqrt(i[0]),
        "Squeeze": _squeeze,
        "Sub": lambda i, a: i[0] - i[1],
        "Swish": lambda i, a: i[0] * torch.sigmoid(a.get("alpha", 1.0) * i[0]),
        "Tanh": lambda i, a: torch.tanh(i[0]),
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
        "Where": lambda i, a: torch.where(i[0], i[1], i[2]),
    }
)
