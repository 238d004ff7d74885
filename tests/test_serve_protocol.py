"""The wire format alone: what is read, what is refused, what is written, held against struct, json and numpy."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtoken_deploy.serve import protocol
from dualtoken_deploy.serve.errors import BadRequest, ModelFailed
from dualtoken_deploy.serve.protocol import InferRequest, Wanted, encode_response, parse_request
from dualtoken_deploy.spec import TensorSpec

IMAGE = TensorSpec("image", "uint8", "NHWC", (1, 2, 2, 3))
FLOATS = TensorSpec("x", "float32", "NC", ("batch", 3))
ROWS = 4


def body(spec: TensorSpec = IMAGE, **changes: Any) -> dict[str, Any]:
    """A good request with JSON data, one input changed."""
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    count = int(np.prod(shape))
    good = {"name": spec.name, "datatype": protocol.datatype(spec), "shape": shape, "data": list(range(count))}
    return {"inputs": [{k: v for k, v in (good | changes).items() if v is not ...}]}


def wanting(**parameters: Any) -> dict[str, Any]:
    return {"outputs": [{"name": "a", "parameters": parameters}]}


def parse(data: Any, spec: TensorSpec = IMAGE, raw: bytes | None = None) -> InferRequest:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return parse_request(text + (raw or b""), len(text) if raw is not None else None, spec, ROWS)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("spec", [IMAGE, FLOATS], ids=["uint8", "float32"])
def test_json_data_flat_or_nested(spec: TensorSpec, nested: bool) -> None:
    data = body(spec)
    shape = data["inputs"][0]["shape"]
    want = np.arange(np.prod(shape)).reshape(shape)
    if nested:
        data["inputs"][0]["data"] = want.tolist()
    got = parse(data, spec).inputs[spec.name]
    assert (got.dtype, got.shape) == (np.dtype(spec.dtype), tuple(shape))
    np.testing.assert_array_equal(got, want)


def test_binary_data_is_little_endian_row_major() -> None:
    values = [1.5, -2.25, 3e-9, 4e9, 5.0, -0.0]
    raw = struct.pack("<6f", *values)
    request = parse(body(FLOATS, data=..., parameters={"binary_data_size": 24}), FLOATS, raw)
    np.testing.assert_array_equal(request.inputs["x"], np.array(values, np.float32).reshape(2, 3))
    assert request.rows == 2


@pytest.mark.parametrize("name", sorted(protocol.DATATYPES))
def test_every_datatype_arrives_as_it_was_sent(name: str) -> None:
    got: Any
    sent: dict[str, Any]
    spec = TensorSpec("x", name, "N", (3,))
    values = np.array([0, 1, 1], name)
    sent = {
        "name": "x",
        "datatype": protocol.DATATYPES[name],
        "shape": [3],
        "parameters": {"binary_data_size": values.nbytes},
    }
    got = parse({"inputs": [sent]}, spec, values.tobytes()).inputs["x"]
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)
    if name != "float16":
        plain = [bool(v) for v in values] if name == "bool" else values.tolist()
        got = parse(
            {"inputs": [{"name": "x", "datatype": protocol.DATATYPES[name], "shape": [3], "data": plain}]}, spec
        )
        np.testing.assert_array_equal(got.inputs["x"], values)


REFUSED: list[tuple[str, Any, str]] = [
    ("empty", b"", "bytes"),
    ("no json", b"what?", "not JSON"),
    ("truncated", b'{"inputs": [{"name": "im', "not JSON"),
    ("a list", [], "not a JSON object"),
    ("a number", 7, "not a JSON object"),
    ("deep", b"[" * 60_000, "not JSON"),
    ("deep and long", b"[" * 100_000, "more '[' than"),
    ("no utf-8", b'{"id": "\xff"}', "not JSON"),
    ("a NaN literal", b'{"inputs": [{"data": [NaN]}]}', "not JSON"),
    ("no inputs", {}, "list of objects"),
    ("inputs are text", {"inputs": "image"}, "list of objects"),
    ("an input is text", {"inputs": ["image"]}, "list of objects"),
    ("none", {"inputs": []}, "0 inputs"),
    ("two", {"inputs": body()["inputs"] * 2}, "2 inputs"),
    ("id is a number", body() | {"id": 7}, "id must be text"),
    ("id is long", body() | {"id": "x" * 257}, "id must be text"),
    ("parameters are text", body() | {"parameters": "x"}, "must be an object"),
    ("another name", body(name="picture"), "unknown input 'picture'"),
    ("no name", body(name=...), "unknown input None"),
    ("another datatype", body(datatype="FP32"), "takes UINT8"),
    ("an unknown datatype", body(datatype="FP128"), "takes UINT8"),
    ("datatype in small letters", body(datatype="uint8"), "takes UINT8"),
    ("no shape", body(shape=...), "has shape None"),
    ("shape is a number", body(shape=12), "has shape 12"),
    ("shape is text", body(shape="1223"), "has shape '1223'"),
    ("rank", body(shape=[12]), "has shape [12]"),
    ("a wrong side", body(shape=[1, 2, 3, 3]), "takes [1, 2, 2, 3]"),
    ("a wrong batch", body(shape=[2, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("negative", body(shape=[-1, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("a fraction", body(shape=[1.0, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("true for one", body(shape=[True, 2, 2, 3]), "takes [1, 2, 2, 3]"),
    ("huge", body(shape=[2**62, 2**62, 2**62, 2**62]), "takes [1, 2, 2, 3]"),
    ("huge and equal in product", body(shape=[1, 12, 1, 1]), "takes [1, 2, 2, 3]"),
    ("no data", body(data=...), "is not 12 values"),
    ("too few", body(data=[1, 2, 3]), "is not 12 values"),
    ("too many", body(data=[1] * 13), "is not 12 values"),
    ("text", body(data="aGVsbG8="), "is not 12 values"),
    ("texts", body(data=["1"] * 12), "not made of values of UINT8"),
    ("one long text", body(data=["x" * 10**6] + [1] * 11), "not made of values of UINT8"),
    ("nulls", body(data=[None] * 12), "not made of values of UINT8"),
    ("booleans", body(data=[True] * 12), "not made of values of UINT8"),
    ("fractions", body(data=[0.5] * 12), "not made of values of UINT8"),
    ("above 255", body(data=[256] + [0] * 11), "range of UINT8"),
    ("below 0", body(data=[-1] + [0] * 11), "range of UINT8"),
    ("ragged", body(data=[[[[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2, 3]]]]), "is not 12 values"),
    ("nested too deep", body(data=[[[[[1, 2, 3]] * 2] * 2]]), "is not 12 values"),
    ("outputs are text", body() | {"outputs": "logits"}, "outputs must be a list"),
    ("too many outputs", body() | {"outputs": [{"name": str(i)} for i in range(17)]}, "at most 16"),
    ("an output without a name", body() | {"outputs": [{}]}, "object with a name"),
    ("an output twice", body() | {"outputs": [{"name": "a"}, {"name": "a"}]}, "twice"),
    ("binary_data is text", body() | wanting(binary_data="yes"), "true or false"),
    ("classification is text", body() | wanting(classification="3"), "number of classes"),
    ("classification below 0", body() | wanting(classification=-3), "number of classes"),
    ("binary without header", body(data=..., parameters={"binary_data_size": 12}), "needs the header"),
    ("shared memory", body(parameters={"shared_memory_region": "r"}), "shared memory"),
    ("a sequence", body() | {"parameters": {"sequence_id": 1}}, "sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(data: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300, "a client's value fills our sentence"


@pytest.mark.parametrize(
    ("changes", "raw", "message"),
    [
        ({"data": ..., "parameters": {"binary_data_size": 12}}, b"x" * 11, "11 bytes follow"),
        ({"data": ..., "parameters": {"binary_data_size": 12}}, b"x" * 13, "13 bytes follow"),
        ({"data": ..., "parameters": {"binary_data_size": 11}}, b"x" * 11, "needs 12"),
        ({"data": ..., "parameters": {"binary_data_size": -1}}, b"x" * 12, "binary_data_size is -1"),
        ({"data": ..., "parameters": {"binary_data_size": "12"}}, b"x" * 12, "binary_data_size is '12'"),
        ({"data": ..., "parameters": {"binary_data_size": 2**70}}, b"x" * 12, "binary_data_size is 1.18"),
        ({"parameters": {"binary_data_size": 12}}, b"x" * 12, "both data and binary_data_size"),
        ({}, b"x" * 12, "no input says binary_data_size"),
    ],
)
def test_refused_binary(changes: dict[str, Any], raw: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(body(**changes), raw=raw)


@pytest.mark.parametrize("length", [0, -1, 10_000])
def test_a_header_length_outside_of_the_body(length: int) -> None:
    with pytest.raises(BadRequest, match="JSON header"):
        parse_request(json.dumps(body()).encode(), length, IMAGE, ROWS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite(value: float) -> None:
    raw = struct.pack("<6f", 1, 2, value, 4, 5, 6)
    with pytest.raises(BadRequest, match="not finite"):
        parse(body(FLOATS, data=..., parameters={"binary_data_size": 24}), FLOATS, raw)


def test_a_number_beyond_float32_is_not_finite_either() -> None:
    with pytest.raises(BadRequest, match="not finite"):
        parse(body(FLOATS, data=[1, 2, 3, 4, 5, 1e39]), FLOATS)


@pytest.mark.parametrize(("rows", "fits"), [(0, False), (1, True), (4, True), (5, False), (2**40, False)])
def test_an_open_batch_has_a_limit(rows: int, fits: bool) -> None:
    data = body(FLOATS, shape=[rows, 3], data=[0.5] * (3 * rows if rows < 10 else 3))
    if fits:
        assert parse(data, FLOATS).rows == rows
    else:
        with pytest.raises(BadRequest, match=r"takes \[1..4, 3\]"):
            parse(data, FLOATS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_but_bad_request_comes_of_a_damaged_request(data: st.DataObject) -> None:
    request = body() | {"id": "7", "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    place = data.draw(st.sampled_from(["inputs", "id", "outputs", "parameters", "name", "datatype", "shape", "data"]))
    target = request if place in request or place == "parameters" else request["inputs"][0]
    target[place] = data.draw(JSON)
    text = json.dumps(request).encode()
    cut = data.draw(st.integers(0, len(text)) | st.just(len(text)))
    header = data.draw(st.none() | st.integers(-2, len(text) + 2))
    with suppress(BadRequest):
        parse_request(text[:cut], header, IMAGE, ROWS)


LOGITS = np.array([[0.1, -3.25, 7.5]], np.float32)


def request_of(outputs: tuple[Wanted, ...] | None = None, binary: bool = False, id_: str = "") -> InferRequest:
    return InferRequest(id_, {"image": np.zeros(1)}, outputs, binary)


def test_json_answer_reads_back_exactly() -> None:
    text, length = encode_response({"logits": LOGITS}, request_of(id_="a"), "m", "3")
    assert length is None
    data = json.loads(text)
    (output,) = data.pop("outputs")
    assert data == {"model_name": "m", "model_version": "3", "id": "a"}
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [1, 3])
    np.testing.assert_array_equal(np.array(output["data"], np.float32), LOGITS[0])


@pytest.mark.parametrize("request_", [request_of(binary=True), request_of((Wanted("logits", True),))])
def test_binary_answer(request_: InferRequest) -> None:
    content, length = encode_response({"logits": LOGITS}, request_, "m", "1")
    assert length is not None
    (output,) = json.loads(content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 12}
    assert "data" not in output
    assert struct.unpack("<3f", content[length:]) == tuple(float(v) for v in LOGITS[0])


def test_classification_names_the_largest() -> None:
    wanted = request_of((Wanted("logits", False, classes=2),))
    (output,) = json.loads(encode_response({"logits": LOGITS}, wanted, "m", "1", ["a", "b", "c"])[0])["outputs"]
    assert output == {"name": "logits", "datatype": "BYTES", "shape": [1, 2], "data": ["7.500000:2:c", "0.100000:0:a"]}
    wanted = request_of((Wanted("logits", True, classes=1),))
    content, length = encode_response({"logits": LOGITS}, wanted, "m", "1", ["a", "b", "c"])
    assert length is not None
    assert content[length:] == struct.pack("<I", 12) + b"7.500000:2:c"


def test_an_answer_that_is_not_finite_is_no_json() -> None:
    bad = np.array([[np.nan]], np.float32)
    with pytest.raises(ModelFailed, match="not finite"):
        encode_response({"logits": bad}, request_of(), "m", "1")


def test_an_unknown_output() -> None:
    with pytest.raises(BadRequest, match="this model has logits"):
        encode_response({"logits": LOGITS}, request_of((Wanted("boxes", False),)), "m", "1")


def test_the_largest_json_fits_its_limit() -> None:
    """float32 values as the longest text that a client may print them with: float64, exponent and all."""
    widest = np.full(6, -np.nextafter(np.float64(1.2345678901234567e-30), 1)).tolist()
    text = json.dumps(body(FLOATS, data=widest)).encode()
    assert len(text) <= protocol.body_limit(FLOATS, 2)
    assert max(len(json.dumps(v)) + 2 for v in widest) <= protocol.JSON_BYTES_AN_ELEMENT
