"""How near a picture is to another: PSNR and SSIM, in numpy."""

from __future__ import annotations

import numpy as np

from dualtoken_deploy.numerics import Array

WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
C1, C2 = 0.01**2, 0.03**2  # for values of 0..1
MOST_DB = 100.0  # of equal pictures


def psnr_db(expected: Array, actual: Array) -> float:
    """-10 log10 of the mean squared error, for values of 0..1; MOST_DB at most."""
    error = float(np.mean((expected.astype(np.float64) - actual) ** 2))
    return float(min(-10 * np.log10(max(error, 1e-30)), MOST_DB))


def ssim(expected: Array, actual: Array) -> float:
    """Structural similarity (Wang et al., 2004) of pictures (C, H, W) of 0..1, the mean over channels and over all
    places where the Gaussian window fits. Raises ValueError where it fits nowhere."""
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    if min(a.shape[1:]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW}, not {a.shape[1:]}")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + C1) * (2 * both + C2)
    return float((alike / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean())


def _blur(x: Array) -> Array:
    """(C, H, W) -> (C, H - 10, W - 10)."""
    at = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(at**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    windows = np.lib.stride_tricks.sliding_window_view
    rows: Array = windows(x, WINDOW, axis=1) @ weights
    out: Array = windows(rows, WINDOW, axis=2) @ weights
    return out
