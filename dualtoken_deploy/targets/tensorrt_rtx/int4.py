"""INT4 for TensorRT for RTX: y = x @ W -> x @ DQ(W4; s_w), weights alone; s_w of BLOCK rows of an output channel."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.quantize import artifact_of
from dualtoken_deploy.targets.request import Prepared, Request, Tell
from dualtoken_deploy.targets.tensorrt_rtx.narrow import LEAST_SCALE, NarrowBackend, Pairs, float_graph, transposed

BLOCK = 32  # rows that share a scale
INT4_MAX = 7


def prepare(
    module: nn.Module, request: Request, _calibration: CalibrationSet, _quantizer: str, _method: str, tell: Tell
) -> Prepared:
    exported = float_graph(module, request, tell)
    return Prepared(Int4Backend(exported.model), artifact_of(exported))


class Int4Backend(NarrowBackend):
    """INT4 for the weights of a product, in blocks; what they meet stays float16."""

    precision = "int4"
    described = f"DQ INT4, weights alone, blocks of {BLOCK}"

    def fits(self, node: onnx.NodeProto) -> bool:
        weight = self._weights.get(node.input[1])
        if weight is None or len(weight.dims) != 2:
            return False
        rows = weight.dims[1 if transposed(node) else 0]
        return bool(rows % BLOCK == 0)

    def quantize_node(self, node: onnx.NodeProto, pairs: Pairs) -> None:
        value = node.input[1]
        weight = numpy_helper.to_array(self._weights[value]).astype(np.float32)
        axis = 1 if transposed(node) else 0
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
