"""INT8 within an accuracy budget: calibrates, searches, writes the best assignment and measures the written files."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet, SearchResult
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.files import cache_folder
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import Backend
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.judge import Judge
from dualtoken_deploy.quantize.search import Score, search
from dualtoken_deploy.tasks.base import Outputs

METHODS = ("minmax", "entropy", "percentile")  # how ranges are taken from what was seen
QUICK = 24  # held-out inputs for the noise of one layer

Tell = Callable[[str], None]
# the target's runner over the files in a folder: inputs (N, ...) -> the outputs of each
RunFolder = Callable[[Path, Array], Sequence[Outputs]]


@dataclass(frozen=True)
class Int8Options:
    """What was asked for. `metric` None: that of the task where the held-out pictures have their truth, else agreement,
    or sqnr where outputs have none."""

    calibration: str
    size: int = 300
    method: str = "minmax"
    metric: str | None = None
    max_drop: float = 0.5
    quantizer: str | None = None
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown calibrator {self.method!r}; valid calibrators: {', '.join(METHODS)}")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"a max drop of {self.max_drop} points is outside of 0..100")


def quantize_within_budget(
    target: str,
    backend: Backend,
    calibration: CalibrationSet,
    judge: Judge,
    options: Int8Options,
    run: RunFolder,
    folder: Path,
    tell: Tell,
) -> Calibration:
    """Writes the target's INT8 files into `folder`; returns what the manifest says of them.

    The loss is measured on the files that stay there, by the target's own runner.
    Raises ToleranceError where no assignment was found that holds the budget, with the best one.
    """
    result = _search(target, backend, calibration, judge, options, run, tell)
    if not result.met:
        raise ToleranceError(
            f"no INT8 assignment for {target} was found that loses at most {options.max_drop:g} points of "
            f"{judge.metric}; the best loses {result.drop:.2f} with {100 * result.int8_share:.1f} % of the MACs in "
            "INT8: raise --max-drop, give more calibration images, or another --calibrator"
        )
    backend.write(result.in_float, folder)
    final = judge.score(run(folder, judge.held_out.inputs))
    if final.drop > options.max_drop:
        raise ToleranceError(
            f"the written files lose {final.drop:.2f} points of {judge.metric}, the budget is {options.max_drop:g}"
        )
    return replace(
        calibration.describe(options.method, backend.described),
        held_out=HeldOutSet(judge.held_out.name, len(judge.held_out.inputs)),
        metric=judge.metric,
        max_drop=options.max_drop,
        drop=final.drop,
        sqnr_db=final.sqnr_db,
        planned_int8_mac_share=result.int8_share,
        in_float=result.in_float,
        macs=backend.products.macs,
        search=result,
    )


def _search(
    target: str,
    backend: Backend,
    calibration: CalibrationSet,
    judge: Judge,
    options: Int8Options,
    run: RunFolder,
    tell: Tell,
) -> SearchResult:
    inputs = judge.held_out.inputs

    def score(in_float: frozenset[str], quick: bool) -> Score:
        count = min(QUICK, len(inputs)) if quick else len(inputs)
        with tempfile.TemporaryDirectory(prefix="dualtoken-int8.") as name:
            backend.write(in_float, Path(name))
            return judge.score(run(Path(name), inputs[:count]), count)

    products = backend.products
    key = hashlib.sha256()
    for part in (
        target,
        backend.source,
        backend.described,
        sorted(products.eligible),
        calibration.sha256,
        len(calibration.inputs),
        judge.metric,
        np.sum(inputs),
    ):
        key.update(f"{part}\0".encode())
    return search(
        products.units,
        score,
        options.max_drop,
        products.total,
        backend.noise(inputs[:4]),
        tell,
        options.time_limit_s,
        cache_folder() / "search" / f"{key.hexdigest()[:24]}.json",
    )
