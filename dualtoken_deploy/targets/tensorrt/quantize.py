"""INT8 for TensorRT: symmetric Q/DQ pairs, and float16 in what is not quantized."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL
from dualtoken_deploy.targets.onnx.quantize import OnnxBackend, artifact_of, float_graph
from dualtoken_deploy.targets.request import Prepared, Request, Tell
from dualtoken_deploy.targets.tensorrt.export import RULES, type_onnx


class TensorRtBackend(OnnxBackend):
    """The graph with what is not quantized in float16: what `dualtoken build` makes an engine of."""

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        onnx.save(type_onnx(self._quantizer.quantize(in_float), "float16"), folder / "model.onnx")


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, _quantizer: str, method: str, tell: Tell
) -> Prepared:
    exported = float_graph(module, request, RULES, tell)
    return Prepared(TensorRtBackend(exported.model, calibration, method, NEUTRAL, tell), artifact_of(exported))
