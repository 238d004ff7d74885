"""What every exporter takes and gives."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from dualtoken_deploy.bundle.blocks import Build, Calibration
from dualtoken_deploy.bundle.manifest import CLASSIFY, COMPILED, Manifest
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.quantize.backend import Backend
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.table import Target

Tell = Callable[[str], None]  # is told what happens now, for a progress display


@dataclass(frozen=True)
class Samples:
    """Inputs that activation ranges are taken from, (N, ...) in the contract's own form; `said`: what the manifest is
    to say of them."""

    inputs: NDArray[Any]
    said: Calibration


@dataclass(frozen=True)
class Request:
    """What is to be made. `opset` None: the exporter's own choice. `metadata` goes into the artifact where it can, as
    do `labels`, one a class. `device`: what to compile for, where the target compiles (None: the CPU). `settings`:
    those of the target's own (`Target.settings`) that were given. `samples`: for a precision that measures ranges.
    `task`: that of the bundle."""

    precision: str
    contract: InputContract
    outputs: tuple[TensorSpec, ...]
    opset: int | None
    metadata: Mapping[str, str]
    device: str | None = None
    labels: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    samples: Samples | None = None
    task: str = CLASSIFY


@dataclass(frozen=True)
class Artifact:
    """What an exporter did: the deploy rules that applied, operator counts by step ("exported", "simplified", ...), and
    where it compiled, what the native code depends on. `calibration`: what ranges were taken from, and how."""

    rules: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]]
    build: Build | None = None
    calibration: Calibration | None = None


def run_exporter(target: Target, model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes `target.files` into `folder`. Raises ConversionError where the vendor's tool fails."""
    artifact: Artifact = target.part("export").export(model, request, folder, tell)
    return artifact


def check_compiler(target: Target, precision: str, opset: int | None, settings: Mapping[str, str]) -> None:
    """What the exporter of a target with settings can tell before anything is made. Raises UsageError, MissingError."""
    if target.settings and (check := getattr(target.part("export"), "check", None)) is not None:
        check(precision, opset, settings)


def compile_files(target: Target, request: Request, folder: Path, manifest: Manifest, tell: Tell) -> Manifest:
    """The manifest of exported files after the target's compiler, where it has one that needs no device: compiled
    from what lies in `folder`, and not executed. Raises ConversionError."""
    if not target.compiler:
        return manifest
    build: Build = target.part("export").compile_files(folder, manifest, request.settings, tell)
    return replace(manifest, state=COMPILED, build=build)


@dataclass(frozen=True)
class Prepared:
    """A float program with ranges, for the search: `backend` writes the files of any choice of layers; `artifact`: what
    was done to make it."""

    backend: Backend
    artifact: Artifact


def run_quantizer(
    target: Target, model: nn.Module, request: Request, calibration: CalibrationSet, options: Int8Options, tell: Tell
) -> Prepared:
    """The target's own quantizer over the model. Raises UsageError on one it does not have, ConversionError."""
    name = options.quantizer or target.quantizers[0]
    if name not in target.quantizers:
        raise UsageError(
            f"unknown quantizer {name!r} for {target.name}; valid quantizers: {', '.join(target.quantizers)}"
        )
    part = target.part(target.precision(request.precision).part)
    prepared: Prepared = part.prepare(model, request, calibration, name, options.method, tell)
    return prepared


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keeps the converters' own chatter (torchvision is missing, passes done) off the user's terminal, log records up
    to `level` included."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
