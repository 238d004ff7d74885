"""What a killed process leaves: cleared by the next run, never while its owner lives; names are never absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dualtoken_deploy import staging
from dualtoken_deploy.bundle.store import new_folder
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.files import cache_folder, write_atomically
from tests.commands import fails

FOLDER = """
import sys
from pathlib import Path
from dualtoken_deploy.bundle.store import new_folder
with new_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "model.onnx").write_bytes(b"half")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
FILE = """
import sys
from pathlib import Path
from dualtoken_deploy.files import write_atomically
def write(path):
    path.write_bytes(b"half")
    print(path.name, flush=True)
    sys.stdin.read()
write_atomically(Path(sys.argv[1]), write)
"""


@contextmanager
def process(code: str, final: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One that is at work on `final`, and the name under which it stages."""
    command = [sys.executable, "-c", code, str(final)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            staged = final.parent / running.stdout.readline().strip()
            age(staged)
            yield running, staged
        finally:
            running.kill()


def age(place: Path) -> None:
    """Makes a name older than the time in which it might not be locked yet."""
    os.utime(place, (0, 0))


def run_again(final: Path, code: str) -> None:
    staging._cleared.clear()  # as a new process has it
    if code is FILE:
        write_atomically(final, lambda path: path.write_text("whole"))
        return
    with new_folder(final, force=True) as folder:
        (folder / "model.onnx").write_bytes(b"whole")


@pytest.mark.parametrize("code", [FOLDER, FILE], ids=["folder", "file"])
def test_what_kill_9_left_goes_with_the_next_run(code: str, tmp_path: Path) -> None:
    final = tmp_path / "out.svg"
    with process(code, final) as (running, staged):
        run_again(final, code)
        assert staged.exists(), "its owner was at work"
        running.send_signal(signal.SIGKILL)
        running.wait()
        age(staged)
        if code is FOLDER:
            (final / "model.onnx").unlink()  # an empty folder is replaced; no bundle lies there
        run_again(final, code)
        assert not staged.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out.svg"]


def test_names_of_others_stay(tmp_path: Path) -> None:
    others = (".out.new.notes", ".out.new." + "0" * 16 + ".txt", ".output.new." + "0" * 16, "out.new." + "0" * 16)
    for name in others:
        (tmp_path / name).mkdir()
        age(tmp_path / name)
    run_again(tmp_path / "out", FOLDER)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "out"])


def test_a_folder_put_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    """Where names cannot be exchanged, a kill between two renames leaves the old folder aside and nothing in place."""
    aside = tmp_path / (".out.old." + "a" * 16)
    (aside / "out").mkdir(parents=True)
    (aside / "out" / "precious").write_text("old")
    age(aside)
    staging._cleared.clear()
    with pytest.raises(UsageError, match="exists"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "precious").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def made(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "who").write_text(text)
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
def test_one_folder_takes_the_name_of_another(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    final, new = made(tmp_path / "out", "old"), made(tmp_path / "fresh", "new")
    staging.swap(new, final)
    assert (final / "who").read_text() == "new"
    staging.remove(new)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_between_two_renames_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    final, new = made(tmp_path / "out", "old"), made(tmp_path / "fresh", "new")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        staging.swap(new, final)
    assert (final / "who").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_name_is_never_absent(tmp_path: Path) -> None:
    final, other = made(tmp_path / "out", "0"), made(tmp_path / "other", "1")
    if not staging._exchange(other, final):
        pytest.skip("this file system exchanges no names")
    absent, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                (final / "who").stat()
            except FileNotFoundError:
                absent.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(500):
        staging.swap(other, final)
    stop.set()
    watcher.join()
    assert absent == []


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)]
)
def test_modes_follow_the_umask(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run_again(tmp_path / "out", FOLDER)
        run_again(tmp_path / "file.txt", FILE)
        write_atomically(tmp_path / "w.safetensors", lambda path: save_file({"a": np.zeros(2)}, path))
    finally:
        os.umask(before)
    names = ("out", "out/model.onnx", "file.txt", "w.safetensors")
    found = [oct((tmp_path / name).stat().st_mode & 0o777) for name in names]
    assert found == [oct(folder), oct(file), oct(file), oct(file)]  # safetensors itself leaves 0o600, whatever is asked


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DUALTOKEN_CACHE", raising=False)
    code, line = fails(capsys, "evaluate", "digits", "--data", "digits")
    assert (code, "no home folder" in line) == (4, True)
    monkeypatch.setenv("DUALTOKEN_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
