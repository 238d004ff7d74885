"""Bytes near to what a reader expects: good inputs with a few edits, which reach further than noise."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


@st.composite
def edited(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """One of the seeds with up to eight edits: bytes changed, cut, doubled, or a token of the format put in."""
    data = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 32))
        edit = draw(st.sampled_from(["change", "cut", "double", "noise", *(["token"] if tokens else [])]))
        if edit == "change" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif edit == "cut":
            del data[at : at + length]
        elif edit == "double":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 64))
        elif edit == "noise":
            data[at:at] = draw(st.binary(max_size=16))
        elif edit == "token":
            data[at:at] = draw(st.sampled_from(list(tokens)))
    return bytes(data)


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**400, "", "x", "\ud800", [], {}, [1], ["x", "x"], [[0]], {"x": 1}, {"x": None},
)  # fmt: skip


@st.composite
def other_values(draw: st.DrawFn, seeds: Sequence[bytes], keys: Sequence[str] = ()) -> bytes:
    """A JSON seed with up to three of its values changed, left out, or put under another name: edits of bytes seldom
    leave JSON, and then nobody reads its values."""
    data = json.loads(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        _collect(data, places)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        edit = draw(st.sampled_from(["value", "value", "value", "none", "name"]))
        if edit == "value":
            other = st.sampled_from(VALUES) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
            holder[key] = copy.deepcopy(draw(other))
        elif edit == "none":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([*keys, "x", ""]))] = holder.pop(key)
    return json.dumps(data).encode()


def _collect(data: Any, places: list[tuple[Any, Any]]) -> None:
    """Every place of a value, as what holds it and the key there."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        places.append((data, key))
        _collect(data[key], places)
