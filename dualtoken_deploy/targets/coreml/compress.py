"""Weight compression by coremltools.optimize, by the project's names of precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.apple.torch_program import quiet
from dualtoken_deploy.targets.coreml.validation import validated_once
from dualtoken_deploy.targets.runner import Array


def _int8(model: Any, grouped: bool) -> Any:  # noqa: ARG001 (one signature for all)
    """int8, symmetric, one scale an output channel."""
    import coremltools.optimize.coreml as cto

    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def _palettize(bits: int) -> Callable[[Any, bool], Any]:
    def compress(model: Any, grouped: bool) -> Any:
        """Tables of 2^bits entries: one a tensor, or one for GROUP output channels where iOS18 allows it."""
        import coremltools.optimize.coreml as cto

        table = partial(cto.OpPalettizerConfig, mode="custom", lut_function=partial(palette, bits=bits))
        if grouped and bits < 8:  # 256 entries for every few channels would weigh as much as the indices
            own = table(granularity="per_grouped_channel", group_size=GROUP)
            model = cto.palettize_weights(model, cto.OptimizationConfig(own))
        # and whatever is left: tensors whose channels GROUP does not divide stay float16 in the first pass
        return cto.palettize_weights(model, cto.OptimizationConfig(table()))

    return compress


def palette(weights: Array, bits: int) -> tuple[Array, Array]:
    """k-means of weights with 2^bits centres: (centres in the weights' dtype, uint8 index of each weight).

    Lloyd's iteration over the sorted distinct values. It begins at centres whose density goes with the cube root of the
    weights' own, which is optimal for many centres (Panter and Dite, 1951). coremltools' own k-means takes minutes for
    8 bits, and for tensors of less than 10,000 weights needs scikit-learn, which it does not install.
    """
    values, inverse, counts = np.unique(weights.reshape(-1), return_inverse=True, return_counts=True)
    table = np.zeros(1 << bits, weights.dtype)
    if len(values) <= len(table):
        table[: len(values)] = values
        return table, inverse.astype(np.uint8)
    at = values.astype(np.float64)
    mass = np.concatenate([[0], np.cumsum(counts, dtype=np.float64)])
    moment = np.concatenate([[0], np.cumsum(counts * at)])
    centres = _first_centres(at, counts, len(table))
    for _ in range(ITERATIONS):
        edges = np.searchsorted(at, (centres[1:] + centres[:-1]) / 2)
        low, high = np.concatenate([[0], edges]), np.concatenate([edges, [len(at)]])
        total = mass[high] - mass[low]
        new = np.where(total > 0, (moment[high] - moment[low]) / np.maximum(total, 1), centres)
        if np.array_equal(new, centres):
            break
        centres = np.sort(new)
    table[:] = centres
    rounded = table.astype(np.float64)
    nearest = np.searchsorted((rounded[1:] + rounded[:-1]) / 2, at)
    return table, nearest[inverse].astype(np.uint8)


def _first_centres(at: Array, counts: Array, number: int) -> Array:
    """Centres in the middle of equal shares of the integral of density^(1/3), density = count / gap between values."""
    gaps = np.diff(at)
    weight = np.cbrt((counts[1:] + counts[:-1]) / 2) * np.cbrt(gaps) ** 2
    spread = np.concatenate([[0], np.cumsum(weight)])
    out: Array = np.interp((np.arange(number) + 0.5) / number * spread[-1], spread, at)
    return out


GROUP = 32  # output channels that share a table
ITERATIONS = 300
COMPRESSIONS: Mapping[str, Callable[[Any, bool], Any]] = MappingProxyType(
    {
        "int8": _int8,
        "int8-w8a8": _int8,
        "palettized4": _palettize(4),
        "palettized6": _palettize(6),
        "palettized8": _palettize(8),
    }
)


def compress(model: Any, precision: str, grouped: bool) -> Any:
    """The model with compressed weights; tensors below coremltools' threshold of 2,048 elements stay float16.

    `grouped`: the deployment target has tables for groups of channels. Raises ConversionError.
    """
    try:
        with quiet(), validated_once():
            return COMPRESSIONS[precision](model, grouped)
    except Exception as error:  # coremltools raises what its passes raise
        raise ConversionError(f"coremltools cannot compress to {precision}: {first_line(error)}") from error
