"""What FP8 and INT4 for TensorRT for RTX share: Q/DQ pairs on matrix products, float16 in what is not quantized.

Of convolutions the builder refuses INT4, and the vendor promises no FP8 ("Working with Quantized Types"), so those stay
float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.quantize.backend import Products, layer_of
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.export import OnnxExport, export_onnx
from dualtoken_deploy.targets.onnx.qdq import read_products
from dualtoken_deploy.targets.onnx.quantize import graph_sha256
from dualtoken_deploy.targets.request import Request, Tell
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.targets.tensorrt.export import RULES, type_onnx
from dualtoken_deploy.targets.tensorrt_rtx.export import opset_of

PRODUCTS = ("MatMul", "Gemm")
# The least normal float16, which scales are written in.
LEAST_SCALE = 2.0**-14


def float_graph(module: nn.Module, request: Request, tell: Tell) -> OnnxExport:
    """The float32 graph in the opset of the request's precision."""
    return export_onnx(module, replace(request, precision="fp32"), RULES, opset_of(request.precision), tell)


class NarrowBackend:
    """model.onnx with pairs of a narrow format on matrix products."""

    precision: str
    described: str

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._weights = {t.name: t for t in model.graph.initializer}
        every = read_products(model)
        nodes = {node.output[0]: node for node in model.graph.node}
        fitting = {v for v in every.eligible if nodes[v].op_type in PRODUCTS and self.fits(nodes[v])}
        self.products = Products(every.macs, frozenset(fitting))
        self.source = graph_sha256(model)

    def fits(self, node: onnx.NodeProto) -> bool:
        """Whether a product can be of the format."""
        raise NotImplementedError

    def sensitivity(self) -> Sensitivity:
        """By MACs alone: nothing is measured for these formats, and the gate judges the files all the same."""
        shares = {unit.name: unit.macs / max(self.products.total, 1) for unit in self.products.units}
        return Sensitivity.independent(shares, "the share of the MACs, not measured")

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        row = get_target("tensorrt-rtx").precision(self.precision)
        typed = type_onnx(self.quantize(in_float), row.beside, opset_of(self.precision))
        onnx.save(typed, folder / "model.onnx")

    def quantize(self, in_float: Iterable[str]) -> onnx.ModelProto:
        """The float32 graph with pairs on every product that fits but those `in_float`."""
        kept = set(in_float)
        out = onnx.ModelProto()
        out.CopyFrom(self._model)
        pairs = Pairs()
        nodes = []
        for node in out.graph.node:
            if node.output[0] in self.products.eligible and layer_of(node.output[0]) not in kept:
                before = len(pairs.nodes)
                self.quantize_node(node, pairs)
                nodes += pairs.nodes[before:]
            nodes.append(node)
        del out.graph.node[:]
        out.graph.node.extend(nodes)
        out.graph.initializer.extend(pairs.tensors)
        read = {name for node in out.graph.node for name in node.input}
        left = [t for t in out.graph.initializer if t.name in read]
        del out.graph.initializer[:]
        out.graph.initializer.extend(left)
        return out

    def quantize_node(self, node: onnx.NodeProto, pairs: Pairs) -> None:
        """Puts pairs before one product."""
        raise NotImplementedError


class Pairs:
    """Nodes and constants of pairs, one for each value: two products of one value share its pair."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._made: dict[str, str] = {}

    def once(self, value: str, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]) -> str:
        """The dequantized value; `nodes` and `tensors` are added the first time."""
        if value not in self._made:
            self._made[value] = nodes[-1].output[0]
            self.nodes += nodes
            self.tensors += tensors
        return self._made[value]


def transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm reads its weights as (N, K)."""
    return any(a.name == "transB" and a.i for a in node.attribute)
