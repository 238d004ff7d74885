"""Sensitivities of all layers from one pass over a few pictures.

Each product's own error is measured where it arises: the difference at its output between rounded and exact inputs and
weights, e. What it does to the outputs z is J e to first order, J the Jacobian of z with respect to that output.
Backward passes from random directions r give J^T r for all layers at once, and (J^T r) . e is a draw of the error along
r: its mean square over directions and pictures is |J e|^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import Products, layer_of
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.differentiable import Attributes, TorchGraph, compute

PICTURES, DIRECTIONS = 8, 6
HOW = f"local errors by {DIRECTIONS} random backward passes over {PICTURES} pictures"

# (name of a value or weight, what it is, kind of product that reads it) -> the same rounded
Round = Callable[[str, Tensor, str], Tensor]


class _Watch:
    """Local errors of the eligible products of one run, beside what they gave."""

    def __init__(self, eligible: frozenset[str], rounded: Round, behind: Callable[[str], bool]) -> None:
        self._eligible, self._round, self._behind = eligible, rounded, behind
        self.made: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}

    def __call__(self, node: onnx.NodeProto, attributes: Attributes, given: list[Any], made: Any) -> Any:
        if node.name not in self._eligible:
            return made
        if not made.requires_grad:
            made.requires_grad_()
        with torch.no_grad():
            inputs = [self._round(node.input[place], given[place], node.op_type) for place in (0, 1)]
            error = compute(node, attributes, [*inputs, *given[2:]]) - made
            if self._behind(node.op_type):
                error = self._round(node.output[0], made + error, node.op_type) - made
        self.made[node.name], self.errors[node.name] = made, error
        return made


def measure(
    model: onnx.ModelProto,
    products: Products,
    inputs: Array,
    rounded: Round,
    behind: Callable[[str], bool],
    tell: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Sensitivities of the units of a float graph whose products are named in `products`.

    `rounded`: a value or weight as INT8 keeps it. `behind`: whether a kind of product writes INT8 too. `tell` hears of
    units that lie behind what cannot be computed here, of which nothing is known.
    """
    graph = TorchGraph(model)
    units = [u.name for u in products.units]
    place = {name: i for i, name in enumerate(units)}
    chosen = inputs[np.linspace(0, len(inputs) - 1, min(PICTURES, len(inputs))).astype(int)]
    errors = np.zeros((len(units), len(chosen) * DIRECTIONS))
    random = torch.Generator().manual_seed(0)
    for p in range(len(chosen)):
        watch = _Watch(products.eligible, rounded, behind)
        ends = graph.run(chosen[p : p + 1], watch)
        for k in range(DIRECTIONS):
            drawn = _directions(ends, random)
            found = torch.autograd.grad(
                [v for v, _ in drawn], list(watch.made.values()), [r for _, r in drawn],
                retain_graph=k < DIRECTIONS - 1, allow_unused=True,
            )  # fmt: skip
            for name, gradient in zip(watch.made, found, strict=True):
                if gradient is not None:
                    along = float((gradient * watch.errors[name]).sum())
                    errors[place[layer_of(name)], p * DIRECTIONS + k] += along
    unseen = [name for name, row in zip(units, errors, strict=True) if not row.any()]
    if unseen and graph.unknown and tell is not None:
        tell(f"what {len(unseen)} of {len(units)} layers do is not known: behind {', '.join(graph.unknown)}")
    return Sensitivity(tuple(units), errors, HOW)


def _directions(ends: Mapping[str, Tensor], random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """A random direction for each output that depends on the layers, in units of the output's own size."""
    out = []
    for value in ends.values():
        if value.requires_grad:
            size = value.detach().square().sum().sqrt().clamp_min(1e-12)
            out.append((value, torch.randn(value.shape, generator=random) / size))
    return out
