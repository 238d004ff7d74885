"""ONNX Runtime: the simplified ONNX, in float32 with the layouts that its CPU kernels like."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.targets.onnx.export import (
    check_same,
    check_whole,
    default_opset,
    export_onnx,
    operator_counts,
    store_halves,
)
from dualtoken_deploy.targets.onnxruntime.layout import attention_over_tokens, drop_unit_batch, transpose_first
from dualtoken_deploy.targets.request import Artifact, Request, Tell

RULES = DEFAULT_RULES  # docs/decisions/003-rules-per-target.md


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.onnx. In fp16 only the weights are float16: x86 CPUs lack kernels of it, and ONNX Runtime would cast
    every value to float32 and back."""
    exported = export_onnx(
        model, replace(request, precision="fp32"), RULES, request.opset or default_opset(request), tell
    )
    half = request.precision == "fp16"
    if request.contract.any_size:
        if half:
            store_halves(exported.model)
        onnx.save(exported.model, folder / "model.onnx")
        return Artifact(exported.rules, exported.operators)
    tell("laying tensors out for ONNX Runtime")
    graph = copy.deepcopy(exported.model)
    counts = {"transpose_first": transpose_first(graph), "attention_over_tokens": attention_over_tokens(graph)}
    if request.contract.tensor.shape[0] == 1:
        counts["drop_unit_batch"] = drop_unit_batch(graph)
    check_same(exported.model, graph, request, "the layout for ONNX Runtime")
    check_whole(graph, "the graph laid out for ONNX Runtime")
    if half:
        store_halves(graph)
        check_whole(graph, "the graph with weights in float16")
    onnx.save(graph, folder / "model.onnx")
    rules = (*exported.rules, *(name for name, count in counts.items() if count))
    return Artifact(rules, {**exported.operators, "laid out": operator_counts(graph)})
