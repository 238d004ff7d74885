"""The engine of a prepared TensorRT bundle, built on the device that will run it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.files import user_cache
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.targets.nvidia.builder import BuildOptions, build_engine
from dualtoken_deploy.targets.nvidia.engine import ENGINE, INSPECTION, Host
from dualtoken_deploy.targets.nvidia.engine import this_host as host
from dualtoken_deploy.targets.nvidia.network import Tell
from dualtoken_deploy.targets.table import get_target

__all__ = ["CONFIRMS", "FILES", "host", "make", "timing_cache"]

FILES = (ENGINE, INSPECTION)  # what building writes
CONFIRMS = True  # the inspector names what runs in which type, so a promise of INT8 or float16 is held against it
LIBRARIES = ("tensorrt", "cuda-bindings", "numpy", "dualtoken-deploy")

# What may run in float32 although the bundle is of a narrower precision: nothing that the ONNX types, and 5 % for
# layers in which TensorRT keeps a product between float32 neighbours.
FLOAT32_SHARE = 0.05


def make(folder: Path, manifest: Manifest, options: BuildOptions, host: Host, _rebuild: bool, tell: Tell) -> Build:
    """Writes FILES beside model.onnx; what the manifest says of that. Raises MissingError, ConversionError."""
    row = get_target(manifest.target)
    tell(f"building an engine for {host.gpu} with TensorRT {host.tensorrt}")
    onnx = (folder / "model.onnx").read_bytes()
    engine = build_engine(onnx, (manifest.input.tensor,), options, timing_cache(host), tell)
    (folder / ENGINE).write_bytes(engine.plan)
    (folder / INSPECTION).write_text(engine.layers, encoding="utf-8")
    return Build(
        ships=(ENGINE,),
        float32_share_allowed=None if row.precision(manifest.precision).exact else FLOAT32_SHARE,
        details={
            "host": host.to_json(),
            "machine": describe_machine(),
            "versions": library_versions(LIBRARIES),
            **asdict(options),
        },
    )


def timing_cache(host: Host) -> Path:
    """One file for each TensorRT version and GPU, in the user's cache folder."""
    words = f"{host.tensorrt}-{host.gpu}-{host.compute_capability}"
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in words)
    return user_cache() / "dualtoken-deploy" / "tensorrt" / f"{name}.timing"
