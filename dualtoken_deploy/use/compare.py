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
from dualtoken_deploy.data.folders import match_labels, open_dataset
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets import eager
from dualtoken_deploy.targets.load import RunnerOptions, engine_of, load_runner, why_no_latency
from dualtoken_deploy.use.plots import save_figure
from dualtoken_deploy.use.validate import measure, run_over

WORTH_DROP = 0.5  # points: more than this is not worth any speed without being asked for
WORTH_SPEED = 1.05  # the slowest round's ratio to fp32 from which on a bundle counts as faster
WORTH_SIZE = 0.6  # of the fp32 artifact

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One bundle. `drop` is in points of top-1 against eager where the data has labels, else of agreement with it.

    `against_fp32`: p50 of the same target's fp32 bundle over this one's, round by round; None without one, or where
    the time here is not the device's (`verdict` says so). Sizes are of the artifact.
    """

    bundle: str
    target: str
    precision: str
    images: int
    top1: float | None
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
    """`bench` is None where no bundle could be timed; `eager_top1` where the data has no labels."""

    data: str
    eager_top1: float | None
    rows: tuple[Row, ...]
    bench: BenchReport | None

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "eager_top1": self.eager_top1,
            "rows": [asdict(row) for row in self.rows],
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
    for bundle in opened:
        bundle.need_classifier("compare", "use dualtoken validate --data and dualtoken bench")
    if len({b.manifest.weights.sha256 for b in opened}) > 1:
        raise UsageError("the bundles are of different weights; compare those of one model")
    images = open_dataset(data)
    images = images if limit is None else images.limit(limit)
    truth = None if images.labels is None else np.array(match_labels(images, opened[0].labels))
    tell("running eager")
    with eager.load(opened[0], RunnerOptions(threads=threads)) as model:
        expected = run_over(images, opened[0].manifest.input, model)
    eager_top1 = None if truth is None else float((expected.argmax(1) == truth).mean())
    found: dict[int, dict[str, Any]] = {}
    for i, bundle in enumerate(opened):
        tell(f"running {bundle.name}")
        with load_runner(bundle, None, threads) as runner:
            engine, logits = engine_of(runner), run_over(images, bundle.manifest.input, runner)
        numbers = measure(expected, logits)
        top1 = None if truth is None else float((logits.argmax(1) == truth).mean())
        drop = 1 - numbers["top1_agreement"] if top1 is None or eager_top1 is None else eager_top1 - top1
        found[i] = {"top1": top1, "drop": 100 * drop, "sqnr_db": numbers["sqnr_db"], "engine": engine}
    timed = [b for b in opened if why_no_latency(b) is None]
    report = bench(timed, "eager", threads, None, rounds, seconds, None, tell) if timed else None
    rows = tuple(_row(b, found[i], opened, report, len(images)) for i, b in enumerate(opened))
    return Comparison(images.name, eager_top1, rows, report)


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
        top1=numbers["top1"],
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
            value = 100 * row.top1 if row.top1 is not None else 100 - row.drop
            axis.scatter([row.p50_ms], [value], s=18 * row.size_mib, alpha=0.5)
            axis.annotate(f"{row.target} {row.precision}", (row.p50_ms, value), fontsize=8)
        if comparison.eager_top1 is not None:
            axis.axhline(100 * comparison.eager_top1, color="grey", linewidth=0.8, label="eager")
            axis.legend()
        axis.set_xlabel("p50 latency (ms)")
        axis.set_ylabel(f"top-1 on {comparison.data} (%)" if comparison.eager_top1 else "agreement with eager (%)")
        axis.grid(alpha=0.3)

    save_figure(path, (7, 4.5), fill)
