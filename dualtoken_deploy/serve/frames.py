"""What the server and its processes say to each other: frames over a socket that the process inherits.

A frame is two big-endian lengths (JSON, payload), the JSON and the payload. Nothing is pickled. This is the process's
end, without asyncio; the server's is child.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

FRAME = struct.Struct(">IQ")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def send(link: socket.socket, message: Any, payload: Sequence[bytes] = ()) -> None:
    text, data = json.dumps(message).encode(), b"".join(payload)
    link.sendall(FRAME.pack(len(text), len(data)) + text + data)


def receive(link: socket.socket) -> Any:
    """The JSON of the next frame, or None where the server has closed the socket."""
    head = _read(link, FRAME.size)
    if head is None:
        return None
    length, _ = FRAME.unpack(head)
    text = _read(link, length)
    return None if text is None else json.loads(text)


def _read(link: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def belong_to(parent: int) -> None:
    """Has the server alone decide when this process ends, and the kernel end it with its server.

    SIGINT and SIGTERM are ignored: Ctrl-C goes to both. A runtime that hangs would not notice the closed socket.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
