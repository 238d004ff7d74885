"""TensorRT, the part that any machine can do: an ONNX that carries its precision, for a strongly typed network.

TensorRT 11 takes a network's types from the ONNX alone, and TensorRT 10 does when it is told to, so one file serves
both. The engine is built from it on the device: `dualtoken build`, dualtoken_deploy/build.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx
from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, UsageError, first_line
from dualtoken_deploy.targets.onnx.bfloat16 import to_bfloat16
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx, operator_counts, to_float16
from dualtoken_deploy.targets.request import Artifact, Request, Tell
from dualtoken_deploy.targets.table import get_target

RULES = DEFAULT_RULES

# The newest opset of TensorRT 10.0 to 10.3's parser; below Attention, whose parts TensorRT fuses by itself.
OPSET = DECOMPOSED_OPSET

PRODUCTS = ("MatMul", "Conv", "Gemm")

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]
_TYPES: Mapping[str, Convert] = MappingProxyType(
    {"float32": lambda model: model, "float16": to_float16, "bfloat16": to_bfloat16}
)


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.onnx: float32, or float16 with float32 softmax, normalisation, inputs and outputs.

    Raises UsageError on an opset that TensorRT 10.3 does not parse.
    """
    if request.opset not in (None, OPSET):
        raise UsageError(f"opset {request.opset} is not offered for tensorrt; its parsers from 10.0 on take {OPSET}")
    exported = export_onnx(model, replace(request, precision="fp32"), RULES, OPSET, tell)
    tell(f"typing the ONNX as {request.precision}")
    typed = type_onnx(exported.model, get_target("tensorrt").precision(request.precision).beside)
    onnx.save(typed, folder / "model.onnx")
    return Artifact(exported.rules, {**exported.operators, "typed": operator_counts(typed)})


def type_onnx(source: onnx.ModelProto, floats: str, opset: int = OPSET) -> onnx.ModelProto:
    """`source`, float32 with or without Q/DQ pairs, as the ONNX that a strongly typed network takes; source is kept.

    `floats` float32 leaves the types; float16 is for all but softmax and normalisation (a quantized source keeps its
    narrow tensors, their scales become float16), bfloat16 for all. Products are named by the value they make,
    "<layer>/<operator>" or "<layer>@<operator>": TensorRT's inspector tells the origin of a layer by those names.
    Raises UsageError on another opset than `opset`, ConversionError where the result does not check.
    """
    version = next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx"))
    if version != opset:
        raise UsageError(f"opset {version} is not offered for tensorrt; its parsers from 10.0 on take {opset}")
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    typed = _TYPES[floats](copy)
    for node in typed.graph.node:
        if node.op_type in PRODUCTS:
            value = node.output[0]
            node.name = value if value.endswith(f"/{node.op_type}") else f"{value}@{node.op_type}"
    try:
        onnx.checker.check_model(typed, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(f"the typed ONNX does not check: {first_line(error)}") from error
    return typed
