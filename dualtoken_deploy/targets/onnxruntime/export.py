"""ONNX Runtime: the simplified ONNX, in float32 with the layouts that its CPU kernels like."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.targets.onnx.export import (
    DECOMPOSED_OPSET,
    check_same,
    check_whole,
    default_opset,
    export_onnx,
    operator_counts,
)
from dualtoken_deploy.targets.onnxruntime.layout import attention_over_tokens, drop_unit_batch
from dualtoken_deploy.targets.request import Artifact, Request, Tell

RULES = DEFAULT_RULES  # docs/decisions/003-rules-per-target.md


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.onnx. fp16 takes the decomposed opset, so that softmax can stay in float32."""
    opset = request.opset or (DECOMPOSED_OPSET if request.precision == "fp16" else default_opset(request))
    exported = export_onnx(model, request, RULES, opset, tell)
    if request.precision != "fp32" or request.contract.any_size:
        onnx.save(exported.model, folder / "model.onnx")
        return Artifact(exported.rules, exported.operators)
    tell("laying tensors out for ONNX Runtime")
    graph = copy.deepcopy(exported.model)
    counts = {"attention_over_tokens": attention_over_tokens(graph)}
    if request.contract.tensor.shape[0] == 1:
        counts["drop_unit_batch"] = drop_unit_batch(graph)
    check_same(exported.model, graph, request, "the layout for ONNX Runtime")
    check_whole(graph, "the graph laid out for ONNX Runtime")
    onnx.save(graph, folder / "model.onnx")
    rules = (*exported.rules, *(name for name, count in counts.items() if count))
    return Artifact(rules, {**exported.operators, "laid out": operator_counts(graph)})
