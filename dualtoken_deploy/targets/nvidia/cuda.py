"""CUDA without torch, through cuda-python's bindings: devices, pinned and device memory, a stream, a captured graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.errors import ConversionError, MissingError, missing_extra


@dataclass(frozen=True)
class Gpu:
    """One device: `compute_capability` as "9.0", `driver` is the newest CUDA that the driver runs, as "13.0"."""

    index: int
    name: str
    compute_capability: str
    multiprocessors: int
    memory_mib: int
    driver: str


def runtime_api() -> Any:
    """The module cuda.bindings.runtime. Raises MissingError that names the extra."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing_extra("tensorrt", "CUDA") from error
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call: None, one, or a tuple of several. Raises ConversionError with CUDA's own words."""
    status, *values = result
    if int(status) != 0:
        raise ConversionError(f"CUDA: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def find_gpu(device: str | None = None) -> Gpu:
    """The device of "cuda" (or None), "cuda:1". Raises MissingError where there is none, or no driver."""
    index = _index(device)
    runtime = runtime_api()
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        name = getattr(status, "name", status) if int(status) else "no device"
        raise MissingError(f"no NVIDIA GPU can be used here ({name}); run this on the device, with its driver")
    if index >= count:
        raise MissingError(f"there is no device {device!r} here; CUDA finds {count}: cuda:0 to cuda:{count - 1}")
    found = check(runtime.cudaGetDeviceProperties(index))
    driver = check(runtime.cudaDriverGetVersion())
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return Gpu(
        index=index,
        name=name.rstrip("\0"),
        compute_capability=f"{found.major}.{found.minor}",
        multiprocessors=int(found.multiProcessorCount),
        memory_mib=int(found.totalGlobalMem) >> 20,
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
    )


def _index(device: str | None) -> int:
    name, _, number = (device or "cuda").lower().partition(":")
    if name not in ("cuda", "gpu") or (number and not number.isdecimal()):
        raise MissingError(f"TensorRT has no device {device!r}; it runs on NVIDIA GPUs: cuda, or cuda:1")
    return int(number or 0)


class Buffer:
    """Pinned host memory and device memory of the same size; `host` is a numpy view of the former."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self._runtime = runtime_api()
        self.bytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.device: int = int(check(self._runtime.cudaMalloc(self.bytes)))
        try:
            self._pinned: int = int(check(self._runtime.cudaMallocHost(self.bytes)))
        except ConversionError:
            check(self._runtime.cudaFree(self.device))
            raise
        raw = (ctypes.c_uint8 * self.bytes).from_address(self._pinned)
        self.host: NDArray[Any] = np.frombuffer(memoryview(raw), dtype=dtype, count=int(np.prod(shape))).reshape(shape)

    def free(self) -> None:
        """Gives both back; `host` must not be read after that."""
        if self.device:
            check(self._runtime.cudaFree(self.device))
            check(self._runtime.cudaFreeHost(self._pinned))
        self.device = self._pinned = 0


class Stream:
    """A stream of our own, with copies, and graphs captured from it."""

    def __init__(self, device: int) -> None:
        self._runtime = runtime_api()
        check(self._runtime.cudaSetDevice(device))
        self.handle: Any = check(self._runtime.cudaStreamCreate())
        self._graphs: list[Any] = []

    def upload(self, buffer: Buffer, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._runtime.cudaMemcpyAsync(buffer.device, buffer.host.ctypes.data, size, kind, self.handle))

    def download(self, buffer: Buffer, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._runtime.cudaMemcpyAsync(buffer.host.ctypes.data, buffer.device, size, kind, self.handle))

    def synchronize(self) -> None:
        check(self._runtime.cudaStreamSynchronize(self.handle))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` puts on this stream; the result puts all of it there again in one launch."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(self._runtime.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        finally:  # a capture that is left open would fail every later call on the stream
            graph = check(self._runtime.cudaStreamEndCapture(self.handle))
        executable = check(self._runtime.cudaGraphInstantiate(graph, 0))
        check(self._runtime.cudaGraphDestroy(graph))
        self._graphs.append(executable)

        def launch() -> None:
            check(self._runtime.cudaGraphLaunch(executable, self.handle))

        return launch

    def close(self) -> None:
        for executable in self._graphs:
            check(self._runtime.cudaGraphExecDestroy(executable))
        self._graphs.clear()
        if self.handle is not None:
            check(self._runtime.cudaStreamDestroy(self.handle))
        self.handle = None
