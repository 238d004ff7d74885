"""Runs the command line in this process: a command that has to fail, or one that prints JSON."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy.cli import main

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


@contextmanager
def _signals_kept() -> Iterator[None]:
    """`main` takes the process's signals; a test gives them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
    """The JSON document of a command that has to work; it fits the schema in docs/schemas."""
    with _signals_kept():
        main([str(a) for a in arguments])
    document = json.loads(capsys.readouterr().out)
    check_schema(str(arguments[0]), document)
    return document


def check_schema(command: str, document: Any) -> None:
    """Raises ValidationError where a command's document is not what docs/schemas says."""
    if importlib.util.find_spec("jsonschema") is None:  # test_manners.py skips visibly then
        return
    import jsonschema

    jsonschema.validate(document, json.loads((SCHEMAS / f"{command}.schema.json").read_text(encoding="utf-8")))
