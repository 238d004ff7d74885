"""What a command says while it works: how far it is and what is left, on stderr; nothing of third parties among it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from dualtoken_deploy.use.text import printable

LINE_EVERY_S = 10.0  # where stderr is no terminal
GUESS_AFTER = 0.05  # of a count: before that its rate says little
_COUNT = re.compile(r"(?<![\d.])(\d+)\s*(?:/|of)\s*(\d+)")  # whole ones: training says itself what is left


@dataclass
class Manners:
    """How much is said: -q leaves progress and notes out, -v lets third parties speak and shows tracebacks."""

    quiet: bool = False
    verbose: bool = False


MANNERS = Manners()
_own: list[IO[str]] = []  # the streams to the real stderr of the contexts of hushed(), the innermost last


def say(text: str) -> None:
    """A line on stderr."""
    print(printable(text, lines=True), file=_own[-1] if _own else sys.stderr, flush=True)


def remark(text: str) -> None:
    """A note or a warning on stderr; not with -q."""
    if not MANNERS.quiet:
        say(text)


@dataclass
class Pace:
    """What is left of a step, from the count in its texts ("evaluating 16/360"): a step is its text without numbers."""

    clock: Callable[[], float] = time.monotonic
    step: str = ""
    began: float = 0.0
    first: int = 0
    share: float | None = field(default=None)
    _done: int = field(default=0, repr=False)

    def add(self, text: str) -> bool:
        """Takes a text; whether it begins a new step."""
        step, new = step_of(text), False
        counts = _COUNT.findall(text)  # the last is of what is done now, others of what it is a part of
        done, total = map(int, counts[-1]) if counts else (0, 0)
        if step != self.step or done < self._done:  # a count that falls is one that begins again
            self.step, self.began, self.first, new = step, self.clock(), done, True
        self.share = None if total <= 0 else min(done / total, 1.0)
        self._done, self._total = done, total
        return new

    def left(self) -> str:
        """Words on the time that is left; "" where nothing is known."""
        if self.share is None or self._done <= self.first or self.share < GUESS_AFTER:
            return ""
        seconds = (self.clock() - self.began) / (self._done - self.first) * (self._total - self._done)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def step_of(text: str) -> str:
    """A text without its numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", _COUNT.sub("#", text))


class Lines:
    """Progress for a file or a pipe: each step once, then a line every LINE_EVERY_S at most.

    Two that count at the same time, one within the other, are a step each however often they take turns.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._last = write, clock, 0.0
        self._plain, self._counting = Pace(clock), dict[str, Pace]()

    def __call__(self, text: str) -> None:
        pace = self._counting.setdefault(step_of(text), Pace(self._clock)) if _COUNT.search(text) else self._plain
        new, now = pace.add(text), self._clock()
        if new or now - self._last >= LINE_EVERY_S:
            self._last = now
            self._write(f"{text}{pace.left()}")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Tells what happens now: a live line with its count, its time and what is left on a terminal, lines elsewhere.

    Until its end nothing that third parties write reaches the terminal, unless -v was given.
    """
    with hushed() as err:
        if MANNERS.quiet:
            yield lambda _: None
            return
        from rich.console import Console

        console = Console(file=err)
        if not console.is_terminal:
            yield Lines(say)
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
            task, pace = live.add_task("starting", total=None), Pace()

            def tell(text: str) -> None:
                pace.add(text)
                total, done = (None, 0.0) if pace.share is None else (1.0, pace.share)
                live.update(task, description=printable(f"{text}{pace.left()}"), total=total, completed=done)

            yield tell


@contextmanager
def hushed() -> Iterator[IO[str]]:
    """Gives a stream to the real stderr, and keeps what anybody else writes to descriptors 1 and 2 in a file.

    Native libraries print past Python, so only the descriptors themselves help. An error that is not ours brings what
    was kept back to stderr. With -v, and where Python's streams are not those descriptors, nothing is kept.
    """
    if MANNERS.verbose or not _plain():
        yield sys.stderr
        return
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    with (
        tempfile.TemporaryFile() as kept,
        os.fdopen(os.dup(err), "w", encoding=sys.stderr.encoding, errors="backslashreplace") as own,
    ):
        os.dup2(kept.fileno(), 1)
        os.dup2(kept.fileno(), 2)
        _own.append(own)
        failed = False
        try:
            yield own
        except Exception as error:
            failed = not hasattr(error, "exit_code")
            raise
        finally:
            _own.pop()
            _restore(out, err)
            if failed:
                kept.seek(0)
                sys.stderr.write(kept.read().decode(errors="backslashreplace"))


def _plain() -> bool:
    with suppress(Exception):  # a test's or a notebook's stream has no descriptor, or another
        return sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    return False


def _restore(out: int, err: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
