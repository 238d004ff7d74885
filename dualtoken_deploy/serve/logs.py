"""One JSON object a line on stderr. Never a body, a tensor, a key or a file name that a client sent.

A line never waits for who reads stderr: a thread writes, from a queue that has an end, and lines that do not fit are
counted instead. What libraries print on stderr goes the same way.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("dualtoken.serve")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
QUEUED_LINES = 10_000  # that nobody has read yet; about 4 MB
LAST_LINES_SECONDS = 1.0  # in which what is queued may still be written when the server ends
STDERR = 2


class JsonFormatter(logging.Formatter):
    """time (UTC, ISO 8601), level, event, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=True, default=str)


class Writer(logging.Handler):
    """Queues lines for a thread that writes them to a descriptor, however long that takes."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUED_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record).encode() + b"\n")
        except queue.Full:
            self.dropped += 1

    def end(self) -> bool:
        """Whether everything that is queued was written before its time was up."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=LAST_LINES_SECONDS)
        self._thread.join(LAST_LINES_SECONDS)
        return not self._thread.is_alive()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            while line:
                try:
                    line = line[os.write(self._descriptor, line) :]
                except BlockingIOError:  # who gave us stderr may have made it non-blocking
                    threading.Event().wait(0.05)
                except OSError:  # nobody will ever read it
                    line = b""


WRITER: Writer | None = None


def dropped() -> int:
    """Lines that were not written, because nobody read stderr."""
    return 0 if WRITER is None else WRITER.dropped


@contextmanager
def on_stderr(level: int = logging.INFO) -> Iterator[None]:
    """For the block, sends our lines and what the libraries warn of to stderr; for good where it is not read.

    The descriptor 2 itself becomes a pipe into the log, which never blocks: libraries in C write there, from threads
    that hold locks, and one of their lines follows from a client's bad TLS.
    """
    global WRITER
    sys.stderr.flush()
    real = os.dup(STDERR)
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    os.dup2(sink, STDERR)
    os.close(sink)
    WRITER = Writer(real)
    try:
        for name, least in (("dualtoken.serve", level), ("uvicorn", logging.ERROR), ("grpc", logging.WARNING)):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [WRITER], False
            logger.setLevel(least)
        threading.Thread(target=_forward, args=(source,), name="stderr", daemon=True).start()
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        read = WRITER.end()
        os.dup2(real, STDERR)
        if read:
            os.close(real)
        else:  # its reader is gone or asleep: what the interpreter still says must not wait for it
            os.set_blocking(STDERR, False)


def _forward(source: int) -> None:
    """Logs what is printed on the descriptor 2, a line at a time."""
    rest = b""
    with suppress(OSError):
        while data := os.read(source, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:1000]
            for line in lines:
                if text := line[:1000].decode("utf-8", "replace").strip():
                    info("output", process="the server", text=text)
    os.close(source)


def log(level: int, event: str, **fields: Any) -> None:
    """One line; fields that are None are left out."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


def info(event: str, **fields: Any) -> None:
    log(logging.INFO, event, **fields)


def warning(event: str, **fields: Any) -> None:
    log(logging.WARNING, event, **fields)


def request_id(given: str | None) -> str:
    """The client's own id where it is harmless in a log, a new one otherwise."""
    return given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
