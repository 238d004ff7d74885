"""Where an engine was built and whether it will load here: TensorRT itself has no such check."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

from dualtoken_deploy.targets.nvidia.binding import TENSORRT, Library, load_library, version_tuple
from dualtoken_deploy.targets.nvidia.cuda import find_gpu

ENGINE, INSPECTION = "model.engine", "engine.json"
HARDWARE_LEVELS = ("none", "ampere-plus", "same-compute-capability")
AMPERE = (8, 0)

# Version-compatible engines load in later releases of their major version, and in the next major version in these
# cases alone (support matrix of TensorRT 11.4).
NEXT_MAJOR = {8: 10, 10: 11}


@dataclass(frozen=True)
class Host:
    """What an engine depends on. `tensorrt`: the library's version; `system` as "linux-x86_64"."""

    tensorrt: str
    system: str
    gpu: str
    compute_capability: str
    multiprocessors: int
    driver: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EngineBuild:
    """What decides whether an engine loads, of the `build` of a manifest."""

    host: Host
    version_compatible: bool
    hardware_compatibility: str


def this_host(device: str | None = None, lean: bool = False, library: Library = TENSORRT) -> Host:
    """This machine. Raises MissingError where the library or a GPU is not here."""
    trt = load_library(library, lean)
    gpu = find_gpu(device)
    system = f"{platform.system().lower()}-{platform.machine().lower()}"
    return Host(trt.__version__, system, gpu.name, gpu.compute_capability, gpu.multiprocessors, gpu.driver)


def obstacles(build: EngineBuild, here: Host) -> list[str]:
    """Why an engine that was built as `build` says will not load here; empty where it will."""
    built = build.host
    found = []
    if built.system != here.system:
        found.append(f"it was built on {built.system}, this is {here.system}")
    if not _version_fits(built.tensorrt, here.tensorrt, build.version_compatible):
        how = "version-compatible, and so needs a later one" if build.version_compatible else "for that one alone"
        found.append(f"it was built by TensorRT {built.tensorrt} {how}, here is {here.tensorrt}")
    found += _hardware(built.compute_capability, here, build.hardware_compatibility)
    return found


def doubts(build: EngineBuild, here: Host) -> list[str]:
    """What will load but is not what the engine was tuned for."""
    built = build.host
    if build.hardware_compatibility == "none" and (built.gpu, built.multiprocessors) != (
        here.gpu,
        here.multiprocessors,
    ):
        return [f"it was tuned for {built.gpu}, this is {here.gpu}: it may be slow or fail; build it here"]
    return []


def _version_fits(built: str, here: str, compatible: bool) -> bool:
    if not compatible:
        return built == here
    before, now = version_tuple(built), version_tuple(here)
    return now[0] == NEXT_MAJOR.get(before[0]) or (now[0] == before[0] and now >= before)


def _hardware(built: str, here: Host, level: str) -> list[str]:
    if level == "ampere-plus":
        if version_tuple(here.compute_capability) >= AMPERE:
            return []
        return [f"it needs a GPU of compute capability 8.0 or later, {here.gpu} has {here.compute_capability}"]
    if built == here.compute_capability:
        return []
    return [f"it was built for compute capability {built}, {here.gpu} has {here.compute_capability}"]
