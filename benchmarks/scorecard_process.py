"""Where the scorecard's commands run: each in a process of its own, or many in one that shares what they all need.

A command of its own is what a user types. Cells of one model share imports, decoded photographs, torch's table of ONNX
operators, traced and simplified graphs and LiteRT's conversions: what the command line's own `main` answers is the
same, and takes a fraction of the time (tests/test_scorecard.py holds both against each other).
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import psutil

Answer = tuple[int, Any, str]  # exit code, the JSON that was printed, the line of the error
FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)  # of a program, not from outside


class GivenUpError(Exception):
    """A cell took more CPU than it may, or its process fell: there is nothing to say of what it would have given."""


class Run(Protocol):
    """Runs `dualtoken`'s words. `kind`: "own" or "shared", whose CPU seconds `used` counts."""

    kind: str

    def __call__(self, words: Sequence[str]) -> Answer: ...
    def used(self) -> float: ...


def used_by(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


class Own:
    """Every command in a process of its own."""

    kind = "own"

    def __call__(self, words: Sequence[str]) -> Answer:
        command = [sys.executable, "-m", "dualtoken_deploy", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise SystemExit(f"dualtoken {words[0]} was ended by signal {-done.returncode}; that says nothing")
        return answer(done.returncode, done.stdout, done.stderr)

    def used(self) -> float:
        return used_by(resource.RUSAGE_CHILDREN)


def answer(code: int, out: str, err: str) -> Answer:
    errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
    try:
        said = json.loads(out)
    except ValueError:
        said = {}
    return code, said, errors[-1] if errors else (err.strip().splitlines() or ["no message"])[-1]


class Shared:
    """Commands in one process, until `fresh`; `kept`: a folder for traced graphs. `limit_s`: of CPU, from `begin` on,
    beyond which the process is ended and GivenUpError raised."""

    kind = "shared"

    def __init__(self, kept: Path, limit_s: float | None = None) -> None:
        self.kept, self.limit_s = kept, limit_s
        self._used = 0.0
        self._limit: float | None = None
        self._process: Any = None
        self._pipe: Connection | None = None

    def begin(self) -> None:
        """A cell begins, with the whole limit before it."""
        self._limit = None if self.limit_s is None else self._used + self.limit_s

    def __call__(self, words: Sequence[str]) -> Answer:
        pipe = self._pipe or self._start()
        pipe.send(list(words))
        before = self._spent()
        while not pipe.poll(1.0):
            if self._limit is not None and self._used + self._spent() - before > self._limit:
                self._used += self._spent() - before
                self.fresh()
                raise GivenUpError(f"not done in {self.limit_s:.0f} s of CPU")
        try:
            code, out, err, used = pipe.recv()
        except EOFError:
            self._process.join()
            number = -(self._process.exitcode or 0)
            self.fresh()
            if number in FAULTS:
                raise GivenUpError(f"the process that made it ended itself by signal {number}") from None
            raise SystemExit(f"dualtoken {words[0]} was ended (signal {number}); that says nothing") from None
        self._used += used
        return answer(code, out, err)

    def used(self) -> float:
        return self._used

    def fresh(self) -> None:
        """Ends the process; the next command starts another."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(self._process.pid)
                for child in own.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                own.kill()
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.kept), daemon=False)
        self._process.start()
        theirs.close()
        return self._pipe

    def _spent(self) -> float:
        """CPU seconds of the process and of those it started, the ended ones too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            times = [own.cpu_times()]
            for child in own.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times.append(child.cpu_times())
            return float(sum(sum(t[:4]) for t in times))
        return 0.0


def _serve(pipe: Connection, kept: Path) -> None:
    """The process: answers words until the other side is gone."""
    from dualtoken_deploy.cli.main import main

    with sharing(kept), contextlib.suppress(EOFError):
        while True:
            words = pipe.recv()
            before = used_by(resource.RUSAGE_SELF) + used_by(resource.RUSAGE_CHILDREN)
            code, out, err = in_process(main, words)
            used = used_by(resource.RUSAGE_SELF) + used_by(resource.RUSAGE_CHILDREN) - before
            pipe.send((code, out, err, used))


def in_process(main: Any, words: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line's own entry point."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    given = [*words, "--json"]
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["dualtoken", *given]),
    ):
        try:
            main(given)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # noqa: BLE001 - what Python ends with 1 and a traceback
            code = 1
            traceback.print_exc()
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def sharing(kept: Path) -> Iterator[None]:
    """What the commands of a process have in common is made once, as in the tests: see tests/traces.py."""
    from tests.traces import replacements

    kept.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for owner, name, shared in replacements(kept):
            stack.enter_context(mock.patch.object(owner, name, shared))
        yield
