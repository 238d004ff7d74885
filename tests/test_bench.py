"""Bench: its arithmetic, who takes part, its ranking of models of known cost, and bundles that fail in it."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.bench import worker as bench_worker
from dualtoken_deploy.bench.process import Job, Limits, Series, measure
from dualtoken_deploy.bench.report import BenchReport, Ratio, latency, median_interval, noise_notes, ratio_of
from dualtoken_deploy.bench.run import (
    Entrant,
    Setting,
    _doubts,
    bench,
    common_batch,
    contestant,
    enter,
    other_sizes,
    settled,
    unique_names,
)
from dualtoken_deploy.bundle.blocks import Measured, Weights
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import MANIFEST, Bundle, write_bundle
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, UsageError
from dualtoken_deploy.spec import Dim, InputContract, TensorSpec, Tolerance
from tests.test_bench_process import alive, children

ROWS, WIDTH = 192, 256  # of the products in the models below: 12.6 M multiplies a layer
QUICK: dict[str, Any] = {"threads": 1, "rounds": 2, "seconds": 0.05}


def write_onnx(path: Path, layers: int, batch: Dim) -> None:
    """`image` (batch, ROWS, WIDTH) times the same weight `layers` times, averaged to `logits` (batch, WIDTH)."""
    helper = pytest.importorskip("onnx.helper")
    import onnx
    from onnx import numpy_helper

    weight = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "image", "weight"], [f"x{i + 1}"]) for i in range(layers)]
    nodes.append(helper.make_node("ReduceMean", [f"x{layers}", "axes"], ["logits"], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, ROWS, WIDTH])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, WIDTH])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))


LABELS = tuple(f"class {i}" for i in range(WIDTH))


def make_bundle(folder: Path, layers: int = 0, batch: Dim = "batch", **changes: Any) -> Path:
    """A bundle of such a chain, or of a file that nobody loads for 0 layers; `changes` are fields of its manifest."""
    folder.mkdir(parents=True)
    if layers:
        write_onnx(folder / "model.onnx", layers, batch)
    else:
        (folder / "model.onnx").write_bytes(bytes(3 * 2**19))
        layers = 2
    golden = np.random.default_rng(1).standard_normal((1, ROWS, WIDTH)).astype(np.float32)
    fields: dict[str, Any] = {
        "variant": "chain",
        "options": {},
        "weights": Weights(source="random", seed=0, sha256=""),
        "target": "onnxruntime",
        "precision": "fp32",
        "executed_precision": {},
        "input": InputContract(TensorSpec("image", "float32", "NHC", (batch, ROWS, WIDTH)), "tensor", (ROWS, WIDTH)),
        "outputs": (TensorSpec("logits", "float32", "NC", (batch, WIDTH)),),
        "tolerance": Tolerance(100.0),
        "measured": Measured(),
        "rules": (),
        "operators": {},
        "products": ((1, ROWS, WIDTH, WIDTH, layers),),
        "versions": {},
        "machine": {},
        "command": "",
    }
    logits = np.zeros((1, WIDTH), np.float32)
    write_bundle(folder, Manifest(**fields | changes), {"input": golden, "logits": logits}, LABELS)
    return folder


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles, the second with three times the layers of the first."""
    root = tmp_path_factory.mktemp("bundles")
    return make_bundle(root / "short", layers=4), make_bundle(root / "long", layers=12)


@pytest.fixture(scope="module")
def ranking(chains: tuple[Path, Path]) -> BenchReport:
    """Both of them benched; read only."""
    pytest.importorskip("onnxruntime")
    return bench(chains, threads=1, rounds=3, seconds=0.1)


# Arithmetic


def test_percentiles_of_known_laps() -> None:
    laps = [i * 1_000_000 for i in range(101)]  # 0..100 ms
    np.random.default_rng(0).shuffle(laps)
    found = latency(laps)
    assert (found.p50_ms, found.p90_ms, found.p99_ms, found.mean_ms, found.runs) == (50.0, 90.0, 99.0, 50.0, 101)


def test_percentiles_against_numpy() -> None:
    laps = np.random.default_rng(0).integers(10**5, 10**8, 137)
    found = latency(laps.tolist())
    expected = np.quantile(laps / 1e6, [0.5, 0.9, 0.99])
    np.testing.assert_allclose([found.p50_ms, found.p90_ms, found.p99_ms], expected, rtol=1e-12)


def test_rows_against_numpy_on_made_up_rounds(tmp_path: Path) -> None:
    """Two contestants over seven rounds that drift together: every figure of a row, computed the other way round."""
    random = np.random.default_rng(3)
    drift = random.uniform(1, 3, (7, 1))
    laps = {n: (drift * random.uniform(1, 2, (7, 40)) * scale * MS).astype(int) for n, scale in (("a", 9), ("b", 4))}
    found = {n: Series(1.0, 1.0, table.tolist(), [], 1.0) for n, table in laps.items()}
    setting = Setting(batch=3, threads=1, device=None, rounds=7, seconds=1.0)
    row = contestant(entrant(tmp_path, "b", limit="a"), setting, found, "a")
    ratios = np.median(laps["a"], axis=1) / np.median(laps["b"], axis=1)
    expected = [*np.quantile(laps["b"] / 1e6, [0.5, 0.9, 0.99]), 3 * 280 / (laps["b"].sum() / 1e9)]
    assert [row.p50_ms, row.p90_ms, row.p99_ms, row.images_per_s] == pytest.approx(expected, rel=1e-12)
    spread = [np.median(ratios), ratios.min(), ratios.max(), ratios.max() / ratios.min()]
    assert [row.ratio.median, row.ratio.low, row.ratio.high, row.ratio.spread] == pytest.approx(spread, rel=1e-12)
    assert row.gemm_limit_ratio == pytest.approx(np.median(ratios), rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(1.0, 1.0, 1.0), "1.00x (1.00-1.00)"),
        (Ratio(0.00123, 0.001, 0.0456), "0.0012x (0.0010-0.05)"),  # not 0.00x
        (Ratio(12.34, 9.999, 123.4), "12.3x (10.00-123)"),
    ],
)
def test_ratios_as_text(ratio: Ratio, text: str) -> None:
    assert str(ratio) == text


@pytest.mark.parametrize(("rounds", "place"), [(4, None), (5, 0), (7, 0), (8, 1), (20, 5), (101, 41)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(rounds: int, place: int | None) -> None:
    """Against the binomial distribution of scipy: the narrowest pair of order statistics with 90 %."""
    binom = pytest.importorskip("scipy.stats").binom

    values = np.random.default_rng(1).permutation(rounds).astype(float)
    found = median_interval(values.tolist())
    assert found == (None if place is None else (place, rounds - 1 - place))
    if place is not None:
        assert 2 * binom.cdf(place, rounds, 0.5) <= 0.1 < 2 * binom.cdf(place + 1, rounds, 0.5)


def test_rounds_go_on_until_the_interval_is_narrow() -> None:
    """No clock in it: rounds of given lengths, the ratio within 2 % after the first five, which jump."""
    laps = [[10 * MS], [4 * MS], [22 * MS], [9 * MS], [14 * MS], *[[(1000 + i % 5) * MS // 100] for i in range(40)]]
    setting = Setting(batch=1, threads=1, device=None, rounds=5, seconds=1.0)

    def after(rounds: int, width: float) -> bool:
        series = {"a": Series(1, 1, [[10 * MS]] * rounds), "b": Series(1, 1, laps[:rounds])}
        return settled(series, ["a", "b"], "a", 5, width, setting)

    assert not after(4, 9.0)  # fewer than what was asked
    assert after(5, 9.0)
    done = [rounds for rounds in range(5, 45) if after(rounds, 0.05)]
    assert done
    assert done[0] > 10
    assert done == list(range(done[0], 45))


def test_a_throughput_ratio_is_of_images_a_second(tmp_path: Path) -> None:
    setting = Setting(batch=4, threads=2, device=None, rounds=3, seconds=1.0, mode="throughput")
    found = {"a": Series(1, 1, [[8 * MS]] * 3, [100.0, 200.0, 100.0]), "b": FOUND["b"]}
    row = contestant(entrant(tmp_path, "b", limit=None), setting, found, "a")
    assert row.ratio == Ratio(median=8.0, low=3.5, high=9.0)


def test_who_comes_while_a_call_runs_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula of Pollaczek and Khinchine for calls that all take as long, with a clock that is counted."""
    now, lap = [0], 0.01

    def run() -> None:
        now[0] += int(lap * 1e9)

    def sleep(seconds: float) -> None:
        now[0] += int(seconds * 1e9) + 1000

    clock = "dualtoken_deploy.bench.worker.time"
    monkeypatch.setattr(f"{clock}.perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(f"{clock}.perf_counter", lambda: now[0] / 1e9)
    monkeypatch.setattr(f"{clock}.sleep", sleep)
    means = {}
    for load in (0.5, 0.8):
        waits = bench_worker.waits_under_load(run, lap, load, 150.0, 0)
        assert min(waits) >= lap * 1e9
        means[load] = np.mean(waits) / 1e9
        assert len(waits) == pytest.approx(150 * load / lap, rel=0.04)
        assert means[load] == pytest.approx(lap * (1 + load / (2 * (1 - load))), rel=0.1)


def test_a_server_has_tails_for_each_load(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    report = bench(chains[:1], **QUICK, mode="server")
    (row,) = (c for c in report.contestants if c.kind == "bundle")
    assert [tail.load for tail in row.tails] == [0.5, 0.8, 0.95]
    assert all(tail.requests >= 10 and tail.p99_ms >= tail.p50_ms > 0 for tail in row.tails)
    assert report.columns()[-1] == "p99 ms at 95 %"
    assert "--mode server" in report.command
    with pytest.raises(UsageError, match="unknown mode 'best'; valid modes: latency, throughput, server"):
        bench(chains[:1], mode="best")


def test_no_laps_are_an_error() -> None:
    with pytest.raises(ValueError, match="no call"):
        latency([])


def test_ratio_is_taken_round_by_round() -> None:
    # The third round was slow for both; medians of the columns (12 / 5) would not say so.
    found = ratio_of([10.0, 12.0, 40.0], [5.0, 4.0, 20.0])
    assert found == Ratio(median=2.0, low=2.0, high=3.0)
    assert found.spread == 1.5
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratio_of([1.0], [1.0, 2.0])


def entrant(tmp_path: Path, name: str, kind: str = "bundle", limit: str | None = "gemm") -> Entrant:
    folder = tmp_path / name
    return Entrant(name, kind, Bundle.open(folder if folder.exists() else make_bundle(folder)), limit)


MS = 1_000_000
FOUND = {
    "a": Series(30.0, 12.0, [[8 * MS] * 3, [8 * MS] * 3], [], 100.0),
    "b": Series(20.0, 9.0, [[4 * MS] * 3, [2 * MS] * 3], [900.0, 700.0, 800.0], 50.0),
    "gemm": Series(1.0, 1.0, [[2 * MS], [2 * MS]], [], 10.0),
}


def test_a_row_of_the_report(tmp_path: Path) -> None:
    setting = Setting(batch=4, threads=2, device=None, rounds=2, seconds=1.0)
    row = contestant(entrant(tmp_path, "b"), setting, FOUND, "a")
    assert row.ratio == Ratio(median=3.0, low=2.0, high=4.0)
    assert row.rounds_p50_ms == (4.0, 2.0)
    assert (row.p50_ms, row.mean_ms, row.runs) == (3.0, 3.0, 6)
    assert row.images_per_s == pytest.approx(4 / 3e-3)
    assert row.async_images_per_s == 800.0
    assert row.gemm_limit_ratio == pytest.approx(0.75)  # 2/4 and 2/2
    assert (row.cold_start_ms, row.first_inference_ms, row.peak_rss_mib) == (20.0, 9.0, 50.0)
    assert row.size_mib == 1.5  # of the artifact; golden, labels and manifest are not counted
    assert contestant(entrant(tmp_path, "a"), setting, FOUND, "a").async_images_per_s is None


def test_the_limit_is_at_the_limit_and_only_for_the_cpu(tmp_path: Path) -> None:
    gemm = entrant(tmp_path, "gemm", kind="limit")
    gpu = Setting(batch=1, threads=2, device="cuda", rounds=2, seconds=1.0)
    row = contestant(gemm, gpu, FOUND, "a")
    assert (row.gemm_limit_ratio, row.device, row.size_mib, row.cold_start_ms) == (1.0, "cpu", None, None)
    assert contestant(entrant(tmp_path, "a"), gpu, FOUND, "a").gemm_limit_ratio is None


def test_a_bundle_of_another_size_is_noted(small_bundle: Callable[..., Path]) -> None:
    same = Bundle.open(small_bundle())
    contract = replace(same.manifest.input, size=(96, 128))
    other = Bundle(same.path, replace(same.manifest, input=contract))
    rows = [
        Entrant("eager", "eager", same, None),
        Entrant("a", "bundle", same, None),
        Entrant("b", "bundle", other, None),
    ]
    (note,) = other_sizes(rows, "eager")
    assert note == "b takes 96 x 128 and eager 64 x 64: their ratio is of other work"
    assert other_sizes(rows, "b") == ["a takes 64 x 64 and b 96 x 128: their ratio is of other work"]


def test_a_wide_spread_is_noted(tmp_path: Path) -> None:
    setting = Setting(batch=1, threads=1, device=None, rounds=2, seconds=1.0)
    rows = [contestant(entrant(tmp_path, name), setting, FOUND, "a") for name in ("a", "b")]
    (note,) = noise_notes(rows)
    assert note.startswith("b is noisy: its ratio went from 2.00 to 4.00")


def test_doubts_are_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[bench.__module__]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    quiet = Setting(batch=1, threads=4, device=None, rounds=1, seconds=1.0)
    assert _doubts({"governor": "performance", "cores": 4}, quiet) == []
    assert _doubts({"governor": None, "cores": 4}, quiet) == []
    monkeypatch.setattr(module, "busy_cores", lambda: 1.2)
    crowded = Setting(batch=1, threads=8, device="cuda", rounds=1, seconds=1.0)
    governor, threads, busy, device = _doubts({"governor": "powersave", "cores": 4}, crowded)
    assert "powersave" in governor
    assert threads.startswith("8 threads share 4 cores")
    assert busy == "other programs kept 1.2 of 4 cores busy before the start"
    assert "no limit for device cuda" in device


# The limit


PRODUCTS = [[1, 49, 64, 32, 3], [4, 49, 16, 49, 2], [1, 1, 64, 10, 1]]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_limit_multiplies_as_often_as_the_products_say(batch: int) -> None:
    operands = bench_worker.product_operands(bench_worker.product_shapes(PRODUCTS, batch))
    executed = sum(left.size * right.shape[-1] for left, right, _ in operands)
    assert executed == batch * sum(b * m * k * n * count for b, m, k, n, count in PRODUCTS)
    assert len(operands) == 6
    assert all(np.matmul(left, right).shape == out.shape for left, right, out in operands)
    assert {a.dtype for triple in operands for a in triple} == {np.dtype(np.float32)}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_of_the_limit_multiplies_what_the_manifest_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    manifest = Bundle.open(make_bundle(tmp_path / "b", products=PRODUCTS)).manifest
    executed: list[int] = []
    matmul = np.matmul

    def counted(left: Any, right: Any, out: Any) -> Any:
        result = matmul(left, right, out=out)
        executed.append(result.size * left.shape[-1])
        return result

    subject = bench_worker._limit({"products": manifest.products, "batch": batch})()
    monkeypatch.setattr(np, "matmul", counted)
    subject.run()
    assert sum(executed) == batch * sum(int(np.prod(product)) for product in manifest.products)


def test_each_product_has_its_own_weight() -> None:
    operands = bench_worker.product_operands(bench_worker.product_shapes(PRODUCTS, 1))
    weights = [right for _, right, _ in operands]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(weights) for b in weights[:i])


# The worker's own parts


def test_a_round_has_at_least_five_calls_and_no_collection() -> None:
    collecting: list[bool] = []
    laps = bench_worker.timed_round(bench_worker.Subject(lambda: collecting.append(gc.isenabled())), 1e-9)
    timed = collecting[-len(laps) :]
    assert len(laps) >= bench_worker.MIN_RUNS
    assert not any(timed)
    assert gc.isenabled()


def test_a_round_lasts_as_long_as_asked_and_times_each_call() -> None:
    start = time.perf_counter()
    laps = bench_worker.timed_round(bench_worker.Subject(lambda: time.sleep(0.002)), 0.1)
    assert time.perf_counter() - start >= 0.1 + bench_worker.SETTLE_S
    assert 2e6 <= np.median(laps) < 10e6  # nanoseconds; a sleep may be late, never early


def test_the_feed_is_the_golden_input_tiled_or_cut(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b"))
    golden = bundle.golden["input"]
    bundle.__dict__["golden"] = {"input": np.concatenate([golden, -golden])}  # two images
    for batch in (1, 2, 5):
        feed = bench_worker.feed_of(bundle, batch)
        assert feed.shape == (batch, ROWS, WIDTH)
        assert feed.dtype == np.float32
        for i, image in enumerate(feed):
            np.testing.assert_array_equal(image, golden[0] * (-1) ** i)


def test_the_worker_imports_no_runtime_by_itself() -> None:
    code = "import sys, dualtoken_deploy.bench.run, dualtoken_deploy.bench.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "openvino"} & set(loaded)


# Whole benches


# The contract of `dualtoken bench --json` and the further fields of a row, None where a contestant has no such figure.
REPORT_FIELDS = {
    "machine", "versions", "command", "baseline", "threads", "batch", "rounds", "seconds", "contestants", "notes",
    "mode",
}  # fmt: skip
ROW_FIELDS = {
    "name", "kind", "target", "precision", "bundle", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "runs", "rounds_p50_ms",
    "images_per_s", "async_images_per_s", "ratio", "gemm_limit_ratio", "cold_start_ms", "first_inference_ms",
    "peak_rss_mib", "size_mib", "threads", "batch", "device", "ratio_interval", "tails",
}  # fmt: skip


def test_json_has_every_field_and_no_other(ranking: BenchReport) -> None:
    data = json.loads(json.dumps(ranking.to_json(), allow_nan=False))
    assert set(data) == REPORT_FIELDS
    assert len(data["contestants"]) == 4
    for row in data["contestants"]:
        assert set(row) == ROW_FIELDS
        assert set(row["ratio"]) == {"median", "low", "high"}
        absent = {"async_images_per_s", "ratio_interval"}  # three rounds say nothing with 90 %
        if row["kind"] == "limit":
            absent |= {"bundle", "size_mib", "cold_start_ms", "first_inference_ms"}
        assert {name for name, value in row.items() if value is None} == absent


def test_ratios_multiply_with_p50s(ranking: BenchReport) -> None:
    base, limits = ranking.contestants[0], {"short": "gemm", "long": "gemm of long"}
    rows = {c.name: c for c in ranking.contestants}
    for row in ranking.contestants:
        own = np.array(row.rounds_p50_ms)
        ratios = np.array(base.rounds_p50_ms) / own
        assert (row.ratio.low, row.ratio.high) == pytest.approx((ratios.min(), ratios.max()))
        assert row.ratio.median == pytest.approx(np.median(ratios))
        # A p50 over all rounds lies between the rounds' own.
        assert own.min() <= row.p50_ms <= own.max()
        if row.kind == "bundle":
            limit = np.array(rows[limits[row.name]].rounds_p50_ms)
            assert row.gemm_limit_ratio == pytest.approx(np.median(limit / own))


def test_bench_ranks_models_of_known_cost(ranking: BenchReport) -> None:
    report = ranking
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [(c["name"], c["kind"]) for c in data["contestants"]] == [
        ("short", "bundle"), ("long", "bundle"), ("gemm", "limit"), ("gemm of long", "limit"),
    ]  # fmt: skip
    short, long, gemm, _ = data["contestants"]
    assert data["baseline"] == "short"
    assert short["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    # Three times the work, and a little that both share: 1/3 but for noise, which may double or halve a time.
    assert 1 / 6 < long["ratio"]["median"] < 2 / 3
    assert long["ratio"]["low"] <= long["ratio"]["median"] <= long["ratio"]["high"]
    # Nothing but products: near its limit, whoever has the better kernel (a factor of 4 either way).
    assert 0.25 < short["gemm_limit_ratio"] < 4
    assert 0.25 < long["gemm_limit_ratio"] < 4
    assert gemm["gemm_limit_ratio"] == 1.0
    for row in data["contestants"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert len(row["rounds_p50_ms"]) == 3
        assert row["runs"] >= 15
        assert row["images_per_s"] == pytest.approx(1e3 / row["mean_ms"])
        assert row["peak_rss_mib"] > 5
    assert short["cold_start_ms"] > 0
    assert short["async_images_per_s"] is None  # ONNX Runtime's runner has none
    assert data["machine"]["cores"] >= 1
    assert {"numpy", "onnxruntime"} <= set(data["versions"])


def test_table_and_markdown_show_the_same(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    told: list[str] = []
    report = bench([chains[0]], against="gemm", batch=2, device="cpu", progress=told.append, **QUICK)
    text = report.to_markdown()
    assert report.baseline == "gemm"
    for row in (report.columns(), *report.rows()):
        assert len(row) == len(report.columns())
        assert f"| {' | '.join(row)} |" in text
    assert report.machine["cpu"] in text
    command = f"dualtoken bench {chains[0]} --against gemm --threads 1 --batch 2 --rounds 2 --seconds 0.05 --device cpu"
    assert command in text
    assert [line for line in told if line.startswith("loading")] == ["loading short (1 of 2)", "loading gemm (2 of 2)"]
    assert len([line for line in told if line.startswith("round")]) == 4


def test_overlapped_requests_where_the_runtime_has_them(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    folder = make_bundle(tmp_path / "ir", batch=1, target="openvino")
    write_onnx(tmp_path / "model.onnx", 2, 1)
    ov.save_model(ov.convert_model(str(tmp_path / "model.onnx")), str(folder / "model.xml"))
    (row, _) = bench([Bundle.open(folder, verify=False)], **QUICK).contestants
    assert row.async_images_per_s is not None
    # One stream at least, and no more than all cores could do; a factor of 5 for noise on calls this short.
    assert row.images_per_s / 5 < row.async_images_per_s < row.images_per_s * 5 * (os.cpu_count() or 1)


def test_eager_is_the_baseline_where_it_takes_part(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from dualtoken_deploy.models.registry import random_model, weights_sha256

    digest = weights_sha256(random_model("t", seed=0, image_size=64))
    spec = TensorSpec("image", "uint8", "NHWC", (1, 64, 64, 3))
    folder = make_bundle(
        tmp_path / "x",
        batch=1,
        variant="t",
        options={"image_size": [64, 64]},
        weights=Weights(source="random", seed=0, sha256=digest),
        input=InputContract(spec, "image", (64, 64)),
        outputs=(TensorSpec("logits", "float32", "NC", (1, 1000)),),
    )
    np.savez(folder / "golden.npz", input=np.zeros((1, 64, 64, 3), np.uint8), logits=np.zeros((1, 1000), np.float32))
    # "CPU" is OpenVINO's word for the device, and one word goes to all contestants.
    found = measure([Job("eager", "eager", str(folder), (), 1, 1, "CPU")], 1, 0.01)["eager"]
    assert len(found.rounds_ns[0]) >= bench_worker.MIN_RUNS
    assert found.cold_start_ms > 100  # torch is imported in there
    entrants, baseline = enter([Bundle.open(folder, verify=False)], "eager")
    assert (baseline, [e.name for e in entrants]) == ("eager", ["eager", "x", "gemm"])


# Who takes part


def test_against_another_bundle_which_joins(chains: tuple[Path, Path]) -> None:
    short, long = (Bundle.open(path) for path in chains)
    for against in (long, str(long.path), long.path):
        entrants, baseline = enter([short], against)
        assert (baseline, [e.name for e in entrants]) == ("long", ["long", "short", "gemm", "gemm of short"])
    for against in ("long", long):
        entrants, baseline = enter([short, long], against)
        assert (baseline, [e.name for e in entrants][:2]) == ("long", ["short", "long"])


def test_one_limit_for_bundles_of_one_model(chains: tuple[Path, Path]) -> None:
    short = Bundle.open(chains[0])
    entrants, baseline = enter([short, short], "gemm")
    assert baseline == "gemm"
    assert [(e.name, e.limit) for e in entrants] == [
        (f"{short.path.parent.name}/short", "gemm"), (f"{short.path.parent.name}/short#2", "gemm"), ("gemm", "gemm"),
    ]  # fmt: skip


def test_names_are_unique() -> None:
    paths = [Path(p) for p in ("/a/s", "/b/s", "/b/t", "/c/eager", "/b/t/../s")]
    assert unique_names(paths) == ["a/s", "b/s", "t", "c/eager", "b/s#2"]


def test_a_made_up_name_is_no_folders_own() -> None:
    paths = [Path(p) for p in ("/b/s", "/b/s", "/x/b/s#2", "/y/c/s#2", "/b/s")]
    assert unique_names(paths) == ["b/s", "b/s#3", "b/s#2", "c/s#2", "b/s#4"]


def test_a_folder_named_like_a_limit(tmp_path: Path) -> None:
    first, second = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "gemm of b", products=())
    third = make_bundle(tmp_path / "b", products=((1, 2, 3, 4, 5),))
    entrants, _ = enter([Bundle.open(path) for path in (first, second, third)], None)
    assert [e.name for e in entrants] == ["a", "gemm of b", "b", "gemm", "gemm of b#2"]


def test_only_a_plain_string_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s` in the current folder and a contestant `s` from elsewhere: the one that was opened is the baseline."""
    raced = Bundle.open(make_bundle(tmp_path / "x/s"))
    make_bundle(tmp_path / "y/s")
    monkeypatch.chdir(tmp_path / "y")
    for against in (Bundle.open("s"), Path("s")):
        entrants, baseline = enter([raced], against)
        assert (baseline, [e.name for e in entrants]) == ("y/s", ["y/s", "x/s", "gemm"])
    assert enter([raced], "s")[1] == "s"


def test_duplicates_are_told_apart(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    report = bench([chains[0], chains[0]], **QUICK)
    name = f"{chains[0].parent.name}/short"
    assert [c.name for c in report.contestants] == [name, f"{name}#2", "gemm"]
    # The same model twice; a factor of 3 either way for noise.
    assert 1 / 3 < report.contestants[1].ratio.median < 3


def test_batches(tmp_path: Path) -> None:
    free = Bundle.open(make_bundle(tmp_path / "free"))
    two = Bundle.open(make_bundle(tmp_path / "two", batch=2))
    three = Bundle.open(make_bundle(tmp_path / "three", batch=3))
    assert common_batch([free], None) == 1
    assert common_batch([free], 8) == 8
    assert common_batch([free, two], None) == 2
    with pytest.raises(UsageError, match=r"two has a fixed batch of 2, but --batch is 4"):
        bench([free, two], batch=4)
    with pytest.raises(UsageError, match=r"three has a fixed batch of 3, but .*two has 2"):
        common_batch([two, three], None)
    with pytest.raises(UsageError, match="at least 1"):
        common_batch([free], 0)


@pytest.mark.parametrize(
    "settings",
    [{"against": "eagr"}, {"rounds": 0}, {"seconds": 0.0}, {"seconds": float("nan")}, {"threads": 0}, {"batch": -1}],
    ids=str,
)
def test_settings_that_do_not_fit(chains: tuple[Path, Path], settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(settings)))):
        bench([chains[0]], **settings)


def test_no_bundle_or_no_products(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle to bench"):
        bench([])
    bare = Bundle.open(make_bundle(tmp_path / "bare", products=()))
    assert [e.name for e in enter([bare], None)[0]] == ["bare"]
    with pytest.raises(UsageError, match="no matrix products"):
        enter([bare], "gemm")


# What goes wrong in a worker


def test_a_changed_byte(chains: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(chains[0], tmp_path / "broken"))
    data = bytearray((broken / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"broken/model\.onnx is not the file that was exported"):
        bench([chains[0], broken], **QUICK)


def test_an_artifact_that_the_runtime_refuses_keeps_its_error_class(chains: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    broken = Path(shutil.copytree(chains[0], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match=r"^broken: ONNX Runtime cannot load"):
        bench([chains[0], Bundle.open(broken, verify=False)], **QUICK)


def test_a_device_that_is_not_here(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(MissingError, match=r"^short: .*NoSuchProvider"):
        bench([chains[0]], device="NoSuchProvider", **QUICK)


def test_an_input_that_is_not_the_models_is_said(chains: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    wrong = Path(shutil.copytree(chains[0], tmp_path / "wrong"))
    np.savez(wrong / "golden.npz", input=np.zeros((1, 3, 5), np.float32), logits=np.zeros((1, 2), np.float32))
    with pytest.raises(BundleError, match=r"^wrong: .*golden\.npz: input is float32 of \(1, 3, 5\)"):
        bench([Bundle.open(wrong, verify=False)], **QUICK)


def in_a_moment(act: Callable[[int], None]) -> Callable[[str], None]:
    """A `progress` that lets `act` loose on every worker's process 0.3 s into the second round."""

    def start() -> None:
        for pid in children(os.getpid()):
            act(pid)

    def told(text: str) -> None:
        if text.startswith("round 2") and not timers:
            timers.append(threading.Timer(0.3, start))
            timers[0].start()

    timers: list[threading.Timer] = []
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_worker_that_is_killed_midway(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ConversionError, match=r"^(short|gemm): its bench worker was killed by SIGKILL") as caught:
        bench([chains[0]], threads=1, rounds=2, seconds=1.0, progress=in_a_moment(lambda p: os.kill(p, signal.SIGKILL)))
    assert "\n" not in str(caught.value)
    assert children(os.getpid()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_worker_that_hangs() -> None:
    jobs = [Job("w", "limit", None, ((1, 8, 8, 8, 1),), 1, 1, None)]
    stop = in_a_moment(lambda p: os.kill(p, signal.SIGSTOP))
    start = time.monotonic()
    with pytest.raises(ConversionError, match=r"^w: no answer from its runtime within 2\.\d* s, so it was stopped"):
        measure(jobs, 2, 0.5, stop, limits=Limits(load_s=20.0, round_s=0.0))
    assert time.monotonic() - start < 15
    assert children(os.getpid()) == []


@pytest.mark.parametrize("answer", ["42", "[]", "null", "noise"])
def test_an_answer_that_is_none_is_one_error(answer: str) -> None:
    command = (sys.executable, "-c", f"input(); print({answer!r}, flush=True)")
    with pytest.raises(ConversionError, match=rf"^w: its bench worker answered b'{re.escape(answer)}"):
        measure([Job("w", "limit", None, (), 1, 1, None)], 1, 0.0, commands={"w": command})


NOISY = """
import os, sys
from dualtoken_deploy.bench import worker as bench_worker
from dualtoken_deploy.targets.onnxruntime import runner as onnxruntime
load = onnxruntime.load
def noisy(*arguments):
    print("a Python library says hello")
    os.write(1, b'{"error": "from C"}\\n')
    runner = load(*arguments)
    class Noisy:
        inputs = runner.inputs
        def run(self, feeds):
            os.write(1, b"once more, ")
            return runner.run(feeds)
    return Noisy()
onnxruntime.load = noisy
sys.exit(bench_worker.main())
"""


def test_a_runtime_that_prints_breaks_nothing(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    job = Job("n", "bundle", str(chains[0]), (), 1, 1, None)
    found = measure([job], 2, 0.01, commands={"n": (sys.executable, "-c", NOISY)})["n"]
    assert [len(laps) >= bench_worker.MIN_RUNS for laps in found.rounds_ns] == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("moment", ["loading gemm", "round 1"])
def test_ctrl_c_leaves_no_process(chains: tuple[Path, Path], moment: str) -> None:
    pytest.importorskip("onnxruntime")
    code = """
    import sys
    from dualtoken_deploy.bench import bench
    try:
        bench([sys.argv[1]], threads=1, rounds=2, seconds=60.0, progress=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(chains[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        while not parent.stdout.readline().startswith(moment):
            assert parent.poll() is None
        workers = children(parent.pid)
        assert workers
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=10)
    assert (parent.returncode, errors) == (130, "")
    end = time.monotonic() + 5
    while alive(workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(workers) == []


def test_the_fixture_is_a_whole_bundle(chains: tuple[Path, Path]) -> None:
    """The tests above stand on it: it opens, verifies, and its manifest survives the way to disk and back."""
    bundle = Bundle.open(chains[1])
    assert (chains[1] / MANIFEST).is_file()
    assert bundle.manifest.products == ((1, ROWS, WIDTH, WIDTH, 12),)
