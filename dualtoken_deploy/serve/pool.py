"""The server's end of a worker: starts the process, hands it batches, and ends it."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.store import MANIFEST, Bundle, sha256
from dualtoken_deploy.serve.child import Child, ChildDied
from dualtoken_deploy.serve.errors import ModelFailed, ModelHung
from dualtoken_deploy.serve.protocol import elements

Array = NDArray[Any]


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

    def __init__(self, launch: Launch, child: Child, memory: mmap.mmap) -> None:
        self._launch, self._child, self._memory = launch, child, memory
        spec = launch.bundle.manifest.input.tensor
        self.exited = child.exited
        self._batch: Array = np.ndarray((launch.rows, *spec.shape[1:]), spec.dtype, memory)  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        return self._child.pid

    @staticmethod
    async def start(launch: Launch) -> Worker:
        """A worker that has loaded its bundle and run once.

        Raises ChildDied with the reason where it could not, ModelHung where it did not in `start_seconds`, OSError.
        """
        spec = launch.bundle.manifest.input.tensor
        size = elements(spec, launch.rows) * np.dtype(spec.dtype).itemsize
        descriptor = os.memfd_create("dualtoken-batch")
        try:
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            task = {
                "memory": descriptor,
                "bundle": str(launch.bundle.path.absolute()),
                "digest": launch.digest,
                "device": launch.device,
                "threads": launch.threads,
            }
            child = await Child.start("dualtoken_deploy.serve.worker", "the runtime's process", task, (descriptor,))
        finally:
            os.close(descriptor)
        try:
            async with asyncio.timeout(launch.start_seconds):
                answer, _ = await child.receive()
            if "error" in answer:
                raise ChildDied(answer["error"], answer["exit_code"])
            return Worker(launch, child, memory)
        except TimeoutError as error:
            await child.kill()
            raise ModelHung(f"loading took longer than {launch.start_seconds:g} s") from error
        except BaseException:
            await asyncio.shield(child.kill())
            raise

    async def run(self, arrays: Sequence[Array]) -> tuple[dict[str, Array], float]:
        """Runs arrays of one contract as one batch: {output name: array of all rows}, and the seconds that it took.

        Raises ModelFailed where the runtime raised, ChildDied and ModelHung where the worker has to be replaced.
        """
        rows = 0
        for array in arrays:
            self._batch[rows : rows + len(array)] = array
            rows += len(array)
        try:
            async with asyncio.timeout(self._launch.run_seconds):
                answer, payload = await self._child.ask({"rows": rows})
        except TimeoutError as error:
            limit = self._launch.run_seconds
            raise ModelHung(f"the runtime did not answer within {limit:g} s; its process is replaced") from error
        if "error" in answer:
            raise ModelFailed(f"the runtime failed: {answer['error']}")
        return _split(answer["outputs"], payload), float(answer["seconds"])

    async def kill(self) -> None:
        """Ends the process, whatever it does, and waits for it."""
        await self._child.kill()


def _split(rows: Sequence[dict[str, Any]], payload: bytes) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    at = 0
    for row in rows:
        dtype, shape = np.dtype(row["dtype"]), tuple(row["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        outputs[row["name"]] = np.frombuffer(payload, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return outputs
