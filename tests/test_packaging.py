"""The wheel in an empty environment, with ONNX Runtime alone: what a device gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["UV_CONSTRAINT"] = str(ROOT / "constraints.txt")
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and the extra [onnxruntime]."""
    folder = tmp_path_factory.mktemp("device")
    built = run(sys.executable, "-m", "build", "--installer=uv", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    binaries = folder / "venv" / "bin"
    for words in (
        ("venv", "--quiet", "--python", sys.executable, folder / "venv"),
        ("pip", "install", "--quiet", "--python", binaries / "python", f"{wheel}[onnxruntime]"),
    ):
        done = run(sys.executable, "-m", "uv", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return binaries


def test_a_device_has_no_torch_and_little_else(device: Path, tmp_path: Path) -> None:
    listed = run(
        sys.executable, "-m", "uv", "pip", "list", "--python", device / "python", "--format=json", cwd=tmp_path
    )
    names = {row["name"].lower() for row in json.loads(listed.stdout)}
    assert {"numpy", "onnxruntime", "pillow", "typer", "rich"} <= names
    assert not {"torch", "onnx", "openvino", "scikit-image", "scipy"} & names


def test_a_device_finds_and_draws_objects(
    device: Path, dense_bundle: Callable[..., Path], photograph: Path, tmp_path: Path
) -> None:
    bundle, drawn = dense_bundle("retinanet"), tmp_path / "found.png"
    arguments = ("--min-score", "0.1", "--output", drawn, "--json")
    (found,) = json.loads(run(device / "dualtoken", "predict", bundle, photograph, *arguments, cwd=tmp_path).stdout)
    assert found["objects"]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    scenes = ("--data", "scenes", "--limit", "2", "--min-sqnr", "100", "--json")
    (judged,) = json.loads(run(device / "dualtoken", "validate", bundle, *scenes, cwd=tmp_path).stdout)["results"]
    assert judged["reference"] == "golden"
    assert judged["scores"].keys() == {"ap", "ap50", "ap75"}


def test_a_device_predicts_validates_and_benches(
    device: Path, small_bundle: Callable[..., Path], photograph: Path, tmp_path: Path
) -> None:
    bundle = small_bundle()
    predicted = run(device / "dualtoken", "predict", bundle, photograph, "--json", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    (prediction,) = json.loads(predicted.stdout)
    assert len(prediction["guesses"]) == 5
    validated = run(device / "dualtoken", "validate", bundle, "--min-sqnr", "100", "--json", cwd=tmp_path)
    assert validated.returncode == 0, validated.stderr
    assert json.loads(validated.stdout)["results"][0]["reference"] == "golden"
    timed = run(device / "dualtoken", "bench", bundle, "--rounds", "2", "--seconds", "0.1", "--json", cwd=tmp_path)
    assert timed.returncode == 0, timed.stderr
    names = [c["name"] for c in json.loads(timed.stdout)["contestants"]]
    assert names == [bundle.name, "gemm"]


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The error without the quotes that a shell needs around brackets."""
    return done.stderr.replace("'", "")


def test_what_a_device_lacks_is_named_with_its_install(
    device: Path, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    for arguments, extra in (
        (("export", "--variant", "s", "--target", "onnxruntime"), "[export]"),
        (("bench", str(small_bundle()), "--against", "eager", "--rounds", "1", "--seconds", "0.05"), "[export]"),
        (("inspect", str(small_bundle("openvino"))), "[openvino]"),
        (("serve", str(small_bundle())), "[serve]"),
    ):
        done = run(device / "dualtoken", *arguments, cwd=tmp_path)
        assert done.returncode == 3, (arguments, done.stderr)
        assert re.search(
            rf"run: pip install \S+/dualtoken_deploy-[0-9.]+-py3-none-any\.whl{re.escape(extra)}", said(done)
        )
        assert "Traceback" not in done.stderr
    models = run(device / "dualtoken", "models", "--json", cwd=tmp_path)
    assert len(json.loads(models.stdout)) > 10, models.stderr
    listed = run(device / "dualtoken", "targets", "--json", cwd=tmp_path)
    rows = {row["target"]: row for row in json.loads(listed.stdout)}
    assert rows["onnxruntime"]["can_run"] is True
    assert rows["onnxruntime"]["can_export"] is False
    assert rows["openvino"]["can_run"] is False


# what a device imports: everything but the eager model, the exporters, training, and what takes their part
WITH_TORCH = ("models", "deploy", "train", "pipeline", "targets/onnx", "use/compare", "use/diagnose", "use/visualize")
FOLDERS = ("bundle", "data", "tasks", "bench", "use", "machine.py", "numerics.py", "errors.py", "spec.py")
DEVICE = sorted(
    module.with_suffix("").as_posix().replace("/", ".")
    for module in (p.relative_to(ROOT) for p in (ROOT / "dualtoken_deploy").rglob("*.py"))
    if module.parts[1]
    in ("bundle", "data", "tasks", "bench", "use", "machine.py", "numerics.py", "errors.py", "spec.py")
    or (module.parts[1] == "targets" and module.stem in ("table", "precision", "runner", "load", "cuda", "builder"))
    if not module.as_posix().removeprefix("dualtoken_deploy/").startswith(WITH_TORCH)
)


@pytest.fixture(scope="module")
def imported(device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each module of a device says when it is imported there, alone in what it needs; "" where nothing is."""
    program = (
        "import importlib, json, sys\n"
        "said = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "        said[name] = ''\n"
        "    except Exception as error:\n"
        "        said[name] = repr(error)\n"
        "print(json.dumps(said))\n"
    )
    folder = tmp_path_factory.mktemp("import")
    done = run(device / "python", "-W", "error", "-c", program, *DEVICE, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("module", DEVICE)
def test_modules_of_a_device_import_there(imported: dict[str, str], module: str) -> None:
    assert imported[module] == ""
