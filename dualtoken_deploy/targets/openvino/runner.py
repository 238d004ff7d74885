"""Runs an OpenVINO bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, last_line, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, RunnerOptions, check_declared
from dualtoken_deploy.targets.table import get_target

_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": "uint8", "i8": "int8", "i32": "int32"}


def load(bundle: Bundle, options: RunnerOptions) -> OpenVinoRunner:
    """A runner for `model.xml` of the bundle. Raises MissingError where the extra or the device is not here."""
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    return OpenVinoRunner(bundle.path / "model.xml", *specs, options, float_dtype(bundle.manifest.precision))


class OpenVinoRunner(Bordered):
    """One compiled model and one infer request.

    `computes`: f32 or bf16, OpenVINO's name of the dtype of float products: not that of the weights in the IR.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        computes: str = "f32",
    ) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._path, self._options, self._computes = path, options, computes
        self._compiled = _compile(path, options, computes)
        check_declared(path, "input", inputs, _declared(self._compiled.inputs, inputs))
        check_declared(path, "output", outputs, _declared(self._compiled.outputs, outputs))
        self._request: Any = self._compiled.create_infer_request()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # share_inputs spares a copy; outputs are copied, since the request's memory is used again by the next run
        results = self._infer(self._request, feeds, share_inputs=True, share_outputs=False)
        return {spec.name: results[spec.name] for spec in self._outputs}

    def run_async(self, feeds: Mapping[str, Array], count: int) -> None:
        import openvino as ov

        queue = ov.AsyncInferQueue(self._compiled)
        for _ in range(count):
            queue.start_async(dict(feeds), share_inputs=True)
        queue.wait_all()

    def _infer(self, request: Any, feeds: Mapping[str, Array], **shared: bool) -> Any:
        try:
            return request.infer(dict(feeds), **shared)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot run {self._path}: {last_line(error)}") from error

    def execution(self) -> Execution:
        """Layers that ran in one profiled run of zeros, with the dtype that their kernel's name ends in.

        The runtime graph alone would not do: it lists constant sub-graphs that never run, and for float16 weights it
        names the stored dtype where the kernel computes in float32.
        """
        import numpy as np

        request = _compile(self._path, self._options, self._computes, profile=True).create_infer_request()
        self._infer(request, {s.name: np.zeros(s.concrete(), s.dtype) for s in self._inputs})
        operators: Counter[str] = Counter()
        dtypes: dict[str, Counter[str]] = {}
        nodes: dict[str, str] = {}
        for layer in request.get_profiling_info():
            if "EXECUTED" not in str(layer.status):
                continue
            operators[layer.node_type] += 1
            suffix = layer.exec_type.rpartition("_")[2].lower()
            dtype = _DTYPES.get(suffix, suffix)
            dtypes.setdefault(layer.node_type, Counter())[dtype] += 1
            nodes[own_name(layer.node_name, layer.node_type)] = dtype
        precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
        return Execution(dict(sorted(operators.items())), precision, nodes)


def own_name(name: str, kind: str) -> str:
    """A layer's name in the file: OpenVINO calls a product after what it joins with it, a bias or the weights' scale.
    Where it does not join the scale, that is a layer of its own, behind the product, and keeps its name."""
    if not kind.startswith(get_target("openvino").product_kinds):
        return name
    return name.removesuffix("/WithoutBiases").removesuffix("/DequantizationMultiply")


def _declared(ports: Any, specs: tuple[TensorSpec, ...]) -> dict[str, Declared]:
    """OpenVINO's own descriptions. A port may have several names: the manifest's one counts."""
    wanted, found = {spec.name for spec in specs}, {}
    for port in ports:
        names = sorted(port.names, key=lambda name: (name not in wanted, name)) or ["one without a name"]
        shape = None if port.partial_shape.rank.is_dynamic else tuple(_side(side) for side in port.partial_shape)
        found[names[0]] = Declared(str(port.element_type.to_dtype().name), shape)
    return found


def _side(side: Any) -> int | None:
    return None if side.is_dynamic else int(side.get_length())


def float_dtype(precision: str) -> str:
    """OpenVINO's name of the dtype that float products of a bundle of this precision compute in."""
    return "bf16" if precision == "bf16" else "f32"


def has_bfloat16(device: str = "CPU") -> bool:
    """Whether the device computes in bfloat16 by itself, as OpenVINO says; needs the extra [openvino]."""
    import openvino as ov

    return "BF16" in ov.Core().get_property(device, "OPTIMIZATION_CAPABILITIES")


def _compile(path: Path, options: RunnerOptions, computes: str, profile: bool = False) -> Any:
    try:
        import openvino as ov
    except ImportError as error:
        raise missing_extra("openvino", "running an OpenVINO bundle") from error
    core = ov.Core()
    device = (options.device or "CPU").upper()
    if device.split(".")[0] not in {d.split(".")[0] for d in core.available_devices}:
        raise MissingError(
            f"OpenVINO {ov.__version__.split('-')[0]} finds no device {device!r} here; it finds "
            f"{', '.join(core.available_devices)}; choose one of these or install the driver"
        )
    if computes == "bf16" and not has_bfloat16(device):
        raise MissingError(
            f"{device} has no bfloat16 (AVX512_BF16 or AMX), and OpenVINO would compute in float32 instead; "
            "export with --precision fp16"
        )
    # Without the hint a CPU with AMX or AVX512-FP16 would run a float32 model in a smaller type, and not say so.
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": computes,
        "PERFORMANCE_HINT": "THROUGHPUT" if options.throughput else "LATENCY",
    }
    if options.threads and device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if profile:
        settings["PERF_COUNT"] = True
    if options.cache_dir is not None:
        settings["CACHE_DIR"] = str(options.cache_dir)
    try:
        return core.compile_model(str(path), device, settings)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot load {path}: {last_line(error)}") from error
