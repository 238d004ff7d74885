"""What a precision is: in what weights are stored and activations computed, and what it asks for to be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dualtoken_deploy.spec import Tolerance

# How a precision gets its ranges: it needs none; it measures them on pictures; it also searches which layers take it
NO_CALIBRATION, RANGES, SEARCH = "none", "ranges", "search"

# 2**-(bits of the fraction), IEEE 754 and bfloat16
_STEPS = MappingProxyType({"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7})


@dataclass(frozen=True)
class Precision:
    """One precision of a target. `weights` and `activations` name number formats, `calibration` is NO_CALIBRATION,
    RANGES or SEARCH; `tolerance`: what saved files must reach against eager.

    `floats`: of one with pairs, what it computes in beside them; `opset`: of its ONNX, None for the target's own;
    `oldest`: the compute capability of NVIDIA's GPUs from which on they have it; `part`: the module in the target's
    folder whose `prepare` quantizes, so that one more of a precision is a row and a file.
    """

    name: str
    weights: str
    activations: str
    tolerance: Tolerance
    calibration: str = NO_CALIBRATION
    floats: str = ""
    opset: int | None = None
    oldest: tuple[int, int] | None = None
    part: str = "quantize"

    @property
    def exact(self) -> bool:
        """Whether it is that of eager."""
        return self.weights == self.activations == "float32"

    @property
    def integers(self) -> bool:
        """Whether matrix products run in integers, of which an INT8 share is counted."""
        return self.weights == self.activations == "int8"

    @property
    def step(self) -> float | None:
        """Between a number at one and the next, of the coarser of the formats that are stored and computed in; None
        where both are integers."""
        steps = [_STEPS[name] for name in (self.weights, self.activations) if name in _STEPS]
        return max(steps, default=None)

    @property
    def beside(self) -> str:
        """The number format of what has no pairs."""
        return self.floats or self.activations

    @property
    def weight_only(self) -> bool:
        """Whether integers are stored, and floats computed."""
        return self.weights.startswith("int") and not self.activations.startswith("int")

    @property
    def title(self) -> str:
        """For tables: a precision that leaves activations in float says so."""
        return f"{self.name} (weights only)" if self.weight_only else self.name


def by_name(*rows: Precision) -> Mapping[str, Precision]:
    return MappingProxyType({row.name: row for row in rows})
