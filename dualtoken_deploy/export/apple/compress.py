"""Weight compression by coremltools.optimize, by the project's names of precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.export.apple.source import first_line, quiet


def _int8(model: Any, grouped: bool) -> Any:  # noqa: ARG001 (one signature for all)
    """int8, symmetric, one scale an output channel."""
    import coremltools.optimize.coreml as cto

    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def _palettize(bits: int) -> Callable[[Any, bool], Any]:
    def compress(model: Any, grouped: bool) -> Any:
        """k-means tables of 2^bits entries: one a tensor, or one for GROUP output channels where iOS18 allows it."""
        import coremltools.optimize.coreml as cto

        # 256 entries for every few channels would weigh as much as the indices; they pay for 16 and 64
        settings = {"granularity": "per_grouped_channel", "group_size": GROUP} if grouped and bits < 8 else {}
        config = cto.OpPalettizerConfig(mode="kmeans", nbits=bits, **settings)
        return cto.palettize_weights(model, cto.OptimizationConfig(config))

    return compress


GROUP = 32  # output channels that share a table
COMPRESSIONS: Mapping[str, Callable[[Any, bool], Any]] = MappingProxyType(
    {"int8": _int8, "palettized4": _palettize(4), "palettized6": _palettize(6), "palettized8": _palettize(8)}
)


def compress(model: Any, precision: str, grouped: bool) -> Any:
    """The model with compressed weights; tensors below coremltools' threshold of 2,048 elements stay float16.

    `grouped`: the deployment target has tables for groups of channels. Raises ConversionError.
    """
    try:
        with quiet():
            return COMPRESSIONS[precision](model, grouped)
    except Exception as error:  # coremltools raises what its passes raise
        raise ConversionError(f"coremltools cannot compress to {precision}: {first_line(error)}") from error
