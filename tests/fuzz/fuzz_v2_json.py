"""A V2 request as JSON."""

from __future__ import annotations

import json
import time

import numpy as np
from hypothesis import strategies as st

from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.protocol import DATATYPES, parse_request
from dualtoken_deploy.spec import TensorSpec
from tests.fuzz.inputs import edited

SPECS = (TensorSpec("image", "uint8", "NHWC", (1, 2, 2, 3)), TensorSpec("x", "float32", "NC", ("batch", 3)))
ROWS = 4
SECONDS = 2.0  # of the processor, on inputs of some kilobytes


def good(spec: TensorSpec) -> bytes:
    shape = [d if isinstance(d, int) else 2 for d in spec.shape]
    values = np.arange(np.prod(shape)).reshape(shape)
    given = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape, "data": values.tolist()}
    outputs = [{"name": "logits", "parameters": {"classification": 3, "binary_data": True}}]
    return json.dumps({"id": "7", "inputs": [given], "outputs": outputs, "parameters": {}}).encode()


KEYS = st.sampled_from(["inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "id", "classification"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5))
TOKENS = [b"[" * 500, b"{}", b"[],", b"1e999", b"-0", b"null", b'"\\ud800"', b"9" * 400, b'{"parameters":5}', b"\xff"]
CASES = edited([good(spec) for spec in SPECS], TOKENS) | VALUES.map(lambda value: json.dumps(value).encode())


def check(data: bytes) -> None:
    for spec in SPECS:
        start = time.process_time()
        try:
            found = parse_request(data, None, spec, ROWS)
        except BadRequest as error:
            text = str(error)
        else:
            text = ""
            (array,) = found.inputs.values()
            assert array.dtype == np.dtype(spec.dtype)
            assert 1 <= len(array) <= ROWS
            assert array.ndim == len(spec.shape)
        assert len(text) < 400, "a client's value is inside of the sentence, unbounded"
        assert time.process_time() - start < SECONDS
