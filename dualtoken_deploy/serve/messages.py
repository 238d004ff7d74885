"""ModelInferRequest on the wire: outlined before it is parsed, parsed against the contract. No grpc in here.

A message of empty inputs costs its reader fifty times its bytes. So the outer fields are walked first, where a hostile
message ends at the first field too many; only what is short is then parsed on the event loop.
Source: protobuf.dev/programming-guides/encoding; serve/oip/open_inference.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from google.protobuf.message import DecodeError

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import protocol
from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from dualtoken_deploy.spec import TensorSpec

FIELDS: Mapping[str, str] = MappingProxyType(  # where the typed contents of a datatype lie, by the proto's comments
    {
        "BOOL": "bool_contents",
        "INT8": "int_contents",
        "INT16": "int_contents",
        "INT32": "int_contents",
        "INT64": "int64_contents",
        "UINT8": "uint_contents",
        "UINT16": "uint_contents",
        "UINT32": "uint_contents",
        "UINT64": "uint64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
    }
)
MODEL_NAME, MODEL_VERSION, RAW_INPUT_CONTENTS = 1, 2, 7  # field numbers of ModelInferRequest
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
MAX_FIELDS = 64  # of the message itself; maps and lists count once for each entry
MAX_VARINT_BYTES = 10
LONG_TEXT = 1024  # of a model's name or version, beyond which nothing is called that


@dataclass(frozen=True)
class Outline:
    """Which model is asked for, and how many bytes there are to parse beside raw tensors."""

    name: str
    version: str
    structured_bytes: int


def outline(raw: bytes) -> Outline:
    """Walks the outer fields of a message. Raises BadRequest where it is none, or has more than MAX_FIELDS."""
    texts = {MODEL_NAME: "", MODEL_VERSION: ""}
    at, fields, tensors = 0, 0, 0
    while at < len(raw):
        fields += 1
        if fields > MAX_FIELDS:
            raise BadRequest(f"the message has more than {MAX_FIELDS} fields; a model takes one input")
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == LENGTH:
            length, at = _varint(raw, at)
        elif wire == VARINT:
            length, at = 0, _varint(raw, at)[1]
        else:
            length = {FIXED64: 8, FIXED32: 4}.get(wire, len(raw))
        if length > len(raw) - at:
            raise BadRequest("the message is no ModelInferRequest, or is cut off")
        if wire == LENGTH and number in texts and length <= LONG_TEXT:
            texts[number] = raw[at : at + length].decode("utf-8", "replace")
        tensors += length if number == RAW_INPUT_CONTENTS else 0
        at += length
    return Outline(texts[MODEL_NAME], texts[MODEL_VERSION], len(raw) - tensors)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(MAX_VARINT_BYTES):
        if at + index >= len(raw):
            break
        byte = raw[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise BadRequest("the message is no ModelInferRequest, or is cut off")


def message_limit(spec: TensorSpec, rows: int) -> int:
    """Bytes of the largest message of a contract: raw, or packed typed values, as every proto3 library writes them."""
    dtype = np.dtype(spec.dtype)
    bits = 8 * dtype.itemsize
    typed = MAX_VARINT_BYTES if dtype.kind == "i" else -(-bits // 7) if dtype.kind == "u" else dtype.itemsize
    return protocol.JSON_ENVELOPE + max(typed, dtype.itemsize) * protocol.elements(spec, rows)


def read(raw: bytes, spec: TensorSpec, rows: int) -> protocol.InferRequest:
    """A message against the contract. Raises BadRequest."""
    try:
        request = pb.ModelInferRequest.FromString(raw)
    except DecodeError as error:
        raise BadRequest("the message is no ModelInferRequest") from error
    return parse(request, spec, rows)


def parse(request: pb.ModelInferRequest, spec: TensorSpec, rows: int) -> protocol.InferRequest:
    """A message against the contract. Raises BadRequest."""
    if len(request.inputs) != 1:
        raise BadRequest(f"{len(request.inputs)} inputs were given; this model takes one, {spec.name!r}")
    (tensor,) = request.inputs
    for parameters in (request.parameters, tensor.parameters, *(output.parameters for output in request.outputs)):
        if {"shared_memory_region", "sequence_id"} & set(parameters):
            raise BadRequest("shared memory and sequences are not part of this server")
    shape = protocol.check_tensor(tensor.name, tensor.datatype, list(tensor.shape), spec, rows)
    if request.raw_input_contents:
        if len(request.raw_input_contents) != 1 or tensor.HasField("contents"):
            raise BadRequest("raw_input_contents must have one entry for each input, which then has no contents")
        array = protocol.from_bytes(request.raw_input_contents[0], shape, spec)
    else:
        array = _typed(tensor.contents, shape, spec)
    if len(request.outputs) > protocol.MAX_ITEMS:
        raise BadRequest(f"outputs must be a list of at most {protocol.MAX_ITEMS}")
    wanted = tuple(
        protocol.Wanted(o.name, True, protocol.class_count(o.parameters["classification"].int64_param))
        if "classification" in o.parameters
        else protocol.Wanted(o.name, True)
        for o in request.outputs
    )
    return protocol.InferRequest(protocol.check_id(request.id), {spec.name: array}, wanted or None, True)


def _typed(contents: pb.InferTensorContents, shape: tuple[int, ...], spec: TensorSpec) -> Array:
    """The typed field of the contract's datatype, which has to be the only one in use."""
    kind = protocol.datatype(spec)
    used = [field.name for field, _ in contents.ListFields()]
    if kind not in FIELDS or used != [FIELDS[kind]]:
        field = FIELDS.get(kind, "raw_input_contents")
        raise BadRequest(f"input {spec.name!r} is {kind}: its values belong in {field} or raw_input_contents")
    values = np.array(getattr(contents, FIELDS[kind]))
    if values.size != np.prod(shape, dtype=np.int64):
        raise BadRequest(f"input {spec.name!r} has {values.size} values; {list(shape)} needs {np.prod(shape)}")
    target = np.dtype(spec.dtype)
    if target.kind in "iu" and not np.iinfo(target).min <= values.min() <= values.max() <= np.iinfo(target).max:
        raise BadRequest(f"input {spec.name!r} has values outside of {kind}")
    return protocol.check_finite(values.astype(target).reshape(shape), spec)
