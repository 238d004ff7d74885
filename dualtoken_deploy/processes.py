"""What both ends of a process of our own need: this package importable there, a line of its own, an end for certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO


def own_command(module: str) -> list[str]:
    """Runs a module of this package. -P: or else a numpy.py in the user's current folder would be imported."""
    return [sys.executable, "-P", "-m", module]


def own_environment() -> dict[str, str]:
    """This process's environment, with this very package importable."""
    environment = dict(os.environ)
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # run from a checkout, from whatever folder
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def own_streams() -> tuple[TextIO, TextIO]:
    """Takes stdin and stdout for the protocol; what a library prints goes to stderr, and it reads nothing."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests, answers


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the leader of a session and whatever it started, and reaps it; once it is reaped its number may be
    another's."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of one that ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def how_it_ended(code: int) -> str:
    """ "was killed by SIGSEGV" or "ended with code 1"."""
    if code >= 0:
        return f"ended with code {code}"
    hint = "; is there enough memory?" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def last_words(log: IO[bytes]) -> str:
    """The last line of a log in parentheses, or nothing."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f" (its last line: {lines[-1][:200]})" if lines else ""
