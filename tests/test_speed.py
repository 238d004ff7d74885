"""The race at the end of an INT8 export: its verdict from known times, what is raced, and what is said and refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy.bench.process import Job, Series
from dualtoken_deploy.bundle.blocks import Speed
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.models.own_sources import variant_source
from dualtoken_deploy.pipeline import speed
from dualtoken_deploy.pipeline.make import _request
from dualtoken_deploy.pipeline.plan import Plan, plan
from dualtoken_deploy.quantize.gate import Int8Options
from tests.commands import prints
from tests.small import SMALL

INT8 = Int8Options("digits", size=16, metric="agreement", max_drop=60.0)  # random weights: any agreement will do


class Clock:
    """Stands in for the bench: `own` and `other` milliseconds a call, round by round, and who was raced."""

    def __init__(self, own: Sequence[float], other: Sequence[float]) -> None:
        self._times = {speed.OWN: own, speed.OTHER: other}
        self.precisions: dict[str, str] = {}
        self.rounds = 0

    def measure(self, jobs: Sequence[Job], rounds: int, seconds: float, enough: Any) -> dict[str, Series]:
        self.precisions = {job.name: Bundle.open(str(job.bundle)).manifest.precision for job in jobs}
        found = {job.name: Series(1.0, 1.0) for job in jobs}
        for i in range(rounds):
            for name, series in found.items():
                times = self._times[name]
                series.rounds_ns.append([int(1e6 * times[i % len(times)])] * 3)
            self.rounds = i + 1
            if enough(found):
                break
        return found


@pytest.fixture
def raced(
    small_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Speed | None, Bundle, Clock]]:
    """raced(own, other, **options): the race over a copy of an INT8 bundle, the bench with those times."""

    def race(own: Sequence[float], other: Sequence[float], **options: Any) -> tuple[Speed | None, Bundle, Clock]:
        made = small_bundle("onnxruntime", "int8", int8=dataclasses.replace(INT8, race=False))
        folder = tmp_path / "copy"
        shutil.copytree(made, folder)
        clock, planned = Clock(own, other), planned_for(folder, dataclasses.replace(INT8, **options))
        monkeypatch.setattr(speed, "measure", clock.measure)
        said = speed.race(planned, planned.source.make(), _request(planned), folder, lambda _: None)
        return said, Bundle.open(folder), clock

    return race


def planned_for(folder: Path, int8: Int8Options) -> Plan:
    source = variant_source(SMALL["variant"], None, SMALL["image_size"], (), 0, num_classes=SMALL["num_classes"])  # type: ignore[arg-type]
    return plan(source, "onnxruntime", "int8", folder, int8=int8)


def test_the_float_files_of_the_same_target_are_the_rival_and_the_manifest_says_who_won(
    raced: Callable[..., tuple[Speed | None, Bundle, Clock]],
) -> None:
    said, bundle, clock = raced([2.0], [3.0])
    assert said is not None
    assert clock.precisions == {speed.OTHER: "fp32", speed.OWN: "int8"}
    assert (said.ratio, said.low, said.high, said.verdict) == (1.5, 1.5, 1.5, "faster")
    assert (said.p50_ms, said.against_p50_ms, said.rounds) == (2.0, 3.0, speed.FEWEST)
    assert bundle.manifest.measured.speed == said
    assert json.loads((bundle.path / "manifest.json").read_text())["measured"]["speed"]["verdict"] == "faster"
    bundle.verify()


@pytest.mark.parametrize(
    ("own", "other", "verdict", "rounds"),
    [
        ([3.0], [2.0], "slower", 5),
        ([2.0, 2.04], [2.02], "cannot tell", 5),
        ([1.0, 3.0, 2.0], [2.0], "cannot tell", 15),  # never narrow: all rounds there are
    ],
)
def test_verdicts(
    own: Sequence[float], other: Sequence[float], verdict: str, rounds: int,
    raced: Callable[..., tuple[Speed | None, Bundle, Clock]],
) -> None:  # fmt: skip
    said, _, clock = raced(own, other)
    assert said is not None
    assert (said.verdict, clock.rounds) == (verdict, rounds)
    warned = speed.slow_warnings(planned_for(Path("x"), INT8), said)
    assert bool(warned) == (verdict == "slower")
    assert not warned or "takes 1.50 times as long as fp32 here (3 and 2 ms" in warned[0]


def test_more_than_the_slowdown_asked_for_is_refused(raced: Callable[..., tuple[Speed | None, Bundle, Clock]]) -> None:
    with pytest.raises(ToleranceError, match=r"takes 1\.50 times as long as fp32 here .* --max-slowdown allows 1\.4"):
        raced([3.0], [2.0], max_slowdown=1.4)


@pytest.mark.parametrize(("own", "allowed"), [([3.0], 1.6), ([1.9, 2.0, 2.2], 1.0)], ids=["less", "perhaps less"])
def test_what_is_not_surely_beyond_it_is_taken(
    own: Sequence[float], allowed: float, raced: Callable[..., tuple[Speed | None, Bundle, Clock]]
) -> None:
    said, bundle, _ = raced(own, [2.0], max_slowdown=allowed)
    assert said is not None
    assert said.max_slowdown == allowed
    assert bundle.manifest.measured.speed == said


def test_no_race_no_verdict(raced: Callable[..., tuple[Speed | None, Bundle, Clock]]) -> None:
    said, bundle, clock = raced([3.0], [2.0], race=False)
    assert (said, bundle.manifest.measured.speed, clock.precisions) == (None, None, {})


@pytest.mark.parametrize("wrong", [{"max_slowdown": 0.0}, {"max_slowdown": float("nan")},
                                   {"max_slowdown": 1.2, "race": False}])  # fmt: skip
def test_slowdowns_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a max slowdown"):
        dataclasses.replace(INT8, **wrong)


def test_an_export_races_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real bench: the document fits its schema, whoever wins, after as few rounds as on a quiet machine."""
    monkeypatch.setattr(speed, "WIDTH", math.inf)
    folder = tmp_path / "made"
    document = prints(
        capsys, "export", "--variant", str(SMALL["variant"]), "--image-size", "64", "--classes", "10", "--target",
        "onnxruntime", "--precision", "int8", "--calibration", "digits", "--calibration-size", "10", "--metric",
        "agreement", "--max-drop", "90", "--max-slowdown", "100", "--output", folder, "--json",
    )  # fmt: skip
    found = document["speed"]
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["rounds"] >= speed.FEWEST
    assert found["max_slowdown"] == 100
    said = Bundle.open(folder).manifest
    assert said.measured.speed is not None
    assert said.measured.speed.ratio == found["ratio"]
    assert said.calibration is not None
    assert any(name.endswith("/attention") for name in said.calibration.in_float_for_speed)
    assert any("takes" in w and "times as long as fp32" in w for w in document["warnings"]) == (
        found["verdict"] == "slower"
    )
