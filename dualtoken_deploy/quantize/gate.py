"""INT8 within an accuracy budget: calibrates, searches, writes the best assignment and measures the written files."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from dualtoken_deploy import numerics
from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet, SearchResult
from dualtoken_deploy.data.built_in import cache_folder
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.quantize.backend import Backend
from dualtoken_deploy.quantize.calibration import Array, CalibrationSet, HeldOut
from dualtoken_deploy.quantize.search import Score, search

METRICS = ("top1", "agreement", "sqnr")
ENOUGH_DB = 30.0  # metric sqnr: points lost are the dB below this
QUICK = 24  # held-out inputs for the noise of one layer

Tell = Callable[[str], None]
RunFolder = Callable[[Path, Array], Any]  # the target's runner over the files in a folder: inputs -> what it gives


@dataclass(frozen=True)
class Int8Options:
    """What was asked for. `metric` None: top1 where the held-out data has labels, else agreement."""

    calibration: str
    size: int = 300
    method: str = "minmax"
    metric: str | None = None
    max_drop: float = 0.5
    quantizer: str | None = None
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS:
            raise UsageError(f"unknown metric {self.metric!r}; valid metrics: {', '.join(METRICS)}")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"a max drop of {self.max_drop} points is outside of 0..100")


class Judge(Protocol):
    """Held-out inputs and what is lost on them, against eager: points of `metric`, and SQNR."""

    @property
    def held_out(self) -> HeldOut: ...

    @property
    def metric(self) -> str: ...

    def score(self, outputs: Any, count: int | None = None) -> Score:
        """Of what the runner gave for the first `count` held-out inputs."""
        ...


@dataclass(frozen=True)
class Reference:
    """A classifier's judge: the eager logits over the held-out inputs, and what is measured against them."""

    held_out: HeldOut
    logits: Array
    metric: str

    def score(self, outputs: Array, count: int | None = None) -> Score:
        """Of logits over the first `count` held-out inputs."""
        expected = self.logits[:count]
        sqnr = numerics.compare(expected, outputs).sqnr_db
        return Score(self._drop(expected, outputs, sqnr, count), sqnr)

    def _drop(self, expected: Array, actual: Array, sqnr: float, count: int | None) -> float:
        if self.metric == "sqnr":
            return max(ENOUGH_DB - sqnr, 0.0)
        best, found = expected.argmax(1), actual.argmax(1)
        if self.metric == "agreement":
            return 100 * float((best != found).mean())
        assert self.held_out.labels is not None  # noqa: S101  # make_reference saw to it
        truth = self.held_out.labels[:count]
        return 100 * (float((best == truth).mean()) - float((found == truth).mean()))


def make_reference(held_out: HeldOut, logits: Array, metric: str | None) -> Reference:
    """Raises UsageError where top1 is asked for on pictures without labels."""
    chosen = metric or ("agreement" if held_out.labels is None else "top1")
    if chosen == "top1" and held_out.labels is None:
        raise UsageError(f"{held_out.name} has no labels, so top1 cannot be measured; take --metric agreement or sqnr")
    return Reference(held_out, logits, chosen)


def quantize_within_budget(
    target: str,
    model: onnx.ModelProto,
    backend: Backend,
    calibration: CalibrationSet,
    reference: Judge,
    options: Int8Options,
    run: RunFolder,
    folder: Path,
    tell: Tell,
) -> Calibration:
    """Writes the target's INT8 files into `folder`; returns what the manifest says of them.

    The loss is measured on the files that stay there, by the target's own runner.
    Raises ToleranceError where no assignment was found that holds the budget, with the best one.
    """
    result = _search(target, model, backend, calibration, reference, options, run, tell)
    if not result.met:
        raise ToleranceError(
            f"no INT8 assignment for {target} was found that loses at most {options.max_drop:g} points of "
            f"{reference.metric}; the best loses {result.drop:.2f} with {100 * result.int8_share:.1f} % of the MACs in "
            "INT8: raise --max-drop, give more calibration images, or another --calibrator"
        )
    backend.write(result.in_float, folder)
    final = reference.score(run(folder, reference.held_out.inputs))
    if final.drop > options.max_drop:
        raise ToleranceError(
            f"the written files lose {final.drop:.2f} points of {reference.metric}, the budget is {options.max_drop:g}"
        )
    return replace(
        calibration.describe(options.method, backend.described),
        held_out=HeldOutSet(reference.held_out.name, len(reference.held_out.inputs)),
        metric=reference.metric,
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
    model: onnx.ModelProto,
    backend: Backend,
    calibration: CalibrationSet,
    reference: Judge,
    options: Int8Options,
    run: RunFolder,
    tell: Tell,
) -> SearchResult:
    inputs = reference.held_out.inputs

    def score(in_float: frozenset[str], quick: bool) -> Score:
        count = min(QUICK, len(inputs)) if quick else len(inputs)
        with tempfile.TemporaryDirectory(prefix="dualtoken-int8.") as name:
            backend.write(in_float, Path(name))
            return reference.score(run(Path(name), inputs[:count]), count)

    products = backend.products
    key = hashlib.sha256(model.SerializeToString(deterministic=True))
    for part in (
        target,
        backend.described,
        sorted(products.eligible),
        calibration.sha256,
        len(calibration.inputs),
        reference.metric,
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
