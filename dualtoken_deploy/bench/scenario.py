"""The worker's side of MLPerf's scenarios: LoadGen asks, and what is loaded answers.

LoadGen (mlcommons-loadgen, Apache-2.0) chooses samples, times queries and judges the run; here is the system under
test that it calls. Its library of samples is the bundle's golden input over and over: no call's time depends on pixels.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Name of the command line -> LoadGen's own. A MultiStream query is of 8 samples, LoadGen's default and MLPerf's rule.
SCENARIOS: Mapping[str, str] = {
    "singlestream": "SingleStream", "multistream": "MultiStream", "offline": "Offline", "server": "Server",
}  # fmt: skip
LONE = ("singlestream", "server")  # a query is one sample
LIBRARY = 1024  # samples, as MLPerf has them for ImageNet
WARM_CALLS = 20  # that say which rate is to be expected
SPARE = 2.0  # times the rate that was measured, prepared for
SERVER_LOAD = 0.8  # of that rate, where no target_qps is given


@dataclass(frozen=True)
class Played:
    """What was asked for, and how many samples ran here."""

    target_qps: float
    samples: int


def play(
    run: Callable[[], object], run_async: Callable[[int], None] | None, batch: int, asked: Mapping[str, Any]
) -> Played:
    """One run of a scenario; LoadGen's log files are in asked["folder"] after it. `run` is a call on `batch` samples,
    `run_async` a number of overlapped ones, for scenario offline.

    asked: {"scenario", "duration_s", "folder", "target_qps" or null, "target_latency_ms"}
    """
    import mlperf_loadgen

    name, rate = str(asked["scenario"]), _rate(run, run_async, batch, str(asked["scenario"]))
    target = float(asked["target_qps"] or rate * (SERVER_LOAD if name == "server" else 1.1))
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, SCENARIOS[name])
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1000 * float(asked["duration_s"]))
    settings.server_target_qps = settings.offline_expected_qps = target
    # of these LoadGen makes its queries beforehand: too few of them would end a run early
    settings.single_stream_expected_latency_ns = max(1, int(1e9 / (SPARE * rate)))
    settings.multi_stream_expected_latency_ns = max(1, int(8e9 / (SPARE * rate)))
    settings.server_target_latency_ns = int(1e6 * float(asked["target_latency_ms"]))
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = str(Path(asked["folder"]))
    log = mlperf_loadgen.LogSettings()
    log.log_output, log.enable_trace = output, False
    system = _System(mlperf_loadgen, run, run_async if name == "offline" else None, batch)
    queued = name == "server"
    with _Line(system.answer) if queued else system as asks:
        under_test = mlperf_loadgen.ConstructSUT(asks.put, lambda: None)
        library = mlperf_loadgen.ConstructQSL(LIBRARY, LIBRARY, lambda _: None, lambda _: None)
        try:
            mlperf_loadgen.StartTestWithLogSettings(under_test, library, settings, log)
        finally:
            mlperf_loadgen.DestroyQSL(library)
            mlperf_loadgen.DestroySUT(under_test)
    if system.error is not None:
        raise system.error
    return Played(target, system.samples)


def _rate(run: Callable[[], object], run_async: Callable[[int], None] | None, batch: int, name: str) -> float:
    """Samples a second, roughly."""
    if name == "offline" and run_async is not None:
        start = time.perf_counter()
        run_async(WARM_CALLS)
        return WARM_CALLS * batch / (time.perf_counter() - start)
    laps = []
    for _ in range(WARM_CALLS):
        start = time.perf_counter()
        run()
        laps.append(time.perf_counter() - start)
    return batch / statistics.fmean(laps)


class _System:
    """The system under test: answers a query in calls of `batch` samples. A call that fails is kept in `error`, and the
    rest of the run is answered at once, since LoadGen would wait for ever."""

    def __init__(
        self, loadgen: Any, run: Callable[[], object], run_async: Callable[[int], None] | None, batch: int
    ) -> None:
        self._loadgen, self._run, self._run_async, self._batch = loadgen, run, run_async, batch
        self.samples = 0
        self.error: Exception | None = None

    def __enter__(self) -> _System:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, query: Sequence[Any]) -> None:
        self.answer(query)

    def answer(self, query: Sequence[Any]) -> None:
        if self._run_async is not None:  # one query of all samples
            self._try(lambda: self._run_async(-(-len(query) // self._batch)))  # type: ignore[misc]
            self._complete(query)
            return
        for start in range(0, len(query), self._batch):
            self._try(self._run)
            self._complete(query[start : start + self._batch])

    def _try(self, call: Callable[[], object]) -> None:
        if self.error is None:
            try:
                call()
            # LoadGen calls from C++, where an exception would end the process without a word: raised after the run
            except Exception as error:  # noqa: BLE001
                self.error = error

    def _complete(self, part: Sequence[Any]) -> None:
        self.samples += len(part)
        self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in part])


class _Line:
    """Queries wait in one line while a thread answers: whoever puts one in is free at once, as scenario server asks."""

    def __init__(self, answer: Callable[[Sequence[Any]], None]) -> None:
        self._answer = answer
        self._waiting: queue.SimpleQueue[Sequence[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> _Line:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def put(self, query: Sequence[Any]) -> None:
        self._waiting.put(list(query))  # LoadGen's own vector is gone when this returns

    def _work(self) -> None:
        while (query := self._waiting.get()) is not None:
            self._answer(query)
