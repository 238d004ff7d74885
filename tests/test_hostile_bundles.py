"""Bundles as a stranger might hand them to us: each is refused with one line, and none of its code runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy import Bundle, load_runner, predict
from dualtoken_deploy.bundle.blocks import Build, Origin
from dualtoken_deploy.bundle.labels import format_labels, parse_labels, read_labels
from dualtoken_deploy.bundle.store import sha256, write_bundle
from dualtoken_deploy.bundle.trust import ALLOW, remember
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError, DualTokenError, InputError
from dualtoken_deploy.models.own_sources import source_of
from dualtoken_deploy.serve.repository import check_servable
from dualtoken_deploy.targets.table import get_target
from tests.commands import fails

Change = Callable[[Path, dict[str, Any]], None]


def harm(folder: Path, change: Change) -> None:
    """Changes a bundle and makes its manifest's hashes right again, as one who means harm would."""
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(folder, data)
    for name in data["files"]:
        if (folder / name).is_file():
            data["files"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")


def written(name: str, data: bytes) -> Change:
    def change(folder: Path, _: dict[str, Any]) -> None:
        (folder / name).write_bytes(data)

    return change


def forget(*names: str) -> Change:
    def change(_: Path, data: dict[str, Any]) -> None:
        for name in names:
            del data["files"][name]

    return change


def linked(folder: Path, _: dict[str, Any]) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes((folder / "golden.npz").read_bytes())
    (folder / "golden.npz").unlink()
    (folder / "golden.npz").symlink_to(outside)


def piped(folder: Path, _: dict[str, Any]) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


def unnamed(folder: Path, _: dict[str, Any]) -> None:
    (folder / "model.engine").write_bytes(b"another model")


HARMED: dict[str, tuple[Change, str]] = {
    "the model is not named": (forget("model.onnx"), "has model.onnx, which manifest.json does not name"),
    "a second model": (unnamed, "has model.engine, which manifest.json does not name"),
    "golden is not named": (forget("golden.npz"), "names no golden.npz"),
    "labels are not named": (forget("labels.txt"), "names no labels.txt"),
    "a link out of the folder": (linked, "golden.npz is a link out of the bundle"),
    "a pipe": (piped, "model.onnx is no regular file"),
    "too few labels": (written("labels.txt", b"one\ntwo\n"), "2 names for 10 classes"),
    "too many labels": (written("labels.txt", b"x\n" * 11), "11 names for 10 classes"),
    "labels in Latin-1": (written("labels.txt", b"\xe9\n" * 10), "no UTF-8 text"),
}


@pytest.mark.parametrize("name", HARMED)
def test_what_is_not_whole_does_not_open(name: str, own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, reason = HARMED[name]
    harm(own_bundle, change)
    code, line = fails(capsys, "inspect", own_bundle)
    assert (code, reason in line) == (4, True), line


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_golden_that_is_none(data: bytes, own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm(own_bundle, written("golden.npz", data))
    code, line = fails(capsys, "validate", own_bundle, "--reference", "golden")
    assert (code, "golden.npz cannot be read" in line) == (4, True), line


def test_golden_of_another_shape(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(folder: Path, _: dict[str, Any]) -> None:
        np.savez(folder / "golden.npz", input=np.zeros((1, 8, 8, 3), np.uint8), logits=np.zeros((1, 10), np.float32))

    harm(own_bundle, change)
    code, line = fails(capsys, "validate", own_bundle, "--reference", "golden")
    assert (code, "the manifest says uint8 of 1x64x64x3" in line) == (4, True), line


# Labels


@pytest.mark.parametrize("odd", [*"\u2028\u2029\x85\x0b\x0c\x1c\x1e\r\x1b\x00\t\ufeff"])
def test_no_name_has_a_separator_or_a_control_character(odd: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"line 2 has the character U\\+{ord(odd):04X}"):
        format_labels(("cat", f"big{odd}dog", "cow"))
    (tmp_path / "labels.txt").write_bytes(f"cat\nbig{odd}dog\ncow\n".encode())
    with pytest.raises(InputError, match="line 2 has the character"):
        read_labels(tmp_path / "labels.txt")


def test_only_a_line_feed_ends_a_name() -> None:
    """A bundle of before may have these; its later names keep their places."""
    assert parse_labels("cat\nbig\u2028dog\nc\x85ow\n".encode()) == ("cat", "big\u2028dog", "c\x85ow")
    assert parse_labels(b"\xef\xbb\xbfcat\r\ndog\r\n") == ("cat", "dog")
    assert parse_labels(b"") == ()


# Code that a bundle brings along


def other_user(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Somebody who has made nothing, and allows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("DUALTOKEN_CACHE", raising=False)
    monkeypatch.delenv(ALLOW, raising=False)


def native(folder: Path, data: dict[str, Any]) -> None:
    (folder / "model.onnx").rename(folder / "model.pt2")
    del data["files"]["model.onnx"]
    build = {"device": "cpu", "system": "plan9-vax", "torch": "0.1"}  # refused next, so that nothing is ever loaded
    data.update(target="aotinductor", files=data["files"] | {"model.pt2": ""}, build=build)


def test_native_code_of_others_is_refused(
    own_bundle: Path, photograph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other_user(monkeypatch, tmp_path / "cache")
    harm(own_bundle, native)
    bundle = Bundle.open(own_bundle)
    for use in (lambda: load_runner(bundle), lambda: predict(bundle, [photograph]), lambda: check_servable(bundle)):
        with pytest.raises(BundleError, match=r"model\.pt2 is native code.*--allow-native"):
            use()
    commands: tuple[tuple[str | Path, ...], ...] = (("predict", own_bundle, photograph), ("inspect", own_bundle))
    for command in commands:
        code, line = fails(capsys, *command)
        assert (code, "--allow-native" in line) == (4, True)
    with monkeypatch.context() as patch:
        patch.setenv(ALLOW, "0")  # taken back when the context ends, what the command sets as well
        code, line = fails(capsys, "predict", own_bundle, photograph, "--allow-native")
        assert (code, "plan9-vax" in line) == (3, True), line
    with pytest.raises(BundleError, match="--allow-native"):
        load_runner(bundle)
    remember(bundle.manifest)  # what the export of this user does
    with pytest.raises(DualTokenError, match="plan9-vax"):
        load_runner(bundle)


def test_what_this_user_writes_is_remembered(own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_user(monkeypatch, tmp_path / "cache")
    opened = Bundle.open(own_bundle)
    (own_bundle / "model.onnx").rename(own_bundle / "model.pt2")
    build = Build(details={"device": "cpu", "system": "plan9-vax", "torch": "0.1"})
    draft = replace(opened.manifest, target="aotinductor", build=build, files={})
    write_bundle(own_bundle, draft, opened.golden, opened.labels)
    with pytest.raises(DualTokenError, match="plan9-vax"):
        load_runner(own_bundle)
    harm(own_bundle, written("model.pt2", b"another"))
    with pytest.raises(BundleError, match="--allow-native"):
        load_runner(own_bundle)


def test_a_user_may_move_what_is_his(own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle, the cache, DUALTOKEN_CACHE in one shell and not in another, and this program to a later version."""
    home = tmp_path / "home"
    other_user(monkeypatch, home / "cache")

    def refused() -> bool:
        try:
            load_runner(own_bundle)
        except BundleError as error:
            assert "--allow-native" in str(error)  # noqa: PT017
            return True
        except DualTokenError as error:
            assert "plan9-vax" in str(error)  # noqa: PT017
        return False

    harm(own_bundle, native)
    assert refused()
    remember(Bundle.open(own_bundle).manifest)
    assert not refused()
    with monkeypatch.context() as shell:
        shell.setenv("DUALTOKEN_CACHE", str(tmp_path / "fast"))
        assert not refused(), "made in a shell without DUALTOKEN_CACHE"
    own_bundle = own_bundle.rename(tmp_path / "elsewhere")
    home.rename(tmp_path / "moved")
    assert refused(), "the cache is gone"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "moved" / "cache"))
    assert not refused(), "the cache was moved"
    harm(own_bundle, lambda _, data: data.update(later={"field": 1}, command="dualtoken 9"))
    assert not refused(), "what a later version adds is not what runs"
    with monkeypatch.context() as shell:
        shell.setenv("DUALTOKEN_CACHE", str(tmp_path / "own"))
        harm(own_bundle, written("model.pt2", b"of his as well"))
        remember(Bundle.open(own_bundle).manifest)
    assert not refused(), "made in a shell with DUALTOKEN_CACHE"


def test_python_that_a_manifest_names_is_not_run(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_user(monkeypatch, tmp_path / "cache")
    ran = tmp_path / "ran"
    (tmp_path / "net.py").write_text(f"def make():\n    open({str(ran)!r}, 'w')\n")
    origin = Origin(kind="reference", name="net", reference=f"{tmp_path / 'net.py'}:make")
    manifest = replace(Bundle.open(own_bundle).manifest, origin=origin)
    with pytest.raises(BundleError, match=r"net\.py:make; --reference golden runs none.*--allow-native"):
        source_of(manifest)
    assert not ran.exists()


# The manifest against the model's own inputs and outputs


def another(place: tuple[str | int, ...], value: Any) -> Change:
    """Sets a value of the manifest, and golden to what the manifest then says."""

    def change(_: Path, data: dict[str, Any]) -> None:
        *above, last = place
        at: Any = data
        for key in above:
            at = at[key]
        at[last] = value

    return change


SHAPE = ("input", "tensor", "shape")
LIES: dict[str, tuple[Change, str]] = {
    "an input's name": (
        another(("input", "tensor", "name"), "pixels"),
        "image, the manifest says pixels",
    ),
    "an input's shape": (another((*SHAPE, 0), 2), "the input image of"),
    "an open batch": (another((*SHAPE, 0), "batch"), "the input image of"),
    "an output's name": (another(("outputs", 0, "name"), "scores"), "logits, the manifest says scores"),
    "an output's dtype": (another(("outputs", 0, "dtype"), "int64"), "the output logits of"),
    "an output's axes": (another(("outputs", 0, "shape"), [1, 1, 10]), "the output logits of"),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "coreml"])
@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_tells_of_another_model_is_not_run(
    name: str, target: str, small_bundle: Callable[..., Path], photograph: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its hashes are right, and it agrees with itself: the model alone can say that it is wrong."""
    if (name, target) == ("an output's dtype", "coreml"):
        pytest.skip("Core ML computes in a dtype of its own, and its results are made float32")
    if get_target(target).missing():
        pytest.skip(f"the extra [{target}] is not here")
    change, reason = LIES[name]
    copy = tmp_path / "bundle"
    shutil.copytree(small_bundle(target), copy)
    harm(copy, change)
    code, line = fails(capsys, "predict", copy, photograph)
    assert (code, reason in line, "the manifest says" in line) == (4, True, True), line


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_graph_that_loads_and_fails_when_it_runs_is_one_line(
    target: str, small_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The brightest pixel and two say a row of a table that has two, or a shape that ten numbers do not have."""
    import onnx
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["image"], ["wide"], to=onnx.TensorProto.INT64),
        helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=0),
        helper.make_node("Add", ["most", "two"], ["side"]),
        helper.make_node("Unsqueeze", ["side", "zero"], ["sides"]),
    ]
    if target == "onnxruntime":
        nodes.append(helper.make_node("Gather", ["table", "sides"], ["logits"]))
    else:  # which answers with zeros where there is no such row
        nodes.append(helper.make_node("Concat", ["sides", "ten"], ["shape"], axis=0))
        nodes.append(helper.make_node("Reshape", ["numbers", "shape"], ["logits"]))
    held = {"zero": np.zeros(1, np.int64), "ten": np.array([10]), "two": np.array(2)}
    held |= {"numbers": np.ones(10, np.float32), "table": np.ones((2, 10), np.float32)}
    graph = helper.make_graph(
        nodes,
        "fails",
        [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, (1, 64, 64, 3))],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, (1, 10))],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder = tmp_path / "bundle"
    shutil.copytree(small_bundle(target), folder)

    def change(folder: Path, _: dict[str, Any]) -> None:
        if target == "onnxruntime":
            onnx.save(model, folder / "model.onnx")
            return
        import openvino as ov

        read = ov.Core().read_model(model.SerializeToString())
        ov.save_model(read, folder / "model.xml", compress_to_fp16=False)

    harm(folder, change)
    code, line = fails(capsys, "inspect", folder)
    assert code == 4
    assert "cannot run" in line


def test_validate_asks_of_golden_what_export_asked(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a minimum of its own; another is another."""
    bundle = Bundle.open(own_bundle)
    noise = np.random.default_rng(0).normal(size=bundle.golden["logits"].shape).astype(np.float32)
    golden = {**bundle.golden, "logits": bundle.golden["logits"] + noise}
    write_bundle(own_bundle, bundle.manifest, golden, bundle.labels)
    code, line = fails(capsys, "validate", own_bundle)
    assert code == 5
    assert f"dB on golden, and its export asks for {bundle.manifest.tolerance.sqnr_db:g}" in line
    main(["validate", str(own_bundle), "--min-sqnr", "-30"])
