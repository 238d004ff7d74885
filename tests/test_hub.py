"""push and pull against a small server on the loopback (tests/hub.py); the real Hub is never asked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.store import MANIFEST, sha256, write_bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import MissingError, UsageError
from dualtoken_deploy.prove.describe import documents
from dualtoken_deploy.remote import hub as subject
from tests.commands import fails, prints
from tests.hub import READ, WRITE, Hub, Stored, serving_hub

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra [hub] is not installed")
ADDRESS = "hf://org/digits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server with nobody's token but the one that a test sets; Xet, which needs a storage service, is off."""
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "no-token"),
                        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False}.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    with serving_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_pushed_is_pulled_to_the_byte(
    own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = prints(capsys, "push", own_bundle, ADDRESS, "--private", "--json")
    stored = hub.repos["org/digits"]
    assert stored.private
    assert stored.branches["main"] == files_of(own_bundle)
    assert hub.large.keys() >= {sha256(own_bundle / "model.onnx")}  # went as a large file does
    assert pushed["revision"] == stored.sha("main")
    pulled = prints(capsys, "pull", ADDRESS, "--output", tmp_path / "pulled", "--json")
    assert files_of(tmp_path / "pulled") == files_of(own_bundle)  # and no notes of the library
    assert (pulled["files"], pulled["bytes"]) == (pushed["files"], pushed["bytes"])
    assert pulled["revision"] == pushed["revision"]
    assert Bundle.open(tmp_path / "pulled")
    said = capsys.readouterr()
    assert hub.tokens == {WRITE}
    assert WRITE not in said.out + said.err


def test_only_the_bundles_own_files_travel(own_bundle: Path, tmp_path: Path, hub: Hub) -> None:
    (own_bundle / "notes.txt").write_text("mine")
    main(["push", str(own_bundle), ADDRESS])
    files = hub.repos["org/digits"].branches["main"]
    assert "notes.txt" not in files
    files |= {"picture.png": b"p", ".gitattributes": b"g", "model.sig": b"{}"}
    hub.asked.clear()
    main(["pull", ADDRESS, "--output", str(tmp_path / "b")])
    assert (tmp_path / "b" / "model.sig").read_bytes() == b"{}"
    assert not any((tmp_path / "b" / name).exists() for name in ("picture.png", ".gitattributes", ".cache"))
    assert not any("picture.png" in path for _, path in hub.asked)


def test_another_bundle_takes_the_place_of_the_first(own_bundle: Path, hub: Hub, tmp_path: Path) -> None:
    """The model of another target does not stay beside the new one, which no reader would take; the rest stays."""
    main(["push", str(own_bundle), ADDRESS])
    hub.repos["org/digits"].branches["main"]["picture.png"] = b"p"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.xml", "model.bin"):
        (other / name).write_text(name)
    bundle = Bundle.open(own_bundle)
    write_bundle(other, replace(bundle.manifest, target="openvino"), bundle.golden, bundle.labels, documents)
    main(["push", str(other), ADDRESS, "--message", "for OpenVINO"])
    files = hub.repos["org/digits"].branches["main"]
    assert {n for n in files if n.startswith("model.")} == {"model.xml", "model.bin"}
    assert files["picture.png"] == b"p"
    assert hub.repos["org/digits"].commits == [f"{own_bundle.name} by dualtoken-deploy 0.1.0", "for OpenVINO"]
    main(["pull", ADDRESS, "--output", str(tmp_path / "b")])
    assert Bundle.open(tmp_path / "b").manifest.target == "openvino"


def test_branches_and_commits(own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", str(own_bundle), f"{ADDRESS}@trial"])
    stored = hub.repos["org/digits"]
    assert (stored.branches["main"], stored.branches["trial"]) == ({}, files_of(own_bundle))
    for number, revision in enumerate(("trial", stored.sha("trial"))):
        main(["pull", f"{ADDRESS}@{revision}", "--output", str(tmp_path / str(number))])
        assert files_of(tmp_path / str(number)) == files_of(own_bundle)
    capsys.readouterr()
    code, line = fails(capsys, "pull", f"{ADDRESS}@none", "--output", tmp_path / "none")
    assert (code, "has no such branch, tag or commit" in line) == (4, True)
    code, line = fails(capsys, "pull", ADDRESS, "--output", tmp_path / "none")
    assert (code, "has no manifest.json, so it is no bundle" in line) == (4, True)
    assert not (tmp_path / "none").exists()


def flip(path: str, data: bytes) -> bytes:
    return data if path != "model.onnx" else data[:-1] + bytes([data[-1] ^ 1])


def cut(path: str, data: bytes) -> bytes:
    return data if path != "model.onnx" else data[: len(data) // 2]


@pytest.mark.parametrize(("damage", "code"), [(flip, 4), (cut, 3)], ids=["a byte", "half of it"])
def test_what_arrives_damaged_is_not_kept(
    damage: Callable[[str, bytes], bytes], code: int, own_bundle: Path, tmp_path: Path, hub: Hub,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    main(["push", str(own_bundle), ADDRESS])
    capsys.readouterr()
    hub.damage = damage
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # it tries five times
    found, line = fails(capsys, "pull", ADDRESS, "--output", tmp_path / "b")
    assert found == code, line
    assert ADDRESS in line
    assert str(tmp_path) not in line  # no name of a folder that is gone
    assert [p.name for p in tmp_path.iterdir() if p.name != own_bundle.name] == []


def test_a_folder_in_the_way_stays(
    own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(own_bundle), ADDRESS])
    capsys.readouterr()
    hub.asked.clear()
    place = tmp_path / "place"
    place.mkdir()
    (place / "mine").write_text("x")
    for force in ([], ["--force"]):
        code, line = fails(capsys, "pull", ADDRESS, "--output", place, *force)
        assert (code, f"{place} exists" in line) == (2, True)
    assert (place / "mine").read_text() == "x"
    assert hub.asked == []  # said before anything is fetched
    bundle = tmp_path / "older"
    shutil.copytree(own_bundle, bundle)
    (bundle / "labels.txt").write_text("damaged")
    main(["pull", ADDRESS, "--output", str(bundle), "--force"])
    assert files_of(bundle) == files_of(own_bundle)


def test_rights(
    own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, line = fails(capsys, "pull", "hf://org/none", "--output", tmp_path / "b")
    assert (code, "there is no hf://org/none, or nobody without the right token may see it" in line) == (4, True)
    hub.repos["org/digits"] = Stored(private=True)
    for token, pushed in ((READ, "no rights for this"), ("", "nobody without the right token")):
        monkeypatch.setenv("HF_TOKEN", token)
        code, line = fails(capsys, "push", own_bundle, ADDRESS)
        assert pushed in line or "no rights" in line
        assert code in (3, 4)
        assert not token or token not in line
    code, line = fails(capsys, "pull", ADDRESS, "--output", tmp_path / "b")
    assert (code, "log in with `hf auth login`, or set HF_TOKEN" in line) == (4, True)
    assert hub.repos["org/digits"].branches == {"main": {}}


@pytest.mark.parametrize(("status", "code"), [(403, 3), (429, 3), (503, 3), (400, 4)])
def test_what_the_hub_answers_is_one_line(
    status: int, code: int, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.answer = lambda _, __: status
    found, line = fails(capsys, "pull", ADDRESS, "--output", tmp_path / "b")
    assert found == code, line
    assert f"HTTP {status}" in line
    assert not (tmp_path / "b").exists()


def test_no_network(
    own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setenv("HF_ENDPOINT", f"http://me:secret@127.0.0.1:{free.getsockname()[1]}")
        for command in (("pull", ADDRESS, "--output", tmp_path / "b"), ("push", own_bundle, ADDRESS)):
            code, line = fails(capsys, *command)
            assert (code, "cannot be reached" in line, "secret" in line) == (3, True, False)


def test_what_is_no_bundle_is_not_pushed(own_bundle: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/digits"] = Stored(branches={"main": {"data.csv": b"1"}})
    code, line = fails(capsys, "push", own_bundle, ADDRESS)
    assert (code, "holds data.csv and no bundle" in line) == (2, True)
    main(["push", str(own_bundle), ADDRESS, "--force"])
    assert hub.repos["org/digits"].branches["main"].keys() == {"data.csv", *files_of(own_bundle)}
    (own_bundle / "model.onnx").write_bytes(b"x")
    hub.asked.clear()
    code, line = fails(capsys, "push", own_bundle, ADDRESS)
    assert (code, "model.onnx is not the file that was exported" in line) == (4, True)
    assert hub.asked == []


@pytest.mark.parametrize("files", [{"../model.onnx": "0" * 64}, {"a/b": "0" * 64}, {}])
def test_a_manifest_that_reaches_out_is_refused(
    files: dict[str, str], own_bundle: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((own_bundle / MANIFEST).read_text())
    hub.repos["org/digits"] = Stored(branches={"main": {MANIFEST: json.dumps(data | {"files": files}).encode()}})
    code, line = fails(capsys, "pull", ADDRESS, "--output", tmp_path / "b")
    assert (code, "contradicts itself" in line) == (4, True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("address", ["org/digits", "hf://digits", "hf://org/a/b", "hf://org/../x", "hf://org/a@"])
def test_what_is_no_place_on_the_hub(address: str) -> None:
    with pytest.raises(UsageError, match="give hf://ORG/NAME"):
        subject.Repo.parse(address)


def test_without_the_extra_it_is_named(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, line = fails(capsys, "push", own_bundle, ADDRESS)
    assert (code, "needs the extra [hub]" in line) == (3, True)
    with pytest.raises(MissingError):
        subject.pull(ADDRESS, tmp_path / "b")


def test_the_command_itself(own_bundle: Path, tmp_path: Path, hub: Hub) -> None:
    """In a process of its own, with the library as it is imported there: a page of text and no token in it."""
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE}
    said = ""
    for words in (["push", str(own_bundle), ADDRESS], ["-v", "pull", ADDRESS, "--output", str(tmp_path / "b")]):
        command = [sys.executable, "-m", "dualtoken_deploy", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
        said += done.stdout + done.stderr
    assert "pushed 6 files" in said
    assert "pulled 6 files" in said
    assert WRITE not in said
    assert files_of(tmp_path / "b") == files_of(own_bundle)
