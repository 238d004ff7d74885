"""uvicorn's HTTP protocol with what it lacks: a time and a size for headers, an end for bodies nobody reads, and a
number of connections: one too many takes the place of the one that has asked nothing for the longest time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dualtoken_deploy.serve.settings import Settings

MAX_HEADER_BYTES = 64 * 1024


def bounded_protocol(settings: Settings) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http`: it builds instances itself, so the limits are bound here."""
    header_seconds, body_seconds = settings.header_seconds, settings.body_seconds
    quiet: dict[BoundedProtocol, None] = {}  # without a request in hand, the longest first

    class BoundedProtocol(HttpToolsProtocol):
        """A connection that has to make progress while the application does not wait for it."""

        _timer: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _in_headers = True
        _in_body = False
        _surplus = False  # one too many, and every other has a request in hand

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.connections:
                self._surplus = not quiet
                for longest in list(quiet)[:1]:
                    longest.leave()
            quiet[self] = None
            self._arm(header_seconds)  # a connection that says nothing is closed as well

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            quiet.pop(self, None)
            super().connection_lost(exc)

        def leave(self) -> None:
            """Makes room for another connection."""
            quiet.pop(self, None)
            self.connections.discard(self)
            self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self._surplus and len(self.connections) > settings.connections:
                return self._refuse(b"503 Service Unavailable\r\nretry-after: 1")
            self._surplus = False
            if self._in_headers:
                self._header_bytes += len(data)
                if self._timer is None:
                    self._arm(header_seconds)
            super().data_received(data)
            if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")
            return None

        def on_headers_complete(self) -> None:
            self._disarm()
            self._in_headers, self._in_body, self._header_bytes = False, True, 0
            quiet.pop(self, None)
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._disarm()
            self._in_headers, self._in_body = True, False
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            cycle: Any = self.cycle  # the newest of those that were sent without waiting for an answer
            if cycle.response_complete and not self.transport.is_closing():
                quiet[self] = None
            if self._in_body and not self.transport.is_closing():
                self._arm(body_seconds)  # answered before its body was there: the rest is thrown away, but not for ever

        def _arm(self, seconds: float) -> None:
            self._disarm()
            self._timer = asyncio.get_running_loop().call_later(seconds, self._too_slow)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            if self._in_headers and self._header_bytes:
                self._refuse(b"408 Request Timeout")
            else:
                self.transport.close()

        def _refuse(self, status: bytes) -> None:
            """Only while no request is being answered: the status line would land inside another's answer."""
            self._disarm()
            cycle: Any = self.cycle
            if not self.transport.is_closing() and (cycle is None or cycle.response_complete):
                self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    return BoundedProtocol
