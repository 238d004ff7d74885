"""Runs an AOTInductor package through torch's loader; no compiler and no model code take part."""

from __future__ import annotations

import platform
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, first_line, missing_extra
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, RunnerOptions, check_declared

# What AOTInductor's generated source calls for matrix products, by the kinds that inspection knows.
_KINDS = {
    "convolution": "Conv2d",
    "linear": "Linear",
    "bmm": "MatMul",
    "addmm": "Linear",
    "mm_out": "Linear",
    "scaled_dot_product": "ScaledDotProductAttention",
}
_CALL = re.compile(r"CHECK\(aoti_torch_(?:cpu|cuda)_(\w+)\(")
_RENAMED = re.compile(r"auto (\w+) = ")
_BUFFER = re.compile(r"aoti_torch_empty_strided\(.*cached_torch_dtype_(\w+), .*&(\w+)_handle\)")
_CONSTANT = re.compile(
    r'constants_info_\[\d+\]\.name = "(\w+)";\s+constants_info_\[\d+\]\.dtype = cached_torch_dtype_(\w+);'
)


@dataclass(frozen=True)
class NativeCode:
    """What a package depends on. `device` cpu or cuda, `system` as linux-x86_64; `gpu` and its capability: cuda."""

    device: str
    system: str
    torch: str
    compiler: str = ""
    gpu: str | None = None
    compute_capability: str | None = None


def native_code(_manifest: Manifest) -> str:
    """What loading a package runs, whatever the manifest says."""
    return "model.pt2 is native code, which runs with your rights"


def load(bundle: Bundle, options: RunnerOptions) -> AotInductorRunner:
    """A runner for model.pt2 of the bundle.

    Raises MissingError where torch or the device is not here, or the package is for another system, torch, GPU or set
    of CPU instructions: its native code would end the process instead of failing.
    """
    manifest = bundle.manifest
    if manifest.build is None:
        raise BundleError(f"{bundle.path} does not say what it was compiled for; export it again")
    built = manifest.build.typed(NativeCode)
    if reasons := obstacles(built, isa_of(manifest), options.device):
        raise MissingError(f"{bundle.path} will not run here: {'; '.join(reasons)}; export it on this kind of machine")
    specs = (manifest.input.tensor,), manifest.outputs
    return AotInductorRunner(bundle.path / "model.pt2", *specs, built.device, options)


def isa_of(manifest: Manifest) -> frozenset[str]:
    """The instruction sets of the machine that made a bundle."""
    said = manifest.machine.get("isa")
    return frozenset(map(str, said)) if isinstance(said, (list, tuple)) else frozenset()


def obstacles(built: NativeCode, isa: Set[str], device: str | None) -> list[str]:
    """Why a package will not run here; empty where it will. `isa`: of the machine that made it."""
    try:
        import torch
    except ImportError as error:
        raise missing_extra("export", "running an AOTInductor package") from error
    here = f"{platform.system().lower()}-{platform.machine().lower()}"
    found = []
    wanted = (device or built.device).lower()
    if wanted != built.device:
        found.append(f"it is compiled for {built.device}, not for device {device!r}")
    if built.system != here:
        found.append(f"it was compiled on {built.system}, this is {here}")
    if built.torch != torch.__version__:
        found.append(f"it was compiled by torch {built.torch}, here is {torch.__version__}")
    if built.device == "cpu" and (lacking := isa - set(describe_machine()["isa"])):
        found.append(f"this CPU lacks {', '.join(sorted(lacking))}")
    if built.device == "cuda":
        found += _cuda_obstacles(built)
    return found


def _cuda_obstacles(built: NativeCode) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [f"PyTorch {torch.__version__} finds no CUDA device"]
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if capability != built.compute_capability:
        return [f"it is for compute capability {built.compute_capability}, this GPU has {capability}"]
    return []


class AotInductorRunner(Bordered):
    """One loaded package."""

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: str,
        options: RunnerOptions,
    ) -> None:
        import torch

        self._path, self._inputs, self._outputs, self._device = path, inputs, outputs, device
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            self._model: Any = torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            raise BundleError(f"torch cannot load {path}: {first_line(error)}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        (name,) = (spec.name for spec in self._inputs)
        value = torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self._device)
        with torch.inference_mode():
            try:
                results = self._model(value)
            except RuntimeError as error:  # another shape or dtype than it was compiled for
                raise BundleError(f"{self._path} does not run: {first_line(error)}; export it again") from error
        arrays = [r.cpu().numpy() for r in (results if isinstance(results, (tuple, list)) else (results,))]
        found = {spec.name: array for spec, array in zip(self._outputs, arrays, strict=False)}
        # a package declares nothing, so what it gives is held against the manifest, but for sizes that are open there
        declared = {
            spec.name: Declared(found[spec.name].dtype.name, _open_where(spec, found[spec.name].shape))
            for spec in self._outputs
            if spec.name in found
        }
        check_declared(self._path, "output", self._outputs, declared)
        return found

    def execution(self) -> Execution:
        """Library calls and their dtype, from the source that the package's native code was compiled of, which lies in
        the package: the calls pass by torch's dispatcher, so a profiled run does not see them."""
        with zipfile.ZipFile(self._path) as package:
            sources = [package.read(name).decode() for name in package.namelist() if name.endswith(".wrapper.cpp")]
        return read_calls("\n".join(sources))


def _open_where(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """The shape with None for every size that the manifest leaves open."""
    if len(shape) != len(spec.shape):
        return shape
    return tuple(side if isinstance(said, int) else None for said, side in zip(spec.shape, shape, strict=True))


def read_calls(source: str) -> Execution:
    """The kernels that a wrapper's source calls for matrix products, by the kinds that inspection knows.

    A call's dtype is that of its first tensor whose dtype is known: a constant's, a buffer's, or that of the call or
    buffer that it came from.
    """
    dtypes = dict(_CONSTANT.findall(source))
    operators: Counter[str] = Counter()
    found: dict[str, Counter[str]] = {}
    for line in source.splitlines():
        if made := _BUFFER.search(line):
            dtypes[made[2]] = made[1]
            continue
        words = re.findall(r"\w+", line)
        dtype = next((dtypes[word] for word in words if word in dtypes), "none")
        if renamed := _RENAMED.search(line):
            dtypes[renamed[1]] = dtype
        elif call := _CALL.search(line):
            dtypes |= {word.removesuffix("_handle"): dtype for word in words if word.endswith("_handle")}
            kind = next((kind for part, kind in _KINDS.items() if part in call[1]), None)
            if kind is not None:
                operators[kind] += 1
                found.setdefault(kind, Counter())[dtype] += 1
    precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(found.items())}
    return Execution(dict(sorted(operators.items())), precision)
