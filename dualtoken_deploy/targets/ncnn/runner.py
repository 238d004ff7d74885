"""Runs an ncnn model on the CPU in float32, by ncnn's own library: what an app on a phone or a board runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.runner import Array, Bordered, Execution, RunnerOptions, planar

PARAM, BINARY = "model.ncnn.param", "model.ncnn.bin"
MAGIC = "7767517"
MAX_PARAM_BYTES = 16 << 20


@dataclass(frozen=True)
class Layer:
    """One line of a .param."""

    kind: str
    name: str
    outputs: tuple[str, ...]


def load(bundle: Bundle, options: RunnerOptions) -> NcnnRunner:
    """A runner for the two files. Raises MissingError (no extra, another device than the CPU), BundleError."""
    if options.device is not None and options.device.lower() != "cpu":
        raise MissingError(
            f"ncnn runs here on the CPU alone, not on {options.device!r}; leave --device out (Vulkan: docs/android.md)"
        )
    return NcnnRunner(bundle, options.threads)


class NcnnRunner(Bordered):
    """One net; inputs are planes of float32, as ncnn makes them of bytes."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        manifest = bundle.manifest
        self._inputs, self._outputs = (manifest.input.tensor,), manifest.outputs
        self._layers = layers(bundle.path / PARAM)
        self._net: Any = open_net(bundle.path / PARAM, bundle.path / BINARY, threads)
        self._half = manifest.precision == "fp16"
        self._ends = tuple(f"out{i}" for i in range(len(self._outputs)))
        made = {name for layer in self._layers for name in layer.outputs}
        if missing := [name for name in self._ends if name not in made]:
            raise BundleError(f"{bundle.path / PARAM} has no output {missing[0]}; export it again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._net = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import ncnn

        (spec,) = self._inputs
        (picture,) = planar(feeds[spec.name], spec)  # one picture: ncnn has no axis for more
        extractor = self._net.create_extractor()
        extractor.input("in0", ncnn.Mat(picture))
        return {out.name: self._read(extractor, end, out) for end, out in zip(self._ends, self._outputs, strict=True)}

    def _read(self, extractor: Any, end: str, spec: TensorSpec) -> Array:
        code, value = extractor.extract(end)
        found = np.array(value, np.float32)
        if code != 0 or found.size != int(np.prod(spec.concrete())):
            raise BundleError(
                f"ncnn gives {found.shape} for {spec.name} (code {code}), not the manifest's {spec.concrete()}; export "
                "it again"
            )
        return found.reshape(spec.concrete())

    def execution(self) -> Execution:
        """Layers by kind; all compute in float32, since this runner turns ncnn's narrower options off."""
        kinds = Counter(layer.kind for layer in self._layers)
        dtype = "float32 (float16 weights)" if self._half else "float32"
        return Execution(
            dict(sorted(kinds.items())),
            dict.fromkeys(sorted(kinds), (dtype,)),
            {name: dtype for layer in self._layers for name in layer.outputs},
        )


def open_net(param: Path, binary: Path, threads: int | None) -> Any:
    """A loaded net that computes in float32. Raises MissingError without the extra, BundleError where ncnn refuses."""
    try:
        import ncnn
    except ImportError as error:
        raise missing_extra("ncnn", "running an ncnn bundle") from error
    layers(param)  # before ncnn, which believes the counts at the file's head
    net = ncnn.Net()
    # all three: ncnn would store, pack or compute in float16 where the CPU can
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = net.opt.use_vulkan_compute = False
    if threads:
        net.opt.num_threads = threads
    if net.load_param(str(param)) != 0:
        raise BundleError(
            f"ncnn cannot load {param}: a layer that it does not have, or a damaged file; export it again"
        )
    if not binary.is_file() or net.load_model(str(binary)) != 0:
        raise BundleError(f"ncnn cannot load {binary}: it is missing, cut short or of another graph; copy it anew")
    return net


def layers(param: Path) -> list[Layer]:
    """What a .param says. Raises BundleError on anything but a whole one."""
    try:
        if param.stat().st_size > MAX_PARAM_BYTES:
            raise BundleError(f"{param} is larger than {MAX_PARAM_BYTES >> 20} MiB; export it again")
        lines = param.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{param} cannot be read ({error}); copy the whole bundle") from error
    if not lines or lines[0].strip() != MAGIC:
        raise BundleError(f"{param} is no ncnn .param of this version (no {MAGIC} at its start); export it again")
    found = []
    try:
        count = int(lines[1].split()[0])
        for line in lines[2:]:
            kind, name, inputs, outputs, *rest = line.split()
            first = int(inputs)
            found.append(Layer(kind, name, tuple(rest[first : first + int(outputs)])))
    except (ValueError, IndexError) as error:
        raise BundleError(f"{param} is damaged at its line {len(found) + 3}; copy it anew") from error
    if len(found) != count:
        raise BundleError(f"{param} is cut short ({len(found)} of {count} layers); copy it anew")
    return found
