"""The ONNX of `torch.ops.dualtoken.selective_scan`: what models/scan.py does, written down without being traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op

from dualtoken_deploy.models import scan


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _reshape(x: Any, lead: int, *sides: int) -> Any:
    """The first `lead` axes as they are, which may be open, the others as said."""
    return op.Reshape(x, _ints(*[0] * lead, *sides))


def _split(x: Any, axis: int, count: int) -> Sequence[Any]:
    """`count` parts of length one along an axis."""
    return [x] if count == 1 else op.Split(x, axis=axis, num_outputs=count)


def _filled(x: Any, axis: int, fill: int) -> Any:
    """`fill` zeros behind the last along the last axis but one."""
    if not fill:
        return x
    rank = axis + 2
    ends = [fill if i == axis else 0 for i in range(rank)]
    return op.Pad(x, _ints(*[0] * rank, *ends))


def _cut(x: Any, axis: int, length: int) -> Any:
    return op.Slice(x, _ints(0), _ints(length), _ints(axis))


def _selective_scan(x: Any, delta: Any, a: Any, b: Any, c: Any) -> Any:
    """chunked_scan of tensors (..., L, E or N), of which only the first axes may be open."""
    lead = len(x.shape) - 2
    length, e, n = int(x.shape[lead]), int(x.shape[lead + 1]), int(b.shape[lead + 1])
    q = scan.chunk_length(length)
    k = -(-length // q)

    def chunks(t: Any, f: int) -> Any:
        return _reshape(_filled(t, lead, k * q - length), lead, k, q, f)

    turn = [*range(lead + 1), lead + 2, lead + 1]
    us, deltas = (_split(chunks(t, e), lead + 1, q) for t in (op.Mul(x, delta), delta))
    cs = _split(chunks(c, n), lead + 1, q)
    bs = _split(op.Transpose(chunks(b, n), perm=turn), lead + 2, q)
    decays, givens, over = [op.Exp(op.Mul(deltas[0], a))], [op.Mul(bs[0], us[0])], deltas[0]
    state = givens[0]
    for t in range(1, q):
        decays.append(op.Exp(op.Mul(deltas[t], a)))
        givens.append(op.Mul(bs[t], us[t]))
        state, over = op.Add(op.Mul(decays[t], state), givens[t]), op.Add(over, deltas[t])
    ends, left = (_reshape(v, lead, k, n * e) for v in (state, op.Exp(op.Mul(over, a))))
    state = _reshape(_begins(ends, left, lead, k, n * e), lead, k, n, e)
    found = []
    for t in range(q):
        state = op.Add(op.Mul(decays[t], state), givens[t])
        found.append(op.MatMul(cs[t], state))
    y = _reshape(_joined(found, lead + 1), lead, k * q, e)
    return y if k * q == length else _cut(y, lead, length)


def _joined(parts: Sequence[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)


def _begins(ends: Any, decays: Any, lead: int, count: int, f: int) -> Any:
    """scan._begins of (..., K, F)."""
    q = scan.group_length(count)
    if q == count:
        end, decay = (_split(t, lead, count) for t in (ends, decays))
        nothing = op.Mul(end[0], op.Constant(value_float=0.0))
        out = [nothing, *end[:1]][:count]
        for k in range(1, count - 1):
            out.append(op.Add(op.Mul(decay[k], out[-1]), end[k]))
        return _joined(out, lead)
    groups = -(-count // q)
    filled = (_filled(t, lead, groups * q - count) for t in (ends, decays))
    end, decay = (_split(_reshape(t, lead, groups, q, f), lead + 1, q) for t in filled)
    within, left = end[0], decay[0]
    for k in range(1, q):
        within, left = op.Add(op.Mul(decay[k], within), end[k]), op.Mul(left, decay[k])
    within, left = (_reshape(t, lead, groups, f) for t in (within, left))
    inner = _begins(within, left, lead, groups, f)
    out = [_reshape(inner, lead, groups, 1, f)]
    for k in range(q - 1):
        out.append(op.Add(op.Mul(decay[k], out[-1]), end[k]))
    found = _reshape(_joined(out, lead + 1), lead, groups * q, f)
    return found if groups * q == count else _cut(found, lead, count)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.dualtoken.selective_scan.default: _selective_scan,
}
