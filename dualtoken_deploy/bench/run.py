"""Times bundles side by side: one process per contestant, interleaved rounds, ratios with their spread.

Beside the contestants runs their limit: the model's own matrix products, in their own shapes, alone, in float32 numpy
(OpenBLAS, or Accelerate on macOS). It is a yardstick and no law of nature: a runtime with faster kernels, fewer bits or
algebraically fewer products can pass it.
"""

from __future__ import annotations

import os
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from dualtoken_deploy.bench.process import Job, Series, measure
from dualtoken_deploy.bench.report import (
    BenchReport,
    Contestant,
    Latency,
    Ratio,
    Tail,
    latency,
    median_interval,
    noise_notes,
    ratio_of,
    ratios_of,
)
from dualtoken_deploy.bundle.manifest import EAGER, ONNX_FILE
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.machine import available_cores, busy_cores, describe_machine, library_versions
from dualtoken_deploy.targets.load import check_latency
from dualtoken_deploy.targets.table import get_target

__all__ = ["EAGER", "GEMM", "BenchReport", "Contestant", "Latency", "Ratio", "bench"]

GEMM = "gemm"  # with EAGER the names of the contestants that are no bundles

MODES = ("latency", "throughput", "server")
MOST_ROUNDS = 200  # with `until`: what has not settled by then does not settle here

BundleLike = Bundle | str | os.PathLike[str]


@dataclass(frozen=True)
class Entrant:
    """A contestant before it has run. `limit` names the entrant with its model's matrix products, if there is one."""

    name: str
    kind: str
    bundle: Bundle
    limit: str | None


@dataclass(frozen=True)
class Setting:
    """How all of them are run."""

    batch: int
    threads: int
    device: str | None
    rounds: int
    seconds: float
    mode: str = "latency"

    @property
    def on_cpu(self) -> bool:
        return self.device is None or self.device.lower().startswith("cpu")


def bench(
    bundles: Sequence[BundleLike],
    against: BundleLike | None = None,
    threads: int | None = None,
    batch: int | None = None,
    rounds: int = 5,
    seconds: float = 2.0,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
    until: float | None = None,
    mode: str = "latency",
) -> BenchReport:
    """Times bundles, and the limit of their model, for `seconds` a contestant in each of `rounds`.

    `until`: rounds go on beyond `rounds`, MOST_ROUNDS at most, until the interval of every bundle's median ratio is
    narrower than this share of it. `mode`, one of MODES: "latency", one call at a time; "throughput", as many requests
    at a time as the runtime likes, and ratios of images a second; "server", calls one at a time, then requests that
    arrive at random, whose waiting is timed.
    `against`: the baseline; "eager" (the PyTorch model of the first bundle joins), "gemm" (the limit), the name of a
    contestant, or another bundle, which joins; None: the first bundle. `threads`: None for every core available.
    `batch`: None for the bundles' own fixed one, or 1. `device`: in the runtimes' own words; None for the CPU. Inputs
    are the bundles' golden ones. `progress` is told what runs now.

    Raises UsageError on settings that do not fit, BundleError on a bundle that is not whole, MissingError where a
    runtime or device is not here, WeightsError where eager's are gone, ConversionError where a runtime fails, dies or
    hangs; each names the contestant. No process is left in any case.
    """
    tell = progress or (lambda _: None)
    opened = [_open(bundle) for bundle in bundles]
    _check(opened, rounds, seconds, threads)
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}; valid modes: {', '.join(MODES)}")
    if until is not None and until <= 0:
        raise UsageError(f"until must be more than 0, not {until}: 0.1 for an interval of a tenth of the ratio")
    entrants, baseline = enter(opened, against)
    for entrant in entrants:
        if entrant.kind == "bundle":
            check_latency(entrant.bundle, device)
    setting = Setting(
        common_batch([e.bundle for e in entrants], batch), threads or available_cores(), device, rounds, seconds, mode
    )
    machine = describe_machine()
    notes = [*_doubts(machine, setting), *other_sizes(entrants, baseline)]
    if until is None:
        found = measure([_job(entrant, setting) for entrant in entrants], rounds, seconds, tell)
    else:
        width, raced = until, [e.name for e in entrants if e.kind != "limit"]
        found = measure(
            [_job(entrant, setting) for entrant in entrants], max(rounds, MOST_ROUNDS), seconds, tell,
            enough=lambda series: settled(series, raced, baseline, rounds, width, setting),
        )  # fmt: skip
        if not settled(found, raced, baseline, rounds, width, setting):
            notes.append(f"{MOST_ROUNDS} rounds did not bring every ratio's 90 % interval below {width:g} of it")
    contestants = tuple(contestant(e, setting, found, baseline) for e in entrants)
    done = len(next(iter(found.values())).rounds_ns)
    return BenchReport(
        machine=machine,
        versions=library_versions(_libraries(entrants)),
        command=_command(opened, against, setting, until),
        baseline=baseline,
        threads=setting.threads,
        batch=setting.batch,
        rounds=done,
        seconds=seconds,
        contestants=contestants,
        notes=(*notes, *noise_notes(contestants)),
        mode=mode,
    )


def settled(
    series: Mapping[str, Series], names: Sequence[str], baseline: str, fewest: int, width: float, setting: Setting
) -> bool:
    """Whether every one's ratio to the baseline has an interval narrower than `width` of its median."""
    reference = _costs(series[baseline], setting)
    if len(reference) < fewest:
        return False
    for name in names:
        if name != baseline:
            ratios = ratios_of(reference, _costs(series[name], setting))
            bounds = median_interval(ratios)
            if bounds is None or bounds[1] - bounds[0] > width * statistics.median(ratios):
                return False
    return True


def enter(bundles: Sequence[Bundle], against: BundleLike | None) -> tuple[list[Entrant], str]:
    """The contestants in the order of the table, the limits last, and the name of the baseline.

    Raises UsageError where `against` is nothing that can be raced.
    """
    raced = list(bundles)
    rival = _rival(raced, against)
    if rival is not None:
        raced.insert(0, rival)
    names = unique_names([b.path for b in raced])
    limits: dict[Any, str] = {}
    for name, bundle in zip(names, raced, strict=True):
        if bundle.manifest.products:
            own = _free(f"{GEMM} of {name}" if limits else GEMM, names)
            limits.setdefault(bundle.manifest.products, own)
    entrants = [Entrant(n, "bundle", b, limits.get(b.manifest.products)) for n, b in zip(names, raced, strict=True)]
    if against == EAGER:
        entrants.insert(0, Entrant(EAGER, "eager", bundles[0], limits.get(bundles[0].manifest.products)))
    owners = {e.limit: e.bundle for e in reversed(entrants) if e.limit}
    entrants += [Entrant(name, "limit", owners[name], name) for name in limits.values()]
    return entrants, _baseline(entrants, against)


def _rival(raced: Sequence[Bundle], against: BundleLike | None) -> Bundle | None:
    """The bundle that `against` adds to those raced; None where it is a word, a contestant's name or one of them."""
    if against is None or against in (EAGER, GEMM):
        return None
    path, names = _path(against), unique_names([b.path for b in raced])
    if any(b.path.resolve() == path.resolve() for b in raced) or against in names:
        return None
    if not isinstance(against, Bundle) and not path.is_dir():
        raise UsageError(
            f"against {str(path)!r} is neither {EAGER}, {GEMM}, a contestant ({', '.join(names)}) nor a bundle's folder"
        )
    return _open(against)


def _path(against: BundleLike) -> Path:
    return against.path if isinstance(against, Bundle) else Path(against)


def _baseline(entrants: Sequence[Entrant], against: BundleLike | None) -> str:
    if against is None:
        return entrants[0].name
    folder = _path(against).resolve()
    # Only a plain string is a name: a bundle that was opened as "s" is not the contestant of that name.
    named = [e.name for e in entrants if e.name == against]
    found = named or [e.name for e in entrants if e.kind == "bundle" and e.bundle.path.resolve() == folder]
    if not found:
        raise UsageError(f"against {against!r}: {entrants[0].name} records no matrix products; export it again")
    return found[0]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each bundle: its folder's, after its parent's where two share one, numbered where they share both."""
    resolved = [path.resolve() for path in paths]
    short = Counter(p.name for p in resolved) + Counter((EAGER, GEMM))
    names = [p.name if short[p.name] == 1 else f"{p.parent.name}/{p.name}" for p in resolved]
    unique: list[str] = []
    for index, name in enumerate(names):
        unique.append(_free(name, [*unique, *names[index + 1 :]]) if name in unique else name)
    return unique


def _free(name: str, taken: Sequence[str]) -> str:
    """`name`, or `name` with the first number from 2 on that none of those `taken` has."""
    numbered = (f"{name}#{number}" for number in count(2))
    return next(each for each in chain((name,), numbered) if each not in taken)


def common_batch(bundles: Sequence[Bundle], batch: int | None) -> int:
    """The batch that all bundles can run: `batch`, else the fixed one that they share, else 1.

    Raises UsageError that names a bundle whose fixed batch is another.
    """
    fixed = {b.path: b.manifest.input.batch for b in bundles if b.manifest.input.batch is not None}
    wanted = batch if batch is not None else next(iter(fixed.values()), 1)
    if wanted < 1:
        raise UsageError(f"batch must be at least 1, not {wanted}")
    for path, own in fixed.items():
        if own != wanted:
            why = f"--batch is {batch}" if batch is not None else f"{next(iter(fixed))} has {wanted}"
            raise UsageError(
                f"{path} has a fixed batch of {own}, but {why}; bench one batch at a time, or export it with "
                f"--batch {wanted} or dynamic"
            )
    return wanted


# What runs a contestant that is no bundle, by its kind and what the bundle is held against
_OTHERS = {
    ("eager", EAGER): "pytorch", ("eager", ONNX_FILE): "onnxruntime, the file", ("limit", EAGER): "numpy",
    ("limit", ONNX_FILE): "numpy",
}  # fmt: skip


def contestant(entrant: Entrant, setting: Setting, found: Mapping[str, Series], baseline: str) -> Contestant:
    """One row of the report, from what all of them measured."""
    own, manifest = found[entrant.name], entrant.bundle.manifest
    all_laps = latency([lap for laps in own.rounds_ns for lap in laps])
    is_bundle, is_limit = entrant.kind == "bundle", entrant.kind == "limit"
    # The products run on the CPU: against another device they would say nothing.
    limit = entrant.limit if setting.on_cpu or is_limit else None
    costs, reference = _costs(own, setting), _costs(found[baseline], setting)
    return Contestant(
        name=entrant.name,
        kind=entrant.kind,
        target=manifest.target if is_bundle else _OTHERS[entrant.kind, manifest.reference],
        precision=manifest.precision if is_bundle else "fp32",
        bundle=str(entrant.bundle.path) if is_bundle else None,
        **vars(all_laps),
        rounds_p50_ms=tuple(_p50s(own)),
        images_per_s=1e3 * setting.batch / all_laps.mean_ms,
        async_images_per_s=statistics.median(own.async_images_per_s) if own.async_images_per_s else None,
        ratio=ratio_of(reference, costs),
        gemm_limit_ratio=ratio_of(_p50s(found[limit]), _p50s(own)).median if limit else None,
        cold_start_ms=None if is_limit else own.cold_start_ms,
        first_inference_ms=None if is_limit else own.first_inference_ms,
        peak_rss_mib=own.peak_rss_mib,
        size_mib=entrant.bundle.size_bytes / 2**20 if is_bundle else None,
        threads=setting.threads,
        batch=setting.batch,
        device="cpu" if is_limit else setting.device or "cpu",
        ratio_interval=median_interval(ratios_of(reference, costs)),
        tails=tuple(
            Tail(float(load), found_tail.p50_ms, found_tail.p99_ms, found_tail.runs)
            for load, found_tail in ((load, latency(waits)) for load, waits in own.tails_ns.items())
        ),
    )


def _p50s(series: Series) -> list[float]:
    return [latency(laps).p50_ms for laps in series.rounds_ns]


def _costs(series: Series, setting: Setting) -> list[float]:
    """What a round says of an image: the p50 of a call, or in mode throughput the milliseconds for each."""
    if setting.mode == "throughput" and series.async_images_per_s:
        return [1e3 / rate for rate in series.async_images_per_s]
    return [p50 / setting.batch for p50 in _p50s(series)]


def _open(bundle: BundleLike) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _check(bundles: Sequence[Bundle], rounds: int, seconds: float, threads: int | None) -> None:
    if not bundles:
        raise UsageError("no bundle to bench; name one")
    if rounds < 1 or not 0 < seconds < float("inf"):
        raise UsageError(f"rounds ({rounds}) must be at least 1 and seconds ({seconds}) more than 0")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")


def _job(entrant: Entrant, setting: Setting) -> Job:
    path, products = str(entrant.bundle.path.resolve()), entrant.bundle.manifest.products
    return Job(entrant.name, entrant.kind, path, products, setting.batch, setting.threads, setting.device, setting.mode)


def _libraries(entrants: Sequence[Entrant]) -> list[str]:
    """Distributions behind the contestants; those of runtimes are named like their modules."""
    names = ["dualtoken-deploy", "numpy", *(["torch"] if any(e.kind == "eager" for e in entrants) else [])]
    names += [m for e in entrants for m in get_target(e.bundle.manifest.target).modules]
    return list(dict.fromkeys(names))


def _command(
    bundles: Sequence[Bundle], against: BundleLike | None, setting: Setting, until: float | None = None
) -> str:
    """The command line that does this again."""
    rival = [] if against is None else ["--against", str(_path(against))]
    device = [] if setting.device is None else ["--device", setting.device]
    numbers = {"threads": setting.threads, "batch": setting.batch, "rounds": setting.rounds}
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    words = ["dualtoken", "bench", *(str(b.path) for b in bundles), *rival, *options]
    stop = [] if until is None else ["--until", f"{until:g}"]
    stop += [] if setting.mode == "latency" else ["--mode", setting.mode]
    return shlex.join([*words, "--seconds", f"{setting.seconds:g}", *stop, *device])


def other_sizes(entrants: Sequence[Entrant], baseline: str) -> list[str]:
    """Says of each bundle that takes another size than the baseline: a ratio of the two is none of speed."""
    base = next(e.bundle.manifest.input.size for e in entrants if e.name == baseline)
    sizes = {e.name: e.bundle.manifest.input.size for e in entrants if e.kind == "bundle"}
    return [
        f"{name} takes {size[0]} x {size[1]} and {baseline} {base[0]} x {base[1]}: their ratio is of other work"
        for name, size in sizes.items()
        if size != base
    ]


def _doubts(machine: Mapping[str, Any], setting: Setting) -> list[str]:
    """What is known before the start to make figures unsteady or not comparable."""
    notes = []
    governor, available = machine["governor"], machine["cores"]
    if governor and governor != "performance":
        notes.append(f"the CPU's governor is {governor}, so its clock may change; performance is steadier")
    if setting.threads > available:
        notes.append(
            f"{setting.threads} threads share {available} cores; figures with more threads than cores are unsteady"
        )
    busy, cores = busy_cores(), os.cpu_count() or 1
    if busy + min(setting.threads, cores) > cores + 0.5:  # half a core: the odd daemon does no harm
        notes.append(f"other programs kept {busy:.1f} of {cores} cores busy before the start")
    if not setting.on_cpu:
        notes.append(f"the matrix products ran on the CPU and are no limit for device {setting.device}")
    return notes
