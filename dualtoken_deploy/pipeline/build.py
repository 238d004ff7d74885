"""Builds the engine of a prepared TensorRT bundle, on the device: no torch, no ONNX library, golden as the judge."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.blocks import Build, Calibration, Figures
from dualtoken_deploy.bundle.manifest import COMPLETE, Manifest
from dualtoken_deploy.bundle.store import GOLDEN, LABELS, MANIFEST, Bundle, new_folder, write_bundle
from dualtoken_deploy.errors import MissingError, ToleranceError, UsageError
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.load import Execution, load_runner
from dualtoken_deploy.targets.nvidia.builder import BuildOptions, build_engine
from dualtoken_deploy.targets.nvidia.engine import ENGINE, INSPECTION, Host, this_host
from dualtoken_deploy.tasks.base import Likeness
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.inspect import check_share, int8_share, kind_precision, product_precision
from dualtoken_deploy.use.validate import compare_golden

__all__ = ["BuildOptions", "BuildResult", "build_bundle", "build_command", "parse_batches", "why_no_build"]

Tell = Callable[[str], None]
LIBRARIES = ("tensorrt", "cuda-bindings", "numpy", "dualtoken-deploy")

# What may run in float32 although the bundle is of a narrower precision: nothing that the ONNX types, and 5 % for
# layers in which TensorRT keeps a product between float32 neighbours.
LOST_SHARE = 0.05  # of the MACs: so much may TensorRT leave in float of what was quantized
FLOAT32_SHARE = {"fp16": 0.05, "int8": 0.05}


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


def why_no_build() -> str | None:
    """Why no engine can be built here, in one sentence; None where it can."""
    try:
        this_host()
    except MissingError as error:
        return str(error)
    return None


def build_command(bundle: Path) -> str:
    """What to run on the device."""
    return shlex.join(["dualtoken", "build", str(bundle)])


def parse_batches(text: str) -> tuple[int, int, int]:
    """MIN,BEST,MAX. Raises UsageError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"batches {text!r} are not MIN,BEST,MAX, e.g. 1,8,32")
    least, best, most = (int(part) for part in parts)
    return least, best, most


def build_bundle(
    bundle: Bundle | str | Path,
    options: BuildOptions | None = None,
    rebuild: bool = False,
    progress: Tell | None = None,
) -> BuildResult:
    """Puts model.engine, and the inspector's engine.json, beside the ONNX of a TensorRT bundle, once they are checked.

    The bundle stays as it was where anything fails. Raises UsageError (another target; built already and no
    `rebuild`), MissingError (no TensorRT, no GPU), ConversionError, ToleranceError (golden, or float32 layers).
    """
    start, tell = time.perf_counter(), progress or (lambda _: None)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.verify()
    _check_buildable(opened, rebuild)
    chosen = options or BuildOptions()
    host = this_host()
    with new_folder(opened.path, force=True) as folder:
        for name in opened.manifest.files:
            if name not in (ENGINE, INSPECTION, GOLDEN, LABELS):
                shutil.copy2(opened.path / name, folder / name)
        tell(f"building an engine for {host.gpu} with TensorRT {host.tensorrt}")
        onnx = (folder / "model.onnx").read_bytes()
        engine = build_engine(onnx, (opened.manifest.input.tensor,), chosen, timing_cache(host), tell)
        (folder / ENGINE).write_bytes(engine.plan)
        (folder / INSPECTION).write_text(engine.layers, encoding="utf-8")
        tell("checking the engine against the golden logits")
        manifest, numbers = _checked(opened, folder, _built(opened.manifest, chosen, host))
        write_bundle(folder, manifest, opened.golden, opened.labels)
    return BuildResult(
        bundle=str(opened.path),
        tensorrt=host.tensorrt,
        gpu=host.gpu,
        executed_precision=product_precision(manifest.executed_precision),
        sqnr_db=round(numbers.sqnr_db, 1),
        size_mib=round(len(engine.plan) / 2**20, 2),
        seconds=round(time.perf_counter() - start, 1),
    )


def timing_cache(host: Host) -> Path:
    """One file for each TensorRT version and GPU, in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = f"{host.tensorrt}-{host.gpu}-{host.compute_capability}"
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in words)
    return base / "dualtoken-deploy" / "tensorrt" / f"{name}.timing"


def _check_buildable(bundle: Bundle, rebuild: bool) -> None:
    if bundle.manifest.target != "tensorrt":
        raise UsageError(f"{bundle.path} is a bundle for {bundle.manifest.target}; only tensorrt bundles are built")
    if bundle.manifest.state == COMPLETE and not rebuild:
        raise UsageError(f"{bundle.path} has an engine already; give --rebuild to build it anew from its ONNX")
    if MANIFEST in bundle.manifest.files or "model.onnx" not in bundle.manifest.files:
        raise UsageError(f"{bundle.path} has no model.onnx to build from; export it again")


def _built(manifest: Manifest, options: BuildOptions, host: Host) -> Manifest:
    return replace(
        manifest,
        state=COMPLETE,
        build=Build(
            ships=(ENGINE,),
            float32_share_allowed=FLOAT32_SHARE.get(manifest.precision),
            details={
                "host": host.to_json(),
                "machine": describe_machine(),
                "versions": library_versions(LIBRARIES),
                **asdict(options),
            },
        ),
    )


def _checked(source: Bundle, folder: Path, manifest: Manifest) -> tuple[Manifest, Figures]:
    """The manifest with what the engine does, measured on the saved file, and that. Raises ToleranceError."""
    with load_runner(Bundle(folder, manifest)) as runner:
        found = compare_golden(source, runner)
        execution = runner.execution()
    _check_golden(manifest, found, manifest.tolerance)
    if (allowed := FLOAT32_SHARE.get(manifest.precision)) is not None:
        check_share(manifest.precision, execution.float32_share, allowed)
    numbers: dict[str, Any] = get_task(manifest.task).numbers(found)
    figures = Figures(**numbers)
    measured = replace(manifest.measured, engine=figures)
    if manifest.calibration is not None:
        measured = replace(measured, int8_mac_share=_check_int8(manifest, manifest.calibration, execution))
    return replace(manifest, executed_precision=kind_precision(execution), measured=measured), figures


def _check_int8(manifest: Manifest, calibration: Calibration, execution: Execution) -> float:
    """The share of the MACs that the engine runs in INT8. Raises ToleranceError far below what was planned."""
    planned = calibration.planned_int8_mac_share or 0.0
    share, floats = int8_share(manifest, execution)
    if share < planned - LOST_SHARE:
        raise ToleranceError(
            f"{100 * planned:.1f} % of the MACs were quantized, the engine runs {100 * share:.1f} % in INT8 (not: "
            f"{', '.join(floats[:3])}, ...); the bundle was left as it was"
        )
    return share


def _check_golden(manifest: Manifest, found: Likeness, wanted: Tolerance) -> None:
    agreement = 1.0 if found.agreement is None else found.agreement
    if found.sqnr_db < wanted.sqnr_db or agreement < wanted.top1_agreement:
        raise ToleranceError(
            f"the {manifest.precision} engine is out of tolerance on golden: SQNR {found.sqnr_db:.1f} dB (needs "
            f"{wanted.sqnr_db:g}), equal {get_task(manifest.task).alike} {agreement:.4g} (needs "
            f"{wanted.top1_agreement:g}); the bundle was left as it was"
        )
