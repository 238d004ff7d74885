"""FP8 for TensorRT for RTX: y = x @ W -> DQ(Q(x; s_x)) @ DQ(W8; s_w), E4M3 both; s_x of the tensor, s_w of an output
channel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.quantize import artifact_of
from dualtoken_deploy.targets.onnx.ranges import collect_ranges
from dualtoken_deploy.targets.request import Prepared, Request, Tell
from dualtoken_deploy.targets.tensorrt_rtx.narrow import LEAST_SCALE, NarrowBackend, Pairs, float_graph, transposed

E4M3_MAX = 448.0  # an E4M3 number has an exponent of its own: nothing is lost by LEAST_SCALE


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, _quantizer: str, method: str, tell: Tell
) -> Prepared:
    exported = float_graph(module, request, tell)
    return Prepared(Fp8Backend(exported.model, calibration, method, tell), artifact_of(exported))


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
        axis = 0 if transposed(node) else weight.ndim - 1
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
