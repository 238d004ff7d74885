"""The Open Inference Protocol over HTTP, with classify, metrics, documentation and a page: a Starlette application.

A request is admitted before its body is read. Status codes live in this file alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.serve import logs, protocol, static
from dualtoken_deploy.serve.admission import key_fits
from dualtoken_deploy.serve.body import HEADER_LENGTH, ClientGone, content_length, header_length, read_body, unless_gone
from dualtoken_deploy.serve.connection import LINGER
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
from dualtoken_deploy.serve.openapi import document
from dualtoken_deploy.serve.repository import Model
from dualtoken_deploy.tasks.base import Ask

Endpoint = Callable[[Request], Awaitable[Response]]

CODES: Mapping[type[ServeError], int] = MappingProxyType(
    {
        BadRequest: 400,
        Denied: 401,
        Forbidden: 403,
        NotFound: 404,
        TooSlow: 408,
        TooLarge: 413,
        Unsupported: 415,
        ModelFailed: 500,
        Overloaded: 503,
        Unavailable: 503,
        ModelHung: 503,
    }
)
CLIENT_GONE = 499  # nobody reads it; nginx's number, for the metrics and the log
RETRY_AFTER_SECONDS = "1"
SMALL_BYTES = 2**20  # of a refused request's body: up to here it is thrown away and the connection goes on
THROWN_AWAY_BYTES = 32 * 2**20  # of a larger one, before the connection is closed: many clients send before they read
LINGER_SECONDS = 15.0  # in which they may
PORT = re.compile(r":[0-9]*$")
NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{0,40})?([eE]-?[0-9]{1,3})?")
QUIET = ("/v2/health/", "/metrics")  # polled: logged at debug level only


def make_app(handler: Handler) -> ASGIApp:
    """The whole application, ready for any ASGI server."""
    endpoints = Endpoints(handler)
    versioned = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    routes = [  # matched in turn: those that are asked most come first
        *(Route(f"{base}/infer", endpoints.infer, methods=["POST"]) for base in versioned),
        *(Route(f"{base}/classify", endpoints.classify, methods=["POST"]) for base in versioned),
        Route("/", endpoints.file("index.html")),
        Route("/docs", endpoints.file("docs.html")),
        *(Route(f"/{name}", endpoints.file(name)) for name in ("page.js", "docs.js", "page.css")),
        Route("/openapi.json", endpoints.openapi),
        Route("/metrics", endpoints.metrics),
        Route("/v2", endpoints.server_metadata),
        Route("/v2/health/live", endpoints.live),
        Route("/v2/health/ready", endpoints.ready),
        Route("/v2/models", endpoints.models),
        Route("/v2/repository/index", endpoints.index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", endpoints.load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", endpoints.unload, methods=["POST"]),
        *(Route(base, endpoints.model_metadata) for base in versioned),
        *(Route(f"{base}/ready", endpoints.model_ready) for base in versioned),
    ]
    errors: Any = {
        DualTokenError: _answer_error,
        HTTPException: _answer_http_error,
        ClientGone: _answer_nobody,
        Exception: _answer_unexpected,
    }
    return Front(Starlette(routes=routes, exception_handlers=errors), handler)


class Front:
    """Around every request: its id, its key, its metrics and its line in the log; the last to catch an exception."""

    def __init__(self, app: ASGIApp, handler: Handler) -> None:
        self._app, self._handler, self._key = app, handler, handler.settings.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start = time.perf_counter()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        note: dict[str, Any] = {"request_id": logs.request_id(headers.get(b"x-request-id")), "code": CLIENT_GONE}
        scope["dualtoken"] = note

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["code"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", note["request_id"].encode())]
            await send(message)

        try:
            given = headers.get(b"authorization"), headers.get(b"x-api-key")
            self._check_host(scope["path"], headers.get(b"host"))
            if self._needs_key(scope["path"]) and not key_fits(self._key, *given):
                raise Denied("this server needs its API key: Authorization: Bearer KEY, or X-API-Key: KEY")
            await self._app(scope, receive, send_with_id)
        except (Denied, Forbidden) as error:
            await _answer_error(Request(scope, receive), error)(scope, receive, send_with_id)
        except Exception:  # noqa: BLE001  # answered by _answer_unexpected already; logged here, and the server lives on
            logs.LOGGER.exception("unexpected error", extra={"fields": {"request_id": note["request_id"]}})
        finally:
            self._record(scope, note, time.perf_counter() - start)
        return None

    def _check_host(self, path: str, host: str | None) -> None:
        """A name that another's DNS points here is refused: its page would be of our origin. Probes may ask."""
        known = self._handler.settings.known_hosts
        if known is None or host is None or path.startswith("/v2/health/"):  # HTTP/1.0 has none, and is no browser
            return
        name = host.rpartition(":")[0] if PORT.search(host) else host
        if name.strip("[]").lower().rstrip(".") not in known:
            raise Forbidden(f"this server is not called {name[:60]!r}; if it is, start it with --allowed-host")

    def _needs_key(self, path: str) -> bool:
        """Health and metrics are for probes, and the page and its documentation say nothing of the models."""
        return self._key is not None and path.startswith("/v2") and not path.startswith("/v2/health/")

    def _record(self, scope: Scope, note: dict[str, Any], seconds: float) -> None:
        route = getattr(scope.get("endpoint"), "__name__", "none")
        metrics = self._handler.metrics
        metrics.requests.labels("http", route, str(note["code"])).inc()
        metrics.total.labels("http", route).observe(seconds)
        level = 10 if scope["path"].startswith(QUIET) else 20
        fields = {k: v for k, v in note.items() if k != "code"}
        logs.log(level, "request", protocol="http", method=scope["method"], route=route, code=note["code"],
                 ms=round(seconds * 1000, 2), **fields)  # fmt: skip


class Endpoints:
    """One method a route."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self._settings = handler, handler.settings
        self._document = orjson.dumps(document(handler.settings))

    def file(self, name: str) -> Endpoint:
        """A page of this package, read once; nothing of a request names a file."""
        content, kind = static.read(name)
        headers = dict(static.HEADERS)

        async def answer(_request: Request) -> Response:
            return Response(content, media_type=kind, headers=headers)

        answer.__name__ = "page"
        return answer

    async def openapi(self, request: Request) -> Response:
        return Response(self._document, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        metrics = self._handler.metrics
        metrics.ready.set(self._handler.ready)
        metrics.inside.set(self._handler.gate.inside)
        metrics.log_dropped.set(logs.dropped())
        return Response(await metrics.text(), headers={"content-type": metrics.content_type})

    async def server_metadata(self, request: Request) -> Response:
        return _json(self._handler.server_metadata())

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self._handler.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        return _json({"models": [self._handler.model_listing(model) for model in self._handler.repository.models]})

    async def model_metadata(self, request: Request) -> Response:
        return _json(self._handler.model_metadata(self._model(request)))

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request)
        ready = model.ready and not self._handler.draining
        return _json({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        model = self._model(request)
        with self._handler.enter(model), ExitStack() as place:
            json_length = header_length(request)
            limit = model.body_limit
            if json_length is not None:
                limit = protocol.binary_limit(model.spec, model.rows)
            with self._handler.arriving.one() as arriving:
                body = await read_body(request, limit, self._settings.body_seconds, arriving)
                place.enter_context(self._handler.place(model))
                parsed = await unless_gone(request, self._handler.parse(model, body, json_length))
                del body
            answer = await unless_gone(request, self._handler.infer(model, parsed))
            content, length = protocol.encode_response(answer.outputs, parsed, model.name, model.version, model.labels)
        request.scope["dualtoken"] |= {
            "model": f"{model.name}:{model.version}",
            "rows": parsed.rows,
            "batch": answer.batch_rows,
            "queue_ms": round(answer.queue_seconds * 1000, 2),
            "run_ms": round(answer.run_seconds * 1000, 2),
        }
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})

    async def classify(self, request: Request) -> Response:
        model = self._model(request)
        ask, overlay = _asked(request), _truth(request, "overlay")
        with self._handler.enter(model), self._handler.arriving.one() as arriving:
            limit = int(self._settings.max_image_mib * 2**20)
            body = await read_body(request, limit, self._settings.body_seconds, arriving)
            content_type = request.headers.get("content-type", "")
            with self._handler.place(model):
                result = await unless_gone(request, self._handler.classify(model, body, content_type, ask, overlay))
        request.scope["dualtoken"] |= {"model": f"{model.name}:{model.version}"} | {
            f"{name}_ms": value for name, value in result["timing_ms"].items()
        }
        return _json(result)

    async def index(self, request: Request) -> Response:
        self._check_admin(request)
        await self._no_parameters(request)
        return _json(self._handler.repository.index())

    async def load(self, request: Request) -> Response:
        self._check_admin(request)
        await self._no_parameters(request)
        try:
            await self._handler.repository.load(request.path_params["model"])
        except ServeError:
            raise
        except DualTokenError as error:
            raise BadRequest(str(error)) from error
        return _json({})

    async def unload(self, request: Request) -> Response:
        self._check_admin(request)
        await self._no_parameters(request)
        await self._handler.repository.unload(request.path_params["model"])
        return _json({})

    def _model(self, request: Request) -> Model:
        return self._handler.repository.find(request.path_params["model"], request.path_params.get("version"))

    def _check_admin(self, request: Request) -> None:
        """Another site's page may post here from a browser: it would say so in Origin."""
        if not self._settings.admin:
            raise Forbidden("control of the repository is off; start the server with --admin")
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        if not _same_origin(origin, request.headers.get("host")) or site not in ("none", "same-origin"):
            raise Forbidden("a page of another origin may not control the repository")

    async def _no_parameters(self, request: Request) -> None:
        """Clients send {} or nothing; an override of the configuration, or files to load, are not taken."""
        body = await read_body(request, protocol.JSON_ENVELOPE, self._settings.body_seconds)
        try:
            data = orjson.loads(body) if body.strip() else {}
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the request is not JSON ({error})") from error
        parameters = (data.get("parameters") or {}) if isinstance(data, dict) else None
        if not isinstance(parameters, dict) or any(key == "config" or key.startswith("file:") for key in parameters):
            raise BadRequest("a load takes no configuration and no files; change the bundle on disk")


def _asked(request: Request) -> Ask:
    """`top` and `min_score` of the query; their limits are the handler's. Raises BadRequest."""
    top, score = request.query_params.get("top", "5"), request.query_params.get("min_score", "0.5")
    if not (top.isascii() and top.isdecimal() and len(top) < 6):
        raise BadRequest("top is not a number")
    if not NUMBER.fullmatch(score):
        raise BadRequest("min_score is not a number")
    return Ask(int(top), float(score))


def _truth(request: Request, name: str) -> bool:
    """A word of the query that is true or false; false unless given. Raises BadRequest."""
    said = request.query_params.get(name, "false")
    if said not in ("true", "false"):
        raise BadRequest(f"{name} is neither true nor false")
    return said == "true"


def _same_origin(origin: str | None, host: str | None) -> bool:
    """Whether a page that says where it is from is of this server; other clients say nothing."""
    try:
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:  # no address at all
        return False


class _Closing(Response):
    """An answer to a request whose body nobody will read: told at once, then a moment to read it, then closed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        scope.get(LINGER, _nothing)()
        left = THROWN_AWAY_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and (message := await receive()).get("more_body", False):
                    left -= len(message["body"])
        await send({"type": "http.response.body", "body": b""})


def _answer_error(request: Request, error: Exception) -> Response:
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), 500)
    request.scope["dualtoken"]["error"] = str(error)
    headers = {"retry-after": RETRY_AFTER_SECONDS} if code == 503 else {}
    if code == 401:
        headers["www-authenticate"] = "Bearer"
    return _refusal(request, str(error), code, headers)


def _answer_http_error(request: Request, error: Exception) -> Response:
    """The router's own: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101  # that is what it is registered for
    return _refusal(request, error.detail, error.status_code, dict(error.headers or {}))


def _answer_nobody(request: Request, _error: Exception) -> Response:
    request.scope["dualtoken"]["error"] = "the client closed its connection"
    return Response(status_code=CLIENT_GONE)


def _answer_unexpected(request: Request, error: Exception) -> Response:
    return _refusal(request, f"internal error ({type(error).__name__}); see the server's log", 500, {})


def _refusal(request: Request, text: str, code: int, headers: dict[str, str]) -> Response:
    content = orjson.dumps({"error": text.encode("utf-8", "replace").decode()})
    chunked = "transfer-encoding" in request.headers
    unread = chunked or (content_length(request) or 0) > SMALL_BYTES or code == CODES[TooSlow]
    kind = _Closing if unread and not request.scope.get("dualtoken.read") else Response
    return kind(content, code, headers, "application/json")


def _nothing() -> None:
    """Where the server in front of the application has no connections of ours."""


def _json(data: Any, code: int = 200) -> Response:
    return Response(orjson.dumps(data), code, media_type="application/json")
