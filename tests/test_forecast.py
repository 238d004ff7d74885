"""Forecasting: a task without pictures, through the same commands. TSM2 against its equations, series, bundles."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from dualtoken_deploy import Bundle, export
from dualtoken_deploy.bench import bench
from dualtoken_deploy.data.series import FUTURE, LORENZ, PAST, SERIES, lorenz_steps, open_series
from dualtoken_deploy.deploy import RULES, deploy_form
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.models import tsm2
from dualtoken_deploy.models.registry import randomise
from dualtoken_deploy.models.scan import stepwise_scan
from dualtoken_deploy.models.source import Source
from dualtoken_deploy.models.systems import create_system
from dualtoken_deploy.tasks.forecast import score
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.evaluate import evaluate
from dualtoken_deploy.use.predict import predict
from dualtoken_deploy.use.validate import validate
from tests.commands import fails
from tests.numerics import assert_close
from tests.serving import serving

TINY = {"lookback": 32, "horizon": 8, "variates": 4, "patch": 8, "dim": 16, "layers": 1, "states": 4}
FLOAT32 = ("onnxruntime", "openvino", "coreml", "tensorrt")
ROWS = [*((target, "fp32") for target in FLOAT32), ("onnxruntime", "fp16")]


def tiny(seed: int = 0, **changes: int) -> Any:
    return create_system("tsm2", seed, **{**TINY, **changes}).double()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- series ---


def test_lorenz_is_what_another_solver_finds() -> None:
    variates, _, time, forcing, _ = LORENZ
    start = forcing + np.random.default_rng(1).normal(0, 1, int(variates))

    def slope(_t: float, x: Any) -> list[float]:
        n = len(x)
        return [(x[(i + 1) % n] - x[i - 2]) * x[i - 1] - x[i] + forcing for i in range(n)]

    at = np.arange(1, 5) * time
    wanted = solve_ivp(slope, (0, at[-1]), start, t_eval=at, rtol=1e-10, atol=1e-10).y.T
    assert_close(lorenz_steps(start, 4, time, forcing), wanted, relative=1e-3)


@pytest.mark.parametrize("name", SERIES)
def test_what_is_trained_on_is_never_what_is_judged(name: str) -> None:
    train, val = (open_series(name, part) for part in ("train", "val"))
    first = val[0]
    steps = len(train) + PAST + FUTURE - 1
    assert all(len(s.series) >= PAST for s in (train[0], first))  # type: ignore[arg-type]
    assert len(train[len(train) - 1].future) == FUTURE  # type: ignore[arg-type]
    whole = np.concatenate([train[0].series, *(train[i].future[:1] for i in range(len(train)))])  # type: ignore[index]
    rest = np.concatenate([whole, train[len(train) - 1].future[1:]])  # type: ignore[index]
    assert len(rest) == steps
    np.testing.assert_allclose(rest.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(rest.std(0), 1, atol=1e-4)
    np.testing.assert_array_equal(first.series, rest[-len(first.series) :])  # type: ignore[arg-type]
    assert train.digest != val.digest


def table(path: Path, rows: int, **columns: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(rows):
            writer.writerow(value.format(i=i) for value in columns.values())
    return path


def test_a_csv_file_is_a_series(tmp_path: Path) -> None:
    data = open_series(table(tmp_path / "s.csv", 400, date="2026-{i}", load="{i}.5", price="-{i}"), "train")
    assert data.labels == ("load", "price")
    assert (len(data), data[0].size) == (320 - PAST - FUTURE + 1, (PAST, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no table"),
        ("a,b\n1,2\n3\n", "is no table"),
        ("a,b\nx,y\n", "no column of numbers"),
        ("a\nnan\n", "no finite numbers"),
        ("a\n" + "1\n" * 100, "steps; at least"),
        ("a\xff", "cannot be read as CSV"),
    ],
)
def test_a_file_that_is_no_series(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=message):
        open_series(path)


# --- the model ---


def test_the_scan_is_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, series = tiny(layers=2), noise(2, 32, 4)
    with torch.no_grad():
        found = model(series)
        monkeypatch.setattr(tsm2, "chunked_scan", stepwise_scan)
        assert_close(found, model(series), relative=1e-12)


def test_time_goes_one_way_and_variates_both() -> None:
    model = tiny()
    x = noise(1, 4, 6, 16)  # (B, M, P, D)
    later, last = x.clone(), x.clone()
    later[:, :, 4] += noise(16, seed=1)
    last[:, 3] += noise(16, seed=1)
    with torch.no_grad():
        before = [mix(t) for t in (x, later) for mix in [model.get_submodule("token1")]]
        assert torch.equal(before[0][:, :, :4], before[1][:, :, :4])
        assert not torch.equal(before[0][:, :, 4:], before[1][:, :, 4:])
        channel = model.get_submodule("channel1")
        one, other = (channel(t.transpose(1, 2)) for t in (x, last))
        assert float((one - other)[:, :, 0].abs().amin()) > 0  # the first variate hears of the last


def test_a_mixer_is_its_equations() -> None:
    """Equations 6 to 11, written out step by step."""
    mixer = tiny().get_submodule("token1")
    x = noise(1, 1, 5, 16)
    with torch.no_grad():
        z = mixer.norm(x)[0, 0]
        entered, gate = z @ mixer.enter.weight.T, z @ mixer.gate.weight.T
        padded = torch.cat([torch.zeros(3, entered.shape[1], dtype=z.dtype), entered])
        taps = mixer.convs[0].conv.weight[:, 0, 0].T
        conv = torch.stack([(padded[t : t + 4] * taps).sum(0) for t in range(5)]) + mixer.convs[0].conv.bias
        u = conv * torch.sigmoid(conv)
        s = mixer.scans[0]
        told = u @ s.select.weight.T
        delta = torch.log1p(torch.exp(told[:, : s.rank] @ s.delta.weight.T + s.delta.bias))
        b, c = told[:, s.rank : s.rank + s.states], told[:, s.rank + s.states :]
        h, rows = torch.zeros(s.states, u.shape[1], dtype=z.dtype), []
        for t in range(5):
            h = torch.exp(-torch.exp(s.a_log) * delta[t]) * h + b[t][:, None] * delta[t] * u[t]
            rows.append(c[t] @ h + s.skip * u[t])
        wanted = (torch.stack(rows) * gate * torch.sigmoid(gate)) @ mixer.leave.weight.T
        assert_close(mixer(x)[0, 0], wanted, relative=1e-12)


@pytest.mark.parametrize("rules", [None, list(RULES)], ids=["default", "all"])
def test_the_deploy_form_keeps_what_the_model_computes(rules: list[str] | None) -> None:
    model = tiny(layers=2)
    randomise(model, 0)
    form = deploy_form(model, rules, (32, 4))
    assert form.rules["fold_norm_affine"] > 0
    series = noise(2, 32, 4)
    with torch.no_grad():
        assert_close(form.module(series), model(series), relative=1e-10)


def test_units_do_not_matter() -> None:
    """RevIN: a series in other units is forecast in those units."""
    model, series = tiny(), noise(3, 32, 4)
    scale, shift = torch.tensor([10.0, 0.5, 3.0, 100.0]), torch.tensor([5.0, -2.0, 0.0, 1e3])
    with torch.no_grad():
        assert_close(model(series * scale + shift), model(series) * scale + shift, relative=1e-4)


def test_scores_are_scikit_learns() -> None:
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    data = open_series("eeg").limit(5)
    task = get_task("forecast")
    contract = Source.module(nn.Identity(), task="forecast", image_size=(32, 4)).contract(None, 1)
    pairs, random = [], np.random.default_rng(0)
    for i in range(5):
        ahead = random.normal(size=(1, 8, 4)).astype(np.float32)
        pairs.append((task.keep(data[i], contract), task.interpret({"forecast": ahead}, (32, 4), (32, 4))))
    came = np.concatenate([data[i].future[:8] for i in range(5)])  # type: ignore[index]
    gave = np.concatenate([found.tensors["forecast"] for _, found in pairs])  # type: ignore[index]
    last = np.concatenate([np.repeat(data[i].series[-1:], 8, 0) for i in range(5)])  # type: ignore[index]
    found = score(pairs, 4)
    assert found["mse"] == pytest.approx(mean_squared_error(came, gave), rel=1e-6)
    assert found["mae"] == pytest.approx(mean_absolute_error(came, gave), rel=1e-6)
    assert found["last_value_mse"] == pytest.approx(mean_squared_error(came, last), rel=1e-6)


# --- bundles ---


@pytest.fixture(scope="session")
def forecaster(bundle_store: Path) -> Callable[..., Path]:
    """forecaster(target, precision) -> the folder of a bundle of a small TSM2."""

    def make(target: str = "onnxruntime", precision: str = "fp32") -> Path:
        folder = bundle_store / f"tsm2-{target}-{precision}"
        if not folder.exists():
            export("tsm2", target, precision, output=folder, **TINY)  # type: ignore[arg-type]
        return folder

    return make


@pytest.mark.parametrize(("target", "precision"), ROWS)
def test_bundles_compute_what_eager_computes(forecaster: Callable[..., Path], target: str, precision: str) -> None:
    bundle = Bundle.open(forecaster(target, precision))
    wanted = 100.0 if precision == "fp32" else 45.0
    assert (bundle.manifest.input.kind, bundle.manifest.input.tensor.shape) == ("series", (1, 32, 4))
    assert bundle.manifest.measured.photographs is not None
    assert bundle.manifest.measured.photographs.sqnr_db >= wanted
    if target != "tensorrt":  # prepared, not built
        (result,) = validate([bundle], "eeg", limit=4)
        assert result.sqnr_db >= wanted
        assert result.scores == pytest.approx(result.eager_scores, rel=1e-2)


def test_a_bundle_is_evaluated_and_asked(forecaster: Callable[..., Path], tmp_path: Path) -> None:
    bundle = forecaster()
    found = evaluate(bundle, "eeg", limit=10)
    assert list(found.scores) == ["mse", "mae", "last_value_mse", "last_value_mae"]
    path = table(tmp_path / "s.csv", 40, a="{i}", b="1{i}", c="-{i}", d="0.{i}")
    (answer,) = predict(bundle, [path])
    data = json.loads(json.dumps(answer.to_json()))
    assert [len(row["values"]) for row in data["forecast"]] == [8] * 4


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("export", "--variant", "tsm2", "--input", "image"), 2, "valid inputs: series"),
        (("export", "--variant", "tsm2", "--image-size", "64"), 2, "takes a series"),
        (("export", "--variant", "tsm2", "--option", "patch=7"), 2, "does not divide"),
        (("export", "--variant", "tsm2", "--option", "wheels=4"), 2, "valid options"),
        (("export", "--variant", "tsm2", "--option", "layers=0"), 2, "at least 1"),
        (("export", "--variant", "t-mix", "--input", "series"), 2, "valid inputs: image, tensor"),
        (("predict", "{bundle}", "{csv}"), 4, "the model takes 32 of 4"),
        (("evaluate", "{bundle}", "--data", "lorenz"), 4, "has 8 variates, the model 4"),
        (
            ("train", "--task", "forecast", "--variant", "s", "--data", "eeg", "--output", "{new}"),
            2,
            "does not forecast",
        ),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_bad_input(
    command: tuple[str, ...],
    code: int,
    message: str,
    forecaster: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = table(tmp_path / "s.csv", 40, a="{i}", b="1{i}")
    names = {"bundle": str(forecaster()), "csv": str(path), "new": str(tmp_path / "run")}
    extra = ("--target", "onnx", "--output", str(tmp_path / "bundle")) if command[0] == "export" else ()
    found, line = fails(capsys, *(part.format(**names) for part in command), *extra)
    assert (found, message in line) == (code, True), line


def test_the_server_answers_what_predict_says(forecaster: Callable[..., Path], tmp_path: Path) -> None:
    """As JSON and as binary tensors; the picture route says where to send them."""
    path = table(tmp_path / "s.csv", 40, a="{i}", b="1{i}", c="-{i}", d="0.{i}")
    (want,) = predict(forecaster(), [path], threads=1)
    series = np.loadtxt(path, np.float32, delimiter=",", skiprows=1)[-32:]
    with serving(tmp_path / "log", f"ahead={forecaster()}", "--threads", "1") as server:
        (about,) = server.get("/v2/models/ahead").json["inputs"]
        assert about == {"name": "series", "datatype": "FP32", "shape": [1, 32, 4]}
        plain = server.post("/v2/models/ahead/infer", {"inputs": [about | {"data": series.ravel().tolist()}]})
        (out,) = plain.json["outputs"]
        tensor = about | {"parameters": {"binary_data_size": series.nbytes}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        packed = server.post("/v2/models/ahead/infer", head + series.tobytes(), **length)
        picture = server.ask("POST", "/v2/models/ahead/classify", b"no matter what")
    assert (out["name"], out["datatype"], out["shape"]) == ("forecast", "FP32", [1, 8, 4])
    binary = np.frombuffer(packed.body[int(packed.headers["inference-header-content-length"]) :], "<f4")
    for found in (np.array(out["data"], np.float32), binary):
        for column, row in zip(found.reshape(8, 4).T, want.answers, strict=True):
            assert_close(column, np.array(row.values), relative=1e-6)
    assert picture.code == 400
    assert picture.json["error"] == "ahead takes series, no pictures; send tensors to its infer route"


def test_a_forecaster_is_timed(forecaster: Callable[..., Path]) -> None:
    report = bench([forecaster()], threads=1, rounds=3, seconds=0.05)
    own, limit = report.contestants
    assert (own.kind, limit.kind) == ("bundle", "limit")
    assert 0 < own.p50_ms <= own.p99_ms
    assert own.gemm_limit_ratio is not None
    assert 0 < own.gemm_limit_ratio < 2  # its scans are no products


class Trend(nn.Module):
    """A model of a user's: a linear layer along time."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = nn.Linear(16, 4)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.ahead(series.transpose(1, 2)).transpose(1, 2)
        return out


def test_a_forecaster_of_a_user(tmp_path: Path) -> None:
    source = Source.module(Trend(), task="forecast", image_size=(16, 3), labels=("a", "b", "c"))
    result = export(source, output=tmp_path / "bundle")
    assert result.sqnr_db > 100
    bundle = Bundle.open(tmp_path / "bundle")
    assert [(o.name, o.shape) for o in bundle.manifest.outputs] == [("forecast", (1, 4, 3))]
    (answer,) = predict(bundle, [table(tmp_path / "s.csv", 20, a="{i}", b="{i}", c="{i}")])
    assert [row.variate for row in answer.answers] == ["a", "b", "c"]


def test_training_learns_and_its_weights_export(tmp_path: Path) -> None:
    from dualtoken_deploy.train import make_config, train

    options = {**TINY, "lookback": 96}
    config = make_config(variant="tsm2", data="eeg", task="forecast", epochs=2, options=options, warmup_epochs=0.1)
    result = train(config, tmp_path / "run")
    untrained = create_system("tsm2", 0, **options)
    assert result.metric == "mse"
    assert result.best == min(result.best, result.last)
    found = evaluate(tmp_path / "run", "eeg")
    assert found.scores["mse"] == pytest.approx(result.best, rel=1e-5)
    with torch.no_grad():
        data = open_series("eeg")
        past = torch.stack([torch.from_numpy(data[i].series[-96:]) for i in range(len(data))])  # type: ignore[index]
        came = torch.stack([torch.from_numpy(data[i].future[:8]) for i in range(len(data))])  # type: ignore[index]
        assert found.scores["mse"] < float(((untrained(past) - came) ** 2).mean())
    made = export("tsm2", weights=tmp_path / "run", output=tmp_path / "bundle")
    assert made.sqnr_db >= 100
    assert Bundle.open(tmp_path / "bundle").labels == ("PG3", "PG5", "PG7", "PG9")


def test_the_weights_that_ship_beat_every_ridge_regression() -> None:
    """From the 48 steps that the model sees to the next 24, all variates to all: the best of the linear ones."""
    past, future = {}, {}
    for part in ("train", "val"):
        data = open_series("lorenz", part)
        chosen = range(len(data)) if part == "train" else range(0, len(data), 12)
        samples = [data[i] for i in chosen]
        past[part] = np.array([s.series[-48:] for s in samples], np.float64)  # type: ignore[index]
        future[part] = np.array([s.future[:24] for s in samples], np.float64)  # type: ignore[index]
    x, y = ((a["train"] - past["train"][:, -1:]).reshape(len(past["train"]), -1) for a in (past, future))
    weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
    last = past["val"][:, -1:]
    linear = ((past["val"] - last).reshape(len(last), -1) @ weights).reshape(len(last), 24, 8) + last
    baseline = float(((linear - future["val"]) ** 2).mean())
    from dualtoken_deploy.models.own_sources import trained_source

    with torch.no_grad():
        ahead = trained_source("lorenz").make()(torch.from_numpy(past["val"]).float()).numpy()
    found = float(((ahead - future["val"]) ** 2).mean())
    assert 0.6 < baseline < 0.75
    assert found < 0.8 * baseline
