"""INT8 for OpenVINO by NNCF, with its settings for transformers (SmoothQuant, mixed preset)."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from dualtoken_deploy.errors import ConversionError, first_line, missing_extra
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.quantize.backend import layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.onnx.qdq import read_products
from dualtoken_deploy.targets.openvino.ir import save_ir
from dualtoken_deploy.targets.openvino.runner import OpenVinoRunner
from dualtoken_deploy.targets.request import quiet
from dualtoken_deploy.targets.runner import RunnerOptions

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


class NncfQuantizer:
    """Quantizes any choice of layers; every choice takes NNCF's own calibration anew.

    Only what runs in integers once all is quantized counts as eligible: NNCF leaves most products of attention alone,
    and gives depthwise convolutions a scale a channel that OpenVINO runs in float.
    """

    def __init__(self, model: onnx.ModelProto, calibration: CalibrationSet) -> None:
        """Raises MissingError without nncf or openvino."""
        try:
            with quiet(logging.ERROR), contextlib.redirect_stderr(io.StringIO()):
                import nncf
                import openvino
        except ImportError as error:
            raise missing_extra("quantize", "quantizing for OpenVINO") from error
        self._nncf, self._openvino = nncf, openvino
        self._bytes = model.SerializeToString()
        self.products = read_products(model)
        self._nodes = {n.output[0]: n.name for n in model.graph.node}
        self._input = model.graph.input[0].name
        self._calibration = calibration
        self._last: tuple[frozenset[str], Any] | None = None
        self.products = replace(self.products, eligible=self.products.eligible & self._integers(model))

    def _integers(self, model: onnx.ModelProto) -> frozenset[str]:
        """Values of the products that OpenVINO computes in INT8 on this machine with every layer quantized."""
        given = model.graph.input[0]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type).name
        shape = tuple(d.dim_value or 1 for d in given.type.tensor_type.shape.dim)
        with tempfile.TemporaryDirectory(prefix="dualtoken-nncf.") as folder:
            save_ir(self.quantize(), Path(folder))
            spec = TensorSpec(given.name, dtype, "", shape)
            with OpenVinoRunner(Path(folder) / "model.xml", (spec,), (), RunnerOptions()) as runner:
                nodes = runner.execution().nodes
        return frozenset(name for name, kind in nodes.items() if kind in ("int8", "uint8"))

    @property
    def style(self) -> str:
        """What was asked of NNCF."""
        return f"NNCF TRANSFORMER, preset MIXED, overflow fix {'off' if self._safe() else 'on'}"

    def quantize(self, in_float: Iterable[str] = ()) -> Any:
        """The openvino.Model with INT8 in every eligible layer but those `in_float`; the last one is kept."""
        kept = set(in_float)
        excluded = frozenset(
            self._nodes[v] for v in self.products.macs if v not in self.products.eligible or layer_of(v) in kept
        )
        if self._last is None or self._last[0] != excluded:
            self._last = excluded, self._quantize(sorted(excluded))
        return self._last[1]

    def _quantize(self, excluded: list[str]) -> Any:
        nncf = self._nncf
        samples = [self._calibration.inputs[i : i + 1] for i in range(len(self._calibration.inputs))]
        fix = nncf.OverflowFix.DISABLE if self._safe() else nncf.OverflowFix.ENABLE
        try:
            with quiet(logging.ERROR), contextlib.redirect_stderr(io.StringIO()):
                float_model = self._openvino.Core().read_model(self._bytes)
                return nncf.quantize(
                    float_model,
                    nncf.Dataset(samples, lambda sample: {self._input: sample}),
                    subset_size=len(samples),
                    preset=nncf.QuantizationPreset.MIXED,
                    model_type=nncf.ModelType.TRANSFORMER,
                    ignored_scope=nncf.IgnoredScope(names=excluded, validate=False),
                    advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
                )
        except (RuntimeError, ValueError, nncf.ValidationError, nncf.InternalError) as error:
            raise ConversionError(f"NNCF cannot quantize the model: {first_line(error)}") from error

    def _safe(self) -> bool:
        """Whether this CPU's int8 products add up in 32 bits; else NNCF leaves a bit of the weights free."""
        return bool(VNNI & set(describe_machine()["isa"]))
