"""Which methods pay for a model: the noise at its outputs, on pictures of the calibration that ranges did not see.

Scales a channel make small channels count, and a channel's range from few pictures is soon left by others: T (mix)
gains 12 dB by them, EfficientNet-Lite0 with ranges of ten photographs loses 14. Which it is cannot be told from the
pictures that the ranges are of, so ranges are taken from a part of them first, and the others judge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import onnx

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.differentiable import TorchGraph
from dualtoken_deploy.targets.onnx.qdq import ALL_METHODS, Methods, QdqQuantizer, Style
from dualtoken_deploy.targets.onnx.values import Prober

MOST, JUDGES = 20, 6  # pictures that ranges are taken from here, and that judge
CANDIDATES = (ALL_METHODS, replace(ALL_METHODS, migration=False))


def choose_methods(
    model: onnx.ModelProto,
    calibration: CalibrationSet,
    style: Style,
    method: str,
    tell: Callable[[str], None],
    candidates: Sequence[Methods] | None = None,
    slow: Collection[str] = (),
) -> Methods:
    """The candidate with the least noise."""
    if candidates is None:  # weights of eight bits gain too little by second order for what it costs
        candidates = [replace(c, rounding=style.reduce_range) for c in CANDIDATES]
    seen, judging = parted(len(calibration.inputs))
    part, judges = calibration.part(seen), calibration.inputs[judging]
    ends = list(TorchGraph(model).run(judges[:1], lambda _node, _attributes, _given, made: made))
    exact = Prober(model, ends).run_each(judges)
    noises = []
    for number, candidate in enumerate(candidates, 1):
        tell(f"choosing how to quantize: {number} of {len(candidates)}")
        quantized = QdqQuantizer(model, part, style, method, methods=candidate, slow=slow).quantize()
        noises.append(_noise(exact, Prober(quantized, ends).run_each(judges)))
    return candidates[int(np.argmin(noises))]


def parted(count: int) -> tuple[Array, Array]:
    """Numbers of the pictures for ranges and of those that judge: every third, few of each, spread over all."""
    numbers = np.arange(count)
    judges = numbers % 3 == 2
    return _spread(numbers[~judges], MOST), _spread(numbers[judges], JUDGES)


def _spread(numbers: Array, most: int) -> Array:
    chosen: Array = numbers[np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(int)]
    return chosen


def _noise(exact: dict[str, Array], found: dict[str, Array]) -> float:
    """The noise-to-signal ratio, every output alike."""
    ratios = [
        float(((found[name] - value) ** 2).sum() / max(float((value**2).sum()), 1e-30))
        for name, value in exact.items()
        if value.dtype.kind == "f"
    ]
    return float(np.mean(ratios)) if ratios else 0.0
