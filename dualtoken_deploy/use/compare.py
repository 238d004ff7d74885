"""Bundles of one model side by side: what each loses, gains and weighs, and whether it is worth it on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bench.report import BenchReport, Contestant, Ratio
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets import eager
from dualtoken_deploy.targets.load import Runner, RunnerOptions, engine_of, load_runner, why_no_latency
from dualtoken_deploy.targets.runner import run_each
from dualtoken_deploy.tasks.base import Outputs, Task
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.plots import save_figure
from dualtoken_deploy.use.validate import chunks, open_for, read

WORTH_DROP = 0.5  # points: more than this is not worth any speed without being asked for
WORTH_SPEED = 1.05  # the slowest round's ratio to fp32 from which on a bundle counts as faster
WORTH_SIZE = 0.6  # of the fp32 artifact

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One bundle. `score`: of the task's metric, in 0..1; `drop` is in points of it against eager where the data has
    the truth, else of agreement with eager.

    `against_fp32`: p50 of the same target's fp32 bundle over this one's, round by round; None without one, or where
    the time here is not the device's (`verdict` says so). Sizes are of the artifact.
    """

    bundle: str
    target: str
    precision: str
    images: int
    score: float | None
    drop: float
    sqnr_db: float
    size_mib: float
    size_ratio: float | None
    p50_ms: float | None
    against_fp32: Ratio | None
    against_eager: Ratio | None
    int8_mac_share: float
    verdict: str
    engine: str | None = None  # what stood in for the target's own runtime, if anything did


@dataclass(frozen=True)
class Comparison:
    """`metric` and `eager_score` are None where the data lacks the truth, `bench` where no bundle could be timed."""

    data: str
    metric: str | None
    eager_score: float | None
    rows: tuple[Row, ...]
    bench: BenchReport | None

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "metric": self.metric,
            "eager_score": self.eager_score,
            "eager_top1": self.eager_score if self.metric == "top1" else None,
            "rows": [asdict(r) | {"top1": r.score if self.metric == "top1" else None} for r in self.rows],
            "bench": None if self.bench is None else self.bench.to_json(),
        }


def compare(
    bundles: Sequence[Bundle | str | Path],
    data: str | Path,
    limit: int | None = None,
    threads: int | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    progress: Tell | None = None,
) -> Comparison:
    """Accuracy of bundles of one model on `data` and their latency, all in one interleaved bench with eager.

    Raises UsageError (bundles of different weights), DatasetError, BundleError, WeightsError, MissingError.
    """
    tell = progress or (lambda _: None)
    opened = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
    if not opened:
        raise UsageError("no bundle to compare")
    if len({b.manifest.weights.sha256 for b in opened}) > 1:
        raise UsageError("the bundles are of different weights; compare those of one model")
    if len({b.manifest.task for b in opened}) > 1:
        raise UsageError("the bundles are for different tasks; compare those of one model")
    task, images = get_task(opened[0].manifest.task), open_for(opened[0], data, limit)
    measure = task.metrics[0] if task.metrics and task.known(images) else None
    tell("running eager")
    with eager.load(opened[0], RunnerOptions(threads=threads)) as model:
        expected = _outputs(opened[0], images, model)
    eager_score = None if measure is None else _score(opened[0], task, images, expected)[measure]
    found: dict[int, dict[str, Any]] = {}
    for i, bundle in enumerate(opened):
        tell(f"running {bundle.name}")
        with load_runner(bundle, None, threads) as runner:
            engine, actual = engine_of(runner), _outputs(bundle, images, runner)
        meter = task.meter()
        for want, got in zip(expected, actual, strict=True):
            meter.add(want, got)
        likeness = meter.likeness()
        score = None if measure is None else _score(bundle, task, images, actual)[measure]
        drop = 1 - (likeness.agreement or 0.0) if score is None or eager_score is None else eager_score - score
        found[i] = {"score": score, "drop": 100 * drop, "sqnr_db": likeness.sqnr_db, "engine": engine}
    timed = [b for b in opened if why_no_latency(b) is None]
    report = bench(timed, "eager", threads, None, rounds, seconds, None, tell) if timed else None
    rows = tuple(_row(b, found[i], opened, report, len(images)) for i, b in enumerate(opened))
    return Comparison(images.name, measure, eager_score, rows, report)


def _outputs(bundle: Bundle, images: SampleSet, runner: Runner) -> list[Outputs]:
    contract = bundle.manifest.input
    return [out for _, inputs in chunks(images, contract) for out in run_each(runner, contract, inputs)]


def _score(bundle: Bundle, task: Task, images: SampleSet, outputs: Sequence[Outputs]) -> dict[str, float]:
    pairs = []
    for i, out in enumerate(outputs):
        sample = images[i]
        pairs.append((sample.truth, read(bundle, task, sample, out)))
    return task.score(pairs, len(bundle.labels))


def _row(
    bundle: Bundle, numbers: dict[str, Any], bundles: Sequence[Bundle], report: BenchReport | None, images: int
) -> Row:
    manifest = bundle.manifest
    floats = [b for b in bundles if b.manifest.target == manifest.target and b.manifest.precision == "fp32"]
    fp32 = floats[0] if floats and floats[0] is not bundle else None
    own, base = _timed(report, bundle), None if fp32 is None else _timed(report, fp32)
    faster = None if own is None or base is None else _over(base, own)
    size_ratio = None if fp32 is None else bundle.size_bytes / fp32.size_bytes
    return Row(
        bundle=str(bundle.path),
        target=manifest.target,
        precision=manifest.precision,
        images=images,
        score=numbers["score"],
        drop=numbers["drop"],
        sqnr_db=numbers["sqnr_db"],
        size_mib=bundle.size_bytes / 2**20,
        size_ratio=size_ratio,
        p50_ms=None if own is None else own.p50_ms,
        against_fp32=faster,
        against_eager=None if own is None else own.ratio,
        int8_mac_share=manifest.measured.int8_mac_share,
        verdict=verdict(numbers["drop"], faster, size_ratio, why_no_latency(bundle)),
        engine=numbers["engine"],
    )


def _timed(report: BenchReport | None, bundle: Bundle) -> Contestant | None:
    rows = () if report is None else report.contestants
    return next((c for c in rows if c.kind == "bundle" and c.bundle == str(bundle.path)), None)


def _over(base: Contestant, own: Contestant) -> Ratio:
    ratios = np.array(base.rounds_p50_ms) / np.array(own.rounds_p50_ms)
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def verdict(drop: float, faster: Ratio | None, size_ratio: float | None, untimed: str | None) -> str:
    """Whether a bundle is worth having beside the fp32 one of its target, on this machine, in a sentence."""
    if size_ratio is None:
        return "the fp32 one, or none of its target to hold it against"
    size = f"{size_ratio:.2f}x the size"
    lost = f"loses {drop:.2f} points" if drop > 0 else "loses nothing"
    if untimed is not None or faster is None:
        return f"{size}, {lost}; its speed was not measured here"
    if faster.low >= WORTH_SPEED:
        speed = f"faster ({faster})"
    elif faster.high < 1 / WORTH_SPEED:
        speed = f"slower here ({faster})"
    else:
        speed = f"as fast within the spread ({faster})"
    gains = faster.low >= WORTH_SPEED or (size_ratio <= WORTH_SIZE and faster.high >= 1 / WORTH_SPEED)
    worth = (
        "worth it" if gains and drop <= WORTH_DROP else "for its size only" if drop <= WORTH_DROP else "not worth it"
    )
    return f"{worth}: {speed}, {size}, {lost}"


def draw(comparison: Comparison, path: Path) -> None:
    """Top-1 (or agreement with eager) against p50, the size as the area of the mark; bundles that were timed only."""
    shown = [row for row in comparison.rows if row.p50_ms is not None]

    def fill(figure: Any) -> None:
        axis = figure.subplots()
        for row in shown:
            value = 100 * row.score if row.score is not None else 100 - row.drop
            axis.scatter([row.p50_ms], [value], s=18 * row.size_mib, alpha=0.5)
            axis.annotate(f"{row.target} {row.precision}", (row.p50_ms, value), fontsize=8)
        if comparison.eager_score is not None:
            axis.axhline(100 * comparison.eager_score, color="grey", linewidth=0.8, label="eager")
            axis.legend()
        axis.set_xlabel("p50 latency (ms)")
        axis.set_ylabel(
            f"{comparison.metric} on {comparison.data} (%)" if comparison.eager_score else "agreement with eager (%)"
        )
        axis.grid(alpha=0.3)

    save_figure(path, (7, 4.5), fill)
