"""The selective scan of Mamba's S6 (Gu and Dao, arXiv:2312.00752), by its definition and as runtimes can have it.

    h_t = exp(D_t A) h_{t-1} + D_t B_t x_t        y_t = C_t h_t        h_0 = 0

A is diagonal and negative: (N, E), a decay for each of N states of each of E channels; the step D_t (E) and B_t, C_t
(N) depend on the input. No runtime has an operator for it, so `chunked_scan` is sums and products of fixed shapes,
without Loop or Scan: the sequence is cut into K chunks of Q; all chunks run their Q steps side by side from zero; the K
states at their ends follow one another, in chunks of chunks again, which gives the state that each begins with; and all
run once more from there. Each factor is the exp of a sum of D A, which is at most 0: nothing grows in any precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


OVER = (5, 10)  # nodes a step, and a level, of the groups of chunks
MOST = 28  # Q at most: 56 steps have twice the nodes, and gain a sixth of the time (docs/decisions/012)


def chunk_length(length: int) -> int:
    """Q: near the root of L, where what a step reads and writes stays in a cache, MOST at most."""
    root = max(1, math.isqrt(max(length - 1, 0)) + 1)
    return min(root, MOST)


@cache
def group_length(count: int) -> int:
    """How many of `count` states, each behind a chunk, follow one another in a group, so that the nodes are fewest;
    `count`: all, one by one."""
    return _fewest(count)[1]


@cache
def _fewest(count: int) -> tuple[int, int]:
    groups = ((OVER[0] * q + OVER[1] + 6 * (count % q > 0) + _fewest(-(-count // q))[0], q) for q in range(2, count))
    return min([(2 * count, count), *groups])


def chunked_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int | None = None) -> Tensor:
    """What stepwise_scan gives, of the same tensors, with tens of steps instead of L.

    `chunk`: Q; None: chunk_length(L). A length that Q does not divide is filled with steps of 0, which leave the state.
    No tensor has more axes than (..., K, N, E), since Core ML takes five. Inside `as_operator` it is one node.
    """
    if _as_operator and chunk is None:
        out: Tensor = torch.ops.dualtoken.selective_scan(x, delta, a, b, c)
        return out
    length, q = x.shape[-2], chunk or chunk_length(x.shape[-2])
    n, e = a.shape[-2:]
    us, deltas, cs = (torch.split(_chunks(t, q), 1, dim=-2) for t in (x * delta, delta, c))  # Q of (..., K, 1, E or N)
    bs = torch.split(_chunks(b, q).transpose(-1, -2), 1, dim=-1)  # Q of (..., K, N, 1)
    # a step at a time, so that what it touches stays in a cache: all exponentials at once take twice as long
    decays, givens, over = [torch.exp(deltas[0] * a)], [bs[0] * us[0]], deltas[0]
    state = givens[0]  # (..., K, N, E)
    for u_t, delta_t, b_t in zip(us[1:], deltas[1:], bs[1:], strict=True):
        decays.append(torch.exp(delta_t * a))
        givens.append(b_t * u_t)
        state, over = decays[-1] * state + givens[-1], over + delta_t
    begins = _begins(state.flatten(-2), torch.exp(over * a).flatten(-2))
    state = begins.reshape(*begins.shape[:-1], n, e)
    found = []
    for decay, given, c_t in zip(decays, givens, cs, strict=True):
        state = decay * state + given
        found.append(c_t @ state)  # (..., K, 1, E)
    y = torch.cat(found, dim=-2).flatten(-3, -2)
    return y if y.shape[-2] == length else y[..., :length, :]


def _chunks(x: Tensor, q: int) -> Tensor:
    """(..., L, F) -> (..., K, Q, F), filled up with zeros."""
    if fill := -x.shape[-2] % q:
        x = F.pad(x, (0, 0, 0, fill))
    return x.reshape(*x.shape[:-2], -1, q, x.shape[-1])


def _begins(ends: Tensor, decays: Tensor) -> Tensor:
    """The state in which each of K chunks begins, from those in which chunks from zero end and what is left of a state
    behind a chunk. All (..., K, F). Many chunks are done as tokens are: in groups side by side."""
    count = ends.shape[-2]
    q = group_length(count)
    if q == count:
        end, decay = (torch.split(t, 1, dim=-2) for t in (ends, decays))
        out = [torch.zeros_like(end[0])]
        for k in range(count - 1):
            out.append(decay[k] * out[-1] + end[k] if k else end[0])
        return torch.cat(out, dim=-2)
    end, decay = (torch.split(_chunks(t, q), 1, dim=-2) for t in (ends, decays))  # q of (..., K / q, 1, F)
    within, left = end[0], decay[0]
    for more, keeps in zip(end[1:], decay[1:], strict=True):
        within, left = keeps * within + more, left * keeps
    out = [_begins(within.squeeze(-2), left.squeeze(-2)).unsqueeze(-2)]
    for k in range(q - 1):
        out.append(decay[k] * out[-1] + end[k])
    found = torch.cat(out, dim=-2).flatten(-3, -2)
    return found if found.shape[-2] == count else found[..., :count, :]


class Scanned(nn.Module):
    """A module that scans: exporters know by it that a graph will have thousands of nodes."""


_as_operator = False


@contextmanager
def as_operator() -> Iterator[None]:
    """Lets chunked_scan be `torch.ops.dualtoken.selective_scan`, which an exporter translates by itself: tracing the
    thousands of nodes of a ViM2 takes minutes, and writing them down seconds."""
    global _as_operator
    before, _as_operator = _as_operator, True
    try:
        yield
    finally:
        _as_operator = before


@torch.library.custom_op("dualtoken::selective_scan", mutates_args=())
def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """stepwise_scan as an operation of torch."""
    return stepwise_scan(x, delta, a, b, c)


@selective_scan.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x)
