"""ONNX -> engine with the builder of TensorRT for RTX: for named GPUs or all of them, on a machine without any."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.errors import ConversionError, MissingError, UsageError
from dualtoken_deploy.machine import library_versions
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.apart import run_apart
from dualtoken_deploy.targets.nvidia.binding import RTX, complaint, load_library, make_logger, version_tuple
from dualtoken_deploy.targets.nvidia.cuda import find_gpu
from dualtoken_deploy.targets.nvidia.engine import ENGINE
from dualtoken_deploy.targets.nvidia.network import (
    Batches,
    Tell,
    add_profile,
    check_batches,
    make_monitor,
    parse_batches,
    read_network,
)
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.targets.tensorrt_rtx.validity import malformed

if TYPE_CHECKING:
    import tensorrt

LIBRARIES = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")  # the parser's note on each layer


@dataclass(frozen=True)
class CompileOptions:
    """`capabilities`: as "8.9"; none: the vendor's portable set. `weightless`: the weights stay in the ONNX and are put
    in when the engine is loaded. `batches`: smallest, best and largest of a dynamic batch."""

    capabilities: tuple[str, ...] = ()
    weightless: bool = False
    batches: Batches = (1, 1, 8)

    def __post_init__(self) -> None:
        for text in self.capabilities:
            if not re.fullmatch(r"\d+\.\d", text):
                raise UsageError(f"compute capability {text!r} is not MAJOR.MINOR, e.g. 8.9")
        check_batches(self.batches)

    @staticmethod
    def of(settings: Mapping[str, str]) -> CompileOptions:
        """From what was given to export. Raises UsageError."""
        given = settings.get("compute_capability", "")
        batches = settings.get("batches")
        return CompileOptions(
            tuple(dict.fromkeys(part.strip() for part in given.split(",") if part.strip())),
            bool(settings.get("weightless")),
            CompileOptions.batches if batches is None else parse_batches(batches),
        )


@dataclass(frozen=True)
class EngineBuild:
    """What an engine was compiled with, of the `build` of a manifest."""

    compute_capabilities: tuple[str, ...]
    weightless: bool
    batches: Batches
    version: str = ""


@dataclass(frozen=True)
class Compiled:
    """An engine that no GPU ran. `nodes`: names of the ONNX nodes that the parser made layers of; `layers`: how many
    those are; `warnings`: the builder's."""

    plan: bytes
    nodes: frozenset[str]
    layers: int
    warnings: tuple[str, ...]
    seconds: float
    library: str


def check_options(options: CompileOptions, precision: str) -> None:
    """Says what the library cannot do, before anything is traced.

    Raises MissingError where it is not here, has no such compute capability, or no such precision for one, and where a
    weightless engine is asked for without a GPU.
    """
    trt = load_library(RTX)
    known = compute_capabilities(trt)
    for capability in options.capabilities:
        if capability not in known:
            raise MissingError(
                f"{RTX.title} {trt.__version__} compiles for no compute capability {capability}; it has "
                f"{', '.join(known)} (Jetson and data-centre GPUs: --target tensorrt)"
            )
        needed = get_target("tensorrt-rtx").precision(precision).oldest
        if needed is not None and version_tuple(capability) < needed:
            oldest = ".".join(map(str, needed))
            raise MissingError(
                f"GPUs of compute capability {capability} have no {precision} in {RTX.title}; it needs {oldest} or "
                "later: leave that capability out, or take --precision fp16"
            )
    if options.weightless:
        _check_weightless(options)


def _check_weightless(options: CompileOptions) -> None:
    """Stripping compiles for real: the vendor asks for a GPU and at most one capability ("CPU-Only AOT", table 11)."""
    if len(options.capabilities) > 1:
        raise UsageError("a weightless engine is compiled for one compute capability at most; give one, or none")
    try:
        find_gpu()
    except MissingError as error:
        raise MissingError(
            f"a weightless engine is compiled beside a GPU alone: {error}; or leave --weightless out"
        ) from error


def compute_capabilities(trt: Any) -> dict[str, Any]:
    """Those that the library has code for: "8.9" -> its member, in rising order."""
    named = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in trt.ComputeCapability.__members__.items()
        if name.startswith("SM") and name[2:].isdecimal()
    }
    return dict(sorted(named.items(), key=lambda item: version_tuple(item[0])))


def compile_apart(onnx: bytes, inputs: tuple[TensorSpec, ...], options: CompileOptions, tell: Tell) -> Compiled:
    """As `compile_engine`, in a process of its own: the builder of 1.7 reads beyond its memory on some INT4 networks.

    Raises ConversionError on that as well.
    """
    what = f"{RTX.title} cannot compile this network: its builder"
    mend = "that is a fault of the builder's: take another --precision, or another version of it"
    return run_apart(compile_engine, onnx, inputs, options, tell=tell, what=what, mend=mend)


def compile_engine(onnx: bytes, inputs: tuple[TensorSpec, ...], options: CompileOptions, tell: Tell) -> Compiled:
    """Compiles `onnx`, which carries its types. Raises MissingError, ConversionError with the library's own words."""
    start = time.perf_counter()
    trt = load_library(RTX)
    logger = make_logger(trt)
    builder: tensorrt.Builder = trt.Builder(logger)
    network: tensorrt.INetworkDefinition = read_network(trt, RTX, builder, onnx, logger)
    nodes = _origins(network)
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    monitor = make_monitor(trt, tell, RTX.title)
    config.progress_monitor = monitor
    _configure(trt, config, options)
    add_profile(builder, config, inputs, options.batches)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise ConversionError(f"{RTX.title} {trt.__version__} cannot compile the ONNX: {complaint(logger)}")
    data = bytes(plan)
    if malformed(trt, data):
        raise ConversionError(f"{RTX.title} {trt.__version__} wrote an engine whose header it does not take")
    seconds = round(time.perf_counter() - start, 1)
    return Compiled(
        data,
        nodes,
        network.num_layers,
        tuple(dict.fromkeys(w.strip() for w in logger.warnings)),
        seconds,
        trt.__version__,
    )


def _configure(trt: Any, config: tensorrt.IBuilderConfig, options: CompileOptions) -> None:
    # without it the inspector names no types, and nobody could tell which precision really runs
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # the runner gives all memory itself and captures a CUDA graph; an engine that allocates could not be captured
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.weightless:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.capabilities:
        known = compute_capabilities(trt)
        config.num_compute_capabilities = len(options.capabilities)
        for index, capability in enumerate(options.capabilities):
            config.set_compute_capability(known[capability], index)


def _origins(network: tensorrt.INetworkDefinition) -> frozenset[str]:
    """Names of the ONNX nodes that there is a layer of."""
    found: set[str] = set()
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        found.update(_ORIGIN.findall(layer.metadata or ""))
    return frozenset(found)


def left_out(compiled: Compiled, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the ONNX nodes that the parser made no layer of."""
    return tuple(name for name in names if name not in compiled.nodes)


def describe(compiled: Compiled, options: CompileOptions, **counted: int) -> Build:
    """What a manifest says of an engine."""
    details = {
        "library": RTX.title,
        "version": compiled.library,
        "versions": library_versions(LIBRARIES),
        "compute_capabilities": list(options.capabilities),  # none: the vendor's portable set
        "weightless": options.weightless,
        "batches": list(options.batches),
        "layers": compiled.layers,
        "warnings": list(compiled.warnings),
        "seconds": compiled.seconds,
        **counted,
    }
    return Build(ships=(ENGINE, "model.onnx") if options.weightless else (ENGINE,), details=details)
