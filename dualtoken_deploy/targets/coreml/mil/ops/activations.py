"""Activations with parameters. Definitions: coremltools' documentation of MIL, activation.

Arithmetic is in float32; the executor rounds to the declared dtype.
"""

from __future__ import annotations

import numpy as np

from dualtoken_deploy.targets.runner import Array


def clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    """min(beta, x) above 0, min(beta, alpha x) below."""
    return np.minimum(beta, np.where(x >= 0, x, alpha * x))


def elu(x: Array, alpha: Array) -> Array:
    """x above 0, alpha (e^x - 1) below."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def linear_activation(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha x + beta."""
    out: Array = alpha * x + beta
    return out


def prelu(x: Array, alpha: Array) -> Array:
    """x above 0, alpha x below, with an alpha for each channel (axis 1)."""
    return np.where(x > 0, x, alpha.reshape(-1, *(1,) * (x.ndim - 2)) * x)


def scaled_tanh(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha tanh(beta x)."""
    out: Array = alpha * np.tanh(beta * x)
    return out


def sigmoid_hard(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha x + beta between 0 and 1."""
    out: Array = np.clip(alpha * x + beta, 0, 1)
    return out


def softplus(x: Array) -> Array:
    """ln(1 + e^x), written so that no exponential overflows."""
    out: Array = np.logaddexp(x, np.zeros((), x.dtype))
    return out


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha ln(1 + e^(beta x)), with both for each channel (axis 1)."""
    shape = (-1, *(1,) * (x.ndim - 2))
    out: Array = alpha.reshape(shape) * softplus(beta.reshape(shape) * x)
    return out


def thresholded_relu(x: Array, alpha: Array) -> Array:
    """x from alpha on, 0 below."""
    return np.where(x >= alpha, x, np.zeros((), x.dtype))
