"""A real server in a process of its own on loopback, and the smallest client: sockets and http.client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_SECONDS = 20


@dataclass(frozen=True)
class Reply:
    """Status, headers (lower case) and body of an answer."""

    code: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running `dualtoken serve`."""

    def __init__(self, process: subprocess.Popen[str], addresses: Mapping[str, Any], log: Path) -> None:
        self.process, self.addresses, self._log = process, addresses, log
        self.host, _, port = addresses["http"].rpartition("//")[2].rpartition(":")
        self.port = int(port)
        self.grpc: str = addresses["grpc"]

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The lines of the log that are whole by now."""
        lines = self._log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Reply:  # fmt: skip
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            return _reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, data: Any, **headers: str) -> Reply:
        body = data if isinstance(data, (bytes, str)) else json.dumps(data)
        return self.ask("POST", path, body, headers)

    def raw(self, data: bytes, seconds: float = 10, pause: float = 0) -> bytes:
        """Sends bytes as they are, and what comes back until the server closes or `seconds` pass."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as link:
            with suppress(ConnectionError):
                link.sendall(data)
            time.sleep(pause)
            return read_reply(link)

    @property
    def children(self) -> list[int]:
        """Process ids of the workers."""
        return self._processes("dualtoken_deploy.serve.worker")

    @property
    def decoders(self) -> list[int]:
        """Process ids of those that read pictures."""
        return self._processes("dualtoken_deploy.serve.decoder")

    def _processes(self, module: str) -> list[int]:
        task, found = Path(f"/proc/{self.process.pid}/task"), []
        for thread in task.iterdir():
            with suppress(OSError):  # it ended meanwhile
                for pid in (thread / "children").read_text().split():
                    with suppress(OSError):
                        if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                            found.append(int(pid))
        return found

    def memory_kib(self, pid: int | None = None, field: str = "VmRSS") -> int:
        text = Path(f"/proc/{pid or self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1])

    def descriptors(self) -> int:
        """Files and sockets that the server has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def wait_for(self, condition: Any, seconds: float = 20) -> None:
        """Until `condition()` holds. Raises AssertionError with the log's end otherwise."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def serving(log: Path, *arguments: str | Path) -> Iterator[Server]:
    """`dualtoken serve` with these arguments on free loopback ports; killed at the end if it still runs."""
    command = [
        sys.executable,
        "-m",
        "dualtoken_deploy",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with log.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()[-3000:]
        yield Server(process, json.loads(line), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def read_reply(link: socket.socket) -> bytes:
    """One answer, or what there is of it when the connection ends or the socket's time is up."""
    found = b""
    with suppress(TimeoutError, ConnectionError):
        while not _whole(found) and (part := link.recv(65536)):
            found += part
    return found


def _reply(response: http.client.HTTPResponse) -> Reply:
    return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def _whole(data: bytes) -> bool:
    """Whether data is one whole answer."""
    head, separator, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(separator and lengths) and len(body) >= int(lengths[0].partition(b":")[2])
