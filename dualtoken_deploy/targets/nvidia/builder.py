"""ONNX -> engine with TensorRT's builder: a strongly typed network, so that 10.x and 11.x take the same path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.errors import ConversionError, MissingError, UsageError
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.nvidia.binding import TENSORRT, complaint, load_library, make_logger
from dualtoken_deploy.targets.nvidia.engine import HARDWARE_LEVELS
from dualtoken_deploy.targets.nvidia.network import (
    Batches,
    Tell,
    add_profile,
    check_batches,
    make_monitor,
    read_network,
)

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class BuildOptions:
    """`workspace_mib` None: all of the device's memory. `batches`: smallest, best and largest of a dynamic batch.

    Raises UsageError on values that TensorRT would not take.
    """

    workspace_mib: int | None = None
    optimization_level: int = 3  # TensorRT's own default; 5 searches longest
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    batches: Batches = (1, 1, 8)

    def __post_init__(self) -> None:
        if self.hardware_compatibility not in HARDWARE_LEVELS:
            raise UsageError(
                f"unknown hardware compatibility {self.hardware_compatibility!r}; valid: {', '.join(HARDWARE_LEVELS)}"
            )
        check_batches(self.batches)


@dataclass(frozen=True)
class Engine:
    """`plan`: the engine's bytes. `layers`: the inspector's JSON."""

    plan: bytes
    layers: str


def build_engine(onnx: bytes, inputs: tuple[TensorSpec, ...], options: BuildOptions, cache: Path, tell: Tell) -> Engine:
    """Builds an engine for the GPU of this machine; timings are read from and added to the file `cache`.

    Raises MissingError where TensorRT lacks an option, ConversionError where it does not parse or build.
    """
    trt = load_library(TENSORRT)
    logger = make_logger(trt)
    builder: tensorrt.Builder = trt.Builder(logger)
    network: tensorrt.INetworkDefinition = read_network(trt, TENSORRT, builder, onnx, logger)
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    monitor = make_monitor(trt, tell)
    config.progress_monitor = monitor
    _configure(trt, config, options)
    add_profile(builder, config, inputs, options.batches)
    timings = _read_timings(config, cache)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise ConversionError(f"TensorRT {trt.__version__} cannot build the engine: {complaint(logger)}")
    _keep_timings(timings, cache)
    data = bytes(plan)
    return Engine(data, _inspect(trt, data, logger, options.version_compatible))


def _configure(trt: Any, config: tensorrt.IBuilderConfig, options: BuildOptions) -> None:
    config.builder_optimization_level = options.optimization_level
    # without it the inspector names no types, and nobody could tell which precision really runs
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same-compute-capability":
        level = getattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None)  # not in 10.3
        if level is None:
            raise MissingError(
                f"TensorRT {trt.__version__} has no hardware compatibility same-compute-capability; "
                "use none or ampere-plus, or a later TensorRT"
            )
        config.hardware_compatibility_level = level


def _read_timings(config: tensorrt.IBuilderConfig, cache: Path) -> Any:
    """The cache file's timings, or none; TensorRT itself drops those of another version or GPU."""
    stored = cache.read_bytes() if cache.is_file() else b""
    timings: tensorrt.ITimingCache = config.create_timing_cache(stored)
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _keep_timings(timings: tensorrt.ITimingCache, cache: Path) -> None:
    """Written beside and renamed, so that two builds at once leave one whole file."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    temporary.write_bytes(bytes(timings.serialize()))
    temporary.replace(cache)


def _inspect(trt: Any, plan: bytes, logger: Any, version_compatible: bool) -> str:
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = version_compatible  # such a plan carries its own lean runtime
    engine: tensorrt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ConversionError(f"TensorRT cannot load the engine that it built: {complaint(logger)}")
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
