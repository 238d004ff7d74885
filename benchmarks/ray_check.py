"""`--engine ray` on this machine: two replicas, the outside clients, a replica killed under load. Two minutes or three.

    python benchmarks/ray_check.py BUNDLE [--port 8090] [--replicas 2|auto] [--cluster]

With `auto` the second replica has to come from the load; with `--cluster` a Ray is started first, the server is given
its address, and that Ray has to live on without the application. Run it with a python that has the extra [ray]. It
fails unless every answer with 200 is right, and unless the killed replica is replaced and answers again; it prints
what it saw as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dualtoken_deploy import Bundle
from dualtoken_deploy.serve import protocol

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS, SCALE_SECONDS, RECOVERY_SECONDS, LOAD_SECONDS = 180, 120, 90, 25
REPLICAS = 2
ATOL = 1e-4  # eager against the runtime, as measured at export


def replicas() -> list[int]:
    """Process ids of the replicas of the model m."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::ServeReplica:dualtoken:m-1"):
                found.append(int(folder.name))
    return sorted(found)


def ask(port: int, body: bytes, header: int) -> tuple[str, np.ndarray | None]:
    """Code and logits of one request over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v2/models/m/infer", body, {"Inference-Header-Content-Length": str(header)})
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__, None
    finally:
        connection.close()
    logits = np.array(json.loads(data)["outputs"][0]["data"], np.float32) if answer.status == 200 else None
    return str(answer.status), logits


def kill_one_under_load(port: int, bundle: Bundle) -> dict[str, object]:
    """Clients ask until there are REPLICAS and for LOAD_SECONDS; a replica dies after a fifth of that."""
    golden, spec = bundle.golden, bundle.manifest.input.tensor
    size = {"binary_data_size": golden["input"].nbytes}
    given = {"name": spec.name, "datatype": protocol.datatype(spec), "shape": list(golden["input"].shape)}
    text = json.dumps({"inputs": [given | {"parameters": size}]}).encode()
    body, codes, wrong, stop = text + golden["input"].tobytes(), Counter[str](), [], threading.Event()

    def client() -> None:
        while not stop.is_set():
            code, logits = ask(port, body, len(text))
            codes[code] += 1
            if logits is not None and not np.allclose(logits, golden["logits"].reshape(-1), rtol=0, atol=ATOL):
                wrong.append(logits)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    began, first = time.monotonic(), len(replicas())
    while len(replicas()) < REPLICAS and time.monotonic() - began < SCALE_SECONDS:
        time.sleep(0.2)
    scaled = time.monotonic() - began
    time.sleep(LOAD_SECONDS / 5)
    before = replicas()
    os.kill(before[0], signal.SIGKILL)
    killed = time.monotonic()
    recovered = None
    while time.monotonic() - killed < RECOVERY_SECONDS:
        now = replicas()
        if len(now) == len(before) and before[0] not in now:
            recovered = time.monotonic() - killed
            break
        time.sleep(0.1)
    time.sleep(LOAD_SECONDS / 5)
    stop.set()
    for thread in threads:
        thread.join()
    after = Counter(ask(port, body, len(text))[0] for _ in range(20))
    return {
        "replicas_at_first": first,
        "replicas_under_load": len(before),
        "scaled_after_s": round(scaled, 1),
        "codes_under_load": dict(codes),
        "wrong_answers": len(wrong),
        "replaced_after_s": recovered and round(recovered, 1),
        "codes_after": dict(after),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--replicas", default=str(REPLICAS), choices=(str(REPLICAS), "auto"))
    parser.add_argument("--cluster", action="store_true")
    arguments = parser.parse_args()
    # a token of this run, so that no other Ray of this machine is met, and nobody else meets this one
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if not arguments.cluster:
        return check(arguments, None)
    with cluster() as address:
        return check(arguments, address)


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray of one node, started as people do, and its address. Ended by its own process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray = Path(sys.executable).parent / "ray"
    options = ("--block", "--include-dashboard", "false", "--node-ip-address", "127.0.0.1")
    command = [ray, "start", "--head", "--port", str(port), *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + READY_SECONDS
        while not is_up(f"127.0.0.1:{port}"):
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit("no Ray came up")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def is_up(address: str) -> bool:
    """Whether a Ray answers, without Serve's application of ours in it; asked in a process of its own."""
    code = (
        "import sys, ray; from ray import serve\n"
        "ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
        "assert 'dualtoken' not in serve.status().applications\n"
    )
    return subprocess.run([sys.executable, "-c", code, address], capture_output=True).returncode == 0


def check(arguments: argparse.Namespace, address: str | None) -> int:
    options = ["--engine", "ray", "--replicas", arguments.replicas, "--port", str(arguments.port)]
    if address:
        options += ["--address", address]
    command = [sys.executable, "-m", "dualtoken_deploy", "serve", f"m={arguments.bundle}", *options]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        watchdog = threading.Timer(READY_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline() if process.stdout else ""
        watchdog.cancel()
        if not line:
            raise SystemExit("the server did not start")
        found: dict[str, object] = {"ready_after_s": round(time.monotonic() - started, 1)}
        clients = ROOT / ".venv-clients" / "bin" / "python"
        if clients.exists():
            script = ROOT / "tests" / "clients" / "triton_check.py"
            check = [clients, script, "m", arguments.bundle / "golden.npz", f"127.0.0.1:{arguments.port}"]
            done = subprocess.run(list(map(str, check)), capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise SystemExit(done.stderr)
            found |= json.loads(done.stdout)
        else:
            found["passed"] = "not run: make the clients first, python tests/clients/make_venv.py"
        found |= kill_one_under_load(arguments.port, Bundle.open(arguments.bundle))
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = process.wait(90)
        if address:
            found["cluster_lives_on"] = is_up(address)
    finally:
        process.kill()
        process.wait()
    print(json.dumps(found, indent=1))
    good = found["wrong_answers"] == 0 and found["codes_after"] == {"200": 20} and found["exit_code"] == 0
    good = good and found["replicas_under_load"] == REPLICAS and found.get("cluster_lives_on", True)
    return 0 if good and found["replaced_after_s"] is not None else 1


if __name__ == "__main__":
    sys.exit(main())
