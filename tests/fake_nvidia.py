"""A stand-in for TensorRT and CUDA, for what surrounds an engine: order of calls, files, errors. No proof of TensorRT.

The tensorrt module is made from the recorded API of one version: it has that version's names and no others, and a call
that a recorded signature does not take raises TypeError, as in the real bindings. Behind it an "engine" is the ONNX,
run by ONNX Runtime on the fake device's memory, so that a wrong address, size or order shows in the logits.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.tensorrt_api import Api, load_api

PLAN = b"fake plan "
Handlers = dict[str, Callable[..., Any]]


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


def make_module(version: str, handlers: Handlers) -> types.ModuleType:
    """The tensorrt module of a recorded version; `handlers` ("Class.member") say what its methods and properties do."""
    api = load_api(version)
    module = types.ModuleType("tensorrt")
    module.__dict__["__version__"] = api.version
    for name, entry in api.names.items():
        if "enum" in entry:
            module.__dict__[name] = enum.IntEnum(name, {m: i for i, m in enumerate(entry["enum"])})
        elif "members" in entry:
            module.__dict__[name] = _make_class(api, module, name, handlers)
    return module


def _make_class(api: Api, module: types.ModuleType, name: str, handlers: Handlers) -> type:
    space: dict[str, Any] = {}
    for member, recorded in api.members(name).items():
        key = f"{name}.{member}"
        if isinstance(recorded, list):
            space[member] = _make_method(api, module, name, member, handlers.get(key))
        elif recorded == "property":
            space[member] = _make_property(member, handlers.get(key))
        elif member != "__init__":
            space[member] = key

    def set_attribute(self: Any, attribute: str, value: Any) -> None:
        if type(self) is made and attribute not in api.members(name) and not attribute.startswith("fake_"):
            raise AttributeError(f"{name} of tensorrt {api.version} has no {attribute}")
        object.__setattr__(self, attribute, value)

    made = type(name, (), {**space, "__setattr__": set_attribute})
    return made


def _make_method(api: Api, module: types.ModuleType, owner: str, name: str, handler: Callable[..., Any] | None) -> Any:
    signatures = api.signatures(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        fitting = [s for s in signatures if s.accepts(len(args), tuple(kwargs))]
        if not fitting:
            raise TypeError(f"{owner}.{name} of tensorrt {api.version} does not take {args} {kwargs}")
        if handler is not None:
            return handler(self, *args, **kwargs)
        if name == "__init__":
            self.__dict__["fake_args"] = args
            return None
        result = module.__dict__.get(fitting[0].returns)
        if isinstance(result, type) and not issubclass(result, enum.Enum):
            return result.__new__(result)
        return {"bool": True, "int": 0, "str": ""}.get(fitting[0].returns)

    return method


def _make_property(name: str, handler: Callable[..., Any] | None) -> property:
    def get(self: Any) -> Any:
        return handler(self) if handler else self.__dict__.get(name)

    return property(get, lambda self, value: self.__dict__.__setitem__(name, value))


class Device:
    """One fake machine. `configs` and `profiles` are what the code under test set up; `layers` may replace the
    inspector's answer; `parse_error` makes the parser refuse."""

    def __init__(self, version: str) -> None:
        self.cuda = FakeCuda()
        self.configs: list[Any] = []
        self.profiles: list[tuple[str, Any, Any, Any]] = []
        self.timings: list[bytes] = []
        self.layers: str | None = None
        self.parse_error: str | None = None
        self.plan: bytes | None = None  # what the builder gives; None: the ONNX
        self.trt = make_module(version, self._handlers())

    def _handlers(self) -> Handlers:
        return {
            "OnnxParser.parse": self._parse,
            "OnnxParser.num_errors": lambda parser: 1 if self.parse_error else 0,
            "OnnxParser.get_error": lambda parser, index: self.trt.ParserError.__new__(self.trt.ParserError),
            "ParserError.node_operator": lambda error: "Mystery",
            "ParserError.node_name": lambda error: "Mystery_0",
            "ParserError.desc": lambda error: self.parse_error,
            "Builder.build_serialized_network": self._build,
            "IBuilderConfig.create_timing_cache": self._timing_cache,
            "IBuilderConfig.set_flag": lambda config, flag: config.__dict__.setdefault("set", []).append(flag.name),
            "ITimingCache.serialize": lambda cache: b"timings",
            "IOptimizationProfile.set_shape": lambda profile, *shape: self.profiles.append(shape),
            "Runtime.deserialize_cuda_engine": self._deserialize,
            "ICudaEngine.num_io_tensors": lambda engine: len(engine.fake_tensors),
            "ICudaEngine.get_tensor_name": lambda engine, index: list(engine.fake_tensors)[index],
            "ICudaEngine.get_tensor_shape": lambda engine, name: engine.fake_tensors[name][0],
            "ICudaEngine.get_tensor_dtype": lambda engine, name: engine.fake_tensors[name][1],
            "ICudaEngine.get_tensor_profile_shape": self._profile_shape,
            "ICudaEngine.create_execution_context": self._context,
            "ICudaEngine.create_engine_inspector": self._inspector,
            "EngineInspector.get_engine_information": lambda inspector, _: inspector.fake_text,
            "IExecutionContext.set_tensor_address": self._address,
            "IExecutionContext.set_input_shape": self._input_shape,
            "IExecutionContext.execute_async_v3": self._execute,
        }

    def _parse(self, parser: Any, model: bytes) -> bool:
        parser.fake_args[0].fake_onnx = model
        return self.parse_error is None

    def _build(self, builder: Any, network: Any, config: Any) -> bytes | None:
        self.configs.append(config)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        return PLAN + network.fake_onnx if self.plan is None else self.plan

    def _timing_cache(self, config: Any, stored: bytes) -> Any:
        self.timings.append(stored)
        return self.trt.ITimingCache.__new__(self.trt.ITimingCache)

    def _deserialize(self, runtime: Any, plan: bytes) -> Any:
        if not plan.startswith(PLAN):
            runtime.fake_args[0].log(self.trt.ILogger.ERROR, "the plan is of another version")
            return None
        engine = self.trt.ICudaEngine.__new__(self.trt.ICudaEngine)
        engine.fake_onnx = plan.removeprefix(PLAN)
        engine.fake_session = onnxruntime.InferenceSession(engine.fake_onnx, providers=["CPUExecutionProvider"])
        types_ = {"tensor(uint8)": self.trt.DataType.UINT8, "tensor(float)": self.trt.DataType.FLOAT}
        session = engine.fake_session
        engine.fake_tensors = {
            t.name: (tuple(d if isinstance(d, int) else -1 for d in t.shape), types_[t.type])
            for t in (*session.get_inputs(), *session.get_outputs())
        }
        return engine

    def _profile_shape(self, engine: Any, name: str, profile_index: int) -> list[Any]:
        assert (name, profile_index) == (self.profiles[-1][0], 0)
        return list(self.profiles[-1][1:])

    def _context(self, engine: Any) -> Any:
        context = self.trt.IExecutionContext.__new__(self.trt.IExecutionContext)
        context.fake_engine, context.fake_addresses, context.fake_shapes = engine, {}, {}
        return context

    def _inspector(self, engine: Any) -> Any:
        inspector = self.trt.EngineInspector.__new__(self.trt.EngineInspector)
        inspector.fake_text = self.layers or describe_layers(onnx.load_from_string(engine.fake_onnx))
        return inspector

    def _address(self, context: Any, name: str, memory: int) -> bool:
        assert memory in self.cuda.memory, "an address that is no allocation"
        context.fake_addresses[name] = memory
        return True

    def _input_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> bool:
        context.fake_shapes[name] = shape
        least, most = self.profiles[-1][1], self.profiles[-1][3]
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def _execute(self, context: Any, stream: int) -> bool:
        assert stream in self.cuda.streams
        shapes = dict(context.fake_shapes)
        self.cuda.put(lambda: self._compute(context, shapes))
        return True

    def _compute(self, context: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        session, feeds = context.fake_engine.fake_session, {}
        for tensor in session.get_inputs():
            shape = shapes.get(tensor.name, tuple(tensor.shape))
            dtype = np.dtype(np.uint8 if tensor.type == "tensor(uint8)" else np.float32)
            size = int(np.prod(shape)) * dtype.itemsize
            data = ctypes.string_at(context.fake_addresses[tensor.name], size)
            feeds[tensor.name] = np.frombuffer(data, dtype).reshape(shape)
        for tensor, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            block = np.ascontiguousarray(value)
            ctypes.memmove(context.fake_addresses[tensor.name], block.ctypes.data, block.nbytes)


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
    """TensorRT and CUDA are the fake's in here."""
    device = Device(version)
    with monkeypatch.context() as patch:
        device.trt.__spec__ = ModuleSpec("tensorrt", None)
        patch.setitem(sys.modules, "tensorrt", device.trt)
        patch.setattr("dualtoken_deploy.targets.nvidia.cuda.runtime_api", lambda: device.cuda)
        yield device
