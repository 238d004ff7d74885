"""Builds the engine of an NVIDIA bundle, or runs a compiled one, on the device: no torch, golden as the judge."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.manifest import CLASSIFY, COMPLETE, Manifest
from dualtoken_deploy.bundle.store import GOLDEN, LABELS, MANIFEST, Bundle, new_folder, write_bundle
from dualtoken_deploy.errors import MissingError, ToleranceError, UsageError
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.load import Execution, load_runner
from dualtoken_deploy.targets.nvidia.builder import BuildOptions
from dualtoken_deploy.targets.nvidia.engine import ENGINE
from dualtoken_deploy.targets.nvidia.network import parse_batches
from dualtoken_deploy.targets.table import TARGETS, get_target
from dualtoken_deploy.use.inspect import check_share, int8_share, kind_precision, product_precision
from dualtoken_deploy.use.validate import measure, run_batches
from dualtoken_deploy.use.validate_dense import compare_golden

__all__ = ["BuildOptions", "BuildResult", "build_bundle", "build_command", "parse_batches", "why_no_build"]

Tell = Callable[[str], None]
LOST_SHARE = 0.05  # of the MACs: so much may TensorRT leave in float of what was quantized


@dataclass(frozen=True)
class BuildResult:
    """The engine that was built and what was measured on it, against the golden logits."""

    bundle: str
    tensorrt: str
    gpu: str
    executed_precision: str
    sqnr_db: float
    size_mib: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def why_no_build(target: str = "tensorrt") -> str | None:
    """Why no engine of that target can be built here, in one sentence; None where it can."""
    try:
        get_target(target).part("build").host()
    except MissingError as error:
        return str(error)
    return None


def build_command(bundle: Path) -> str:
    """What to run on the device."""
    return shlex.join(["dualtoken", "build", str(bundle)])


def build_bundle(
    bundle: Bundle | str | Path,
    options: BuildOptions | None = None,
    rebuild: bool = False,
    progress: Tell | None = None,
) -> BuildResult:
    """Puts model.engine, and the inspector's engine.json, beside the ONNX of a TensorRT bundle, once they are checked.

    A bundle of TensorRT for RTX has its engine already, which is run and checked.

    The bundle stays as it was where anything fails. Raises UsageError (another target; built already and no
    `rebuild`), MissingError (no TensorRT, no GPU), ConversionError, ToleranceError (golden, or float32 layers).
    """
    start, tell = time.perf_counter(), progress or (lambda _: None)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.verify()
    _check_buildable(opened, rebuild)
    vendor = get_target(opened.manifest.target).part("build")
    host = vendor.host()
    with new_folder(opened.path, force=True) as folder:
        for name in opened.manifest.files:
            if name not in (*vendor.FILES, GOLDEN, LABELS):
                shutil.copy2(opened.path / name, folder / name)
        build = vendor.make(folder, opened.manifest, options or BuildOptions(), host, rebuild, tell)
        tell("checking the engine against the golden logits")
        manifest = _checked(opened, folder, replace(opened.manifest, state=COMPLETE, build=build), vendor.CONFIRMS)
        write_bundle(folder, manifest, opened.golden, opened.labels)
    return BuildResult(
        bundle=str(opened.path),
        tensorrt=host.tensorrt,
        gpu=host.gpu,
        executed_precision=product_precision(manifest.executed_precision),
        sqnr_db=round(manifest.measured["engine"]["sqnr_db"], 1),
        size_mib=round((opened.path / ENGINE).stat().st_size / 2**20, 2),
        seconds=round(time.perf_counter() - start, 1),
    )


def _check_buildable(bundle: Bundle, rebuild: bool) -> None:
    built = [name for name, row in TARGETS.items() if row.built_by == "build"]
    if bundle.manifest.target not in built:
        names = " and ".join(built)
        raise UsageError(f"{bundle.path} is a bundle for {bundle.manifest.target}; only {names} bundles are built")
    if bundle.manifest.state == COMPLETE and not rebuild:
        raise UsageError(f"{bundle.path} has an engine already; give --rebuild to build it anew from its ONNX")
    if MANIFEST in bundle.manifest.files or "model.onnx" not in bundle.manifest.files:
        raise UsageError(f"{bundle.path} has no model.onnx to build from; export it again")


def _checked(source: Bundle, folder: Path, manifest: Manifest, confirms: bool) -> Manifest:
    """The manifest with what the engine does, measured on the saved file. `confirms`: its inspector's types are held
    against what was promised. Raises ToleranceError."""
    contract, tolerance = manifest.input, manifest.tolerance
    with load_runner(Bundle(folder, manifest)) as runner:
        if manifest.task == CLASSIFY:
            numbers = measure(source.golden["logits"], run_batches(runner, contract, source.golden["input"]))
        else:
            found = compare_golden(source, runner)
            numbers = {**asdict(found), "top1_agreement": found.agreement}
        execution = runner.execution()
    _check_golden(manifest, numbers, tolerance)
    allowed = (manifest.build or {}).get("float32_share_allowed")
    if allowed is not None:
        check_share(manifest.precision, execution.float32_share, allowed)
    measured = {**manifest.measured, "engine": numbers}
    if manifest.calibration is not None and confirms:
        measured["int8_mac_share"] = _check_int8(manifest, execution)
    return replace(manifest, executed_precision=kind_precision(execution), measured=measured)


def _check_int8(manifest: Manifest, execution: Execution) -> float:
    """The share of the MACs that the engine runs in INT8. Raises ToleranceError far below what was planned."""
    planned = (manifest.calibration or {})["planned_int8_mac_share"]
    share, floats = int8_share(manifest, execution)
    if share < planned - LOST_SHARE:
        raise ToleranceError(
            f"{100 * planned:.1f} % of the MACs were quantized, the engine runs {100 * share:.1f} % in INT8 (not: "
            f"{', '.join(floats[:3])}, ...); the bundle was left as it was"
        )
    return share


def _check_golden(manifest: Manifest, numbers: dict[str, Any], tolerance: Tolerance) -> None:
    if numbers["sqnr_db"] < tolerance.sqnr_db or numbers["top1_agreement"] < tolerance.top1_agreement:
        raise ToleranceError(
            f"the {manifest.precision} engine is out of tolerance on golden: SQNR {numbers['sqnr_db']:.1f} dB (needs "
            f"{tolerance.sqnr_db:g}), equal top-1 {numbers['top1_agreement']:.4g} (needs "
            f"{tolerance.top1_agreement:g}); the bundle was left as it was"
        )
