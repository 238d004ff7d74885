"""labels.txt: that of a person, and that of a bundle, which comes back as it was written."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import strategies as st

from dualtoken_deploy.bundle.labels import check_labels, format_labels, parse_labels, read_labels
from dualtoken_deploy.errors import DualTokenError, InputError
from tests.fuzz.inputs import edited
from tests.fuzz.place import filed

TOKENS = [b"\n", b"\r", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b]0;", b"\xff", b"\xef\xbb\xbf", b"\x00", b"[/red]"]


def seeds() -> list[bytes]:
    return [b"cat\ndog\n", b"\xef\xbb\xbfcat\r\ndog\r\n", "\u732b\n\u2028\n".encode(), b"a\x85b\n\x1b[31m\n", b"\n\n"]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    names = read_labels(filed(data, ".txt"))
    check_labels(names, "labels")
    if parse_labels(format_labels(names)) != names:
        raise AssertionError(f"{names} do not come back")
    try:
        parse_labels(data)
    except UnicodeDecodeError as error:
        raise InputError("no UTF-8, as the bundle's reader says it") from error


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
