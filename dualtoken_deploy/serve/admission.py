"""Who may come in: counters that are asked before a body is read, so that refusing costs next to nothing.

Two things are counted apart. A request is *inside* from its headers to its answer; it takes a *place*, of which there
are few, only once its body is whole. So bodies that trickle keep nobody out; they are bounded by Arriving.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dualtoken_deploy.serve.errors import Overloaded, TooSlow, Unavailable

LARGE_BYTES, LARGE_SHARE = 2**20, 0.75  # of all bytes: what bodies above a MiB may take together
YOUNG_SECONDS = 0.05  # a body younger than this is taken to be this old, when its rate is asked for


class Gate:
    """At most `limit` requests at work at once. One for each model and one for the server; the event loop's alone."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self.limit = what, limit
        self._at_work = 0
        self._closed = False
        self._cut = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        return len(self._tasks)

    @property
    def at_work(self) -> int:
        return self._at_work

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Lets a request in to be read. Raises Unavailable once closed or cut, Overloaded while there is no place."""
        if self._closed:
            raise Unavailable(f"{self._what} is shutting down; ask another server")
        self._check()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # the event loop's alone
        self._tasks.add(task)
        self._empty.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._cut or task.uncancel():
                raise
            raise Unavailable(f"{self._what} shut down before this request was answered; ask another server") from None
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._empty.set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place for one that is inside, also while the gate closes. Raises Overloaded while there is none."""
        self._check()
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def _check(self) -> None:
        if self._at_work >= self.limit:
            raise Overloaded(f"{self._what} has {self.limit} requests in hand and takes no more; try again later")

    def close(self) -> None:
        """Lets nobody in from now on; those inside stay."""
        self._closed = True

    def cut(self) -> None:
        """Gives up on those inside: each leaves with Unavailable."""
        self._closed = self._cut = True
        for task in tuple(self._tasks):
            task.cancel()

    async def drained(self) -> None:
        """Returns when nobody is inside."""
        await self._empty.wait()


class Body:
    """One body that arrives, or lies whole until it was read; or an answer, until its client has read it.

    `owner`: the connection that it came by, where one may have several.
    """

    def __init__(self, arriving: Arriving, task: asyncio.Task[object], owner: object = None) -> None:
        self._arriving, self.task = arriving, task
        self.owner = self if owner is None else owner
        self.since = time.monotonic()
        self.bytes = 0
        self.whole = False
        self.sent_away = False
        self.leaving = False  # an answer that is being written

    def grow(self, count: int) -> None:
        """Told of each part. Raises Overloaded where there is no room for it."""
        self.bytes += count
        self._arriving.bytes += count
        self._arriving.make_room(self)

    def leave(self, count: int) -> None:
        """From now on it is an answer of so many bytes that waits for its client. Raises Overloaded."""
        self.since, self.whole = time.monotonic(), False
        self._arriving.bytes -= self.bytes
        self.bytes = 0
        self.grow(count)

    def rate(self, now: float) -> float:
        return self.bytes / max(YOUNG_SECONDS, now - self.since)


class Arriving:
    """Bodies in memory: at most `most`, of `most_bytes` together. Where there are more, one is sent away: of the
    connection that has the most of them the slowest."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.bytes = 0
        self._bodies: set[Body] = set()

    @property
    def count(self) -> int:
        return len(self._bodies)

    @contextmanager
    def one(self, owner: object = None) -> Iterator[Body]:
        """A body that is about to come. Raises Overloaded where there is no room, TooSlow where it is sent away."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # the event loop's alone
        body = Body(self, task, owner)
        self._bodies.add(body)
        try:
            self.make_room(body)
            yield body
        except asyncio.CancelledError:
            if not body.sent_away or task.uncancel():
                raise
            raise TooSlow("this client was slower than all others, and its room was needed; be faster") from None
        finally:
            self._bodies.discard(body)
            self.bytes -= body.bytes

    def make_room(self, newest: Body) -> None:
        """Sends bodies away, until what is there fits. Large ones have their share, so that small ones have room."""
        if len(self._bodies) <= self.most and self.bytes <= LARGE_SHARE * self.most_bytes:
            return
        while among := self._too_many():
            now, owned = time.monotonic(), Counter(body.owner for body in among)
            coming = [body for body in among if not body.whole and body is not newest]
            if newest not in among and not coming:
                return
            slowest = min(coming, key=lambda body: (-owned[body.owner], body.rate(now), body.since), default=newest)
            alike = newest in among and owned[slowest.owner] == owned[newest.owner]
            if slowest is newest or (alike and newest.bytes and newest.rate(now) < slowest.rate(now)):
                raise Overloaded("the server holds as many bodies as it has room for; try again later")
            slowest.sent_away = True
            slowest.task.cancel()

    def _too_many(self) -> list[Body]:
        """Those of whom one has to leave; none where all fit."""
        here = [body for body in self._bodies if not body.sent_away]
        large = [body for body in here if body.bytes > LARGE_BYTES]
        if sum(body.bytes for body in large) > LARGE_SHARE * self.most_bytes:
            return large
        return here if len(here) > self.most or sum(body.bytes for body in here) > self.most_bytes else []


def key_fits(key: str | None, authorization: str | None, header: str | None) -> bool:
    """Whether a request carries the key; compared in a time that says nothing of it."""
    if key is None:
        return True
    scheme, _, token = (authorization or "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else (header or "")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())
