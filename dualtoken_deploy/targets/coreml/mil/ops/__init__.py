"""THE table of MIL operations that are executed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.targets.coreml.mil.ops import (
    activations,
    compression,
    movement,
    pointwise,
    products,
    reductions,
    resizing,
)

__all__ = ["OPERATIONS", "Implementation"]


@dataclass(frozen=True)
class Implementation:
    """`function` takes MIL's parameters by name. `wide`: it is given float32 where the program has float16."""

    function: Callable[..., Any]
    wide: bool


def _rows() -> dict[str, Implementation]:
    exact = [
        *(getattr(movement, n) for n in (
            "identity", "transpose", "reshape", "expand_dims", "squeeze", "concat", "stack", "split", "slice_by_index",
            "slice_by_size", "tile", "pad", "fill_like",
            "gather", "gather_along_axis", "gather_nd", "cast", "reverse", "slice_update",
            "pixel_unshuffle", "pixel_shuffle",
        )),
        *(getattr(compression, n) for n in (
            "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense",
            "constexpr_sparse_to_dense", "constexpr_cast",
        )),
        pointwise.gelu,
        pointwise.select,
        pointwise.logical_not,
        resizing.upsample_nearest_neighbor,
        resizing.reduce_argmax,
        resizing.reduce_argmin,
    ]  # fmt: skip
    wide = [
        *(getattr(products, n) for n in ("linear", "matmul", "conv", "conv_transpose", "scaled_dot_product_attention")),
        *(getattr(reductions, n) for n in (
            "softmax", "layer_norm", "batch_norm", "instance_norm", "max_pool", "avg_pool",
        )),
        *(getattr(pointwise, n) for n in ("clip", "leaky_relu", "rsqrt", "inverse", "log")),
        *(getattr(activations, n) for n in (
            "clamped_relu", "elu", "linear_activation", "prelu", "scaled_tanh", "sigmoid_hard", "softplus",
            "softplus_parametric", "thresholded_relu",
        )),
        movement.cumsum,
        resizing.resize_bilinear,
        resizing.upsample_bilinear,
        *(getattr(compression, n) for n in ("quantize", "dequantize", "classify")),
    ]  # fmt: skip
    rows = {f.__name__: Implementation(f, False) for f in exact} | {f.__name__: Implementation(f, True) for f in wide}
    rows |= {name: Implementation(pointwise.unary(name), False) for name in pointwise.UNARY}
    rows |= {name: Implementation(pointwise.binary(name), True) for name in pointwise.BINARY}
    rows |= {name: Implementation(reductions.reduction(name), True) for name in reductions.REDUCTIONS}
    return rows


OPERATIONS: Mapping[str, Implementation] = MappingProxyType(_rows())
