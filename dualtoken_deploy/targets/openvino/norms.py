"""Normalisations that OpenVINO keeps right in an INT8 model.

Where any product of a model is quantized, OpenVINO 2026.4 takes a multiplication by one constant in front of a
normalisation for a dequantization and puts it behind, as if epsilon were 0 (docs/decisions/006). So it is taken out:

    norm(s x, eps) = (s x - mean(s x)) / sqrt(s^2 var(x) + eps) = sign(s) norm(x, eps / s^2)
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from dualtoken_deploy.targets.onnx.graph import Graph, drop_unused

NORMS = frozenset({"LayerNormalization", "GroupNormalization"})
MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
LARGEST = float(np.finfo(np.float32).max)


def scale_free_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose normalisations read what they read without the product with one constant, moved data between them
    or not; other readers of the product keep it. A constant so small that eps / s^2 is no float32 stays."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = Graph(out)
    for node in [n for n in out.graph.node if n.op_type in NORMS]:
        moves = []
        product = graph.maker(node.input[0])
        while product is not None and product.op_type in MOVES:
            moves.append(product)
            product = graph.maker(product.input[0])
        factor, value = _factor(product, graph)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale = graph.weights.get(node.input[1])
        if factor and epsilon / factor**2 < LARGEST and (factor > 0 or scale is not None):
            graph.set(node, "epsilon", epsilon / factor**2)
            if factor < 0 and scale is not None:
                node.input[1] = graph.add(-numpy_helper.to_array(scale), f"{node.output[0]}/turned")
            _read(out, node, moves, value)
    drop_unused(out)
    return out


def _factor(product: onnx.NodeProto | None, graph: Graph) -> tuple[float, str]:
    """What a product multiplies by, and the value that it does; 0 of anything else."""
    if product is not None and product.op_type == "Mul":
        for place in (0, 1):
            constant = graph.constant(product.input[place])
            if constant is not None and constant.shape in ((), (1,)):
                return float(constant.reshape(())), product.input[1 - place]
    return 0.0, ""


def _read(model: onnx.ModelProto, norm: onnx.NodeProto, moves: list[onnx.NodeProto], value: str) -> None:
    """Lets a norm read `value`, through copies of `moves` (the last of them first)."""
    at = next(i for i, n in enumerate(model.graph.node) if n.output[0] == norm.output[0])
    for move in reversed(moves):
        copy = onnx.NodeProto()
        copy.CopyFrom(move)
        copy.input[0], copy.output[0] = value, f"{move.output[0]}/for/{norm.output[0]}"
        copy.name = value = copy.output[0]
        model.graph.node.insert(at, copy)
        at += 1
    norm.input[0] = value
