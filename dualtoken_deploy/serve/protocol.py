"""The Open Inference Protocol (V2) on the wire: parse, hold against the contract, encode. No transport, no model.

A body is JSON alone, or, in the binary tensor extension, JSON of `header_length` bytes and then the raw little-endian
tensors in the order of the inputs that give `binary_data_size`. Nothing is allocated for a tensor before its declared
shape was held against the contract.
Source: open-inference-protocol, specification/protocol/inference_rest.md; Triton's extension_binary_data.md.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from dualtoken_deploy.serve.errors import BadRequest, ModelFailed
from dualtoken_deploy.spec import TensorSpec

Array = NDArray[Any]

DATATYPES: Mapping[str, str] = MappingProxyType(  # numpy's name -> the protocol's
    {
        "bool": "BOOL",
        "uint8": "UINT8",
        "uint16": "UINT16",
        "uint32": "UINT32",
        "uint64": "UINT64",
        "int8": "INT8",
        "int16": "INT16",
        "int32": "INT32",
        "int64": "INT64",
        "float16": "FP16",
        "float32": "FP32",
        "float64": "FP64",
    }
)
MAX_ID = 256  # characters of a request's id
MAX_ITEMS = 16  # inputs or outputs that a request may list
JSON_BYTES_AN_ELEMENT = 26  # "-1.2345678901234567e-308, " is the longest that a float64 prints as
JSON_ENVELOPE = 64 * 1024  # names, shapes, parameters
MAX_SIGNS = 4096  # of each kind of bracket, comma or quote beside the values


SHORT = reprlib.Repr()  # does not follow what is nested a thousand deep
SHORT.maxlevel, SHORT.maxlist, SHORT.maxstring, SHORT.maxother = 3, 8, 60, 60


@dataclass(frozen=True)
class Wanted:
    """An output that the client asked for, and whether as raw bytes. `classes` > 0: as that many classes."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request that fits the contract: one array for each input; `outputs` None: all of them."""

    id: str
    inputs: Mapping[str, Array]
    outputs: tuple[Wanted, ...] | None
    binary_default: bool = False

    @property
    def rows(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])


def datatype(spec: TensorSpec) -> str:
    """The protocol's name of a spec's dtype. Raises KeyError for one that the protocol lacks."""
    return DATATYPES[spec.dtype]


def metadata_shape(spec: TensorSpec) -> list[int]:
    """The shape as metadata prints it: -1 for what varies."""
    return [d if isinstance(d, int) else -1 for d in spec.shape]


def body_limit(spec: TensorSpec, rows: int) -> int:
    """Bytes that the largest request of the contract can need, as JSON."""
    return JSON_ENVELOPE + JSON_BYTES_AN_ELEMENT * elements(spec, rows)


def binary_limit(spec: TensorSpec, rows: int) -> int:
    """Bytes of the largest request of the contract in the binary extension."""
    return JSON_ENVELOPE + elements(spec, rows) * np.dtype(spec.dtype).itemsize


def elements(spec: TensorSpec, rows: int) -> int:
    """Elements of a batch of `rows`. A dynamic dimension other than the first has no bound and is refused."""
    if not all(isinstance(d, int) for d in spec.shape[1:]):
        raise BadRequest(f"input {spec.name} has an open dimension {spec.shape}; only the batch may be open")
    return rows * math.prod(int(d) for d in spec.shape[1:])


def parse_request(body: bytes | memoryview, header_length: int | None, spec: TensorSpec, rows: int) -> InferRequest:
    """A request body against the contract: `spec` is the one input, `rows` the most that its batch may have.

    `header_length`: of the JSON part where raw tensors follow, None where the body is JSON alone.
    Raises BadRequest with one sentence for anything that does not fit.
    """
    view = memoryview(body)
    size = len(view) if header_length is None else header_length
    if not 0 < size <= len(view):
        raise BadRequest(f"the JSON header is said to have {size} bytes of a body of {len(view)}")
    _check_counts(body, size, spec, rows)
    data = _json(view[:size])
    raw = None if header_length is None else view[size:]
    parameters = _parameters(data, "the request")
    inputs = _inputs(data.get("inputs"), raw, spec, rows)
    return InferRequest(
        id=check_id(data.get("id", "")),
        inputs=inputs,
        outputs=_wanted(data.get("outputs"), _flag(parameters, "binary_data_output")),
        binary_default=_flag(parameters, "binary_data_output"),
    )


def _check_counts(body: bytes | memoryview, size: int, spec: TensorSpec, rows: int) -> None:
    """Before anything is parsed: brackets and commas cost their reader up to a hundred times their bytes."""
    if size <= JSON_ENVELOPE:
        return
    text = bytes(body) if isinstance(body, memoryview) else body
    values, lists = elements(spec, rows), 1
    for length in (rows, *spec.shape[1:-1]):
        lists = lists * int(length) + 1
    for sign, most in ((b"[", lists), (b"{", 0), (b",", values), (b'"', 0)):
        if text.count(sign, 0, size) > most + MAX_SIGNS:
            raise BadRequest(f"the JSON has more {sign.decode()!r} than this model's largest request can need")


def check_id(value: Any) -> str:
    """A request's id: text of at most MAX_ID characters."""
    if not isinstance(value, str) or len(value) > MAX_ID:
        raise BadRequest(f"id must be text of at most {MAX_ID} characters")
    return value


def check_tensor(name: Any, kind: Any, shape: Any, spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The declared shape, once name, datatype and every dimension fit. Raises BadRequest; allocates nothing."""
    if name != spec.name:
        raise BadRequest(f"unknown input {_short(name)}; this model has {spec.name!r}")
    expected = datatype(spec)
    if kind != expected:
        raise BadRequest(f"input {spec.name!r} has datatype {_short(kind)}; this model takes {expected}")
    if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)) or len(shape) != len(spec.shape):
        raise BadRequest(f"input {spec.name!r} has shape {_short(shape)}; this model takes {_expected(spec, rows)}")
    for given, want in zip(shape, spec.shape, strict=True):
        fits = type(given) is int and (given == want if isinstance(want, int) else 1 <= given <= rows)
        if not fits:
            text = _short(list(shape))
            raise BadRequest(f"input {spec.name!r} has shape {text}; this model takes {_expected(spec, rows)}")
    return tuple(shape)


def from_bytes(raw: bytes | memoryview, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    """Raw little-endian row-major bytes as an array of a checked shape (no copy). Raises BadRequest."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    need = math.prod(shape) * dtype.itemsize
    if len(raw) != need:
        raise BadRequest(f"input {spec.name!r} has {len(raw)} bytes; {list(shape)} of {datatype(spec)} needs {need}")
    return check_finite(np.frombuffer(raw, dtype).reshape(shape), spec)


def from_values(values: Any, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    """Numbers, flat or nested as the shape says, as an array of a checked shape. Raises BadRequest."""
    if spec.dtype == "float16":
        raise BadRequest(f"input {spec.name!r} is FP16, which has no JSON form; send it as binary data")
    flat = _flatten(values, shape, spec)
    target = np.dtype(spec.dtype)
    kinds: dict[str, set[type]] = {"b": {bool}, "f": {int, float}, "i": {int}, "u": {int}}
    if (
        not set(map(type, flat)) <= kinds[target.kind]
    ):  # before numpy: one long text among them would cost its length each
        raise BadRequest(f"data of input {spec.name!r} is not made of values of {datatype(spec)}")
    if target.kind in "iu":
        limits = np.iinfo(target)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise BadRequest(f"data of input {spec.name!r} leaves the range of {datatype(spec)}")
    with np.errstate(over="ignore"):
        return check_finite(np.array(flat, target).reshape(shape), spec)


def _flatten(values: Any, shape: tuple[int, ...], spec: TensorSpec) -> list[Any]:
    """The values of a list that is flat, or nested as the shape says."""
    need = math.prod(shape)
    if isinstance(values, list) and len(values) == need and not isinstance(values[0], list):
        return values
    flat = [values]
    for length in shape:
        if not all(isinstance(part, list) and len(part) == length for part in flat):
            raise BadRequest(f"data of input {spec.name!r} is not {need} values, flat or nested as {list(shape)}")
        flat = list(chain.from_iterable(flat))
    return flat


def check_finite(array: Array, spec: TensorSpec) -> Array:
    """The array, if it has no NaN and no infinity. Raises BadRequest."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"input {spec.name!r} has values that are not finite")
    return array


def encode_response(
    outputs: Mapping[str, Array], request: InferRequest, model: str, version: str, labels: Sequence[str] = ()
) -> tuple[bytes, int | None]:
    """The response body and, where raw tensors follow the JSON, that JSON's length.

    `outputs`: the model's, in its order. Raises BadRequest for an output that it lacks, ModelFailed where a value that
    is not finite would have to be JSON.
    """
    wanted = request.outputs or tuple(Wanted(name, request.binary_default) for name in outputs)
    rows: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for want in wanted:
        if want.name not in outputs:
            raise BadRequest(f"unknown output {_short(want.name)}; this model has {', '.join(outputs)}")
        array = outputs[want.name]
        if want.classes:
            rows.append(_encode_classes(want, array, labels, blobs))
            continue
        row: dict[str, Any] = {"name": want.name, "datatype": DATATYPES[str(array.dtype)], "shape": list(array.shape)}
        if want.binary or array.dtype == np.float16:
            blobs.append(to_bytes(array))
            row["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ModelFailed(f"output {want.name!r} has values that are not finite, which JSON cannot say")
            row["data"] = np.ascontiguousarray(array).reshape(-1)
        rows.append(row)
    document = {"model_name": model, "model_version": version, "outputs": rows} | (
        {"id": request.id} if request.id else {}
    )
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (text, None) if not blobs else (b"".join([text, *blobs]), len(text))


def to_bytes(array: Array) -> bytes:
    """Row-major little-endian bytes."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def classes(array: Array, want: Wanted, labels: Sequence[str]) -> list[list[str]]:
    """Triton's classification extension: "value:index:label" of the largest values of each row, the largest first."""
    if array.ndim != 2:
        raise BadRequest(f"output {want.name!r} of shape {list(array.shape)} is no row of classes")
    found = []
    for row in array:
        best = np.argsort(-row, kind="stable")[: want.classes]
        found.append([f"{row[i]:f}:{i}" + (f":{labels[i]}" if i < len(labels) else "") for i in best])
    return found


def classes_as_bytes(array: Array, want: Wanted, labels: Sequence[str]) -> tuple[list[int], bytes]:
    """The same as a BYTES tensor: its shape, and each text behind its length (4 bytes, little-endian)."""
    found = classes(array, want, labels)
    flat = [text.encode() for texts in found for text in texts]
    return [len(found), len(found[0])], b"".join(len(text).to_bytes(4, "little") + text for text in flat)


def _encode_classes(want: Wanted, array: Array, labels: Sequence[str], blobs: list[bytes]) -> dict[str, Any]:
    if want.binary:
        shape, raw = classes_as_bytes(array, want, labels)
        blobs.append(raw)
        return {"name": want.name, "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    found = classes(array, want, labels)
    flat = [text for texts in found for text in texts]
    return {"name": want.name, "datatype": "BYTES", "shape": [len(found), len(found[0])], "data": flat}


def _json(text: memoryview) -> dict[str, Any]:
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the request is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadRequest("the request is not a JSON object")
    return data


def _inputs(given: Any, raw: memoryview | None, spec: TensorSpec, rows: int) -> dict[str, Array]:
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise BadRequest("inputs must be a list of objects")
    if len(given) != 1:
        raise BadRequest(f"{len(given)} inputs were given; this model takes one, {spec.name!r}")
    (item,) = given
    shape = check_tensor(item.get("name"), item.get("datatype"), item.get("shape"), spec, rows)
    size = _parameters(item, f"input {spec.name!r}").get("binary_data_size")
    if size is None:
        if raw is not None and len(raw):
            raise BadRequest(f"{len(raw)} bytes follow the JSON and no input says binary_data_size")
        return {spec.name: from_values(item.get("data"), shape, spec)}
    if "data" in item:
        raise BadRequest(f"input {spec.name!r} has both data and binary_data_size")
    if raw is None:
        raise BadRequest("binary_data_size needs the header Inference-Header-Content-Length")
    if type(size) is not int or size != len(raw):
        raise BadRequest(f"binary_data_size is {_short(size)} and {len(raw)} bytes follow the JSON")
    return {spec.name: from_bytes(raw, shape, spec)}


def _wanted(given: Any, binary_default: bool) -> tuple[Wanted, ...] | None:
    if given is None or given == []:
        return None
    if not isinstance(given, list) or len(given) > MAX_ITEMS:
        raise BadRequest(f"outputs must be a list of at most {MAX_ITEMS}")
    wanted = []
    for item in given:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise BadRequest("each output must be an object with a name")
        parameters = _parameters(item, f"output {_short(item['name'])}")
        binary = _flag(parameters, "binary_data") if "binary_data" in parameters else binary_default
        wanted.append(Wanted(item["name"], binary, class_count(parameters.get("classification", 0))))
    if len({want.name for want in wanted}) != len(wanted):
        raise BadRequest("an output is asked for twice")
    return tuple(wanted)


def class_count(value: Any) -> int:
    """The parameter `classification` of an output: how many classes, 0 for the output as it is."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise BadRequest(f"classification must be a number of classes, not {_short(value)}")
    return value


def _parameters(item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"parameters of {where} must be an object")
    if {"shared_memory_region", "sequence_id"} & parameters.keys():
        raise BadRequest(f"{where} asks for shared memory or a sequence, which this server does not have")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"parameter {name} must be true or false, not {_short(value)}")
    return value


def _expected(spec: TensorSpec, rows: int) -> str:
    dims = [str(d) if isinstance(d, int) else f"1..{rows}" for d in spec.shape]
    return f"[{', '.join(dims)}]"


def _short(value: Any) -> str:
    """A client's value inside our sentence: bounded in length and depth."""
    text = SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
