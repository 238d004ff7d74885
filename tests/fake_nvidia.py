"""A GPU that is not here: CUDA's memory and streams, and the execution of an engine. No proof of either.

Everything else is real: the names, the parser, the network, the builder, its progress and its errors are those of
NVIDIA's TensorRT for RTX, whose API is TensorRT's and which compiles without a GPU; an engine is what that builder
wrote. What needs a GPU (deserializing, contexts, the inspector, refitting) stands in here: the engine's ONNX is run by
ONNX Runtime on the fake device's memory, so that a wrong address, size or order shows in the logits. As `tensorrt` of
10.x and 11.x the library has the version of one; tests/test_tensorrt_api.py holds our calls against their own records.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from dualtoken_deploy.targets.nvidia import binding
from tests.tensorrt_api import RTX, load_api

real = pytest.importorskip(binding.RTX.module, reason="the extra [tensorrt-rtx] has wheels for x86-64 alone")
_built: dict[
    tuple[str, str], bytes
] = {}  # what the real builder made of an ONNX and a profile; it makes the same again


class FakeCuda:
    """cuda.bindings.runtime as far as we use it: memory is the host's, a stream runs at once, a capture records."""

    def __init__(self, name: bytes = b"Fake GPU", capability: tuple[int, int] = (8, 7)) -> None:
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0
        self.status = 0
        self.device = types.SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], multiProcessorCount=16, totalGlobalMem=8 << 30
        )
        self.cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def put(self, work: Callable[[], None]) -> None:
        """What goes on the stream: done now, or recorded for a graph."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _allocate(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def _free(self, pointer: int) -> tuple[int]:
        del self.memory[pointer]  # KeyError on a second time
        return (0,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802 (CUDA's names here and below)
        return self.status, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:  # noqa: N802
        return 0, self.device

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return 0, 12060

    def cudaSetDevice(self, device: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size)

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        return self._free(pointer)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:  # noqa: N802
        return self._free(pointer)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        handle = 1000 + len(self.streams)
        self.streams.add(handle)
        return 0, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        self.streams.remove(stream)
        return (0,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream in self.streams

        def copy() -> None:
            ctypes.memmove(dst, src, count)

        self.put(copy)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert self.recording is None, "a synchronisation inside a capture fails"
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Callable[[], None]]]:  # noqa: N802
        recorded, self.recording = self.recording or [], None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[int, int]:  # noqa: N802
        handle = 5000 + len(self.graphs)
        self.graphs[handle] = list(graph)
        return 0, handle

    def cudaGraphDestroy(self, graph: list[Callable[[], None]]) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        for work in self.graphs[executable]:
            work()
        return (0,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:  # noqa: N802
        del self.graphs[executable]
        return (0,)


class Device:
    """One machine with a fake GPU. `asked` is what the builder was last told, `profiles` and `timings` what it was
    given, `loads` counts engines that were deserialized, `given` has the kernels that a runtime cache was given.

    `plan` replaces what the builder gives, `computes` the ONNX that engines run, `layers` the inspector's answer,
    `validity` what is said of an engine (names of EngineValidity and EngineInvalidityDiagnostics); with `fresh` a
    network that was built already is built again; `capturable`: whether a context may be captured.
    """

    def __init__(self, version: str) -> None:
        self.cuda = FakeCuda()
        self.asked: dict[str, Any] = {"flags": []}
        self.profiles: list[tuple[str, Any, Any, Any]] = []
        self.timings: list[bytes] = []
        self.given: list[bytes] = []
        self.loads = 0
        self.layers: str | None = None
        self.plan: bytes | None = None
        self.computes: bytes | None = None
        self.validity: tuple[str, str | None] = ("VALID", None)
        self.fresh = False
        self.capturable = True
        self.known: dict[str, tuple[bytes, tuple[Any, ...]]] = {}  # plan -> the ONNX and the profile that it is of
        self.parsed = b""
        api = load_api(version)
        self.trt = types.ModuleType("tensorrt" if version != RTX else binding.RTX.module)
        self.trt.__dict__.update({name: getattr(real, name) for name in dir(real) if name[0] != "_"})
        self.trt.__dict__.update(__version__=api.version, Runtime=partial(Runtime, self), Refitter=Refitter,
                                 OnnxParserRefitter=OnnxParserRefitter)  # fmt: skip
        # the one enum of which we take a member that is not in all of the versions
        level, members = real.HardwareCompatibilityLevel, api.enum("HardwareCompatibilityLevel") or ()
        shared = {name: getattr(level, name) for name in members if hasattr(level, name)}
        self.trt.__dict__["HardwareCompatibilityLevel"] = types.SimpleNamespace(**shared)

    def know(self, folder: Path, weights: bool = True) -> None:
        """The engine of a bundle, which was compiled while no device was plugged in."""
        model = (folder / "model.onnx").read_bytes()
        self.known[digest((folder / "model.engine").read_bytes())] = model if weights else b"", ()

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """The real classes tell what they are given. Timings, hardware compatibility and a lean runtime are what
        TensorRT for RTX has by name and not in deed: those are kept here and go no further."""
        parse, build, shape = (
            real.OnnxParser.parse, real.Builder.build_serialized_network, real.IOptimizationProfile.set_shape
        )  # fmt: skip
        set_flag = real.IBuilderConfig.set_flag

        def parsed(parser: Any, model: bytes) -> bool:
            self.parsed = model
            return bool(parse(parser, model))

        def shaped(profile: Any, *given: Any) -> None:
            self.profiles.append(given)
            shape(profile, *given)

        def flagged(config: Any, flag: Any) -> None:
            self.asked["flags"].append(flag.name)
            if flag != real.BuilderFlag.VERSION_COMPATIBLE:
                set_flag(config, flag)

        def built(builder: Any, network: Any, config: Any) -> bytes | None:
            self.asked |= {
                name: getattr(config, name) for name in ("builder_optimization_level", "profiling_verbosity")
            }
            key = digest(self.parsed), str(self.profiles)
            if self.fresh or key not in _built:
                made = build(builder, network, config)
                if made is None:
                    return None
                _built[key] = bytes(made)
            self.known[digest(_built[key])] = self.parsed, tuple(self.profiles)
            return _built[key] if self.plan is None else self.plan

        def timing(_: Any, serialized: bytes) -> Any:
            self.timings.append(serialized)
            return types.SimpleNamespace(serialize=lambda: b"timings")

        level = property(lambda _: None, lambda _, value: self.asked.update(hardware=value))
        for owner, name, stands_in in (
            (real.OnnxParser, "parse", parsed),
            (real.IOptimizationProfile, "set_shape", shaped),
            (real.Builder, "build_serialized_network", built),
            (real.IBuilderConfig, "set_flag", flagged),
            (real.IBuilderConfig, "create_timing_cache", timing),
            (real.IBuilderConfig, "set_timing_cache", lambda *_, **__: True),
            (real.IBuilderConfig, "hardware_compatibility_level", level),
        ):
            patch.setattr(owner, name, stands_in)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what needs a GPU ---


class Runtime:
    """Loads what the builder made, and nothing else. The header is looked at by the real library first."""

    engine_host_code_allowed = False

    def __init__(self, device: Device, logger: Any) -> None:
        self.device, self.logger = device, logger

    @property
    def engine_header_size(self) -> int:
        return int(real.Runtime(self.logger).engine_header_size)

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        verdict, bits = real.Runtime(real.Logger(real.Logger.INTERNAL_ERROR)).get_engine_validity(buffer)
        reasons = real.EngineInvalidityDiagnostics
        if int(bits) & int(reasons.MALFORMED_ENGINE):
            return verdict, int(bits)
        word, reason = self.device.validity
        return getattr(real.EngineValidity, word), int(getattr(reasons, reason)) if reason else 0

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if digest(serialized_engine) not in self.device.known:
            self.logger.log(real.ILogger.ERROR, "the plan is of another version")
            return None
        self.device.loads += 1
        return Engine(self.device, *self.device.known[digest(serialized_engine)])


@functools.lru_cache(4)
def session_of(model: bytes) -> onnxruntime.InferenceSession:
    """One for all engines of the same file, which tests load again and again."""
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


class Engine:
    """`model`: its ONNX, empty while it has no weights. `profile`: the shapes that it was built for."""

    def __init__(self, device: Device, model: bytes, profile: tuple[Any, ...]) -> None:
        self.device, self.profile = device, profile
        self.fill(device.computes or model)

    def fill(self, model: bytes) -> None:
        self.model = model
        if model:
            self.session = session_of(model)
            self.tensors = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(uint8)": real.DataType.UINT8, "tensor(float)": real.DataType.FLOAT}[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        ((known, *shapes),) = self.profile
        assert (name, profile_index) == (known, 0)
        return list(shapes)

    def create_execution_context(self, runtime_config: RuntimeConfig | None = None) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self.device.layers or describe_layers(onnx.load_from_string(self.model)))

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.device)


class Inspector:
    def __init__(self, text: str) -> None:
        self.text = text

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 (the vendor's name)
        return self.text


class RuntimeConfig:
    def __init__(self, device: Device) -> None:
        self.device = device

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.device)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        return True


class RuntimeCache:
    """Kernels of a first run are added to those that it was given."""

    def __init__(self, device: Device) -> None:
        self.device, self.kernels = device, b""

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = blob
        self.device.given.append(blob)
        return True

    def serialize(self) -> bytes:
        return self.kernels or b"kernels"


class Refitter:
    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.model = engine, b""

    def refit_cuda_engine(self) -> bool:
        self.engine.fill(self.model)
        return bool(self.model)


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter, self.logger = refitter, logger

    def refit_from_bytes(self, model: bytes) -> bool:
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, ValueError):
            self.logger.log(real.ILogger.ERROR, "no model")
            return False
        self.refitter.model = model
        return True


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.cuda = engine, engine.device.cuda
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory in self.cuda.memory, "an address that is no allocation"
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        ((_, least, _, most),) = self.engine.profile
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream in self.cuda.streams
        return self.engine.device.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle in self.cuda.streams
        shapes = dict(self.shapes)
        self.cuda.put(lambda: self.compute(shapes))
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]]) -> None:
        session, feeds = self.engine.session, {}
        for tensor in session.get_inputs():
            shape = shapes.get(tensor.name, tuple(tensor.shape))
            dtype = np.dtype(np.uint8 if tensor.type == "tensor(uint8)" else np.float32)
            data = ctypes.string_at(self.addresses[tensor.name], int(np.prod(shape)) * dtype.itemsize)
            feeds[tensor.name] = np.frombuffer(data, dtype).reshape(shape)
        for tensor, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            block = np.ascontiguousarray(value)
            ctypes.memmove(self.addresses[tensor.name], block.ctypes.data, block.nbytes)


STAND_INS = {
    "Runtime": Runtime, "ICudaEngine": Engine, "EngineInspector": Inspector, "IRuntimeConfig": RuntimeConfig,
    "IRuntimeCache": RuntimeCache, "Refitter": Refitter, "OnnxParserRefitter": OnnxParserRefitter,
    "IExecutionContext": Context,
}  # fmt: skip


def describe_layers(model: onnx.ModelProto) -> str:
    """The inspector's JSON for an engine that runs every node in the type that the ONNX gives it."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    kinds |= {t.name: t.data_type for t in inferred.initializer}
    words: dict[int, str] = {onnx.TensorProto.FLOAT: "Row major linear FP32", onnx.TensorProto.FLOAT16: "Half"}
    layers = [
        {
            "Name": f"__myl_{node.op_type}",
            "LayerType": "kgen",
            "Inputs": [{"Name": i, "Format/Datatype": words.get(kinds.get(i, 0), "Int32")} for i in node.input[:1]],
            "Outputs": [{"Name": o, "Format/Datatype": words.get(kinds.get(o, 0), "Int32")} for o in node.output],
            "Metadata": f"[ONNX Layer: {node.name}]",
        }
        for node in model.graph.node
    ]
    return json.dumps({"Layers": layers, "Bindings": []})


@contextmanager
def plugged_in(version: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A GPU is here, and TensorRT of a recorded version or (RTX) TensorRT for RTX."""
    device = Device(version)
    name = device.trt.__name__
    with monkeypatch.context() as patch:
        device.trt.__spec__ = ModuleSpec(name, None)
        device.watch(patch)
        patch.setitem(sys.modules, name, device.trt)
        patch.setattr("dualtoken_deploy.targets.nvidia.cuda.runtime_api", lambda: device.cuda)
        yield device
