"""The form that a browser sends a picture in."""

from __future__ import annotations

from hypothesis import strategies as st

from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.multipart import picture_of
from tests.fuzz.inputs import edited

TYPE = "multipart/form-data; boundary=xyz"
HEAD = b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
SEEDS = [
    HEAD + b"picture\r\n--xyz--\r\n",
    b'--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n' + HEAD + b"\r\n--xy\x00\r\n--xyz--\r\n",
]
TOKENS = [b"--xyz\r\n", b"\r\n\r\n", b"--xyz--", b"filename*=utf-8''%ff", b"A" * 5000, b'"\\', b"\r", b";" * 300]
CASES = edited(SEEDS, TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    for content_type in (TYPE, TYPE.replace("xyz", '"x'), "multipart/form-data; boundary=" + "b" * 71):
        try:
            found = picture_of(data, content_type)
        except BadRequest:
            continue
        assert found in data
