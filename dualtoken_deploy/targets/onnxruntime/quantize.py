"""INT8 for ONNX Runtime: Q/DQ pairs as its CPU kernels take them, or symmetric ones as other engines do."""

from __future__ import annotations

from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, onnxruntime_style
from dualtoken_deploy.targets.onnx.quantize import OnnxBackend, artifact_of, float_graph
from dualtoken_deploy.targets.onnxruntime.export import RULES
from dualtoken_deploy.targets.request import Prepared, Request, Tell


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """`quantizer` qdq: in this CPU's scheme; qdq-symmetric: int8 without zero points."""
    exported = float_graph(module, request, RULES, tell)
    style = onnxruntime_style() if quantizer == "qdq" else NEUTRAL
    return Prepared(OnnxBackend(exported.model, calibration, method, style, tell), artifact_of(exported))
