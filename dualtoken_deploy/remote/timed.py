"""The latency of bundles on a device, as one document: what `dualtoken bench --on DEVICE --json` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualtoken_deploy.remote.devices import Device
from dualtoken_deploy.remote.phone import bench_on
from dualtoken_deploy.remote.session import Session, Tell, extras_of


def bench_there(
    device: Device, bundles: Sequence[Path], rounds: int, seconds: float, threads: int | None, tell: Tell
) -> dict[str, Any]:
    """Beside the first of them, in interleaved rounds; `on` is the device with its record of itself.

    Raises MissingError where it does not answer, and what the command there ended with.
    """
    if device.android:
        report = bench_on(device, bundles, tell, None, threads, rounds, seconds, None)
        return report.to_json() | {"on": about(device, dict(report.machine))}
    session = Session(device, tell)
    words = ["bench", *map(session.add, bundles), "--rounds", str(rounds), "--seconds", str(seconds)]
    words += [] if threads is None else ["--threads", str(threads)]
    outcome = session.run([*words, "--json"], extras_of(bundles))
    outcome.gate(device.name)
    found: dict[str, Any] = json.loads(outcome.out)
    return found | {"on": about(device, dict(outcome.machine))}


def about(device: Device, machine: dict[str, Any]) -> dict[str, Any]:
    """What a document says of where it was measured."""
    return {"device": device.name, "url": device.url, "machine": machine}
