"""The products of a traced program, by the model's names."""

from __future__ import annotations

import math

import torch
from torch import fx

from dualtoken_deploy.targets.mobile.noise import PRODUCTS
from dualtoken_deploy.targets.mobile.torch_program import Source

aten = torch.ops.aten
LAYERS = (aten.linear.default, aten.conv2d.default)  # what XNNPACK has in 8 bits of what this project quantizes
MEANS = "b_mean_"  # begins the name of a column that a mean is taken by: no product of the model's


def every_product(source: Source) -> dict[str, int]:
    """MACs of everything that is a product in the file, in its order; means too, which are none of the model's."""
    nodes = [node for node in source.program.graph.nodes if node.target in PRODUCTS]
    return {source.names[node.name]: macs_of(node) for node in nodes}


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of the model's own."""
    if node.target not in PRODUCTS:
        return False
    return not any(given.name.startswith(MEANS) for given in node.all_input_nodes)


def macs_of(node: fx.Node) -> int:
    """Multiplications of a product."""
    out: int = math.prod(node.meta["val"].shape)
    left, right = (given.meta["val"].shape for given in node.all_input_nodes[:2])
    inner: int = math.prod(right[1:]) if node.target in LAYERS else left[-1]
    return out * inner
