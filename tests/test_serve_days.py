"""Bad days of a server: bundles that are copied over, names that are not its own, signals, and nobody who reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from dualtoken_deploy.errors import BundleError, UsageError
from dualtoken_deploy.serve.grpc import SERVICE
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from dualtoken_deploy.serve.repository import stamp_of
from dualtoken_deploy.serve.settings import Settings
from tests.serving import Server, serving
from tests.test_serve_hostile import BYTES, SIDE, ends, infer, unary

PATIENT = ("--header-seconds", "300")  # so that what is closed is not closed for its silence
FAST = ("--reload-seconds", "0.1", "--drain-seconds", "1")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with ExitStack() as running:
        yield lambda bundle, *options: running.enter_context(serving(tmp_path / "log", f"m={bundle}", *options))


def failures(server: Server) -> float:
    return server.metric("dualtoken_reload_failures_total", model="m")


def loads(server: Server) -> float:
    return server.metric("dualtoken_reloads_total", outcome="loaded")


def change(bundle: Path, name: str, content: bytes) -> None:
    """A file of a bundle with other contents, of which the manifest knows."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def newer(small_bundle: Callable[..., Path]) -> Path:
    """What is copied over the bundle that is served."""
    return small_bundle("onnxruntime", "fp16")


def test_a_bundle_copied_over_a_served_one_is_loaded_once_it_is_whole(
    start: Callable[..., Server], own_bundle: Path, newer: Path
) -> None:
    server = start(own_bundle, *FAST)
    shutil.copy(newer / "manifest.json", own_bundle)  # before what it names
    server.wait_for(lambda: failures(server) >= 1)
    assert infer(server).code == 200, "the old one answers"
    for name in ("model.onnx", "golden.npz", "labels.txt", "README.md", "bom.cdx.json"):
        shutil.copy(newer / name, own_bundle)
    server.wait_for(lambda: loads(server) == 1)
    assert infer(server).code == 200
    (row, *_) = [row for row in server.logs if "reload failed" in row["event"]]
    assert "the old bundle still answers" in row["event"]
    assert "sha256 differs" in row["reason"]
    server.wait_for(lambda: len(server.children) == 1)


def test_a_dead_worker_loads_what_is_there(start: Callable[..., Server], own_bundle: Path, newer: Path) -> None:
    """Also where changes are not looked for: the files of the old bundle are gone."""
    server = start(own_bundle, "--reload-seconds", "0", "--drain-seconds", "1")
    for file in newer.iterdir():
        shutil.copy(file, own_bundle)
    (pid,) = server.children
    os.kill(pid, signal.SIGKILL)
    server.wait_for(lambda: loads(server) == 1)
    assert infer(server).code == 200


def no_utf8(bundle: Path) -> None:
    change(bundle, "labels.txt", b"\xff\xfe\n" * 10)


def without_values(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["input"]["tensor"]["shape"][1] = 0
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def a_pipe(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")


def no_model(bundle: Path) -> None:
    change(bundle, "model.onnx", b"no model")


@pytest.mark.parametrize("damage", [no_utf8, without_values, a_pipe, no_model])
def test_whatever_lies_there_is_said_and_takes_nothing_along(
    start: Callable[..., Server], own_bundle: Path, newer: Path, damage: Callable[[Path], None]
) -> None:
    server = start(own_bundle, *FAST)
    assert infer(server).code == 200
    workers, open_files = server.children, server.descriptors()
    damage(own_bundle)
    server.wait_for(lambda: failures(server) >= 2)  # it is tried again, and nothing is left behind
    assert infer(server).code == 200
    server.wait_for(lambda: server.children == workers)
    server.wait_for(lambda: server.descriptors() <= open_files + 2)
    for file in newer.iterdir():
        (own_bundle / file.name).unlink()
        shutil.copy(file, own_bundle)
    server.wait_for(lambda: loads(server) == 1)
    assert infer(server).code == 200
    assert not any("traceback" in row for row in server.logs)
    ends(server)


def test_a_pipe_in_a_bundle_is_never_opened(own_bundle: Path) -> None:
    a_pipe(own_bundle)
    with pytest.raises(BundleError, match="neither a file nor a folder"):
        stamp_of(own_bundle)


def test_a_reload_to_a_larger_input_takes_larger_messages(
    start: Callable[..., Server], own_bundle: Path, small_bundle: Callable[..., Path]
) -> None:
    server = start(own_bundle, *FAST)
    larger = small_bundle(image_size=256)
    for file in larger.iterdir():
        shutil.copy(file, own_bundle)
    server.wait_for(lambda: any(row["event"] == "grpc takes larger messages" for row in server.logs))
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(256 * 256 * 3)])
    message.inputs.add(name="image", datatype="UINT8", shape=(1, 256, 256, 3))
    with grpc.insecure_channel(server.grpc) as channel:
        unary(channel)(message.SerializeToString(), timeout=20, wait_for_ready=True)


def test_a_name_that_is_not_its_own_is_refused(start: Callable[..., Server], own_bundle: Path) -> None:
    """DNS rebinding: a page's own name may be made to point to 127.0.0.1, and its origin is then the server's."""
    server = start(own_bundle, "--admin", "--allowed-host", "photos.example")
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[::2]", ""):
        reply = server.post("/v2/repository/models/m/unload", {}, Host=host, Origin=f"http://{host}")
        assert (reply.code, "--allowed-host" in reply.json["error"]) == (403, True), host
        assert server.get("/v2/health/ready", Host=host).code == 200, "probes ask as they like"
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1:1", "[::1]:80", "[::1]", "photos.example."):
        assert server.get("/v2", Host=host).code == 200, host
    unload = "/v2/repository/models/m/unload"
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://["}, {"Origin": "null"}):
        assert server.post(unload, {}, **headers).code == 403, headers
    assert server.post("/v2/repository/models/m/load", {"parameters": 5}).code == 400
    same = f"127.0.0.1:{server.port}"
    assert server.post(unload, {}, **{"Origin": f"http://{same}", "Sec-Fetch-Site": "same-origin"}).code == 200


def test_control_from_elsewhere_needs_a_key_or_a_name() -> None:
    with pytest.raises(UsageError, match=r"--admin on 0\.0\.0\.0 needs --api-key-file"):
        Settings(host="0.0.0.0", admin=True)
    Settings(host="0.0.0.0", admin=True, api_key="k" * 16)
    known = Settings(host="0.0.0.0", admin=True, allowed_hosts=("A.example",)).known_hosts
    assert known == frozenset({"0.0.0.0", "a.example"})
    assert Settings(host="0.0.0.0").known_hosts is None


def test_reflection_asks_for_the_key(start: Callable[..., Server], own_bundle: Path, tmp_path: Path) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    (tmp_path / "key").write_text("k" * 16)
    server = start(own_bundle, "--api-key-file", str(tmp_path / "key"))
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(server.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([question]), timeout=10))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=10, metadata=(("x-api-key", "k" * 16),))
    assert SERVICE in {service.name for service in answer.list_services_response.service}


def test_idle_connections_of_grpc_make_room(start: Callable[..., Server], own_bundle: Path) -> None:
    server = start(own_bundle, "--connections", "8", *PATIENT)
    host, _, port = server.grpc.rpartition(":")
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(BYTES)])
    message.inputs.add(name="image", datatype="UINT8", shape=(1, SIDE, SIDE, 3))
    with ExitStack() as idle:
        links = [idle.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(60)]
        server.wait_for(lambda: sum(map(is_shut, links)) >= 60 - 8)
        with grpc.insecure_channel(server.grpc) as channel:
            unary(channel)(message.SerializeToString(), timeout=20, wait_for_ready=True)
        assert infer(server).code == 200


def is_shut(link: socket.socket) -> bool:
    """Whether the server has ended a connection on which it has nothing to say but, with gRPC, its settings."""
    link.setblocking(False)
    try:
        while link.recv(4096):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_connections_that_start_no_tls_make_room(
    start: Callable[..., Server], own_bundle: Path, tmp_path: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert)
    subprocess.run(["openssl", *map(str, new), "-subj", "/CN=localhost"], check=True, capture_output=True)
    server = start(own_bundle, "--tls-cert", str(cert), "--tls-key", str(key), "--connections", "8", *PATIENT)
    with ExitStack() as silent:
        links = [
            silent.enter_context(socket.create_connection((server.host, server.port), timeout=10)) for _ in range(60)
        ]
        server.wait_for(lambda: sum(map(is_shut, links)) >= 60 - 8)
        import ssl

        context = ssl._create_unverified_context()
        with (
            socket.create_connection((server.host, server.port), timeout=10) as link,
            context.wrap_socket(link) as secure,
        ):
            secure.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert secure.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("numbers", [[signal.SIGHUP], [signal.SIGTERM] * 5, [signal.SIGHUP, signal.SIGINT]])
def test_signals_drain_and_end_with_0_however_many(
    start: Callable[..., Server], own_bundle: Path, numbers: list[signal.Signals]
) -> None:
    server = start(own_bundle, "--drain-seconds", "1")
    for number in numbers:
        server.process.send_signal(number)
    while len(numbers) > 2 and server.process.poll() is None:
        server.process.send_signal(numbers[0])
    assert server.process.wait(20) == 0
    events = [row["event"] for row in server.logs]
    assert events[-2:] == ["draining", "stopped"]


def test_a_stderr_that_nobody_reads_stops_nothing(own_bundle: Path, tmp_path: Path) -> None:
    """A full pipe: each of these requests leaves a line."""
    command = [sys.executable, "-m", "dualtoken_deploy", "serve", f"m={own_bundle}", "--port", "0", "--grpc-port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, "--drain-seconds", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        server = Server(process, json.loads(process.stdout.readline()), tmp_path / "none")
        name = "x" * 100
        import http.client

        link = http.client.HTTPConnection(server.host, server.port, timeout=20)
        for _ in range(1000):  # 300 bytes each, and the pipe holds 64 KiB
            link.request("GET", f"/v2/models/{name}")
            assert link.getresponse().read()
        link.close()
        assert server.get("/v2/health/ready").code == 200
        assert infer(server).code == 200
        ends(server)
    finally:
        process.kill()
        process.communicate()


def test_the_last_words_of_a_worker_reach_the_operator(start: Callable[..., Server], own_bundle: Path) -> None:
    server = start(own_bundle, "--drain-seconds", "1")
    (pid,) = server.children
    os.kill(pid, signal.SIGSTOP)
    with ExitStack() as stack:
        from concurrent.futures import ThreadPoolExecutor

        pool = stack.enter_context(ThreadPoolExecutor(1))
        failed = pool.submit(infer, server)
        server.wait_for(lambda: server.metric("dualtoken_requests_in_hand") == 1)
        os.kill(pid, signal.SIGKILL)
        assert "died of signal 9" in failed.result().json["error"]


@pytest.mark.parametrize("damage", [no_model, a_pipe, without_values])
def test_a_bundle_that_cannot_be_served_is_said_in_one_line(own_bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(own_bundle)
    command = [sys.executable, "-m", "dualtoken_deploy", "serve", f"m={own_bundle}", "--port", "0", "--no-grpc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 4
    assert all(line.startswith("{") for line in lines if line != error), "all else is JSON"
