"""golden.npz: a zip of numpy arrays, read against what the manifest says of them."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from hypothesis import strategies as st

from dualtoken_deploy.bundle.golden import read_golden
from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.spec import TensorSpec
from tests.fuzz.inputs import edited

INPUT = TensorSpec("image", "uint8", "NHWC", ("batch", 4, 4, 3))
OUTPUTS = (TensorSpec("logits", "float32", "NC", ("batch", 3)), TensorSpec("boxes", "float32", "ND4", (1, 5, 4)))


TOKENS = [
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"\xff\xff\xff\xff",
    b"\x93NUMPY\x03\x00",
    b"|O",
    b"(9999999999,)",
    b"'descr'",
    b"(" * 300,
]


def seeds() -> list[bytes]:
    arrays = {"input": np.zeros((2, 4, 4, 3), np.uint8), "logits": np.ones((2, 3), np.float32)}
    found = []
    for save in (np.savez, np.savez_compressed):
        for boxes in (np.zeros((1, 5, 4), np.float32), np.zeros(7, np.float32)):
            file = io.BytesIO()
            save(file, boxes=boxes, **arrays)  # type: ignore[arg-type]  # numpy's stub mixes them with allow_pickle
            found.append(file.getvalue())
    return found


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    read_golden(data, "golden.npz", INPUT, OUTPUTS)


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
