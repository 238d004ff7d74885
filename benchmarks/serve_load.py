"""Loads a server of its own on loopback and prints ratios against the runner in a plain loop, in interleaved rounds.

    python benchmarks/serve_load.py BUNDLE [--seconds 4] [--rounds 3] [--threads N] [--soak 60] [--markdown FILE]

Everything is bounded in time, and nothing but 127.0.0.1 is ever connected to. The load generator shares the cores with
the server; its share of the CPU time is printed with each figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from dualtoken_deploy import Bundle
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.serve import protocol
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb

HOST = "127.0.0.1"
QUEUE = 16  # of the server under overload
MODEL = "m"


@dataclass
class Tally:
    """What a load run saw: latencies of good answers in seconds, answers by code, CPU of the generator."""

    latencies: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    broken: int = 0
    server_cpu_ms: float = 0.0  # of the serving process, for an answer; hardly moved by a machine that is shared

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile_ms(self, q: float) -> float:
        return float(np.quantile(self.latencies, q)) * 1000 if self.latencies else float("nan")

    @property
    def cpu_share(self) -> float:
        return self.cpu_seconds / self.seconds


class Connection:
    """A keep-alive HTTP connection that sends prepared bytes; as little Python as an answer allows."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> str:
        """The status of one answer. Raises ConnectionError or IncompleteReadError where there is none."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            if b"\r\nconnection: close" in head:
                self.close()
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise
        return head[9:12].decode()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Caller:
    """The same over gRPC."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call: Any = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    async def ask(self, request: bytes) -> str:
        try:
            await self._call(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


async def closed_loop(
    connections: list[Any], request: bytes, seconds: float, until: asyncio.Event | None = None
) -> Tally:
    """Every connection asks again as soon as it is answered, for `seconds` or until it is told to stop."""
    tally = Tally()
    start, cpu = time.perf_counter(), _cpu()

    async def client(connection: Any) -> None:
        while time.perf_counter() - start < seconds and not (until and until.is_set()):
            began = time.perf_counter()
            try:
                code = await connection.ask(request)
            except (OSError, asyncio.IncompleteReadError):
                tally.broken += 1
                await asyncio.sleep(0.01)
                continue
            tally.codes[code] += 1
            if code in ("200", "OK"):
                tally.latencies.append(time.perf_counter() - began)

    await asyncio.gather(*map(client, connections))
    tally.seconds, tally.cpu_seconds = time.perf_counter() - start, _cpu() - cpu
    return tally


async def open_loop(connections: list[Connection], request: bytes, seconds: float, rate: float) -> Tally:
    """Sends at a rate whatever the answers are; a request that finds no free connection is counted as unsent."""
    tally, free, tasks = Tally(), list(connections), set()
    start, cpu = time.perf_counter(), _cpu()

    async def one(connection: Connection) -> None:
        began = time.perf_counter()
        try:
            code = await connection.ask(request)
            tally.codes[code] += 1
            if code == "200":
                tally.latencies.append(time.perf_counter() - began)
        except (OSError, asyncio.IncompleteReadError):
            tally.broken += 1
        free.append(connection)

    sent = 0
    while (now := time.perf_counter() - start) < seconds:
        while sent < now * rate:
            sent += 1
            if free:
                task = asyncio.create_task(one(free.pop()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                tally.codes["unsent"] += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)  # the answers to what was sent last are part of the goodput, and so is their time
    tally.seconds, tally.cpu_seconds = time.perf_counter() - start, _cpu() - cpu
    return tally


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def plain_loop(bundle: Path, seconds: float, threads: int | None) -> Tally:
    """The runner alone, in a process of its own: no server, no copy, no socket."""
    code = (
        "import json, sys, time; from dualtoken_deploy import Bundle, load_runner\n"
        "b = Bundle.open(sys.argv[1]); name = b.manifest.input.tensor.name; x = {name: b.golden['input']}\n"
        "times = []\n"
        "with load_runner(b, threads=int(sys.argv[3]) or None) as r:\n"
        "  for _ in range(5): r.run(x)\n"
        "  end = time.perf_counter() + float(sys.argv[2])\n"
        "  while time.perf_counter() < end:\n"
        "    t = time.perf_counter(); r.run(x); times.append(time.perf_counter() - t)\n"
        "print(json.dumps(times))"
    )
    command = [sys.executable, "-c", code, str(bundle), str(seconds), str(threads or 0)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    times = json.loads(done.stdout)
    return Tally(times, seconds=sum(times))


class Running:
    """A server of ours."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the process that speaks HTTP and gRPC and of its decoders, without its workers."""
        ticks = 0
        for pid in (self.process.pid, *self.decoders()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def decoders(self) -> list[str]:
        """Process ids; a server of before they were has none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [
            pid for pid in children if b"dualtoken_deploy.serve.decoder" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(log.read_text())
        addresses = json.loads(line)
        self.process, self.log = process, log
        self.port, self.grpc = int(addresses["http"].rpartition(":")[2]), addresses["grpc"]

    def memory_mib(self) -> float:
        """Resident memory of the server and its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        total = 0
        for pid in (str(self.process.pid), *children):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
        return total / 1024


@contextmanager
def server(bundle: Path, threads: int | None, *options: str) -> Iterator[Running]:
    command = [
        sys.executable,
        "-m",
        "dualtoken_deploy",
        "serve",
        f"{MODEL}={bundle}",
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    command += ["--queue", str(QUEUE + 32), *(["--threads", str(threads)] if threads else []), *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as err:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        try:
            yield Running(process, log)
        finally:
            process.kill()
            process.wait()


def infer_request(bundle: Bundle) -> bytes:
    """The golden input as a binary HTTP request for the raw output."""
    spec, array = bundle.manifest.input.tensor, bundle.golden["input"]
    size = {"binary_data_size": array.nbytes}
    given = {"name": spec.name, "datatype": protocol.datatype(spec), "shape": list(array.shape), "parameters": size}
    text = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    return _post("infer", text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}\r\n")


def classify_request() -> bytes:
    """A photograph as a JPEG of 512x512."""
    out = BytesIO()
    with Image.open(open_dataset("photographs").images[0]) as photo:
        photo.convert("RGB").resize((512, 512)).save(out, "JPEG", quality=90)
    return _post("classify", out.getvalue())


def _post(verb: str, body: bytes, headers: str = "") -> bytes:
    line = f"POST /v2/models/{MODEL}/{verb} HTTP/1.1\r\nHost: {HOST}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return line.encode() + body


def grpc_request(bundle: Bundle) -> bytes:
    spec, array = bundle.manifest.input.tensor, bundle.golden["input"]
    message = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[array.tobytes()])
    message.inputs.add(name=spec.name, datatype=protocol.datatype(spec), shape=array.shape)
    return message.SerializeToString()


async def measure(kind: str, clients: int, running: Running, request: bytes, seconds: float) -> Tally:
    made: list[Any] = [Caller(running.grpc) if kind == "grpc" else Connection(running.port) for _ in range(clients)]
    await closed_loop(made, request, min(0.5, seconds))
    before = running.cpu_seconds
    tally = await closed_loop(made, request, seconds)
    tally.server_cpu_ms = 1000 * (running.cpu_seconds - before) / max(1, sum(tally.codes.values()))
    return tally


def load(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds: the plain loop, then each kind and number of clients."""
    opened = Bundle.open(bundle)
    requests = {"http": infer_request(opened), "grpc": grpc_request(opened), "jpeg": classify_request()}
    cases = [("http", 1), ("grpc", 1), ("jpeg", 1), ("http", 8), ("grpc", 8), ("http", 32)]
    rounds: list[dict[str, Tally]] = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        row = {"plain": plain_loop(bundle, arguments.seconds, arguments.threads)}
        with server(bundle, arguments.threads) as running:
            for kind, clients in cases:
                work = measure(kind, clients, running, requests[kind], arguments.seconds)
                row[f"{kind} {clients}"] = asyncio.run(work)
        rounds.append(row)
    found = {}
    for name in rounds[0]:
        tallies = [row[name] for row in rounds]
        ratios = [row[name].rate / row["plain"].rate for row in rounds]
        over = [row[name].quantile_ms(0.5) - row["plain"].quantile_ms(0.5) for row in rounds]
        found[name] = {
            "per_s": statistics.median(t.rate for t in tallies),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "p50_ms": statistics.median(t.quantile_ms(0.5) for t in tallies),
            "p99_ms": statistics.median(t.quantile_ms(0.99) for t in tallies),
            "p50_over_plain_ms": [statistics.median(over), min(over), max(over)],
            "generator_cpu_share": statistics.median(t.cpu_share for t in tallies),
            "server_cpu_ms": statistics.median(t.server_cpu_ms for t in tallies),
            "codes": dict(sum((t.codes for t in tallies), Counter())),
        }
    return found


def overload(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Four times the peak, open loop: goodput against the peak just before, and the p99 of what was accepted."""
    request = infer_request(Bundle.open(bundle))
    with server(bundle, arguments.threads) as running:
        peak = asyncio.run(measure("http", 8, running, request, arguments.seconds))

        async def flood() -> Tally:
            connections = [Connection(running.port) for _ in range(128)]
            return await open_loop(connections, request, 2 * arguments.seconds, 4 * peak.rate)

        over = asyncio.run(flood())
    bound = (QUEUE + 32 + 1) / min(peak.rate, over.rate or 1)  # the slower of the two: the machine may be shared
    return {
        "peak_per_s": peak.rate,
        "offered_per_s": 4 * peak.rate,
        "goodput_per_s": over.rate,
        "goodput_of_peak": over.rate / peak.rate,
        "accepted_p99_ms": over.quantile_ms(0.99),
        "queue_bound_ms": bound * 1000,
        "codes": dict(over.codes),
        "broken": over.broken,
        "generator_cpu_share": over.cpu_share,
    }


def sigterm(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM under load on both transports: what the server counts as answered, the clients must have read."""
    opened = Bundle.open(bundle)
    with server(bundle, arguments.threads) as running:

        async def go() -> tuple[Tally, Tally]:
            stop = asyncio.Event()
            connections = [Connection(running.port) for _ in range(6)]
            callers = [Caller(running.grpc) for _ in range(4)]
            work = asyncio.gather(
                closed_loop(connections, infer_request(opened), 30, stop),
                closed_loop(callers, grpc_request(opened), 30, stop),
            )
            await asyncio.sleep(arguments.seconds)
            running.process.send_signal(signal.SIGTERM)
            while running.process.poll() is None:
                await asyncio.sleep(0.01)
            stop.set()
            over_http, over_grpc = await work
            return over_http, over_grpc

        over_http, over_grpc = asyncio.run(go())
        rows = [json.loads(line) for line in running.log.read_text().splitlines() if line.startswith("{")]
        code = running.process.wait()
    served = Counter(str(row["code"]) for row in rows if row["event"] == "request")
    got = over_http.codes + over_grpc.codes
    return {
        "exit_code": code,
        "server_answered": dict(served),
        "clients_read": dict(got),
        "accepted_and_lost": sum(served[c] - got[c] for c in ("200", "OK"))
        + served["500"]
        + served["499"]
        + served["CANCELLED"],
    }


def soak(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory over a long closed loop of tensors and JPEGs: the last fifth against the second."""
    opened = Bundle.open(bundle)
    samples: list[float] = []
    with server(bundle, arguments.threads) as running:

        async def go() -> tuple[Tally, Tally]:
            made = [[Connection(running.port) for _ in range(4)] for _ in range(2)]
            work = asyncio.gather(
                closed_loop(made[0], infer_request(opened), arguments.soak),
                closed_loop(made[1], classify_request(), arguments.soak),
            )
            while not work.done():
                samples.append(running.memory_mib())
                await asyncio.sleep(min(1.0, arguments.soak / 50))
            first, second = await work
            return first, second

        tensors, pictures = asyncio.run(go())
    fifth = len(samples) // 5
    early, late = statistics.mean(samples[fifth : 2 * fifth]), statistics.mean(samples[-fifth:])
    return {
        "seconds": arguments.soak,
        "requests": dict(tensors.codes + pictures.codes),
        "memory_mib": [round(early, 1), round(late, 1)],
        "growth": late / early - 1,
    }


def markdown(result: dict[str, Any]) -> str:
    names = ("load", "answers/s", "of the plain loop", "p50 ms", "over plain p50, ms", "p99 ms")
    names += ("generator's CPU, cores", "server's CPU, ms")
    lines = [f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}"] if "load" in result else []
    for name, row in result.get("load", {}).items():
        ratio, over = row["ratio"], row["p50_over_plain_ms"]
        lines.append(
            f"| {name} | {row['per_s']:.1f} | {ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f}) | {row['p50_ms']:.1f} | "
            f"{over[0]:.1f} ({over[1]:.1f}-{over[2]:.1f}) | {row['p99_ms']:.1f} | "
            f"{row['generator_cpu_share']:.2f} | {row['server_cpu_ms']:.1f} |"
        )
    rest = {name: result[name] for name in ("overload", "sigterm", "soak") if name in result}
    head = f"`{result['command']}`\n\n{json.dumps(result['machine'])}\n\n"
    return head + "\n".join(lines) + f"\n\n```json\n{json.dumps(rest, indent=1)}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds, at most 600; 0: none")
    parser.add_argument("--only", choices=("load", "overload", "sigterm", "soak"))
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if not 0 <= arguments.soak <= 600 or not 0 < arguments.seconds <= 60 or not 0 < arguments.rounds <= 20:
        parser.error("a run is bounded: --soak to 600 s, --seconds to 60, --rounds to 20")
    parts: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        "load": load,
        "overload": overload,
        "sigterm": sigterm,
    }
    if arguments.soak:
        parts["soak"] = soak
    command = f"python {' '.join(sys.argv)}"
    result: dict[str, Any] = {"command": command, "machine": describe_machine() | {"load": os.getloadavg()}}
    for name, call in parts.items():
        if arguments.only not in (None, name):
            continue
        print(name, file=sys.stderr)
        result[name] = call(arguments.bundle, arguments)
    text = markdown(result)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
