"""What the server measures of itself, for Prometheus. Labels come from served names only, never from a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PAUSES = 9  # times what it took to write the metrics, until they are written again
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One registry a server; nothing is global, so that a process may hold two servers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._coming: asyncio.Future[bytes] | None = None
        self._not_before = 0.0
        by = ("model", "version")
        self.requests = Counter(
            "dualtoken_requests", "Requests answered, by HTTP or gRPC code.", ("protocol", "route", "code"),
            registry=registry,
        )  # fmt: skip
        self.total = Histogram(
            "dualtoken_request_seconds", "From the first byte of a request to its answer.", ("protocol", "route"),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.inference = Histogram(
            "dualtoken_inference_seconds", "One run of the runtime.", by, buckets=SECONDS, registry=registry
        )
        self.wait = Histogram(
            "dualtoken_queue_wait_seconds", "From the queue's end to its front.", by, buckets=SECONDS, registry=registry
        )
        self.batch = Histogram("dualtoken_batch_rows", "Rows run at once.", by, buckets=ROWS, registry=registry)
        self.depth = Gauge("dualtoken_queue_depth", "Requests that wait for a worker.", by, registry=registry)
        self.up = Gauge("dualtoken_workers_up", "Workers that are loaded.", by, registry=registry)
        self.lost = Counter("dualtoken_workers_lost", "Workers that died, hung or failed to start.", by,
                            registry=registry)  # fmt: skip
        self.decoders_lost = Counter(
            "dualtoken_decoders_lost", "Decoders that died or took too long.", registry=registry
        )
        self.reloads = Counter("dualtoken_reloads", "Bundles loaded anew, by outcome.", ("outcome",), registry=registry)
        self.reload_failures = Counter(
            "dualtoken_reload_failures", "Bundles on disk that could not be loaded; tried again.", by, registry=registry
        )
        self.log_dropped = Gauge("dualtoken_log_lines_dropped", "Lines for a stderr that nobody reads.",
                                 registry=registry)  # fmt: skip
        self.ready = Gauge("dualtoken_ready", "1 while the server takes requests.", registry=registry)
        self.inside = Gauge("dualtoken_requests_in_hand", "Requests admitted and not answered.", registry=registry)

    async def text(self) -> bytes:
        """The exposition format, as of now or later: whoever asks often shares what is made in a tenth of the time."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(self._render())
        return await asyncio.shield(self._coming)

    async def _render(self) -> bytes:
        await asyncio.sleep(self._not_before - time.monotonic())
        self._coming = None  # who comes from here on waits for the next
        start = time.monotonic()
        found = generate_latest(self._registry)
        now = time.monotonic()
        self._not_before = now + PAUSES * (now - start)
        return found

    def observer(self, model: str, version: str, log: Callable[[str, str], None]) -> ModelObserver:
        """Tells of one model; `log(model, reason)` is called for each worker that is lost."""
        return ModelObserver(self, model, version, log)


class ModelObserver:
    """A batcher's view of the metrics: its labels are bound once."""

    def __init__(self, metrics: Metrics, model: str, version: str, log: Callable[[str, str], None]) -> None:
        labels = (model, version)
        self._inference, self._wait = metrics.inference.labels(*labels), metrics.wait.labels(*labels)
        self._batch, self._depth = metrics.batch.labels(*labels), metrics.depth.labels(*labels)
        self._up, self._lost = metrics.up.labels(*labels), metrics.lost.labels(*labels)
        self._name, self._log = f"{model}:{version}", log

    def queued(self, depth: int) -> None:
        self._depth.set(depth)

    def ran(self, rows: int, seconds: float) -> None:
        self._batch.observe(rows)
        self._inference.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def workers(self, up: int) -> None:
        self._up.set(up)

    def replaced(self, reason: str) -> None:
        self._lost.inc()
        self._log(self._name, reason)
