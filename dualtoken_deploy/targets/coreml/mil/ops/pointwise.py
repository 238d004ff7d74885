"""Element-wise operations. Definitions: coremltools' documentation of MIL, elementwise_unary, elementwise_binary and
activation.

A float16 input of a unary function is looked up among all 65,536 float16 values, each computed in float64: exact
rounding, and faster than arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from dualtoken_deploy.targets.runner import Array

Function = Callable[[Array], Array]

_ERF_LIMIT, _ERF_STEPS = 6.0, 512  # erf(6) is 1 in float64; samples for each unit
_HALF_MAX = 65504.0


@lru_cache(maxsize=1)
def _erf_table() -> tuple[Array, Array]:
    at = np.arange(int(_ERF_LIMIT * _ERF_STEPS) + 2) / _ERF_STEPS
    values = np.array([math.erf(x) for x in at])
    slopes = 2 / math.sqrt(math.pi) * np.exp(-(at**2)) / _ERF_STEPS
    return values, slopes


def erf_of(x: Array) -> Array:
    """erf in float64 to about 1e-13: cubic Hermite interpolation between samples of math.erf and its derivative."""
    values, slopes = _erf_table()
    scaled = np.minimum(np.abs(x).astype(np.float64), _ERF_LIMIT) * _ERF_STEPS
    scaled = np.nan_to_num(scaled)
    low = scaled.astype(np.int64)
    t = scaled - low
    low_value, low_slope = values[low], slopes[low]
    rise = values[low + 1] - low_value
    high_slope = slopes[low + 1]
    curve = low_value + t * (low_slope + t * ((3 * rise - 2 * low_slope - high_slope)
                                              + t * (low_slope + high_slope - 2 * rise)))  # fmt: skip
    out: Array = np.where(np.isnan(x), np.nan, np.copysign(curve, x))
    return out


def _gelu_exact(x: Array) -> Array:
    out: Array = 0.5 * x * (1 + erf_of(x * math.sqrt(0.5)))
    return out


def _gelu_tanh(x: Array) -> Array:
    out: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return out


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), written so that no exponential overflows."""
    e = np.exp(-np.abs(x))
    out: Array = np.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return out


def _gelu_sigmoid(x: Array) -> Array:
    return x * _sigmoid(1.702 * x)


GELU_MODES: dict[str, Function] = {
    "EXACT": _gelu_exact,
    "TANH_APPROXIMATION": _gelu_tanh,
    "SIGMOID_APPROXIMATION": _gelu_sigmoid,
}

# Each takes and gives float32 or float64.
UNARY: dict[str, Function] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": erf_of,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.rint,
    "sigmoid": _sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
    "square": lambda x: x * x,
    "tanh": np.tanh,
}


@lru_cache(maxsize=64)
def _half_table(name: str) -> Array:
    """f of every float16, by its bits."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    function = UNARY.get(name) or GELU_MODES[name]
    with np.errstate(all="ignore"):
        return function(every).astype(np.float16)


def apply_unary(name: str, x: Array) -> Array:
    """f(x) for a name of UNARY or GELU_MODES, in x's own float dtype; float16 by table."""
    if x.dtype == np.float16:
        out: Array = _half_table(name)[np.ascontiguousarray(x).view(np.uint16)]
        return out
    with np.errstate(all="ignore"):
        return (UNARY.get(name) or GELU_MODES[name])(x).astype(x.dtype)


def unary(name: str) -> Callable[..., Array]:
    """The MIL operation of that name: parameter x alone."""

    def operation(x: Array) -> Array:
        return apply_unary(name, x)

    return operation


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode not in GELU_MODES:
        raise ValueError(f"gelu mode {mode!r}")
    return apply_unary(mode, x)


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(x, alpha, beta)


def leaky_relu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, alpha * x)


def rsqrt(x: Array, epsilon: Array | float = 1e-12) -> Array:
    """1 / sqrt(x + epsilon)."""
    out: Array = 1 / np.sqrt(x + epsilon)
    return out


def inverse(x: Array, epsilon: Array | float = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    out: Array = 1 / (x + epsilon)
    return out


def log(x: Array, epsilon: Array | float = 1e-45) -> Array:
    """ln(x + epsilon)."""
    out: Array = np.log(x + epsilon)
    return out


# add, sub, mul, ... of x and y, with numpy's broadcasting, which is MIL's.
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "floor_div": np.floor_divide,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "pow": np.power,
    "real_div": np.true_divide,
    "sub": np.subtract,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


def binary(name: str) -> Callable[..., Array]:
    """The MIL operation of that name: parameters x and y."""
    function = BINARY[name]

    def operation(x: Array, y: Array) -> Array:
        out: Array = np.asarray(function(x, y))
        return out

    return operation


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def logical_not(x: Array) -> Array:
    return np.logical_not(x)
