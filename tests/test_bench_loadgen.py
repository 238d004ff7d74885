"""MLPerf's scenarios: what is shown is what LoadGen's own logs say, and a short run is called one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy.bench import loadgen
from dualtoken_deploy.bench.loadgen import DETAIL, SUMMARY, read_summary, run_scenario
from dualtoken_deploy.bench.scenario import SCENARIOS, play
from dualtoken_deploy.errors import MissingError
from tests.commands import fails, prints
from tests.test_bench import make_bundle

pytest.importorskip("mlperf_loadgen", reason="needs the extra [loadgen]")


def logged(folder: Path) -> dict[str, Any]:
    """{key: value} of LoadGen's detail log, read without the code under test."""
    lines = (folder / DETAIL).read_text().splitlines()
    rows = [json.loads(line[len(":::MLLOG ") :]) for line in lines if line.startswith(":::MLLOG ")]
    assert len(rows) > 50
    return {row["key"]: row["value"] for row in rows}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_figures_are_those_of_loadgens_logs(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "chain", layers=1)
    document = prints(
        capsys, "bench", bundle, "--scenario", scenario, "--duration", "0.5", "--threads", "1", "--logs",
        tmp_path / "logs", "--json",
    )  # fmt: skip
    (run,) = document["runs"]
    folder = tmp_path / "logs" / f"chain-{scenario}"
    said = logged(folder)
    assert said["effective_scenario"] == SCENARIOS[scenario]
    assert said["requested_min_duration_ms"] == 500
    assert run["verdict"] == said["result_validity"]
    assert run["queries"] == said["result_query_count"]
    assert run["samples"] == said["result_query_count"] * said["effective_samples_per_query"]
    key, unit = {
        "singlestream": ("result_90.00_percentile_latency_ns", 1e6),
        "multistream": ("result_99.00_percentile_per_query_latency_ns", 1e6),
        "offline": ("result_samples_per_second", 1.0),
        "server": ("result_completed_samples_per_sec", 1.0),
    }[scenario]
    assert run["value"] == pytest.approx(said[key] / unit, rel=1e-2)  # the summary is rounded to two decimals
    assert run["shortened"] is True


def test_a_short_run_is_no_result_and_a_long_one_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "chain", layers=1)
    arguments: dict[str, Any] = {"logs": tmp_path / "logs", "duration_s": 0.3, "threads": 1}
    (short,) = run_scenario([bundle], "singlestream", **arguments).runs
    assert short.said.startswith("INVALID for MLPerf: shortened; LoadGen itself: VALID")
    monkeypatch.setattr(loadgen, "LEAST_S", 0.2)
    (long,) = run_scenario([bundle], "singlestream", **arguments).runs
    assert long.said == long.verdict == read_summary(Path(long.logs) / SUMMARY)["Result is"]


def test_a_target_that_cannot_be_held_is_said(tmp_path: Path) -> None:
    """No call answers within a hundredth of a microsecond."""
    bundle = make_bundle(tmp_path / "chain", layers=1)
    (run,) = run_scenario(
        [bundle], "server", tmp_path / "logs", 0.3, threads=1, target_qps=400.0, target_latency_ms=1e-5
    ).runs
    assert run.verdict == "INVALID"
    assert any("Performance constraints" in reason for reason in run.reasons)
    assert run.target_qps == 400.0


def test_a_call_that_fails_ends_the_run_with_its_error(tmp_path: Path) -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("gone")

    asked = {"duration_s": 0.2, "folder": str(tmp_path), "target_qps": 500.0, "target_latency_ms": 15.0}
    for scenario in ("singlestream", "server"):
        calls.clear()
        with pytest.raises(RuntimeError, match="gone"):
            play(run, None, 1, asked | {"scenario": scenario})
        assert len(calls) == 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenario", "burst"], "valid scenarios: singlestream, multistream, offline, server"),
        (["--scenario", "offline", "--duration", "0"], "more than 0 s"),
        (["--scenario", "offline", "--target-qps", "5"], "leave --target-qps to server"),
        (["--scenario", "server", "--target-qps", "-1"], "more than 0 queries"),
        (["--scenario", "server", "--target-latency", "0"], "more than 0 ms"),
        (["--scenario", "server", "--batch", "4"], "one sample at a time"),
        (["--scenario", "offline", "--mode", "server"], "leave --mode out"),
        (["--scenario", "offline", "--against", "eager", "--until", "0.1"], "leave --against, --until out"),
        (["--duration", "1"], "without --scenario"),
    ],
)
def test_bad_requests_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, "bench", make_bundle(tmp_path / "chain", layers=1), *options)
    assert code == 2
    assert message in line


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"scenario offline needs the extra \[loadgen\]; run: .*pip install"):
        run_scenario([make_bundle(tmp_path / "chain")], "offline")
