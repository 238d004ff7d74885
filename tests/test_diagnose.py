"""Planted faults: the layer that is broken must be the one that is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from dualtoken_deploy.bench.report import Ratio
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets.inner import open_look
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.use.compare import Lost, compare, verdict
from dualtoken_deploy.use.diagnose import Diagnosis, diagnose, draw
from dualtoken_deploy.use.intervals import jackknife, paired_difference, wilson
from tests.commands import check_schema
from tests.test_quantize import INT8


def damaged(source: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    shutil.copytree(source, folder)
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return Bundle.open(folder, verify=False)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def times(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def transposed(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), name))

    return change


def layer(name: str | None) -> str:
    assert name is not None
    return name.removesuffix("/MatMul")


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if row.looks])
def test_every_precision_has_a_threshold(target: str) -> None:
    assert set(TARGETS[target].looks) >= set(TARGETS[target].precisions)
    assert callable(open_look(TARGETS[target]).actual)


@pytest.mark.parametrize(
    ("precision", "target"), [(p, t) for p in ("fp32", "fp16", "int8") for t in ("onnxruntime", "openvino")]
)  # in this order a graph is traced twice, not six times
def test_a_sound_bundle_has_no_suspect(precision: str, target: str, small_bundle: Callable[..., Path]) -> None:
    folder = small_bundle(target, precision, int8=INT8) if precision == "int8" else small_bundle(target, precision)
    found = diagnose(folder, limit=2)
    assert (found.first, found.suspect, found.note) == (None, None, None)
    assert found.data.startswith("digits" if precision == "int8" else "photographs")
    assert [b.name for b in found.blocks] == ["stem", "stage1.block1", "stage3.block1", "logits"]
    names = {d.name for d in found.layers}
    assert {"stem.conv1.conv", "stage1.block1.local.pw1", "stage3.block1.token.broadcast.proj"} <= names
    # INT8 for ONNX Runtime joins products with their biases, and an attention's parts: those values are not there
    joined = (precision, target) == ("int8", "onnxruntime")
    assert found.unseen <= len(found.layers) // (3 if joined else 10)
    json.dumps(found.to_json(), allow_nan=False)


def test_pictures_outside_of_the_ranges_are_said_to_be_so(small_bundle: Callable[..., Path]) -> None:
    """Photographs saturate ranges of digits: layers drift that have no fault, and the note says why."""
    found = diagnose(small_bundle("onnxruntime", "int8", int8=INT8), "photographs", limit=2)
    assert min(d.sqnr_db for d in found.layers) < 30
    assert found.note is not None
    assert found.note.startswith("ranges were measured on digits, these are photographs")


@pytest.mark.parametrize(
    "name", ["stage1.block1.token.broadcast.q", "stage3.block1.token.broadcast.proj", "stage3.block1.ffn.fc1"]
)
def test_a_transposed_or_rescaled_weight_is_pointed_at(
    name: str, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    square = "ffn" not in name
    change = transposed(f"{name}.weight") if square else times(f"{name}.weight", 4.0)
    found = diagnose(damaged(small_bundle(), tmp_path / "b", change), limit=2)
    assert layer(found.first) == layer(found.suspect) == name
    assert next(d for d in found.layers if d.name == found.suspect).lost_db > 20


@pytest.mark.parametrize("name", ["stage1.block1.local.pw2", "stage3.block1.ffn.fc2"])
def test_a_wrong_scale_of_an_int8_layer_is_pointed_at(
    name: str, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = damaged(small_bundle("onnxruntime", "int8", int8=INT8), tmp_path / "b", times(f"{name}.weight_scale", 4.0))
    found = diagnose(bundle, limit=2)
    assert layer(found.suspect) == name


def test_the_command_line_draws_and_prints(
    small_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["diagnose", str(small_bundle()), "--limit", "1", "--picture", str(tmp_path / "d.png"), "--rows", "3"])
    out = capsys.readouterr().out
    assert "no layer is past the threshold" in out
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.size[0] > 800


def test_drawing_marks_the_suspect(small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    found: Diagnosis = diagnose(damaged(small_bundle(), tmp_path / "b", times("stem.conv1.conv.weight", 4.0)), limit=1)
    draw(found, tmp_path / "d.svg")
    assert "stem.conv1.conv" in (tmp_path / "d.svg").read_text() or (tmp_path / "d.svg").stat().st_size > 5000


# compare


@pytest.mark.parametrize(
    ("drop", "faster", "size", "untimed", "start"),
    [
        ((0.1, 0.0, 0.3), Ratio(1.5, 1.4, 1.6), 0.3, None, "worth it: faster"),
        ((0.1, 0.0, 0.3), Ratio(0.7, 0.6, 0.8), 0.3, None, "for its size only: slower here"),
        ((0.1, 0.0, 0.3), Ratio(0.79, 0.74, 0.99), 0.3, None, "for its size only: slower here (0.79x (0.74-0.99))"),
        ((0.0, -0.1, 0.1), Ratio(1.0, 0.9, 1.1), 0.9, None, "cannot tell: cannot tell whether faster"),
        ((0.0, -0.1, 0.1), Ratio(0.9, 0.8, 0.95), 0.9, None, "not worth it: slower here"),
        ((0.0, -0.1, 0.1), Ratio(1.0, 0.97, 1.04), 0.3, None, "worth it: as fast"),
        ((0.0, -0.1, 0.1), Ratio(1.02, 1.01, 1.04), 0.9, None, "no gain: faster"),
        ((3.0, 0.6, 5.0), Ratio(1.5, 1.4, 1.6), 0.3, None, "not worth it: faster"),
        (
            (1.7, -0.6, 6.0),
            Ratio(1.5, 1.4, 1.6),
            0.3,
            None,
            "cannot tell by these pictures",
        ),
        (
            (0.0, -1.0, 1.0),
            Ratio(1.5, 1.4, 1.6),
            0.3,
            None,
            "cannot tell by these pictures",
        ),
        ((0.0, 0.0, 0.1), None, 0.5, "a reference", "0.50x the size, loses 0.00 points (0.00 to 0.10); its speed was"),
        ((0.0, 0.0, 0.1), None, None, None, "the fp32 one"),
    ],
)
def test_verdicts(
    drop: tuple[float, float, float], faster: Ratio | None, size: float | None, untimed: str | None, start: str
) -> None:
    assert verdict(Lost(*drop), faster, size, untimed).startswith(start)


def test_intervals_against_scipy() -> None:
    from scipy.stats import binomtest

    for right, total in ((0, 7), (3, 7), (355, 360), (360, 360), (58, 60)):
        want = binomtest(right, total).proportion_ci(0.95, "wilson")
        found = wilson(right, total)
        assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-6)


def test_a_paired_difference_covers_the_truth() -> None:
    """Of pairs drawn with a known loss of 4 points the interval holds it in 95 % of the sets, and is no wider than that
    of unpaired answers."""
    random, held, narrower = np.random.default_rng(3), 0, 0
    for _ in range(600):
        kind = random.choice(4, size=150, p=[0.86, 0.06, 0.02, 0.06])  # both right, first alone, second alone, neither
        found = paired_difference((kind <= 1).tolist(), ((kind == 0) | (kind == 2)).tolist())
        held += found.low <= 0.04 <= found.high
        first, second = wilson(int((kind <= 1).sum()), 150), wilson(int(((kind == 0) | (kind == 2)).sum()), 150)
        narrower += found.high - found.low < first.high - second.low - (first.low - second.high)
    assert 0.92 <= held / 600 <= 0.985
    assert narrower == 600


def test_the_jackknife_of_a_mean_is_its_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = jackknife(values.tolist(), lambda some: float(np.mean(some)))
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(2.262 * values.std() / 20, rel=0.5)
    assert jackknife(values[:9].tolist(), lambda some: float(np.mean(some))) is None


def test_compare_counts_what_evaluate_counts(
    small_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dualtoken_deploy.use import compare as module
    from dualtoken_deploy.use.evaluate import evaluate

    # eager's own process does not know the small variant, so the first bundle is the baseline
    monkeypatch.setattr(module, "bench", lambda bundles, _against, *rest: bench(bundles, None, *rest))
    folders = [small_bundle(), small_bundle("onnxruntime", "int8", int8=INT8)]
    options = ["--data", "digits", "--limit", "30", "--rounds", "1", "--seconds", "0.05", "--threads", "1"]
    main(["compare", *map(str, folders), *options, "--picture", str(tmp_path / "p.png"), "--json"])
    found = json.loads(capsys.readouterr().out)
    check_schema("compare", found)
    check_schema("evaluate", json.loads(json.dumps(evaluate(folders[0], "digits", limit=3).to_json())))
    check_schema("diagnose", json.loads(json.dumps(diagnose(folders[0], limit=1).to_json())))
    assert (tmp_path / "p.png").stat().st_size > 1000
    for folder, row in zip(folders, found["rows"], strict=True):
        assert row["top1"] == pytest.approx(evaluate(folder, "digits", limit=30).scores["top1"])
        assert row["drop"] == pytest.approx(100 * (found["eager_top1"] - row["top1"]))
        assert row["drop_low"] <= row["drop"] <= row["drop_high"]
    assert found["images"] == 30
    assert found["rows"][1]["size_ratio"] < 0.5
    assert found["rows"][1]["against_fp32"]["median"] > 0


def test_compare_takes_one_model_only(small_bundle: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="of different weights"):
        compare([small_bundle(), small_bundle(seed=1)], "digits")
