"""Runs a Core ML bundle: with Core ML on macOS, elsewhere by executing the saved program in numpy, and saying so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.coreml.mil import MilProgram, load_program
from dualtoken_deploy.targets.coreml.mil.execute import Observer
from dualtoken_deploy.targets.coreml.mil.vendor import coremltools, quiet
from dualtoken_deploy.targets.runner import (
    Array,
    Bordered,
    Declared,
    Execution,
    Runner,
    RunnerOptions,
    check_declared,
    planar,
    planar_spec,
)

PACKAGE = "model.mlpackage"
REFERENCE = "reference"  # the device's name for the execution in numpy
ENGINE = "MIL reference execution in numpy, not Core ML"

# Core ML's compute units by the names of --device, on macOS.
DEVICES: Mapping[str, str] = MappingProxyType(
    {"all": "ALL", "cpu": "CPU_ONLY", "cpu+gpu": "CPU_AND_GPU", "cpu+ne": "CPU_AND_NE"}
)


def load(bundle: Bundle, options: RunnerOptions) -> Runner:
    """A runner for `model.mlpackage` of the bundle; Core ML itself on macOS unless the device is "reference".

    Raises MissingError on a device that is not here, BundleError on a package that is not whole or has operations
    that are not executed here.
    """
    package = bundle.path / PACKAGE
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    if _is_reference(options.device):
        return MilReferenceRunner(package, *specs)
    return CoreMlRunner(package, *specs, options)


def why_no_latency(device: str | None) -> str | None:
    """Why a time measured here would not be a device's; None where it would be."""
    if sys.platform == "darwin" and not _is_reference(device):
        return None
    return (
        "a Core ML bundle runs here as a reference execution in numpy, whose time says nothing about a device; "
        "bench it on a Mac (examples/macos-verify.md)"
    )


def _is_reference(device: str | None) -> bool:
    if device is not None and device.lower() not in (REFERENCE, *DEVICES):
        raise MissingError(f"Core ML has no device {device!r}; choose one of {', '.join((REFERENCE, *DEVICES))}")
    if sys.platform == "darwin":
        return device is not None and device.lower() == REFERENCE
    if device is not None and device.lower() not in (REFERENCE, "cpu"):
        raise MissingError(
            f"Core ML's {device!r} needs macOS; here is the reference execution alone: leave --device out"
        )
    return True


class MilReferenceRunner(Bordered):
    """Executes the package's program in numpy. `engine` says what this is wherever results are shown."""

    engine = ENGINE

    def __init__(self, package: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self.program = MilProgram(load_program(package))
        program = self.program.program
        given = {name: Declared(None, value.shape) for name, value in program.inputs.items()}  # may be float16 inside
        last = {name: value for operation in program.operations for name, value in operation.outputs}
        found = {name: Declared(None, last[name].shape if name in last else None) for name in program.outputs}
        check_declared(package, "input", [planar_spec(spec) for spec in inputs], given)
        check_declared(package, "output", outputs, found)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        results = self.run_all(feeds)
        return {spec.name: results[spec.name] for spec in self._outputs}

    def run_all(self, feeds: Mapping[str, Array], observe: Observer | None = None) -> dict[str, Any]:
        """Every output of the program: logits, and class label and probabilities where it has an image input."""
        return self.program.run({s.name: planar(feeds[s.name], s) for s in self._inputs}, observe)

    def execution(self) -> Execution:
        """Operations that run for each input, with the declared dtype of their results, marked as the reference's."""
        precision = {
            kind: tuple(f"{_dtype(t)} ({REFERENCE})" for t in dtypes)
            for kind, dtypes in self.program.precision().items()
        }
        return Execution(self.program.operators(), precision)


class CoreMlRunner(Bordered):
    """Core ML's own prediction, macOS only."""

    def __init__(
        self, package: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: RunnerOptions
    ) -> None:
        self._inputs, self._outputs = inputs, outputs
        ct = coremltools("running a Core ML bundle")
        self._declared = MilReferenceRunner(package, inputs, outputs)
        units = getattr(ct.ComputeUnit, DEVICES[(options.device or "all").lower()])
        try:
            with quiet():
                self._model = ct.models.MLModel(str(package), compute_units=units)
        except Exception as error:  # Core ML's errors come as RuntimeError, NSError's text in them
            raise BundleError(f"Core ML cannot load {package}: {error}") from error

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        results = self._model.predict({s.name: _for_core_ml(feeds[s.name], s) for s in self._inputs})
        return {spec.name: np.asarray(results[spec.name], np.float32) for spec in self._outputs}

    def execution(self) -> Execution:
        """The program's operations and declared dtypes: Core ML does not say in which dtype a device computes."""
        declared = self._declared.program
        precision = {kind: tuple(f"{_dtype(t)} (declared)" for t in d) for kind, d in declared.precision().items()}
        return Execution(declared.operators(), precision)


def _for_core_ml(array: Array, spec: TensorSpec) -> Any:
    """A picture for an image input, the array itself for a tensor."""
    if spec.layout != "NHWC":
        return array
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(array[0]))


def _dtype(mil: str) -> str:
    return {"dictionary": "none", "string": "none", "list": "none"}.get(mil, mil)
