"""MLPerf's scenarios through LoadGen: one bundle after the other, a process each, with LoadGen's own logs.

Figures are those of mlperf_log_summary.txt, so they compare with published ones. A run that is shorter than MLPerf asks
for is no result there, whatever LoadGen says of it, and is shown as shortened.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dualtoken_deploy.bench.process import LIMITS, Job, Limits, Worker
from dualtoken_deploy.bench.run import BundleLike, common_batch, unique_names
from dualtoken_deploy.bench.scenario import LONE, SCENARIOS
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import ConversionError, OutputError, UsageError, missing_extra
from dualtoken_deploy.machine import available_cores, describe_machine, library_versions
from dualtoken_deploy.targets.load import check_latency
from dualtoken_deploy.targets.table import get_target

SUMMARY, DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"
# Seconds and latency: MLPerf Inference's rules, "Scenarios" and "Benchmarks" (ResNet-50: 15 ms in scenario server)
LEAST_S = 600.0
TARGET_LATENCY_MS = 15.0
# What each scenario is scored by: a pattern of the summary's key, what it is called here, and its units in one of ours
_SCORES: Mapping[str, tuple[str, str, float]] = {
    "singlestream": (r"90(\.0)?th percentile latency \(ns\)", "p90 ms", 1e6),
    "multistream": (r"99(\.0)?th percentile latency \(ns\)", "p99 ms of 8 samples", 1e6),
    "offline": (r"Samples per second", "samples/s", 1.0),
    "server": (r"Completed samples per second", "samples/s within the target latency", 1.0),
}
LONGEST = 6  # times its duration a run may take before it counts as hung: LoadGen goes on until its queries are enough


@dataclass(frozen=True)
class Run:
    """One bundle in one scenario. `verdict`: LoadGen's own, VALID or INVALID, with its `reasons`; `shortened`: it ran
    less than MLPerf's LEAST_S, so that it is no result there. `samples`: that ran here; `queries`: in LoadGen's log."""

    name: str
    bundle: str
    target: str
    precision: str
    scenario: str
    metric: str
    value: float
    p50_ms: float
    p99_ms: float
    queries: int
    samples: int
    verdict: str
    reasons: tuple[str, ...]
    shortened: bool
    target_qps: float
    logs: str

    @property
    def said(self) -> str:
        """The verdict as it is shown."""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        own = f"{self.verdict}{why}"
        return f"INVALID for MLPerf: shortened; LoadGen itself: {own}" if self.shortened else own


@dataclass(frozen=True)
class LoadGenReport:
    """All runs, and what they ran on."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    scenario: str
    duration_s: float
    threads: int
    batch: int
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; units are in the names."""
        return asdict(self)

    def columns(self) -> tuple[str, ...]:
        return ("bundle", self.runs[0].metric, "p50 ms", "p99 ms", "queries", "verdict")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (r.name, f"{r.value:.4g}", f"{r.p50_ms:.4g}", f"{r.p99_ms:.4g}", str(r.queries), r.said) for r in self.runs
        ]


def run_scenario(
    bundles: Sequence[BundleLike],
    scenario: str,
    logs: Path | None = None,
    duration_s: float = LEAST_S,
    threads: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    target_qps: float | None = None,
    target_latency_ms: float = TARGET_LATENCY_MS,
    progress: Callable[[str], None] = lambda _: None,
    limits: Limits = LIMITS,
) -> LoadGenReport:
    """Runs bundles in one of SCENARIOS for at least `duration_s`; LoadGen's log files lie in LOGS/NAME-SCENARIO.

    `target_qps`: arrivals a second in scenario server; 80 % of what calls one after the other reach unless given.
    Raises UsageError, MissingError without the extra, BundleError, OutputError, ConversionError where a runtime fails.
    """
    if scenario not in SCENARIOS:
        raise UsageError(f"unknown scenario {scenario!r}; valid scenarios: {', '.join(SCENARIOS)}")
    if not 0 < duration_s < float("inf"):
        raise UsageError(f"a scenario's duration must be more than 0 s, not {duration_s:g}")
    if target_qps is not None and not 0 < target_qps < float("inf"):
        raise UsageError(f"the target rate must be more than 0 queries a second, not {target_qps:g}")
    if target_qps is not None and scenario != "server":
        raise UsageError(f"scenario {scenario} takes no target rate; leave --target-qps to server")
    if target_latency_ms <= 0:
        raise UsageError(f"the target latency must be more than 0 ms, not {target_latency_ms:g}")
    if find_spec("mlperf_loadgen") is None:
        raise missing_extra("loadgen", f"scenario {scenario}")
    opened = [bundle if isinstance(bundle, Bundle) else Bundle.open(bundle) for bundle in bundles]
    if not opened:
        raise UsageError("no bundle to bench; name one")
    for bundle in opened:
        check_latency(bundle, device)
    count, size = threads or available_cores(), common_batch(opened, batch)
    if scenario in LONE and size != 1:
        raise UsageError(f"scenario {scenario} asks for one sample at a time, not {size}; bench bundles of batch 1")
    place = logs or Path("loadgen")
    runs = []
    for name, bundle in zip(unique_names([b.path for b in opened]), opened, strict=True):
        folder = place / f"{name.replace('/', '-')}-{scenario}"
        progress(f"scenario {scenario}: {name}, at least {duration_s:g} s")
        asked = {
            "do": "scenario", "scenario": scenario, "duration_s": duration_s, "folder": str(_made(folder).resolve()),
            "target_qps": target_qps, "target_latency_ms": target_latency_ms,
        }  # fmt: skip
        mode = "throughput" if scenario == "offline" else "latency"
        job = Job(name, "bundle", str(bundle.path.resolve()), (), size, count, device, mode)
        with Worker(name, count) as worker:
            worker.ask({"do": "load", "job": job.to_json()}, limits.load_s)
            answer = worker.ask(asked, limits.round_s + LONGEST * duration_s)
        runs.append(_read(name, bundle, scenario, folder, duration_s, answer))
    libraries = ["dualtoken-deploy", "mlcommons-loadgen", "numpy"]
    libraries += [m for b in opened for m in get_target(b.manifest.target).modules]
    return LoadGenReport(
        describe_machine(), library_versions(list(dict.fromkeys(libraries))),
        _command(opened, scenario, logs, duration_s, count, size, device, target_qps, target_latency_ms), scenario,
        duration_s, count, size, tuple(runs),
    )  # fmt: skip


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder} for LoadGen's logs: {error.strerror}; name another --logs") from error
    return folder


def _read(name: str, bundle: Bundle, scenario: str, folder: Path, duration_s: float, answer: Mapping[str, Any]) -> Run:
    """What LoadGen wrote of a run."""
    found = read_summary(folder / SUMMARY)
    pattern, metric, unit = _SCORES[scenario]
    scores = [value for key, value in found.items() if re.fullmatch(pattern, key)]
    counts = [row["value"] for row in _details(folder / DETAIL) if row.get("key") == "result_query_count"]
    if not scores or not counts or "Result is" not in found:
        raise ConversionError(f"{name}: LoadGen's {folder / SUMMARY} has no {metric}; see {DETAIL} beside it")
    return Run(
        name, str(bundle.path), bundle.manifest.target, bundle.manifest.precision, scenario, metric,
        float(scores[0]) / unit, float(found["50.00 percentile latency (ns)"]) / 1e6,
        float(found["99.00 percentile latency (ns)"]) / 1e6, int(counts[-1]), int(answer["samples"]),
        found["Result is"],
        tuple(f"{key}: no" for key, value in found.items() if key.endswith("satisfied") and value.upper() == "NO"),
        duration_s < LEAST_S, float(answer["target_qps"]), str(folder),
    )  # fmt: skip


def read_summary(path: Path) -> dict[str, str]:
    """{key: value} of LoadGen's summary; the first of each key, which are the scores. Raises ConversionError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConversionError(f"LoadGen left no {path}: {error.strerror}") from error
    found: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if colon and value.strip():
            found.setdefault(key.strip(), value.strip())
    return found


def _details(path: Path) -> list[dict[str, Any]]:
    mark = ":::MLLOG "
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line.removeprefix(mark)) for line in lines if line.startswith(mark)]


def _command(
    bundles: Sequence[Bundle], scenario: str, logs: Path | None, duration_s: float, threads: int, batch: int,
    device: str | None, target_qps: float | None, target_latency_ms: float,
) -> str:  # fmt: skip
    """The command line that does this again."""
    words = ["dualtoken", "bench", *(str(b.path) for b in bundles), "--scenario", scenario]
    words += ["--duration", f"{duration_s:g}", "--threads", str(threads), "--batch", str(batch)]
    words += ["--logs", str(logs)] if logs is not None else []
    words += ["--device", device] if device is not None else []
    words += ["--target-qps", f"{target_qps:g}"] if target_qps is not None else []
    words += ["--target-latency", f"{target_latency_ms:g}"] if scenario == "server" else []
    return shlex.join(words)
