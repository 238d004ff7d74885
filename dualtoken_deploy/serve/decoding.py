"""The server's end of the decoders: hands each job to a process of its own, and ends one that takes too long.

At most `decoders` run at once, the rest waits in order. Large jobs have a lane of their own: at most half of the
decoders are theirs, at a lower priority, so that many of them keep neither small ones nor tensors waiting for long. A
place that a request holds is held until its job is gone: a client that leaves does not make room for another while its
picture is still being decoded.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import logs
from dualtoken_deploy.serve.child import Child, ChildDied
from dualtoken_deploy.serve.errors import BadRequest, ModelFailed, Overloaded, Unavailable
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.settings import Settings

START_SECONDS = 60.0  # of a decoder: it imports numpy and Pillow
HURRIED_SECONDS = 2.0  # of a job, while others wait; an ordinary picture of 24 megapixels takes a half
LARGE_PIXELS, LARGE_BYTES = 2_000_000, 2**20  # a job of more takes longer than some 30 ms
LARGE_NICE = 5  # about a fourth of a core that others want as well
KEPT_BYTES = 4 * 2**20  # of shared memory that a decoder keeps between jobs
MEMORY_BYTES = 256 * 2**20  # of a decoder, beside its pixels
MEMORY_BYTES_A_PIXEL = 24  # a transparent picture, its white ground and both as RGB, where it is converted


WHAT: Mapping[str, str] = MappingProxyType(
    {
        "picture": "this picture",
        "request": "this request",
        "message": "this message",
        "outputs": "what the model found in this picture",
    }
)
MEND: Mapping[str, str] = MappingProxyType(
    {
        "picture": "save it in an ordinary form",
        "request": "send the tensor as binary data",
        "message": "send the tensor in raw_input_contents",
        "outputs": "send a smaller one",
    }
)


class Decoder:
    """A started decoder and the memory that it shares."""

    def __init__(self, child: Child, memory: int) -> None:
        self._child, self._memory = child, memory
        self._shared: mmap.mmap | None = None

    @staticmethod
    async def start(max_pixels: int) -> Decoder:
        """A decoder that has imported what it needs: no job's time goes by meanwhile. Raises Unavailable."""
        memory = os.memfd_create("dualtoken-picture")
        try:
            task = {"memory": memory, "bytes": MEMORY_BYTES + MEMORY_BYTES_A_PIXEL * max_pixels}
            child = await Child.start("dualtoken_deploy.serve.decoder", "a decoder", task, (memory,))
        except OSError as error:
            os.close(memory)
            raise Unavailable(f"no decoder could be started ({error})") from error
        decoder = Decoder(child, memory)
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.receive()
        except (ChildDied, TimeoutError) as error:
            await decoder.close()
            raise Unavailable(f"no decoder could be started ({error or 'it took too long'})") from error
        except BaseException:
            await asyncio.shield(decoder.close())
            raise
        return decoder

    def lower(self) -> None:
        """Takes less of a core that others want as well, from now on: a priority is not given back."""
        with suppress(OSError):  # it ended meanwhile
            os.setpriority(os.PRIO_PROCESS, self._child.pid, LARGE_NICE)

    @property
    def alive(self) -> bool:
        return not self._child.exited.done()

    async def run(self, job: Mapping[str, Any], data: bytes, room: int) -> tuple[dict[str, Any], Array | None]:
        """The answer of one job, and its tensor of at most `room` bytes if it has one. Raises ChildDied."""
        shared = self._fit(max(room, len(data)))
        shared[: len(data)] = data
        answer, _ = await self._child.ask({**job, "size": len(data), "room": len(shared)})
        if "dtype" not in answer:
            return answer, None
        array: Array = np.ndarray(answer["shape"], answer["dtype"], shared).copy()
        return answer, array

    async def close(self) -> None:
        await self._child.kill()
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _fit(self, size: int) -> mmap.mmap:
        """The shared memory, made as large as the job needs; what a large one took goes back."""
        want = max(size, KEPT_BYTES)
        if self._shared is None or len(self._shared) != want:
            if self._shared is not None:
                self._shared.close()
                os.ftruncate(self._memory, 0)
            os.ftruncate(self._memory, want)
            self._shared = mmap.mmap(self._memory, want)
        return self._shared


class Decoders:
    """The decoders of a server. The event loop's alone; each is started when it is first needed."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._seconds = settings.decode_seconds
        self._max_pixels = int(settings.max_megapixels * 1_000_000)
        self._formats = settings.picture_formats
        self._metrics = metrics
        self._places = asyncio.Semaphore(settings.decoders)
        self._large = asyncio.Semaphore(max(1, settings.decoders // 2))
        self._idle: dict[bool, list[Decoder]] = {False: [], True: []}  # those for large jobs are others
        self._busy: dict[asyncio.Timeout, tuple[float, bool]] = {}  # by its deadline: when a job began, and its lane
        self._waiting = {False: 0, True: 0}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def picture(
        self, data: bytes, content_type: str, contract: Mapping[str, Any], room: int
    ) -> tuple[Array, tuple[int, int]]:
        """A picture, or the one in a form, as a row of the contract, of `room` bytes, and its (h, w). Raises as `run`
        does."""
        job = {"kind": "picture", "max_pixels": self._max_pixels, "formats": self._formats}
        found, array = await self.run({**job, "type": content_type, "contract": contract}, data, room)
        assert array is not None  # noqa: S101  # that is what this job ends with
        return array, (found["size"][0], found["size"][1])

    async def run(self, job: Mapping[str, Any], data: bytes, room: int = 0) -> tuple[dict[str, Any], Array | None]:
        """Has a job done. Raises BadRequest for what the job's data is to blame for, Overloaded where it took too long
        for those that wait, Unavailable where no decoder can be started, ModelFailed where one failed.

        Outputs are never large: there are at most as many as workers and decoders.
        """
        large = len(data) > LARGE_BYTES and job["kind"] != "outputs"
        answer, array = await self._in_lane({**job, "quick_pixels": LARGE_PIXELS}, data, room, large)
        if answer.get("larger"):  # a picture of few bytes, whose header says more
            return await self._in_lane(job, data, room, True)
        return answer, array

    async def _in_lane(
        self, job: Mapping[str, Any], data: bytes, room: int, large: bool
    ) -> tuple[dict[str, Any], Array | None]:
        if large:
            job = {**job, "quick_pixels": self._max_pixels}
        await self._wait(large)
        work = asyncio.create_task(self._run(job, data, room, large))  # gives the place back at its end
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        del data
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not work.done():
                await asyncio.wait({work})
            raise

    async def warm(self) -> None:
        """Starts the first decoder, so that no picture waits for it. One that cannot start is tried again later."""
        try:
            async with self._places:  # a picture may have come meanwhile, and no more are started than there are places
                if not self._idle[False]:
                    self._idle[False].append(await Decoder.start(self._max_pixels))
        except Unavailable as error:
            logs.warning("no decoder yet", reason=str(error))

    def give_up(self) -> None:
        """Ends what runs: a request that is cut off waits for its picture, and a decoder that hangs would never say."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Ends every decoder, whatever it does."""
        self.give_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for idle in self._idle.values():
            while idle:
                await idle.pop().close()

    async def _wait(self, large: bool) -> None:
        """Until a job of its lane may run: a large one has two places to wait for."""
        if self._places.locked() or (large and self._large.locked()):
            self._hurry(large)
        self._waiting[large] += 1
        try:
            if large:
                await self._large.acquire()
            try:
                await self._places.acquire()
            except BaseException:
                if large:
                    self._large.release()
                raise
        finally:
            self._waiting[large] -= 1

    async def _run(
        self, job: Mapping[str, Any], data: bytes, room: int, large: bool
    ) -> tuple[dict[str, Any], Array | None]:
        began = time.perf_counter()
        decoder: Decoder | None = None
        done = False
        try:
            decoder = await self._take(large)
            waited_for = self._waiting[False] or (large and self._waiting[True])
            limit = HURRIED_SECONDS if waited_for else self._seconds
            async with asyncio.timeout(min(limit, self._seconds)) as deadline:
                self._busy[deadline] = asyncio.get_running_loop().time(), large
                try:
                    answer, array = await decoder.run(job, data, room)
                finally:
                    del self._busy[deadline]
            done = True
        except TimeoutError as error:
            raise self._too_long(job["kind"], time.perf_counter() - began) from error
        except ChildDied as error:
            self._metrics.decoders_lost.inc()
            logs.warning("decoder lost", reason=str(error))
            raise ModelFailed(f"the process that read {WHAT[job['kind']]} died") from error
        finally:
            if decoder is not None and done:
                self._idle[large].append(decoder)
            elif decoder is not None:
                await asyncio.shield(decoder.close())
            self._places.release()
            if large:
                self._large.release()
        if "failure" in answer:
            logs.warning("decoder failed", reason=answer["failure"])
            raise ModelFailed(f"{WHAT[job['kind']]} could not be read ({answer['failure'].partition(':')[0]})")
        if "failed" in answer:
            raise ModelFailed(answer["failed"])
        if "too_large" in answer:
            raise BadRequest(f"{WHAT[job['kind']]} needs more memory than the server has for one; {MEND[job['kind']]}")
        if "error" in answer:
            raise BadRequest(answer["error"])
        return answer, array

    async def _take(self, large: bool) -> Decoder:
        idle = self._idle[large]
        while idle:
            decoder = idle.pop()
            if decoder.alive:
                return decoder
            self._metrics.decoders_lost.inc()
            await decoder.close()
        decoder = await Decoder.start(self._max_pixels)
        if large:
            decoder.lower()
        return decoder

    def _hurry(self, large: bool) -> None:
        """Others wait from now on: what runs for long already, and is in their way, has to make room."""
        now = asyncio.get_running_loop().time()
        for deadline, (began, theirs) in self._busy.items():
            when = max(now, began + HURRIED_SECONDS)
            if large and not theirs and self._large.locked():
                continue  # it waits for one of its own lane
            if (until := deadline.when()) is not None and when < until:
                deadline.reschedule(when)

    def _too_long(self, kind: str, seconds: float) -> Exception:
        self._metrics.decoders_lost.inc()
        logs.warning("decoder ended", reason=f"{WHAT[kind]} took {seconds:.1f} s")
        if seconds < self._seconds:
            return Overloaded(f"reading {WHAT[kind]} took more than {seconds:.1f} s while others wait; try again later")
        return BadRequest(f"reading {WHAT[kind]} took more than {self._seconds:g} s; {MEND[kind]}")
