"""A trained forecaster beside the last value and linear baselines, on the val part of its data.

    python benchmarks/forecast_table.py WEIGHTS_OR_BUNDLE DATA

The linear baselines are ridge regressions from the L last steps to the H next ones, less the last value, as DLinear and
its kin subtract it: one for all variates, one a variate, and one from all variates to all. Their strength is chosen on
the last fifth of the train part; then they are fitted to all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.series import open_series
from dualtoken_deploy.use.evaluate import evaluate

STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
Values = NDArray[np.float64]
Model = Callable[[tuple[Values, Values], Values, float], Values]


def windows(data: str, part: str, lookback: int, horizon: int) -> tuple[Values, Values]:
    """(N, L, M) and (N, H, M)."""
    found = open_series(data, part)
    past, future = [], []
    for i in range(len(found)):
        sample = found[i]
        if sample.series is not None and sample.future is not None:  # both are there in every series
            past.append(sample.series[-lookback:])
            future.append(sample.future[:horizon])
    return np.array(past, np.float64), np.array(future, np.float64)


def solve(x: Values, y: Values, strength: float) -> Values:
    """(F, K) with the least squared error and the least norm."""
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def shared(train: tuple[Values, Values], past: Values, strength: float) -> Values:
    x, y = (a.transpose(0, 2, 1).reshape(-1, a.shape[1]) for a in train)
    weights = solve(x, y, strength)
    return (past.transpose(0, 2, 1) @ weights).transpose(0, 2, 1)


def each(train: tuple[Values, Values], past: Values, strength: float) -> Values:
    parts = [shared((train[0][..., [m]], train[1][..., [m]]), past[..., [m]], strength) for m in range(past.shape[2])]
    return np.concatenate(parts, axis=2)


def every(train: tuple[Values, Values], past: Values, strength: float) -> Values:
    x, y = (a.reshape(len(a), -1) for a in train)
    return (past.reshape(len(past), -1) @ solve(x, y, strength)).reshape(len(past), *train[1].shape[1:])


def mse(model: Model, train: tuple[Values, Values], test: tuple[Values, Values], strength: float) -> Values:
    """(MSE, MAE) of the windows of `test`, each less its last value."""
    less = [(past - past[:, -1:], future - past[:, -1:]) for past, future in (train, test)]
    error = model(less[0], less[1][0], strength) - less[1][1]
    return np.array([np.mean(error**2), np.mean(np.abs(error))])


def main(source: str, data: str) -> None:
    found = evaluate(source, data)
    lookback, horizon = 96, 24
    train, test = (windows(data, part, lookback, horizon) for part in ("train", "val"))
    cut = len(train[0]) * 4 // 5
    fitted, chosen = (train[0][:cut], train[1][:cut]), (train[0][cut + horizon :], train[1][cut + horizon :])
    print(f"{data}: {found.images} windows, L {lookback}, H {horizon}\n\n| model | MSE | MAE |\n| --- | ---: | ---: |")
    print(f"| {source} | {found.scores['mse']:.4f} | {found.scores['mae']:.4f} |")
    for model, what in ((shared, "one for all variates"), (each, "one a variate"), (every, "all variates to all")):
        best = min(STRENGTHS, key=lambda s: mse(model, fitted, chosen, s)[0])  # called at once
        own = mse(model, train, test, best)
        print(f"| ridge, {what} (strength {best:g}) | {own[0]:.4f} | {own[1]:.4f} |")
    print(f"| last value | {found.scores['last_value_mse']:.4f} | {found.scores['last_value_mae']:.4f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
