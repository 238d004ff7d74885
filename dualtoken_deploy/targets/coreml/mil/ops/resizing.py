"""Upsampling of the two last axes, and the place of the largest element. Definitions: coremltools' documentation of
MIL, image_resizing and reduction."""

from __future__ import annotations

import numpy as np

from dualtoken_deploy.targets.runner import Array


def upsample_nearest_neighbor(
    x: Array, scale_factor_height: Array | float = 1, scale_factor_width: Array | float = 1
) -> Array:
    """Output i reads input floor(i / scale); floor(size * scale) outputs a side."""
    places = []
    for size, scale in zip(x.shape[-2:], (float(scale_factor_height), float(scale_factor_width)), strict=True):
        at = np.floor(np.arange(_scaled(size, scale)) / scale + 1e-9).astype(np.int64)
        places.append(np.minimum(at, size - 1))
    out: Array = x[..., places[0][:, None], places[1][None]]
    return out


def upsample_bilinear(
    x: Array,
    scale_factor_height: Array | float = 1,
    scale_factor_width: Array | float = 1,
    align_corners: Array | bool = True,
    half_pixel_centers: Array | bool | None = None,
) -> Array:
    """Linear between the samples, side by side. The spacing is that of the sizes, not of the scales."""
    centred = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    rows, columns = (
        _linear(size, _scaled(size, float(scale)), bool(align_corners), centred).astype(x.dtype)
        for size, scale in zip(x.shape[-2:], (scale_factor_height, scale_factor_width), strict=True)
    )
    out: Array = rows @ x @ columns.T
    return out


def resize_bilinear(
    x: Array,
    target_size_height: Array | int = 1,
    target_size_width: Array | int = 1,
    sampling_mode: str = "DEFAULT",
) -> Array:
    """Linear between the samples of the two last axes, at the places of a mode. Raises ValueError on another mode."""
    rows, columns = (
        _weights(size, _sampled(size, int(count), sampling_mode)).astype(x.dtype)
        for size, count in zip(x.shape[-2:], (target_size_height, target_size_width), strict=True)
    )
    out: Array = rows @ x @ columns.T
    return out


def _sampled(size: int, count: int, mode: str) -> Array:
    """Where `count` outputs read an axis of `size` inputs."""
    at = np.arange(count)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        middle = (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0
        return at * ((size - 1) / (count - 1)) if count > 1 else np.array([middle])
    if mode == "DEFAULT":
        return at * (size / count)
    if mode == "OFFSET_CORNERS":
        return (at + 0.5) * (max(1, size - 1) / count)
    if mode == "UNALIGN_CORNERS":
        return (at + 0.5) * (size / count) - 0.5
    raise ValueError(f"sampling_mode {mode!r}")


def reduce_argmax(x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "") -> Array:
    """Where the largest element lies, the first of equal ones."""
    out: Array = x.argmax(axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype or np.int32)
    return out


def _scaled(size: int, scale: float) -> int:
    """floor(size * scale), where the scale may be a rounded quotient of the sizes."""
    return int(np.floor(size * scale + 1e-4))


def _linear(size: int, count: int, align_corners: bool, centred: bool) -> Array:
    """The weights (count, size) of linear interpolation."""
    if align_corners:
        at = np.arange(count) * ((size - 1) / max(count - 1, 1))
    else:
        at = np.arange(count) * (size / count) + (0.5 * size / count - 0.5 if centred else 0.0)
    return _weights(size, at)


def _weights(size: int, at: Array) -> Array:
    """The weights (count, size) of the samples on either side of each place, which is within the axis at least."""
    at = np.clip(at, 0, size - 1)
    weights: Array = np.clip(1 - np.abs(at[:, None] - np.arange(size)), 0, None)
    return weights


def reduce_argmin(x: Array, axis: Array | int = -1, keep_dims: Array | bool = False, output_dtype: str = "") -> Array:
    """Where the smallest element lies, the first of equal ones."""
    out: Array = x.argmin(axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype or np.int32)
    return out
