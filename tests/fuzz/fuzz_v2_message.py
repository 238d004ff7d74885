"""A V2 request as a protobuf message: its outline and its contents."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.messages import FIELDS, MAX_FIELDS, outline, read
from dualtoken_deploy.serve.oip import open_inference_pb2 as pb
from dualtoken_deploy.serve.protocol import DATATYPES
from tests.fuzz.fuzz_v2_json import ROWS, SPECS
from tests.fuzz.inputs import edited


def good(index: int, typed: bool) -> bytes:
    spec = SPECS[index]
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    values = np.ones(shape, spec.dtype)
    message = pb.ModelInferRequest(model_name="m", model_version="1", id="7")
    tensor = message.inputs.add(name=spec.name, datatype=DATATYPES[spec.dtype], shape=shape)
    if typed:
        getattr(tensor.contents, FIELDS[DATATYPES[spec.dtype]]).extend(values.reshape(-1).tolist())
    else:
        message.raw_input_contents.append(values.tobytes())
    message.outputs.add(name="logits").parameters["classification"].int64_param = 3
    return message.SerializeToString()


SEEDS = [good(index, typed) for index in (0, 1) for typed in (False, True)]
CASES = edited(SEEDS, [b"\x2a\x00" * 70, b"\x22\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 11]) | st.binary(
    max_size=99
)


def check(data: bytes) -> None:
    try:
        found = outline(data)
    except BadRequest:
        return
    assert 0 <= found.structured_bytes <= len(data)
    assert data.count(b"\x2a\x00" * (2 * MAX_FIELDS)) == 0 or found.structured_bytes
    for spec in SPECS:
        try:
            request = read(data, spec, ROWS)
        except BadRequest:
            continue
        parsed = pb.ModelInferRequest.FromString(data)  # protobuf's own reading of what was outlined
        assert found.name == parsed.model_name or len(parsed.model_name) > 1024
        (array,) = request.inputs.values()
        assert array.dtype == np.dtype(spec.dtype)
