"""The C++ example is real: OpenVINO's program compiles, and reaches a bundle's golden logits without Python."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy import Bundle, predict
from dualtoken_deploy.models.count import count_params
from dualtoken_deploy.models.registry import random_model

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "cpp"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_openvino, compiled against the libraries of the installed wheel."""
    if missing := [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]:
        pytest.skip(f"the C++ example needs {' and '.join(missing)}")
    openvino = pytest.importorskip("openvino", reason="the extra [openvino] is not installed")
    folder = tmp_path_factory.mktemp("cpp")
    prefix = Path(openvino.__file__).parent / "cmake"
    configured = run("cmake", "-S", SOURCE, "-B", folder, "-DWITH_OPENVINO=ON", f"-DOpenVINO_DIR={prefix}")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", folder)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stderr
    return folder / "run_openvino"


@pytest.fixture(scope="module")
def bundle(small_bundle: Callable[..., Path]) -> Path:
    return small_bundle("openvino")


@pytest.fixture(scope="module")
def raw(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    written = run(sys.executable, SOURCE / "raw.py", bundle, folder)
    assert written.returncode == 0, written.stderr
    return folder


def test_it_reaches_golden(program: Path, bundle: Path, raw: Path) -> None:
    done = run(program, bundle, raw / "image.rgb", raw / "golden.f32", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    logits = Bundle.open(bundle).golden["logits"][0].astype(np.float64)
    weights = np.exp(logits - logits.max())
    best = int(logits.argmax())
    assert done.stdout.splitlines()[0] == f"{weights[best] / weights.sum():.4f}  class {best}"
    assert len(done.stdout.splitlines()) == 6


def test_it_says_what_predict_says(program: Path, bundle: Path, photograph: Path, tmp_path: Path) -> None:
    assert run(sys.executable, SOURCE / "raw.py", bundle, tmp_path, photograph).returncode == 0
    done = run(program, bundle, tmp_path / "image.rgb")
    assert done.returncode == 0
    (prediction,) = predict(bundle, [photograph])
    assert done.stdout.splitlines() == [f"{g.probability:.4f}  {g.label}" for g in prediction.answers]


def test_it_fails_where_golden_is_not_reached_or_files_do_not_fit(program: Path, bundle: Path, raw: Path) -> None:
    wrong = raw / "wrong.f32"
    wrong.write_bytes((np.fromfile(raw / "golden.f32", np.float32) * np.float32(1.1)).tobytes())
    assert run(program, bundle, raw / "image.rgb", wrong, "100").returncode == 5
    for arguments in ((bundle, wrong), (bundle, raw / "absent.rgb"), (bundle,)):
        done = run(program, *arguments)
        assert done.returncode == 4
        assert done.stderr.startswith("error: ")


def test_the_gpu_benchmark_runs_small_on_a_cpu(tmp_path: Path) -> None:
    """Its processes, rounds, limits, verdicts and JSON; the contestants that need no compiling. CUDA was not run."""
    chosen = "eager-fp32,eager-fp16,eager-fp16-graph,products-fp16,copy"
    output = tmp_path / "gpu.json"
    done = run(
        sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--quick", "--contestants", chosen,
        "--batches", "2", "--rounds", "2", "--seconds", "0.02", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report == json.loads(done.stdout)
    base, half, graph, products, copy = report["results"]
    assert [row["name"] for row in report["results"]] == chosen.split(",")
    assert base["sqnr_db"] == 300  # it is its own reference
    assert half["sqnr_db"] > 45
    assert half["samples"] >= 20
    assert base["images_per_s"] == pytest.approx(1e3 * 2 / base["p50_ms"], rel=0.01)
    assert graph["skipped"] == "a CUDA graph needs a CUDA device"
    assert report["machine"]["tensorrt"]["module"] is False
    assert not {"p50_ms", "ratio"} & products.keys()  # a limit answers no picture
    assert half["times_the_limit"].keys() == {"products-fp16", "copy"}
    assert copy["resident_ms"] > 0
    assert report["goals"][0] == "aotinductor-fp16-graph at least 5.0x eager-fp32: not measured"
    assert len(report["table"].splitlines()) == 2 + 5
    moved = report["bytes_to_move"]["2"]
    assert moved["fp32"]["once"] - moved["fp16"]["once"] == 2 * count_params(
        random_model("t-mix", 0, image_size=(64, 64), num_classes=10)
    )
    assert moved["fp32"]["products"] == 2 * moved["fp16"]["products"]


@pytest.fixture
def gpu_summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_the_gpu_benchmark_judges_its_goals_by_hand_counted_rounds(gpu_summary: Any) -> None:
    def row(name: str, *rounds: float, resident: float | None = None) -> dict[str, Any]:
        found = {"name": name, "batch": 1, "sqnr_db": 60.0, "device_mib": None, "peak_rss_mib": 1.0}
        if rounds:
            found["rounds_ms"] = [[ms] * 3 for ms in rounds]
        if resident is not None:
            found["rounds_resident_ms"] = [[resident]] * 2
        return found

    results = gpu_summary.summarise(
        [
            row("eager-fp32", 10.0, 12.0, resident=9.0),
            row("compile-fp16", 4.0, 4.0, resident=3.0),
            row("aotinductor-fp16-graph", 2.0, 2.0, resident=1.0),
            row("products-fp16", resident=0.5),
        ]
    )
    eager, _, graph, products = results
    assert graph["ratio"] == {"median": 5.5, "low": 5.0, "high": 6.0, "to": "eager-fp32"}
    assert eager["times_the_limit"] == {"products-fp16": 18.0}
    assert graph["times_the_limit"] == {"products-fp16": 2.0}
    assert "times_the_limit" not in products
    assert gpu_summary.verdicts(results) == [
        "aotinductor-fp16-graph at least 5.0x eager-fp32: 5.50x, reached",
        "aotinductor-fp16-graph at least 1.2x compile-fp16: 2.00x, reached",
    ]
