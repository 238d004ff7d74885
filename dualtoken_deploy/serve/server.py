"""Starts the server, and ends it: not ready, nobody admitted, everybody answered, everything closed, exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import uvicorn

from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.serve import logs
from dualtoken_deploy.serve.connection import bounded_protocol
from dualtoken_deploy.serve.door import Listener
from dualtoken_deploy.serve.grpc import Rpc
from dualtoken_deploy.serve.handler import Handler
from dualtoken_deploy.serve.http import make_app
from dualtoken_deploy.serve.memory import keep_freed_memory
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.repository import Repository
from dualtoken_deploy.serve.settings import Settings, Source

BACKLOG = 512
GRPC_GRACE_SECONDS = 1.0  # for answers that are written and not yet sent
FORCED_SECONDS = 4.5  # after the drain's time, when the process ends whatever it still waits for
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OTHER_DESCRIPTORS = 256  # beside connections: workers, decoders, libraries


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signals: it would close its listener at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run(sources: Sequence[Source], settings: Settings, tell: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. `tell` gets one JSON line with the addresses once requests are taken.

    Raises UsageError (a port that is taken), BundleError, MissingError, InputError (TLS files).
    """
    with logs.on_stderr():
        keep_freed_memory()
        room_for_descriptors(settings)
        with _Stop(settings.drain_seconds) as stop:
            asyncio.run(_serve(sources, settings, tell, stop))


async def _serve(sources: Sequence[Source], settings: Settings, tell: Callable[[str], None], stop: _Stop) -> None:
    stop.attach(asyncio.get_running_loop())
    for text in settings.warnings():
        logs.warning(text)
    metrics = Metrics()
    repository = Repository(sources, settings, metrics)
    handler = Handler(repository, settings, metrics)
    listener = _listen(settings)
    try:
        if not await _unless(stop.asked, repository.load_all()):
            return
        await _answer(handler, settings, listener, stop, tell)
    finally:
        listener.close()
        await handler.close()
        logs.info("stopped")


async def _answer(
    handler: Handler, settings: Settings, listener: Listener, stop: _Stop, tell: Callable[[str], None]
) -> None:
    """Both transports, from ready to drained."""
    http = _Uvicorn(_config(handler, settings, listener))
    rpc = None if settings.grpc_port is None else Rpc(handler, settings)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    watching = asyncio.create_task(handler.repository.watch())
    warming: asyncio.Task[None] | None = None
    grpc_port = None
    try:
        if rpc is not None:
            await rpc.start()
            grpc_port = rpc.port
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        handler.metrics.ready.set(1)
        warming = asyncio.create_task(handler.decoders.warm())
        tell(_addresses(handler, settings, listener.getsockname()[1], grpc_port))
        await asyncio.wait({serving, asyncio.create_task(stop.asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
        await _drain(handler, settings, stop)
    finally:
        watching.cancel()
        if warming is not None:
            await warming
        http.should_exit = True
        if rpc is not None:
            await rpc.stop(GRPC_GRACE_SECONDS)
        await serving


async def _drain(handler: Handler, settings: Settings, stop: _Stop) -> None:
    """Ready turns false and nobody is admitted; waits for those inside, at most for the drain's time."""
    handler.start_drain()
    logs.info("draining", in_hand=handler.gate.inside, seconds=settings.drain_seconds)
    waits = {asyncio.create_task(handler.drained()), asyncio.create_task(stop.again.wait())}
    _, late = await asyncio.wait(waits, timeout=settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    if handler.gate.inside:
        logs.warning("drain ended before all requests did", in_hand=handler.gate.inside)
        handler.gate.cut()  # has them refused, while the transports can still say so
        handler.decoders.give_up()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(handler.drained(), GRPC_GRACE_SECONDS)


class _Stop:
    """The first signal asks for a drain, the second ends it; more say nothing new, until the process is gone.

    asyncio's own handlers end with its loop: a signal that came after that would kill a process that is about to exit
    with 0. And whatever may hang, a thread ends the process.
    """

    def __init__(self, drain_seconds: float) -> None:
        self.asked, self.again = asyncio.Event(), asyncio.Event()
        self._seconds = drain_seconds + FORCED_SECONDS
        self._loop: asyncio.AbstractEventLoop | None = None
        self._before: dict[int, Any] = {}
        self._told = False

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._hear) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._told else handler)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        if self._told:
            self._ask()

    def _hear(self, _number: int, _frame: Any) -> None:
        if self._told:  # many in a row would leave this thread no time for anything else
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
        else:
            self._told = True
            forced = threading.Timer(self._seconds, self._force)
            forced.daemon = True
            forced.start()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ask)

    def _ask(self) -> None:
        (self.again if self.asked.is_set() else self.asked).set()

    def _force(self) -> None:
        logs.warning("ended by force: something did not end in its time", seconds=self._seconds)
        if logs.WRITER is not None:
            logs.WRITER.end()
        os._exit(1)


def room_for_descriptors(settings: Settings) -> None:
    """Raises the soft limit of open files as far as it may be, and warns where the connections allowed do not fit."""
    need = 4 * settings.connections + OTHER_DESCRIPTORS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = need if hard == resource.RLIM_INFINITY else min(need, hard)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < need:
        logs.warning("fewer files may be open than --connections need", allowed=most, needed=need)


async def _unless(event: asyncio.Event, work: Any) -> bool:
    """Whether some work was done before an event; it is cancelled otherwise."""
    task, asked = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


def _listen(settings: Settings) -> Listener:
    """Bound before anything is loaded, so that a port that is taken is said at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = Listener(family, settings.header_seconds, settings.connections)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UsageError(f"cannot listen on {settings.host}:{settings.port} ({reason}); give another --port") from error
    return listener


def _config(handler: Handler, settings: Settings, listener: Listener) -> uvicorn.Config:
    config = uvicorn.Config(
        make_app(handler),
        http=bounded_protocol(settings, listener.speaks),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address
        backlog=BACKLOG,
        timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # call_later's argument and nothing else
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"TLS files {settings.tls_cert} and {settings.tls_key} cannot be used ({error})") from error
    return config


def _addresses(handler: Handler, settings: Settings, port: int, grpc_port: int | None) -> str:
    """What to connect to, as one JSON line."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    found: dict[str, Any] = {
        "http": f"{scheme}://{host}:{port}",
        "grpc": None if grpc_port is None else f"{host}:{grpc_port}",
        "models": [f"{model.name}:{model.version}" for model in handler.repository.models],
    }
    logs.info("ready", **found)
    return json.dumps(found)
