"""One JSON object a line on stderr. Never a body, a tensor, a key or a file name that a client sent."""

from __future__ import annotations

import json
import logging
import re
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("dualtoken.serve")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


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


def set_up(level: int = logging.INFO) -> None:
    """Sends our lines, and what the libraries warn of, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, least in (("dualtoken.serve", level), ("uvicorn", logging.ERROR), ("grpc", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


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
