"""Clients that are slow, greedy or gone: the others are answered, memory stays, and SIGTERM ends the server."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from dualtoken_deploy.serve.grpc import SERVICE, STREAMS
from dualtoken_deploy.serve.handler import most_calls
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from tests import hostile, http2
from tests.serving import Reply, Server, read_reply, serving
from tests.test_serve_http import png

INFER, CLASSIFY = "/v2/models/m/infer", "/v2/models/m/classify"
SIDE, BYTES = 64, 64 * 64 * 3
CONNECTIONS, QUEUE = 24, 2
LIMITS = ("--connections", str(CONNECTIONS), "--queue", str(QUEUE), "--decoders", "2", "--drain-seconds", "1")


@pytest.fixture
def start(small_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with ExitStack() as running:
        yield lambda *options: running.enter_context(
            serving(tmp_path / "log", f"m={small_bundle()}", f"open={small_bundle(batch='dynamic')}", *LIMITS, *options)
        )


@pytest.fixture(scope="module")
def server(small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundles = (f"m={small_bundle()}", f"open={small_bundle(batch='dynamic')}")
    with serving(tmp_path_factory.mktemp("hostile") / "log", *bundles, *LIMITS) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def infer(server: Server, timeout: float = 30) -> Reply:
    given = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, SIDE, SIDE, 3],
        "parameters": {"binary_data_size": BYTES},
    }
    text = json.dumps({"inputs": [given]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return server.ask("POST", INFER, text + bytes(BYTES), headers, timeout)


def unary(channel: grpc.Channel) -> Any:
    return channel.unary_unary(f"/{SERVICE}/ModelInfer")


def classify(server: Server, picture: bytes | None = None) -> Reply:
    return server.ask("POST", CLASSIFY, png(80, 60) if picture is None else picture)


def connect(server: Server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=20)


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def in_hand(server: Server) -> float:
    return server.metric("dualtoken_requests_in_hand")


def ends(server: Server, drain_seconds: float = 1) -> None:
    """SIGTERM, and whether the end came in its time."""
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert time.monotonic() - began < drain_seconds + 5


@pytest.mark.parametrize(
    "picture", [hostile.jpeg_of_scans(12_000), hostile.png_of_chunks(80_000)], ids=["scans", "chunks"]
)
def test_pictures_without_end_are_refused_at_once(server: Server, picture: bytes) -> None:
    reply = classify(server, picture)
    assert (reply.code, "which no program writes" in reply.json["error"]) == (400, True)


def test_formats_that_no_photo_app_sends_are_off_unless_asked_for(start: Callable[..., Server]) -> None:
    gif = hostile.gif_of_comments(1)
    server = start("--picture-format", "gif", "--picture-format", "png")
    assert classify(server, gif).code == classify(server).code == 200
    refused = classify(server, hostile.jpeg_of_scans(1))
    assert (refused.code, "is not a PNG or GIF picture" in refused.json["error"]) == (400, True)


def stop_decoders(server: Server) -> list[int]:
    """Every decoder stopped in its tracks, as by a picture that takes for ever."""
    found = server.decoders
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


def test_a_decoder_that_hangs_stops_nobody_and_holds_its_place(
    start: Callable[..., Server], pool: ThreadPoolExecutor
) -> None:
    """Its time is up after a minute, which no test waits for, or 2 s after others begin to wait."""
    server = start("--decode-seconds", "60")

    def both_up() -> bool:
        assert {future.result().code for future in [pool.submit(classify, server) for _ in range(QUEUE + 1)]} == {200}
        return len(server.decoders) == 2 and "unlimited" not in map(address_space, server.decoders)

    server.wait_for(both_up)
    hung = stop_decoders(server)
    with ExitStack() as gone:
        for _ in hung:
            link = gone.enter_context(connect(server))
            body = png(80, 60)
            link.sendall(head(CLASSIFY, f"Content-Length: {len(body)}") + body)
        server.wait_for(lambda: in_hand(server) == len(hung))
    held = in_hand(server)  # they have left, and their pictures are still in the decoders
    assert infer(server).code == 200
    assert classify(server).code == 200, "once the decoders were replaced"
    assert held == len(hung)
    server.wait_for(lambda: server.metric("dualtoken_decoders_lost_total") == len(hung))
    server.wait_for(lambda: not set(hung) & set(server.decoders))


def test_who_waits_for_a_decoder_that_hangs_is_told_when_the_server_ends(
    start: Callable[..., Server], pool: ThreadPoolExecutor
) -> None:
    server = start("--decode-seconds", "60")
    assert classify(server).code == 200
    server.wait_for(lambda: "unlimited" not in map(address_space, server.decoders))
    waiting = [pool.submit(classify, server) for _ in stop_decoders(server)]
    server.wait_for(lambda: in_hand(server) == len(waiting) > 0)
    ends(server)
    assert {future.result().code for future in waiting} == {503}


def address_space(pid: int) -> str:
    """A decoder's limit of memory, which it sets once its imports are done."""
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in limits if line.startswith("Max address space")).split()[3]


def test_a_decoder_has_a_limit_of_memory(start: Callable[..., Server]) -> None:
    server = start("--max-megapixels", "0.01")
    assert classify(server).code == 200
    (pid, *_) = server.decoders
    server.wait_for(lambda: address_space(pid) != "unlimited")
    assert int(address_space(pid)) < 2**31, "its libraries, 256 MiB and what the pixels take"


def test_trailers_have_an_end(server: Server) -> None:
    with connect(server) as link:
        link.sendall(head(INFER, "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 32 * 2**20:
                sent += link.send(b"x-trailer: " + b"a" * 60_000 + b"\r\n")
        assert sent < 32 * 2**20, "it took all of them"
    assert infer(server).code == 200


def test_bodies_that_trickle_keep_nobody_out(server: Server) -> None:
    """More than there are places; each says a byte and waits."""
    with ExitStack() as slow:
        for _ in range(3 * (QUEUE + 1)):
            link = slow.enter_context(connect(server))
            link.sendall(head(INFER, "Content-Length: 5000") + b"{")
        server.wait_for(lambda: in_hand(server) == 3 * (QUEUE + 1))
        assert infer(server, timeout=5).code == 200
        assert classify(server).code == 200
    server.wait_for(lambda: in_hand(server) == 0)


def test_the_slowest_body_makes_room_for_a_newcomer(server: Server) -> None:
    """Half of the connections may send bodies at a time; the others are there for whoever comes."""
    most = CONNECTIONS // 2
    with ExitStack() as slow:
        for _ in range(most + 6):
            slow.enter_context(connect(server)).sendall(head(INFER, "Content-Length: 5000") + b"{")
        server.wait_for(lambda: in_hand(server) == most)  # six were sent away
        assert infer(server, timeout=5).code == 200
        assert server.get("/v2/health/live").code == 200
    server.wait_for(lambda: in_hand(server) == 0)


def silent_calls(server: Server, count: int) -> tuple[grpc.Channel, list[Any], threading.Event]:
    """Calls that never send their message."""
    channel, silent = grpc.insecure_channel(server.grpc), threading.Event()
    infer_call: Any = channel.stream_unary(f"/{SERVICE}/ModelInfer")
    calls = [infer_call.future(iter(lambda: silent.wait() and b"", b""), timeout=60) for _ in range(count)]
    return channel, calls, silent


def test_silent_streams_keep_nobody_out(server: Server) -> None:
    count = 3 * (QUEUE + 1)
    channel, calls, silent = silent_calls(server, count)
    server.wait_for(lambda: in_hand(server) == count)
    assert infer(server, timeout=5).code == 200
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(BYTES)])
    message.inputs.add(name="image", datatype="UINT8", shape=(1, SIDE, SIDE, 3))
    with grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
        unary(other)(message.SerializeToString(), timeout=5)
    for call in calls:
        call.cancel()
    silent.set()
    channel.close()
    server.wait_for(lambda: in_hand(server) == 0)


@pytest.fixture
def greedy() -> Iterator[Callable[[Server, int], list[socket.socket]]]:
    """greedy(server, n) -> n connections that ask for much at once and never read."""
    with ExitStack() as links:

        def make(server: Server, count: int) -> list[socket.socket]:
            found = []
            for _ in range(count):
                link = links.enter_context(socket.socket())
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                link.settimeout(5)
                link.connect((server.host, server.port))
                with contextlib.suppress(OSError):
                    link.sendall(head("/metrics", method="GET") * 600)
                found.append(link)
            return found

        yield make


def test_clients_that_pipeline_and_never_read_hold_nothing(
    start: Callable[..., Server], greedy: Callable[[Server, int], list[socket.socket]]
) -> None:
    server = start()
    assert infer(server).code == 200
    idle = server.memory_kib()
    for _ in range(3):
        greedy(server, CONNECTIONS)
        assert server.get("/v2/health/ready").code == 200
        assert infer(server, timeout=10).code == 200
    assert server.memory_kib(field="VmHWM") < 2 * idle
    ends(server)


def test_an_answer_that_is_never_read_ends_its_connection(
    start: Callable[..., Server], greedy: Callable[[Server, int], list[socket.socket]]
) -> None:
    server = start("--body-seconds", "0.5", "--idle-seconds", "0.5")
    before = server.descriptors()
    greedy(server, CONNECTIONS - 4)
    server.wait_for(lambda: server.descriptors() <= before + 1)


def test_sixteen_requests_may_wait_and_no_more(server: Server) -> None:
    with connect(server) as link:
        link.sendall(head("/v2/health/live", method="GET") * 12)
        found = b""
        while found.count(b"HTTP/1.1 200") < 12:
            found += link.recv(65536)
    with connect(server) as link:
        link.sendall(head("/v2/health/live", method="GET") * 500)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := link.recv(65536):
                found += part
        assert 1 <= found.count(b"HTTP/1.1 200") <= 20
        assert b"connection: close" in found.lower()


@pytest.mark.parametrize("text", [b"[]", b"{}", b"[[[]]]", b'{"a":0}', b'""'])
def test_json_of_empty_values_is_refused_before_it_is_read(server: Server, text: bytes) -> None:
    """As many as fit into the largest body: ten thousand times what they are parsed to."""
    room = 2**20
    body = b'{"inputs":[{"name":"image","data":[' + b",".join([text] * (room // (len(text) + 1))) + b"]}]}"
    reply = server.ask("POST", "/v2/models/open/infer", body)
    assert (reply.code, "more" in reply.json["error"]) == (400, True)


@pytest.mark.parametrize(
    "field", [b"\x2a\x00", b"\x32\x00", b"\x3a\x00", b"\x22\x00"], ids=["inputs", "outputs", "raw", "map"]
)
def test_messages_of_empty_fields_are_refused_before_they_are_read(server: Server, field: bytes) -> None:
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        unary(channel)(b"\x0a\x01m" + field * 20_000, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 64 fields" in str(caught.value.details())


def test_long_json_is_read_by_a_decoder(server: Server) -> None:
    """And gives what the raw tensor gives."""
    values = [(i * 37) % 256 for i in range(2 * BYTES)]
    given = {"name": "image", "datatype": "UINT8", "shape": [2, SIDE, SIDE, 3], "data": values}
    text = json.dumps({"id": "7", "inputs": [given], "outputs": [{"name": "logits"}]})
    assert len(text) > 64 * 1024
    reply = server.ask("POST", "/v2/models/open/infer", text)
    raw = {key: value for key, value in given.items() if key != "data"} | {
        "parameters": {"binary_data_size": 2 * BYTES}
    }
    front = json.dumps({"inputs": [raw]}).encode()
    other = server.ask(
        "POST", "/v2/models/open/infer", front + bytes(values), {"Inference-Header-Content-Length": str(len(front))}
    )
    assert (reply.code, other.code, reply.json["id"]) == (200, 200, "7")
    assert reply.json["outputs"] == other.json["outputs"]
    message = pb.ModelInferRequest(model_name="open")
    message.inputs.add(name="image", datatype="UINT8", shape=(2, SIDE, SIDE, 3)).contents.uint_contents.extend(values)
    message.id = "x" * 60_000  # makes the typed part long: too long an id, which the decoder says
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        unary(channel)(message.SerializeToString(), timeout=10)
    assert "id must be text" in str(caught.value.details())


def test_a_refused_body_is_read_to_its_end_first(server: Server) -> None:
    """http.client and its like send all of a body before they read: a reset would hide why it was refused."""
    for _ in range(10):
        reply = server.ask("POST", INFER, bytes(18 * 2**20))
        assert (reply.code, "largest request" in reply.json["error"]) == (413, True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"/{SERVICE}/ModelMetadata", b"\x0a\x01m"),
        (f"/{SERVICE}/ServerLive", b""),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\0"),
    ],
    ids=["metadata", "live", "reflection"],
)
def test_answers_that_a_grpc_client_does_not_take_have_an_end(
    start: Callable[..., Server], path: str, message: bytes
) -> None:
    """Its window is closed, so that each answer would lie here as long as the connection lives."""
    server, count = start("--body-seconds", "1"), 40
    with http2.connect(server.grpc, window=0) as link:
        link.sendall(b"".join(http2.call(path, number, message) for number in range(count)))
        with contextlib.suppress(ConnectionError):
            while link.recv(65536):  # until the connection is shut: grpc has no other way to take an answer back
                pass
    assert infer(server).code == 200
    assert not any("traceback" in row for row in server.logs)


def test_calls_that_never_send_their_message_are_bounded_whatever_they_call(start: Callable[..., Server]) -> None:
    """More than there is room for, from twenty connections: their own make room, long before their time is over."""
    server = start("--body-seconds", "300")
    with ExitStack() as silent:
        for _ in range(20):
            link = silent.enter_context(http2.connect(server.grpc, window=65_535))
            link.sendall(b"".join(http2.start(f"/{SERVICE}/ServerLive", number) for number in range(STREAMS)))
        refused = functools.partial(server.metric, "dualtoken_requests_total", protocol="grpc", route="ServerLive")
        # grpc itself turns a few away before they are anybody's
        server.wait_for(lambda: refused(code="DEADLINE_EXCEEDED") >= 0.9 * (20 * STREAMS - most_calls(CONNECTIONS)))
        with grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
            message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(BYTES)])
            message.inputs.add(name="image", datatype="UINT8", shape=(1, SIDE, SIDE, 3))
            unary(other)(message.SerializeToString(), timeout=5)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /v2\r\n\r\n", 400),
        (b"GET /v2 HTTP/0.9\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.0\r\n\r\n", 200),
        (head(INFER, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 400),
        (head(INFER, "Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 300 + b"\r\n", 431),
        (head(f"{CLASSIFY}?{'a&' * 5000}") + b"\r\n", 414),
        (head(CLASSIFY, "Transfer-Encoding: chunked") + b"6\r\nxxxxxx\r\n" * 20_000, 400),
    ],
    ids=[
        *("no host", "two hosts", "no version", "0.9", "1.0 without host", "two codings", "two headers", "70 KB"),
        *("many headers", "a long address", "chunks of six bytes"),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(server: Server, request_: bytes, code: int) -> None:
    with connect(server) as link:
        link.sendall(request_)
        assert read_reply(link).startswith(b"HTTP/1.1 %d" % code)


def deep(levels: int) -> Any:
    found: Any = 0
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("key", ["name", "datatype", "shape"])
def test_a_value_nested_a_thousand_deep_is_refused_in_a_sentence(server: Server, key: str) -> None:
    given = {"name": "image", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": [0]} | {key: deep(900)}
    reply = server.post(INFER, {"inputs": [given]})
    assert reply.code == 400
    assert len(reply.json["error"]) < 200
