"""Matrix products, convolution and attention. Inputs are float32 (or float64); the executor rounds what they give.

Definitions: coremltools' documentation of MIL, linear, conv and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from dualtoken_deploy.targets.coreml.mil.ops.reductions import softmax
from dualtoken_deploy.targets.coreml.mil.ops.windows import padding, sizes
from dualtoken_deploy.targets.runner import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b. x (..., in), weight (out, in), bias (out,)."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.T  # one product whatever the rank
    if bias is not None:
        flat += bias
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def matmul(x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False) -> Array:
    """Batched product with broadcasting; a flag transposes the last two axes."""
    out: Array = np.matmul(x.swapaxes(-1, -2) if transpose_x else x, y.swapaxes(-1, -2) if transpose_y else y)
    return out


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(Q K^T / sqrt(E) + mask) V; a bool mask keeps where it is true. (B, ..., L, E), (B, ..., S, E and EV)."""
    scores = np.matmul(query, key.swapaxes(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    out: Array = np.matmul(softmax(scores, -1), value)
    return out


def conv(
    x: Array,
    weight: Array,
    pad_type: str,
    bias: Array | None = None,
    strides: Array | None = None,
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """Convolution over 1 to 3 spatial axes. x (N, C, *D), weight (C', C/groups, *K) -> (N, C', *D')."""
    rank = x.ndim - 2
    kernel = weight.shape[2:]
    stride = sizes(strides, rank)
    dilation = sizes(dilations, rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = padding(pad_type, pad, x.shape[2:], reach, stride)
    padded = np.pad(x, [(0, 0), (0, 0), *pads]) if any(a or b for a, b in pads) else x
    out_size = [
        (size + a + b - r) // s + 1 for size, (a, b), r, s in zip(x.shape[2:], pads, reach, stride, strict=True)
    ]
    shifted = _Shifts(padded, out_size, stride, dilation)
    out = _grouped(shifted, weight, int(groups), out_size)
    return out if bias is None else out + bias.reshape(-1, *(1,) * rank)


def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    pad: Array | None = None,
    output_shape: Array | None = None,
    pad_type: str = "valid",
    strides: Array | None = None,
    dilations: Array | None = None,
    groups: Array | int = 1,
) -> Array:
    """Every input element adds the kernel, scaled, to its place of the output. (N, C, *D), weight (C, C'/groups, *K).

    Raises ValueError on another padding than "valid" and "custom".
    """
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"pad_type {pad_type!r} of a transposed convolution")
    rank, count = x.ndim - 2, int(groups)
    kernel, stride, dilation = weight.shape[2:], sizes(strides, rank), sizes(dilations, rank)
    whole = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[2:], stride, dilation, kernel, strict=True)]
    pads = padding(pad_type, pad, whole, kernel, stride)
    wanted = [n - a - b for n, (a, b) in zip(whole, pads, strict=True)]
    if output_shape is not None:
        wanted = [int(n) for n in output_shape[-rank:]]
    room = [max(n, a + w) for n, (a, _), w in zip(whole, pads, wanted, strict=True)]
    inputs = x.reshape(x.shape[0], count, x.shape[1] // count, -1)  # (N, groups, C/groups, positions)
    kernels = weight.reshape(count, x.shape[1] // count, weight.shape[1], *kernel)
    out = np.zeros((x.shape[0], count * weight.shape[1], *room), x.dtype)
    flat = kernels.reshape(*kernels.shape[:3], -1)
    for number, element in enumerate(product(*(range(k) for k in kernel))):
        taps = flat[..., number].transpose(0, 2, 1)
        found = np.matmul(taps, inputs).reshape(x.shape[0], -1, *x.shape[2:])
        cuts = [
            slice(e * d, e * d + (n - 1) * s + 1, s)
            for e, d, n, s in zip(element, dilation, x.shape[2:], stride, strict=True)
        ]
        out[(slice(None), slice(None), *cuts)] += found
    kept = [slice(a, a + w) for (a, _), w in zip(pads, wanted, strict=True)]
    out = out[(slice(None), slice(None), *kept)]
    return out if bias is None else out + bias.reshape(-1, *(1,) * rank)


class _Shifts:
    """The view of a padded map that one kernel element reads: every stride-th element from its offset on."""

    def __init__(self, padded: Array, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        self.padded, self._size, self._stride, self._dilation = padded, size, stride, dilation

    def at(self, element: Sequence[int]) -> Array:
        cuts = [
            slice(e * d, e * d + (n - 1) * s + 1, s)
            for e, d, n, s in zip(element, self._dilation, self._size, self._stride, strict=True)
        ]
        return self.padded[(slice(None), slice(None), *cuts)]


def _grouped(shifted: _Shifts, weight: Array, groups: int, size: Sequence[int]) -> Array:
    """Sums over kernel elements: depth-wise as scaled maps, anything else as one product a group."""
    outputs, per_group = weight.shape[:2]
    elements = list(product(*(range(k) for k in weight.shape[2:])))
    batch = shifted.padded.shape[0]
    if per_group == 1 and outputs == groups:
        total = np.zeros((batch, outputs, *size), shifted.padded.dtype)
        taps = weight.reshape(outputs, len(elements))
        for number, element in enumerate(elements):
            total += shifted.at(element) * taps[:, number].reshape(-1, *(1,) * len(size))
        return total
    # (N, C, K, positions) columns: one product for each group
    columns = np.stack([shifted.at(e).reshape(batch, -1, math.prod(size)) for e in elements], axis=2)
    columns = columns.reshape(batch, groups, per_group * len(elements), math.prod(size))
    kernels = weight.reshape(groups, outputs // groups, per_group * len(elements))
    out: Array = np.matmul(kernels, columns).reshape(batch, outputs, *size)
    return out
