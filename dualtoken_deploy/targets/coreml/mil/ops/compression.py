"""Compressed constants, quantize and dequantize, and the classifier's last operation.

Definitions: coremltools' documentation of MIL, iOS16 and iOS18 constexpr_ops, iOS17 quantization_ops, iOS15 classify.
Arithmetic is in float32; the executor rounds to the declared dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualtoken_deploy.targets.coreml.mil.weights import unpack_bits
from dualtoken_deploy.targets.runner import Array


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array | int) -> Array:
    """scale (q - zero_point); scale and zero_point are scalars or one a slice along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    offset = np.asarray(zero_point, np.float32)
    gain = np.asarray(scale, np.float32)
    offset, gain = (v.reshape(shape) if v.ndim else v for v in (offset, gain))
    out: Array = gain * (quantized_data.astype(np.float32) - offset)
    return out


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale (q - offset), each of them for a block: block size = data's size / scale's size on every axis."""
    values = data.astype(np.float32)
    if offset is not None:
        values = values - _spread(np.asarray(offset, np.float32), data.shape)
    return values * _spread(np.asarray(scale, np.float32), data.shape)


def constexpr_lut_to_dense(
    indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None
) -> Array:
    """Looks weights up: iOS16's form has packed indices and `shape`, iOS18's typed indices and one table a group."""
    if shape is not None:
        dims = [int(s) for s in shape]
        bits = int(lut.size).bit_length() - 1
        if lut.size != 1 << bits:
            raise ValueError(f"a lookup table of {lut.size} entries, which is no power of two")
        out: Array = lut.reshape(-1)[unpack_bits(indices, int(np.prod(dims)), bits)].reshape(dims)
        return out
    groups, entries, width = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    group = np.zeros(indices.shape, np.int64)  # the flat number of each element's table
    for axis, count in enumerate(groups):
        block = indices.shape[axis] // count
        own = np.arange(indices.shape[axis]) // block
        group = group * count + own.reshape([-1 if a == axis else 1 for a in range(indices.ndim)])
    found = lut.reshape(-1, entries, width)[group, indices.astype(np.int64)]  # (*indices.shape, width)
    if width == 1:
        return found[..., 0]
    if vector_axis is None:
        raise ValueError("a lookup table of vectors without vector_axis")
    at = int(vector_axis) % indices.ndim
    moved = np.moveaxis(found, -1, at + 1)
    return moved.reshape([n * width if a == at else n for a, n in enumerate(indices.shape)])


def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Zeros but where the mask has a bit (iOS16: packed, with `shape`; iOS18: one mask element each)."""
    dims = list(mask.shape) if shape is None else [int(s) for s in shape]
    flags = mask.reshape(-1) if shape is None else unpack_bits(mask, int(np.prod(dims)), 1)
    out = np.zeros(flags.size, nonzero_data.dtype)
    out[flags.astype(bool)] = nonzero_data.reshape(-1)
    return out.reshape(dims)


def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    if output_dtype != "fp32":
        raise ValueError(f"constexpr_cast to {output_dtype!r}")
    return source_val.astype(np.float32)


def _spread(values: Array, shape: Sequence[int]) -> Array:
    """Repeats each element over its block until `values` has `shape`."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis=axis)
    return values


def _along(values: Array | None, ndim: int, axis: Array | int | None) -> Array | np.float32:
    if values is None:
        return np.float32(0)
    wide = np.asarray(values, np.float32)
    if wide.ndim == 0:
        return wide
    shape = [1] * ndim
    shape[int(0 if axis is None else axis)] = -1
    return wide.reshape(shape)


def quantize(
    input: Array,  # noqa: A002 (MIL's name)
    scale: Array,
    output_dtype: str,
    zero_point: Array | None = None,
    axis: Array | int | None = None,
) -> Array:
    """clip(round(x / scale) + zero_point) to the range of int8 or uint8; halves round to even."""
    limits = np.iinfo({"int8": np.int8, "uint8": np.uint8}[output_dtype])
    ratio = np.rint(input / _along(scale, input.ndim, axis)) + _along(zero_point, input.ndim, axis)
    out: Array = np.clip(ratio, limits.min, limits.max).astype(output_dtype)
    return out


def dequantize(
    input: Array,  # noqa: A002 (MIL's name)
    scale: Array,
    zero_point: Array | None = None,
    axis: Array | int | None = None,
) -> Array:
    """scale (q - zero_point)."""
    out: Array = (input.astype(np.float32) - _along(zero_point, input.ndim, axis)) * _along(scale, input.ndim, axis)
    return out


def classify(probabilities: Array, classes: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The label of the largest probability, and every label with its own."""
    flat = probabilities.reshape(-1)
    if len(classes) != flat.size:
        raise ValueError(f"{len(classes)} classes for {flat.size} probabilities")
    names = [str(c) for c in classes]
    return names[int(flat.argmax())], {name: float(p) for name, p in zip(names, flat, strict=True)}
