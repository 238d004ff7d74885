"""Everything that can be measured of a bundle here, as one report that another run can be held against."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bench.run import GEMM, bench
from dualtoken_deploy.bundle.decode import decode, parse, plain
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import InputError, install_command
from dualtoken_deploy.files import read_bytes, write_atomically
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.prove.tolerances import ROWS
from dualtoken_deploy.targets.load import why_no_latency
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.inspect import inspect_bundle
from dualtoken_deploy.use.validate import validate

Tell = Callable[[str], None]
SCHEMA_VERSION = 1
MAX_REPORT = 8 << 20  # bytes; one is 3 KiB
MEND = "make it anew with: dualtoken verify BUNDLE --baseline FILE --update"


@dataclass(frozen=True)
class Setting:
    """How a bundle is measured. `data` None: the golden input alone. `rounds` 0: no latency."""

    data: str | None = None
    limit: int | None = None
    reference: str = "golden"
    rounds: int = 5
    seconds: float = 0.5
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Latency:
    """How many times faster a bundle is than a yardstick that ran in the same rounds: the model's matrix products alone
    in float32. A machine that is slower, or busy, slows both."""

    yardstick: str
    ratio: float
    low: float
    high: float
    p50_ms: float


@dataclass(frozen=True)
class Subject:
    """What was measured: two reports can be held against each other where these are equal."""

    model: str
    task: str
    target: str
    precision: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """`figures`: by the names of the tasks' metrics, `sqnr_db`, `agreement`, `int8_mac_share`, `size_mib`. `executed`:
    the dtype of each kind of operator. `engine`: what stood in for the target's own runtime."""

    subject: Subject
    setting: Setting
    images: int
    figures: Mapping[str, float]
    executed: Mapping[str, str]
    latency: Latency | None = None
    engine: str | None = None
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    command: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(self)
        return found

    def write(self, path: Path) -> None:
        """Raises OutputError; the file that was there is then as it was."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @staticmethod
    def read(path: Path) -> Report:
        """Raises InputError on what is no such report."""
        data = parse(read_bytes(path, MAX_REPORT, InputError, MEND), str(path), InputError, MEND)
        found = decode(data, Report, str(path), InputError, MEND)
        if found.schema_version > SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {found.schema_version}, this program reads up to {SCHEMA_VERSION}; "
                f"upgrade it (this one was installed by: {install_command()})"
            )
        if unknown := [name for name in found.figures if name not in ROWS]:
            raise InputError(f"{path} has a figure {unknown[0][:60]!r}; there are {', '.join(ROWS)}; {MEND}")
        return found


def subject_of(bundle: Bundle) -> Subject:
    manifest = bundle.manifest
    name = manifest.variant if manifest.head is None else f"{manifest.head} on {manifest.variant}"
    shapes = [f"{s.name} {s.dtype} {'x'.join(map(str, s.shape))}" for s in (manifest.input.tensor, *manifest.outputs)]
    return Subject(name, manifest.task, manifest.target, manifest.precision, shapes[0], tuple(shapes[1:]))


def measure(bundle: Bundle, setting: Setting, command: str = "", progress: Tell | None = None) -> Report:
    """Validates, inspects and times a bundle. Raises what those raise."""
    tell = progress or (lambda _: None)
    target = get_target(bundle.manifest.target)
    tell("reading what executes")
    inspection = inspect_bundle(bundle, setting.device)
    (checked,) = validate(
        [bundle], setting.data, setting.limit, setting.reference, setting.device, setting.threads, progress
    )
    figures = {"size_mib": bundle.size_bytes / 2**20}
    if np.isfinite(checked.sqnr_db):
        figures["sqnr_db"] = checked.sqnr_db
    if checked.agreement is not None:
        figures["agreement"] = checked.agreement
    figures |= {name: value for name, value in (checked.scores or {}).items() if name in get_task(checked.task).metrics}
    if target.precision(bundle.manifest.precision).integers:
        figures["int8_mac_share"] = inspection.int8_mac_share
    latency, notes = _time(bundle, setting, tell)
    libraries = ("dualtoken-deploy", "numpy", *target.libraries)
    return Report(
        subject=subject_of(bundle),
        setting=setting,
        images=checked.images,
        figures=figures,
        executed=dict(inspection.executed_precision),
        latency=latency,
        engine=inspection.engine,
        notes=notes,
        machine=describe_machine(),
        versions=library_versions(libraries),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
    )


def _time(bundle: Bundle, setting: Setting, tell: Tell) -> tuple[Latency | None, tuple[str, ...]]:
    if setting.rounds == 0:
        return None, ()
    if (reason := why_no_latency(bundle, setting.device)) is not None:
        return None, (f"not timed: {reason}",)
    if not bundle.manifest.products:
        return None, ("not timed: the bundle records no matrix products as a yardstick",)
    found = bench([bundle], GEMM, setting.threads, None, setting.rounds, setting.seconds, setting.device, progress=tell)
    row = next(c for c in found.contestants if c.kind == "bundle")
    ratio = row.ratio
    return Latency(GEMM, ratio.median, ratio.low, ratio.high, row.p50_ms), found.notes
