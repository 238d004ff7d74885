"""Runs a Core AI bundle with Apple's own runtime: on Linux its CPU interpreter, which is right and slow."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.runner import (
    Array,
    Bordered,
    Declared,
    Execution,
    RunnerOptions,
    check_declared,
    planar,
    planar_spec,
)

ASSET = "model.aimodel"
ENGINE = "Apple's Core AI runtime, its CPU interpreter"


def load(bundle: Bundle, options: RunnerOptions) -> CoreAiRunner:
    """A runner for `model.aimodel`. Raises MissingError (no extra, another device than the CPU), BundleError."""
    if options.device is not None and options.device.lower() != "cpu":
        raise MissingError(f"Core AI runs here on the CPU alone, not on {options.device!r}; leave --device out")
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    return CoreAiRunner(bundle.path / ASSET, *specs, bundle.manifest.precision)


def why_no_latency(_device: str | None) -> str | None:
    """Why a time measured here would not be a device's; None on macOS."""
    if sys.platform == "darwin":
        return None
    return "a Core AI bundle runs here in Apple's CPU interpreter, whose time is no device's; bench it on a Mac"


class CoreAiRunner(Bordered):
    """One loaded function and the event loop that its calls are awaited in. `engine` says what this is."""

    engine = ENGINE

    def __init__(
        self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], precision: str
    ) -> None:
        try:
            from coreai.authoring import AIModelAsset
            from coreai.runtime import NDArray
        except ImportError as error:
            raise missing_extra("coreai", "running a Core AI bundle") from error
        if not path.is_dir():
            raise BundleError(f"{path} is no folder, so it is no .aimodel; copy the whole bundle")
        self._inputs, self._outputs, self._precision, self._array = inputs, outputs, precision, NDArray
        self._path = path
        self._loop = asyncio.new_event_loop()
        try:
            self._asset = AIModelAsset.load(path)
            self._context = self._asset.executable()
            self._function = self._loop.run_until_complete(self._context.__aenter__()).load_function("main")
            described = self._function.desc
            given = {n: _declared(described.input_descriptor(n)) for n in described.input_names}
            found = {n: _declared(described.output_descriptor(n)) for n in described.output_names}
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            self._loop.close()
            raise BundleError(
                f"Core AI cannot load {path}: {error}; copy the bundle anew or export it again"
            ) from error

        try:
            check_declared(path, "input", [planar_spec(spec) for spec in inputs], given)
            check_declared(path, "output", outputs, found)
        except BundleError:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._context.__aexit__(None, None, None))
            self._loop.close()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        arrays = {s.name: self._array(planar(feeds[s.name], s)) for s in self._inputs}
        try:
            results = self._loop.run_until_complete(self._function(arrays))
        except RuntimeError as error:
            raise ConversionError(f"Core AI failed while running {self._path}: {error}") from error
        return {s.name: np.array(results[s.name].numpy(), s.dtype) for s in self._outputs}

    def execution(self) -> Execution:
        """Operations of the saved program and the dtypes that they compute in, from the asset's own summary."""
        summary: Any = self._asset.summary()
        found = getattr(summary, "operation_distribution", None) or ()
        counts = Counter({str(kind): int(count) for kind, count in found if kind != "constant"})
        dtype = f"{'float16' if self._precision == 'fp16' else 'float32'} (interpreter)"
        return Execution(dict(counts.most_common()), dict.fromkeys(counts, (dtype,)))


def _declared(described: Any) -> Declared:
    """Of an array its shape; what it computes in is the asset's own business, and results are made float32."""
    shape = getattr(described, "shape", None)
    return Declared(None, None if shape is None else tuple(int(side) if side >= 0 else None for side in shape))
