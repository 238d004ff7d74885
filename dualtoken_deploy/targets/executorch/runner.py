"""Runs a .pte by ExecuTorch's own runtime, products by XNNPACK: what an app on a phone runs on its CPU.

Its Python binding takes and gives torch tensors, so here torch is needed; a device's C++ runner needs none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, first_line, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.executorch import program
from dualtoken_deploy.targets.runner import Array, Bordered, Execution, RunnerOptions

MODEL = "model.pte"
METHOD = "forward"
OUTSIDE = "outside XNNPACK"
NAMES = "products"  # in a manifest's operators: the products in the order that they run in, by the model's names


def load(bundle: Bundle, options: RunnerOptions) -> ExecuTorchRunner:
    """A runner for `model.pte`. Raises MissingError (no extra, another device than the CPU), BundleError."""
    if options.device is not None and options.device.lower() != "cpu":
        raise MissingError(
            f"ExecuTorch runs here on the CPU alone, not on {options.device!r}; leave --device out (a phone's GPU and "
            "NPU: docs/android.md)"
        )
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    names = tuple(bundle.manifest.operators.get(NAMES, {}))
    return ExecuTorchRunner(bundle.path / MODEL, *specs, names, options.threads)


class ExecuTorchRunner(Bordered):
    """One loaded method. Its threads are the process's: the last runner that asks for a number sets it for all."""

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        names: tuple[str, ...] = (),
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
        found = program.read(self._path)
        kinds: Counter[str] = Counter(node.kind for node in found.nodes)
        dtypes: dict[str, Counter[str]] = {}
        for node in found.nodes:
            dtypes.setdefault(node.kind, Counter())[node.dtype] += 1
        for kind in found.outside:
            kinds[kind] += 1
            dtypes.setdefault(kind, Counter())[OUTSIDE] += 1
        precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
        inside, pieces = len(found.nodes), len(found.delegates)
        notes = [f"XNNPACK takes {inside} of {inside + len(found.outside)} operators, in {pieces} pieces"]
        if found.outside:
            counts = Counter(found.outside)
            notes.append(f"outside it: {', '.join(f'{n} {kind}' for kind, n in counts.most_common())}")
        products = found.products
        named = len(self._names) == len(products)  # else one cannot be told from another, and none is vouched for
        nodes = {name: p.dtype for name, p in zip(self._names, products, strict=True)} if named else {}
        return Execution(dict(sorted(kinds.items())), precision, nodes, notes=tuple(notes))


def open_runtime() -> Any:
    """ExecuTorch's runtime, which is one a process. Raises MissingError without the extra."""
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise missing_extra("executorch", "running an ExecuTorch bundle") from error
    return Runtime.get()
