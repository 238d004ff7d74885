"""One request to a device: OpenSSH's client, our agent through its stdin, frames back."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dualtoken_deploy.errors import (
    ConversionError,
    DualTokenError,
    InputError,
    MissingError,
    ToleranceError,
    UsageError,
)
from dualtoken_deploy.remote.devices import Device

BOOT = (
    "import sys;n=int(sys.stdin.buffer.readline());"
    "exec(compile(sys.stdin.buffer.read(n),'agent','exec'),{'__name__':'agent'})"
)
ERRORS: Mapping[int, type[DualTokenError]] = {
    kind.exit_code: kind for kind in (UsageError, MissingError, InputError, ToleranceError, ConversionError)
}
LOST = 255  # ssh's own exit code
GRACE_S = 15.0  # for the device to end a command that was interrupted

Frame = Mapping[str, Any]


def error_of(code: int, message: str) -> DualTokenError:
    """The error that ends this program with the exit code of the other."""
    return ERRORS.get(code, InputError)(message)


class Link:
    """What one device is asked. Each request is a connection of its own: nothing is left open between them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._source = Path(__file__).with_name("agent.py").read_bytes()

    def ask(
        self,
        do: str,
        payload: Iterable[bytes] = (),
        on_frame: Callable[[Frame], None] | None = None,
        take: Callable[[str, int, IO[bytes]], None] | None = None,
        **request: Any,
    ) -> dict[str, Any]:
        """The result of a request. `take` reads the bytes that follow a frame of that name.

        Raises MissingError where the device cannot be reached or the connection breaks, and what the agent says.
        """
        said = {"do": do, "folder": self.device.folder, **request}
        words = [*self.device.ssh, shlex.join([self.device.python, "-c", BOOT])]
        try:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise MissingError("there is no ssh here; install OpenSSH's client (Debian: openssh-client)") from error
        errors: list[bytes] = []
        header = b"%d\n%s%s\n" % (len(self._source), self._source, json.dumps(said).encode())
        threads = [
            threading.Thread(target=_feed, args=(process.stdin, header, payload, do != "run"), daemon=True),
            threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True),  # type: ignore[union-attr]
        ]
        for thread in threads:
            thread.start()
        try:
            result = self._read(process, on_frame, take)
        finally:
            with suppress(OSError, ValueError):  # the end of stdin ends a command there
                process.stdin.close()  # type: ignore[union-attr]
            _wait(process)
            threads[1].join()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        if result is None:
            raise MissingError(f"{self.device.name}: {self._why(process.returncode, b''.join(errors))}")
        return result

    def _read(
        self,
        process: subprocess.Popen[bytes],
        on_frame: Callable[[Frame], None] | None,
        take: Callable[[str, int, IO[bytes]], None] | None,
    ) -> dict[str, Any] | None:
        """None where the frames end before a result."""
        out = process.stdout
        assert out is not None  # noqa: S101 (a pipe, as it was asked for)
        while line := out.readline():
            try:
                frame = json.loads(line)
            except ValueError:
                continue  # what a shell prints at login
            if not isinstance(frame, dict):
                continue
            if "result" in frame:
                found: dict[str, Any] = frame["result"]
                return found
            if "error" in frame:
                raise error_of(int(frame.get("code", 4)), f"{self.device.name}: {frame['error']}")
            if "take" in frame and take is not None:
                take(frame["take"], frame["size"], out)
            elif on_frame is not None:
                on_frame(frame)
        return None

    def _why(self, code: int, errors: bytes) -> str:
        lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if not line.startswith("Warning:")), "no reason was given")
        if code == LOST:
            return f"the connection cannot be made, or broke: {last}"
        if code == 127:
            return f"there is no {self.device.python}: {last}; name another in devices.toml (python = ...)"
        return f"the device ended with {code}: {last}"


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _feed(stdin: IO[bytes], header: bytes, payload: Iterable[bytes], close: bool) -> None:
    """A pipe that breaks is told by what is read from the other one."""
    with suppress(OSError, ValueError):
        stdin.write(header)
        for chunk in payload:
            stdin.write(chunk)
        stdin.flush()
        if close:
            stdin.close()
