"""What rounding does to the means of a graph's values, taken back in biases; and weights rounded with what they read.

Layer by layer in the order that they run, over a few pictures, the graph is computed twice: in float, and with all that
comes before in INT8. Two things are found on the way, both exact in float and neither with a cost when it runs:

    bias:      b[k] -= mean(q[k] - y[k])                   y a product in float, q the same in INT8, k a channel
               Rounding noise passes through GELU as a shift, gelu'' noise^2 / 2, that all pixels share and every layer
               after it adds to: most of what a stem loses (Nagel et al., arXiv:1906.04721, section 4.2, empirically).
    rounding:  argmin |(W - Q) x|^2 over Q on the grid      instead of |W - Q|^2, by the inverse of x x^T, a column of
               weights at a time with the error of each handed on to the next (Frantar et al., arXiv:2210.17323)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.onnx.differentiable import Attributes, TorchGraph, compute, padded

PICTURES = 16
DAMPING = 0.01  # of the mean of x x^T's diagonal, added to it, as Frantar et al. do

# (name of a value or weight, what it is, kind of product that reads it) -> the same rounded
Round = Callable[[str, Tensor, str], Tensor]
# (weight, kind of product) -> the step of the grid of each output channel, in a shape that the weight can be divided by
Steps = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Corrections:
    """`shifts` to be added to the biases of products, by node name; `weights` on their grid, by initializer."""

    shifts: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)


def correct(
    model: onnx.ModelProto,
    chosen: Collection[str],
    inputs: Array,
    rounded: Round,
    behind: Callable[[str], bool],
    steps: Steps | None = None,
    limit: int = 127,
) -> Corrections:
    """For the products named in `chosen`, all in INT8. `behind`: whether a kind of product writes INT8 too.

    `steps`: weights are rounded by second order as well, to at most `limit` steps.
    """
    pictures = inputs[np.linspace(0, len(inputs) - 1, min(PICTURES, len(inputs))).astype(int)]
    graph = TorchGraph(model)
    walk = _Walk(graph, _bias_places(model), frozenset(chosen), rounded, behind, steps, limit)
    with torch.no_grad():
        walk.over(pictures)
    return Corrections(walk.shifts, walk.weights)


class _Walk:
    """Both computations of all pictures in step."""

    def __init__(
        self, graph: TorchGraph, places: Mapping[str, tuple[onnx.NodeProto, int]], chosen: frozenset[str],
        rounded: Round, behind: Callable[[str], bool], steps: Steps | None, limit: int,
    ) -> None:  # fmt: skip
        self._graph, self._places, self._chosen = graph, places, chosen
        self._round, self._behind, self._steps, self._limit = rounded, behind, steps, limit
        self.shifts: dict[str, Array] = {}
        self.weights: dict[str, Array] = {}

    def over(self, pictures: Array) -> None:
        exact = self._graph.lockstep(pictures)
        noisy = self._graph.lockstep(pictures)
        for node, attributes in self._graph.nodes:
            wanted = exact.step(node, attributes)
            if node.name in self._chosen and wanted is not None:
                noisy.give(node, self._product(node, attributes, noisy.inputs(node), wanted))
            else:
                noisy.step(node, attributes)

    def _product(
        self, node: onnx.NodeProto, attributes: Attributes, given: list[list[Tensor]], wanted: list[Tensor]
    ) -> list[Tensor]:
        name, kind = node.input[1], node.op_type
        constant = name in self._graph.constants
        left = [self._round(node.input[0], inputs[0], kind) for inputs in given]
        right = [self._round(name, inputs[1], kind) for inputs in (given[:1] if constant else given)]
        if constant and self._steps is not None:
            weight = given[0][1]
            better = second_order(weight, self._steps(weight, kind), node, attributes, left, self._limit)
            if better is not None:
                right = [better]
                self.weights[name] = better.numpy()
        out = [compute(node, attributes, [x, right[0 if constant else i], *given[i][2:]]) for i, x in enumerate(left)]
        if node.name in self._places:
            axis = 1 if kind == "Conv" else out[0].ndim - 1
            others = [k for k in range(out[0].ndim) if k != axis]
            apart = torch.stack([(a - b).mean(others) for a, b in zip(out, wanted, strict=True)]).mean(0)
            self.shifts[node.name] = -apart.numpy()
            shape = [-1 if k == axis else 1 for k in range(out[0].ndim)]
            out = [a - apart.reshape(shape) for a in out]
        return [self._round(node.output[0], a, kind) for a in out] if self._behind(kind) else out


def second_order(
    weight: Tensor, steps: Tensor, node: onnx.NodeProto, attributes: Attributes, inputs: list[Tensor], limit: int
) -> Tensor | None:
    """A weight on its grid so that its products with these inputs change least; None of a kind that is not known."""
    groups = int(attributes.get("group", 1))
    if node.op_type == "Conv":
        if weight.ndim != 4:
            return None
        read = [_patches(x, weight, attributes, groups) for x in inputs]
        rows = weight.reshape(groups, len(weight) // groups, -1)
        scales = steps.reshape(groups, len(weight) // groups, 1)
    elif node.op_type == "MatMul" and weight.ndim == 2:
        read = [x.reshape(1, -1, x.shape[-1]).mT for x in inputs]
        rows, scales = weight.T[None], steps.T[None]
    else:
        return None
    second = sum((x.double() @ x.double().mT for x in read), torch.zeros(()))
    done = torch.stack([
        round_rows(w, s, h, limit) for w, s, h in zip(rows.double(), scales.double(), second, strict=True)
    ])  # fmt: skip
    return (done.reshape(weight.shape) if node.op_type == "Conv" else done[0].T).to(weight.dtype).contiguous()


def _patches(x: Tensor, weight: Tensor, attributes: Attributes, groups: int) -> Tensor:
    """(groups, weights of one output, positions): what each weight of a 2-d convolution meets."""
    high, wide = weight.shape[2:]
    strides, dilations = (tuple(attributes.get(name) or (1, 1)) for name in ("strides", "dilations"))
    columns = F.unfold(padded(x, attributes, 2), (high, wide), dilations, 0, strides)
    return columns.transpose(0, 1).reshape(groups, -1, columns.shape[0] * columns.shape[2])


def round_rows(weight: Tensor, steps: Tensor, second: Tensor, limit: int) -> Tensor:
    """(O, K) weights on grids of `steps` (O, 1), with `second` (K, K) = x x^T of what they multiply, in float64."""
    second = second.clone()
    second += (DAMPING * second.diag().mean() + 1e-12) * torch.eye(len(second), dtype=second.dtype)
    order = torch.argsort(second.diag(), descending=True)  # what weighs most is rounded while all others can give way
    left = weight[:, order].clone()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second[order][:, order])), upper=True)
    done = torch.zeros_like(left)
    for k in range(left.shape[1]):
        done[:, k] = torch.clamp(torch.round(left[:, k] / steps[:, 0]), -limit, limit) * steps[:, 0]
        error = (left[:, k] - done[:, k]) / inverse[k, k]
        left[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
    return done[:, torch.argsort(order)]


def shift_biases(model: onnx.ModelProto, shifts: Mapping[str, Array]) -> None:
    """Adds `shifts` to the biases of the products that they name, in place."""
    places = _bias_places(model)
    constants = {t.name: t for t in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    for name, shift in shifts.items():
        node, place = places[name]
        old = constants[node.input[place]]
        value = numpy_helper.to_array(old)
        new = numpy_helper.from_array((value + shift.reshape(value.shape)).astype(np.float32), old.name)
        if readers[old.name] > 1:
            new.name = node.input[place] = f"{old.name}/{name}"
            model.graph.initializer.append(new)
        else:
            old.CopyFrom(new)


def _bias_places(model: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, int]]:
    """For each product that has a bias of constants: the node that reads it, and as which of its inputs."""
    constants = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ends = {value.name for value in model.graph.output}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) > 2 and node.input[2] in constants:
            found[node.name] = (node, 2)
        if node.op_type != "MatMul" or node.output[0] in ends or node.input[1] not in constants:
            continue
        (reader, *more) = readers.get(node.output[0], [onnx.NodeProto()])
        if more or reader.op_type != "Add":
            continue
        place = 1 - list(reader.input).index(node.output[0])
        bias, width = constants.get(reader.input[place]), constants[node.input[1]].dims[-1]
        if bias is not None and list(bias.dims)[-1:] == [width] and np.prod(bias.dims) == width:
            found[node.name] = (reader, place)
    return found
