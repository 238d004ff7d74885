"""Labels, paths and messages on a terminal: nothing in them acts on it, and nothing of them is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dualtoken_deploy.cli import main
from dualtoken_deploy.cli.common import progress
from dualtoken_deploy.use.text import printable
from tests.commands import fails
from tests.test_hostile_bundles import harm, written

LABELS = [
    "dog [toy]",
    "[/nope]",
    "[red]",
    ":smile:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\u202eb",
    "c\u2028d",
    "é",
    "猫",
]


@pytest.fixture
def odd_bundle(own_bundle: Path) -> Path:
    """A bundle whose labels a terminal would act on, written past our own check."""
    harm(own_bundle, written("labels.txt", "".join(f"{name}\n" for name in LABELS).encode()))
    return own_bundle


def test_labels_are_shown_and_not_acted_on(
    odd_bundle: Path, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(odd_bundle), str(photograph), "--top", "10"])
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\u2028"}
    for name in ("dog [toy]", "[/nope]", "[red]", ":smile:", r"\x1b[31mred", r"\x1b]0;title\x07", r"a\u202eb", "猫"):
        assert name in shown, shown


def test_a_path_is_shown_and_not_acted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capsys, "inspect", tmp_path / "b\x1b]0;title\x07[/nope]\nerror: forged")
    assert code == 4
    assert r"b\x1b]0;title\x07[/nope]\nerror: forged" in line


def test_progress_takes_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    with progress() as tell:
        tell("reading [/nope] \x1b[31m")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_of_any_encoding(encoding: str, own_bundle: Path, photograph: Path, tmp_path: Path) -> None:
    """A path with letters that the console lacks, and one with bytes that are no text at all."""
    named = tmp_path / "bündel-猫"
    shutil.copytree(own_bundle, named)
    picture = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copyfile(photograph, picture)
    program = [sys.executable, "-m", "dualtoken_deploy"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for shown, code in ((picture, 0), (os.fsencode(named) + b"/\xfe.png", 4)):
        done = subprocess.run([*program, "predict", named, shown], env=environment, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr


def test_escapes_of_text() -> None:
    assert printable("a\tb\nc") == r"a\tb\nc"
    assert printable("a\nb\x7f", lines=True) == "a\nb\\x7f"
    assert printable("\udcff\u2066x\u200dy\U0001f469") == "\\udcff\\u2066x\u200dy\U0001f469"
