"""Hostile clients against a server of its own on loopback, under honest load: what the honest ones still get.

    python benchmarks/serve_hostile.py BUNDLE [--seconds 2.5] [--rounds 3] [--only NAME ...] [--rows FILE]
                                              [--markdown FILE]

For each attack a fresh server, and rounds on it: honest clients alone; the same beside a stand-in that burns as much
CPU time as the attackers do and sends nothing; the same with the attackers. In life attackers have machines of their
own: what theirs cost this one is in the second phase as in the third, and the server's answer to them in the third.
Goodput is what was answered with 200 or OK within the attacked phases, of that within those beside the stand-in (and of
that alone, which is said as well); what else the machine does falls on all. Attackers and stand-in are a process each,
of one priority (--nice). What the stand-in burns was measured just before: first in a rehearsal. The last attackers are
still at it when SIGTERM comes. Nothing but 127.0.0.1 is connected to; attackers are bounded in number, bytes and time.
--rows keeps each attack's row when it is done, and a later run takes it from there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
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
CONNECT_SECONDS = 1.0  # in which attackers, who are many, connect
REHEARSAL_SECONDS = 1.5
SETTLE_SECONDS = 1.0  # after attackers were killed
BURST_SECONDS = 0.002  # of the stand-in
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


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113)."""
    return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data


@cache
def untaken(calls: int = 140) -> bytes:
    """A connection's worth of gRPC calls whose answers the client has no room for: its window is closed."""
    text = {":path": "/inference.GRPCInferenceService/ModelMetadata", ":authority": HOST, "te": "trailers"}
    fields = (text | {"content-type": "application/grpc"}).items()
    block = b"\x83\x86" + b"".join(  # POST and http of HPACK's table, the others as they are
        b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in field) for field in fields
    )
    found = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, 0))
    for stream in range(1, 2 * calls, 2):
        found += frame(1, 4, stream, block) + frame(0, 1, stream, b"\0\0\0\0\x03\x0a\x01m")
    return found


async def take_nothing(aim: Aim, count: int) -> None:
    """Connections that ask much over gRPC and take no answer; each begins anew when its calls have been ended."""
    host, _, port = aim.grpc.rpartition(":")

    async def once() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(untaken())
            await writer.drain()
            async with asyncio.timeout(20):
                while await reader.read(65536):
                    pass
        finally:
            writer.transport.abort()

    await again(count, once)


def chunked(size: int, count: int) -> bytes:
    return post("classify", "Transfer-Encoding: chunked") + (b"%x\r\n" % size + bytes(size) + b"\r\n") * count


def empties(size: int) -> bytes:
    return b'{"inputs":[' + b"[]," * (size // 3) + b"[]]}"


ATTACKS: Mapping[str, Callable[[Aim], Awaitable[None]]] = MappingProxyType(
    {
        "64 bodies that trickle": lambda aim: again(
            64, lambda: hold(aim, post("infer", "Content-Length: 60000") + b"{", b"x")
        ),
        "64 silent gRPC streams": lambda aim: silent_streams(aim, 64),
        "4 JPEGs of 12,000 scans": lambda aim: again(4, lambda: send_and_read(aim, whole("classify", scans()))),
        "4 JPEGs of 24 megapixels": lambda aim: again(4, lambda: send_and_read(aim, whole("classify", LARGE[0]))),
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
        "100 gRPC clients that take no answer": lambda aim: take_nothing(aim, 100),
        "32 bodies in chunks of 6 bytes": lambda aim: again(32, lambda: send_and_read(aim, chunked(6, 80_000))),
        "32 requests of 14,000 headers": lambda aim: again(
            32, lambda: send_and_read(aim, b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 14_000 + b"\r\n")
        ),
    }
)
LARGE: list[bytes] = []  # the picture of 24 megapixels, which takes seconds to make
TRAILER = b"x-trailer: " + b"a" * 60_000 + b"\r\n"


@dataclass
class Honest:
    """What the honest clients got in one phase: answers before its end, and the longest wait for one."""

    answered: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0

    def add(self, other: Honest) -> None:
        for ours, theirs in ((self.answered, other.answered), (self.other, other.other)):
            for kind, count in theirs.items():
                ours[kind] = ours.get(kind, 0) + count
        self.longest = max(self.longest, other.longest)


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
                if time.monotonic() < end:
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


@dataclass
class Phase:
    """All phases of one kind: alone, beside the stand-in, or attacked."""

    honest: Honest = field(default_factory=Honest)
    most_mib: float = 0.0
    cpu_seconds: float = 0.0  # of the server and all its processes
    seconds: float = 0.0
    others_seconds: float = 0.0  # CPU time of who else was there

    def run(self, running: Running, bundle: Bundle, seconds: float, other: int | None = None) -> None:
        began, cpu = time.monotonic(), tree_seconds(running.process.pid)
        theirs = 0.0 if other is None else tree_seconds(other)
        found, most = asyncio.run(watched(running, honest(running, bundle, seconds)))
        self.honest.add(found)
        self.most_mib = max(self.most_mib, most)
        self.cpu_seconds += tree_seconds(running.process.pid) - cpu
        self.seconds += time.monotonic() - began
        if other is not None:
            self.others_seconds += tree_seconds(other) - theirs

    @property
    def ms_an_answer(self) -> float:
        return 1000 * self.cpu_seconds / max(1, sum(self.honest.answered.values()))

    @property
    def others_cores(self) -> float:
        return self.others_seconds / max(self.seconds, 1e-9)


def tree_seconds(pid: int) -> float:
    """CPU time of a process, of its children, and of those that it has waited for."""
    ticks = 0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks += sum(int(value) for value in fields[11:15])  # utime, stime, cutime, cstime: proc(5)
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it ended meanwhile
            own = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(own[11]) + int(own[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def beside(priority: int, arguments: list[str], connect: float = 0.0) -> Iterator[int]:
    """Attackers or their stand-in, from when they have what they send until they are killed: their process id."""
    command = ["nice", "-n", str(priority), sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None  # noqa: S101  # a pipe was asked for
        process.stdout.readline()
        time.sleep(connect)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def burn(cores: float) -> None:
    """Takes so much CPU time of each second, in short bursts; what it could not get it takes later."""
    began = time.monotonic()
    while (now := time.monotonic() - began) < LIFE_SECONDS:
        if time.process_time() < cores * now:
            end = time.process_time() + BURST_SECONDS
            while time.process_time() < end:
                pass
        else:
            time.sleep(BURST_SECONDS)


def one(name: str, bundle: Path, seconds: float, rounds: int, priority: int) -> dict[str, Any]:
    """One attack: alone, beside the stand-in and attacked by turns, ended."""
    opened, alone, beside_burner, attacked = Bundle.open(bundle), Phase(), Phase(), Phase()
    with (
        tempfile.TemporaryDirectory() as folder,
        server(bundle, 1, "--drain-seconds", str(DRAIN_SECONDS)) as running,
    ):
        asyncio.run(honest(running, opened, 1.5))  # everything that starts late has started
        idle_mib = running.memory_mib()
        attack = [str(bundle), "--attack", name, "--at", f"{running.port},{running.grpc}"]
        picture = Path(folder) / "large.jpg"
        if "megapixels" in name:
            picture.write_bytes(large())
            attack += ["--large", str(picture)]
        rehearsal = Phase()
        with beside(priority, attack, CONNECT_SECONDS) as pid:
            rehearsal.run(running, opened, REHEARSAL_SECONDS, pid)
        cores = rehearsal.others_cores
        for number in range(rounds):
            time.sleep(SETTLE_SECONDS)
            alone.run(running, opened, seconds)
            with beside(priority, [str(bundle), "--burn", f"{cores:.4f}"]) as pid:
                beside_burner.run(running, opened, seconds, pid)
            with beside(priority, attack, CONNECT_SECONDS) as pid:
                attacked.run(running, opened, seconds, pid)
                cores = attacked.others_cores
                if number == rounds - 1:
                    began = time.monotonic()
                    running.process.send_signal(signal.SIGTERM)
                    code = running.process.wait(60)
                    ended = time.monotonic() - began
    phases = {"alone": alone, "beside the stand-in": beside_burner, "attacked": attacked}
    before, after = beside_burner.honest.answered, attacked.honest.answered
    return {
        "attack": name,
        "goodput": {kind: after.get(kind, 0) / max(1, count) for kind, count in before.items()},
        "goodput_all": sum(after.values()) / max(1, sum(before.values())),
        "goodput_all_of_alone": sum(after.values()) / max(1, sum(alone.honest.answered.values())),
        "answers": {phase: found.honest.answered for phase, found in phases.items()},
        "not_answered": {phase: found.honest.other for phase, found in phases.items()},
        "longest_s": {phase: found.honest.longest for phase, found in phases.items()},
        "cpu_ms_an_answer": {phase: found.ms_an_answer for phase, found in phases.items()},
        "others_cores": {phase: found.others_cores for phase, found in phases.items()},
        "memory_mib": [idle_mib, max(rehearsal.most_mib, *(found.most_mib for found in phases.values()))],
        "exit_code": code,
        "exit_s": ended,
    }


HEADS = (
    *("attackers", "goodput HTTP", "JPEG", "gRPC", "all", "all, of alone", "longest answer, s (alone)", "not answered"),
    *("attackers' CPU, cores (stand-in)", "server's CPU, ms an answer (alone)", "memory over idle"),
    "SIGTERM to exit, s",
)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
    for row in rows:
        longest, cores, cpu_ms = row["longest_s"], row["others_cores"], row["cpu_ms_an_answer"]
        idle_mib, most = row["memory_mib"]
        waited = f"{longest['attacked']:.1f} ({longest['alone']:.1f})"
        cells = [
            *(row["attack"], *(f"{row['goodput'].get(kind, 0):.2f}" for kind in ("http", "jpeg", "grpc"))),
            *(f"{row['goodput_all']:.2f}", f"{row['goodput_all_of_alone']:.2f}"),
            *(waited, str(sum(row["not_answered"]["attacked"].values()))),
            f"{cores['attacked']:.2f} ({cores['beside the stand-in']:.2f})",
            f"{cpu_ms['attacked']:.0f} ({cpu_ms['alone']:.0f})",
            *(f"{most / idle_mib:.2f}", f"{row['exit_s']:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each phase of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nice", type=int, default=10, help="priority of attackers and stand-in")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rows", type=Path, help="JSON lines: rows that are there are kept, others are added")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--burn", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--large", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.seconds * arguments.rounds <= 60 or arguments.rounds < 1:
        parser.error("a run is bounded: --seconds times --rounds to 60")
    if arguments.burn is not None:
        print("ready", flush=True)
        burn(arguments.burn)
        return
    if arguments.attack:
        port, _, address = arguments.at.partition(",")
        work = ATTACKS[arguments.attack](Aim(int(port), address))
        if arguments.large is not None:
            LARGE.append(arguments.large.read_bytes())
        print("ready", flush=True)
        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(work, LIFE_SECONDS))
        return
    rows = {}
    if arguments.rows is not None and arguments.rows.exists():
        rows = {row["attack"]: row for row in map(json.loads, arguments.rows.read_text("utf-8").splitlines())}
    for name in ATTACKS:
        if name not in rows and (not arguments.only or any(part in name for part in arguments.only)):
            rows[name] = one(name, arguments.bundle, arguments.seconds, arguments.rounds, arguments.nice)
            print(json.dumps(rows[name]), file=sys.stderr, flush=True)
            if arguments.rows is not None:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    print(json.dumps(rows[name]), file=file)
    found = [rows[name] for name in ATTACKS if name in rows]
    head = f"`python {' '.join(sys.argv)}`\n\n{json.dumps(describe_machine())}\n\n"
    text = head + markdown(found) + f"\n\n```json\n{json.dumps(found, indent=1)}\n```\n"
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
