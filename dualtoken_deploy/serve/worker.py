"""A worker: one process that holds one runner, so that a runtime that dies or hangs can be replaced.

It speaks frames (frames.py). Input tensors lie in memory that it shares with the server: a batch is copied once.
"""

from __future__ import annotations

import json
import mmap
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import MANIFEST, Bundle, sha256
from dualtoken_deploy.errors import BundleError, DualTokenError
from dualtoken_deploy.serve.frames import belong_to, receive, send
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.load import Runner, load_runner

Array = np.ndarray[Any, Any]


def main() -> None:
    """Entry point of the process: its one argument is JSON (socket, memory, parent, bundle, digest, ...)."""
    task = json.loads(sys.argv[1])
    belong_to(task["parent"])
    with socket.socket(fileno=task["socket"]) as link:
        try:
            bundle = open_unchanged(task["bundle"], task["digest"])
            runner = load_runner(bundle, task["device"], task["threads"])
            spec = bundle.manifest.input.tensor
            with runner, mmap.mmap(task["memory"], 0, prot=mmap.PROT_READ) as memory:
                warm_up(runner, bundle)
                send(link, {"ready": True})
                serve(link, runner, spec, memory)
        except DualTokenError as error:
            send(link, {"error": str(error), "exit_code": error.exit_code})
        except Exception as error:  # noqa: BLE001  # what a runtime or a damaged bundle raises is the operator's to read
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            send(link, {"error": f"the runtime could not load it ({said})", "exit_code": BundleError.exit_code})


def open_unchanged(path: str, digest: str) -> Bundle:
    """The bundle, if its manifest is still the one that the server read. Raises BundleError."""
    bundle = Bundle.open(path)
    if sha256(bundle.path / MANIFEST) != digest:
        raise BundleError(f"{path} was changed since the server read it; the new one is loaded on its own")
    return bundle


def warm_up(runner: Runner, bundle: Bundle) -> None:
    """One run on the golden input: what a runtime does once, it does before the first request."""
    runner.run({bundle.manifest.input.tensor.name: bundle.golden["input"]})


def serve(link: socket.socket, runner: Runner, spec: TensorSpec, memory: mmap.mmap) -> None:
    """Answers runs until the server closes the socket."""
    while (task := receive(link)) is not None:
        shape = (task["rows"], *spec.shape[1:])
        # a run ends before the next frame is read, so the view never outlives what it shows
        answer, payload = run(runner.run, spec.name, np.ndarray(shape, spec.dtype, memory))
        send(link, answer, payload)


def run(call: Callable[[Mapping[str, Array]], Mapping[str, Array]], name: str, batch: Array) -> tuple[Any, list[bytes]]:
    """One run as the frame that answers it."""
    start = time.perf_counter()
    try:
        outputs = {key: np.ascontiguousarray(value) for key, value in call({name: batch}).items()}
    except Exception as error:  # noqa: BLE001  # whatever a runtime raises is an answer, and the process lives on
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}, []
    rows = [{"name": key, "dtype": str(value.dtype), "shape": value.shape} for key, value in outputs.items()]
    return {"seconds": time.perf_counter() - start, "outputs": rows}, [value.tobytes() for value in outputs.values()]


if __name__ == "__main__":
    main()
