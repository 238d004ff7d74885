"""Reads a request's body within its limits of size and time, and notices a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from dualtoken_deploy.serve.admission import Body
from dualtoken_deploy.serve.errors import BadRequest, TooLarge, TooSlow, Unsupported

T = TypeVar("T")
HEADER_LENGTH = "inference-header-content-length"


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


async def read_body(request: Request, limit: int, seconds: float, body: Body | None = None) -> bytes:
    """The whole body; `body` is told of what came. Raises Unsupported, TooLarge and TooSlow as soon as it can be known,
    Overloaded where there is no room for it, ClientGone."""
    if request.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise Unsupported("a compressed body is not read; send it as it is")
    length = content_length(request)
    if length is not None and length > limit:
        raise TooLarge(f"the body has {length} bytes; this model's largest request has {limit}")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if body is not None:
                    body.grow(len(parts[-1]))
                more = message.get("more_body", False)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes, this model's largest request")
    except TimeoutError as error:
        raise TooSlow(f"the body did not arrive within {seconds:g} s") from error
    if body is not None:
        body.whole = True
    request.scope["dualtoken"]["bytes"] = size
    request.scope["dualtoken.read"] = True
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, given up when the client closes its connection meanwhile. Raises ClientGone."""
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        if (await request.receive())["type"] == "http.disconnect" and task is not None:
            gone = True
            task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or task is None or task.uncancel():
            raise
        raise ClientGone from None
    finally:
        watching.cancel()


def header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise BadRequest(f"Inference-Header-Content-Length is {text[:40]!r}, not a number of bytes")
    return int(text)


def content_length(request: Request) -> int | None:
    text = request.headers.get("content-length")
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None
