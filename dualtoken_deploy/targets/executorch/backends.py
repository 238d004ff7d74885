"""What a .pte can be lowered to, by the words of --backend: one row each."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.errors import BundleError, MissingError, ToleranceError, UsageError, missing_extra

SETTING = "backend"
XNNPACK = "xnnpack"  # unless another is asked for


@dataclass(frozen=True)
class Backend:
    """One backend. `delegate`: ExecuTorch's name of its pieces; `modules`: what lowering needs beside ExecuTorch, from
    the extra `extra`; `precisions`: in which it is on offer.

    `stand_in`: what executes its pieces here, since its own runtime cannot; None where ExecuTorch's here has it.
    `where`: on what it runs.
    """

    name: str
    title: str
    delegate: str
    modules: tuple[str, ...] = ()
    extra: str = "executorch"
    precisions: tuple[str, ...] = ("fp32",)
    stand_in: str | None = None
    where: str = ""


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        row.name: row
        for row in (
            Backend(XNNPACK, "XNNPACK", "XnnpackBackend", precisions=("fp32", "int8")),
            Backend(
                "coreml",
                "Core ML",
                "CoreMLBackend",
                modules=("coremltools",),
                extra="coreml",
                precisions=("fp32", "fp16"),
                stand_in="MIL reference execution in numpy",
                where="an iPhone, iPad or Mac",
            ),
            Backend(
                "vulkan",
                "Vulkan",
                "VulkanBackend",
                precisions=("fp32", "fp16"),
                stand_in="reference execution of Vulkan's graph in PyTorch",
                where="an Android phone, or a computer whose GPU has Vulkan",
            ),
        )
    }
)

# Those that lower here and are not offered, and what to take instead
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "openvino": "its pieces load in the version of OpenVINO and on the kind of CPU alone that they were made with, "
        "and compute in what that CPU has fastest (bfloat16 on AMX), whatever was asked for; take --target openvino",
    }
)
# Those that ExecuTorch has too, and what lowering to them asks for beyond any package index or this wheel
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "qnn": "Qualcomm's AI Engine Direct SDK (QNN_SDK_ROOT)",
        "vgf": "Arm's tosa_serializer and model converter",
        "ethos-u": "Arm's tosa_serializer and Vela",
        "mediatek": "MediaTek's NeuroPilot SDK",
        "samsung": "Samsung's Exynos AI LiteCore SDK",
        "mlx": "ExecuTorch built from its sources on a Mac",
        "mps": "macOS",
    }
)


def find_backend(name: str | None) -> Backend:
    """The row of a name. Raises UsageError that lists the names, MissingError on a backend that is not to be had."""
    name = name or XNNPACK
    if name in REFUSED:
        raise UsageError(f"the backend {name} is not offered: {REFUSED[name]}")
    if name in ELSEWHERE:
        raise MissingError(
            f"the backend {name} is not offered: lowering to it needs {ELSEWHERE[name]}, which the wheel of ExecuTorch "
            f"lacks; take {', '.join(BACKENDS)}"
        )
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; valid backends: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_of(manifest: Manifest) -> Backend:
    """What a bundle was lowered to. Raises BundleError where this version does not know it."""
    asked = {} if manifest.asked is None else manifest.asked.settings
    name = asked.get(SETTING, XNNPACK)
    if name not in BACKENDS:
        raise BundleError(f"the manifest names the backend {name!r}, which this version does not know; update it")
    return BACKENDS[name]


def check_backend(backend: Backend, precision: str) -> None:
    """Raises UsageError on a precision that is not on offer for it, MissingError where its part is not installed."""
    if precision not in backend.precisions:
        others = ", ".join(row.name for row in BACKENDS.values() if precision in row.precisions)
        raise UsageError(
            f"the backend {backend.name} is offered in {' and '.join(backend.precisions)}, not in {precision}; "
            f"backends that have it: {others}"
        )
    if any(importlib.util.find_spec(module) is None for module in backend.modules):
        raise missing_extra(backend.extra, f"lowering to {backend.title}")


def check_promise(path: Path, ids: Iterable[str], backend: Backend) -> None:
    """Raises ToleranceError where a file holds pieces for another backend than was promised, or none at all."""
    found = Counter(ids)
    if set(found) != {backend.delegate}:
        held = ", ".join(f"{count} of {name}" for name, count in found.items()) or "none"
        raise ToleranceError(f"{path} was promised for {backend.title}, and its pieces are {held}; export it again")
