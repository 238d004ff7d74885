"""What each layer's rounding does to the outputs, so that assignments are weighed without being written or run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from dualtoken_deploy.numerics import Array


@dataclass(frozen=True)
class Sensitivity:
    """`errors` (units, samples): what each unit's rounding adds to the outputs along random directions, to first order,
    over the size of the outputs along such directions. Errors of units add up, with their signs, so noise that two
    layers share counts four times and what cancels does not count. `how`: where the figures are from.
    """

    units: tuple[str, ...]
    errors: Array
    how: str

    @staticmethod
    def independent(noise: Mapping[str, float], how: str) -> Sensitivity:
        """Of units whose noise-to-signal ratios are known and nothing else: one sample each, so none are shared."""
        sizes = np.sqrt(np.array(list(noise.values())) * max(len(noise), 1))
        return Sensitivity(tuple(noise), np.diag(sizes), how)

    def noise(self, in_float: Collection[str] = ()) -> float:
        """The noise-to-signal ratio of the outputs with all units but those `in_float` in INT8."""
        rows = [i for i, name in enumerate(self.units) if name not in in_float]
        return float((self.errors[rows].sum(0) ** 2).mean()) if rows else 0.0

    def alone(self) -> dict[str, float]:
        """The noise-to-signal ratio with each unit alone in INT8."""
        return dict(zip(self.units, (self.errors**2).mean(1).tolist(), strict=True))

    def choose(self, macs: Mapping[str, int], most: float) -> frozenset[str]:
        """Units that go to float so that the noise is at most `most`, few MACs of them.

        The unit that takes most noise away for its MACs goes first; what turns out not to be needed comes back, the
        largest first.
        """
        row = {name: self.errors[i] for i, name in enumerate(self.units)}
        kept: list[str] = []
        left = [name for name in self.units if name in macs]
        total = self.errors.sum(0)
        while left and float((total**2).mean()) > most:
            gains = {name: float((total**2).mean() - ((total - row[name]) ** 2).mean()) for name in left}
            best = max(left, key=lambda n: gains[n] / max(macs[n], 1))
            if gains[best] <= 0:  # errors cancel: then the largest one by itself
                best = max(left, key=lambda n: float((row[n] ** 2).mean()))
            total = total - row[best]
            kept.append(best)
            left.remove(best)
        for name in sorted(kept, key=lambda n: -macs[n]):
            if float(((total + row[name]) ** 2).mean()) <= most:
                total = total + row[name]
                kept.remove(name)
        return frozenset(kept)
