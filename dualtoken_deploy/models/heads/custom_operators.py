"""Suppression and RoIAlign as operations of fixed shapes that an exporter can translate: `torch.ops.dualtoken.*`.

Eager runs their definitions (`boxes.suppress`, `roi_align`); `export/operations.py` has their ONNX. No gradients:
training calls `roi_align` itself, and suppression has none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dualtoken_deploy.models.heads.mask_rcnn import roi_align
from dualtoken_deploy.tasks.boxes import suppress


@torch.library.custom_op("dualtoken::keep_best", mutates_args=())
def keep_best(boxes: Tensor, scores: Tensor, overlap: float, score: float, limit: int) -> Tensor:
    """Which entries of `scores` (C, N) greedy suppression within each class keeps: 1 or 0 in their place, (C, N).

    `boxes` (N, 4). An entry needs more than `score`, and at most `limit` of a class are kept, the best first.
    """
    kept = np.zeros(tuple(scores.shape), np.float32)
    all_boxes, all_scores = boxes.detach().cpu().numpy(), scores.detach().cpu().numpy()
    for row, values in zip(kept, all_scores, strict=True):
        above = np.flatnonzero(values > score)
        row[above[suppress(all_boxes[above], values[above], overlap)[:limit]]] = 1.0
    return torch.from_numpy(kept).to(scores)


@keep_best.register_fake
def _(boxes: Tensor, scores: Tensor, *_: float) -> Tensor:  # noqa: ARG001 (shapes alone)
    return torch.empty_like(scores)


@torch.library.custom_op("dualtoken::roi_align", mutates_args=())
def cut_out(features: Tensor, boxes: Tensor, stride: int, side: int) -> Tensor:
    """`roi_align` with two samples a cell side: (1, C, h, w), boxes (R, 4) -> (R, C, side, side)."""
    return roi_align(features[0], boxes, stride, side).contiguous()


@cut_out.register_fake
def _(features: Tensor, boxes: Tensor, _stride: int, side: int) -> Tensor:
    return features.new_empty(boxes.shape[0], features.shape[1], side, side)
