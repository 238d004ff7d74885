"""A bounded queue in front of a model's workers: takes what waits, runs it as one batch, hands each its rows.

Merging never waits unless told to (`delay_seconds`): while a worker is busy requests gather, and the next batch takes
as many as fit. What comes in was validated, so that no request can fail its neighbours.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from numpy.typing import NDArray

from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.serve.child import ChildDied
from dualtoken_deploy.serve.errors import ModelFailed, ModelHung, ServeError, Unavailable
from dualtoken_deploy.serve.pool import Launch, Worker

Array = NDArray[Any]

BACKOFF_SECONDS = (0.0, 0.5, 2.0, 10.0)  # before the nth start in a row that failed
FAILURES_UNTIL_REFUSAL = 2  # starts that failed in a row, after which waiting requests are not kept waiting


@dataclass(frozen=True)
class Answer:
    """The outputs of one request and where its time went."""

    outputs: Mapping[str, Array]
    queue_seconds: float
    run_seconds: float
    batch_rows: int


def split_rows(outputs: Mapping[str, Array], counts: Sequence[int]) -> list[Mapping[str, Array]]:
    """The outputs of each of several requests that were run as one batch; of a single one they stay as they are.

    Raises ModelFailed where an output has no row for each row of the inputs.
    """
    if len(counts) == 1:
        return [outputs]
    total = sum(counts)
    for name, value in outputs.items():
        if value.ndim == 0 or len(value) != total:
            raise ModelFailed(f"output {name!r} of shape {list(value.shape)} has no row for each of {total} inputs")
    ends = list(accumulate(counts))
    return [
        {name: value[end - count : end] for name, value in outputs.items()}
        for end, count in zip(ends, counts, strict=True)
    ]


class Observer(Protocol):
    """What a batcher tells of itself."""

    def queued(self, depth: int) -> None: ...

    def ran(self, rows: int, seconds: float) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def workers(self, up: int) -> None: ...

    def replaced(self, reason: str) -> None: ...


@dataclass
class _Item:
    array: Array
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)

    def fail(self, error: ServeError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Batcher:
    """The queue and the workers of one loaded bundle. Made and used on one event loop."""

    def __init__(
        self,
        launch: Launch,
        workers: int,
        merge_rows: int,
        delay_seconds: float,
        observer: Observer,
        start: Callable[[Launch], Awaitable[Worker]] = Worker.start,
    ) -> None:
        self._launch, self._merge_rows, self._delay = launch, merge_rows, delay_seconds
        self._observer, self._start = observer, start
        self._waiting: deque[_Item] = deque()
        self._idle: list[asyncio.Future[None]] = []  # of workers that wait for requests
        self._up = 0
        self._failures = 0
        self._reason: str | None = None
        self._exit_code = BundleError.exit_code
        self._changed = asyncio.Event()
        self._closing = False
        self._tasks = [asyncio.create_task(self._keep_worker()) for _ in range(workers)]

    @property
    def ready(self) -> bool:
        return self._up > 0 and not self._closing

    @property
    def reason(self) -> str | None:
        """Why no worker is up, or None."""
        return None if self._up else self._reason or "its first worker is loading"

    async def wait_ready(self) -> None:
        """Returns when a worker is up. Raises Unavailable with its reason once one could not start."""
        while not self._up:
            if self._failures:
                error = Unavailable(self._reason or "no worker could start")
                error.exit_code = self._exit_code
                raise error
            self._changed.clear()
            await self._changed.wait()

    async def run(self, array: Array) -> Answer:
        """Runs the rows of one request, perhaps among others.

        Raises Unavailable where no worker can be had, ModelFailed and ModelHung where the run went wrong.
        """
        if self._closing or (not self._up and self._failures >= FAILURES_UNTIL_REFUSAL):
            raise Unavailable(f"no worker is up: {self._reason or 'the model is being unloaded'}")
        item = _Item(array, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._observer.queued(len(self._waiting))
        self._wake()
        return await item.answer

    async def close(self) -> None:
        """Ends the workers; requests that still wait are refused."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._refuse("the model is being unloaded")

    async def _keep_worker(self) -> None:
        """One place for a worker: starts one, feeds it, and starts another when it is lost."""
        while True:
            await asyncio.sleep(BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)])
            try:
                worker = await self._start(self._launch)
            except Exception as error:  # noqa: BLE001  # whatever it was, the next start has to be tried
                self._failures += 1
                self._exit_code = getattr(error, "exit_code", BundleError.exit_code)
                self._lost(f"a worker could not start: {error}")
                if not self._up and self._failures >= FAILURES_UNTIL_REFUSAL:
                    self._refuse(self._reason or "")
                continue
            try:
                self._failures = 0
                self._count(+1)
                reason = await self._feed(worker)
            finally:
                self._count(-1)
                await worker.kill()
            self._lost(reason)

    async def _feed(self, worker: Worker) -> str:
        """Runs batches on a worker until it is lost; returns why."""
        worker.exited.add_done_callback(lambda _: self._wake())
        while (items := await self._take_while(worker)) is not None:
            started = time.perf_counter()
            for item in items:
                self._observer.waited(started - item.since)
            try:
                outputs, seconds = await worker.run([item.array for item in items])
            except ModelFailed as error:
                for item in items:
                    item.fail(ModelFailed(str(error)))
            except ChildDied as error:
                for item in items:
                    item.fail(ModelFailed(str(error)))
                return str(error)
            except ModelHung as error:
                for item in items:
                    item.fail(ModelHung(str(error)))
                return str(error)
            except asyncio.CancelledError:
                for item in items:
                    item.fail(Unavailable("the server ended before the run did"))
                raise
            else:
                self._deliver(items, outputs, started, seconds)
        return f"the runtime's process (pid {worker.pid}) died while idle; it is replaced"

    async def _take_while(self, worker: Worker) -> list[_Item] | None:
        """The next batch, or None where the worker's process ends before there is one."""
        while not worker.exited.done():
            if not self._drop_cancelled():
                await self._arrival(None)
            elif (left := self._gathering_left()) > 0:
                await self._arrival(left)
            else:
                return self._take()
        return None

    def _deliver(self, items: list[_Item], outputs: Mapping[str, Array], started: float, seconds: float) -> None:
        total = sum(len(item.array) for item in items)
        self._observer.ran(total, seconds)
        try:
            parts = split_rows(outputs, [len(item.array) for item in items])
        except ModelFailed as error:
            for item in items:
                item.fail(ModelFailed(str(error)))
            return
        for item, part in zip(items, parts, strict=True):
            if not item.answer.done():
                item.answer.set_result(Answer(part, started - item.since, seconds, total))

    def _take(self) -> list[_Item]:
        """The requests of the next batch: the first that waits, and as many more as fit."""
        items = [self._waiting.popleft()]
        rows = len(items[0].array)
        while self._waiting and rows + len(self._waiting[0].array) <= self._merge_rows:
            items.append(self._waiting.popleft())
            rows += len(items[-1].array)
        self._observer.queued(len(self._waiting))
        return items

    async def _arrival(self, seconds: float | None) -> None:
        """Returns when a request came in or a worker was lost, at the latest after `seconds`."""
        woken = asyncio.get_running_loop().create_future()
        self._idle.append(woken)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await woken

    def _wake(self) -> None:
        """Has every worker that waits look at the queue: they are few, and none can be missed."""
        for woken in self._idle:
            if not woken.done():
                woken.set_result(None)
        self._idle.clear()

    def _gathering_left(self) -> float:
        """Seconds for which the next batch may still wait to be filled."""
        if not self._delay or self._rows() >= self._merge_rows:
            return 0.0
        return self._waiting[0].since + self._delay - time.perf_counter()

    def _rows(self) -> int:
        return sum(len(item.array) for item in self._waiting)

    def _drop_cancelled(self) -> int:
        """Forgets requests whose client has gone; how many are left."""
        if any(item.answer.done() for item in self._waiting):
            self._waiting = deque(item for item in self._waiting if not item.answer.done())
        return len(self._waiting)

    def _count(self, change: int) -> None:
        self._up += change
        self._observer.workers(self._up)
        self._changed.set()

    def _lost(self, reason: str) -> None:
        self._reason = reason
        self._observer.replaced(reason)
        self._changed.set()

    def _refuse(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popleft().fail(Unavailable(f"no worker is up: {reason}"))
