"""A V2 request with raw tensors behind its JSON; the input begins with the JSON's length, as the header says it."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.protocol import DATATYPES, parse_request
from tests.fuzz.fuzz_v2_json import ROWS, SPECS, TOKENS
from tests.fuzz.inputs import edited

PREFIX = 2


def good(index: int) -> bytes:
    spec = SPECS[index]
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    raw = np.ones(shape, spec.dtype).tobytes()
    given = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}
    text = json.dumps({"inputs": [given | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    return len(text).to_bytes(PREFIX, "big") + text + raw


CASES = edited([good(0), good(1)], [*TOKENS, b"\0\0\xc0\x7f", b"\0\0\x80\xff"]) | st.binary(max_size=200)


def check(data: bytes) -> None:
    for spec in SPECS:
        try:
            found = parse_request(data[PREFIX:], int.from_bytes(data[:PREFIX], "big"), spec, ROWS)
        except BadRequest:
            continue
        (array,) = found.inputs.values()
        assert array.dtype == np.dtype(spec.dtype)
        assert spec.dtype != "float32" or np.isfinite(array).all()
