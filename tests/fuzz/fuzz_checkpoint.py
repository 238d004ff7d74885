"""Weights as torch checkpoints, zipped and of before 1.6, read with weights_only."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import torch
from hypothesis import strategies as st

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.models.weights import read_tensors
from tests.fuzz.inputs import edited
from tests.fuzz.place import filed

TOKENS = [
    b"PK\x05\x06",
    b"\x80\x02",
    b"cos\nsystem\n",
    b"R.",
    b"\xff\xff\xff\x7f",
    b"(" * 300,
    b"ctorch\nTensor\n",
    b".",
]


def seeds() -> list[bytes]:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    found = []
    for data in (tensors, {"model": tensors, "epoch": 3}, {"state_dict": tensors}, [1]):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(data, file, _use_new_zipfile_serialization=zipped)
            found.append(file.getvalue())
    return found


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it will read no longer
        read_tensors(filed(data, ".pt"))


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
