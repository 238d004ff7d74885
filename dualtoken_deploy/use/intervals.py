"""How sure a figure is that was counted over a number of pictures: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Z = 1.959964  # of the normal distribution, two-sided 95 %
GROUPS = 10
T_9 = 2.262157  # of Student's distribution with GROUPS - 1 degrees of freedom, two-sided 95 %

Item = TypeVar("Item")


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def wilson(successes: float, total: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); of shares in 0..1 that were averaged it is on the safe side.

    Raises ValueError where `total` is below 1.
    """
    if total < 1:
        raise ValueError("a share of nothing has no interval")
    share, square = successes / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Of the share of True in `first` less that in `second`, for answers to the same pictures.

    Newcombe 1998 (Statistics in Medicine 17, method 10): Wilson's intervals of both shares, joined with their
    correlation. Raises ValueError on unequal lengths, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers are not in pairs")
    one, two = np.asarray(first, bool), np.asarray(second, bool)
    total = len(one)
    p1, p2 = float(one.mean()), float(two.mean())
    w1, w2 = wilson(int(one.sum()), total), wilson(int(two.sum()), total)
    phi = _correlation(int((one & two).sum()), int((one & ~two).sum()), int((~one & two).sum()), total)
    down = _joined(p1 - w1.low, w2.high - p2, phi)
    up = _joined(w1.high - p1, p2 - w2.low, phi)
    return Interval(p1 - p2 - down, p1 - p2 + up)


def _joined(one: float, two: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))


def _correlation(both: int, first: int, second: int, total: int) -> float:
    """phi of a fourfold table, its numerator lessened for continuity as the method asks; 0 where a margin is empty."""
    neither = total - both - first - second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    top = float(both * neither - first * second)
    if top > 0:
        top = max(top - total / 2, 0)
    return top / math.sqrt(margins)


def jackknife(items: Sequence[Item], measure: Callable[[Sequence[Item]], float]) -> Interval | None:
    """Of a measure that is no mean over the items, such as AP: the delete-a-group jackknife with GROUPS groups.

    None where there are fewer items than groups.
    """
    if len(items) < GROUPS:
        return None
    parts = [[item for i, item in enumerate(items) if i % GROUPS != group] for group in range(GROUPS)]
    values = np.array([measure(part) for part in parts])
    error = math.sqrt((GROUPS - 1) / GROUPS * float(((values - values.mean()) ** 2).sum()))
    whole = measure(items)
    return Interval(whole - T_9 * error, whole + T_9 * error)
