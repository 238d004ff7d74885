"""The algebra of the deploy form: tensors in, tensors out, no modules. Exact in real arithmetic; fold in float64."""

from __future__ import annotations

import torch
from torch import Tensor

Affine = tuple[Tensor, Tensor]  # weight, bias


def norm_into_conv(
    weight: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> Affine:
    """BatchNorm(W * x) = W' * x + b', with r = gamma / sqrt(variance + epsilon): W' = r W, b' = beta - r mean.

    `weight` (out, in/groups, kh, kw), the others (out,).
    """
    ratio = gamma / torch.sqrt(variance + epsilon)
    return weight * ratio[:, None, None, None], beta - ratio * mean


def affine_into_linear(weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor) -> Affine:
    """W (gamma x + beta) + b = (W diag(gamma)) x + (W beta + b). `weight` (out, in), gamma and beta (in,)."""
    shift = weight @ beta
    return weight * gamma, shift if bias is None else shift + bias


def gain_into_linear(weight: Tensor, bias: Tensor, gain: Tensor | float) -> Affine:
    """gain (W x + b) = (diag(gain) W) x + gain b. `gain` is a number or one per output (out,)."""
    gain = torch.as_tensor(gain, dtype=weight.dtype)
    return weight * gain.reshape(-1, 1), bias * gain


def bilinear_matrix(source: int, target: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The (target, source) matrix of one-dimensional bilinear interpolation with align_corners=False.

    Output i reads at x = max((i + 0.5) source / target - 0.5, 0): weight 1 - t at floor(x), t = x - floor(x) at the
    next sample, which at the end is the last one again.
    """
    at = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=source - 1)
    high = (low + 1).clamp(max=source - 1)
    t = at - low
    matrix = torch.zeros(target, source, dtype=torch.float64)
    rows = torch.arange(target)
    matrix.index_put_((rows, low), 1 - t, accumulate=True)
    matrix.index_put_((rows, high), t, accumulate=True)
    return matrix.to(dtype)


def resize_matrix(source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of an (h, w) map as one (H*W, h*w) matrix over its row-major flattening.

    Interpolation is separable, so R = R_rows (x) R_columns, the Kronecker product.
    """
    return torch.kron(bilinear_matrix(source[0], target[0]), bilinear_matrix(source[1], target[1]))


def split_columns(weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """W [a; b] = W_a a + W_b b. `weight` (out, in) -> (out, first), (out, in - first)."""
    return weight[:, :first], weight[:, first:]


def row_major_patches(vector: Tensor) -> Tensor:
    """Reorders the last axis, four patches of C, from (0,0) (1,0) (0,1) (1,1) to (0,0) (0,1) (1,0) (1,1)."""
    a, b, c, d = vector.chunk(4, dim=-1)
    return torch.cat((a, c, b, d), dim=-1)


def project_values(weight: Tensor, bias: Tensor, projection: Tensor, heads: int) -> Affine:
    """Moves an attention's output projection in front of its weighted sum, head by head.

    sum_h P_h (A_h v_h) = sum_h A_h (P_h v_h) with v_h = V_h g + c_h, hence V'_h = P_h V_h and c'_h = P_h c_h, where P_h
    are the columns of `projection` (C, C) that read head h. (C, C), (C,) -> (heads*C, C), (heads*C,).
    """
    blocks = zip(projection.chunk(heads, dim=1), weight.chunk(heads), bias.chunk(heads), strict=True)
    projected = [(p @ v, p @ c) for p, v, c in blocks]
    return torch.cat([v for v, _ in projected]), torch.cat([c for _, c in projected])


def pooled_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernel that with stride 2 does what a 3x3 one and an average over 2x2 do: the mean of its four shifts.

    `weight` (out, in, 3, 3) -> (out, in, 4, 4). With padding 1 both see the same zeros at the border.
    """
    kernel = weight.new_zeros(*weight.shape[:2], 4, 4)
    for down in (0, 1):
        for right in (0, 1):
            kernel[:, :, down : down + 3, right : right + 3] += weight / 4
    return kernel
