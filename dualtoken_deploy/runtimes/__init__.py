"""Runners: load a bundle, run it on numpy arrays. `load_runner` is the one way in."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from dualtoken_deploy.bundle import Bundle
from dualtoken_deploy.runtimes.base import AsyncRunner, Execution, Runner, RunnerOptions
from dualtoken_deploy.targets import get_target

__all__ = ["AsyncRunner", "Execution", "Runner", "RunnerOptions", "load_runner"]


def load_runner(
    bundle: Bundle | str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Runner:
    """The runner of the bundle's target, loaded and ready; a context manager.

    `device`: in the runtime's own words ("cpu", "cuda", "GPU", ...). Raises MissingError where the runtime or the
    device is not here, BundleError where the bundle is not whole.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = get_target(opened.manifest.target)
    module = importlib.import_module(f"dualtoken_deploy.runtimes.{target.name}")
    runner: Runner = module.load(opened, RunnerOptions(device, threads, Path(cache_dir) if cache_dir else None))
    return runner
