"""When a sample is enough to say that a budget is broken: a test that may be looked at after every picture."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

ERROR_RATE = 0.05  # of all assignments that do hold the budget, at most so many are given up early
BETS = (0.1, 0.25, 0.5, 0.75, 0.95)  # shares of its wealth that each gambler stakes; their mean is a martingale too


class Overdrawn:
    """Whether pictures drawn at random, without putting back, lose more on average than a budget allows.

    Under "the mean of all `pictures` is at most the budget" the wealth of a gambler who bets on losses is a
    supermartingale; by Ville's inequality it ever reaches 1 / ERROR_RATE with a probability of ERROR_RATE at most
    (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024, section 5).
    """

    def __init__(self, pictures: int, budget: float) -> None:
        """`budget`: the mean loss allowed, 0..1, where each picture's loss lies in -1..1."""
        self._all, self._seen, self._sum = pictures, 0, 0.0
        self._mean = (1 + budget) / 2  # of losses shifted to 0..1
        self._wealth = np.ones(len(BETS))

    def add(self, loss: float) -> bool:
        """One more picture's loss. True once the budget is broken, as far as can be told."""
        value = (1 + loss) / 2
        left = self._all * self._mean - self._sum  # what the rest sums up to, were the mean the budget itself
        expected = left / (self._all - self._seen)
        self._seen, self._sum = self._seen + 1, self._sum + value
        if expected <= 0:
            return True  # more is lost already than all pictures may
        if expected < 1:
            self._wealth *= 1 + np.array(BETS) / expected * (value - expected)
        return bool(self._wealth.mean() >= 1 / ERROR_RATE)


def breaks(losses: Iterable[float], pictures: int, budget: float) -> int | None:
    """After how many of these losses the test says that the budget is broken; None: it does not."""
    test = Overdrawn(pictures, budget)
    return next((n for n, loss in enumerate(losses, 1) if test.add(loss)), None)
