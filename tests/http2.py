"""HTTP/2 by hand, for clients that no library would be: as much as gRPC calls take (RFC 9113, RFC 7541)."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4
POST, HTTP = b"\x83", b"\x86"  # of HPACK's static table


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data


def connect(address: str, window: int) -> socket.socket:
    """A connection whose client takes `window` bytes of each answer, and then no more."""
    host, _, port = address.rpartition(":")
    link = socket.create_connection((host, int(port)), timeout=20)
    link.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))
    return link


def start(path: str, number: int) -> bytes:
    """The headers of a connection's call `number`, 0 first."""
    fields = {":path": path, ":authority": "localhost", "content-type": "application/grpc", "te": "trailers"}
    return frame(HEADERS, END_HEADERS, 2 * number + 1, POST + HTTP + b"".join(map(_literal, fields.items())))


def call(path: str, number: int, message: bytes) -> bytes:
    """The same, and its one message."""
    framed = b"\0" + struct.pack(">I", len(message)) + message
    return start(path, number) + frame(DATA, END_STREAM, 2 * number + 1, framed)


def _literal(field: tuple[str, str]) -> bytes:
    """A header field as it is, neither compressed nor remembered."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field)
