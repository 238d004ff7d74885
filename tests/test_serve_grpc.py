"""The gRPC side: messages against a contract, and calls that no good client would make against a real server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.grpc import SERVICE
from dualtoken_deploy.serve.messages import FIELDS, parse
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from dualtoken_deploy.serve.protocol import DATATYPES
from dualtoken_deploy.spec import TensorSpec
from tests.serving import Server, serving

IMAGE = TensorSpec("image", "uint8", "NHWC", (1, 2, 2, 3))
FLOATS = TensorSpec("x", "float32", "NC", ("batch", 3))
ROWS = 4


def message(
    spec: TensorSpec = IMAGE, raw: list[bytes] | None = None, contents: dict[str, Any] | None = None, **changes: Any
) -> pb.ModelInferRequest:
    """A good message with raw contents, unless told otherwise."""
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    good = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape} | changes
    found = pb.ModelInferRequest(model_name="m")
    tensor = found.inputs.add(**good)
    if contents is not None:
        tensor.contents.CopyFrom(pb.InferTensorContents(**contents))
    if raw is None and contents is None:
        raw = [np.arange(np.prod(shape)).astype(spec.dtype).tobytes()]
    found.raw_input_contents.extend(raw or [])
    return found


@pytest.mark.parametrize("spec", [IMAGE, FLOATS], ids=["uint8", "float32"])
def test_raw_and_typed_contents_are_the_same_array(spec: TensorSpec) -> None:
    count = 12 if spec is IMAGE else 6
    raw = parse(message(spec), spec, ROWS).inputs[spec.name]
    field = FIELDS[DATATYPES[spec.dtype]]
    typed = parse(message(spec, contents={field: range(count)}), spec, ROWS).inputs[spec.name]
    assert raw.dtype == typed.dtype == np.dtype(spec.dtype)
    np.testing.assert_array_equal(raw, typed)
    np.testing.assert_array_equal(raw.reshape(-1), np.arange(count))


def two_inputs() -> pb.ModelInferRequest:
    found = message()
    found.inputs.add(name="image")
    return found


def with_parameter(name: str) -> pb.ModelInferRequest:
    found = message()
    found.inputs[0].parameters[name].string_param = "r"
    return found


REFUSED: list[tuple[str, TensorSpec, pb.ModelInferRequest, str]] = [
    ("nothing", IMAGE, pb.ModelInferRequest(), "0 inputs"),
    ("two inputs", IMAGE, two_inputs(), "2 inputs"),
    ("name", IMAGE, message(name="picture"), "unknown input"),
    ("datatype", IMAGE, message(datatype="FP32"), "takes UINT8"),
    ("rank", IMAGE, message(shape=[12]), "takes [1, 2, 2, 3]"),
    ("huge shape", IMAGE, message(shape=[2**62, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("negative shape", IMAGE, message(shape=[-1, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("batch", FLOATS, message(FLOATS, shape=[5, 3]), "takes [1..4, 3]"),
    ("no contents", IMAGE, message(raw=[], contents={}), "its values belong in uint_contents"),
    ("too few bytes", IMAGE, message(raw=[b"x" * 11]), "has 11 bytes"),
    ("too many bytes", IMAGE, message(raw=[b"x" * 13]), "has 13 bytes"),
    ("two raw", IMAGE, message(raw=[b"x" * 12] * 2), "one entry for each input"),
    ("raw and typed", IMAGE, message(raw=[b"x" * 12], contents={"uint_contents": [1]}), "which then has no contents"),
    ("another field", IMAGE, message(contents={"fp32_contents": [1] * 12}), "belong in uint_contents"),
    ("two fields", IMAGE, message(contents={"uint_contents": [1] * 12, "int_contents": [1]}), "in uint_contents"),
    ("too few values", IMAGE, message(contents={"uint_contents": [1] * 11}), "has 11 values"),
    ("above 255", IMAGE, message(contents={"uint_contents": [256] * 12}), "outside of UINT8"),
    ("NaN", FLOATS, message(FLOATS, raw=[np.full(6, np.nan, "<f4").tobytes()]), "not finite"),
    ("typed infinity", FLOATS, message(FLOATS, contents={"fp32_contents": [float("inf")] * 6}), "not finite"),
    ("shared memory", IMAGE, with_parameter("shared_memory_region"), "shared memory"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "request_", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(spec: TensorSpec, request_: pb.ModelInferRequest, text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(request_, spec, ROWS)
    assert text in str(caught.value)


@pytest.fixture(scope="module")
def server(small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve") / "log", f"m={small_bundle()}", "--body-seconds", "0.5") as running:
        yield running


def status(server: Server, call: Callable[[Any], Any]) -> grpc.StatusCode:
    with grpc.insecure_channel(server.grpc) as channel:
        try:
            call(channel)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def infer(data: bytes) -> Callable[[Any], Any]:
    return lambda channel: channel.unary_unary(f"/{SERVICE}/ModelInfer")(data, timeout=10)


def good(**changes: Any) -> bytes:
    picture = TensorSpec("image", "uint8", "NHWC", (1, 64, 64, 3))
    return message(picture, **changes).SerializeToString()


def never_sent(channel: Any) -> Any:
    def nothing() -> Iterator[bytes]:
        time.sleep(3)
        yield from ()

    return channel.stream_unary(f"/{SERVICE}/ModelInfer")(nothing(), timeout=10)


CALLS: list[tuple[str, Callable[[Any], Any], grpc.StatusCode]] = [
    ("good", infer(good()), grpc.StatusCode.OK),
    ("no message of ours", infer(b"\xff\xff\xff"), grpc.StatusCode.INVALID_ARGUMENT),
    ("an empty message", infer(b""), grpc.StatusCode.NOT_FOUND),
    ("a truncated message", infer(good()[:-5]), grpc.StatusCode.INVALID_ARGUMENT),
    ("wrong shape", infer(good(shape=[1, 2, 3])), grpc.StatusCode.INVALID_ARGUMENT),
    ("wrong bytes", infer(good(raw=[b"1234"])), grpc.StatusCode.INVALID_ARGUMENT),
    ("50 MB", infer(bytes(50 * 2**20)), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("a message that never comes", never_sent, grpc.StatusCode.DEADLINE_EXCEEDED),
    ("no such method", lambda c: c.unary_unary(f"/{SERVICE}/Nothing")(b"", timeout=5), grpc.StatusCode.UNIMPLEMENTED),
]  # fmt: skip


@pytest.mark.parametrize(("call", "code"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_calls(server: Server, call: Callable[[Any], Any], code: grpc.StatusCode) -> None:
    assert status(server, call) == code
    assert status(server, infer(good())) == grpc.StatusCode.OK, "the next good call"
    assert server.get("/v2/health/ready").code == 200


def test_calls_are_counted_and_logged_with_their_id(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        call(good(), timeout=10, metadata=(("x-request-id", "rpc-5"),))
    server.wait_for(lambda: any(row.get("request_id") == "rpc-5" for row in server.logs))
    row = next(row for row in server.logs if row.get("request_id") == "rpc-5")
    assert (row["protocol"], row["route"], row["code"], row["model"]) == ("grpc", "ModelInfer", "OK", "m:1")
    assert row["run_ms"] > 0
    assert server.metric("dualtoken_requests_total", protocol="grpc", route="ModelInfer", code="OK") >= 1
