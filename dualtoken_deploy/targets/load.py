"""Runners: load a bundle, run it on numpy arrays. `load_runner` is the one way in."""

from __future__ import annotations

import os
from pathlib import Path

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.bundle.trust import check_trusted
from dualtoken_deploy.errors import MissingError
from dualtoken_deploy.targets.runner import AsyncRunner, Execution, Runner, RunnerOptions, choose_reference, engine_of
from dualtoken_deploy.targets.table import get_target

__all__ = [
    "AsyncRunner",
    "Execution",
    "Runner",
    "RunnerOptions",
    "check_latency",
    "check_native",
    "choose_reference",
    "engine_of",
    "load_runner",
    "why_no_latency",
]


def load_runner(
    bundle: Bundle | str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    throughput: bool = False,
) -> Runner:
    """The runner of the bundle's target, loaded and ready; a context manager.

    `device`: in the runtime's own words ("cpu", "cuda", "GPU", ...). `throughput`: for many requests at a time.
    Raises MissingError where the runtime or the device is not here, BundleError where the bundle is not whole.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_native(opened)
    module = get_target(opened.manifest.target).part("runner")
    runner: Runner = module.load(
        opened, RunnerOptions(device, threads, Path(cache_dir) if cache_dir else None, throughput)
    )
    return runner


def check_native(bundle: Bundle) -> None:
    """Raises BundleError where loading a bundle would run native code of whoever made it, and nobody allowed that."""
    native = getattr(get_target(bundle.manifest.target).part("runner"), "native_code", None)
    what: str | None = None if native is None else native(bundle.manifest)
    if what is not None:
        check_trusted(bundle.manifest, f"{bundle.path}: {what}")


def why_no_latency(bundle: Bundle, device: str | None = None) -> str | None:
    """Why the time of a bundle here would not be its device's; None where it is."""
    module = get_target(bundle.manifest.target).part("runner")
    by_device, by_manifest = (getattr(module, name, None) for name in ("why_no_latency", "no_latency_of"))
    why: str | None = None if by_device is None else by_device(device)
    return why if why is not None or by_manifest is None else by_manifest(bundle.manifest)


def check_latency(bundle: Bundle, device: str | None = None) -> None:
    """Raises MissingError where a bundle runs here by something whose time is not its device's."""
    if (why := why_no_latency(bundle, device)) is not None:
        raise MissingError(f"{bundle.name} is not timed: {why}")
