"""Runs the command line in this process: a command that has to fail, or one that prints JSON."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy.cli import main


@contextmanager
def _signals_kept() -> Iterator[None]:
    """`main` takes the process's signals; a test gives them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one error line of a command that has to fail."""
    with _signals_kept(), pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert isinstance(caught.value.code, int)
    return caught.value.code, lines[0]


def prints(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """The JSON document of a command that has to work."""
    with _signals_kept():
        main([str(a) for a in arguments])
    return json.loads(capsys.readouterr().out)
