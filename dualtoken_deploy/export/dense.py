"""Dense models as ONNX, the source of OpenVINO's too: raw heads, or RetinaNet with suppression in the graph.

The file is checked against the eager model before it is written. It is no bundle: manifest, golden and validation know
classifiers only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from dualtoken_deploy import numerics
from dualtoken_deploy.boxes import MAX_LOG_SCALE
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.detection import DETECTIONS, OVERLAP, SCORE, anchors
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.export.base import Request
from dualtoken_deploy.export.onnx import ATTENTION_OPSET, run_all, simplify, trace
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.segmentation import Segmenter
from dualtoken_deploy.spec import InputContract, TensorSpec

Size = tuple[int, int]
SQNR_DB = 100.0  # as for fp32 classifiers; measured 115 dB and more


class DecodedRetinaNet(nn.Module):
    """RetinaNet with its boxes decoded: boxes (B, A, 4) as (x1, y1, x2, y2), scores (B, classes, A) in 0..1."""

    origin: Tensor
    scale: Tensor
    bounds: Tensor

    def __init__(self, model: nn.Module, size: Size) -> None:
        super().__init__()
        self.model = model
        grid = torch.from_numpy(anchors(size)).float()
        self.register_buffer("origin", (grid[:, :2] + grid[:, 2:]) / 2)
        self.register_buffer("scale", grid[:, 2:] - grid[:, :2])
        self.register_buffer("bounds", torch.tensor([size[1], size[0]], dtype=torch.float32))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = self.model(image)
        centre = self.origin + deltas[..., :2] * self.scale
        sides = self.scale * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
        low, high = (torch.minimum(torch.relu(centre + s * sides), self.bounds) for s in (-0.5, 0.5))
        return torch.cat((low, high), dim=-1), torch.sigmoid(logits).transpose(1, 2)


def deploy_dense(model: nn.Module, size: Size, rules: Iterable[str] | None = None) -> nn.Module:
    """A copy of a dense model whose classifier is in its deploy form for images of (H, W)."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    backbone = copied.get_submodule("backbone")
    assert isinstance(backbone, Backbone)  # noqa: S101 (for the type checker)
    backbone.set_submodule("model", deploy_form(backbone.model, rules, size).module)
    return copied


def export_dense(model: nn.Module, size: Size, path: Path, suppress: bool = False, labels: bool = False) -> None:
    """Writes `path` (ONNX, float32, one normalised image (1, 3, H, W)); outputs by the model's kind.

    RetinaNet: "logits" and "deltas", or with `suppress` "boxes" (1, A, 4), "scores" (1, classes, A) and "selected"
    (N, 3), rows of ONNX NonMaxSuppression (image, class, anchor). Segmenters: "logits" (1, classes, H, W), or with
    `labels` "labels" (1, H, W).
    Raises UsageError on an option of the other kind, ConversionError, and ToleranceError before anything is written.
    """
    if suppress and not isinstance(model, RetinaNet):
        raise UsageError("suppression belongs to RetinaNet; leave `suppress` out")
    if labels and not isinstance(model, Segmenter):
        raise UsageError("label maps belong to segmenters; leave `labels` out")
    form, names = deploy_dense(model, size), ("logits", "deltas") if isinstance(model, RetinaNet) else ("logits",)
    eager = model
    if suppress:
        form, eager, names = DecodedRetinaNet(form, size), DecodedRetinaNet(model, size), ("boxes", "scores")
    request = Request(
        precision="fp32",
        contract=InputContract(TensorSpec("input", "float32", "NCHW", (1, 3, *size)), "tensor", size),
        outputs=tuple(TensorSpec(name, "float32", "", ()) for name in names),
        opset=None,
        metadata={},
    )
    graph = simplify(trace(form, request, ATTENTION_OPSET), request)
    _check(eager, graph, request)
    if suppress:
        _append_suppression(graph)
    if labels:
        _append_argmax(graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def _check(eager: nn.Module, graph: onnx.ModelProto, request: Request) -> None:
    """Every output against eager on one fixed random image."""
    image = np.random.default_rng(1).normal(size=request.contract.tensor.concrete()).astype(np.float32)
    with torch.no_grad():
        expected = eager.eval()(torch.from_numpy(image))
    wanted = [expected] if isinstance(expected, Tensor) else list(expected)
    for spec, want, got in zip(request.outputs, wanted, run_all(graph, {"input": image}), strict=True):
        difference = numerics.compare(want.numpy(), got)
        if difference.sqnr_db < SQNR_DB:
            raise ToleranceError(f"{spec.name} of the exported graph is out of tolerance: {difference}")


def _append_suppression(graph: onnx.ModelProto) -> None:
    """NonMaxSuppression over "boxes" and "scores" as a third output; boxes of opposite corners suit it in any order."""
    for name, value in (("nms_limit", DETECTIONS), ("nms_overlap", OVERLAP), ("nms_score", SCORE)):
        kind = TensorProto.INT64 if isinstance(value, int) else TensorProto.FLOAT
        graph.graph.initializer.append(helper.make_tensor(name, kind, [1], [value]))
    graph.graph.node.append(
        helper.make_node(
            "NonMaxSuppression", ["boxes", "scores", "nms_limit", "nms_overlap", "nms_score"], ["selected"]
        )
    )
    graph.graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, ["count", 3]))


def _append_argmax(graph: onnx.ModelProto) -> None:
    """The class of each pixel instead of its logits."""
    shape = [d.dim_value for d in graph.graph.output[0].type.tensor_type.shape.dim]
    graph.graph.node.append(helper.make_node("ArgMax", ["logits"], ["labels"], axis=1, keepdims=0))
    del graph.graph.output[:]
    graph.graph.output.append(
        helper.make_tensor_value_info("labels", TensorProto.INT64, [shape[0], shape[2], shape[3]])
    )
