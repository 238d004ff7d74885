"""A real server over HTTP: every route, and a set of malformed requests that each get their 4xx."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy import Bundle, predict
from dualtoken_deploy.data.images import load_batch
from tests.serving import Server, read_reply, serving

SMALL = "/v2/models/small"
OPEN = "/v2/models/open:3"
FLOATS = "/v2/models/floats"
SIDE = 64
INPUT = {"name": "image", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3]}
BYTES = SIDE * SIDE * 3


def names(small_bundle: Callable[..., Path]) -> list[str]:
    """Bundles that the export tests make as well."""
    return [
        f"small={small_bundle()}",
        f"open:3={small_bundle(batch='dynamic')}",
        f"floats={small_bundle(input_kind='tensor')}",
    ]


@pytest.fixture(scope="module")
def server(small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundles = [*names(small_bundle), f"pair={small_bundle(batch=2, image_size='70x101')}"]
    limits = ("--body-seconds", "1", "--header-seconds", "1", "--max-megapixels", "1", "--max-image-mib", "1")
    with serving(tmp_path_factory.mktemp("serve") / "log", *bundles, *limits, "--max-batch", "4") as running:
        yield running


def binary(
    inputs: dict[str, Any] | None = None, raw: bytes | None = None, header: int | None = None, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an infer request with a raw tensor."""
    data = bytes(BYTES) if raw is None else raw
    one = INPUT | {"parameters": {"binary_data_size": len(data)}} | (inputs or {})
    text = json.dumps({"inputs": [one]} | more).encode()
    return text + data, {"Inference-Header-Content-Length": str(len(text) if header is None else header)}


def png(width: int, height: int, claim: tuple[int, int] | None = None) -> bytes:
    """A PNG whose header may claim another size than it has."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(out, "PNG")
    data = bytearray(out.getvalue())
    if claim:
        data[16:24] = struct.pack(">II", *claim)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_metadata_and_health(server: Server, small_bundle: Callable[..., Path]) -> None:
    assert server.get("/v2").json["name"] == "dualtoken"
    assert "binary_tensor_data" in server.get("/v2").json["extensions"]
    assert server.get("/v2/health/live").json == {"live": True}
    assert server.get("/v2/health/ready").json == {"ready": True}
    for path in (f"{SMALL}/ready", f"{SMALL}/versions/1/ready", "/v2/models/small:1/ready"):
        assert server.get(path).json == {"name": "small", "ready": True}
    manifest = Bundle.open(small_bundle()).manifest
    assert server.get(SMALL).json == {
        "name": "small",
        "versions": ["1"],
        "platform": "dualtoken_onnxruntime",
        "inputs": [{"name": manifest.input.tensor.name, "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 10]}],
    }
    assert server.get(OPEN).json["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}]
    assert [m["name"] for m in server.get("/v2/models").json["models"]] == ["small", "open", "floats", "pair"]


@pytest.mark.parametrize("form", ["json", "nested", "binary"])
def test_infer_gives_the_golden_logits(server: Server, small_bundle: Callable[..., Path], form: str) -> None:
    golden = Bundle.open(small_bundle()).golden
    if form == "binary":
        body, headers = binary(raw=golden["input"].tobytes(), parameters={"binary_data_output": True})
        reply = server.ask("POST", f"{SMALL}/infer", body, headers)
        length = int(reply.headers["inference-header-content-length"])
        got = np.frombuffer(reply.body[length:], "<f4").reshape(1, 10)
    else:
        data = golden["input"].tolist() if form == "nested" else golden["input"].reshape(-1).tolist()
        reply = server.post(f"{SMALL}/infer", {"id": "a7", "inputs": [INPUT | {"data": data}]})
        assert reply.json["id"] == "a7"
        got = np.array(reply.json["outputs"][0]["data"], np.float32).reshape(1, 10)
    assert reply.code == 200
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=1e-4)  # eager against the runtime, as exported


def test_rows_of_a_batch_are_the_rows_alone(server: Server, small_bundle: Callable[..., Path]) -> None:
    rows = np.random.default_rng(5).integers(0, 255, (3, SIDE, SIDE, 3), dtype=np.uint8)

    def logits(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        body, headers = binary({"shape": list(batch.shape)}, batch.tobytes())
        reply = server.ask("POST", f"{OPEN}/infer", body, headers)
        assert reply.code == 200, reply.body
        return np.array(reply.json["outputs"][0]["data"], np.float32).reshape(len(batch), 10)

    alone = np.concatenate([logits(row[None]) for row in rows])
    np.testing.assert_allclose(logits(rows), alone, rtol=0, atol=1e-5)  # a batch may sum in another order


@pytest.mark.parametrize("form", ["body", "multipart", "urlencoded"])
def test_classify_agrees_with_predict(
    server: Server, small_bundle: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(3).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    (want,) = predict(small_bundle(), [path], top=4)
    body, headers = path.read_bytes(), {"Content-Type": "image/png"}
    if form == "multipart":
        head = b'--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n--xyz\r\nContent-Disposition: '
        head += b'form-data; name="image"; filename="../../etc/passwd"\r\nContent-Type: image/png\r\n\r\n'
        body, headers = head + body + b"\r\n--xyz--\r\n", {"Content-Type": "multipart/form-data; boundary=xyz"}
    elif form == "urlencoded":  # what curl --data-binary says
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = server.ask("POST", f"{SMALL}/classify?top=4", body, headers)
    assert reply.code == 200, reply.body
    got = reply.json["predictions"]
    assert [(p["index"], p["label"]) for p in got] == [(g.index, g.label) for g in want.answers]
    np.testing.assert_allclose([p["probability"] for p in got], [g.probability for g in want.answers], atol=1e-5)
    assert set(reply.json["timing_ms"]) == {"decode", "queue", "inference", "total"}
    assert reply.json["bundle"] == {
        "variant": "tiny-mix",
        "target": "onnxruntime",
        "precision": "fp32",
        "weights": "random",
    }


def test_classify_prepares_a_picture_as_the_contract_says(server: Server, small_bundle: Callable[..., Path]) -> None:
    """A bundle of kind `tensor`: the server normalises, as images.load_batch does for every other command."""
    bundle = Bundle.open(small_bundle(input_kind="tensor"))
    picture = png(80, 70)
    batch = load_batch([picture], bundle.manifest.input)
    body, headers = binary({"name": "input", "datatype": "FP32", "shape": list(batch.shape)}, batch.tobytes())
    logits = np.array(server.ask("POST", f"{FLOATS}/infer", body, headers).json["outputs"][0]["data"])
    got = server.ask("POST", f"{FLOATS}/classify?top=1", picture).json["predictions"][0]
    assert got["index"] == int(logits.argmax())


def test_a_fixed_batch_is_filled_for_one_picture(
    server: Server, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(200, 90))
    (want,) = predict(small_bundle(batch=2, image_size="70x101"), [tmp_path / "a.png"], top=2)
    reply = server.ask("POST", "/v2/models/pair/classify?top=2", png(200, 90))
    got = [(p["index"], round(p["probability"], 4)) for p in reply.json["predictions"]]
    assert got == [(g.index, round(g.probability, 4)) for g in want.answers]


def test_pages_are_whole_and_load_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/docs", "/page.js", "/docs.js", "/page.css"):
        reply = server.get(path)
        assert reply.code == 200
        assert b"http://" not in reply.body
        assert b"https://" not in reply.body
        assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_openapi_names_every_route_that_answers(server: Server) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        for method in methods:
            real = path.replace("{model}", "small").replace("{version}", "1")
            code = server.ask(method.upper(), real, b"" if method == "post" else None).code
            assert str(code) in methods[method]["responses"], (method, path, code)


def test_metrics_count_what_happened(server: Server) -> None:
    def counts() -> tuple[float, float, float]:
        return (
            server.metric("dualtoken_requests_total", route="infer", code="200"),
            server.metric("dualtoken_inference_seconds_count", model="small"),
            server.metric("dualtoken_requests_total", route="infer", code="404"),
        )

    before = counts()
    body, headers = binary()
    for _ in range(3):
        assert server.ask("POST", f"{SMALL}/infer", body, headers).code == 200
    assert server.ask("POST", "/v2/models/none/infer", body, headers).code == 404
    assert tuple(b - a for a, b in zip(before, counts(), strict=True)) == (3, 3, 1)
    for name in ("queue_depth", "workers_up", "ready"):
        assert f"dualtoken_{name}" in server.get("/metrics").body.decode()
    assert server.metric("dualtoken_workers_up", model="small") == 1
    assert server.metric("dualtoken_queue_wait_seconds_count", model="small") > 0
    assert server.metric("dualtoken_batch_rows_count", model="small") > 0


def test_every_request_has_an_id_in_the_answer_and_the_log(server: Server) -> None:
    assert server.get("/v2", **{"X-Request-ID": "probe-17"}).headers["x-request-id"] == "probe-17"
    strange = server.get("/v2", **{"X-Request-ID": 'a"b\t{}'}).headers["x-request-id"]
    assert len(strange) == 32
    server.wait_for(lambda: strange in {row.get("request_id") for row in server.logs})  # written after the answer
    rows = {row.get("request_id"): row for row in server.logs}
    assert (rows["probe-17"]["route"], rows["probe-17"]["code"]) == ("server_metadata", 200)


def ask_json(data: Any, path: str = f"{SMALL}/infer", **headers: str) -> Callable[[Server], int]:
    return lambda server: server.post(path, data, **headers).code


def ask_binary(path: str = f"{SMALL}/infer", **arguments: Any) -> Callable[[Server], int]:
    body, headers = binary(**arguments)
    return lambda server: server.ask("POST", path, body, headers).code


def ask_open(rows: int) -> Callable[[Server], int]:
    """One row's bytes for the bundle whose batch is open, whatever `rows` claims."""
    return ask_binary(f"{OPEN}/infer", inputs={"shape": [rows, SIDE, SIDE, 3]})


def ask_floats(value: float) -> Callable[[Server], int]:
    raw = np.full(BYTES, value, "<f4").tobytes()
    given = {"name": "input", "datatype": "FP32", "shape": [1, 3, SIDE, SIDE]}
    return ask_binary(f"{FLOATS}/infer", inputs=given, raw=raw)


def ask_picture(data: bytes, **headers: str) -> Callable[[Server], int]:
    return lambda server: server.ask("POST", f"{SMALL}/classify", data, headers).code


def ask_raw(data: bytes, seconds: float = 5, pause: float = 0) -> Callable[[Server], int]:
    return lambda server: int(([*server.raw(data, seconds, pause).split(b" ", 2), b"0", b"0"])[1] or 0)


def flood(chunked: bool) -> Callable[[Server], int]:
    """200 MB, sent until the server has answered: the answer must come long before the end."""

    def send(server: Server) -> int:
        size = 200 * 2**20
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        piece = bytes(2**16)
        if chunked:
            piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        with socket.create_connection((server.host, server.port), timeout=10) as link:
            link.sendall(b"POST %s/infer HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % (SMALL.encode(), kind))
            sent = 0
            try:
                while sent < size:
                    sent += link.send(piece)
            except ConnectionError:
                pass
            assert sent < size / 2, "the server read most of it"
            return int(link.recv(4096).split(b" ", 2)[1])

    return send


POST = f"POST {SMALL}/infer HTTP/1.1\r\nHost: localhost\r\n".encode()
DISPOSITION = b"Content-Disposition: form-data"
FORM = {"Content-Type": "multipart/form-data; boundary=xyz"}
MALFORMED: list[tuple[str, Callable[[Server], int], int]] = [
    ("unknown model", ask_json({}, "/v2/models/none/infer"), 404),
    ("unknown version", ask_json({}, f"{SMALL}/versions/9/infer"), 404),
    ("unknown version in the name", ask_json({}, "/v2/models/small:9/infer"), 404),
    ("unknown path", ask_json({}, "/v2/nothing"), 404),
    ("a path with dots", ask_json({}, "/v2/models/..%2f..%2fetc%2fpasswd/infer"), 404),
    ("a path with a null byte", ask_json({}, "/v2/models/small%00/infer"), 404),
    ("a path that is no utf-8", ask_json({}, "/v2/models/%ff%fe/infer"), 404),
    ("a long name", ask_json({}, f"/v2/models/{'x' * 5000}/infer"), 404),
    ("get for post", lambda s: s.get(f"{SMALL}/infer").code, 405),
    ("delete", lambda s: s.ask("DELETE", SMALL).code, 405),
    ("empty body", ask_json(b""), 400),
    ("no json", ask_json(b"hello"), 400),
    ("truncated json", ask_json(b'{"inputs": [{"name": "image", "sha'), 400),
    ("deep json", ask_json(b"[" * 50_000), 400),
    ("no utf-8", ask_json(b'{"id": "\xff\xfe"}'), 400),
    ("a list", ask_json([]), 400),
    ("no inputs", ask_json({}), 400),
    ("two inputs", ask_json({"inputs": [INPUT | {"data": [0] * BYTES}] * 2}), 400),
    ("wrong name", ask_binary(inputs={"name": "picture"}), 400),
    ("wrong datatype", ask_binary(inputs={"datatype": "FP32"}), 400),
    ("wrong rank", ask_binary(inputs={"shape": [BYTES]}), 400),
    ("wrong side", ask_binary(inputs={"shape": [1, SIDE, SIDE + 1, 3]}), 400),
    ("layout", ask_binary(inputs={"shape": [1, 3, SIDE, SIDE]}), 400),
    ("huge shape", ask_binary(inputs={"shape": [2**40, 2**40, 2**40, 3]}), 400),
    ("huge batch", ask_open(rows=2**31), 400),
    ("batch above the limit", ask_open(rows=5), 400),
    ("negative shape", ask_binary(inputs={"shape": [-1, SIDE, SIDE, 3]}), 400),
    ("shape of texts", ask_binary(inputs={"shape": ["1", "64", "64", "3"]}), 400),
    ("bytes missing", ask_binary(raw=bytes(BYTES - 1)), 400),
    ("bytes too many", ask_binary(raw=bytes(BYTES + 1)), 400),
    ("size and bytes differ", ask_binary(inputs={"parameters": {"binary_data_size": 5}}), 400),
    ("header length beyond the body", ask_binary(header=10**9), 400),
    ("header length zero", ask_binary(header=0), 400),
    ("header length is text", ask_json({}, **{"Inference-Header-Content-Length": "ten"}), 400),
    ("header length is negative", ask_json({}, **{"Inference-Header-Content-Length": "-5"}), 400),
    ("binary size without header", ask_json({"inputs": [INPUT | {"parameters": {"binary_data_size": 5}}]}), 400),
    ("too few values", ask_json({"inputs": [INPUT | {"data": [1, 2]}]}), 400),
    ("values are text", ask_json({"inputs": [INPUT | {"data": ["a"] * BYTES}]}), 400),
    ("one long text", ask_json({"inputs": [INPUT | {"data": ["a" * 200_000, *[0] * (BYTES - 1)]}]}), 400),
    ("values beyond uint8", ask_json({"inputs": [INPUT | {"data": [300] * BYTES}]}), 400),
    ("ragged values", ask_json({"inputs": [INPUT | {"data": [[1], [1, 2]]}]}), 400),
    ("NaN", ask_floats(np.nan), 400),
    ("infinity", ask_floats(-np.inf), 400),
    ("unknown output", ask_binary(outputs=[{"name": "boxes"}]), 400),
    ("shared memory", ask_binary(inputs={"parameters": {"shared_memory_region": "r"}}), 400),
    ("compressed body", ask_json(zlib.compress(bytes(10**7)), **{"Content-Encoding": "deflate"}), 415),
    ("a body above its limit", ask_json(b" " * (2 * 2**20)), 413),
    ("200 MB with Content-Length", flood(chunked=False), 413),
    ("200 MB in chunks", flood(chunked=True), 413),
    ("200 MB claimed and never sent", ask_raw(POST + b"Content-Length: 209715200\r\n\r\n"), 413),
    ("a body that stops", ask_raw(POST + b"Content-Length: 100\r\n\r\n{"), 408),
    ("chunks that stop", ask_raw(POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"in"), 408),
    ("a header that stops", ask_raw(POST + b"X-Slow: "), 408),
    ("a header without end", ask_raw(POST + b"X-Long: " + b"a" * 200_000), 431),
    ("no http", ask_raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400),
    ("a bad chunk", ask_raw(POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"), 400),
    ("two lengths", ask_raw(POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"), 400),
    ("length and chunks", ask_raw(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 400),
    ("a negative length", ask_raw(POST + b"Content-Length: -5\r\n\r\n"), 400),
    ("no picture", ask_picture(b"hello"), 400),
    ("an empty picture", ask_picture(b""), 400),
    ("a script", ask_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 400),
    ("a truncated picture", ask_picture(png(50, 50)[:60]), 400),
    ("a bomb", ask_picture(png(8, 8, claim=(60_000, 60_000))), 400),
    ("above the pixels allowed", ask_picture(png(1100, 1000)), 400),
    ("above the bytes allowed", ask_picture(bytes(2**20 + 1)), 413),
    ("top is text", lambda s: s.ask("POST", f"{SMALL}/classify?top=many", png(9, 9)).code, 400),
    ("top is zero", lambda s: s.ask("POST", f"{SMALL}/classify?top=0", png(9, 9)).code, 400),
    ("top is huge", lambda s: s.ask("POST", f"{SMALL}/classify?top=99999", png(9, 9)).code, 400),
    ("a form without boundary", ask_picture(b"x", **{"Content-Type": "multipart/form-data"}), 400),
    ("a form without file", ask_picture(b"--xyz\r\n%s; name=a\r\n\r\nb\r\n--xyz--\r\n" % DISPOSITION, **FORM), 400),
    ("a form that is none", ask_picture(b"hello", **FORM), 400),
    ("a form of many parts", ask_picture(b"--xyz\r\n\r\nb\r\n" * 50 + b"--xyz--\r\n", **FORM), 400),
    ("a form cut off", ask_picture(b"--xyz\r\n%s; filename=a\r\n\r\nab" % DISPOSITION, **FORM), 400),
    ("control without --admin", ask_json({}, "/v2/repository/index"), 403),
    ("load without --admin", ask_json({}, "/v2/repository/models/small/load"), 403),
]  # fmt: skip


@pytest.mark.parametrize(("send", "code"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_malformed(server: Server, send: Callable[[Server], int], code: int) -> None:
    assert send(server) == code
    body, headers = binary()
    assert server.ask("POST", f"{SMALL}/infer", body, headers).code == 200, "the next good request"


def test_the_malformed_set_takes_no_memory_and_kills_nobody(small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """On a fresh server: the peak of its process, and of its worker, against what it had when idle and warm."""
    bundles = names(small_bundle)
    limits = ("--body-seconds", "0.3", "--header-seconds", "0.3", "--max-megapixels", "1", "--max-image-mib", "1")
    with serving(tmp_path / "log", *bundles, *limits, "--max-batch", "4") as running:
        body, headers = binary()
        assert running.ask("POST", f"{SMALL}/infer", body, headers).code == 200
        assert running.ask("POST", f"{SMALL}/classify", png(50, 50)).code == 200
        workers = running.children
        idle = {pid: running.memory_kib(pid) for pid in (running.process.pid, *workers)}
        for name, send, code in MALFORMED:
            assert send(running) == code, name
        assert running.ask("POST", f"{SMALL}/infer", body, headers).code == 200
        assert running.children == workers, "a worker was replaced"
        for pid, before in idle.items():
            assert running.memory_kib(pid, "VmHWM") < 1.5 * before
        assert running.stop() == 0
        assert not [row for row in running.logs if row["event"] == "unexpected error"]


def test_a_refused_request_leaves_its_connection_in_use(server: Server) -> None:
    """503s and 400s under load must not cost the client a new connection each."""
    body, headers = binary(inputs={"name": "picture"})
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    request = (
        f"POST {SMALL}/infer HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )
    with socket.create_connection((server.host, server.port), timeout=5) as link:
        for _ in range(3):
            link.sendall(request)
            assert read_reply(link).startswith(b"HTTP/1.1 400")


def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=5) as link:
        start = time.monotonic()
        assert link.recv(1) == b""
        assert time.monotonic() - start < 4


def test_an_answer_does_not_wait_for_an_acknowledgement(server: Server) -> None:
    """Headers and body are two packets: with Nagle's algorithm the second waits for a delayed ACK, 40 ms on Linux."""
    body, headers = binary()
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    request = (
        f"POST {SMALL}/infer HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )
    took = []
    with socket.create_connection((server.host, server.port), timeout=10) as link:
        for _ in range(40):  # one connection: the kernel acknowledges the first packets of a new one at once
            start = time.perf_counter()
            link.sendall(request)
            assert read_reply(link).startswith(b"HTTP/1.1 200")
            took.append(time.perf_counter() - start)
    runs = [row["run_ms"] / 1000 for row in server.logs if "run_ms" in row][-40:]
    assert min(took[20:]) - min(runs) < 0.03
