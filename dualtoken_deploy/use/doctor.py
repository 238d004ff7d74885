"""What this machine is and what of this program works on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.errors import install_command
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.targets.table import EXPORT_MODULES, TARGETS, Target

# Beside the targets: what it is for, the modules it needs, the extra that brings them.
PARTS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "export and eager": ((*EXPORT_MODULES, "skimage", "safetensors"), "export"),
        "training": (("torch", "accelerate", "kornia", "sklearn", "matplotlib"), "train"),
        "pictures of results": (("matplotlib",), "plots"),
        "the server": (("uvicorn", "starlette", "grpc", "httptools"), "serve"),
        "video and webcam": (("cv2",), "video"),
        "HEIC pictures": (("pillow_heif",), "heif"),
    }
)
LIBRARIES = (
    *("torch", "onnx", "onnxruntime", "openvino", "nncf", "coremltools", "coreai-core", "ai-edge-litert"),
    *(
        "tensorrt",
        "tensorrt-rtx-cu13-libs",
        "cuda-bindings",
        "numpy",
        "pillow",
        "opencv-python-headless",
        "pillow-heif",
    ),
)
NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Check:
    """One thing that works or does not: `state` "works", "reference" (something stands in for the device) or
    "missing"; then `extra`, and `mend`, the command."""

    name: str
    state: str
    detail: str
    extra: str | None = None
    mend: str | None = None


@dataclass(frozen=True)
class Report:
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    gpu: str | None
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "gpu": self.gpu,
            "checks": [asdict(check) for check in self.checks],
        }


def examine() -> Report:
    """Looks without importing what is heavy; nothing is installed or written."""
    checks = [_part(name, modules, extra) for name, (modules, extra) in PARTS.items()]
    checks += [_target(row) for row in TARGETS.values()]
    return Report(describe_machine(), library_versions(LIBRARIES), _gpu(), tuple(checks))


def _part(name: str, modules: tuple[str, ...], extra: str) -> Check:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        return Check(name, "missing", f"no {', '.join(missing)}", extra, install_command(extra))
    return Check(name, "works", "")


def _target(row: Target) -> Check:
    name, missing = f"running {row.name}", row.missing()
    if missing:
        vendor = f"; {row.vendor}" if row.vendor else ""
        return Check(name, "missing", f"no {', '.join(missing)}{vendor}", row.extra, install_command(row.extra))
    reason = getattr(row.part("runner"), "why_no_latency", None)
    why = None if reason is None else reason(None)
    if why is not None:
        return Check(name, "reference", why)
    if row.built_by and _gpu() is None:
        return Check(name, "missing", "no NVIDIA driver is loaded; run on the device that has the GPU")
    return Check(name, "works", "")


def _gpu() -> str | None:
    """The NVIDIA driver that is loaded, in its own words; None where there is none."""
    try:
        return NVIDIA.read_text(encoding="utf-8", errors="replace").splitlines()[0].partition(":")[2].strip() or None
    except (OSError, IndexError):
        return None
