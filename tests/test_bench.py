"""Bench: its arithmetic, who takes part, its ranking of models of known cost, and bundles that fail in it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy import bench_worker
from dualtoken_deploy.bench import Entrant, Setting, _doubts, bench, common_batch, contestant, enter, unique_names
from dualtoken_deploy.bench_process import Job, Series, measure
from dualtoken_deploy.bench_report import Ratio, latency, noise_notes, ratio_of
from dualtoken_deploy.bundle import MANIFEST, Bundle, Manifest, write_bundle
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, UsageError
from dualtoken_deploy.spec import Dim, InputContract, TensorSpec, Tolerance

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


def make_bundle(folder: Path, layers: int = 2, batch: Dim = "batch", **changes: Any) -> Path:
    """A bundle of such a chain; `changes` are fields of its manifest."""
    folder.mkdir(parents=True)
    write_onnx(folder / "model.onnx", layers, batch)
    golden = np.random.default_rng(1).standard_normal((1, ROWS, WIDTH)).astype(np.float32)
    fields: dict[str, Any] = {
        "variant": "chain",
        "options": {},
        "weights": {"source": "random", "seed": 0, "sha256": ""},
        "target": "onnxruntime",
        "precision": "fp32",
        "executed_precision": {},
        "input": InputContract(TensorSpec("image", "float32", "NHC", (batch, ROWS, WIDTH)), "tensor", (ROWS, WIDTH)),
        "outputs": (TensorSpec("logits", "float32", "NC", (batch, WIDTH)),),
        "tolerance": Tolerance(100.0),
        "measured": {},
        "rules": (),
        "operators": {},
        "products": ((1, ROWS, WIDTH, WIDTH, layers),),
        "versions": {},
        "machine": {},
        "command": "",
    }
    logits = np.zeros((1, WIDTH), np.float32)
    write_bundle(folder, Manifest(**fields | changes), {"input": golden, "logits": logits}, ("a", "b"))
    return folder


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles, the second with three times the layers of the first."""
    root = tmp_path_factory.mktemp("bundles")
    return make_bundle(root / "short", layers=4), make_bundle(root / "long", layers=12)


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
    assert row.size_mib == (tmp_path / "b/model.onnx").stat().st_size / 2**20
    assert contestant(entrant(tmp_path, "a"), setting, FOUND, "a").async_images_per_s is None


def test_the_limit_is_at_the_limit_and_only_for_the_cpu(tmp_path: Path) -> None:
    gemm = entrant(tmp_path, "gemm", kind="limit")
    gpu = Setting(batch=1, threads=2, device="cuda", rounds=2, seconds=1.0)
    row = contestant(gemm, gpu, FOUND, "a")
    assert (row.gemm_limit_ratio, row.device, row.size_mib, row.cold_start_ms) == (1.0, "cpu", None, None)
    assert contestant(entrant(tmp_path, "a"), gpu, FOUND, "a").gemm_limit_ratio is None


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
    code = "import sys, dualtoken_deploy.bench, dualtoken_deploy.bench_worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "openvino"} & set(loaded)


# Whole benches


def test_bench_ranks_models_of_known_cost(chains: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime")
    report = bench(chains, threads=1, rounds=3, seconds=0.1)
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
    write_onnx(tmp_path / "model.onnx", 2, 1)
    folder = make_bundle(tmp_path / "ir", batch=1, target="openvino")
    ov.save_model(ov.convert_model(str(tmp_path / "model.onnx")), str(folder / "model.xml"))
    (row, _) = bench([Bundle.open(folder)], **QUICK).contestants
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
        weights={"source": "random", "seed": 0, "sha256": digest},
        input=InputContract(spec, "image", (64, 64)),
    )
    np.savez(folder / "golden.npz", input=np.zeros((1, 64, 64, 3), np.uint8), logits=np.zeros((1, 1000), np.float32))
    found = measure([Job("eager", "eager", str(folder), (), 1, 1, None)], 1, 0.01)["eager"]
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


def test_batches(tmp_path: Path) -> None:
    free = Bundle.open(make_bundle(tmp_path / "free"))
    two = Bundle.open(make_bundle(tmp_path / "two", batch=2))
    three = Bundle.open(make_bundle(tmp_path / "three", batch=3))
    assert common_batch([free], None) == 1
    assert common_batch([free], 8) == 8
    assert common_batch([free, two], None) == 2
    with pytest.raises(UsageError, match=r"two has a fixed batch of 2, but --batch is 4"):
        common_batch([free, two], 4)
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
    with pytest.raises(UsageError, match="dualtoken export"):
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


def test_an_input_that_the_model_refuses_is_the_vendors_error(chains: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    wrong = Path(shutil.copytree(chains[0], tmp_path / "wrong"))
    np.savez(wrong / "golden.npz", input=np.zeros((1, 3, 5), np.float32), logits=np.zeros((1, 2), np.float32))
    with pytest.raises(ConversionError, match=r"^wrong: InvalidArgument"):
        bench([Bundle.open(wrong, verify=False)], **QUICK)


def test_the_fixture_is_a_whole_bundle(chains: tuple[Path, Path]) -> None:
    """The tests above stand on it: it opens, verifies, and its manifest survives the way to disk and back."""
    bundle = Bundle.open(chains[1])
    assert (chains[1] / MANIFEST).is_file()
    assert bundle.manifest.products == ((1, ROWS, WIDTH, WIDTH, 12),)
