"""The selective scan of Mamba's S6 (Gu and Dao, arXiv:2312.00752), by its definition and as runtimes can have it.

    h_t = exp(D_t A) h_{t-1} + D_t B_t x_t        y_t = C_t h_t        h_0 = 0

A is diagonal and negative: (N, E), a decay for each of N states of each of E channels; the step D_t (E) and B_t, C_t
(N) depend on the input. No runtime has an operator for it, so `chunked_scan` is sums and products of fixed shapes,
without Loop or Scan: the sequence is cut into K chunks of Q; all chunks run their Q steps side by side from zero; the K
states at their ends follow one another, which gives the state that each chunk begins with; and all chunks run once more
from there. Each factor is the exp of a sum of D A, which is at most 0: nothing grows, whatever the precision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def stepwise_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The definition, token by token. x, delta (..., L, E), a (..., 1, N, E), b, c (..., L, N) -> (..., L, E).

    `a` is negative and broadcasts over what lies in front.
    """
    a = a.squeeze(-3)
    state = torch.zeros_like(delta[..., 0, None, :] * a)
    out = []
    for t in range(x.shape[-2]):
        step = delta[..., t, None, :]  # (..., 1, E)
        state = torch.exp(step * a) * state + b[..., t, :, None] * (step * x[..., t, None, :])  # (..., N, E)
        out.append((c[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(out, dim=-2)


def chunk_length(length: int) -> int:
    """Q near the root of L: then the steps in a chunk and the chunks, both unrolled, are fewest together."""
    return max(1, math.isqrt(max(length - 1, 0)) + 1)


def chunked_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int | None = None) -> Tensor:
    """What stepwise_scan gives, of the same tensors, with about 2 sqrt(L) steps instead of L.

    `chunk`: Q; None: chunk_length(L). A length that Q does not divide is filled with steps of 0, which leave the state.
    """
    length, q = x.shape[-2], chunk or chunk_length(x.shape[-2])
    fill = -length % q
    u = x * delta
    if fill:
        u, delta, b, c = (F.pad(t, (0, 0, 0, fill)) for t in (u, delta, b, c))
    u, delta, b, c = (t.reshape(*t.shape[:-2], -1, q, t.shape[-1]) for t in (u, delta, b, c))  # (..., K, Q, E or N)
    decays, givens, ends = _from_zero(u, delta, a, b)
    states = _over_chunks(ends, torch.exp(delta.sum(-2, keepdim=True) * a))
    out = []
    for decay, given, c_t in zip(decays, givens, torch.split(c, 1, dim=-2), strict=True):
        states = decay * states + given  # (..., K, N, E)
        out.append(c_t @ states)  # (..., K, 1, E)
    y = torch.cat(out, dim=-2).flatten(-3, -2)
    return y[..., :length, :] if fill else y


def _from_zero(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """exp(D_t A) and B_t D_t x_t of each step, (..., K, N, E) Q times, and the state that a chunk from zero ends in."""
    decays, givens = [], []
    state: Tensor | None = None
    for u_t, delta_t, b_t in zip(*(torch.split(t, 1, dim=-2) for t in (u, delta, b)), strict=True):
        decays.append(torch.exp(delta_t * a))
        givens.append(b_t.transpose(-1, -2) * u_t)
        state = givens[-1] if state is None else decays[-1] * state + givens[-1]
    assert state is not None  # noqa: S101 (for the type checker: a chunk has a step)
    return decays, givens, state


def _over_chunks(ends: Tensor, decay: Tensor) -> Tensor:
    """The state in which each chunk begins, from those in which chunks from zero end. All (..., K, N, E)."""
    parts, decays = torch.split(ends, 1, dim=-3), torch.split(decay, 1, dim=-3)
    begins = [torch.zeros_like(parts[0])]
    for k in range(len(parts) - 1):
        begins.append(decays[k] * begins[-1] + parts[k] if k else parts[0])
    return torch.cat(begins, dim=-3)
