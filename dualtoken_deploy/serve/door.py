"""Connections before they speak: sockets that never start TLS, and those of gRPC, of which Python sees none.

asyncio tells a protocol of a TLS connection only once its handshake is done, and grpc keeps its connections to itself.
Both lie open in this process, so that they can be counted here, and the idlest shut.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

SWEEP_SECONDS = 0.25
REQUEST_BYTES = 1024  # of HTTP/2 with its preface, settings and the headers of one call, and a tensor
BYTES_RECEIVED = 128  # of struct tcp_info: 64 bits, since Linux 4.1
LAST_DATA_RECEIVED = 52  # of struct tcp_info, linux/tcp.h: milliseconds, 32 bits


class Listener(socket.socket):
    """A listening socket that shuts accepted ones which start no TLS: after `seconds`, or the oldest beyond `most`."""

    def __init__(self, family: int, seconds: float, most: int) -> None:
        # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer waits 40 ms for an ACK
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._seconds, self._most = seconds, most
        self._silent: dict[int, tuple[_Accepted, asyncio.TimerHandle]] = {}  # by descriptor, the oldest first

    def accept(self) -> tuple[socket.socket, Any]:
        plain, address = super().accept()
        accepted = _Accepted(plain.family, plain.type, plain.proto, fileno=plain.detach())
        accepted.listener, number = self, accepted.fileno()
        late = asyncio.get_running_loop().call_later(self._seconds, self._shut, number)
        self._silent[number] = accepted, late
        if len(self._silent) > self._most:
            self._shut(next(iter(self._silent)))
        return accepted, address

    def speaks(self, number: int) -> None:
        """Told of a descriptor that has a protocol now, or is closed."""
        found = self._silent.pop(number, None)
        if found is not None:
            found[1].cancel()

    def _shut(self, number: int) -> None:
        accepted, late = self._silent.pop(number)
        late.cancel()
        with suppress(OSError):  # asyncio sees the end of the stream, and closes it
            accepted.shutdown(socket.SHUT_RDWR)


class _Accepted(socket.socket):
    """A socket that tells its listener when it is closed."""

    listener: Listener | None = None

    def close(self) -> None:
        if self.listener is not None:
            self.listener.speaks(self.fileno())
            self.listener = None
        super().close()


async def sweep(port: int, most: int, unwanted: set[str]) -> None:
    """For ever keeps the connections to a port of this process to at most `most`: the most useless is shut first; and
    shuts those of the peers that are `unwanted`, in grpc's words, which are then taken out.

    Their owner, grpc, sees the end of the stream and closes it, with all that waits to be sent on it.
    """
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        links = connections(port)
        links.sort(key=_uselessness, reverse=True)
        for index, link in enumerate(links):
            if index < len(links) - most or (unwanted and peer(link) in unwanted):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
            link.close()
        unwanted.clear()


def connections(port: int) -> list[socket.socket]:
    """Second descriptors of this process's connections that were accepted at a port; the caller closes them."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            link = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed meanwhile
            continue
        try:
            inet = link.family in (socket.AF_INET, socket.AF_INET6)
            if inet and link.getsockname()[1] == port and link.getpeername():
                found.append(link)
                continue
        except OSError:  # the listener itself, or one that is gone
            pass
        link.close()
    return found


def peer(link: socket.socket) -> str:
    """Who is at the other end, as grpc says it: ipv4:127.0.0.1:5000, ipv6:%5B::1%5D:5000."""
    try:
        host, port = link.getpeername()[:2]
    except OSError:
        return ""
    host = host.removeprefix("::ffff:")
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _uselessness(link: socket.socket) -> tuple[bool, int]:
    """Who never sent a request leaves before those who wait for an answer, and the idlest of them first."""
    try:
        info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return False, 0
    (idle_ms,) = struct.unpack_from("I", info, LAST_DATA_RECEIVED)
    (received,) = struct.unpack_from("Q", info, BYTES_RECEIVED)
    return received < REQUEST_BYTES, idle_ms
