"""INT8 for OpenVINO: IR with the Q/DQ pairs that it runs as integers, or NNCF's own (docs/decisions/006)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.quantize.backend import Backend
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.moves import without_idle_moves
from dualtoken_deploy.targets.onnx.qdq import QdqQuantizer, Style, onnxruntime_style, without_zero_points
from dualtoken_deploy.targets.onnx.quantize import OnnxBackend, artifact_of, float_graph, graph_sha256
from dualtoken_deploy.targets.onnx.slow import slow_in_integers
from dualtoken_deploy.targets.openvino.ir import save_ir
from dualtoken_deploy.targets.openvino.norms import scale_free_norms
from dualtoken_deploy.targets.request import Prepared, Request, Tell


class OpenVinoBackend(OnnxBackend):
    """The same graph as OpenVINO IR, which runs its Q/DQ pairs as integers."""

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        import openvino as ov

        pairs = without_zero_points(self._quantizer.quantize(in_float))
        save_ir(ov.Core().read_model(pairs.SerializeToString()), folder)


class NncfBackend:
    """OpenVINO IR by NNCF; its calibration runs anew for every choice of layers."""

    def __init__(self, model: onnx.ModelProto, calibration: CalibrationSet, tell: Tell) -> None:
        from dualtoken_deploy.targets.openvino.nncf import NncfQuantizer

        self._model, self._calibration, self._tell = model, calibration, tell
        self._quantizer = NncfQuantizer(model, calibration)
        self.products = self._quantizer.products
        self.described = self._quantizer.style
        self.source = graph_sha256(model)

    def sensitivity(self) -> Sensitivity:
        """That of pairs on the same products: NNCF tells none of its own."""
        pairs = QdqQuantizer(self._model, self._calibration, onnxruntime_style(), tell=self._tell)
        return pairs.sensitivity(self.products)

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        save_ir(self._quantizer.quantize(in_float), folder)


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """`quantizer` qdq: pairs in this CPU's scheme; nncf: NNCF's own calibration and placement."""
    exported = float_graph(module, request, DEFAULT_RULES, tell)  # pooling by convolution gains nothing in INT8
    model = scale_free_norms(without_idle_moves(exported.model))
    backend: Backend
    if quantizer == "nncf":
        backend = NncfBackend(model, calibration, tell)
    else:
        found = onnxruntime_style()
        style = Style(found.name, found.unsigned, found.reduce_range, conv_outputs=False)
        slow = slow_in_integers(model) if style.unsigned else ()  # measured on x86 alone
        backend = OpenVinoBackend(model, calibration, method, style, tell, slow)
    return Prepared(backend, artifact_of(exported))
