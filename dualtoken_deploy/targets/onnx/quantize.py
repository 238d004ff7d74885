"""INT8 of targets that take ONNX: the float graph is exported once, by the target's own rules, and gets Q/DQ pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.latest import Latest, fingerprint
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.choose import choose_methods
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, OnnxExport, export_onnx
from dualtoken_deploy.targets.onnx.qdq import QdqQuantizer, Style
from dualtoken_deploy.targets.request import Artifact, Request, Tell

# A calibrated float graph for one of a target's quantizers: (graph, pictures, calibrator) -> the backend of the search
Open = Callable[[onnx.ModelProto, CalibrationSet, str, Tell], "OnnxBackend"]


def float_graph(module: nn.Module, request: Request, rules: Iterable[str], tell: Tell) -> OnnxExport:
    """The graph that is quantized: float32, by the rules of its target, below the opset with whole attentions."""
    source, chosen = replace(request, precision="fp32"), tuple(rules)
    opset = request.opset or DECOMPOSED_OPSET
    said = sorted(source.metadata.items())
    key = fingerprint(module, source.contract, source.outputs, source.task, said, chosen, opset)
    return _GRAPH.get(key, lambda: export_onnx(module, source, chosen, opset, tell))


_GRAPH: Latest[OnnxExport] = Latest()


def artifact_of(exported: OnnxExport) -> Artifact:
    return Artifact(exported.rules, exported.operators)


def graph_sha256(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


class OnnxBackend:
    """model.onnx with Q/DQ pairs."""

    def __init__(
        self,
        model: onnx.ModelProto,
        calibration: CalibrationSet,
        method: str,
        style: Style,
        tell: Tell,
        slow: Collection[str] = (),
    ) -> None:
        """`slow`: products that stay in float since the engine is faster so."""
        methods = choose_methods(model, calibration, style, method, tell, slow=slow)
        self._quantizer = QdqQuantizer(model, calibration, style, method, tell, methods, slow)
        self.products = self._quantizer.products
        self.described = f"Q/DQ {style.name}, {method}, {methods}"
        # ranges too, for what was measured with others says nothing of these
        ranges = repr(sorted(self._quantizer.ranges.items())).encode()
        self.source = hashlib.sha256(graph_sha256(model).encode() + ranges).hexdigest()

    def sensitivity(self) -> Sensitivity:
        return self._quantizer.sensitivity()

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        onnx.save(self._quantizer.quantize(in_float), folder / "model.onnx")
