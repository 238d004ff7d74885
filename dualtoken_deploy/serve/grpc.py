"""The Open Inference Protocol over gRPC, on grpc.aio: the same handler, its own status codes.

A handler in grpc.aio is called with the whole message read, however long that takes to come, and its answer lies in
memory until the client takes it. All are therefore registered as streams of (one) request and (one) answer, which looks
the same on the wire: called first, read then, in a time, and done once the answer is taken, in a time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import logs, messages, protocol
from dualtoken_deploy.serve.admission import Body, key_fits
from dualtoken_deploy.serve.door import sweep
from dualtoken_deploy.serve.errors import (
    BadRequest,
    Denied,
    Forbidden,
    ModelFailed,
    ModelHung,
    NotFound,
    Overloaded,
    ServeError,
    TooLarge,
    TooSlow,
    Unavailable,
    Unsupported,
)
from dualtoken_deploy.serve.handler import Handler
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from dualtoken_deploy.serve.repository import Model
from dualtoken_deploy.serve.settings import Settings

SERVICE = "inference.GRPCInferenceService"
CONNECTION_AGE_MS = 600_000  # then a client is asked to connect anew, and one that only holds on is cut
BIND_AGAIN_SECONDS = 0.05
STREAMS = 16  # of a connection at once, or two batches: more calls of it only wait here, in front of those of others
CODES: Mapping[type[ServeError], grpc.StatusCode] = MappingProxyType(
    {
        BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
        TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
        Unsupported: grpc.StatusCode.INVALID_ARGUMENT,
        TooSlow: grpc.StatusCode.DEADLINE_EXCEEDED,
        NotFound: grpc.StatusCode.NOT_FOUND,
        Denied: grpc.StatusCode.UNAUTHENTICATED,
        Forbidden: grpc.StatusCode.PERMISSION_DENIED,
        Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Unavailable: grpc.StatusCode.UNAVAILABLE,
        ModelFailed: grpc.StatusCode.INTERNAL,
        ModelHung: grpc.StatusCode.UNAVAILABLE,
    }
)
CALL: ContextVar[Body] = ContextVar("call")  # the one at hand, which may be sent away while it waits for its client
NOTE: ContextVar[dict[str, Any]] = ContextVar("note")  # of the call at hand: what its line in the log will say
Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Message]]


class Servicer:
    """One method an RPC; errors are raised, and mapped in one place."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self._settings = handler, handler.settings

    @property
    def methods(self) -> Mapping[str, Method]:
        """By the name of the RPC. Each is a stream of one message: it can be called before that has come."""
        unary: dict[str, tuple[Callable[[Any, Context], Message], Any]] = {
            "ServerLive": (self.server_live, pb.ServerLiveRequest),
            "ServerReady": (self.server_ready, pb.ServerReadyRequest),
            "ModelReady": (self.model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self.server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self.model_metadata, pb.ModelMetadataRequest),
        }
        found: dict[str, Method] = {"ModelInfer": self.model_infer}
        return found | {name: self._once_read(*row) for name, row in unary.items()}

    def _once_read(self, call: Callable[[Any, Context], Message], kind: Any) -> Method:
        async def read_and_call(stream: AsyncIterator[bytes], context: Context) -> Message:
            raw = await self._read(stream)
            if len(raw) > protocol.JSON_ENVELOPE:
                raise BadRequest(f"the message has {len(raw)} bytes; this call needs a name")
            try:
                request = kind.FromString(raw)
            except DecodeError as error:
                raise BadRequest(f"the message is no {kind.DESCRIPTOR.name}") from error
            return call(request, context)

        return read_and_call

    def server_live(self, _request: pb.ServerLiveRequest, _context: Context) -> Message:
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, _request: pb.ServerReadyRequest, _context: Context) -> Message:
        return pb.ServerReadyResponse(ready=self._handler.ready)

    def model_ready(self, request: pb.ModelReadyRequest, context: Context) -> Message:
        """An unknown model is not ready: clients of other servers expect that, and no error."""
        check_key(self._settings, context)
        try:
            model = self._handler.repository.find(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=model.ready and not self._handler.draining)

    def server_metadata(self, _request: pb.ServerMetadataRequest, context: Context) -> Message:
        check_key(self._settings, context)
        return pb.ServerMetadataResponse(**self._handler.server_metadata())

    def model_metadata(self, request: pb.ModelMetadataRequest, context: Context) -> Message:
        check_key(self._settings, context)
        return pb.ModelMetadataResponse(
            **self._handler.model_metadata(self._handler.repository.find(request.name, request.version))
        )

    async def model_infer(self, stream: AsyncIterator[bytes], context: Context) -> Message:
        """Let in by the server's gate, read, then given a place at its model."""
        check_key(self._settings, context)
        with self._handler.gate.enter(), ExitStack() as place:
            with self._handler.messages.one(context.peer()) as arriving:
                raw = await self._read(stream)
                arriving.grow(len(raw))
                arriving.whole = True
                outline = messages.outline(raw)
                model = self._handler.repository.find(outline.name, outline.version)
                place.enter_context(model.gate.enter())
                place.enter_context(self._handler.place(model))
                size = len(raw)
                if size > model.message_limit:
                    raise TooLarge(f"the message has {size} bytes; this model's largest has {model.message_limit}")
                parsed = await self._handler.parse_message(model, raw, outline.structured_bytes)
                del raw
            answer = await self._handler.infer(model, parsed)
            NOTE.get().update(
                model=f"{model.name}:{model.version}",
                bytes=size,
                rows=parsed.rows,
                batch=answer.batch_rows,
                queue_ms=round(answer.queue_seconds * 1000, 2),
                run_ms=round(answer.run_seconds * 1000, 2),
            )
            return encode(answer.outputs, parsed, model)

    async def _read(self, stream: AsyncIterator[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                raw = await anext(stream, None)
        except TimeoutError as error:
            raise TooSlow(f"the message did not arrive within {self._settings.body_seconds:g} s") from error
        if raw is None:
            raise BadRequest("the call has no message")
        CALL.get().whole = True
        return raw


def check_key(settings: Settings, context: Context) -> None:
    """Raises Denied where the server has a key and the call has not."""
    given = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
    if not key_fits(settings.api_key, given.get("authorization"), given.get("x-api-key")):
        raise Denied("this server needs its API key: metadata authorization: Bearer KEY, or x-api-key: KEY")


def encode(outputs: Mapping[str, Array], request: protocol.InferRequest, model: Model) -> pb.ModelInferResponse:
    """The response, its tensors in raw_output_contents."""
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
    for want in request.outputs or tuple(protocol.Wanted(name, True) for name in outputs):
        array = outputs[want.name]
        if want.classes:
            shape, raw = protocol.classes_as_bytes(array, want, model.labels)
            response.outputs.add(name=want.name, datatype="BYTES", shape=shape)
            response.raw_output_contents.append(raw)
            continue
        response.outputs.add(name=want.name, datatype=protocol.DATATYPES[str(array.dtype)], shape=array.shape)
        response.raw_output_contents.append(protocol.to_bytes(array))
    return response


class Rpc:
    """The gRPC server: started, made anew where a bundle with a larger input was loaded, and stopped."""

    def __init__(self, handler: Handler, settings: Settings) -> None:
        """Binds its port. Raises UsageError where that is taken."""
        self._handler, self._settings = handler, settings
        self._largest = self._need()
        try:
            self._server, self.port = make_server(handler, settings, self._largest, settings.grpc_port or 0)
        except OSError as error:
            raise UsageError(f"{error}; give another --grpc-port, or --no-grpc") from error
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._server.start()
        self._tasks = [
            asyncio.create_task(sweep(self.port, self._settings.connections, self._handler.unwanted)),
            asyncio.create_task(self._follow()),
        ]

    async def stop(self, grace: float) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(grace)

    def _need(self) -> int:
        return max(model.message_limit for model in self._handler.repository.models)

    async def _follow(self) -> None:
        """The largest message is an option of the whole server. Calls in hand end on the one before."""
        loaded = self._handler.repository.loaded
        while True:
            await loaded.wait()
            loaded.clear()
            if not self._handler.repository.models or self._need() <= self._largest:
                continue
            self._largest = self._need()
            before = self._server
            leaving = asyncio.create_task(before.stop(self._settings.run_seconds))
            self._server = await self._bind_again()
            await self._server.start()
            logs.info("grpc takes larger messages", bytes=self._largest)
            await leaving

    async def _bind_again(self) -> grpc.aio.Server:
        """On the same port, which grpc's own thread lets go a moment after the server before was told to stop."""
        while True:
            try:
                return make_server(self._handler, self._settings, self._largest, self.port)[0]
            except OSError:
                await asyncio.sleep(BIND_AGAIN_SECONDS)


def make_server(handler: Handler, settings: Settings, largest: int, port: int) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that is bound and not started, and its port. Raises OSError where the port is taken."""
    streams = max(STREAMS, 2 * max((model.rows for model in handler.repository.models), default=1))
    options = [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.max_connection_idle_ms", math.ceil(settings.idle_seconds * 1000)),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", math.ceil((settings.body_seconds + settings.run_seconds) * 1000)),
        ("grpc.max_allowed_incoming_connections", 2 * settings.connections),  # sweep() keeps half of that
        ("grpc.server_handshake_timeout_ms", math.ceil(settings.header_seconds * 1000)),
    ]
    server = grpc.aio.server(options=options)
    servicer = Servicer(handler)
    methods: dict[str, Any] = {
        name: grpc.stream_stream_rpc_method_handler(_guarded(name, call, handler), None, None)
        for name, call in servicer.methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(handler), server)
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = f"{address}:{port}"
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            port = server.add_insecure_port(where)
        else:
            pair = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
            port = server.add_secure_port(where, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:  # grpc's own for every failure to bind
        raise OSError(f"gRPC cannot listen on {where}; is the port taken?") from error
    return server, port


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # it has no types
    """grpc's own, which knows no key and whose streams have no end."""

    def __init__(self, handler: Handler) -> None:
        super().__init__((SERVICE, reflection.SERVICE_NAME))
        self._handler, self._settings = handler, handler.settings

    async def ServerReflectionInfo(self, request_iterator: Any, context: Context) -> None:  # noqa: N802
        body: Body | None = None
        try:
            check_key(self._settings, context)
            with self._handler.calls.one(context.peer()) as body:
                async with asyncio.timeout(self._settings.body_seconds):
                    async for answer in super().ServerReflectionInfo(request_iterator, context):
                        await _write(answer, context, self._handler, body)
        except TimeoutError as error:
            if body is not None and body.leaving:
                self._handler.unwanted.add(context.peer())
                raise _NotTaken from error
            await context.abort(CODES[TooSlow], "the server has described itself for long enough; call again")
        except ServeError as error:
            if body is not None and body.leaving:
                raise _NotTaken from error
            await context.abort(_code(error), str(error))


def _code(error: ServeError) -> grpc.StatusCode:
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def _guarded(name: str, call: Method, handler: Handler) -> Callable[[Any, Context], Awaitable[None]]:
    """Around every RPC: its id, its metrics, its line in the log, and the status of what it raises."""

    async def guarded(stream: AsyncIterator[bytes], context: Context) -> None:
        start, code = time.perf_counter(), grpc.StatusCode.OK
        body: Body | None = None
        given = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        note: dict[str, Any] = {"request_id": logs.request_id(given.get("x-request-id"))}
        NOTE.set(note)
        try:
            with handler.calls.one(context.peer()) as body:
                CALL.set(body)
                answer = (await call(stream, context)).SerializeToString()
                body.leave(len(answer))
                await _write(answer, context, handler, body)
        except ServeError as error:
            code, note["error"] = _code(error), str(error)
        except asyncio.CancelledError as error:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if isinstance(error, _NotTaken) else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001  # the last line of defence: logged, answered, and the server lives
            logs.LOGGER.exception("unexpected error", extra={"fields": note})
            code, note["error"] = grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); see the log"
        finally:
            seconds = time.perf_counter() - start
            handler.metrics.requests.labels("grpc", name, code.name).inc()
            handler.metrics.total.labels("grpc", name).observe(seconds)
            logs.log(20 if name == "ModelInfer" else 10, "request", protocol="grpc", route=name, code=code.name,
                     ms=round(seconds * 1000, 2), **note)  # fmt: skip
        if code is grpc.StatusCode.OK:
            return
        if body is not None and body.leaving:
            raise _NotTaken
        metadata: Iterable[tuple[str, str]] = (("x-request-id", note["request_id"]),)
        await context.abort(code, note["error"], tuple(metadata))

    return guarded


class _NotTaken(asyncio.CancelledError):
    """The client does not take an answer. grpc has no way to take it back, nor to send a status past it: the connection
    is shut, and the call ends as if its client had left."""


async def _write(answer: Any, context: Context, handler: Handler, body: Body) -> None:
    """Until the client has taken the answer. Raises _NotTaken."""
    body.leaving = True
    try:
        async with asyncio.timeout(handler.settings.body_seconds):
            await context.write(answer)
    except TimeoutError as error:
        handler.unwanted.add(context.peer())
        raise _NotTaken from error
    except grpc.aio.InternalError as error:  # the connection was shut meanwhile
        raise _NotTaken from error
    except asyncio.CancelledError:
        if body.sent_away:
            handler.unwanted.add(context.peer())
        raise
    body.leaving = False
