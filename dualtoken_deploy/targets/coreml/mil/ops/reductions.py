"""Reductions, normalisations and pooling. Inputs are float32 (or float64); the executor rounds what they give.

Definitions: coremltools' documentation of MIL, reduction, normalization, activation (softmax) and pool.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from dualtoken_deploy.targets.coreml.mil.ops.windows import padding, sizes
from dualtoken_deploy.targets.runner import Array


def _log_sum_exp(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    """ln sum e^x, with the largest taken out first."""
    top = x.max(axis=axis, keepdims=True)
    out: Array = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return out if keepdims else np.squeeze(out, axis)


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "reduce_l1_norm": lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims),
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt((x * x).sum(axis=axis, keepdims=keepdims)),
    "reduce_log_sum": lambda x, axis, keepdims: np.log(x.sum(axis=axis, keepdims=keepdims)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_sum_square": lambda x, axis, keepdims: (x * x).sum(axis=axis, keepdims=keepdims),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
}


def reduction(name: str) -> Callable[..., Array]:
    """The MIL operation of that name; without axes over all of them."""
    function = REDUCTIONS[name]

    def operation(x: Array, axes: Array | None = None, keep_dims: Array | bool = False) -> Array:
        over = None if axes is None else tuple(int(a) for a in np.atleast_1d(axes))
        out: Array = np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))
        return out

    return operation


def softmax(x: Array, axis: Array | int = -1) -> Array:
    """e^(x - max) / sum e^(x - max)."""
    e = np.exp(x - x.max(axis=int(axis), keepdims=True))
    out: Array = e / e.sum(axis=int(axis), keepdims=True)
    return out


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over `axes` (all unless given), which gamma and beta span."""
    over = tuple(range(x.ndim)) if axes is None else tuple(sorted(int(a) % x.ndim for a in axes))
    centred = x - x.mean(axis=over, keepdims=True)
    variance = np.mean(centred * centred, axis=over, keepdims=True)
    out: Array = centred / np.sqrt(variance + epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, each of these one number a channel (axis 1)."""
    shape = (-1, *(1,) * (x.ndim - 2))
    out: Array = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + epsilon)
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Array | float = 1e-5
) -> Array:
    """Normalises every channel of every sample over its spatial axes."""
    over = tuple(range(2, x.ndim))
    centred = x - x.mean(axis=over, keepdims=True)
    out: Array = centred / np.sqrt(np.mean(centred * centred, axis=over, keepdims=True) + epsilon)
    shape = (-1, *(1,) * (x.ndim - 2))
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def max_pool(
    x: Array,
    kernel_sizes: Array,
    pad_type: str,
    strides: Array | None = None,
    pad: Array | None = None,
    ceil_mode: Array | bool = False,
) -> Array:
    """Largest element of each window; padding never wins. (N, C, *D)."""
    windows, _ = _windows(x, kernel_sizes, pad_type, strides, pad, bool(ceil_mode), -np.inf)
    out: Array = np.max(windows, axis=0)
    return out


def avg_pool(
    x: Array,
    kernel_sizes: Array,
    pad_type: str,
    strides: Array | None = None,
    pad: Array | None = None,
    exclude_padding_from_average: Array | bool = False,
    ceil_mode: Array | bool = False,
) -> Array:
    """Mean of each window, its padding counted as zeros or not at all. (N, C, *D)."""
    windows, inside = _windows(x, kernel_sizes, pad_type, strides, pad, bool(ceil_mode), 0.0)
    counted = inside[0] if exclude_padding_from_average else inside[1]
    out: Array = np.sum(windows, axis=0) / np.sum(counted, axis=0)
    return out


def _windows(
    x: Array, kernel_sizes: Array, pad_type: str, strides: Array | None, pad: Array | None, ceil_mode: bool, fill: float
) -> tuple[list[Array], tuple[list[Array], list[Array]]]:
    """One strided view of the padded map for each kernel element; and the same views of two masks: what is of `x`, and
    what is of `x` or of its declared padding (ceil_mode reads beyond, which never counts)."""
    kernel = [int(k) for k in kernel_sizes]
    stride = sizes(strides, len(kernel))
    pads = padding(pad_type, pad, x.shape[2:], kernel, stride)
    counts = []
    for n, (a, b), k, s in zip(x.shape[2:], pads, kernel, stride, strict=True):
        room = n + a + b - k
        count = (-(-room // s) if ceil_mode else room // s) + 1
        counts.append(count - 1 if ceil_mode and (count - 1) * s >= n + a else count)
    extra = [
        max((c - 1) * s + k - (n + a + b), 0)
        for c, s, k, n, (a, b) in zip(counts, stride, kernel, x.shape[2:], pads, strict=True)
    ]
    widths = [(a, b + e) for (a, b), e in zip(pads, extra, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill)
    real = np.pad(np.ones(x.shape[2:], x.dtype), widths)
    declared = np.pad(np.ones([n + a + b for n, (a, b) in zip(x.shape[2:], pads, strict=True)], x.dtype),
                      [(0, e) for e in extra])  # fmt: skip
    cuts = [
        tuple(slice(e, e + (c - 1) * s + 1, s) for e, c, s in zip(element, counts, stride, strict=True))
        for element in product(*(range(k) for k in kernel))
    ]
    everything = (slice(None), slice(None))
    return [padded[everything + cut] for cut in cuts], ([real[c] for c in cuts], [declared[c] for c in cuts])
