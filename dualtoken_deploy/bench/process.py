"""The bench's side of its workers: one process a contestant, interleaved rounds, nothing left running.

Two runtimes in one process slow each other by 2-4x, because their thread pools spin between calls. So each contestant
has a process, one is asked at a time, and the others block on their stdin.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from dualtoken_deploy import errors
from dualtoken_deploy.errors import ConversionError, DualTokenError
from dualtoken_deploy.processes import end_group, how_it_ended, last_words, own_command, own_environment

COMMAND = tuple(own_command("dualtoken_deploy.bench.worker"))
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ORDER_SEED = 0  # of the order within each round: the same in every bench
TURNS = {"latency": 4, "throughput": 4, "server": 8}  # a round's seconds, so many times, count as hung beyond round_s
QUIT_S = 2.0  # a worker that was told to end is killed after this long


@dataclass(frozen=True)
class Limits:
    """How long a worker may take before it counts as hung: to load, and a round beyond what it was asked to time."""

    load_s: float = 600.0
    round_s: float = 120.0


LIMITS = Limits()


@dataclass(frozen=True)
class Job:
    """What one worker is to load. `products` matter to kind "limit", `bundle` to "bundle" and "eager"."""

    name: str
    kind: str
    bundle: str | None
    products: tuple[tuple[int, ...], ...]
    batch: int
    threads: int
    device: str | None
    mode: str = "latency"

    def to_json(self) -> dict[str, Any]:
        return {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "name"}


@dataclass
class Series:
    """What one contestant measured: call times in nanoseconds, a list a round; images/s with requests overlapped."""

    cold_start_ms: float
    first_inference_ms: float
    rounds_ns: list[list[int]] = field(default_factory=list)
    async_images_per_s: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0
    tails_ns: dict[str, list[int]] = field(default_factory=dict)  # by share of the capacity


def measure(
    jobs: Sequence[Job],
    rounds: int,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
    commands: Mapping[str, Sequence[str]] | None = None,
    limits: Limits = LIMITS,
    enough: Callable[[Mapping[str, Series]], bool] | None = None,
) -> dict[str, Series]:
    """Runs every job for `seconds` in each of `rounds`, one at a time, in an order that changes from round to round.

    `enough`: asked after each round whether what was measured suffices; `rounds` are the most then.
    `commands` replaces the worker's command line by name of the job. Raises the worker's own DualTokenError with the
    contestant's name before it, ConversionError for a worker that died, hung or failed in the vendor's code. Whatever
    happens, no process is left.
    """
    order = random.Random(ORDER_SEED)
    with ExitStack() as stack:
        workers, found = {}, {}
        modes = {job.name: job.mode for job in jobs}
        for number, job in enumerate(jobs, 1):
            progress(f"loading {job.name} ({number} of {len(jobs)})")
            worker = stack.enter_context(Worker(job.name, job.threads, (commands or {}).get(job.name, COMMAND)))
            loaded = worker.ask({"do": "load", "job": job.to_json()}, limits.load_s)
            workers[job.name] = worker
            found[job.name] = Series(loaded["cold_start_ms"], loaded["first_inference_ms"])
        for number in range(1, rounds + 1):
            for name in order.sample(list(workers), len(workers)):
                progress(f"round {number}{'' if enough else f' of {rounds}'}: {name}")
                allowed = limits.round_s + TURNS[modes[name]] * seconds
                _round(workers[name], found[name], seconds, allowed)
            if enough is not None and enough(found):
                break
    return found


def _round(worker: Worker, series: Series, seconds: float, allowed_s: float) -> None:
    slow = 100 * series.first_inference_ms / 1e3  # the fewest calls of a round, on a device where one takes seconds
    answer = worker.ask({"do": "round", "seconds": seconds}, allowed_s + slow)
    series.rounds_ns.append(answer["laps_ns"])
    series.peak_rss_mib = answer["peak_rss_mib"]
    if answer["async_images_per_s"] is not None:
        series.async_images_per_s.append(answer["async_images_per_s"])
    for load, waits in answer.get("tails_ns", {}).items():
        series.tails_ns.setdefault(load, []).extend(waits)


class Worker:
    """A worker process inside a `with` block. Leaving the block ends it, by force where it must be."""

    def __init__(self, name: str, threads: int, command: Sequence[str] = COMMAND) -> None:
        self._name, self._threads, self._command = name, threads, command
        self._received = b""

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()  # what it and its libraries print; shown only if it dies
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the worker without a traceback.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=worker_environment(self._threads),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        streams = (self._process.stdin, self._process.stdout)
        try:
            if error is None and self._process.stdin:
                self._process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(QUIT_S)
        finally:
            end_group(self._process)
            for stream in streams:
                if stream:
                    stream.close()
            self._log.close()

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Sends one request and waits up to `limit_s` seconds for the answer. Raises as `measure` does."""
        stdin = self._process.stdin
        if stdin is None:
            raise ValueError("the worker was started without a pipe")
        with suppress(BrokenPipeError):  # it died: reading finds out, and says why
            stdin.write(json.dumps(request).encode() + b"\n")
        line = self._read_line(limit_s)
        odd = f"{self._name}: its bench worker answered {line[:80]!r}, which is no JSON object"
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise ConversionError(odd) from error
        if not isinstance(answer, dict):
            raise ConversionError(odd)
        if "error" in answer:
            raise self._raised(answer["error"])
        return answer

    def _read_line(self, limit_s: float) -> bytes:
        if self._process.stdout is None:
            raise ValueError("the worker was started without a pipe")
        source = self._process.stdout.fileno()
        end = time.monotonic() + limit_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:  # leaving the `with` block ends it
                late = f"no answer from its runtime within {limit_s:g} s, so it was stopped"
                raise ConversionError(f"{self._name}: {late}{last_words(self._log)}")
            chunk = os.read(source, 1 << 16)
            if not chunk:
                raise ConversionError(self._epitaph())
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _raised(self, error: Mapping[str, str]) -> DualTokenError:
        kind = getattr(errors, error["type"], None)
        if not (isinstance(kind, type) and issubclass(kind, DualTokenError)):
            kind = ConversionError  # it comes out of the vendor's runtime: the exit code of a vendor's failure
        return kind(f"{self._name}: {error['message']}")

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(QUIT_S)
        except subprocess.TimeoutExpired:
            end_group(self._process)
            return f"{self._name}: its bench worker closed its output without an answer{last_words(self._log)}"
        return f"{self._name}: its bench worker {how_it_ended(code)}{last_words(self._log)}"


def worker_environment(threads: int) -> dict[str, str]:
    """This process's environment, with every thread pool at `threads` and this very package importable."""
    return own_environment() | dict.fromkeys(THREAD_VARIABLES, str(threads))
