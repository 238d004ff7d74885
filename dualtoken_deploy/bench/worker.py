"""One contestant in its own process: `python -m dualtoken_deploy.bench.worker`. Started by bench_process.py.

One JSON document a line, requests on stdin and answers on stdout, one answer to each request:

    {"do": "load", "job": {"kind", "bundle", "products", "batch", "threads", "device", "mode"}}
        -> {"cold_start_ms", "first_inference_ms"}
    {"do": "round", "seconds"}  -> {"laps_ns": [...], "async_images_per_s": float | null, "peak_rss_mib"}, and in mode
        server "tails_ns": {share of the capacity: [...]}
    {"do": "scenario", ...}     -> {"target_qps", "samples"}: bench/scenario.py, LoadGen's
    whatever goes wrong         -> {"error": {"type", "message"}}, and the process ends

The end of stdin ends it, so that it never outlives the bench.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.processes import own_streams
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.targets.runner import Array, AsyncRunner, Runner, RunnerOptions

WARM_UP_RUNS = 5  # after the first inference: allocators and lazily built kernels settle within these
SETTLE_S = 0.15  # untimed start of each turn: caches warm again, and the pools of the one before stop spinning
MIN_RUNS = 5
ASYNC_SHARE = 0.5  # of a round's seconds, spent on overlapped requests after the timed ones
LONE_SHARE = 0.2  # of a round's seconds in mode throughput, spent on calls one at a time
LOADS = (0.5, 0.8, 0.95)  # of the capacity, in mode server
MIN_ASYNC_RUNS = 8

Shape = tuple[int, int, int, int]  # batch, m, k, n


@dataclass(frozen=True)
class Subject:
    """What is timed: one call, and where the runtime has it, a number of overlapped calls."""

    run: Callable[[], object]
    run_async: Callable[[int], None] | None = None


def product_shapes(products: Sequence[Sequence[int]], batch: int) -> list[Shape]:
    """Every matrix product of a forward pass over `batch` images, one entry each, of [batch, m, k, n, count] for one.

    A product with a weight (batch 1) gets more rows; one of many small matrices (attention) gets more of them.
    """
    grown = [((b, m * batch, k, n) if b == 1 else (b * batch, m, k, n), count) for b, m, k, n, count in products]
    return [shape for shape, count in grown for _ in range(count)]


def product_operands(shapes: Sequence[Shape]) -> list[tuple[Array, Array, Array]]:
    """(left, right, out) in float32 for each product.

    Each has a right-hand array of its own, so that weights come from memory as in the model; products of one shape
    share left and out, which a model would find in its caches too.
    """
    random = np.random.default_rng(0)
    shared: dict[Shape, tuple[Array, Array]] = {}
    operands = []
    for shape in shapes:
        b, m, k, n = shape
        lead = () if b == 1 else (b,)
        if shape not in shared:
            shared[shape] = random.standard_normal((*lead, m, k), np.float32), np.empty((*lead, m, n), np.float32)
        left, out = shared[shape]
        operands.append((left, random.standard_normal((*lead, k, n), np.float32), out))
    return operands


def feed_of(bundle: Bundle, batch: int) -> Array:
    """The bundle's golden input, repeated or cut to `batch`, in the contract's dtype."""
    golden = bundle.golden["input"]
    fed: Array = np.resize(golden, (batch, *golden.shape[1:])).astype(bundle.manifest.input.tensor.dtype)
    return fed


def peak_rss_mib() -> float:
    """The most physical memory that this process held so far, in MiB.

    Not getrusage where /proc tells: Linux lets ru_maxrss start at what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak_kib) / 2**10


def timed_round(subject: Subject, seconds: float) -> list[int]:
    """Nanoseconds of each call, for at least `seconds` and MIN_RUNS calls, after an untimed start."""
    clock = time.perf_counter_ns
    laps: list[int] = []
    _settle(subject.run)
    gc.collect()
    gc.disable()  # a collection in the middle of a call would be counted as the model's
    try:
        end = clock() + int(seconds * 1e9)
        now = clock()
        while now < end or len(laps) < MIN_RUNS:
            start = clock()
            subject.run()
            now = clock()
            laps.append(now - start)
    finally:
        gc.enable()
    return laps


def _settle(run: Callable[[], object]) -> None:
    end = time.perf_counter() + SETTLE_S
    run()
    while time.perf_counter() < end:
        run()


def _async_rate(subject: Subject, seconds: float, lap_s: float, batch: int) -> float | None:
    """Images per second with requests overlapped; None where the runtime cannot."""
    if subject.run_async is None:
        return None
    count = max(MIN_ASYNC_RUNS, math.ceil(seconds * ASYNC_SHARE / lap_s))
    subject.run_async(MIN_ASYNC_RUNS)
    start = time.perf_counter()
    subject.run_async(count)
    return count * batch / (time.perf_counter() - start)


def waits_under_load(run: Callable[[], object], lap_s: float, load: float, seconds: float, seed: int) -> list[int]:
    """Nanoseconds from arrival to answer of requests that arrive at random and wait in one line (M/G/1).

    Arrivals are a Poisson process at `load` of the rate at which calls of `lap_s` follow each other. Who comes while a
    call runs waits for it, so what is timed is what a client sees, not what a call takes.
    """
    clock, gaps = time.perf_counter_ns, np.random.default_rng(seed)
    waits: list[int] = []
    _settle(run)
    gc.collect()
    gc.disable()
    try:
        start = arrival = clock()
        end = start + int(seconds * 1e9)
        while True:
            arrival += int(gaps.exponential(lap_s / load) * 1e9)
            if arrival > end and len(waits) >= MIN_RUNS:
                return waits
            while (early := arrival - clock()) > 0:
                time.sleep(max(early / 1e9 - 1e-4, 0))  # the last tenth of a millisecond awake: sleep is late
            run()
            waits.append(clock() - arrival)
    finally:
        gc.enable()


def _of_runner(runner: Runner, feed: Array) -> Subject:
    feeds = {runner.inputs[0].name: feed}
    overlapped = (lambda count: runner.run_async(feeds, count)) if isinstance(runner, AsyncRunner) else None
    return Subject(lambda: runner.run(feeds), overlapped)


def _bundle(job: Mapping[str, Any]) -> Callable[[], Subject]:
    bundle = Bundle.open(job["bundle"], verify=False)  # the parent verified it; hashing is no part of a cold start
    feed = feed_of(bundle, job["batch"])
    many = job["mode"] == "throughput"
    return lambda: _of_runner(load_runner(bundle, job["device"], job["threads"], throughput=many), feed)


def _eager(job: Mapping[str, Any]) -> Callable[[], Subject]:
    """The eager model alone: it is fed normalised tensors, so that numpy preprocessing does not flatter the others."""
    from dualtoken_deploy.targets import eager

    bundle = Bundle.open(job["bundle"], verify=False)
    contract, feed = bundle.manifest.input, feed_of(bundle, job["batch"])
    if contract.kind == "image":
        feed = _normalised(feed, contract)
        spec = TensorSpec(contract.tensor.name, "float32", "NCHW", feed.shape)
        contract = replace(contract, kind="tensor", tensor=spec)
    plain = replace(bundle, manifest=replace(bundle.manifest, input=contract))
    device = job["device"].lower() if job["device"] else None  # PyTorch's words; OpenVINO's are "CPU" and "GPU"
    return lambda: _of_runner(eager.load(plain, RunnerOptions(device, job["threads"])), feed)


def _normalised(images: Array, contract: InputContract) -> Array:
    """uint8 NHWC -> float32 NCHW, (x / 255 - mean) / std."""
    scaled = (images / 255.0 - np.array(contract.mean)) / np.array(contract.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def _limit(job: Mapping[str, Any]) -> Callable[[], Subject]:
    operands = product_operands(product_shapes(job["products"], job["batch"]))

    def run() -> None:
        for left, right, out in operands:
            np.matmul(left, right, out=out)

    return lambda: Subject(run)


# Each prepares the feed, and gives back what is timed as the cold start.
_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Callable[[], Subject]]] = {
    "bundle": _bundle,
    "eager": _eager,
    "limit": _limit,
}


class _Session:
    """Answers requests; holds what was loaded between them."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._batch, self._mode, self._rounds = 0, "latency", 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["do"] == "scenario":
            return self._scenario(request)
        return self._load(request["job"]) if request["do"] == "load" else self._round(float(request["seconds"]))

    def _scenario(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        from dualtoken_deploy.bench.scenario import play

        if self._subject is None:
            raise ValueError("asked for a scenario before anything was loaded")
        return asdict(play(self._subject.run, self._subject.run_async, self._batch, asked))

    def _load(self, job: Mapping[str, Any]) -> dict[str, Any]:
        load = _KINDS[job["kind"]](job)
        start = time.perf_counter()
        subject = load()
        loaded = time.perf_counter()
        subject.run()
        first = time.perf_counter()
        for _ in range(WARM_UP_RUNS):
            subject.run()
        self._subject, self._batch, self._mode = subject, job["batch"], job["mode"]
        return {"cold_start_ms": (loaded - start) * 1e3, "first_inference_ms": (first - loaded) * 1e3}

    def _round(self, seconds: float) -> dict[str, Any]:
        if self._subject is None:
            raise ValueError("asked for a round before anything was loaded")
        self._rounds += 1
        many = self._mode == "throughput"
        laps = timed_round(self._subject, seconds * LONE_SHARE if many else seconds)
        lap_s = statistics.median(laps) / 1e9
        rate = _async_rate(self._subject, seconds * (2 if many else 1), lap_s, self._batch)
        found: dict[str, Any] = {"laps_ns": laps, "async_images_per_s": rate}
        if self._mode == "server":
            mean_s = statistics.fmean(laps) / 1e9
            found["tails_ns"] = {
                str(load): waits_under_load(self._subject.run, mean_s, load, seconds, self._rounds) for load in LOADS
            }
        return found | {"peak_rss_mib": peak_rss_mib()}


def main() -> int:
    """Serves requests until stdin ends (0) or something fails (1)."""
    requests, answers = own_streams()
    session = _Session()
    for line in requests:
        failed = False
        try:
            answer = session.answer(json.loads(line))
        except DualTokenError as error:
            failed, answer = True, {"error": {"type": type(error).__name__, "message": str(error)}}
        # The outermost boundary: vendors raise what they like, and the parent must hear of it.
        except Exception as error:  # noqa: BLE001
            failed, answer = True, {"error": {"type": type(error).__name__, "message": _one_line(error)}}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            return 1  # the bench is gone
        if failed:
            return 1
    return 0


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
