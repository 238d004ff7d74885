"""The ONNX of `torch.ops.dualtoken.*` (models/heads/operations.py), as torch.onnx takes translations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op

from dualtoken_deploy.models.heads import custom_operators as operations

__all__ = ["TRANSLATIONS"]


def _keep_best(boxes: Any, scores: Any, overlap: float, score: float, limit: int) -> Any:
    """NonMaxSuppression selects rows (image, class, box), as many as there are; ones are scattered to their places.

    A runtime that fills rows up with -1 is sent to one place more, which is cut off.
    """
    rows = op.NonMaxSuppression(
        op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
        op.Unsqueeze(scores, op.Constant(value_ints=[0])),
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[overlap]),
        op.Constant(value_floats=[score]),
    )
    columns = op.Shape(scores, start=1, end=2)
    count = op.Size(scores)
    which = op.Gather(rows, op.Constant(value_int=1), axis=1)
    flat = op.Add(op.Mul(which, columns), op.Gather(rows, op.Constant(value_int=2), axis=1))
    places = op.Unsqueeze(op.Where(op.Less(which, op.Constant(value_int=0)), count, flat), op.Constant(value_ints=[1]))
    nothing = op.ConstantOfShape(op.Reshape(op.Add(count, op.Constant(value_int=1)), op.Constant(value_ints=[1])))
    ones = op.Add(op.Cast(op.Mul(which, op.Constant(value_int=0)), to=1), op.Constant(value_float=1.0))
    kept = op.ScatterND(nothing, places, ones)
    kept = op.Slice(kept, op.Constant(value_ints=[0]), op.Reshape(count, op.Constant(value_ints=[1])))
    return op.Reshape(kept, op.Shape(scores))


def _roi_align(features: Any, boxes: Any, stride: int, side: int) -> Any:
    """RoiAlign of one image; half_pixel: feature (i, j) lies at ((j + 0.5), (i + 0.5)) * stride."""
    rows = op.Shape(boxes, start=0, end=1)
    return op.RoiAlign(
        features,
        boxes,
        op.Expand(op.Constant(value_int=0), rows),
        output_height=side,
        output_width=side,
        sampling_ratio=2,
        spatial_scale=1.0 / stride,
        mode="avg",
        coordinate_transformation_mode="half_pixel",
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.dualtoken.keep_best.default: _keep_best,
    torch.ops.dualtoken.roi_align.default: _roi_align,
}
assert operations  # noqa: S101  # importing it registers the operations
