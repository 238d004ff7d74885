"""The command line: exit codes, one line for an error, one JSON document, and nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import install_command
from tests.commands import check_schema, fails

COMMANDS = (
    *("models", "targets", "export", "build", "validate", "bench", "inspect", "predict", "serve", "train", "evaluate"),
    *("compare", "diagnose", "visualize"),
)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` takes the process's signals; a test gives them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--variant", "xl"], 2, "valid variants: t, t-mix, s, s-mix"),
        (["--target", "caffe"], 2, "valid targets: onnxruntime, openvino"),
        (["--precision", "int3"], 2, "valid precisions: fp32, fp16"),
        (["--batch", "0"], 2, "neither a number of at least 1 nor 'dynamic'"),
        (["--image-size", "63"], 2, "at least 64"),
        (["--input", "text"], 2, "valid inputs: image, tensor"),
        (["--opset", "19"], 2, "20 to 23"),
        (["--option", "depth=3"], 2, "valid options"),
        (["--option", "depth"], 2, "NAME=VALUE"),
        (["--weights", "none.safetensors"], 4, "no weights at"),
        (["--labels", "none.txt"], 4, "cannot be read"),
        (["--output", "/proc/x/y"], 4, "cannot write"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_exports(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = {"--variant": "t-mix", "--target": "onnx", "--output": str(tmp_path / "b")}
    base |= dict([arguments])
    found, line = fails(capsys, "export", *(part for pair in base.items() for part in pair))
    assert found == code
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    arguments = ("export", "--variant", "t-mix", "--target", "onnx", "--output")
    code, line = fails(capsys, *arguments, own_bundle)
    assert (code, "--force" in line) == (2, True)
    assert (own_bundle / "manifest.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("years")
    code, line = fails(capsys, *arguments, tmp_path / "mine", "--force")
    assert (code, "not a bundle" in line) == (2, True)
    assert (tmp_path / "mine" / "work.txt").read_text() == "years"


def test_no_space_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    code, line = fails(capsys, "export", "--variant", "t-mix", "--target", "onnx", "--output", tmp_path / "b")
    assert (code, "1 MiB free" in line) == (4, True)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own error for a petabyte, and numpy's."""
    for allocate in (torch.empty, np.empty):
        monkeypatch.setattr("dualtoken_deploy.models.registry.build", lambda _, a=allocate: a(1 << 50))
        code, line = fails(capsys, "export", "--variant", "t-mix", "--target", "onnx", "--output", tmp_path / "b")
        assert (code, "not enough memory" in line) == (4, True)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "labels.txt"])
@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_bundle_that_is_not_whole(own_bundle: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = own_bundle / name
    if harm == "remove":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    for command in ("inspect", "validate"):
        code, line = fails(capsys, command, own_bundle)
        assert code == 4
        assert name in line


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"schema_version": "x"}', '{"schema_version": 99}'])
def test_a_manifest_that_is_none(own_bundle: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (own_bundle / "manifest.json").write_text(text)
    code, line = fails(capsys, "inspect", own_bundle)
    assert code == 4
    assert ("upgrade" if "99" in text else "manifest.json") in line


def test_pictures_that_are_none(own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("empty.png", "text.jpg", "absent.png", "."):
        assert fails(capsys, "predict", own_bundle, tmp_path / name)[0] == 4


def test_gates_exit_with_5(small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capsys, "validate", small_bundle(), "--reference", "golden", "--min-sqnr", "500")
    assert (code, "sqnr_db" in line) == (5, True)


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "openvino" else real(n, *a))
    code, line = fails(capsys, "export", "--variant", "t-mix", "--target", "openvino")
    assert code == 3
    assert line.endswith(f"needs the extra [openvino]; run: {install_command('openvino')}")


@pytest.mark.parametrize(
    "arguments",
    [["models"], ["targets"], ["inspect", "B"], ["predict", "B", "P"], ["validate", "B", "--reference", "golden"],
     ["bench", "B", "--rounds", "1", "--seconds", "0.05"]],
    ids=lambda a: a[0],
)  # fmt: skip
def test_json_is_one_document_on_stdout(
    arguments: list[str], small_bundle: Callable[..., Path], photograph: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"B": str(small_bundle()), "P": str(photograph)}
    capfd.readouterr()
    main([*(places.get(a, a) for a in arguments), "--json"])
    document = json.loads(capfd.readouterr().out)
    assert document
    check_schema(arguments[0], document)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_what_was_there(number: int, own_bundle: Path) -> None:
    before = {p.name: p.read_bytes() for p in own_bundle.iterdir()}
    command = [sys.executable, "-m", "dualtoken_deploy", "export", "--variant", "t-mix", "--target", "onnx", "--force"]
    process = subprocess.Popen([*command, "--output", own_bundle], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "tracing" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in own_bundle.iterdir()} == before
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=str)
def test_help_needs_none_of_the_heavy_packages(command: tuple[str, ...]) -> None:
    code = (
        "import sys; from dualtoken_deploy.cli import main\n"
        f"main([*{command!r}, '--help'])\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
