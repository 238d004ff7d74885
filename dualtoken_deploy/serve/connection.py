"""uvicorn's HTTP protocol with what it lacks: times and sizes for everything that a client may stretch.

Headers, trailers, bodies that nobody reads, answers that the client does not read, requests that are sent without
waiting for an answer, and the number of connections: one too many takes the place of the idlest, or of who sent most
ahead of the answers. Health is always answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dualtoken_deploy.serve.settings import Settings

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 256  # lines; each costs its reader a hundred times what it costs its sender
MAX_URL_BYTES = 8 * 1024
MAX_FRAMING_BYTES = 64 * 1024  # of a body in chunks beside its contents: their sizes, extensions and trailers,
BODY_BYTES_FOR_FRAMING = 16  # and a byte more for so many of its contents: chunks of a hundred bytes, or larger ones
MAX_PIECES = 1024  # of a body, and one more for so many of its bytes: each costs some microseconds, however small
PIECE_BYTES = 64
UNREAD_BYTES = 64 * 2**20  # of answers that clients do not read, all together
MAX_PIPELINED = 16  # requests of a connection that wait for the answers before theirs
STALLED_SECONDS = 1.0  # after which a client that does not read is the first to leave for another
END_SECONDS = 1.0  # in which a connection that is to end may still send what it has, once the server ends
HEALTH = b"/v2/health/"
LINGER = "dualtoken.linger"  # of the scope: to be called once the rest of a request is only thrown away
Headers = list[tuple[bytes, bytes]]


class _Enough(Exception):
    """Raised inside of the parser, which goes on through all that has arrived otherwise."""


def bounded_protocol(settings: Settings, speaks: Callable[[int], None]) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http`: it builds instances itself, so the limits are bound here.

    `speaks` is told the descriptor of each connection that begins.
    """
    header_seconds, body_seconds = settings.header_seconds, settings.body_seconds
    quiet: dict[BoundedProtocol, None] = {}  # without a request in hand, the longest first
    stalled: dict[BoundedProtocol, float] = {}  # that do not read their answer, and since when

    def first_to_leave(connections: Iterable[object]) -> BoundedProtocol | None:
        """Who makes room for a newcomer: one that does not read, the idlest, one that only closes, or the one with most
        requests sent ahead of their answers; None where each has the one request that it waits for."""
        now = asyncio.get_running_loop().time()
        for connection, since in stalled.items():
            if now - since > STALLED_SECONDS:
                return connection
        if quiet:
            return next(iter(quiet))
        own = (one for one in connections if isinstance(one, BoundedProtocol))
        greediest = max(own, key=lambda one: (one.transport.is_closing(), len(one.pipeline)))
        return greediest if greediest.transport.is_closing() or greediest.pipeline else None

    def make_room() -> None:
        """Who has not read for the longest time leaves while what all of them have not read is too much."""
        unread = {connection: connection.transport.get_write_buffer_size() for connection in stalled}
        total = sum(unread.values())
        for connection in list(stalled)[:-1]:
            if total <= UNREAD_BYTES:
                return
            total -= unread[connection]
            connection.leave()

    class BoundedProtocol(HttpToolsProtocol):
        """A connection that has to make progress while the application does not wait for it."""

        _timer: asyncio.TimerHandle | None = None  # of what the client sends
        _unread_timer: asyncio.TimerHandle | None = None  # of what it does not read
        _header_bytes = 0  # that arrived since the last request
        _named_bytes = 0  # of the request line and the headers that are complete
        _lines = 0  # of its headers
        _framing_bytes = 0  # of the body, beside its contents
        _body_bytes = 0
        _pieces = 0  # that it came in
        _in_headers = True
        _in_body = False
        _surplus = False  # one too many, and every other has a request in hand
        _deaf = False  # refused: whatever still comes is thrown away

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._chunks: list[bytes] = []
            speaks(transport.get_extra_info("socket").fileno())
            if len(self.connections) > settings.connections:
                leaving = first_to_leave(self.connections)
                if leaving is None:
                    self._surplus = True
                else:
                    leaving.leave()
            quiet[self] = None
            self._arm(header_seconds)  # a connection that says nothing is closed as well

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self._read_again()
            quiet.pop(self, None)
            super().connection_lost(exc)

        def leave(self) -> None:
            """Makes room for another connection."""
            quiet.pop(self, None)
            self._read_again()
            self.connections.discard(self)
            self.transport.abort()

        def data_received(self, data: bytes) -> None:
            if self._deaf:
                return
            if self._in_headers:
                self._header_bytes += len(data)
                if self._timer is None:
                    self._arm(header_seconds)
            elif self._in_body:
                self._framing_bytes += len(data)
            super().data_received(data)
            self._hand_over()
            if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")
            elif self._in_body and self._framing_bytes > MAX_FRAMING_BYTES + self._body_bytes // BODY_BYTES_FOR_FRAMING:
                self._refuse(b"400 Bad Request")

        def on_message_begin(self) -> None:
            if not self._deaf:
                self._named_bytes = self._lines = 0
                super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            if not self._deaf:
                self._named_bytes += len(url)
                if self._named_bytes > MAX_URL_BYTES:
                    self._refuse(b"414 URI Too Long")
                else:
                    super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            """A trailer comes here as well; nobody asked for one."""
            if self._in_headers and not self._deaf:
                self._named_bytes += len(name) + len(value) + 4
                self._lines += 1
                if self._lines > MAX_HEADERS:
                    self._refuse(b"431 Request Header Fields Too Large")
                    raise _Enough
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self._deaf:
                return
            self._disarm()
            why = self._why_not()
            if why is not None:
                self._refuse(why)
                return
            # what arrived together with the headers and is none of them
            self._framing_bytes, self._body_bytes = max(0, self._header_bytes - self._named_bytes), 0
            self._pieces = 0
            self._in_headers, self._in_body, self._header_bytes = False, True, 0
            quiet.pop(self, None)
            super().on_headers_complete()
            cycle: Any = self.cycle
            if cycle is not None:
                cycle.scope[LINGER] = self.linger
                if self._surplus:
                    cycle.keep_alive = False

        def on_body(self, body: bytes) -> None:
            """A chunk: kept until all that has arrived is parsed, since uvicorn copies what is there for each."""
            if not self._deaf:
                self._body_bytes += len(body)
                self._framing_bytes -= len(body)
                self._pieces += 1
                if self._pieces > MAX_PIECES + self._body_bytes // PIECE_BYTES:
                    self._refuse(b"400 Bad Request")
                    raise _Enough
                self._chunks.append(body)

        def _hand_over(self) -> None:
            if self._chunks and not self._deaf:
                super().on_body(b"".join(self._chunks))
            self._chunks.clear()

        def on_message_complete(self) -> None:
            if self._deaf:
                return
            self._disarm()
            self._hand_over()
            self._in_headers, self._in_body = True, False
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._expect_reading(body_seconds)
                return
            cycle: Any = self.cycle  # the newest of those that were sent without waiting for an answer
            if cycle.response_complete:
                quiet[self] = None
            if self._in_body:
                self._arm(body_seconds)  # answered before its body was there: thrown away, but not for ever

        def linger(self) -> None:
            """Answered, and what still comes is thrown away: the connection is nobody's loss."""
            quiet[self] = None

        def pause_writing(self) -> None:
            super().pause_writing()
            stalled[self] = self.loop.time()
            self._expect_reading(body_seconds)
            make_room()

        def resume_writing(self) -> None:
            self._read_again()
            super().resume_writing()

        def timeout_keep_alive_handler(self) -> None:
            self._close()

        def send_400_response(self, msg: str) -> None:
            """uvicorn's own would land inside of an answer that is under way."""
            if not self._deaf:
                self._refuse(b"400 Bad Request")

        def shutdown(self) -> None:
            super().shutdown()
            self._expect_reading(END_SECONDS)

        def _why_not(self) -> bytes | None:
            """The status of a request that is refused for its headers alone, or None."""
            if len(self.pipeline) >= MAX_PIPELINED:
                return b"429 Too Many Requests"
            if self._named_bytes > MAX_HEADER_BYTES:
                return b"431 Request Header Fields Too Large"
            if not well_formed(self.parser.get_http_version(), self.headers):
                return b"400 Bad Request"
            if self._surplus and len(self.connections) <= settings.connections:
                self._surplus = False
            if self._surplus and not self.url.startswith(HEALTH):
                return b"503 Service Unavailable\r\nretry-after: 1"
            return None

        def _arm(self, seconds: float) -> None:
            self._disarm()
            self._timer = self.loop.call_later(seconds, self._too_slow)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            if self._in_headers and self._header_bytes:
                self._refuse(b"408 Request Timeout")
            else:
                self._close()

        def _expect_reading(self, seconds: float) -> None:
            """Ends the connection after a time, whatever is left to send."""
            if self._unread_timer is not None:
                self._unread_timer.cancel()
            self._unread_timer = self.loop.call_later(seconds, self.transport.abort)

        def _read_again(self) -> None:
            stalled.pop(self, None)
            if self._unread_timer is not None and not self.transport.is_closing():
                self._unread_timer.cancel()
                self._unread_timer = None

        def _close(self) -> None:
            """What is written is still sent, if the client reads it."""
            self.transport.close()
            self._expect_reading(body_seconds)

        def _refuse(self, status: bytes) -> None:
            """Says why where no answer is under way, in which the line would land; hears nothing from then on."""
            self._disarm()
            self._deaf = True
            cycle: Any = self.cycle
            answered = cycle is None or cycle.response_complete
            alone = self._in_body and not self.pipeline and cycle is not None and not cycle.response_started
            if answered or alone:
                self._say(status)
                self._close()
            else:
                cycle.keep_alive = False  # closes behind the answers to what came before

        def _say(self, status: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    return BoundedProtocol


def well_formed(version: str, headers: Headers) -> bool:
    """Whether a request can be read in one way only: RFC 9112, 3.2 (one Host) and 6.1 (no coding but chunked)."""
    hosts = sum(name == b"host" for name, _ in headers)
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.0", "1.1") or hosts > 1 or (version == "1.1" and hosts != 1):
        return False
    return not codings or (version == "1.1" and codings == [b"chunked"])
