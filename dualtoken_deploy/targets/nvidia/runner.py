"""Runs an engine of TensorRT or TensorRT for RTX: own stream, pinned buffers, a captured CUDA graph where shapes are
fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.errors import BundleError, ConversionError, UsageError
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.nvidia.binding import Library, complaint, load_library, make_logger
from dualtoken_deploy.targets.nvidia.cuda import Buffer, Stream, find_gpu
from dualtoken_deploy.targets.nvidia.inspector import read_layers
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, RunnerOptions, check_declared

if TYPE_CHECKING:
    import tensorrt


class EngineRunner(Bordered):
    """One engine with one execution context. Its memory is the device's: use it as a context manager.

    What one library does in its own way is a method of its own: `_refit`, `_make_context`, `_can_capture`.
    """

    def __init__(
        self,
        library: Library,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        host_code: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        """`host_code`: the plan carries its own runtime, which TensorRT calls version-compatible."""
        self._inputs, self._outputs, self._notes = inputs, outputs, notes
        self._title, self._path, self._folder = library.title, path, options.cache_dir
        self._trt = load_library(library, lean=host_code)
        self._logger = make_logger(self._trt)
        self._stream = Stream(find_gpu(options.device).index)
        self._buffers: dict[str, Buffer] = {}
        self._launch: Callable[[], None] | None = None
        self._dynamic = any(not isinstance(size, int) for spec in inputs for size in spec.shape)
        try:
            self._engine: tensorrt.ICudaEngine = self._load(host_code)
            self._refit()
            self._context: tensorrt.IExecutionContext = self._make_context()
            self._allocate()
            if not self._dynamic:
                self._work()  # once before capturing: TensorRT sets up lazily, and that cannot be captured
                self._stream.synchronize()
                if self._can_capture():
                    self._launch = self._stream.capture(self._work)
        except BaseException:
            self._close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        batch = 1
        for spec in self._inputs:
            value, buffer = feeds[spec.name], self._buffers[spec.name]
            batch = len(value)
            if value.shape[1:] != buffer.host.shape[1:] or batch > len(buffer.host):
                raise UsageError(f"input {spec.name} of shape {value.shape} does not fit {buffer.host.shape}")
            buffer.host[:batch] = value
            if self._dynamic and not self._context.set_input_shape(spec.name, tuple(value.shape)):
                raise UsageError(
                    f"the engine takes no input {spec.name} of shape {value.shape}: rebuild with --batches"
                )
        if self._launch is not None:
            self._launch()
        else:
            self._work(batch if self._dynamic else None)
        self._stream.synchronize()
        return {spec.name: self._buffers[spec.name].host[:batch].copy() for spec in self._outputs}

    def execution(self) -> Execution:
        """Layers as the engine inspector lists them; those with matrix products under their ONNX operator."""
        inspector: tensorrt.EngineInspector = self._engine.create_engine_inspector()
        layers = read_layers(str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)))
        return Execution(layers.operators, layers.precision, layers.nodes, layers.float32_share, self._notes)

    def _refit(self) -> None:
        """Gives an engine without weights its weights."""

    def _make_context(self) -> Any:
        return self._engine.create_execution_context()

    def _can_capture(self) -> bool:
        return True

    def _load(self, host_code: bool) -> Any:
        trt = self._trt
        self._runtime: tensorrt.Runtime = trt.Runtime(self._logger)
        # host code in a plan runs with our rights: allowed only where the plan carries its own runtime
        self._runtime.engine_host_code_allowed = host_code
        engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if engine is None:
            raise BundleError(
                f"{self._title} {trt.__version__} refuses {self._path}: {complaint(self._logger)}; rebuild it"
            )
        return engine

    def _allocate(self) -> None:
        """One buffer for each tensor, as large as the profile's largest batch, and its address in the context."""
        trt = self._trt
        dtypes = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16"}
        dtypes[trt.DataType.INT32] = "int32"
        wanted = {spec.name: spec for spec in (*self._inputs, *self._outputs)}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if set(names) != set(wanted):
            raise BundleError(f"{self._path} has the tensors {', '.join(names)}, the manifest says {', '.join(wanted)}")
        declared = {
            name: Declared(
                dtypes.get(self._engine.get_tensor_dtype(name), "of an unknown type"),
                tuple(size if size >= 0 else None for size in self._engine.get_tensor_shape(name)),
            )
            for name in names
        }
        given = {spec.name for spec in self._inputs}
        for kind, specs in (("input", self._inputs), ("output", self._outputs)):
            check_declared(
                self._path, kind, specs, {n: d for n, d in declared.items() if (n in given) is (kind == "input")}
            )
        largest = 1
        for name in (spec.name for spec in self._inputs):
            if any(size < 0 for size in self._engine.get_tensor_shape(name)):
                largest = self._engine.get_tensor_profile_shape(name, 0)[2][0]  # smallest, best, largest
        for name, spec in wanted.items():
            shape = tuple(size if size >= 0 else largest for size in self._engine.get_tensor_shape(name))
            self._buffers[name] = Buffer(shape, spec.dtype)
            self._context.set_tensor_address(name, self._buffers[name].device)

    def _work(self, batch: int | None = None) -> None:
        """Puts copies and kernels for the first `batch` rows (None: all) on the stream."""
        for spec in self._inputs:
            self._stream.upload(self._buffers[spec.name], self._bytes(spec.name, batch))
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise ConversionError(f"{self._title} could not run the engine: {complaint(self._logger)}")
        for spec in self._outputs:
            self._stream.download(self._buffers[spec.name], self._bytes(spec.name, batch))

    def _bytes(self, name: str, batch: int | None) -> int:
        host = self._buffers[name].host
        return int(host[:batch].nbytes)

    def _close(self) -> None:
        """Context and engine before the memory that they read, the stream last."""
        for name in ("_context", "_engine", "_runtime"):
            if hasattr(self, name):
                delattr(self, name)
        while self._buffers:
            self._buffers.popitem()[1].free()
        self._stream.close()
