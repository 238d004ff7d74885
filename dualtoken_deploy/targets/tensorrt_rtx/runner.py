"""Runs the engine of a TensorRT for RTX bundle, after the library's own preflight; compiled kernels are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError
from dualtoken_deploy.files import cache_folder, write_atomically
from dualtoken_deploy.targets.nvidia.binding import RTX, complaint, load_library
from dualtoken_deploy.targets.nvidia.engine import ENGINE
from dualtoken_deploy.targets.nvidia.runner import EngineRunner
from dualtoken_deploy.targets.runner import RunnerOptions
from dualtoken_deploy.targets.tensorrt_rtx.compile import EngineBuild
from dualtoken_deploy.targets.tensorrt_rtx.validity import MALFORMED, diagnose, in_words, read_header

if TYPE_CHECKING:
    import tensorrt


def load(bundle: Bundle, options: RunnerOptions) -> RtxRunner:
    """A runner for model.engine of the bundle.

    Raises MissingError where the library, the driver or the GPU is not here or does not fit the engine, BundleError
    where the file is no engine.
    """
    path, manifest = bundle.path / ENGINE, bundle.manifest
    made = None if manifest.build is None else manifest.build.typed(EngineBuild)
    mend = f"export it anew, or dualtoken build {bundle.path} --rebuild on its GPU"
    notes = preflight(path, mend, "" if made is None else made.version)
    specs = (manifest.input.tensor,), manifest.outputs
    refit = bundle.path / "model.onnx" if made is not None and made.weightless else None
    return RtxRunner(path, *specs, options, notes=notes, refit_from=refit)


def preflight(path: Path, mend: str, compiled_by: str = "") -> tuple[str, ...]:
    """Asks the library about the engine's header. Notes on what loads but is not at its best. `compiled_by`: the
    version that the manifest names, since without a driver the library does not come as far as versions.

    Raises BundleError where it is no engine, MissingError where it will not load here; neither loads it.
    """
    trt = load_library(RTX)
    if not path.is_file():
        raise BundleError(f"there is no {path}; make it with: {mend}")
    names, verdict = diagnose(trt, read_header(trt, path))
    if MALFORMED in names:
        raise BundleError(f"{path} is no engine: {in_words(trt, names)}; make it anew: {mend}")
    if verdict == "invalid":
        other = compiled_by and compiled_by != trt.__version__
        also = f"; {RTX.title} {compiled_by} compiled it, here is {trt.__version__}: {mend}" if other else ""
        raise MissingError(f"{path} is compiled, and will not load here: {in_words(trt, names)}{also}")
    return (f"{RTX.title} calls the engine suboptimal here",) if verdict == "suboptimal" else ()


class RtxRunner(EngineRunner):
    """Kernels are compiled for the GPU when an engine is first loaded, and kept in the user's cache folder.

    `refit_from`: the ONNX that a weightless engine takes its weights from.
    """

    def __init__(self, path: Path, *specs: Any, refit_from: Path | None = None, **more: Any) -> None:
        self._refit_from = refit_from
        self._kept: Path | None = None
        super().__init__(RTX, path, *specs, **more)

    def _refit(self) -> None:
        if self._refit_from is None:
            return
        trt = self._trt
        refitter: tensorrt.Refitter = trt.Refitter(self._engine, self._logger)
        parser: tensorrt.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_bytes(self._refit_from.read_bytes()) and refitter.refit_cuda_engine()):
            raise BundleError(f"{self._refit_from} does not fill {self._path}: {complaint(self._logger)}")

    def _make_context(self) -> Any:
        """With the kernels of earlier runs; the library drops those of another driver, GPU or version by itself."""
        engine: tensorrt.ICudaEngine = self._engine
        self._config: tensorrt.IRuntimeConfig = engine.create_runtime_config()
        self._cache: tensorrt.IRuntimeCache = self._config.create_runtime_cache()
        digest = hashlib.sha256(self._path.read_bytes()).hexdigest()
        self._kept = (self._folder or cache_folder() / "tensorrt-rtx") / f"{digest[:24]}.kernels"
        self._before = self._kept.read_bytes() if self._kept.is_file() else b""
        if self._before:
            self._cache.deserialize(self._before)
        self._config.set_runtime_cache(self._cache)
        return engine.create_execution_context(self._config)

    def _can_capture(self) -> bool:
        context: tensorrt.IExecutionContext = self._context
        return bool(context.is_stream_capturable(int(self._stream.handle)))

    def _close(self) -> None:
        """The kernels that were compiled meanwhile go into the cache folder first."""
        if self._kept is not None and hasattr(self, "_context"):
            kernels = bytes(self._cache.serialize())
            if kernels != self._before:
                write_atomically(self._kept, lambda temporary: temporary.write_bytes(kernels))
        for name in ("_context", "_config", "_cache"):
            if hasattr(self, name):
                delattr(self, name)
        super()._close()
