"""bench and validate on an Android device, by the runtimes' own programs (remote/programs.py)."""

from __future__ import annotations

import math
import statistics
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dualtoken_deploy.bench.report import Ratio
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import InputError, MissingError, UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.remote.adb import Adb
from dualtoken_deploy.remote.devices import Device
from dualtoken_deploy.remote.programs import PROBE, Ask, Laps, Program, program_of
from dualtoken_deploy.remote.session import Tell
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.validate import Validation

MACHINES = {"arm64-v8a": 183, "armeabi-v7a": 40, "x86_64": 62, "x86": 3, "riscv64": 243}  # ELF's e_machine of each ABI
GRACE_S = 120.0  # for a program to load a model, beyond the seconds that it was asked to run


@dataclass(frozen=True)
class Placed:
    """A bundle whose files lie on the device."""

    bundle: Bundle
    program: Program
    command: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class PhoneBench:
    """As BenchReport, of programs that say less: no p90, p99 or memory, and of ncnn and older ExecuTorch no median."""

    machine: Mapping[str, Any]
    baseline: str
    threads: int | None
    rounds: int
    seconds: float
    device: str
    contestants: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"machine": dict(self.machine), "contestants": list(self.contestants), "notes": list(self.notes)}


class Phone:
    """One command on one device; use as a context manager, which clears up there."""

    def __init__(self, device: Device, tell: Tell) -> None:
        self.device, self.tell, self.adb = device, tell, Adb(device)
        self.machine: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[Phone]:
        self.tell(f"{self.device.name}: connecting")
        self.machine = self.adb.hello()
        try:
            self.adb.begin()
            yield self
        finally:
            self.adb.clean()

    def place(self, path: Path) -> Placed:
        """Raises UsageError (a target without a program), MissingError (no program, or one for another ABI)."""
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        program = program_of(manifest.target, manifest.precision)
        command = self._program(program)
        self.tell(f"{self.device.name}: {bundle.name}")
        return Placed(
            bundle, program, command, tuple(self.adb.put(path / n) for n in get_target(manifest.target).files)
        )

    def _program(self, program: Program) -> str:
        name = program.name
        if self.device.programs is None:
            there = f"/data/local/tmp/{name}"
            if self.adb.shell(f"test -x {there} && echo here || true").strip() != "here":
                raise MissingError(
                    f"{self.device.name}: there is no {there}; push {name} there (docs/android.md), or name a folder "
                    "with it in devices.toml (programs = ...)"
                )
            return there
        path = Path(self.device.programs).expanduser() / name
        if not path.is_file():
            raise MissingError(
                f"{path} is not there; build {name} for {self.machine['architecture']} (docs/android.md)"
            )
        own, abi = elf_machine(path), self.machine["architecture"]
        if own is not None and abi in MACHINES and own != MACHINES[abi]:
            other = next((a for a, number in MACHINES.items() if number == own), f"ELF machine {own}")
            raise MissingError(f"{path} is for {other}, {self.device.name} is {abi}; build it for that")
        return self.adb.put(path, executable=True)

    def run(self, placed: Placed, words: Sequence[str], seconds: float) -> str:
        """What the program prints. Raises InputError where it fails."""
        code, text = self.adb.program(words, seconds + GRACE_S)
        if code:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            said = next(
                (line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "nothing was said"
            )
            signal = f"signal {code - 128}" if code > 128 else str(code)
            raise InputError(
                f"{self.device.name}: {placed.program.name} ended with {signal} on {placed.bundle.path}: {said[:300]}"
            )
        return text

    def laps(self, placed: Placed, ask: Ask) -> Laps:
        text = self.run(placed, placed.program.time(placed.command, ask), 20 * ask.seconds)
        found = placed.program.read(text)
        if found is None:
            raise InputError(
                f"{self.device.name}: {placed.program.name} printed no times that are known; is it of the release that "
                "docs/android.md names?"
            )
        return found


def elf_machine(path: Path) -> int | None:
    """e_machine of an ELF file; None of another file, a script for one."""
    with path.open("rb") as file:
        head = file.read(20)
    return struct.unpack("<H", head[18:20])[0] if head[:4] == b"\x7fELF" and len(head) == 20 else None


def bench_on(
    device: Device,
    bundles: Sequence[Path],
    tell: Tell,
    against: str | None,
    threads: int | None,
    rounds: int,
    seconds: float,
    processor: str | None,
) -> PhoneBench:
    """Interleaved rounds, a process each. `processor`: cpu unless given, or gpu where the program takes one.

    Raises UsageError, MissingError, InputError, BundleError.
    """
    gpu = _gpu(processor)
    names = [path.resolve().name for path in bundles]
    baseline = names[0] if against is None else Path(against).resolve().name
    if baseline not in names:
        raise UsageError(f"--against {against}: on Android the baseline is one of the bundles ({', '.join(names)})")
    with Phone(device, tell).opened() as phone:
        placed = [phone.place(path) for path in bundles]
        for each in placed:
            if gpu and not each.program.gpu:
                raise UsageError(f"{each.program.name} takes no --device gpu here; leave {each.bundle.path} out")
        asks = [_ask(phone, each, threads, seconds, gpu) for each in placed]
        found: list[list[Laps]] = [[] for _ in placed]
        for number in range(rounds):
            for i, each in enumerate(placed):
                tell(f"{device.name}: round {number + 1} of {rounds}, {each.bundle.name}")
                found[i].append(phone.laps(each, asks[i]))
    reference = [laps.mean_ms for laps in found[names.index(baseline)]]
    rows = tuple(
        _row(name, each, laps, reference, threads, "gpu" if gpu else "cpu")
        for name, each, laps in zip(names, placed, found, strict=True)
    )
    limits = dict.fromkeys(f"{each.bundle.name}: {each.program.limit}" for each in placed if each.program.limit)
    machine = {key: value for key, value in phone.machine.items() if key != "free"}
    return PhoneBench(machine, baseline, threads, rounds, seconds, "gpu" if gpu else "cpu", rows, tuple(limits))


def _gpu(processor: str | None) -> bool:
    if processor not in (None, "cpu", "gpu"):
        raise UsageError(f"--device {processor}: on Android it is cpu or gpu")
    return processor == "gpu"


def _ask(phone: Phone, placed: Placed, threads: int | None, seconds: float, gpu: bool) -> Ask:
    height, width = placed.bundle.manifest.input.size
    if threads is None and placed.program.names_threads:
        threads = phone.machine["cores"]
    ask = Ask(placed.files, threads, seconds, PROBE, gpu, (3, height, width))
    if placed.program.by_seconds:
        return ask
    mean = phone.laps(placed, ask).mean_ms
    runs = max(PROBE, math.ceil(1000 * seconds / mean)) if mean > 0 else PROBE
    return Ask(placed.files, threads, seconds, runs, gpu, (3, height, width))


def _row(
    name: str, placed: Placed, laps: Sequence[Laps], reference: Sequence[float], threads: int | None, device: str
) -> dict[str, Any]:
    manifest = placed.bundle.manifest
    means = [lap.mean_ms for lap in laps]
    middles = [lap.p50_ms for lap in laps if lap.p50_ms is not None]
    ratios = [base / own for base, own in zip(reference, means, strict=True)]
    runs = sum(lap.runs for lap in laps)
    mean = sum(lap.mean_ms * lap.runs for lap in laps) / runs
    ratio = Ratio(statistics.median(ratios), min(ratios), max(ratios))
    return {
        "name": name,
        "kind": "bundle",
        "target": manifest.target,
        "precision": manifest.precision,
        "bundle": str(placed.bundle.path),
        "program": placed.program.name,
        "p50_ms": statistics.median(middles) if len(middles) == len(laps) else None,
        "p90_ms": None,
        "p99_ms": None,
        "mean_ms": mean,
        "min_ms": min(lap.min_ms for lap in laps),
        "max_ms": max(lap.max_ms for lap in laps),
        "runs": runs,
        "rounds_mean_ms": means,
        "images_per_s": 1000 / mean if mean else None,
        "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        "gemm_limit_ratio": None,
        "peak_rss_mib": None,
        "size_mib": placed.bundle.size_bytes / 2**20,
        "threads": threads,
        "batch": 1,
        "device": device,
    }


def validate_on(device: Device, bundles: Sequence[Path], tell: Tell) -> tuple[list[Validation], dict[str, Any]]:
    """The golden input through each bundle there, its outputs against those stored; and the device's record of itself.

    Raises UsageError (a program that gives no outputs), MissingError, InputError, BundleError.
    """
    results = []
    with Phone(device, tell).opened() as phone:
        for path in bundles:
            placed = phone.place(path)
            golden = dict(placed.bundle.golden)
            given = golden.pop("input")
            task = get_task(placed.bundle.manifest.task)
            likeness = task.compare(golden, task.thin(_outputs(phone, placed, given)))
            engine = f"{placed.program.name} on {phone.machine['model']}"
            count = len(given)
            results.append(
                Validation(
                    str(placed.bundle.path),
                    task.name,
                    "golden",
                    count,
                    count,
                    likeness,
                    engine=engine,
                    asked_db=placed.bundle.manifest.tolerance.sqnr_db,
                )
            )
    return results, {key: value for key, value in phone.machine.items() if key != "free"}


def _outputs(phone: Phone, placed: Placed, given: Array) -> dict[str, Array]:
    manifest, program, specs = placed.bundle.manifest, placed.program, placed.bundle.manifest.outputs
    if program.answer is None:
        raise UsageError(f"{program.name} gives no outputs, so {placed.bundle.path} cannot be validated on Android")
    if program.one_output and len(specs) > 1:
        raise UsageError(
            f"{program.name} writes {len(specs)} outputs into one file without their names, so {placed.bundle.path} "
            "cannot be validated on Android"
        )
    there = str(PurePosixPath(phone.adb.work) / "out")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "input.bin"
        raw.write_bytes(np.ascontiguousarray(given).tobytes())
        fed = phone.adb.put(raw)
        words = program.answer(placed.command, placed.files[0], manifest.input.tensor, fed, there)
        phone.run(placed, words, GRACE_S)
        found = {}
        for i, (spec, name) in enumerate(zip(specs, program.written(there, len(specs)), strict=True)):
            data = phone.adb.get(name, Path(folder) / f"out{i}")
            shape = spec.concrete(len(given), manifest.input.size[0])
            if len(data) != math.prod(shape) * np.dtype(spec.dtype).itemsize:
                raise InputError(
                    f"{phone.device.name}: {program.name} wrote {len(data)} bytes for {spec.name}, which is "
                    f"{spec.dtype} of {'x'.join(map(str, shape))}"
                )
            found[spec.name] = np.frombuffer(data, spec.dtype).reshape(shape)
    return found
