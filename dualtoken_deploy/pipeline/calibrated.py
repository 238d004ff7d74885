"""Precisions that need pictures: INT8 by search over a target's float program, and ranges that an exporter measures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.pipeline.check import draft_manifest
from dualtoken_deploy.pipeline.plan import Plan
from dualtoken_deploy.quantize.calibration import CalibrationSet, HeldOut, examples, open_calibration
from dualtoken_deploy.quantize.gate import Int8Options, quantize_within_budget
from dualtoken_deploy.quantize.judge import Judge, make_judge
from dualtoken_deploy.quantize.latest import Latest, fingerprint
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import RunnerOptions, load_runner
from dualtoken_deploy.targets.precision import SEARCH
from dualtoken_deploy.targets.request import Request, Samples, run_exporter, run_quantizer
from dualtoken_deploy.targets.runner import counted, run_each
from dualtoken_deploy.tasks.base import Outputs

Tell = Callable[[str], None]


def write_calibrated(plan: Plan, module: nn.Module, request: Request, folder: Path, tell: Tell) -> Manifest:
    """Writes the files of a calibrated precision into `folder`; returns the draft of their manifest.

    Raises UsageError, DatasetError, ConversionError, and ToleranceError where the loss is beyond the budget.
    """
    if plan.int8 is None:  # calibrated on the built-in photographs, and no loss is measured
        return _with_ranges(plan, module, request, examples(plan.task, request.contract), folder, tell)
    tell(f"reading calibration images from {plan.int8.calibration}")
    calibration, held_out = open_calibration(
        plan.task, plan.int8.calibration, request.contract, plan.int8.size, request.labels
    )
    judge = _judge(plan, module, request, held_out, plan.int8, tell)
    if plan.precision.calibration == SEARCH:
        return _searched(plan, module, request, calibration, judge, plan.int8, folder, tell)
    found = _with_ranges(plan, module, request, calibration, folder, tell)
    return _within_budget(plan, found, judge, plan.int8, folder, tell)


_EXPECTED: Latest[list[Outputs]] = Latest()  # several targets of one model are held against one run of it


def _judge(
    plan: Plan, module: nn.Module, request: Request, held_out: HeldOut, options: Int8Options, tell: Tell
) -> Judge:
    def run() -> list[Outputs]:
        with EagerRunner(module, request.contract, request.outputs, RunnerOptions()) as eager:
            inputs = counted(held_out.inputs, tell, "running eager on held-out images")
            return list(run_each(eager, request.contract, inputs))

    pictures = hashlib.sha256(np.ascontiguousarray(held_out.inputs).tobytes()).hexdigest()
    expected = _EXPECTED.get(fingerprint(module, request.contract, request.outputs, pictures), run)
    return make_judge(plan.task, held_out, expected, options.metric, request.contract.size, len(request.labels))


def _searched(
    plan: Plan,
    module: nn.Module,
    request: Request,
    calibration: CalibrationSet,
    judge: Judge,
    options: Int8Options,
    folder: Path,
    tell: Tell,
) -> Manifest:
    """INT8 in as many layers as the budget allows, judged on the target's own runtime."""
    row = plan.target
    prepared = run_quantizer(row, module, request, calibration, options, tell)
    found = draft_manifest(plan, module, request, prepared.artifact)
    checked = replace(found, target=row.checked_by or row.name)

    def run(place: Path, inputs: Array) -> Iterator[Outputs]:
        with load_runner(Bundle(place, checked)) as runner:
            yield from run_each(runner, request.contract, counted(inputs, tell, "running the files on held-out images"))

    said = quantize_within_budget(row.name, prepared.backend, calibration, judge, options, run, folder, tell)
    return replace(found, calibration=said)


def _with_ranges(
    plan: Plan, module: nn.Module, request: Request, calibration: CalibrationSet, folder: Path, tell: Tell
) -> Manifest:
    """The files of an exporter that measures ranges itself."""
    samples = Samples(calibration.inputs, _said(calibration))
    artifact = run_exporter(plan.target, module, replace(request, samples=samples), folder, tell)
    return draft_manifest(plan, module, request, artifact)


def _within_budget(
    plan: Plan, found: Manifest, judge: Judge, options: Int8Options, folder: Path, tell: Tell
) -> Manifest:
    """What was written, measured on held-out pictures. Raises ToleranceError where it loses more than it may."""
    inputs = judge.held_out.inputs
    with load_runner(Bundle(folder, found)) as runner:
        each = counted(inputs, tell, "measuring the loss on held-out images")
        score = judge.score(list(run_each(runner, found.input, each)))
    if score.drop > options.max_drop:
        raise ToleranceError(
            f"{plan.what} as {plan.target.name} {plan.precision.name} loses {score.drop:.2f} points of {judge.metric} "
            f"on {judge.held_out.name}, the budget is {options.max_drop:g}: raise --max-drop, calibrate on other "
            "pictures, or take --precision int8, eight bits of weights and float16 for the rest; no bundle was written"
        )
    assert found.calibration is not None  # noqa: S101  # the exporter says what it measured ranges on
    said = replace(
        found.calibration,
        held_out=HeldOutSet(judge.held_out.name, len(inputs)),
        metric=judge.metric,
        max_drop=options.max_drop,
        drop=score.drop,
        sqnr_db=score.sqnr_db,
    )
    return replace(found, calibration=said)


def _said(calibration: CalibrationSet) -> Calibration:
    return calibration.describe("minmax", "coremltools linear_symmetric, int8")
