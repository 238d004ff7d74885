"""A quantized bundle beside the same model in float on the same runtime: a short race at the end of its export.

INT8 is wanted for speed, and whether it has it depends on the CPU: a file that is slower than float is not shipped
without being said.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from dualtoken_deploy.bench.process import Job, Series, measure
from dualtoken_deploy.bench.report import latency, median_interval, ratios_of
from dualtoken_deploy.bundle.blocks import Speed
from dualtoken_deploy.bundle.store import Bundle, write_bundle
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.machine import available_cores
from dualtoken_deploy.pipeline.check import draft_manifest
from dualtoken_deploy.pipeline.plan import Plan
from dualtoken_deploy.targets.load import why_no_latency
from dualtoken_deploy.targets.precision import SEARCH
from dualtoken_deploy.targets.request import Request, run_exporter

Tell = Callable[[str], None]
FLOAT = "fp32"  # what a quantized bundle is raced against
OWN, OTHER = "quantized", "float"
FEWEST, MOST, SECONDS = 5, 15, 0.2  # rounds, and how long each of the two runs in one
WIDTH = 0.1  # of the ratio: so narrow an interval is enough


def race(plan: Plan, module: nn.Module, request: Request, folder: Path, tell: Tell) -> Speed | None:
    """Races the finished bundle in `folder` and writes what came out into its manifest; None where no device is here
    that it is for, or where nothing was asked for.

    Raises ToleranceError where it is surely slower than `max_slowdown` allows.
    """
    options = plan.int8
    if options is None or not options.race or plan.precision.calibration != SEARCH:
        return None
    bundle = Bundle.open(folder)
    if plan.target.built_by or FLOAT not in plan.target.precisions or why_no_latency(bundle) is not None:
        return None
    with tempfile.TemporaryDirectory(prefix="dualtoken-race.") as name:
        other = Path(name)
        tell("exporting the float files that INT8 is raced against")
        write_float(plan, module, request, other, bundle, tell)
        tell("racing INT8 against float")
        said = replace(timed(folder, other, bundle.manifest.input.batch or 1), max_slowdown=options.max_slowdown)
    manifest = replace(bundle.manifest, measured=replace(bundle.manifest.measured, speed=said), files={})
    write_bundle(folder, manifest, bundle.golden, bundle.labels)
    check_slowdown(said, plan)
    return said


def write_float(plan: Plan, module: nn.Module, request: Request, folder: Path, quantized: Bundle, tell: Tell) -> None:
    """A bundle of the float files, fit to be timed and no more: its golden outputs are the other one's."""
    own = replace(plan, precision=plan.target.precision(FLOAT), int8=None)
    asked = replace(request, precision=FLOAT, metadata={**request.metadata, "precision": FLOAT})
    artifact = run_exporter(plan.target, module, asked, folder, tell)
    write_bundle(folder, draft_manifest(own, module, asked, artifact), quantized.golden, quantized.labels)


def timed(own: Path, other: Path, batch: int, threads: int | None = None) -> Speed:
    """Both in a process of its own, in interleaved rounds until the interval of the ratio is narrow."""
    count = threads or available_cores()
    places = {OTHER: other, OWN: own}
    jobs = [Job(name, "bundle", str(path.resolve()), (), batch, count, None) for name, path in places.items()]
    found = measure(jobs, MOST, SECONDS, enough=_enough)
    ratios = _ratios(found)
    bounds = median_interval(ratios)
    assert bounds is not None  # noqa: S101  # FEWEST rounds are enough for one
    low, high = bounds
    p50 = {name: latency([lap for laps in found[name].rounds_ns for lap in laps]).p50_ms for name in (OWN, OTHER)}
    return Speed(
        against=FLOAT,
        ratio=round(statistics.median(ratios), 3),
        low=round(low, 3),
        high=round(high, 3),
        verdict="faster" if low > 1 else "slower" if high < 1 else "cannot tell",
        p50_ms=round(p50[OWN], 3),
        against_p50_ms=round(p50[OTHER], 3),
        threads=count,
        batch=batch,
        rounds=len(ratios),
    )


def _ratios(found: Mapping[str, Series]) -> list[float]:
    return ratios_of(*([latency(laps).p50_ms for laps in found[name].rounds_ns] for name in (OTHER, OWN)))


def _enough(found: Mapping[str, Series]) -> bool:
    ratios = _ratios(found)
    bounds = median_interval(ratios)
    return len(ratios) >= FEWEST and bounds is not None and bounds[1] - bounds[0] <= WIDTH * statistics.median(ratios)


def check_slowdown(said: Speed, plan: Plan) -> None:
    """Raises ToleranceError where all of the interval is beyond what was allowed."""
    allowed = said.max_slowdown
    if allowed is not None and 1 / said.high > allowed:
        raise ToleranceError(
            f"{plan.what} as {plan.target.name} {plan.precision.name} takes {1 / said.ratio:.2f} times as long as "
            f"{said.against} here ({said.p50_ms:g} and {said.against_p50_ms:g} ms, {said.threads} threads), and "
            f"--max-slowdown allows {allowed:g}: raise it, take --precision {said.against}, or another target; no "
            "bundle was written"
        )


def slow_warnings(plan: Plan, said: Speed | None) -> tuple[str, ...]:
    """What is warned of where float is the better choice on such a machine."""
    if said is None or said.verdict != "slower":
        return ()
    return (
        f"{plan.target.name} {plan.precision.name} takes {1 / said.ratio:.2f} times as long as {said.against} here "
        f"({said.p50_ms:g} and {said.against_p50_ms:g} ms, {said.threads} threads); on a CPU like this one it is "
        "smaller, not faster",
    )
