"""INT8 within an accuracy budget: calibrates, searches, writes the best assignment and measures the written files."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
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
from dualtoken_deploy.quantize.search import Score, assigned, search
from dualtoken_deploy.quantize.sequential import Overdrawn
from dualtoken_deploy.tasks.base import Outputs

METHODS = ("minmax", "entropy", "percentile")  # how ranges are taken from what was seen
ORDER = 0  # seed of the order in which held-out pictures are drawn

Tell = Callable[[str], None]
# the target's runner over the files in a folder: inputs (N, ...) -> the outputs of each, one after the other
RunFolder = Callable[[Path, Array], Iterator[Outputs]]


@dataclass(frozen=True)
class Int8Options:
    """What was asked for. `metric` None: that of the task where the held-out pictures have their truth, else agreement,
    or sqnr where outputs have none. `in_float`: the layers that stay in float, where they are known; None: they are
    searched for. `race`: the bundle is timed beside float files of its target; `max_slowdown`: how
    many times their latency it may have, None: any, and it is said."""

    calibration: str
    size: int = 300
    method: str = "minmax"
    metric: str | None = None
    max_drop: float = 0.5
    quantizer: str | None = None
    time_limit_s: float | None = None
    in_float: tuple[str, ...] | None = None
    race: bool = True
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown calibrator {self.method!r}; valid calibrators: {', '.join(METHODS)}")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"a max drop of {self.max_drop} points is outside of 0..100")
        if self.max_slowdown is not None and not 0 < self.max_slowdown < math.inf:
            raise UsageError(f"a max slowdown of {self.max_slowdown} is no factor; 1 allows no slower than float")
        if self.max_slowdown is not None and not self.race:
            raise UsageError("a max slowdown needs the race; leave --no-race out")


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
    with tempfile.TemporaryDirectory(prefix="dualtoken-int8.") as name:
        said = _Last(tell)
        scorer = Scorer(backend, judge, options.max_drop, run, Path(name), said.more)
        result = _search(target, backend, calibration, judge, options, scorer, said)
        if not result.met:
            ended, more = "", ""
            if result.timed_out:
                ended = f" within the {options.time_limit_s:g} s of --search-seconds, which ended the search"
                more = "give it more time, "
            raise ToleranceError(
                f"no INT8 assignment for {target} was found that loses at most {options.max_drop:g} points of "
                f"{judge.metric}{ended}; the best loses {result.drop:.2f} with "
                f"{100 * result.int8_share:.1f} % of the MACs in INT8: {more}raise --max-drop, "
                "give more calibration images, or another --calibrator"
            )
        if result.int8_share == 0.0:  # it would be a float file by another name
            raise ToleranceError(
                f"{target} loses at most {options.max_drop:g} points of {judge.metric} with every layer in float "
                "alone: raise --max-drop, give more calibration images, or take a float --precision"
            )
        final = scorer.deliver(frozenset(result.in_float), folder)
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
        in_float_for_speed=backend.products.slow_layers,
        macs=backend.products.macs,
        search=result,
    )


@dataclass
class _Last:
    """Tells, and remembers it for what is told of it while it is done."""

    tell: Tell
    text: str = ""

    def __call__(self, text: str) -> None:
        self.text = text
        self.tell(text)

    def more(self, text: str) -> None:
        self.tell(f"{self.text}; {text}")


class Scorer:
    """Writes the files of an assignment and runs them over the held-out pictures, in a random order that is always the
    same; it stops once the budget is broken (sequential.py), and keeps the files of what was run to the end."""

    def __init__(
        self, backend: Backend, judge: Judge, max_drop: float, run: RunFolder, scratch: Path, tell: Tell
    ) -> None:
        self._tell = tell
        self._backend, self._judge, self._run, self._scratch = backend, judge, run, scratch
        self._budget = max_drop / 100
        self._order = np.random.default_rng(ORDER).permutation(len(judge.held_out.inputs)).tolist()
        self._kept: tuple[frozenset[str], Path, Score] | None = None

    def __call__(self, in_float: frozenset[str]) -> Score:
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        self._backend.write(in_float, folder)
        score = self._measured(folder)
        if score.images is None and 100 * self._budget >= score.drop:
            folder, dropped = (folder, self._kept and self._kept[1])
            self._kept = (in_float, folder, score)
            folder = dropped or Path(tempfile.mkdtemp(dir=self._scratch))
        shutil.rmtree(folder)
        return score

    def deliver(self, in_float: frozenset[str], folder: Path) -> Score:
        """Puts the files of an assignment into `folder`: those that were scored, else new ones that are scored now."""
        if self._kept is not None and self._kept[0] == in_float:
            for path in self._kept[1].iterdir():
                shutil.move(path, folder / path.name)
            return self._kept[2]
        self._backend.write(in_float, folder)
        return self._judge.score(list(self._run(folder, self._judge.held_out.inputs)))

    def _measured(self, folder: Path) -> Score:
        judge, order = self._judge, self._order
        test = Overdrawn(len(order), self._budget)
        seen: list[Outputs] = []
        with closing(self._outputs(folder)) as outputs:
            for picture, found in zip(order, outputs, strict=True):
                seen.append(found)
                self._tell(f"held-out pictures: {len(seen)}/{len(order)}")
                if judge.by_picture and test.add(judge.loss(picture, found)) and len(seen) < len(order):
                    partly = judge.score(seen, order[: len(seen)])
                    return Score(max(partly.drop, 100 * self._budget + 0.01), partly.sqnr_db, len(seen))
        return judge.score(seen, order)

    def _outputs(self, folder: Path) -> Generator[Outputs]:
        yield from self._run(folder, self._judge.held_out.inputs[self._order])


def _search(
    target: str,
    backend: Backend,
    calibration: CalibrationSet,
    judge: Judge,
    options: Int8Options,
    scorer: Scorer,
    tell: Tell,
) -> SearchResult:
    products = backend.products
    if options.in_float is not None:
        return assigned(products.units, scorer, options.max_drop, products.total, options.in_float, tell)
    alike = (calibration.sha256, judge.metric, *sorted(products.eligible))
    key = hashlib.sha256()
    for part in (
        target,
        backend.source,
        backend.described,
        sorted(products.eligible),
        calibration.sha256,
        len(calibration.inputs),
        judge.metric,
        np.sum(judge.held_out.inputs),
    ):
        key.update(f"{part}\0".encode())
    found = search(
        products.units,
        scorer,
        options.max_drop,
        products.total,
        backend.sensitivity,
        tell,
        options.time_limit_s,
        cache_folder() / "search" / f"{key.hexdigest()[:24]}.json",
        _FOUND.get(alike),
    )
    _FOUND.clear()
    if found.met and found.in_float:
        _FOUND[alike] = frozenset(found.in_float)
    return found


# What the last search of this process ended in: another target whose quantizer takes the same products begins there.
_FOUND: dict[tuple[str, ...], frozenset[str]] = {}
