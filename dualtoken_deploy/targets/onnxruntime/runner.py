"""Runs an ONNX bundle with ONNX Runtime."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, first_line, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, RunnerOptions, check_declared
from dualtoken_deploy.targets.table import get_target

# What its graph transformers and its profiler append to a node's name.
_ADDED = re.compile(r"(/MatMulAddFusion|_token_\d+|_nchwc|/QDQ)*_kernel_time$")

DTYPES = {f"tensor({theirs})": ours for theirs, ours in (("float", "float32"), ("double", "float64"))} | {
    f"tensor({name})": name for name in ("float16", "bool", "uint8", "int8", "int16", "int32", "int64")
}
IN_FLIGHT = 2  # asynchronous runs at a time

DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def load(bundle: Bundle, options: RunnerOptions) -> OnnxRuntimeRunner:
    """A runner for `model.onnx` of the bundle. Raises MissingError where the extra or the provider is not here."""
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    # its asynchronous runs go to the pool of threads, which a session of one thread does not have
    pooled = (options.threads or os.cpu_count() or 1) > 1
    kind = PooledOnnxRuntimeRunner if pooled else OnnxRuntimeRunner
    return kind(bundle.path / "model.onnx", *specs, options, bundle.manifest.precision)


class OnnxRuntimeRunner(Bordered):
    """One inference session. Needs no `with`, but gives its memory back on leaving one.

    `precision`: in bf16 the file is typed bfloat16, for which ONNX Runtime has no kernels; float32 ones run and round.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        precision: str = "fp32",
    ) -> None:
        self._path, self._inputs, self._outputs = path, inputs, outputs
        self._provider = _provider(options.device)
        self._options = options
        rounds = precision == "bf16"
        self._source: str | bytes = _rounding(path) if rounds else str(path)
        # Pairs of another target's precision run as they stand: onnxruntime 1.31 moves a DequantizeLinear of float8
        # behind operators that have none, and joins one of int4 with its product to a kernel that rounds activations.
        self._plain = precision not in get_target("onnxruntime").precisions
        self.engine = "ONNX Runtime in float32, rounded to bfloat16 behind every operator" if rounds else None
        self._session = self._open()
        check_declared(path, "input", inputs, _declared(self._session.get_inputs()))
        check_declared(path, "output", outputs, _declared(self._session.get_outputs()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [o.name for o in self._outputs]
        return dict(zip(names, self._values(self._session, names, feeds), strict=True))

    def _values(self, session: Any, names: list[str] | None, feeds: Mapping[str, Array]) -> Any:
        try:
            return session.run(names, dict(feeds))
        except Exception as error:  # its exception types are private and derive from Exception alone
            raise BundleError(f"ONNX Runtime cannot run {self._path}: {first_line(error)}") from error

    def execution(self) -> Execution:
        """Kinds from the optimised model that the session writes, dtypes from one profiled run of zeros."""
        import numpy as np

        feed = {s.name: np.zeros(s.concrete(), s.dtype) for s in self._inputs}
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(Path(folder) / "run")
            self._values(session, None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _execution(events)

    def _open(self, profile: Path | None = None) -> Any:
        return _session(self._path, self._source, self._provider, self._options, self._plain, profile)


class PooledOnnxRuntimeRunner(OnnxRuntimeRunner):
    """One whose session has a pool of threads, and so can overlap runs."""

    def run_async(self, feeds: Mapping[str, Array], count: int) -> None:
        names = [o.name for o in self._outputs]
        free, errors = threading.Semaphore(IN_FLIGHT), []

        def done(_results: Any, _data: Any, error: str) -> None:
            if error:
                errors.append(error)
            free.release()

        for _ in range(count):
            free.acquire()
            self._session.run_async(names, dict(feeds), done, None)
        for _ in range(IN_FLIGHT):
            free.acquire()
        if errors:
            raise BundleError(f"an asynchronous run of {self._path} failed: {errors[0]}")


def _declared(tensors: Any) -> dict[str, Declared]:
    """ONNX Runtime's own descriptions; an open size is a text or None there."""
    return {
        t.name: Declared(DTYPES.get(t.type, t.type), tuple(side if isinstance(side, int) else None for side in t.shape))
        for t in tensors
    }


def _provider(device: str | None) -> str:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "running an ONNX bundle") from error
    wanted = device or "cpu"
    provider = DEVICES.get(wanted.lower(), wanted)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise MissingError(
            f"ONNX Runtime {onnxruntime.__version__} here has no {provider} (device {wanted!r}); it has "
            f"{', '.join(available)}; choose one of these or install the onnxruntime build that has it"
        )
    return provider


def _rounding(path: Path) -> bytes:
    import onnx

    from dualtoken_deploy.targets.onnx.bfloat16 import rounded_to_bfloat16

    return rounded_to_bfloat16(onnx.load(path)).SerializeToString()


def _session(
    path: Path, source: str | bytes, provider: str, options: RunnerOptions, plain: bool, profile: Path | None
) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # errors only: warnings go to stderr among our own lines
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if plain:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if options.threads:
        settings.intra_op_num_threads = options.threads
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    try:
        session = ort.InferenceSession(source, settings, providers=[provider])
    except Exception as error:  # its exception types are private and derive from Exception alone
        raise BundleError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
    if session.get_providers()[0] != provider:  # onnxruntime itself falls back to the CPU with a warning
        raise MissingError(f"ONNX Runtime could not start {provider}, it offered {session.get_providers()[0]} instead")
    return session


def _execution(events: list[dict[str, Any]]) -> Execution:
    """From the profiler's node events: what the kernels that ran were, and the dtype of their first tensor input."""
    operators: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    nodes: dict[str, str] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or "op_name" not in args or not event["name"].endswith("_kernel_time"):
            continue
        kind = args["op_name"]
        operators[kind] += 1
        dtypes.setdefault(kind, Counter())[_dtype(args)] += 1
        nodes[_ADDED.sub("", event["name"])] = _dtype(args)
    precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
    return Execution(dict(sorted(operators.items())), precision, nodes)


def _dtype(args: Mapping[str, Any]) -> str:
    types = args.get("input_type_shape") or args.get("output_type_shape") or []
    names = [next(iter(entry)) for entry in types]
    return {"float": "float32", "double": "float64"}.get(names[0], names[0]) if names else "none"
