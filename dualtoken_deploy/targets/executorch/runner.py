"""Runs a .pte by ExecuTorch's own runtime, products by XNNPACK: what an app on a phone runs on its CPU.

Its Python binding takes and gives torch tensors, so here torch is needed; a device's C++ runner needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, first_line, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.executorch import program
from dualtoken_deploy.targets.executorch.backends import BACKENDS, XNNPACK, backend_of
from dualtoken_deploy.targets.executorch.contents import NAMELESS, REFERENCE, execution_of
from dualtoken_deploy.targets.runner import Array, Bordered, Execution, Runner, RunnerOptions

MODEL = "model.pte"
METHOD = "forward"
NAMES = "products"  # in a manifest's operators: MACs of the products by the model's names


def load(bundle: Bundle, options: RunnerOptions) -> Runner:
    """A runner for `model.pte`; of a backend that does not run here a reference execution, which says so.

    Raises MissingError (no extra, another device than the CPU), BundleError, and ToleranceError where the file is for
    another backend than the manifest's.
    """
    backend = backend_of(bundle.manifest)
    if options.device is not None and options.device.lower() not in ("cpu", REFERENCE if backend.stand_in else "cpu"):
        raise MissingError(
            f"ExecuTorch runs here on the CPU alone, not on {options.device!r}; leave --device out (a phone's GPU and "
            "NPU: docs/android.md)"
        )
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    if backend.stand_in is not None:
        try:
            from dualtoken_deploy.targets.executorch.reference import ReferenceRunner
        except ImportError as error:
            raise missing_extra("executorch", "running an ExecuTorch bundle") from error
        return ReferenceRunner(bundle.path / MODEL, *specs, backend)
    names = bundle.manifest.operators.get(NAMES, NAMELESS)
    return ExecuTorchRunner(bundle.path / MODEL, *specs, names, options.threads)


def no_latency_of(manifest: Manifest) -> str | None:
    """Why a time of a bundle here would not be a device's; None where it would be."""
    backend = backend_of(manifest)
    if backend.stand_in is None:
        return None
    return (
        f"it is lowered to {backend.title}, and runs here as a {backend.stand_in}, whose time says nothing about a "
        f"device; bench it on {backend.where} (docs/android.md)"
    )


class ExecuTorchRunner(Bordered):
    """One loaded method. Its threads are the process's: the last runner that asks for a number sets it for all."""

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        names: Mapping[str, int] = NAMELESS,
        threads: int | None = None,
    ) -> None:
        self._path, self._inputs, self._outputs, self._names = path, inputs, outputs, names
        program.check_file(path)
        runtime = open_runtime()
        if threads:
            from executorch.extension.pybindings import portable_lib

            portable_lib._unsafe_reset_threadpool(threads)
        try:
            self._program: Any = runtime.load_program(path)
            self._method: Any = self._program.load_method(METHOD)
        except (RuntimeError, KeyError, ValueError) as error:
            raise BundleError(f"ExecuTorch cannot load {path}: {first_line(error)}; export it again") from error
        self._check(self._method.metadata)

    def _check(self, found: Any) -> None:
        """Raises BundleError where the method takes or gives other shapes than the manifest says."""
        for what, count, info, specs in (
            ("inputs", found.num_inputs(), found.input_tensor_meta, self._inputs),
            ("outputs", found.num_outputs(), found.output_tensor_meta, self._outputs),
        ):
            sizes = [tuple(info(i).sizes()) for i in range(count)]
            wanted = [spec.concrete() for spec in specs]
            if sizes != wanted:
                raise BundleError(f"{self._path} has {what} of {sizes}, not the manifest's {wanted}; export it again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._method = self._program = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        given = [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self._inputs]
        outputs = self._method.execute(given)
        return {spec.name: out.numpy().copy() for spec, out in zip(self._outputs, outputs, strict=True)}

    def execution(self) -> Execution:
        """Operators of XNNPACK's graph by kind with the dtype that they compute in, read from the file that was loaded;
        those that are left to the plain kernels say so in it."""
        return execution_of(program.read(self._path), BACKENDS[XNNPACK], self._names)


def open_runtime() -> Any:
    """ExecuTorch's runtime, which is one a process. Raises MissingError without the extra."""
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise missing_extra("executorch", "running an ExecuTorch bundle") from error
    return Runtime.get()
