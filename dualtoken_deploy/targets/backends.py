"""How a target is quantized: one row each. A backend turns a float ONNX graph into the target's INT8 files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.quantize.backend import Backend
from dualtoken_deploy.quantize.calibration import Array, CalibrationSet
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, QdqQuantizer, Style, onnxruntime_style, without_zero_points
from dualtoken_deploy.targets.openvino.ir import save_ir
from dualtoken_deploy.targets.tensorrt.export import type_onnx

Tell = Callable[[str], None]


class OnnxBackend:
    """model.onnx with Q/DQ pairs."""

    def __init__(
        self, model: onnx.ModelProto, calibration: CalibrationSet, method: str, style: Style, tell: Tell
    ) -> None:
        self._quantizer = QdqQuantizer(model, calibration, style, method, tell)
        self.products = self._quantizer.products
        self.described = f"Q/DQ {style.name}, {method}"

    def noise(self, inputs: Array) -> dict[str, float]:
        return self._quantizer.noise(inputs)

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        onnx.save(self._quantizer.quantize(in_float), folder / "model.onnx")


class TensorRtBackend(OnnxBackend):
    """The same graph with what is not quantized in float16: what `dualtoken build` makes an engine of."""

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        onnx.save(type_onnx(self._quantizer.quantize(in_float), "int8"), folder / "model.onnx")


class OpenVinoBackend(OnnxBackend):
    """The same graph as OpenVINO IR, which runs its Q/DQ pairs as integers."""

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        import openvino as ov

        pairs = without_zero_points(self._quantizer.quantize(in_float))
        save_ir(ov.Core().read_model(pairs.SerializeToString()), folder)


class NncfBackend:
    """OpenVINO IR by NNCF; its calibration runs anew for every choice of layers."""

    def __init__(self, model: onnx.ModelProto, calibration: CalibrationSet) -> None:
        from dualtoken_deploy.targets.openvino.nncf import NncfQuantizer

        self._quantizer = NncfQuantizer(model, calibration)
        self.products = self._quantizer.products
        self.described = self._quantizer.style

    def noise(self, inputs: Array) -> dict[str, float]:
        return {}

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        save_ir(self._quantizer.quantize(in_float), folder)


def _onnxruntime(model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell) -> Backend:
    return OnnxBackend(model, calibration, method, onnxruntime_style(), tell)


def _neutral(model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell) -> Backend:
    return OnnxBackend(model, calibration, method, NEUTRAL, tell)


def _tensorrt(model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell) -> Backend:
    return TensorRtBackend(model, calibration, method, NEUTRAL, tell)


def _openvino(model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell) -> Backend:
    found = onnxruntime_style()
    style = Style(found.name, found.unsigned, found.reduce_range, conv_outputs=False)
    return OpenVinoBackend(model, calibration, method, style, tell)


def _nncf(model: onnx.ModelProto, calibration: CalibrationSet, _method: str, _tell: Tell) -> Backend:
    return NncfBackend(model, calibration)


# target -> quantizer -> how; the first of each is the default (docs/decisions/006-int8-for-openvino.md)
BACKENDS: Mapping[str, Mapping[str, Callable[[onnx.ModelProto, CalibrationSet, str, Tell], Backend]]] = (
    MappingProxyType(
        {
            "onnxruntime": {"qdq": _onnxruntime, "qdq-symmetric": _neutral},
            "openvino": {"qdq": _openvino, "nncf": _nncf},
            "tensorrt": {"qdq-symmetric": _tensorrt},
            "tensorrt-rtx": {"qdq-symmetric": _tensorrt},
        }
    )
)


def open_backend(
    target: str, quantizer: str | None, model: onnx.ModelProto, calibration: CalibrationSet, method: str, tell: Tell
) -> Backend:
    """Raises UsageError on a quantizer that the target does not have."""
    offered: Mapping[str, Any] = BACKENDS[target]
    name = quantizer or next(iter(offered))
    if name not in offered:
        raise UsageError(f"unknown quantizer {name!r} for {target}; valid quantizers: {', '.join(offered)}")
    backend: Backend = offered[name](model, calibration, method, tell)
    return backend
