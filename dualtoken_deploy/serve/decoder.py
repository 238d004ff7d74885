"""A decoder: one process that turns what clients send into tensors, so that what takes for ever can be killed.

Pictures, long JSON, protobuf messages with typed values and large outputs are read here, under a limit of memory that
the kernel keeps. The bytes lie in memory that it shares with the server, and so does the tensor that it answers with.
"""

from __future__ import annotations

import json
import mmap
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.errors import DualTokenError, LargeImageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import protocol
from dualtoken_deploy.serve.errors import ModelFailed
from dualtoken_deploy.serve.frames import belong_to, receive, send
from dualtoken_deploy.serve.memory import keep_freed_memory
from dualtoken_deploy.serve.multipart import is_multipart, picture_of
from dualtoken_deploy.spec import InputContract, TensorSpec

Job = Mapping[str, Any]
Answer = tuple[dict[str, Any], Array | None]


def main() -> None:
    """Entry point of the process: its one argument is JSON (socket, memory, parent, bytes)."""
    task = json.loads(sys.argv[1])
    belong_to(task["parent"])
    keep_freed_memory()
    limit_memory(task["bytes"])
    memory = Memory(task["memory"])
    with socket.socket(fileno=task["socket"]) as link:
        send(link, {"ready": True})
        while (job := receive(link)) is not None:
            send(link, answer(job, memory))


def limit_memory(more: int) -> None:
    """Lets this process reserve `more` bytes than it has now; beyond that an allocation fails, and is answered."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * mmap.PAGESIZE + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Memory:
    """What is shared with the server, mapped anew where its size has changed: each new page costs a fault."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mapped: mmap.mmap | None = None

    def of(self, size: int) -> mmap.mmap:
        if self._mapped is None or len(self._mapped) != size:
            if self._mapped is not None:
                self._mapped.close()
                self._mapped = None
            self._mapped = mmap.mmap(self._descriptor, size)
        return self._mapped


def answer(job: Job, memory: Memory) -> dict[str, Any]:
    """Does a job whose bytes are the first `size` of the shared memory, and leaves its tensor there instead."""
    try:
        shared = memory.of(job["room"])
        found, array = JOBS[job["kind"]](shared[: job["size"]], job)
        if array is None:
            return found
        np.ndarray(array.shape, array.dtype, shared)[...] = array
        return found | {"dtype": str(array.dtype), "shape": array.shape}
    except ModelFailed as error:
        return {"failed": str(error)}
    except DualTokenError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"too_large": True}
    except Exception as error:  # noqa: BLE001  # an answer as well: logged by the server, and the process lives on
        return {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:500]}


def picture(data: bytes, job: Job) -> Answer:
    """A picture, alone or in a form, as a row of the contract, without the batch axis; and its own size."""
    if is_multipart(job["type"]):
        data = picture_of(data, job["type"])
    try:
        image = load_image(data, min(job["quick_pixels"], job["max_pixels"]), job["formats"])
    except LargeImageError:
        if job["quick_pixels"] >= job["max_pixels"]:
            raise
        return {"larger": True}, None  # not for this lane
    return {"size": image.shape[:2]}, preprocess(image, InputContract.from_json(job["contract"]))


def request(data: bytes, job: Job) -> Answer:
    """A V2 request as JSON."""
    return _request(protocol.parse_request(data, job["header"], TensorSpec.from_json(job["spec"]), job["rows"]))


def message(data: bytes, job: Job) -> Answer:
    """The same as a protobuf message."""
    from dualtoken_deploy.serve.messages import read

    return _request(read(data, TensorSpec.from_json(job["spec"]), job["rows"]))


def outputs(data: bytes, job: Job) -> Answer:
    """What a model found in a picture."""
    from dualtoken_deploy.serve.answers import Question, read, unpacked
    from dualtoken_deploy.tasks.base import Ask

    sizes = tuple(job["model_size"]), tuple(job["picture"])
    asked = Question(job["task"], job["labels"], *sizes, Ask(*job["ask"]), job["overlay"])
    found, over = read(unpacked(data, job["parts"]), asked)
    return {"answers": found, "overlay": over}, None


def _request(found: protocol.InferRequest) -> Answer:
    (array,) = found.inputs.values()
    outputs = None if found.outputs is None else [[w.name, w.binary, w.classes] for w in found.outputs]
    return {"id": found.id, "outputs": outputs, "binary_default": found.binary_default}, array


JOBS: Mapping[str, Callable[[bytes, Job], Answer]] = MappingProxyType(
    {"picture": picture, "request": request, "message": message, "outputs": outputs}
)

if __name__ == "__main__":
    main()
