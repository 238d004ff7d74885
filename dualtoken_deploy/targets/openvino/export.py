"""OpenVINO: IR from the simplified ONNX. fp32 keeps float32 weights, fp16 and bf16 store them in half the bytes.

fp16 still computes in float32; what makes a bundle compute in bfloat16 is the runner, by its precision.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, last_line, missing_extra
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, default_opset, export_onnx
from dualtoken_deploy.targets.openvino.ir import save_ir
from dualtoken_deploy.targets.request import Artifact, Request, Tell
from dualtoken_deploy.targets.tracing import is_foreign

HALF = ("fp16", "bf16")
RULES = (*DEFAULT_RULES, "pool_by_convolution")  # docs/decisions/003-rules-per-target.md


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.xml and model.bin. The ONNX in between is float32; fp16 is a matter of the stored weights."""
    try:
        import openvino as ov
    except ImportError as error:
        raise missing_extra("openvino", "exporting to OpenVINO") from error
    source = replace(request, precision="fp32")
    # OpenVINO 2026.4 reads opset 23's Attention, and not all that opsets from 22 on changed: AveragePool
    opset = DECOMPOSED_OPSET if is_foreign(model) else default_opset(request)
    exported = export_onnx(model, source, RULES, request.opset or opset, tell)
    tell("converting to OpenVINO IR")
    try:
        converted = ov.Core().read_model(exported.model.SerializeToString())
        _name(converted, request)
        save_ir(converted, folder, half=request.precision in HALF)
    except RuntimeError as error:
        raise ConversionError(f"OpenVINO cannot convert the ONNX: {last_line(error)}") from error
    counts = Counter(op.get_type_name() for op in converted.get_ordered_ops())
    return Artifact(exported.rules, {**exported.operators, "openvino": dict(counts.most_common())})


def _name(model: Any, request: Request) -> None:
    model.set_friendly_name(request.metadata.get("variant", "model"))
    for key, value in request.metadata.items():
        model.set_rt_info(value, ["dualtoken", key])
