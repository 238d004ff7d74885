"""INT8 of dense bundles: the same quantizers and the same search, judged by AP or mean IoU against eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.annotated import DenseSample, DenseSet, open_dense
from dualtoken_deploy.data.stretch import prepare_input
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.quantize.calibration import Array, CalibrationSet, HeldOut
from dualtoken_deploy.quantize.gate import Int8Options, quantize_within_budget
from dualtoken_deploy.quantize.search import Score
from dualtoken_deploy.targets.backends import open_backend
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import Runner, RunnerOptions, load_runner
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.targets.request import Artifact, Request
from dualtoken_deploy.targets.table import Target
from dualtoken_deploy.tasks import dense_outputs
from dualtoken_deploy.tasks.dense_evaluation import check_labels, image_size, score
from dualtoken_deploy.tasks.dense_outputs import Found, Likeness, interpret

Tell = Callable[[str], None]
Outputs = dict[str, Array]
HELD_OUT = 100  # pictures that the loss is measured on: an AP of fewer jumps by points
METRICS = {"detect": "ap", "segment": "miou"}


@dataclass(frozen=True)
class DenseReference:
    """Held-out pictures with their truth and eager's outputs, and what is lost against them. `metric` ap or miou."""

    held_out: HeldOut
    metric: str
    task: str
    size: tuple[int, int]
    classes: int
    samples: tuple[DenseSample, ...]
    expected: tuple[Outputs, ...]

    def score(self, outputs: Sequence[Outputs], count: int | None = None) -> Score:
        """Points of the metric that outputs for the first `count` pictures lose, and their SQNR."""
        expected = self.expected[:count]
        found = [dense_outputs.compare(want, got) for want, got in zip(expected, outputs, strict=True)]
        drop = 100 * (self._metric(expected) - self._metric(outputs))
        return Score(drop, _mean_sqnr(found))

    def _metric(self, outputs: Sequence[Outputs]) -> float:
        pairs: list[tuple[DenseSample, Found]] = [
            (sample, interpret(got, self.task, self.size, image_size(sample)))
            for sample, got in zip(self.samples, outputs, strict=False)  # of a quick look the first samples
        ]
        return score(pairs, self.task, self.classes)[self.metric]


def _mean_sqnr(found: Sequence[Likeness]) -> float:
    """Over pictures, of the noise: what the search adds up."""
    return float(-10 * np.log10(np.mean([10 ** (-f.sqnr_db / 10) for f in found])))


def write_dense_int8(
    module: nn.Module,
    row: Target,
    request: Request,
    options: Int8Options,
    folder: Path,
    draft: Callable[[Artifact], Manifest],
    tell: Tell,
) -> Manifest:
    """Writes the INT8 files of a target into `folder`; returns the draft of their manifest with the calibration.

    Raises UsageError, DatasetError, ConversionError, and ToleranceError where the budget cannot be held.
    """
    if options.metric is not None:
        raise UsageError(f"a dense model is judged by its {METRICS[request.task]} alone; leave --metric out")
    tell(f"reading calibration pictures from {options.calibration}")
    calibration = _calibration(open_dense(options.calibration, request.task, "train"), request, options.size)
    held_out = open_dense(options.calibration, request.task, "val").limit(HELD_OUT)
    check_labels(held_out, request.labels)
    samples = tuple(held_out[i] for i in range(len(held_out)))
    inputs = np.concatenate([prepare_input(sample.image, request.contract) for sample in samples])
    tell(f"running eager on {len(inputs)} held-out pictures")
    with EagerRunner(module, request.contract, request.outputs, RunnerOptions()) as eager:
        expected = _run(eager, inputs)
    reference = DenseReference(
        HeldOut(held_out.name, inputs, None), METRICS[request.task], request.task, request.contract.size,
        len(request.labels), samples, tuple(expected),
    )  # fmt: skip
    source = replace(request, precision="fp32")
    exported = export_onnx(module, source, DEFAULT_RULES, request.opset or DECOMPOSED_OPSET, tell)
    found = draft(Artifact(exported.rules, exported.operators))

    def run(place: Path, given: Array) -> list[Outputs]:
        with load_runner(Bundle(place, found)) as runner:
            return _run(runner, given)

    backend = open_backend(row.name, options.quantizer, exported.model, calibration, options.method, tell)
    said = quantize_within_budget(row.name, exported.model, backend, calibration, reference, options, run, folder, tell)
    return replace(found, calibration=said)


def _run(runner: Runner, inputs: Array) -> list[Outputs]:
    name = runner.inputs[0].name
    return [runner.run({name: inputs[i : i + 1]}) for i in range(len(inputs))]


def _calibration(data: DenseSet, request: Request, size: int) -> CalibrationSet:
    chosen = data.limit(size)
    inputs = np.concatenate([prepare_input(chosen[i].image, request.contract) for i in range(len(chosen))])
    return CalibrationSet.of_arrays(chosen.name, inputs, request.contract)
