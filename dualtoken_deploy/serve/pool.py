"""The server's end of a worker: starts the process, hands it batches, and ends it."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.store import MANIFEST, Bundle, sha256
from dualtoken_deploy.errors import BundleError, DualTokenError
from dualtoken_deploy.serve.errors import ModelFailed, ModelHung
from dualtoken_deploy.serve.protocol import elements
from dualtoken_deploy.serve.worker import FRAME

Array = NDArray[Any]


class WorkerDied(DualTokenError):
    """The process ended, or its socket did. While it loads, that is held against the bundle unless it says more."""

    def __init__(self, message: str, exit_code: int = BundleError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Launch:
    """What it takes to start a worker of a bundle."""

    bundle: Bundle
    digest: str
    rows: int
    device: str | None = None
    threads: int | None = None
    start_seconds: float = 300.0
    run_seconds: float = 30.0

    @staticmethod
    def of(bundle: Bundle, rows: int, **options: Any) -> Launch:
        return Launch(bundle, sha256(bundle.path / MANIFEST), rows, **options)


class Worker:
    """A started worker. Made by `start`; used by one task at a time."""

    def __init__(
        self,
        launch: Launch,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        memory: mmap.mmap,
    ) -> None:
        self._launch, self._process, self._memory = launch, process, memory
        self._reader, self._writer = streams
        spec = launch.bundle.manifest.input.tensor
        self.exited = asyncio.ensure_future(process.wait())
        self._batch: Array = np.ndarray((launch.rows, *spec.shape[1:]), spec.dtype, memory)  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    async def start(launch: Launch) -> Worker:
        """A worker that has loaded its bundle and run once.

        Raises WorkerDied with the reason where it could not, ModelHung where it did not in `start_seconds`.
        """
        spec = launch.bundle.manifest.input.tensor
        size = elements(spec, launch.rows) * np.dtype(spec.dtype).itemsize
        descriptor = os.memfd_create("dualtoken-batch")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            process = await _spawn(launch, theirs.fileno(), descriptor)
        finally:
            os.close(descriptor)
            theirs.close()
        worker = Worker(launch, process, await asyncio.open_connection(sock=ours), memory)
        try:
            answer, _ = await asyncio.wait_for(worker._receive(), launch.start_seconds)
        except TimeoutError as error:
            await worker.kill()
            raise ModelHung(f"loading took longer than {launch.start_seconds:g} s") from error
        except BaseException:
            await worker.kill()
            raise
        if "error" in answer:
            await worker.kill()
            raise WorkerDied(answer["error"], answer["exit_code"])
        return worker

    async def run(self, arrays: Sequence[Array]) -> tuple[dict[str, Array], float]:
        """Runs arrays of one contract as one batch: {output name: array of all rows}, and the seconds that it took.

        Raises ModelFailed where the runtime raised, WorkerDied and ModelHung where the worker has to be replaced.
        """
        rows = 0
        for array in arrays:
            self._batch[rows : rows + len(array)] = array
            rows += len(array)
        text = json.dumps({"rows": rows}).encode()
        try:
            async with asyncio.timeout(self._launch.run_seconds):
                self._writer.write(FRAME.pack(len(text), 0) + text)
                answer, payload = await self._receive()
        except TimeoutError as error:
            limit = self._launch.run_seconds
            raise ModelHung(f"the runtime did not answer within {limit:g} s; its process is replaced") from error
        if "error" in answer:
            raise ModelFailed(f"the runtime failed: {answer['error']}")
        return _split(answer["outputs"], payload), float(answer["seconds"])

    async def kill(self) -> None:
        """Ends the process, whatever it does, and waits for it."""
        self._writer.close()
        if self._process.returncode is None:
            self._process.kill()
        await self.exited

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        try:
            length, size = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            text = await self._reader.readexactly(length)
            return json.loads(text), await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise WorkerDied(f"the runtime's process (pid {self.pid}) died; it is replaced") from error


def _split(rows: Sequence[dict[str, Any]], payload: bytes) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    at = 0
    for row in rows:
        dtype, shape = np.dtype(row["dtype"]), tuple(row["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        outputs[row["name"]] = np.frombuffer(payload, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return outputs


async def _spawn(launch: Launch, link: int, memory: int) -> asyncio.subprocess.Process:
    task = {
        "socket": link,
        "memory": memory,
        "parent": os.getpid(),
        "bundle": str(launch.bundle.path.absolute()),
        "digest": launch.digest,
        "device": launch.device,
        "threads": launch.threads,
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # no module from the working directory
        "-m",
        "dualtoken_deploy.serve.worker",
        json.dumps(task),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=2,  # stdout is the server's own; a runtime that prints does it on stderr
        pass_fds=(link, memory),
    )
