"""Runs the engine of a TensorRT bundle, after a preflight."""

from __future__ import annotations

from dualtoken_deploy.bundle.manifest import COMPLETE, Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import MissingError
from dualtoken_deploy.targets.nvidia.binding import TENSORRT
from dualtoken_deploy.targets.nvidia.engine import ENGINE, EngineBuild, doubts, obstacles, this_host
from dualtoken_deploy.targets.nvidia.runner import EngineRunner
from dualtoken_deploy.targets.runner import RunnerOptions


def native_code(manifest: Manifest) -> str | None:
    """What loading an engine runs on the host; None for one that carries no code of its own for it."""
    own = manifest.build is not None and manifest.build.details.get("version_compatible") is not False
    return "model.engine carries a runtime of its own, which runs with your rights" if own else None


def load(bundle: Bundle, options: RunnerOptions) -> EngineRunner:
    """A runner for model.engine of the bundle, after a preflight.

    Raises MissingError where the bundle is not built yet, TensorRT or the GPU is not here, or the engine is for another
    machine; BundleError where TensorRT refuses it all the same.
    """
    manifest = bundle.manifest
    if manifest.state != COMPLETE or manifest.build is None:
        raise MissingError(f"{bundle.path} is prepared, not built; on the device run: dualtoken build {bundle.path}")
    built = manifest.build.typed(EngineBuild)
    lean = built.version_compatible
    here = this_host(options.device, lean)
    if reasons := obstacles(built, here):
        raise MissingError(
            f"{bundle.path / ENGINE} will not load here: {'; '.join(reasons)}; build it here with: "
            f"dualtoken build {bundle.path} --rebuild"
        )
    specs = (manifest.input.tensor,), manifest.outputs
    notes = tuple(doubts(built, here))
    return EngineRunner(TENSORRT, bundle.path / ENGINE, *specs, options, lean, notes)
