"""INT8 for ONNX Runtime: Q/DQ pairs as its CPU kernels take them, or symmetric ones as other engines do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, onnxruntime_style
from dualtoken_deploy.targets.onnx.quantize import OnnxBackend, artifact_of, float_graph
from dualtoken_deploy.targets.onnx.slow import slow_in_integers
from dualtoken_deploy.targets.onnxruntime.export import RULES
from dualtoken_deploy.targets.onnxruntime.integers import lay_out
from dualtoken_deploy.targets.request import Prepared, Request, Tell


class OnnxRuntimeBackend(OnnxBackend):
    """The same graph as ONNX Runtime's CPU kernels run it fastest. `newer`: its opset may rise."""

    newer = True

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        onnx.save(lay_out(self._quantizer.quantize(in_float), self.newer), folder / "model.onnx")


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """`quantizer` qdq: in this CPU's scheme, laid out for its kernels; qdq-symmetric: pairs alone, int8 without zero
    points, for any engine."""
    exported = float_graph(module, request, RULES, tell)
    if quantizer != "qdq":
        return Prepared(OnnxBackend(exported.model, calibration, method, NEUTRAL, tell), artifact_of(exported))
    style, newer = onnxruntime_style(), request.opset is None
    slow = slow_in_integers(exported.model, newer) if style.unsigned else ()  # measured on x86 alone
    backend = OnnxRuntimeBackend(exported.model, calibration, method, style, tell, slow)
    backend.newer = newer
    return Prepared(backend, artifact_of(exported))
