"""Looks into a graph: any of its values by name, from a run with extra outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx

from dualtoken_deploy.numerics import Array


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of the model whose values of these names are outputs too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {o.name for o in copy.graph.output}
    for name in names:
        if name not in present:
            copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return copy


class Prober:
    """The values of these names for any input, computed by ONNX Runtime without optimisation."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._feed = model.graph.input[0].name
        self._asked = list(names)
        self._inside = [n for n in names if n != self._feed]
        self._session: Any = ort.InferenceSession(
            with_outputs(model, self._inside).SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Array) -> dict[str, Array]:
        """All values for one batch that the graph takes."""
        values = dict(zip(self._inside, self._session.run(self._inside, {self._feed: inputs}), strict=True))
        if self._feed in self._asked:
            values[self._feed] = inputs
        return values

    def run_each(self, inputs: Array) -> dict[str, Array]:
        """All values for inputs given one at a time, joined along the first axis."""
        runs = [self.run(inputs[i : i + 1]) for i in range(len(inputs))]
        return {name: np.concatenate([run[name] for run in runs]) for name in self._asked}
