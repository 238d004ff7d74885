"""Bytes near to what a reader expects: good inputs with a few edits, which reach further than noise."""

from __future__ import annotations

from collections.abc import Sequence

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
