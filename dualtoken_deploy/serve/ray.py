"""The same application and handler on Ray Serve, for scale-out: replicas of each bundle behind replicas of the app.

Ray does here what workers do on one machine: it batches (`serve.batch`), limits queues, scales and replaces replicas.
HTTP only; no reload and no --admin, because a deployment is changed by deploying it again.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import MissingError, UsageError, missing_extra
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve.batcher import Answer, split_rows
from dualtoken_deploy.serve.errors import ModelFailed, Overloaded, Unavailable
from dualtoken_deploy.serve.handler import Handler
from dualtoken_deploy.serve.http import make_app
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.repository import Repository, check_servable, merge_rows
from dualtoken_deploy.serve.settings import Settings, Source
from dualtoken_deploy.serve.signed import open_bundle
from dualtoken_deploy.serve.worker import run as run_once
from dualtoken_deploy.serve.worker import warm_up
from dualtoken_deploy.targets.load import load_runner

APP = "dualtoken"
TRIES = 2  # a replica that died had no part in the answer, and a run has no effect: another may do it
REACHABLE_SECONDS = 5.0
MAX_REPLICAS = 16  # of `--replicas auto`


class Replica:
    """A runner in a process of Ray's. One batch at a time, in a thread, so that Ray's health check is answered."""

    def __init__(self, path: str, settings: Settings) -> None:
        bundle = open_bundle(path, settings.signers)
        self._runner = load_runner(bundle, settings.device, settings.threads).__enter__()
        self._spec = bundle.manifest.input.tensor
        self._rows = merge_rows(bundle, settings)
        self._lock = asyncio.Lock()
        warm_up(self._runner, bundle)

    async def ping(self) -> bool:
        return True

    async def run_all(self, arrays: Sequence[Array]) -> list[tuple[dict[str, Array] | None, str, float, int]]:
        """(outputs, error, seconds, rows run at once) for each array; those that fit are run together."""
        answers: list[tuple[dict[str, Array] | None, str, float, int]] = []
        for group in grouped(arrays, self._rows):
            batch = np.concatenate(group)
            async with self._lock:
                started = time.perf_counter()
                answer, payload = await asyncio.to_thread(run_once, self._runner.run, self._spec.name, batch)
                seconds = time.perf_counter() - started
            if "error" in answer:
                answers.extend((None, answer["error"], seconds, len(batch)) for _ in group)
                continue
            outputs = {
                row["name"]: np.frombuffer(data, row["dtype"]).reshape(row["shape"])
                for row, data in zip(answer["outputs"], payload, strict=True)
            }
            parts = split_rows(outputs, [len(array) for array in group])
            answers.extend((dict(part), "", seconds, len(batch)) for part in parts)
        return answers


def grouped(arrays: Sequence[Array], rows: int) -> list[list[Array]]:
    """Arrays in their order, in groups of at most `rows` rows; one that is larger is alone."""
    groups: list[list[Array]] = []
    for array in arrays:
        if groups and sum(map(len, groups[-1])) + len(array) <= rows:
            groups[-1].append(array)
        else:
            groups.append([array])
    return groups


class RayEngine:
    """A repository's engine: a handle of a deployment."""

    ready = True
    reason = None

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def wait_ready(self) -> None:
        await self._handle.ping.remote()

    async def run(self, array: Array) -> Answer:
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import BackPressureError

        start = time.perf_counter()
        for attempt in range(TRIES):
            try:
                outputs, error, seconds, rows = await self._handle.run.remote(array)
            except BackPressureError as full:
                raise Overloaded("the replicas' queues are full; try again later") from full
            except RayActorError as died:
                if attempt + 1 < TRIES:
                    continue
                raise ModelFailed("the replica that ran this request died; it is replaced") from died
            except RayError as lost:
                raise Unavailable(f"no replica answered ({type(lost).__name__})") from lost
            if outputs is None:
                raise ModelFailed(f"the runtime failed: {error}")
            return Answer(outputs, time.perf_counter() - start - seconds, seconds, rows)
        raise AssertionError  # the last try returns or raises

    async def close(self) -> None:
        """The deployment outlives the applications that use it."""


class Application:
    """The ingress: the same Starlette application as on one machine, over handles."""

    async def __init__(self, sources: Sequence[Source], settings: Settings, handles: dict[str, Any]) -> None:  # type: ignore[misc]
        metrics = Metrics()
        repository = Repository(sources, settings, metrics)
        repository.make_engine = lambda bundle, source, settings, metrics: RayEngine(handles[_key(source)])  # noqa: ARG005  # its names are the call's
        await repository.load_all()
        self._handler = Handler(repository, settings, metrics)

    def __serve_build_asgi_app__(self) -> Any:  # Ray's own name
        return make_app(self._handler)


def run(
    sources: Sequence[Source],
    settings: Settings,
    address: str | None,
    replicas: int | None,
    tell: Callable[[str], None],
) -> None:
    """Deploys and serves until SIGTERM or SIGINT. `address` None: a Ray of this machine, ended with us.

    `replicas` None: as many as the load asks for. Raises MissingError, UsageError, BundleError.
    """
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise missing_extra("ray", "the engine ray") from error
    _check(sources, settings)
    if settings.port == 0:
        raise UsageError("Ray's proxy needs a port that is known; give --port")
    if address is not None:
        check_reachable(address)
    settings = replace(settings, reload_seconds=0.0, grpc_port=None)
    stop = threading.Event()
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        raise MissingError(f"no Ray at {address or 'this machine'} ({error}); start one: ray start --head") from error
    for number in (signal.SIGTERM, signal.SIGINT):  # after init: Ray takes them, and would end us with an abort
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(_application(serve, sources, settings, replicas), name=APP, route_prefix="/")
        tell(_addresses(sources, settings))
        stop.wait()
    finally:
        serve.delete(APP)
        if address is None:
            serve.shutdown()
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises MissingError where nobody listens at HOST:PORT: Ray would try again for minutes before it says so."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or int(port) > 65535:
        return  # auto, ray://...: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHABLE_SECONDS).close()
    except OSError as error:
        raise MissingError(f"no Ray at {address} ({error.strerror or error}); start one: ray start --head") from error


def _application(serve: Any, sources: Sequence[Source], settings: Settings, replicas: int | None) -> Any:
    """The deployments, bound: one of each bundle, and the application in front of them."""
    scale: dict[str, Any] = {"num_replicas": replicas} if replicas else {"autoscaling_config": _autoscaling(settings)}
    handles = {}
    for source in sources:
        opened = Bundle.open(source.path, verify=False)
        fixed, merged = opened.manifest.input.batch, merge_rows(opened, settings)
        deployment = serve.deployment(
            _batching(serve, 1 if fixed else merged, settings.max_delay_ms / 1000),
            name=_key(source).replace(":", "-"),
            max_ongoing_requests=max(2, 2 * merged),
            max_queued_requests=settings.queue,
            graceful_shutdown_timeout_s=settings.drain_seconds,
            health_check_period_s=2,
            health_check_timeout_s=settings.run_seconds,
            ray_actor_options={"num_cpus": settings.threads or 1},
            **scale,
        )
        handles[_key(source)] = deployment.bind(str(source.path.absolute()), settings)
    front = serve.deployment(
        serve.ingress()(Application),
        name="application",
        num_replicas=min(2, replicas or 2),
        max_ongoing_requests=settings.queue + 16,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},  # it decodes and waits; the bundles have the cores
    )
    return front.bind(tuple(sources), settings, handles)


def _batching(serve: Any, most: int, delay_seconds: float) -> type:
    """Replica with Ray's batching in front of it: a class of its own, as the decorator has its numbers."""

    class BatchingReplica(Replica):
        @serve.batch(max_batch_size=most, batch_wait_timeout_s=delay_seconds)  # type: ignore[untyped-decorator]
        async def run(self, arrays: list[Array]) -> Any:
            return await self.run_all(arrays)

    return BatchingReplica


def _autoscaling(settings: Settings) -> dict[str, Any]:
    return {"min_replicas": 1, "max_replicas": MAX_REPLICAS, "target_ongoing_requests": max(2, settings.queue // 8)}


def _check(sources: Sequence[Source], settings: Settings) -> None:
    """What would otherwise fail far away, in a replica's log."""
    if settings.admin or settings.tls_cert is not None:
        raise UsageError("--admin and TLS are not part of the engine ray; put a proxy with TLS in front of it")
    for source in sources:
        check_servable(open_bundle(source.path, settings.signers))


def _key(source: Source) -> str:
    return f"{source.name}:{source.version}"


def _addresses(sources: Sequence[Source], settings: Settings) -> str:
    models = [_key(source) for source in sources]
    return json.dumps({"http": f"http://{settings.host}:{settings.port}", "grpc": None, "models": models})
