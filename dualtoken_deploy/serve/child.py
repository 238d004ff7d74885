"""The server's end of a process of ours: starts it, speaks frames with it, reads what it prints, and ends it.

What a process prints never reaches the server's stderr as it is: it is logged, a line at a time, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dualtoken_deploy.errors import BundleError, DualTokenError
from dualtoken_deploy.serve import logs
from dualtoken_deploy.serve.frames import FRAME

LINE_CHARACTERS = 500  # of what a process prints; the rest of a line is left out
LAST_LINES = 3  # of them, in the message of a process that died
LAST_WORDS_SECONDS = 1.0  # a process that died may have children that hold its pipe open


class ChildDied(DualTokenError):
    """The process ended, or its socket did. While it loads, that is held against the bundle unless it says more."""

    def __init__(self, message: str, exit_code: int = BundleError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Child:
    """A started process. Made by `start`; one exchange at a time."""

    def __init__(
        self, what: str, process: asyncio.subprocess.Process, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> None:
        self._what, self._process = what, process
        self._reader, self._writer = streams
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._listening = asyncio.ensure_future(self._listen())
        self.exited = asyncio.ensure_future(process.wait())

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    async def start(module: str, what: str, task: dict[str, Any], descriptors: Sequence[int] = ()) -> Child:
        """Runs `python -m module` with a task (JSON) as its one argument, to which socket and parent are added.

        `what` names it in messages; `descriptors` are inherited under their numbers. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        try:
            text = json.dumps(task | {"socket": theirs.fileno(), "parent": os.getpid()})
            command = (sys.executable, "-P", "-m", module, text)  # -P: no module from the working directory
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(), *descriptors),
            )
            try:
                return Child(what, process, await asyncio.open_connection(sock=ours))
            except BaseException:
                process.kill()
                raise
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    async def ask(self, message: Any) -> tuple[dict[str, Any], bytes]:
        """Sends a frame and returns the one that answers it. Raises ChildDied."""
        text = json.dumps(message).encode()
        self._writer.write(FRAME.pack(len(text), 0) + text)
        return await self.receive()

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises ChildDied, with how the process ended and the last lines that it printed."""
        try:
            length, size = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            text = await self._reader.readexactly(length)
            return json.loads(text), await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChildDied(f"{self._what} (pid {self.pid}) died{await self._last_words()}; it is replaced") from error

    async def kill(self) -> None:
        """Ends the process, whatever it does, and waits for it."""
        self._writer.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self.exited
        self._listening.cancel()

    async def _last_words(self) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await asyncio.wait({self.exited, self._listening})
        code = self._process.returncode
        how = "" if code is None else f" of signal {-code}" if code < 0 else f" with exit code {code}"
        said = " / ".join(self._last)
        return how + (f", its last words: {said[-LINE_CHARACTERS:]}" if said else "")

    async def _listen(self) -> None:
        """Reads to the end what the process prints, so that it never waits for a reader."""
        stream, rest = self._process.stdout, b""
        assert stream is not None  # noqa: S101  # a pipe was asked for
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:LINE_CHARACTERS]
            for line in lines:
                self._heard(line)
        self._heard(rest)

    def _heard(self, line: bytes) -> None:
        text = line[:LINE_CHARACTERS].decode("utf-8", "replace").strip()
        if text:
            self._last.append(text)
            logs.info("output", process=self._what, pid=self.pid, text=text)
