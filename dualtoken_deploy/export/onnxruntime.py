"""ONNX Runtime: the simplified ONNX as it is."""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import nn

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.export.base import Artifact, Request, Tell
from dualtoken_deploy.export.onnx import DECOMPOSED_OPSET, default_opset, export_onnx

RULES = DEFAULT_RULES  # fold_projection costs time in stages 2 and 3: docs/decisions/003-rules-per-target.md


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.onnx. fp16 takes the decomposed opset, so that softmax can stay in float32."""
    opset = request.opset or (DECOMPOSED_OPSET if request.precision == "fp16" else default_opset(request))
    exported = export_onnx(model, request, RULES, opset, tell)
    onnx.save(exported.model, folder / "model.onnx")
    return Artifact(exported.rules, exported.operators)
