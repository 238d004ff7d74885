"""Bundles of one model side by side: what each loses, gains and weighs, and whether it is worth it on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bench.report import BenchReport, Contestant, Ratio
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.bundle.manifest import EAGER
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.samples import SampleSet, readable
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets import eager
from dualtoken_deploy.targets.load import RunnerOptions, engine_of, load_runner, why_no_latency
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.base import Outputs, Pair, Task
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.expected import Expected, read_expected, run_all
from dualtoken_deploy.use.intervals import jackknife, paired_difference, wilson
from dualtoken_deploy.use.plots import COLOURS, GREY, label_points, save_figure
from dualtoken_deploy.use.validate import open_for, read

WORTH_DROP = 0.5  # points: more than this is not worth any speed without being asked for
WORTH_SPEED = 1.05  # the slowest round's ratio to fp32 from which on speed is a gain
WORTH_SIZE = 0.6  # of the fp32 artifact

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Lost:
    """Points lost, and their 95 % interval; below 0: gained."""

    drop: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.drop:.2f} points ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One bundle. `score`: of the task's metric, in 0..1; `drop` is in points of it against eager where the data has
    the truth, else of agreement with eager, `drop_low` to `drop_high` its 95 % interval. None: could not be measured.

    `against_fp32`: p50 of the same target's fp32 bundle over this one's, round by round; None without one, or where
    the time here is not the device's (`verdict` says so). Sizes are of the artifact.
    """

    bundle: str
    target: str
    precision: str
    images: int
    score: float | None
    drop: float | None
    drop_low: float | None
    drop_high: float | None
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
    """`metric` and `eager_score` are None where the data lacks the truth, `bench` where no bundle could be timed.
    `reference`: what stands for eager, a key of manifest.REFERENCES. `other_pixels`: pictures that this machine decodes
    to other pixels than the one that computed eager's outputs."""

    data: str
    images: int
    metric: str | None
    eager_score: float | None
    rows: tuple[Row, ...]
    bench: BenchReport | None
    reference: str = EAGER
    other_pixels: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "images": self.images,
            "reference": self.reference,
            "metric": self.metric,
            "eager_score": self.eager_score,
            "eager_top1": self.eager_score if self.metric == "top1" else None,
            "rows": [asdict(r) | {"top1": r.score if self.metric == "top1" else None} for r in self.rows],
            "other_pixels": self.other_pixels,
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
    expected: Path | None = None,
) -> Comparison:
    """Accuracy of bundles of one model on `data` and their latency, all in one interleaved bench with eager.

    `expected`: a file of expect() with eager's outputs, in the place of eager itself, which then is not timed either.
    Raises UsageError (bundles of different weights), DatasetError, BundleError, WeightsError, MissingError.
    """
    tell = progress or (lambda _: None)
    opened = _of_one_model(bundles)
    task, images = get_task(opened[0].manifest.task), readable(open_for(opened[0], data, limit))
    measure = task.metrics[0] if task.metrics and task.known(images) else None
    if expected is None:
        reference = _eager(opened[0], images, threads, tell)
    else:
        reference = read_expected(expected, opened[0], len(images))
    truth = None if measure is None else _answered(opened[0], task, images, reference.outputs)
    eager_score = None if truth is None else task.score(truth, len(opened[0].labels))[measure or ""]
    found: dict[int, dict[str, Any]] = {}
    other_pixels = 0
    for i, bundle in enumerate(opened):
        with load_runner(bundle, None, threads) as runner:
            engine, actual = engine_of(runner), run_all(bundle, images, runner, bundle.name, tell)
        if i == 0:
            other_pixels = int((actual.digests != reference.digests).any(axis=1).sum())
        meter = task.meter()
        for want, got in zip(reference.outputs, actual.outputs, strict=True):
            meter.add(want, got)
        likeness = meter.likeness()
        pairs = None if measure is None else _answered(bundle, task, images, actual.outputs)
        score = None if pairs is None else task.score(pairs, len(bundle.labels))[measure or ""]
        if pairs is None or truth is None or measure is None:
            lost = _lost_agreement(likeness.agreement, len(images))
        else:
            lost = _lost_score(task, measure, truth, pairs, len(bundle.labels))
        found[i] = {"score": score, "lost": lost, "sqnr_db": likeness.sqnr_db, "engine": engine}
    timed = [b for b in opened if why_no_latency(b) is None]
    baseline = EAGER if expected is None else None
    report = bench(timed, baseline, threads, None, rounds, seconds, None, tell) if timed else None
    rows = tuple(_row(b, found[i], opened, report, len(images)) for i, b in enumerate(opened))
    if expected is not None:  # the baseline is the first bundle
        rows = tuple(replace(row, against_eager=None) for row in rows)
    named = opened[0].manifest.reference
    return Comparison(images.name, len(images), measure, eager_score, rows, report, named, other_pixels)


def expect(
    bundles: Sequence[Bundle | str | Path],
    data: str | Path,
    path: Path,
    limit: int | None = None,
    threads: int | None = None,
    progress: Tell | None = None,
) -> str:
    """Writes what compare() takes as `expected` on a machine without torch; the name of the data.

    Raises what compare() raises.
    """
    opened = _of_one_model(bundles)
    images = readable(open_for(opened[0], data, limit))
    _eager(opened[0], images, threads, progress or (lambda _: None)).write(path)
    return images.name


def _of_one_model(bundles: Sequence[Bundle | str | Path]) -> list[Bundle]:
    opened = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
    if not opened:
        raise UsageError("no bundle to compare")
    if len({b.manifest.weights.sha256 for b in opened}) > 1:
        raise UsageError("the bundles are of different weights; compare those of one model")
    if len({b.manifest.task for b in opened}) > 1:
        raise UsageError("the bundles are for different tasks; compare those of one model")
    return opened


def _eager(bundle: Bundle, images: SampleSet, threads: int | None, tell: Tell) -> Expected:
    with eager.load(bundle, RunnerOptions(threads=threads)) as model:
        return run_all(bundle, images, model, bundle.manifest.reference, tell)


def _answered(bundle: Bundle, task: Task, images: SampleSet, outputs: Sequence[Outputs]) -> list[Pair]:
    pairs = []
    for i, out in enumerate(outputs):
        sample = images[i]
        pairs.append((task.keep(sample, bundle.manifest.input), read(bundle, task, sample, out)))
    return pairs


def _lost_agreement(agreement: float | None, images: int) -> Lost | None:
    """Points of agreement with eager that are missing; None where the task has none."""
    if agreement is None:
        return None
    kept = wilson(agreement * images, images)
    return Lost(100 * (1 - agreement), 100 * (1 - kept.high), 100 * (1 - kept.low))


def _lost_score(task: Task, measure: str, eager: Sequence[Pair], own: Sequence[Pair], classes: int) -> Lost:
    """Points of a metric that a bundle loses against eager on the same pictures."""

    def difference(both: Sequence[tuple[Pair, Pair]]) -> float:
        before, after = ([pair[i] for pair in both] for i in (0, 1))
        lost = 100 * (task.score(before, classes)[measure] - task.score(after, classes)[measure])
        return -lost if task.lower else lost

    both = list(zip(eager, own, strict=True))
    drop = difference(both)
    if measure == "top1":
        right = [[found.logits is not None and int(found.logits.argmax()) == sample.label for sample, found in pairs]
                 for pairs in (eager, own)]  # fmt: skip
        interval = paired_difference(*right)
        return Lost(drop, 100 * interval.low, 100 * interval.high)
    spread = jackknife(both, difference)
    return Lost(drop, -100.0, 100.0) if spread is None else Lost(drop, spread.low, spread.high)


def _row(
    bundle: Bundle, numbers: dict[str, Any], bundles: Sequence[Bundle], report: BenchReport | None, images: int
) -> Row:
    manifest = bundle.manifest
    row = get_target(manifest.target)
    alike = [b for b in bundles if get_target(b.manifest.target) is row]
    floats = [b for b in alike if row.precision(b.manifest.precision).exact]
    fp32 = floats[0] if floats and floats[0] is not bundle else None
    own, base = _timed(report, bundle), None if fp32 is None else _timed(report, fp32)
    faster = None if own is None or base is None else _over(base, own)
    size_ratio = None if fp32 is None else bundle.size_bytes / fp32.size_bytes
    lost: Lost | None = numbers["lost"]
    return Row(
        bundle=str(bundle.path),
        target=manifest.target,
        precision=manifest.precision,
        images=images,
        score=numbers["score"],
        drop=None if lost is None else lost.drop,
        drop_low=None if lost is None else lost.low,
        drop_high=None if lost is None else lost.high,
        sqnr_db=numbers["sqnr_db"],
        size_mib=bundle.size_bytes / 2**20,
        size_ratio=size_ratio,
        p50_ms=None if own is None else own.p50_ms,
        against_fp32=faster,
        against_eager=None if own is None else own.ratio,
        int8_mac_share=manifest.measured.int8_mac_share,
        verdict=verdict(lost, faster, size_ratio, why_no_latency(bundle)),
        engine=numbers["engine"],
    )


def _timed(report: BenchReport | None, bundle: Bundle) -> Contestant | None:
    rows = () if report is None else report.contestants
    return next((c for c in rows if c.kind == "bundle" and c.bundle == str(bundle.path)), None)


def _over(base: Contestant, own: Contestant) -> Ratio:
    ratios = np.array(base.rounds_p50_ms) / np.array(own.rounds_p50_ms)
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def verdict(lost: Lost | None, faster: Ratio | None, size_ratio: float | None, untimed: str | None) -> str:
    """Whether a bundle is worth having beside the fp32 one of its target, on this machine, in a sentence.

    What an interval leaves open is said as that: "cannot tell".
    """
    if size_ratio is None:
        return "the fp32 one, or none of its target to hold it against"
    size = f"{size_ratio:.2f}x the size"
    loss = "loss not measured" if lost is None else f"loses {lost}"
    if untimed is not None or faster is None:
        return f"{size}, {loss}; its speed was not measured here"
    kept = None if lost is None or lost.low <= WORTH_DROP < lost.high else lost.high <= WORTH_DROP
    return f"{_worth(kept, faster, size_ratio)}: {_speed(faster)}, {size}, {loss}"


def _speed(faster: Ratio) -> str:
    if faster.low > 1:
        return f"faster ({faster})"
    if faster.high < 1:
        return f"slower here ({faster})"
    if faster.low >= 1 / WORTH_SPEED and faster.high <= WORTH_SPEED:
        return f"as fast ({faster})"
    return f"cannot tell whether faster ({faster})"


def _worth(kept: bool | None, faster: Ratio, size_ratio: float) -> str:
    """`kept`: whether the loss is within WORTH_DROP; None: the pictures cannot tell."""
    if kept is None:
        return f"cannot tell by these pictures whether it loses {WORTH_DROP:g} points"
    if not kept:
        return "not worth it"
    small, slower = size_ratio <= WORTH_SIZE, faster.high < 1
    if faster.low >= WORTH_SPEED or (small and not slower):
        return "worth it"
    return (
        "for its size only" if small else "not worth it" if slower else "cannot tell" if faster.low < 1 else "no gain"
    )


AREA_MIB = 12.0  # points of area of a mark, for each MiB of the artifact


@dataclass(frozen=True)
class Mark:
    """A bundle in the picture: latency and accuracy with their ranges, and what it is called."""

    text: str
    size_mib: float
    p50: tuple[float, float, float]  # ms: the figure, the fastest round, the slowest
    value: tuple[float, float, float]  # %: the figure, its 95 % interval


def marks(comparison: Comparison) -> list[Mark]:
    """Of the bundles that were timed and whose loss was measured."""
    contestants = () if comparison.bench is None else comparison.bench.contestants
    timed = {c.bundle: c for c in contestants}
    eager = 100.0 if comparison.eager_score is None else 100 * comparison.eager_score
    found = []
    for row in comparison.rows:
        if row.p50_ms is None or row.drop is None or row.drop_low is None or row.drop_high is None:
            continue
        rounds = timed[row.bundle].rounds_p50_ms if row.bundle in timed else (row.p50_ms,)
        value = eager - row.drop
        ranges = max(eager - row.drop_high, 0.0), min(eager - row.drop_low, 100.0)
        latency = row.p50_ms, min(*rounds, row.p50_ms), max(*rounds, row.p50_ms)
        found.append(Mark(f"{row.target} {row.precision}", row.size_mib, latency, (value, *ranges)))
    return found


def draw(comparison: Comparison, path: Path, caption: str = "") -> None:
    """Accuracy (or agreement with eager) against p50, each with its range, the size as the area of the mark; bundles
    that were timed only."""
    what = comparison.metric or "agreement with eager"
    title = f"{what} on {comparison.data}, {comparison.images} images, against latency"
    if comparison.bench is not None:
        said = (caption, comparison.bench.machine_line(), comparison.bench.setting_line())
        caption = "; ".join(text for text in said if text)
    save_figure(path, (8, 4.8), lambda figure: fill(figure, comparison), title, caption)


def fill(figure: Any, comparison: Comparison) -> None:
    axis, shown = figure.subplots(), marks(comparison)
    for i, mark in enumerate(shown):
        (x, fast, slow), (y, low, high), colour = mark.p50, mark.value, COLOURS[i % len(COLOURS)]
        axis.errorbar([x], [y], [[y - low], [high - y]], [[x - fast], [slow - x]], color=colour, linewidth=1, capsize=3)
        axis.scatter([x], [y], s=AREA_MIB * mark.size_mib, color=colour, alpha=0.55)
    if comparison.eager_score is not None:
        axis.axhline(100 * comparison.eager_score, color=GREY, linewidth=1, linestyle="--", label="eager")
    for size in _sizes([mark.size_mib for mark in shown]):
        axis.scatter([], [], s=AREA_MIB * size, color=GREY, alpha=0.55, label=f"{size:g} MiB")
    axis.set_xlabel("median latency (ms); bar: fastest and slowest round")
    axis.set_ylabel(f"{comparison.metric or 'agreement with eager'} (%); bar: 95 % interval")
    axis.margins(0.25, 0.2)
    handles, _ = axis.get_legend_handles_labels()
    if handles:
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=1.4, borderpad=1)
    label_points(axis, [(m.p50[0], m.value[0]) for m in shown], [m.text for m in shown])


def _sizes(sizes: Sequence[float]) -> list[float]:
    """Two round sizes of the range, for the legend."""
    return sorted({float(f"{size:.1g}") for size in (min(sizes), max(sizes))}) if sizes else []
