"""Operations that move, cut and join elements and compute nothing. Definitions: coremltools' documentation of MIL,
tensor_transformation and tensor_operation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualtoken_deploy.targets.runner import Array

CASTS = {
    "fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int16": np.int16, "uint16": np.uint16,
    "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip


def identity(x: Array) -> Array:
    return x


def transpose(x: Array, perm: Array) -> Array:
    return x.transpose([int(p) for p in perm])


def reshape(x: Array, shape: Array) -> Array:
    """-1 is what is left over; 0 takes x's size, counted from the last axis (iOS17), 1 where x has none."""
    wanted = [int(s) for s in shape]
    for i, size in enumerate(wanted):
        if size == 0:
            axis = i - len(wanted) + x.ndim
            wanted[i] = x.shape[axis] if axis >= 0 else 1
    return x.reshape(wanted)


def expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(a) for a in np.atleast_1d(axes)))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(int(a) for a in np.atleast_1d(axes)))


def concat(values: Sequence[Array], axis: Array | int, interleave: Array | bool = False) -> Array:
    """Joins along `axis`; interleaved: one element of each in turn."""
    if not interleave:
        return np.concatenate(values, axis=int(axis))
    at = int(axis) % values[0].ndim
    stacked = np.stack(values, axis=at + 1)
    shape = list(values[0].shape)
    shape[at] *= len(values)
    return stacked.reshape(shape)


def stack(values: Sequence[Array], axis: Array | int) -> Array:
    return np.stack(values, axis=int(axis))


def split(
    x: Array, axis: Array | int, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    """Parts of `split_sizes`, or `num_splits` equal ones. Raises ValueError where they do not fill the axis."""
    length = x.shape[int(axis)]
    if split_sizes is None:
        if num_splits is None or length % int(num_splits):
            raise ValueError(f"split of {length} elements into {num_splits} equal parts")
        sizes = [length // int(num_splits)] * int(num_splits)
    else:
        sizes = [int(s) for s in split_sizes]
    if sum(sizes) != length:
        raise ValueError(f"split sizes {sizes} of {length} elements")
    return tuple(np.split(x, np.cumsum(sizes)[:-1].tolist(), axis=int(axis)))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x[begin:end:stride] on each axis; a mask ignores a begin or an end, or takes the one element at begin."""
    return x[_cuts(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x with `update` where slice_by_index would read."""
    out = x.copy()
    out[_cuts(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return out


def _cuts(
    rank: int,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    cuts: list[slice | int] = []
    for axis in range(rank):
        step = 1 if stride is None else int(stride[axis])
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        single = squeeze_mask is not None and bool(squeeze_mask[axis])
        cuts.append((first or 0) if single else slice(first, last, step))
    return tuple(cuts)


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """`size` elements from `begin` on; -1 takes what is left."""
    cuts = [slice(int(b), None if int(s) == -1 else int(b) + int(s)) for b, s in zip(begin, size, strict=True)]
    return x[tuple(cuts)]


def tile(x: Array, reps: Array) -> Array:
    return np.tile(x, [int(r) for r in reps])


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Array | float = 0.0) -> Array:
    """Pads the last len(pad) / 2 axes, (before, after) for each in the order of the axes."""
    flat = [int(p) for p in pad]
    widths = [(0, 0)] * (x.ndim - len(flat) // 2) + list(zip(flat[::2], flat[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    if mode == "reflect":
        return np.pad(x, widths, mode="reflect")
    if mode == "replicate":
        return np.pad(x, widths, mode="edge")
    raise ValueError(f"pad mode {mode!r}")


def fill_like(ref_tensor: Array, value: Array | float = 0.0) -> Array:
    """`value` in the shape of `ref_tensor`."""
    return np.full(ref_tensor.shape, value, np.asarray(value).dtype)


def gather(
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 (numpy always validates)
) -> Array:
    """x[..., indices, ...] along `axis`; negative indices count from the end."""
    if int(batch_dims):
        raise ValueError("gather with batch_dims is not executed here")
    return np.take(x, indices.astype(np.int64), axis=int(axis))


def pixel_unshuffle(x: Array, downscale_factor: Array | int) -> Array:
    """Space to depth: (N, C, H, W) -> (N, C f f, H/f, W/f), a channel's f x f elements side by side, row by row."""
    (n, c, h, w), f = x.shape, int(downscale_factor)
    return x.reshape(n, c, h // f, f, w // f, f).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * f * f, h // f, w // f)


def pixel_shuffle(x: Array, upscale_factor: Array | int) -> Array:
    """Depth to space, the inverse: (N, C f f, H, W) -> (N, C, H f, W f)."""
    (n, c, h, w), f = x.shape, int(upscale_factor)
    return x.reshape(n, c // f**2, f, f, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // f**2, h * f, w * f)


def cast(x: Array, dtype: str) -> Array:
    """Another dtype; a float becomes an integer by truncation, anything but zero is true."""
    if dtype not in CASTS:
        raise ValueError(f"cast to {dtype!r}")
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(CASTS[dtype])


def gather_along_axis(
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 (numpy always validates)
) -> Array:
    """out[..., i, ...] = x[..., indices[..., i, ...], ...] along `axis`, in the shape of `indices`."""
    return np.take_along_axis(x, indices.astype(np.int64), axis=int(axis))


def gather_nd(
    x: Array,
    indices: Array,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001 (numpy always validates)
) -> Array:
    """x at the places that the last axis of `indices` names. Raises ValueError with batch_dims."""
    if int(batch_dims):
        raise ValueError("gather_nd with batch_dims is not executed here")
    out: Array = x[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))]
    return out


def reverse(x: Array, axes: Array | None = None) -> Array:
    """Back to front along `axes`, all unless given."""
    return np.flip(x, None if axes is None else tuple(int(a) for a in axes))


def cumsum(x: Array, axis: Array | int = 0, exclusive: Array | bool = False, reverse: Array | bool = False) -> Array:
    """Sums of the elements up to each along `axis`, without it if `exclusive`; from the end if `reverse`."""
    at = int(axis)
    ordered = np.flip(x, at) if reverse else x
    sums = np.cumsum(ordered, axis=at, dtype=x.dtype)
    sums = sums - ordered if exclusive else sums
    out: Array = np.flip(sums, at) if reverse else sums
    return out
