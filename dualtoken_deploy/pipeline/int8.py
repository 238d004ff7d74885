"""The calibrated part of the pipeline: INT8 by search over a float graph, and Core ML's 8-bit activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.quantize.calibration import Array, CalibrationSet, open_calibration
from dualtoken_deploy.quantize.gate import Int8Options, make_reference, quantize_within_budget
from dualtoken_deploy.targets.backends import open_backend
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import RunnerOptions, load_runner
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.targets.request import Artifact, Request, Samples, run_exporter
from dualtoken_deploy.targets.table import Target
from dualtoken_deploy.use.validate import run_batches

Tell = Callable[[str], None]
# Of the MACs: so much may a runtime leave in float of what was quantized for it. OpenVINO 2026.4 leaves 5.5 points (T
# mix at 224: small products of attention); a graph whose linear layers are not taken at all loses forty and more.
LOST_SHARE = 0.08


def write_int8(
    model: ImageModel,
    row: Target,
    request: Request,
    options: Int8Options,
    labels: tuple[str, ...],
    folder: Path,
    draft: Callable[[Artifact], Manifest],
    tell: Tell,
) -> Manifest:
    """Writes the INT8 files of a target into `folder`; returns the draft of their manifest with the calibration.

    Raises UsageError, DatasetError, ConversionError, and ToleranceError where the budget cannot be held.
    """
    if request.contract.batch not in (None, 1):
        raise UsageError(
            f"int8 takes a batch of 1 or dynamic, not {request.contract.batch}: calibration goes one by one"
        )
    tell(f"reading calibration images from {options.calibration}")
    calibration, held_out = open_calibration(options.calibration, request.contract, options.size, labels)
    tell(f"running eager on {len(held_out.inputs)} held-out images")
    with EagerRunner(model, request.contract, request.outputs, RunnerOptions()) as eager:
        reference = make_reference(held_out, run_batches(eager, request.contract, held_out.inputs), options.metric)
    source = replace(request, precision="fp32")
    exported = export_onnx(model, source, DEFAULT_RULES, request.opset or DECOMPOSED_OPSET, tell)
    found = draft(Artifact(exported.rules, exported.operators))
    checked = replace(found, target=row.checked_by or row.name)

    def run(place: Path, inputs: Array) -> Array:
        with load_runner(Bundle(place, checked)) as runner:
            return run_batches(runner, request.contract, inputs)

    backend = open_backend(row.name, options.quantizer, exported.model, calibration, options.method, tell)
    said = quantize_within_budget(row.name, exported.model, backend, calibration, reference, options, run, folder, tell)
    return replace(found, calibration=said)


def write_w8a8(
    model: ImageModel,
    row: Target,
    request: Request,
    options: Int8Options | None,
    labels: tuple[str, ...],
    folder: Path,
    draft: Callable[[Artifact], Manifest],
    tell: Tell,
) -> Manifest:
    """Writes the files of a target whose exporter calibrates itself; returns the draft of their manifest.

    `options` None: ranges of the built-in photographs, and no loss is measured. Otherwise it is, on held-out pictures.
    Raises UsageError, DatasetError, ConversionError, and ToleranceError where the loss is beyond the budget.
    """
    if options is None:
        images = open_dataset("photographs")
        calibration = CalibrationSet(
            images.name, load_batch(images.images, request.contract), images.digest(contents=True)
        )
        return draft(run_exporter(row, model, replace(request, samples=_samples(calibration)), folder, tell))
    if options.method != "minmax" or options.quantizer is not None:
        raise UsageError(f"{row.name} {request.precision} takes minmax ranges; leave --calibrator and --quantizer out")
    tell(f"reading calibration images from {options.calibration}")
    calibration, held_out = open_calibration(options.calibration, request.contract, options.size, labels)
    with EagerRunner(model, request.contract, request.outputs, RunnerOptions()) as eager:
        reference = make_reference(held_out, run_batches(eager, request.contract, held_out.inputs), options.metric)
    found = draft(run_exporter(row, model, replace(request, samples=_samples(calibration)), folder, tell))
    tell(f"measuring the loss on {len(held_out.inputs)} held-out images")
    with load_runner(Bundle(folder, found)) as runner:
        score = reference.score(run_batches(runner, request.contract, held_out.inputs))
    if score.drop > options.max_drop:
        raise ToleranceError(
            f"{found.variant} as {row.name} {request.precision} loses {score.drop:.2f} points of {reference.metric} on "
            f"{held_out.name}, the budget is {options.max_drop:g}: raise --max-drop, calibrate on other pictures, or "
            "take --precision int8, whose activations stay float16; no bundle was written"
        )
    said = replace(
        found.calibration or _said(calibration),
        held_out=HeldOutSet(held_out.name, len(held_out.inputs)),
        metric=reference.metric,
        max_drop=options.max_drop,
        drop=score.drop,
        sqnr_db=score.sqnr_db,
    )
    return replace(found, calibration=said)


def _samples(calibration: CalibrationSet) -> Samples:
    return Samples(calibration.inputs, _said(calibration))


def _said(calibration: CalibrationSet) -> Calibration:
    return calibration.describe("minmax", "coremltools linear_symmetric, int8")


def check_executed(planned: float, executed: float, floats: tuple[str, ...], what: str) -> None:
    """Raises ToleranceError where a runtime runs much less in INT8 than was quantized for it: it was not applied."""
    if executed < planned - LOST_SHARE:
        raise ToleranceError(
            f"{what} was quantized for {100 * planned:.1f} % of the MACs, but only {100 * executed:.1f} % run in INT8 "
            f"here (in float: {', '.join(floats[:3])}, ...); no bundle was written"
        )
