"""What the search asks of a target's quantizer: which products there are, and the files of one choice of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dualtoken_deploy.quantize.search import Unit
from dualtoken_deploy.quantize.sensitivity import Sensitivity


@dataclass(frozen=True)
class Products:
    """The matrix products of a float graph: MACs of each at batch 1, by the name of the value it makes. `slow`: those
    that might be INT8 and stay in float, since the engine is faster so."""

    macs: dict[str, int]
    eligible: frozenset[str]
    slow: frozenset[str] = frozenset()

    def without(self, slow: Iterable[str]) -> Products:
        """The same with some left in float for the sake of speed."""
        left = self.eligible & frozenset(slow)
        return Products(self.macs, self.eligible - left, self.slow | left)

    @property
    def slow_layers(self) -> tuple[str, ...]:
        """By name, in the order of the graph."""
        return tuple(dict.fromkeys(layer_of(value) for value in self.macs if value in self.slow))

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    @property
    def units(self) -> list[Unit]:
        """Those that may be INT8, joined by layer: an attention's two products are one."""
        layers: dict[str, int] = {}
        for value, macs in self.macs.items():
            if value in self.eligible:
                layers[layer_of(value)] = layers.get(layer_of(value), 0) + macs
        return [Unit(name, macs) for name, macs in layers.items()]


# as ONNX, TensorFlow Lite and torch call products
_PRODUCT = re.compile(
    r"/(MatMul|Conv|Gemm|FULLY_CONNECTED|BATCH_MATMUL|CONV_2D|DEPTHWISE_CONV_2D|linear|addmm|mm|bmm|matmul|conv2d)"
    r"(_\d+)?$"
)


def layer_of(value: str) -> str:
    """The layer's name of a value that one of its products makes."""
    return _PRODUCT.sub("", value)


class Backend(Protocol):
    """A float graph, calibrated; `write` makes the files of one choice of layers."""

    @property
    def products(self) -> Products: ...

    @property
    def described(self) -> str: ...

    @property
    def source(self) -> str:
        """Which float graph it is, as a hash: a search of the same one is gone on with."""
        ...

    def sensitivity(self) -> Sensitivity:
        """What each layer in INT8 does to the outputs, on pictures of the calibration."""
        ...

    def write(self, in_float: Iterable[str], folder: Path) -> None: ...
