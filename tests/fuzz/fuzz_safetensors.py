"""Weights as safetensors: what the header says, and the tensors."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.models.weights import HEADER, describe_weights, read_tensors
from tests.fuzz.inputs import edited
from tests.fuzz.place import filed

SAID: dict[str, Any] = {
    "variant": "t-mix", "options": {"global_tokens": 2}, "image_size": [64, 64], "labels": ["a", "b"], "data": "x",
}  # fmt: skip


TOKENS = [b"\xff" * 8, b"{}", b'"F8_E5M2"', b"null", b"[" * 2000, b"-1", b"18446744073709551615", b'"__metadata__"']


def seeds() -> list[bytes]:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    heads: tuple[dict[str, Any], ...] = (SAID, SAID | {"task": "detect", "head": "retinanet", "width": 8}, {})
    return [save(tensors, {HEADER: json.dumps(said)}) for said in heads] + [save(tensors)]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    path = filed(data, ".safetensors")
    describe_weights(path)
    read_tensors(path)


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
