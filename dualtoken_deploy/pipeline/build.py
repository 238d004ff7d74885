"""Builds the engine of an NVIDIA bundle, or runs a compiled one, on the device: no torch, golden as the judge."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.blocks import Calibration, Figures
from dualtoken_deploy.bundle.manifest import COMPLETE, Manifest
from dualtoken_deploy.bundle.store import DOCUMENTS, GOLDEN, LABELS, MANIFEST, Bundle, new_folder, write_bundle
from dualtoken_deploy.errors import MissingError, ToleranceError, UsageError
from dualtoken_deploy.prove.describe import documents
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.load import Execution, load_runner
from dualtoken_deploy.targets.nvidia.builder import BuildOptions
from dualtoken_deploy.targets.nvidia.engine import ENGINE
from dualtoken_deploy.targets.nvidia.network import parse_batches
from dualtoken_deploy.targets.table import TARGETS, get_target
from dualtoken_deploy.tasks.base import Likeness
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.inspect import check_share, int8_share, kind_precision, product_precision
from dualtoken_deploy.use.validate import compare_golden

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

    A bundle of TensorRT for RTX has its engine already, which is run and checked. Either stays as it was where
    anything fails. Raises UsageError (another target; built already and no `rebuild`), MissingError (no library, no
    GPU), ConversionError, ToleranceError (golden, or float32 layers).
    """
    start, tell = time.perf_counter(), progress or (lambda _: None)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.verify()
    _check_buildable(opened, rebuild)
    vendor = get_target(opened.manifest.target).part("build")
    host = vendor.host()
    with new_folder(opened.path, force=True) as folder:
        for name in opened.manifest.files:
            if name not in (*vendor.FILES, GOLDEN, LABELS, *DOCUMENTS):
                shutil.copy2(opened.path / name, folder / name)
        build = vendor.make(folder, opened.manifest, options or BuildOptions(), host, rebuild, tell)
        tell("checking the engine against the golden logits")
        built = replace(opened.manifest, state=COMPLETE, build=build, files={})  # a draft, until it is checked
        manifest, numbers = _checked(opened, folder, built, vendor.CONFIRMS)
        write_bundle(folder, manifest, opened.golden, opened.labels, documents)
    return BuildResult(
        bundle=str(opened.path),
        tensorrt=host.tensorrt,
        gpu=host.gpu,
        executed_precision=product_precision(manifest.executed_precision),
        sqnr_db=round(numbers.sqnr_db, 1),
        size_mib=round((opened.path / ENGINE).stat().st_size / 2**20, 2),
        seconds=round(time.perf_counter() - start, 1),
    )


def _check_buildable(bundle: Bundle, rebuild: bool) -> None:
    if get_target(bundle.manifest.target).built_by != "build":
        names = " and ".join(name for name, row in TARGETS.items() if row.built_by == "build")
        raise UsageError(f"{bundle.path} is a bundle for {bundle.manifest.target}; only {names} bundles are built")
    if bundle.manifest.state == COMPLETE and not rebuild:
        raise UsageError(f"{bundle.path} has an engine already; give --rebuild to build it anew from its ONNX")
    if MANIFEST in bundle.manifest.files or "model.onnx" not in bundle.manifest.files:
        raise UsageError(f"{bundle.path} has no model.onnx to build from; export it again")


def _checked(source: Bundle, folder: Path, manifest: Manifest, confirms: bool) -> tuple[Manifest, Figures]:
    """The manifest with what the engine does, measured on the saved file, and that. `confirms`: the types that its
    inspector names are held against what was promised, and not only kept. Raises ToleranceError."""
    with load_runner(Bundle(folder, manifest)) as runner:
        found = compare_golden(source, runner)
        execution = runner.execution()
    _check_golden(manifest, found, manifest.tolerance)
    if manifest.build is not None and manifest.build.float32_share_allowed is not None:
        check_share(manifest.precision, execution.float32_share, manifest.build.float32_share_allowed)
    figures = Figures.of(get_task(manifest.task).numbers(found))
    measured = replace(manifest.measured, engine=figures)
    if manifest.calibration is not None:
        share, _ = int8_share(manifest, execution)
        if confirms:
            _check_int8(manifest, manifest.calibration, execution)
        measured = replace(measured, int8_mac_share=share)
    return replace(manifest, executed_precision=kind_precision(execution), measured=measured), figures


def _check_int8(manifest: Manifest, calibration: Calibration, execution: Execution) -> None:
    """Raises ToleranceError where the engine runs far less of the MACs in INT8 than was planned."""
    planned = calibration.planned_int8_mac_share or 0.0
    share, floats = int8_share(manifest, execution)
    if share < planned - LOST_SHARE:
        raise ToleranceError(
            f"{100 * planned:.1f} % of the MACs were quantized, the engine runs {100 * share:.1f} % in INT8 (not: "
            f"{', '.join(floats[:3])}, ...); the bundle was left as it was"
        )


def _check_golden(manifest: Manifest, found: Likeness, wanted: Tolerance) -> None:
    agreement = 1.0 if found.agreement is None else found.agreement
    if found.sqnr_db < wanted.sqnr_db or agreement < wanted.top1_agreement:
        raise ToleranceError(
            f"the {manifest.precision} engine is out of tolerance on golden: SQNR {found.sqnr_db:.1f} dB (needs "
            f"{wanted.sqnr_db:g}), equal {get_task(manifest.task).alike} {agreement:.4g} (needs "
            f"{wanted.top1_agreement:g}); the bundle was left as it was"
        )
