"""INT8, FP8 and INT4 for TensorRT for RTX: Q/DQ pairs in the ONNX, float16 in what is not quantized.

    fp8    y = x @ W  ->  DQ(Q(x; s_x)) @ DQ(W8; s_w)    E4M3 both; s_x of the tensor, s_w of an output channel
    int4   y = x @ W  ->  x @ DQ(W4; s_w)                the weights alone; s_w of BLOCK rows of an output channel

Both are for matrix products. Of convolutions the builder refuses INT4, and the vendor promises no FP8 ("Working with
Quantized Types"), so those stay float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dualtoken_deploy.quantize.backend import Products, layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.export import OnnxExport, export_onnx
from dualtoken_deploy.targets.onnx.qdq import read_products
from dualtoken_deploy.targets.onnx.quantize import artifact_of, graph_sha256
from dualtoken_deploy.targets.onnx.ranges import collect_ranges
from dualtoken_deploy.targets.request import Prepared, Request, Tell
from dualtoken_deploy.targets.tensorrt import quantize as tensorrt
from dualtoken_deploy.targets.tensorrt.export import RULES, type_onnx
from dualtoken_deploy.targets.tensorrt_rtx.export import opset_of

PRODUCTS = ("MatMul", "Gemm")
E4M3_MAX = 448.0
# The least normal float16, which scales are written in. An E4M3 number has an exponent of its own: nothing is lost.
LEAST_SCALE = 2.0**-14
BLOCK = 32  # rows that share a scale of INT4
INT4_MAX = 7


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """The graph of the request's precision, with ranges where that needs any."""
    if request.precision == "int8":
        return tensorrt.prepare(module, request, calibration, quantizer, method, tell)
    opset = opset_of(request.precision)
    exported: OnnxExport = export_onnx(module, replace(request, precision="fp32"), RULES, opset, tell)
    backend: NarrowBackend = (
        Fp8Backend(exported.model, calibration, method, tell)
        if request.precision == "fp8"
        else Int4Backend(exported.model)
    )
    return Prepared(backend, artifact_of(exported))


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
        typed = type_onnx(self.quantize(in_float), self.precision, opset_of(self.precision))
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


class Fp8Backend(NarrowBackend):
    """E4M3 for both sides of a product, attention's two products among them."""

    precision = "fp8"

    def __init__(self, model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell) -> None:
        super().__init__(model)
        self.described = f"Q/DQ E4M3, {method}"
        nodes = [n for n in model.graph.node if n.output[0] in self.products.eligible]
        values = dict.fromkeys(v for n in nodes for v in n.input[:2] if v not in self._weights)
        self.ranges = collect_ranges(model, list(values), calibration.inputs, method, tell)

    def fits(self, node: onnx.NodeProto) -> bool:
        return True

    def quantize_node(self, node: onnx.NodeProto, pairs: Pairs) -> None:
        for index, value in enumerate(node.input[:2]):
            made = self._weight(node, value) if value in self._weights else self._activation(value)
            node.input[index] = pairs.once(value, *made)

    def _activation(self, value: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        low, high = self.ranges[value]
        scale = np.array(max(-low / E4M3_MAX, high / E4M3_MAX, LEAST_SCALE), np.float32)
        names = [f"{value}/e4m3_scale", f"{value}/e4m3_zero"]
        narrow, wide = f"{value}/e4m3", f"{value}/e4m3_dequantized"
        return (
            [
                helper.make_node("QuantizeLinear", [value, *names], [narrow], name=narrow),
                helper.make_node("DequantizeLinear", [narrow, *names], [wide], name=wide),
            ],
            [
                numpy_helper.from_array(scale, names[0]),
                numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), names[1]),
            ],
        )

    def _weight(self, node: onnx.NodeProto, value: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        weight = numpy_helper.to_array(self._weights[value]).astype(np.float32)
        axis = 0 if _transposed(node) else weight.ndim - 1
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.maximum(np.abs(weight).max(others) / E4M3_MAX, LEAST_SCALE).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        narrow = (weight / scale.reshape(shape)).astype(ml_dtypes.float8_e4m3fn)
        names = [f"{value}/e4m3", f"{value}/e4m3_scale", f"{value}/e4m3_zero"]
        wide = f"{value}/e4m3_dequantized"
        return (
            [helper.make_node("DequantizeLinear", names, [wide], name=wide, axis=axis)],
            [
                numpy_helper.from_array(narrow, names[0]),
                numpy_helper.from_array(scale, names[1]),
                numpy_helper.from_array(np.zeros(len(scale), ml_dtypes.float8_e4m3fn), names[2]),
            ],
        )


class Int4Backend(NarrowBackend):
    """INT4 for the weights of a product, in blocks; what they meet stays float16."""

    precision = "int4"
    described = f"DQ INT4, weights alone, blocks of {BLOCK}"

    def fits(self, node: onnx.NodeProto) -> bool:
        weight = self._weights.get(node.input[1])
        if weight is None or len(weight.dims) != 2:
            return False
        rows = weight.dims[1 if _transposed(node) else 0]
        return bool(rows % BLOCK == 0)

    def quantize_node(self, node: onnx.NodeProto, pairs: Pairs) -> None:
        value = node.input[1]
        weight = numpy_helper.to_array(self._weights[value]).astype(np.float32)
        axis = 1 if _transposed(node) else 0
        columns = weight.T if axis else weight  # (K, N)
        blocks = columns.reshape(-1, BLOCK, columns.shape[1])
        scale = np.maximum(np.abs(blocks).max(1) / INT4_MAX, LEAST_SCALE).astype(np.float32)  # (K / BLOCK, N)
        narrow = np.clip(np.rint(blocks / scale[:, None]), -INT4_MAX, INT4_MAX).reshape(columns.shape)
        if axis:
            scale, narrow = scale.T, narrow.T
        names = [f"{value}/int4", f"{value}/int4_scale"]
        wide = f"{value}/int4_dequantized"
        made = helper.make_node("DequantizeLinear", names, [wide], name=wide, axis=axis, block_size=BLOCK)
        tensors = [
            helper.make_tensor(names[0], TensorProto.INT4, narrow.shape, narrow.astype(np.int8).ravel().tolist()),
            numpy_helper.from_array(np.ascontiguousarray(scale), names[1]),
        ]
        node.input[1] = pairs.once(value, [made], tensors)


def _transposed(node: onnx.NodeProto) -> bool:
    """Whether a Gemm reads its weights as (N, K)."""
    return any(a.name == "transB" and a.i for a in node.attribute)
