"""A plan becomes a bundle: the only file that wires the stages together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from dualtoken_deploy.bundle.manifest import COMPLETE
from dualtoken_deploy.bundle.store import new_folder
from dualtoken_deploy.errors import OutputError
from dualtoken_deploy.models.count import count_params
from dualtoken_deploy.pipeline.build import build_bundle, build_command, why_no_build
from dualtoken_deploy.pipeline.calibrated import write_calibrated
from dualtoken_deploy.pipeline.check import ExportResult, check_and_complete, draft_manifest
from dualtoken_deploy.pipeline.plan import Plan
from dualtoken_deploy.pipeline.speed import race, slow_warnings
from dualtoken_deploy.targets.precision import NO_CALIBRATION
from dualtoken_deploy.targets.request import Request, compile_files, run_exporter

Tell = Callable[[str], None]


def make(plan: Plan, progress: Tell | None = None) -> ExportResult:
    """Writes the bundle of a plan, checks its saved files against eager, and only then gives it its name.

    Raises WeightsError, OutputError, ConversionError, and ToleranceError where the files do not reach the tolerance; no
    bundle is left then. A target that is built on its device is built where that is here; elsewhere the result's
    `state` is "prepared", or "compiled" where a compiler needs no device.
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    with new_folder(plan.output, plan.force) as folder:
        tell("building the eager model")
        module = plan.source.make()
        check_space(folder, module)
        request = _request(plan)
        if plan.precision.calibration == NO_CALIBRATION:
            manifest = draft_manifest(plan, module, request, run_exporter(plan.target, module, request, folder, tell))
        else:
            manifest = write_calibrated(plan, module, request, folder, tell)
        manifest = compile_files(plan.target, request, folder, manifest, tell)
        result = check_and_complete(plan, folder, manifest, module, request.labels, tell)
        speed = race(plan, module, request, folder, tell)
    warnings = _warnings(plan) + result.warnings + slow_warnings(plan, speed)
    result = replace(result, bundle=str(plan.output), warnings=warnings, speed=speed)
    if plan.target.built_by:
        result = build_here(result, plan.output, tell)
    return replace(result, seconds=round(time.perf_counter() - start, 1))


def _request(plan: Plan) -> Request:
    outputs = plan.source.outputs(plan.contract.size, plan.contract.tensor.shape[0])
    weights = plan.source.weights
    said = weights["source"] if "seed" not in weights else f"{weights['source']}, seed {weights['seed']}"
    described = {key: str(plan.source.described[key]) for key in ("variant", "head") if key in plan.source.described}
    metadata = {"variant": plan.source.name, **described, "precision": plan.precision.name, "weights": said}
    return Request(
        precision=plan.precision.name,
        contract=plan.contract,
        outputs=outputs,
        opset=plan.opset,
        metadata=metadata,
        device=plan.device,
        labels=plan.source.class_names(outputs),
        settings=plan.settings,
        task=plan.task.name,
    )


def _warnings(plan: Plan) -> tuple[str, ...]:
    if not plan.source.random_weights:
        return ()
    return (f"weights are random (seed {plan.source.weights['seed']}): answers mean nothing",)


def build_here(result: ExportResult, bundle: Path, tell: Tell) -> ExportResult:
    """Finishes a prepared bundle where the device is here; elsewhere says what is left to do."""
    reason = why_no_build(result.target)
    if reason:
        return replace(result, next_step=f"{reason}; on the device run: {build_command(bundle)}")
    built = build_bundle(bundle, progress=tell)
    return replace(result, state=COMPLETE, executed_precision=built.executed_precision)


def check_space(folder: Path, model: nn.Module) -> None:
    """Some converters leave a short file behind when space runs out, and say nothing: so ask before."""
    # float32 weights, a quarter for the graph, 8 MiB for the rest
    needed = 4 * count_params(model) * 5 // 4 + (8 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent} has {free >> 20} MiB free and the bundle may take {needed >> 20} MiB; "
            "make room or choose another --output"
        )
