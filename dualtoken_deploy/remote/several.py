"""One comparison on several devices: the same bundles and pictures, against eager as this machine computes it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.data.built_in import BUILT_IN, built_in_folder
from dualtoken_deploy.errors import DualTokenError, InputError, UsageError
from dualtoken_deploy.remote.devices import Device
from dualtoken_deploy.remote.session import Session, Tell, extras_of
from dualtoken_deploy.use.compare import expect


@dataclass(frozen=True)
class OnDevice:
    """What one device measured, `compare --json` of it, or the error that kept it from it; `machine`: its record of
    itself, empty where it could not be asked."""

    device: Device
    machine: Mapping[str, Any]
    found: Mapping[str, Any] | None
    error: DualTokenError | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One a bundle, or one with the error."""
        about = {"device": self.device.name, "machine": dict(self.machine)}
        if self.found is None:
            assert self.error is not None  # noqa: S101 (one of the two)
            return [about | {"error": {"code": self.error.exit_code, "message": str(self.error)}}]
        return [about | {"error": None, **row} for row in self.found["rows"]]


@dataclass(frozen=True)
class Across:
    """The comparison of several devices."""

    data: str
    devices: tuple[OnDevice, ...]

    def to_json(self) -> dict[str, Any]:
        first: Mapping[str, Any] = next((d.found for d in self.devices if d.found is not None), {})
        return {
            "data": self.data,
            **{key: first.get(key) for key in ("images", "reference", "metric", "eager_score")},
            "rows": [row for device in self.devices for row in device.rows()],
            "devices": [
                {
                    "device": d.device.name,
                    "url": d.device.url,
                    "machine": dict(d.machine),
                    "error": None if d.error is None else str(d.error),
                    "other_pixels": None if d.found is None else d.found["other_pixels"],
                    "bench": None if d.found is None else d.found["bench"],
                }
                for d in self.devices
            ],
        }

    def gate(self) -> None:
        """Raises the worst error, which names every device that failed."""
        failed = [d.error for d in self.devices if d.error is not None]
        if failed:
            worst = max(failed, key=lambda error: error.exit_code)
            said = "; ".join(map(str, failed))
            raise type(worst)(f"{len(failed)} of {len(self.devices)} devices failed: {said}")


def compare_across(
    devices: Sequence[Device],
    bundles: Sequence[Path],
    data: str,
    tell: Tell,
    words: Sequence[str] = (),
    limit: int | None = None,
    threads: int | None = None,
) -> Across:
    """`dualtoken compare` on each, one after the other. `words`: further options of the command there.

    A device that fails is a row of the result; what is wrong here (bundles, data, no torch) raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.npz"
        named = expect(bundles, data, expected, limit, threads, tell)
        if limit is not None:
            words = [*words, "--limit", str(limit)]
        if threads is not None:
            words = [*words, "--threads", str(threads)]
        carried = _carried(data)
        found = tuple(_one(device, bundles, data, carried, expected, words, tell) for device in devices)
    return Across(named, found)


def _carried(data: str) -> Path | None:
    """What travels in the place of the word: a folder, or that of a built-in set, whose maker a device may lack."""
    if Path(data).exists():
        return Path(data)
    return built_in_folder(data) if data in BUILT_IN else None


def _one(
    device: Device,
    bundles: Sequence[Path],
    data: str,
    carried: Path | None,
    expected: Path,
    more: Sequence[str],
    tell: Tell,
) -> OnDevice:
    session = Session(device, tell)
    try:
        if device.android:
            raise UsageError(f"{device.name}: there is no Python on Android; bench and validate take --on adb://")
        words = ["compare", *(session.add(path) for path in bundles)]
        words += ["--data", data if carried is None else session.add(carried), "--expected", session.add(expected)]
        outcome = session.run([*words, *more, "--json"], extras_of(bundles))
        outcome.gate(device.name)
        return OnDevice(device, session.machine, _read(outcome.out, device))
    except DualTokenError as error:
        return OnDevice(device, session.machine, None, error)


def _read(text: str, device: Device) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
        if isinstance(found, dict) and all(key in found for key in ("rows", "bench", "other_pixels")):
            return found
    except ValueError:
        pass
    raise InputError(f"{device.name}: its answer is no comparison; is the program there of this version?")
