"""What rounding each product of a traced program does to its outputs, from one pass over a few pictures.

As targets/onnx/noise.py says it, on the torch program that the converters for phones take: a product's own error e is
the difference at its output between rounded and exact inputs and weights, and J^T r of random directions r at the
outputs, for all products at once, gives draws (J^T r) . e of what it adds there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import layer_of
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.mobile.torch_program import Source

PICTURES, DIRECTIONS = 8, 6
HOW = f"local errors by {DIRECTIONS} random backward passes over {PICTURES} pictures"
INPUT, WEIGHT, OUTPUT = "input", "weight", "output"
aten = torch.ops.aten
PRODUCTS = (
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
    *(aten.conv2d.default, aten.convolution.default),
)

# (layer, INPUT, WEIGHT or OUTPUT, value, whether the product is a convolution) -> the same as integers keep it
Round = Callable[[str, str, Tensor, bool], Tensor]


class _Watch(fx.Interpreter):
    """Runs a program; local errors of the chosen layers' products beside what these made."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, str], rounded: Round) -> None:
        super().__init__(module)
        self._layers, self._round = layers, rounded
        self.made: list[tuple[str, Tensor, Tensor]] = []  # layer, value, error

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name not in self._layers or n.target not in PRODUCTS:
            return out
        if not out.requires_grad:
            out.requires_grad_()
        layer, conv = self._layers[n.name], n.target in PRODUCTS[5:]
        given, _ = self.fetch_args_kwargs_from_env(n)
        with torch.no_grad():
            first = 1 if n.target is aten.addmm.default else 0
            swapped = list(given)
            for place, constant in ((first, False), (first + 1, _constant(n.args[first + 1]))):
                kind = WEIGHT if constant else INPUT
                swapped[place] = self._round(layer, kind, given[place], conv)
            found = self._round(layer, OUTPUT, n.target(*swapped, **n.kwargs), conv)
            self.made.append((layer, out, found - out))
        return out


def _constant(node: Any) -> bool:
    """Whether a value is a weight, or one turned."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def measure(source: Source, layers: frozenset[str], inputs: Array, rounded: Round) -> Sensitivity:
    """Sensitivities of layers of a float program; `inputs` (N, ...) as it takes them, one at a time."""
    module = source.program.module()
    assert isinstance(module, fx.GraphModule)  # noqa: S101 (for the type checker)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    ours = {node: layer for node, name in source.names.items() if (layer := layer_of(name)) in layers}
    units = tuple(dict.fromkeys(ours.values()))
    place = {name: i for i, name in enumerate(units)}
    chosen = inputs[np.linspace(0, len(inputs) - 1, min(PICTURES, len(inputs))).astype(int)]
    errors = np.zeros((len(units), len(chosen) * DIRECTIONS))
    random = torch.Generator().manual_seed(0)
    for p, picture in enumerate(chosen):
        watch = _Watch(module, ours, rounded)
        with torch.enable_grad():
            ends = watch.run(torch.from_numpy(picture[None]))
        ends = [v for v in (ends if isinstance(ends, (tuple, list)) else (ends,)) if v.requires_grad]
        values = [value for _, value, _ in watch.made]
        for k in range(DIRECTIONS):
            drawn = [_direction(v, random) for v in ends]
            last = k == DIRECTIONS - 1
            found = torch.autograd.grad(ends, values, drawn, retain_graph=not last, allow_unused=True)
            for (layer, _, error), gradient in zip(watch.made, found, strict=True):
                if gradient is not None:
                    errors[place[layer], p * DIRECTIONS + k] += float((gradient * error).sum())
    return Sensitivity(units, errors, HOW)


def _direction(value: Tensor, random: torch.Generator) -> Tensor:
    """A random one at an output, in units of the output's own size."""
    size = value.detach().square().sum().sqrt().clamp_min(1e-12)
    return torch.randn(value.shape, generator=random) / size


def rounded_rows(value: Tensor) -> Tensor:
    """In 8 bits with a scale and a zero point for each row along the last axis, as integer kernels round a float input
    where it arises."""
    return rounded_between(value, value.amin(-1, keepdim=True), value.amax(-1, keepdim=True))


def rounded_between(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """In 8 bits with a zero point, over a range that is widened to hold 0."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(value / scale) + zero, 0, 255) - zero) * scale


def rounded_weight(weight: Tensor, bits: int) -> Tensor:
    """Symmetric, with a scale for each output channel, axis 0 of torch's weights."""
    most = (1 << (bits - 1)) - 1
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / most
    return torch.round(weight / scale) * scale
