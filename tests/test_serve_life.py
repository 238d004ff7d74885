"""What happens to a server: full queues, workers that die or hang, changed bundles, keys, TLS, and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from tests.serving import Reply, Server, alive, read_reply, serving

SIDE, BYTES = 64, 64 * 64 * 3
INFER = "/v2/models/m/infer"


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (1, SIDE, SIDE, 3), dtype=np.uint8)


def request(array: np.ndarray[Any, Any]) -> tuple[bytes, dict[str, str]]:
    size = {"binary_data_size": array.nbytes}
    given = {"name": "image", "datatype": "UINT8", "shape": list(array.shape), "parameters": size}
    text = json.dumps({"inputs": [given]}).encode()
    return text + array.tobytes(), {"Inference-Header-Content-Length": str(len(text))}


def infer(server: Server, seed: int = 0) -> Reply:
    body, headers = request(picture(seed))
    return server.ask("POST", INFER, body, headers)


def logits(reply: Reply) -> np.ndarray[Any, Any]:
    assert reply.code == 200, reply.body
    return np.array(reply.json["outputs"][0]["data"], np.float32)


def infer_grpc(server: Server, seed: int = 0, timeout: float = 20, **metadata: str) -> pb.ModelInferResponse:
    array = picture(seed)
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[array.tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=array.shape)
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        found: pb.ModelInferResponse = call(message, timeout=timeout, metadata=tuple(metadata.items()))
        return found


def batches(server: Server) -> list[int]:
    """The size of the batch that each answered request was run in, from the log."""
    return [row["batch"] for row in server.logs if row.get("route") == "infer"]


@contextmanager
def paused(server: Server) -> Iterator[int]:
    """The one worker stopped in its tracks, as one that hangs; it goes on after the block unless it was replaced."""
    (pid,) = server.children
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        if pid in server.children:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def start(small_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """start(*options, bundle=...) -> a server of the small bundle under the name m."""
    running = []

    def make(*options: str, bundle: Path | None = None) -> Server:
        context = serving(tmp_path / "log", f"m={bundle or small_bundle()}", *options)
        running.append(context)
        return context.__enter__()

    yield make
    for context in running:
        context.__exit__(None, None, None)


def in_hand(server: Server) -> float:
    return server.metric("dualtoken_requests_in_hand")


def test_a_full_queue_refuses_before_the_body_and_health_goes_on(
    start: Callable[..., Server], pool: ThreadPoolExecutor
) -> None:
    server = start("--queue", "2")
    want = [logits(infer(server, seed)) for seed in range(3)]
    with paused(server):
        waiting: list[Future[Reply]] = [pool.submit(infer, server, seed) for seed in range(3)]
        server.wait_for(lambda: in_hand(server) == 3)
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12000\r\n\r\n".encode()
        with socket.create_connection((server.host, server.port), timeout=5) as link:
            link.sendall(head)  # and no body
            began = time.monotonic()
            answer = read_reply(link).lower()
        assert answer.startswith(b"http/1.1 503")
        assert b"retry-after: 1\r\n" in answer
        assert time.monotonic() - began < 1
        with pytest.raises(grpc.RpcError) as caught:
            infer_grpc(server)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.get("/v2/health/live").code == server.get("/v2/health/ready").code == 200
        server.wait_for(lambda: server.metric("dualtoken_queue_depth", model="m") == 2)
        assert not any(future.done() for future in waiting)
    for future, expected in zip(waiting, want, strict=True):
        np.testing.assert_array_equal(logits(future.result()), expected)


def test_requests_that_wait_are_merged_and_keep_their_own_answers(
    start: Callable[..., Server], pool: ThreadPoolExecutor, small_bundle: Callable[..., Path]
) -> None:
    server = start("--max-batch", "4", bundle=small_bundle(batch="dynamic"))
    want = [logits(infer(server, seed)) for seed in range(6)]
    before = server.metric("dualtoken_batch_rows_count", model="m")
    with paused(server):
        futures = [pool.submit(infer, server, 0)]
        server.wait_for(lambda: in_hand(server) == 1)
        futures += [pool.submit(infer, server, seed) for seed in range(1, 6)]
        server.wait_for(lambda: server.metric("dualtoken_queue_depth", model="m") == 5)
    for future, expected in zip(futures, want, strict=True):
        np.testing.assert_allclose(logits(future.result()), expected, rtol=0, atol=1e-5)  # another order of sums
    assert server.metric("dualtoken_batch_rows_count", model="m") - before == 3  # 1, then 4, then 1
    server.wait_for(lambda: len(batches(server)) == len(want) + len(futures))
    assert sorted(batches(server))[-4:] == [4] * 4


def test_a_worker_that_dies_idle_is_replaced(start: Callable[..., Server]) -> None:
    server = start()
    want, (pid,) = logits(infer(server)), server.children
    os.kill(pid, signal.SIGKILL)
    server.wait_for(lambda: server.metric("dualtoken_workers_lost_total", model="m") == 1)
    np.testing.assert_array_equal(logits(infer(server)), want)  # waits for the new one
    assert server.children != [pid]


def test_a_worker_that_dies_in_a_run_fails_that_request_alone(
    start: Callable[..., Server], pool: ThreadPoolExecutor
) -> None:
    server = start()
    with paused(server) as pid:
        first = pool.submit(infer, server)
        server.wait_for(lambda: in_hand(server) == 1)
        second = pool.submit(infer, server)
        server.wait_for(lambda: in_hand(server) == 2)
        os.kill(pid, signal.SIGKILL)
        failed = first.result()
        assert (failed.code, "died" in failed.json["error"]) == (500, True)
    assert second.result().code == 200
    assert server.get("/v2/health/ready").code == 200


def test_a_worker_that_hangs_is_replaced(start: Callable[..., Server]) -> None:
    server = start("--run-seconds", "0.5")
    with paused(server) as pid:
        hung = infer(server)
        assert (hung.code, "did not answer within 0.5 s" in hung.json["error"]) == (503, True)
        assert infer(server).code == 200
        assert server.children != [pid]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_client_that_leaves_takes_its_request_along(start: Callable[..., Server], pool: ThreadPoolExecutor) -> None:
    server = start()
    body, headers = request(picture(0))
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    with paused(server):
        running = pool.submit(infer, server)
        server.wait_for(lambda: in_hand(server) == 1)
        with socket.create_connection((server.host, server.port)) as link:
            link.sendall(
                f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            server.wait_for(lambda: in_hand(server) == 2)
        server.wait_for(lambda: in_hand(server) == 1)
    assert running.result().code == 200
    assert server.metric("dualtoken_inference_seconds_count", model="m") == 1
    server.wait_for(lambda: server.metric("dualtoken_requests_total", code="499") == 1)  # after the slot is free


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_admitted_and_exits_with_0(
    start: Callable[..., Server], pool: ThreadPoolExecutor, number: signal.Signals
) -> None:
    server = start()
    want, workers = logits(infer(server)), server.children
    with paused(server):
        over_http, over_grpc = pool.submit(infer, server), pool.submit(infer_grpc, server)
        server.wait_for(lambda: in_hand(server) == 2)
        server.process.send_signal(number)
        server.wait_for(lambda: server.get("/v2/health/ready").code == 503)
        assert server.get("/v2/health/live").code == 200
        refused = infer(server)
        assert (refused.code, refused.headers["retry-after"]) == (503, "1")
        with pytest.raises(grpc.RpcError) as caught:
            infer_grpc(server)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.process.poll() is None
    np.testing.assert_array_equal(logits(over_http.result()), want)
    np.testing.assert_array_equal(np.frombuffer(over_grpc.result().raw_output_contents[0], "<f4"), want)
    assert server.process.wait(10) == 0
    assert not any(map(alive, workers))


def test_a_drain_has_an_end_and_says_so(start: Callable[..., Server], pool: ThreadPoolExecutor) -> None:
    """In hand when it ends: a run over each transport, a body and a message that never come."""
    server = start("--drain-seconds", "0.3")
    (worker,) = server.children
    os.kill(worker, signal.SIGSTOP)
    over_http, over_grpc = pool.submit(infer, server), pool.submit(infer_grpc, server)
    silent = threading.Event()
    with (
        socket.create_connection((server.host, server.port), timeout=20) as link,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        link.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12000\r\n\r\n".encode())
        call: Any = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        without_message = call.future(iter(lambda: silent.wait() and b"", b""), timeout=20)
        server.wait_for(lambda: in_hand(server) == 4)
        assert server.stop() == 0
        assert read_reply(link).startswith(b"HTTP/1.1 503")
        cut = [without_message.exception(), over_grpc.exception()]
        silent.set()
    assert [error.code() for error in cut] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert all("shut down before this request was answered" in error.details() for error in cut)
    late = over_http.result()
    assert (late.code, "shut down" in late.json["error"]) == (503, True)
    assert not alive(worker)
    assert any(row["event"] == "drain ended before all requests did" for row in server.logs)


def keep_alive(server: Server) -> socket.socket:
    """A connection on which one request was answered."""
    link = socket.create_connection((server.host, server.port), timeout=20)
    assert asked(link).startswith(b"HTTP/1.1 200")
    return link


def asked(link: socket.socket, path: str = "/v2/health/live") -> bytes:
    link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return read_reply(link)


def test_a_connection_that_asks_nothing_is_closed(start: Callable[..., Server]) -> None:
    server = start("--idle-seconds", "0.2")
    states: list[grpc.ChannelConnectivity] = []
    with keep_alive(server) as link, grpc.insecure_channel(server.grpc) as channel:
        channel.subscribe(states.append)
        live: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        live(b"", timeout=20)
        assert link.recv(1) == b""
        server.wait_for(
            lambda: grpc.ChannelConnectivity.READY in states and states[-1] == grpc.ChannelConnectivity.IDLE
        )
        live(b"", timeout=20)  # the client connects anew and notices nothing


def test_a_connection_too_many_takes_the_place_of_the_quietest(start: Callable[..., Server]) -> None:
    server = start("--connections", "3")
    first, second, third = (keep_alive(server) for _ in range(3))
    assert asked(first).startswith(b"HTTP/1.1 200")  # the second is the quietest now
    fourth = keep_alive(server)
    assert second.recv(1) == b""
    for link in (first, third, fourth):
        assert asked(link).startswith(b"HTTP/1.1 200")
        link.sendall(
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert link.recv(99).startswith(b"HTTP/1.1 100")  # in hand, and not to be closed for anybody
    with socket.create_connection((server.host, server.port), timeout=20) as fifth:
        assert asked(fifth).startswith(b"HTTP/1.1 200"), "health is always answered"
    with socket.create_connection((server.host, server.port), timeout=20) as fifth:
        answer = asked(fifth, "/v2").lower()
    assert answer.startswith(b"http/1.1 503")
    assert b"retry-after: 1\r\n" in answer
    for link in (first, third, fourth):
        link.sendall(b"{} is bad")
        assert read_reply(link).startswith(b"HTTP/1.1 400")
    keep_alive(server).close()
    for link in (first, second, third, fourth):
        link.close()


def test_workers_end_with_a_server_that_is_killed(start: Callable[..., Server]) -> None:
    server = start("--workers", "2")
    server.wait_for(lambda: server.metric("dualtoken_workers_up", model="m") == 2)
    workers = server.children
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)  # one that hangs would not notice a closed socket
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 5
    while any(map(alive, workers)):
        assert time.monotonic() < end, "a worker was orphaned"
        time.sleep(0.02)


def test_a_changed_bundle_is_swapped_in_without_dropping_a_request(
    start: Callable[..., Server], own_bundle: Path, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    server = start("--reload-seconds", "0.1", bundle=own_bundle)
    other = tmp_path / "other"
    shutil.copytree(small_bundle("onnxruntime", "fp16"), other)
    before, replies, stop = logits(infer(server)), [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            replies.append(infer(server))

    asking = threading.Thread(target=ask)
    asking.start()
    own_bundle.rename(tmp_path / "old")
    other.rename(own_bundle)
    server.wait_for(lambda: server.metric("dualtoken_reloads_total", outcome="loaded") == 1)
    after = logits(infer(server))
    stop.set()
    asking.join()
    server.wait_for(lambda: len(server.children) == 1)
    assert np.abs(after - before).max() > 1e-6, "float16 weights give other digits"
    assert {reply.code for reply in replies} == {200}
    for got in map(logits, replies):
        assert np.array_equal(got, before) or np.array_equal(got, after)
    (own_bundle / "manifest.json").write_text("{}")
    server.wait_for(lambda: server.metric("dualtoken_reloads_total", outcome="failed") == 1)
    np.testing.assert_array_equal(logits(infer(server)), after)


def test_admin_unloads_and_loads_what_was_named_at_the_start(start: Callable[..., Server]) -> None:
    server = start("--admin")
    index = "/v2/repository/index"
    assert server.post(index, {}).json == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
    assert server.post("/v2/repository/models/m/unload", {}).code == 200
    assert infer(server).code == 404
    assert server.post(index, {}).json[0]["state"] == "UNAVAILABLE"
    assert server.get("/v2/health/ready").code == 503
    overrides: list[Any] = [{"parameters": {"config": "{}"}}, {"parameters": {"file:1/model.onnx": "AAAA"}}, []]
    for body in overrides:
        assert server.post("/v2/repository/models/m/load", body).code == 400
    assert server.post("/v2/repository/models/m/load", {}, Origin="http://elsewhere.example").code == 403
    assert server.post("/v2/repository/models/..%2fm/load", {}).code == 404
    assert server.post("/v2/repository/models/none/load", {}).code == 404
    assert server.post("/v2/repository/models/m/load", b"").code == 200
    assert infer(server).code == 200
    assert "model_repository" in server.get("/v2").json["extensions"]


def test_an_api_key_is_asked_for_and_never_logged(start: Callable[..., Server], tmp_path: Path) -> None:
    key = "correct-horse-battery"
    (tmp_path / "key").write_text(f"{key}\n")
    server = start("--api-key-file", str(tmp_path / "key"))
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": f"Basic {key}"}, {"Authorization": "Bearer "}):
        assert server.get("/v2/models/m", **headers).code == 401
    assert infer(server).code == 401
    for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
        assert server.get("/v2/models/m", **headers).code == 200
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert server.get(path).code == 200
    with pytest.raises(grpc.RpcError) as caught:
        infer_grpc(server)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert infer_grpc(server, authorization=f"Bearer {key}").model_name == "m"
    assert key not in (tmp_path / "log").read_text()


def test_tls_on_both_transports(start: Callable[..., Server], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert)
    subprocess.run(["openssl", *map(str, new), *subject], check=True, capture_output=True)
    server = start("--tls-cert", str(cert), "--tls-key", str(key))
    assert server.addresses["http"].startswith("https://")
    context = ssl.create_default_context(cafile=str(cert))
    with (
        socket.create_connection((server.host, server.port), timeout=5) as link,
        context.wrap_socket(link, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert secure.recv(4096).startswith(b"HTTP/1.1 200")
    credentials = grpc.ssl_channel_credentials(cert.read_bytes())
    with grpc.secure_channel(server.grpc, credentials) as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        assert pb.ServerLiveResponse.FromString(call(b"", timeout=5)).live


def test_logs_are_json_and_carry_no_picture(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    for seed in range(3):
        infer(server, seed)
    server.stop()
    lines = (tmp_path / "log").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all({"time", "level", "event"} <= row.keys() for row in rows)
    assert [row["event"] for row in rows if row["event"] != "request"] == [
        "model loaded",
        "ready",
        "draining",
        "stopped",
    ]
    assert max(map(len, lines)) < 500


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{bundle}", "--tls-cert", "a.pem"], 2, "needs both"),
        (["a b={bundle}"], 2, "is no model name"),
        (["m={bundle}", "m=other"], 2, "would both be m:1"),
        (["{bundle}", "--port", "9", "--grpc-port", "9"], 2, "cannot share port 9"),
        (["m={bundle}", "--port", "{taken}"], 2, "give another --port"),
        (["m={bundle}", "--port", "0", "--grpc-port", "{taken}"], 2, "give another --grpc-port"),
        (["none", "--port", "0"], 4, "no bundle at none"),
        (["m={bundle}", "--api-key-file", "none"], 4, "cannot be read"),
        (["m={bundle}", "--port", "0", "--tls-cert", "none", "--tls-key", "none"], 4, "TLS"),
        (["m={bundle}", "--port", "0", "--device", "cuda"], 3, "CUDAExecutionProvider"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    arguments: list[str], code: int, message: str, small_bundle: Callable[..., Path]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"bundle": small_bundle(), "taken": taken.getsockname()[1]}
        command = [argument.format(**values) for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "dualtoken_deploy", "serve", *command], capture_output=True, text=True, timeout=60
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (code, 1), done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_the_golden_input_over_grpc(start: Callable[..., Server], small_bundle: Callable[..., Path]) -> None:
    server = start()
    golden = Bundle.open(small_bundle()).golden
    message = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=[golden["input"].tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=golden["input"].shape)
    with grpc.insecure_channel(server.grpc) as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = pb.ModelInferResponse.FromString(call(message.SerializeToString(), timeout=10))
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "1", "7")
    assert not answer.outputs[0].HasField("contents")
    got = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(1, 10)
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=1e-4)
