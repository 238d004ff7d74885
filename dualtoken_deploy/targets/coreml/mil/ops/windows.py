"""What convolutions and pooling share: the sizes of their windows and the padding around what they slide over."""

from __future__ import annotations

from collections.abc import Sequence

from dualtoken_deploy.targets.runner import Array


def sizes(values: Array | None, rank: int) -> list[int]:
    """Strides or dilations: all 1 unless given."""
    return [1] * rank if values is None else [int(v) for v in values]


def padding(
    pad_type: str, pad: Array | None, size: Sequence[int], reach: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, int]]:
    """Elements to pad before and after each spatial axis. Raises ValueError on an unknown pad_type."""
    if pad_type == "valid":
        return [(0, 0)] * len(size)
    if pad_type == "custom":
        flat = [0] * 2 * len(size) if pad is None else [int(p) for p in pad]
        return list(zip(flat[::2], flat[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type!r}")
    totals = [max((-(-n // s) - 1) * s + r - n, 0) for n, r, s in zip(size, reach, stride, strict=True)]
    less_first = [(t // 2, t - t // 2) for t in totals]
    return less_first if pad_type == "same" else [(b, a) for a, b in less_first]
