"""TensorRT for RTX: an ONNX that carries its precision, and the engine that the vendor's builder compiles from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, UsageError
from dualtoken_deploy.targets.nvidia.binding import RTX
from dualtoken_deploy.targets.nvidia.engine import ENGINE
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx, operator_counts
from dualtoken_deploy.targets.request import Artifact, Request, Tell
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.targets.tensorrt.export import PRODUCTS, type_onnx
from dualtoken_deploy.targets.tensorrt_rtx.compile import (
    CompileOptions,
    check_options,
    compile_apart,
    describe,
    left_out,
)

RULES = DEFAULT_RULES


def check(precision: str, opset: int | None, settings: Mapping[str, str]) -> None:
    """Says what the compiler cannot do, before anything is traced. Raises UsageError, MissingError."""
    if opset not in (None, opset_of(precision)):
        raise UsageError(
            f"opset {opset} is not offered for tensorrt-rtx in {precision}; it takes {opset_of(precision)}"
        )
    check_options(CompileOptions.of(settings), precision)


def opset_of(precision: str) -> int:
    """The opset that a precision is exported in."""
    return get_target("tensorrt-rtx").precision(precision).opset or DECOMPOSED_OPSET


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.onnx, typed as the precision says; `compile_files` then makes the engine of it."""
    opset = opset_of(request.precision)
    exported = export_onnx(model, replace(request, precision="fp32"), RULES, opset, tell)
    tell(f"typing the ONNX as {request.precision}")
    typed = type_onnx(exported.model, get_target("tensorrt-rtx").precision(request.precision).beside, opset)
    onnx.save(typed, folder / "model.onnx")
    return Artifact(exported.rules, {**exported.operators, "typed": operator_counts(typed)})


def compile_files(folder: Path, manifest: Manifest, settings: Mapping[str, str], tell: Tell) -> Build:
    """Writes model.engine beside the model.onnx that it is compiled from; what the manifest says of that.

    Raises ConversionError where the builder refuses, or where it left out a matrix product.
    """
    options = CompileOptions.of(settings)
    data = (folder / "model.onnx").read_bytes()
    graph = onnx.load_from_string(data).graph
    tell("compiling the engine")
    compiled = compile_apart(data, (manifest.input.tensor,), options, tell)
    lost = left_out(compiled, (node.name for node in graph.node if node.op_type in PRODUCTS))
    if lost:
        raise ConversionError(f"{RTX.title} made no layer of {', '.join(lost[:3])}: {len(lost)} products are missing")
    (folder / ENGINE).write_bytes(compiled.plan)
    untaken = left_out(compiled, (node.name for node in graph.node))
    return describe(compiled, options, nodes=len(graph.node), nodes_taken=len(graph.node) - len(untaken))
