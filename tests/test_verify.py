"""Baselines: each row that gets worse is named, by a planted fault; what is no baseline of the bundle is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

from dualtoken_deploy import Bundle, export
from dualtoken_deploy.bundle.store import write_bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import InputError
from dualtoken_deploy.prove.measure import Latency, Report, Setting, measure
from dualtoken_deploy.prove.tolerances import DEFAULTS, Tolerances
from dualtoken_deploy.prove.verify import compare

FAST = Setting(rounds=0)  # the golden input
MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def report(small_bundle: MakeBundle) -> Report:
    """Without a latency: what that says is judged below by numbers."""
    return measure(Bundle.open(small_bundle()), FAST)


@pytest.fixture
def baseline(report: Report, tmp_path: Path) -> Path:
    report.write(tmp_path / "baseline.json")
    return tmp_path / "baseline.json"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, list[str]]:
    """Exit code, the JSON if there is one, and the lines of stderr."""
    code = 0
    try:
        main(["verify", *map(str, arguments), "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err.splitlines()


def test_a_bundle_holds_against_itself(
    small_bundle: MakeBundle, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = run(capsys, small_bundle(), "--baseline", baseline)
    assert (code, found["held"]) == (0, True)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"size_mib", "sqnr_db", "matrix products run in", "Conv runs in"} <= rows.keys()
    assert {row["verdict"] for row in found["rows"]} == {"held"}
    assert rows["sqnr_db"]["baseline"] == rows["sqnr_db"]["now"]


def test_the_figures_are_those_of_validate_and_inspect(small_bundle: MakeBundle, report: Report) -> None:
    from dualtoken_deploy import validate
    from dualtoken_deploy.use.inspect import inspect_bundle

    bundle = Bundle.open(small_bundle())
    (checked,) = validate([bundle], reference="golden")
    assert report.figures["sqnr_db"] == checked.sqnr_db
    assert report.figures["size_mib"] == (bundle.path / "model.onnx").stat().st_size / 2**20
    assert dict(report.executed) == dict(inspect_bundle(bundle).executed_precision)
    assert report.images == checked.images == 1


def test_a_bundle_whose_weights_moved_falls_in_sqnr_and_in_nothing_else(
    own_bundle: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, model = Bundle.open(own_bundle), onnx.load(own_bundle / "model.onnx")
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(1.001), largest.name))
    onnx.save(model, own_bundle / "model.onnx")
    write_bundle(own_bundle, bundle.manifest, bundle.golden, bundle.labels)
    code, found, errors = run(capsys, own_bundle, "--baseline", baseline)
    assert code == 5
    assert [row["name"] for row in found["rows"] if row["verdict"] == "fell"] == ["sqnr_db"]
    (line,) = [text for text in errors if text.startswith("error: ")]
    assert f"{own_bundle} fell behind {baseline}: sqnr_db " in line
    assert "(allowed 1 less)" in line


def test_a_baseline_of_another_model_precision_or_setting_is_refused(
    small_bundle: MakeBundle, baseline: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = baseline.read_bytes()
    net = nn.Sequential(nn.Conv2d(3, 10, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export(net, "onnxruntime", task="classify", image_size=64, output=tmp_path / "net")
    code, _, errors = run(capsys, tmp_path / "net", "--baseline", baseline)
    assert (code, len(errors)) == (4, 1)
    assert "is the baseline of another bundle: its model is tiny-mix, here it is sequential;" in errors[0]
    assert baseline.read_bytes() == kept
    code, _, errors = run(capsys, small_bundle("onnxruntime", "fp16"), "--baseline", baseline)
    assert (code, len(errors)) == (4, 1)
    assert "its precision is fp32, here it is fp16" in errors[0]
    code, _, errors = run(capsys, small_bundle(), "--baseline", baseline, "--limit", 5)
    assert code == 4
    assert "measured with limit None, not 5" in errors[0]


def test_update_writes_what_the_next_run_reads(
    small_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a real latency: the ratio to the products, which ran beside it."""
    path = tmp_path / "new" / "baseline.json"
    code, _, errors = run(capsys, small_bundle(), "--baseline", path)
    assert code == 4
    assert f"make it with: dualtoken verify {small_bundle()} --baseline {path} --update" in errors[0]
    options = ("--rounds", 2, "--seconds", 0.02, "--threads", 1)
    code, written, errors = run(capsys, small_bundle(), "--baseline", path, "--update", *options)
    assert (code, errors[-1]) == (0, f"wrote {path}")
    assert json.loads(path.read_text()) == written
    found = Report.read(path)
    assert found.latency is not None
    assert found.latency.low <= found.latency.ratio <= found.latency.high
    assert (found.setting.rounds, found.setting.threads) == (2, 1)
    assert found.command.startswith("dualtoken")  # what this process was called with


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ('{"schema_version": 99}', "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_what_is_no_report_is_one_line(
    text: str, words: str, small_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.json").write_text(text)
    code, _, errors = run(capsys, small_bundle(), "--baseline", tmp_path / "b.json")
    assert (code, len(errors)) == (4, 1)
    assert words in errors[0]
    assert "--update" in errors[0]


def test_a_report_of_a_newer_program_is_refused(report: Report, tmp_path: Path) -> None:
    replace(report, schema_version=2).write(tmp_path / "b.json")
    with pytest.raises(InputError, match="schema version 2, this program reads up to 1"):
        Report.read(tmp_path / "b.json")


# --- verdicts, by numbers ---


def verdicts(before: Report, now: Report, tolerances: Tolerances | None = None) -> dict[str, str]:
    return {row.name: row.verdict for row in compare("b", "r", before, now, tolerances or Tolerances()).rows}


def with_figures(report: Report, **figures: float) -> Report:
    return replace(report, figures={**report.figures, **figures})


@pytest.mark.parametrize(
    ("row", "before", "now", "verdict"),
    [
        ("sqnr_db", 60.0, 59.1, "held"),
        ("sqnr_db", 60.0, 58.9, "fell"),
        ("sqnr_db", 60.0, 70.0, "held"),
        ("agreement", 1.0, 0.999, "fell"),
        ("top1", 0.98, 0.976, "held"),
        ("top1", 0.98, 0.974, "fell"),
        ("int8_mac_share", 0.98, 0.97, "fell"),
        ("size_mib", 100.0, 101.9, "held"),
        ("size_mib", 100.0, 102.1, "fell"),
        ("size_mib", 100.0, 50.0, "held"),
    ],
)
def test_a_row_falls_beyond_what_it_is_allowed(
    row: str, before: float, now: float, verdict: str, report: Report
) -> None:
    found = verdicts(with_figures(report, **{row: before}), with_figures(report, **{row: now}))
    assert found[row] == verdict


def test_rows_that_come_and_go(report: Report) -> None:
    before, now = with_figures(report, top1=0.9), with_figures(report, ap=0.5)
    found = verdicts(before, now)
    assert (found["top1"], found["ap"]) == ("fell", "new")


def test_products_in_a_wider_type_fall_whatever_the_runtime_calls_them(report: Report) -> None:
    before = replace(report, executed={"MatMul": "float16", "Softmax": "float32"})
    now = replace(report, executed={"FusedMatMul": "float32", "Softmax": "float32"})
    found = verdicts(before, now)
    assert found["matrix products run in"] == "fell"
    assert (found["MatMul runs in"], found["FusedMatMul runs in"]) == ("left out", "new")


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [(1.9, 2.0, 2.1, "held"), (1.6, 1.75, 1.9, "held"), (1.5, 1.65, 1.8, "cannot tell"), (1.4, 1.5, 1.65, "fell")],
)
def test_latency_falls_where_even_the_best_round_is_too_slow(
    low: float, median: float, high: float, verdict: str, report: Report
) -> None:
    """2.0 times the yardstick, 15 % allowed: 1.7."""
    before = replace(report, latency=Latency("gemm", 2.0, 1.9, 2.1, 5.0))
    now = replace(report, latency=Latency("gemm", median, low, high, 5.0))
    assert verdicts(before, now)["latency_ratio"] == verdict
    assert verdicts(before, replace(report, latency=None))["latency_ratio"] == "left out"


# --- tolerances ---


def test_tolerances_are_read_and_the_rest_keeps_its_default(report: Report, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        '[allow]\nsqnr_db = 5\nsize_mib = "50 %"\n[at_least]\ntop1 = 0.97\n[at_most]\nsize_mib = 120\n'
    )
    found = Tolerances.read(tmp_path / "t.toml")
    assert found.allow["agreement"] == DEFAULTS["agreement"]
    before = with_figures(report, sqnr_db=60.0, size_mib=100.0, top1=0.975)
    now = with_figures(report, sqnr_db=56.0, size_mib=119.0, top1=0.969)
    rows = verdicts(before, now, replace(found, allow={**found.allow, "top1": DEFAULTS["latency_ratio"]}))
    assert (rows["sqnr_db"], rows["size_mib"], rows["top1"]) == ("held", "held", "fell")  # the floor, not the baseline
    assert verdicts(before, with_figures(now, size_mib=121.0), found)["size_mib"] == "fell"  # the ceiling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[allow]\nsqnr = 1\n", "line 2: there is no row 'sqnr' in [allow]; rows: sqnr_db, agreement, top1"),
        ("\n[alow]\nsqnr_db = 1\n", "line 2: 'alow' is no table here; the tables are allow, at_least, at_most"),
        ("[allow]\nsqnr_db = -1\n", "line 2: -1 is less than 0"),
        ('[allow]\nsqnr_db = "one"\n', "line 2: 'one' is no number"),
        ('[at_least]\ntop1 = "2 %"\n', "line 2: '2 %' is no number"),
        ("[allow\n", "is no TOML"),
    ],
)
def test_a_typo_in_the_tolerances_is_named_with_its_line(
    text: str, words: str, baseline: Path, small_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = baseline.with_name("t.toml")
    path.write_text(text)
    code, _, errors = run(capsys, small_bundle(), "--baseline", baseline, "--tolerances", path)
    assert (code, len(errors)) == (4, 1)
    assert words in errors[0]


def test_a_changed_file_is_seen_before_anything_is_measured(
    own_bundle: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (own_bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    code, _, errors = run(capsys, own_bundle, "--baseline", baseline)
    assert code == 4
    assert "sha256 differs" in errors[0]
    shutil.rmtree(own_bundle)


def test_the_workflow_in_the_examples_has_commands_that_exist() -> None:
    """Its YAML, its order, and every option of every command of ours against the command's own help."""
    import shlex

    import typer.main
    import yaml

    from dualtoken_deploy.cli.main import app

    folder = Path(__file__).parent.parent / "examples" / "ci"
    workflow = yaml.safe_load((folder / "verify.yml").read_text())
    steps = workflow["jobs"]["verify"]["steps"]
    commands = [shlex.split(s["run"]) for s in steps if s.get("run", "").startswith("dualtoken ")]
    assert [words[1] for words in commands] == ["export", "verify", "report"]
    known: Any = typer.main.get_command(app)
    for _, name, *arguments in commands:
        options = {option for parameter in known.commands[name].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options
    assert Tolerances.read(folder / "tolerances.toml").at_least == {"top1": 0.98}
