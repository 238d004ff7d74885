"""Who may come in: a counter that is asked before a body is read, so that refusing costs next to nothing."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from dualtoken_deploy.serve.errors import Overloaded, Unavailable


class Gate:
    """At most `limit` requests inside at once. One for each model and one for the server; the event loop's alone."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self.limit = what, limit
        self._inside = 0
        self._closed = False
        self._cut = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        return self._inside

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds a place for the block. Raises Unavailable once closed or cut, Overloaded while there is no place."""
        if self._closed:
            raise Unavailable(f"{self._what} is shutting down; ask another server")
        if self._inside >= self.limit:
            raise Overloaded(f"{self._what} has {self.limit} requests in hand and takes no more; try again later")
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # the event loop's alone
        self._inside += 1
        self._tasks.add(task)
        self._empty.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._cut or task.uncancel():
                raise
            raise Unavailable(f"{self._what} shut down before this request was answered; ask another server") from None
        finally:
            self._inside -= 1
            self._tasks.discard(task)
            if not self._inside:
                self._empty.set()

    def close(self) -> None:
        """Admits nobody from now on; those inside stay."""
        self._closed = True

    def cut(self) -> None:
        """Gives up on those inside: each leaves with Unavailable."""
        self._closed = self._cut = True
        for task in tuple(self._tasks):
            task.cancel()

    async def drained(self) -> None:
        """Returns when nobody is inside."""
        await self._empty.wait()


def key_fits(key: str | None, authorization: str | None, header: str | None) -> bool:
    """Whether a request carries the key; compared in a time that says nothing of it."""
    if key is None:
        return True
    scheme, _, token = (authorization or "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else (header or "")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())
