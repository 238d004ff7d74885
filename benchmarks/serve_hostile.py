"""Hostile clients against a server of its own on loopback, under honest load: what the honest ones still get.

    python benchmarks/serve_hostile.py BUNDLE [--seconds 6] [--only NAME ...] [--markdown FILE]

For each attack a fresh server: honest clients alone, then the same with the attackers, who are a process of their own
and still at it when SIGTERM comes. Goodput is what was answered with 200 or OK, of the honest clients' run without
attackers just before. Nothing but 127.0.0.1 is connected to; attackers are bounded in number, in bytes and in time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import numpy as np
from PIL import Image
from serve_load import HOST, MODEL, Caller, Connection, Running, classify_request, grpc_request, infer_request, server

from dualtoken_deploy import Bundle
from dualtoken_deploy.machine import describe_machine

THINK_SECONDS = 0.25  # of an honest client, between an answer and its next request
HONEST = 4  # clients of each kind
LIFE_SECONDS = 90.0  # after which an attacker ends by itself
PAUSE_SECONDS = 0.05  # between an attacker's requests on a connection
DRAIN_SECONDS = 5
SAMPLE_SECONDS = 0.05
WITHIN_SECONDS = 30.0  # one request's time-out, of an honest client
INFER = "/inference.GRPCInferenceService/ModelInfer"


def post(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST /v2/models/{MODEL}/{path} HTTP/1.1", f"Host: {HOST}", *headers, "", ""]).encode()


def whole(path: str, body: bytes) -> bytes:
    return post(path, f"Content-Length: {len(body)}") + body


@dataclass(frozen=True)
class Aim:
    """Where the server is, for an attacker."""

    port: int
    grpc: str


async def again(count: int, once: Callable[[], Awaitable[None]]) -> None:
    """`count` attackers that each do it again and again."""

    async def attacker() -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.LimitOverrunError):
                await once()
            await asyncio.sleep(PAUSE_SECONDS)

    await asyncio.gather(*(attacker() for _ in range(count)))


async def send_and_read(aim: Aim, data: bytes) -> None:
    connection = Connection(aim.port)
    try:
        await asyncio.wait_for(connection.ask(data), 60)
    finally:
        connection.close()


async def hold(aim: Aim, first: bytes, then: bytes = b"", every: float = 0.5) -> None:
    """A connection that sends something, and something more now and then, and never reads."""
    reader, writer = await asyncio.open_connection(HOST, aim.port, limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]  # what a client does that does not call recv
    try:
        writer.write(first)
        await asyncio.wait_for(writer.drain(), 5)
        while not writer.is_closing():
            await asyncio.sleep(every)
            writer.write(then)
            await asyncio.wait_for(writer.drain(), 5)
    finally:
        writer.transport.abort()


async def leave(aim: Aim, data: bytes) -> None:
    """Sends a whole request and is gone."""
    _, writer = await asyncio.open_connection(HOST, aim.port)
    try:
        writer.write(data)
        await asyncio.wait_for(writer.drain(), 5)
    finally:
        writer.transport.abort()


async def silent_streams(aim: Aim, count: int) -> None:
    async with grpc.aio.insecure_channel(aim.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:

        async def once() -> None:
            call: Any = channel.stream_unary(INFER)()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.wait_for_connection()
                await asyncio.sleep(20)
            call.cancel()

        await again(count, once)


async def messages(aim: Aim, count: int, data: bytes) -> None:
    caller = Caller(aim.grpc)
    await again(count, lambda: asyncio.wait_for(_ignored(caller.ask(data)), 30))


async def _ignored(work: Awaitable[Any]) -> None:
    await work


async def idle(aim: Aim, count: int) -> None:
    """Connections of both transports on which nothing is said; a closed one is opened again."""
    grpc_port = int(aim.grpc.rpartition(":")[2])

    async def once(port: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            while await reader.read(65536):
                pass
        finally:
            writer.transport.abort()

    await asyncio.gather(again(count, lambda: once(aim.port)), again(count, lambda: once(grpc_port)))


@cache
def scans(count: int = 12_000, side: int = 600) -> bytes:
    """A progressive JPEG with its last scan many times over, some 500 KB."""
    out = BytesIO()
    Image.new("RGB", (side, side), (90, 120, 30)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


@cache
def large(megapixels: float = 23.9) -> bytes:
    """The largest picture that is taken, detailed enough to cost its decoder time."""
    side = int((megapixels * 1e6) ** 0.5)
    coarse = np.random.default_rng(0).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(coarse).resize((side, side)).save(out, "JPEG", quality=85)
    return out.getvalue()


def empties(size: int) -> bytes:
    return b'{"inputs":[' + b"[]," * (size // 3) + b"[]]}"


ATTACKS: Mapping[str, Callable[[Aim], Awaitable[None]]] = MappingProxyType(
    {
        "64 bodies that trickle": lambda aim: again(
            64, lambda: hold(aim, post("infer", "Content-Length: 60000") + b"{", b"x")
        ),
        "64 silent gRPC streams": lambda aim: silent_streams(aim, 64),
        "4 JPEGs of 12,000 scans": lambda aim: again(4, lambda: send_and_read(aim, whole("classify", scans()))),
        "4 JPEGs of 24 megapixels": lambda aim: again(4, lambda: send_and_read(aim, whole("classify", large()))),
        "60 bodies of 15 MiB whose clients leave": lambda aim: again(
            60, lambda: leave(aim, whole("classify", b"\xff\xd8\xff" + bytes(15 * 2**20)))
        ),
        "64 pipelines that never read": lambda aim: again(
            64, lambda: hold(aim, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        ),
        "8 trailers without end": lambda aim: again(
            8, lambda: hold(aim, post("infer", "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n", TRAILER, 0.01)
        ),
        "6 JSON bodies of []": lambda aim: again(6, lambda: send_and_read(aim, whole("infer", empties(3_800_000)))),
        "6 gRPC messages of empty inputs": lambda aim: messages(aim, 6, b"\x0a\x01m" + b"\x2a\x00" * 500_000),
        "4 bodies of 64 MiB": lambda aim: again(4, lambda: send_and_read(aim, whole("infer", bytes(64 * 2**20)))),
        "600 idle connections of each transport": lambda aim: idle(aim, 600),
    }
)
TRAILER = b"x-trailer: " + b"a" * 60_000 + b"\r\n"


@dataclass
class Honest:
    """What the honest clients got in one phase."""

    answered: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0


async def honest(running: Running, bundle: Bundle, seconds: float) -> Honest:
    """Clients of each kind that ask, think and ask again."""
    found, end = Honest(), time.monotonic() + seconds
    requests = {"http": infer_request(bundle), "jpeg": classify_request(), "grpc": grpc_request(bundle)}

    async def client(kind: str) -> None:
        made: Any = Caller(running.grpc) if kind == "grpc" else Connection(running.port)
        while time.monotonic() < end:
            began, code = time.monotonic(), "broken"
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                code = await asyncio.wait_for(made.ask(requests[kind]), WITHIN_SECONDS)
            found.longest = max(found.longest, time.monotonic() - began)
            if code in ("200", "OK"):
                found.answered[kind] = found.answered.get(kind, 0) + 1
            else:
                found.other[f"{kind} {code}"] = found.other.get(f"{kind} {code}", 0) + 1
                if kind != "grpc":
                    made.close()
            await asyncio.sleep(THINK_SECONDS)

    await asyncio.gather(*(client(kind) for kind in requests for _ in range(HONEST)))
    return found


async def watched(running: Running, work: Awaitable[Honest]) -> tuple[Honest, float]:
    """Some work, and the most memory that the server and its processes had meanwhile."""
    task, most = asyncio.ensure_future(work), 0.0
    while not task.done():
        with contextlib.suppress(OSError, StopIteration):  # one of its processes ended meanwhile
            most = max(most, running.memory_mib())
        await asyncio.sleep(SAMPLE_SECONDS)
    return await task, most


def one(name: str, bundle: Path, seconds: float) -> dict[str, Any]:
    """One attack: alone, attacked, ended."""
    opened = Bundle.open(bundle)
    with server(bundle, 1, "--drain-seconds", str(DRAIN_SECONDS)) as running:
        asyncio.run(honest(running, opened, 1.5))  # everything that starts late has started
        idle_mib = running.memory_mib()
        quiet, _ = asyncio.run(watched(running, honest(running, opened, seconds)))
        command = [sys.executable, __file__, str(bundle), "--attack", name, "--at", f"{running.port},{running.grpc}"]
        attackers = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            time.sleep(2.0)  # they are many and have connected by then
            attacked, most = asyncio.run(watched(running, honest(running, opened, seconds)))
            began = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            code = running.process.wait(60)
            ended = time.monotonic() - began
        finally:
            attackers.kill()
            attackers.wait()
    return {
        "attack": name,
        "goodput": {kind: attacked.answered.get(kind, 0) / max(1, n) for kind, n in quiet.answered.items()},
        "quiet_answers": quiet.answered,
        "not_answered": attacked.other,
        "longest_s": [quiet.longest, attacked.longest],
        "memory_mib": [idle_mib, most],
        "exit_code": code,
        "exit_s": ended,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| attackers | goodput HTTP | JPEG | gRPC | longest answer, s | memory over idle | SIGTERM to exit, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        good, (idle_mib, most), (before, after) = row["goodput"], row["memory_mib"], row["longest_s"]
        lines.append(
            f"| {row['attack']} | {good['http']:.2f} | {good['jpeg']:.2f} | {good['grpc']:.2f} | {after:.2f} "
            f"({before:.2f} alone) | {most / idle_mib:.2f} ({most:.0f} MiB) | {row['exit_s']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.seconds <= 60:
        parser.error("a run is bounded: --seconds to 60")
    if arguments.attack:
        port, _, address = arguments.at.partition(",")
        work = ATTACKS[arguments.attack](Aim(int(port), address))
        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(work, LIFE_SECONDS))
        return
    rows = []
    for name in ATTACKS:
        if not arguments.only or any(part in name for part in arguments.only):
            rows.append(one(name, arguments.bundle, arguments.seconds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    head = f"`python {' '.join(sys.argv)}`\n\n{json.dumps(describe_machine())}\n\n"
    text = head + markdown(rows) + f"\n\n```json\n{json.dumps(rows, indent=1)}\n```\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
