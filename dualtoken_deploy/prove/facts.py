"""What the documents of a bundle say, of its manifest alone: each figure once, for both of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualtoken_deploy.bundle.blocks import RANDOM, Calibration, Evaluated, Figures
from dualtoken_deploy.bundle.manifest import COMPILED, PREPARED, REFERENCES, Manifest
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.intervals import wilson

SHARES = ("top1", "top5")  # scores that are counted over pictures, and so have Wilson's interval


@dataclass(frozen=True)
class Metric:
    """`slice`: on what it was measured. `value` in the metric's own unit, shares as fractions of 1; `low` and `high`:
    its interval; of what is counted over pictures Wilson's with 95 %."""

    name: str
    value: float
    slice: str
    data: str
    low: float | None = None
    high: float | None = None


def model_name(manifest: Manifest) -> str:
    """The network, in a head's case with what it stands on."""
    return manifest.variant if manifest.head is None else f"{manifest.head} on {manifest.variant}"


def title(manifest: Manifest) -> str:
    return f"{model_name(manifest)} for {get_target(manifest.target).title}, {manifest.precision}"


def metrics(manifest: Manifest) -> Iterator[Metric]:
    """Every figure that the manifest has: likeness to the reference at export, what INT8 loses, accuracies."""
    against = REFERENCES[manifest.reference]
    measured = manifest.measured
    for data, found in (("golden input", measured.golden), ("photographs", measured.photographs)):
        if found is not None:
            yield from _likeness(manifest, found, data, against)
    if isinstance(measured.engine, Figures):
        yield from _likeness(manifest, measured.engine, "golden input, built engine", against)
    if manifest.calibration is not None:
        yield from _lost(manifest.calibration)
        if measured.int8_mac_share:
            yield Metric("int8_mac_share", measured.int8_mac_share, "multiply-adds that run in INT8", "the model")
    if (speed := measured.speed) is not None:
        where = (
            f"beside {speed.against} on the machine that made it, {speed.rounds} rounds, 90 % interval: {speed.verdict}"
        )
        yield Metric("speed_ratio", speed.ratio, where, "latency", speed.low, speed.high)
    for one in manifest.evaluated:
        yield from _scores(one)


def _likeness(manifest: Manifest, found: Figures, data: str, against: str) -> Iterator[Metric]:
    count = "" if found.images is None else f"{found.images} "
    where = f"{count}{data}, against {against}"
    yield Metric("sqnr_db", found.sqnr_db, where, data)
    yield Metric("max_abs_error", found.max_abs_error, where, data)
    alike = found.top1_agreement if found.agreement is None else found.agreement
    if alike is not None:
        yield Metric(get_task(manifest.task).agreement, alike, where, data)


def _lost(calibration: Calibration) -> Iterator[Metric]:
    held = calibration.held_out
    if calibration.drop is not None and held is not None:
        where = f"points of {calibration.metric} lost on {held.images} of {held.name} that calibration did not see"
        yield Metric("drop", calibration.drop, where, held.name)


def _scores(one: Evaluated) -> Iterator[Metric]:
    for name, value in one.scores.items():
        interval = wilson(value * one.images, one.images) if name in SHARES and one.images else None
        low, high = (None, None) if interval is None else (interval.low, interval.high)
        yield Metric(name, value, f"{one.images} of {one.data}", one.data, low, high)


def limits(manifest: Manifest) -> Iterator[str]:
    """What a reader must not take it for."""
    if manifest.weights.source == RANDOM:
        yield f"The weights are random (seed {manifest.weights.seed}): its answers mean nothing."
    if manifest.state == COMPILED:
        yield "Compiled, not executed: the vendor's compiler made what ships, and no device has run it."
    if manifest.state == PREPARED:
        yield "Prepared, not built: a step on the device is still to come."
    measured = manifest.measured
    if isinstance(measured.engine, str):
        yield f"Checked by {measured.engine}, which stands in for the target's own runtime."
    if measured.near_ties is not None and measured.near_ties.images:
        ties = measured.near_ties
        yield f"{ties.images} photographs within {ties.margin:g} of a point where the model jumps were not compared."
    if measured.level is not None and measured.level.images:
        yield (
            f"Of {measured.level.images} photographs no equal answer was asked: their two best lie nearer than the "
            "precision's numbers can tell."
        )
    if not manifest.evaluated:
        yield "Its accuracy was not measured: nearness to the model that it was made from is not accuracy."
    for one in manifest.evaluated:
        if one.engine is not None:
            yield f"Its accuracy on {one.data} is that of {one.engine}, which stands in for the target's own runtime."


def shape(sizes: tuple[int | str, ...]) -> str:
    return "x".join(map(str, sizes))
