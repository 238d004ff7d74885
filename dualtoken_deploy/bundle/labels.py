"""Class names, one a line: only a line feed ends one, whatever else Unicode calls a line."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from dualtoken_deploy.errors import InputError
from dualtoken_deploy.files import read_bytes

MAX_BYTES = 16 << 20  # a million names of sixteen bytes
# Control characters (tab, escape, carriage return, U+0085, ...), line and paragraph separators, halves of a pair: read
# back by another program, or printed, they would be more or less than one name.
_REFUSED = frozenset({"Cc", "Zl", "Zp", "Cs"})
_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # the byte order mark: at the start of a file it is no part of a name


def check_labels(labels: Iterable[str], what: str) -> None:
    """Raises InputError on a name that is empty or has a character that no name may have. `what` leads the message."""
    for line, label in enumerate(labels, 1):
        if not label.strip():
            raise InputError(f"{what}: line {line} has no name; give one name a class")
        bad = next((c for c in label if unicodedata.category(c) in _REFUSED or c == _MARK), None)
        if bad is not None:
            raise InputError(f"{what}: line {line} has the character U+{ord(bad):04X}, which no name may have; mend it")


def parse_labels(data: bytes) -> tuple[str, ...]:
    """The lines of a UTF-8 text; a carriage return before the line feed goes. Raises UnicodeDecodeError."""
    lines = data.decode("utf-8").removeprefix(_MARK).split("\n")
    if lines[-1] == "":
        lines.pop()
    return tuple(line.removesuffix("\r") for line in lines)


def format_labels(labels: Iterable[str]) -> bytes:
    """What parse_labels reads. Raises InputError on a name that would not come back."""
    names = tuple(labels)
    check_labels(names, "labels")
    return "".join(f"{name}\n" for name in names).encode()


def read_labels(path: Path, kind: type[InputError] = InputError) -> tuple[str, ...]:
    """The names of a file that a person wrote. Raises `kind` where it is unreadable or not one name a line."""
    data = read_bytes(path, MAX_BYTES, kind, "write the class names there, one a line")
    try:
        names = tuple(name.strip(" \t") for name in parse_labels(data.rstrip()))
    except UnicodeDecodeError as error:
        raise kind(f"labels {path} are no UTF-8 text ({error.reason}); save them as such") from error
    if not data.strip():
        raise kind(f"labels {path} are empty; give one name a line")
    try:
        check_labels(names, f"labels {path}")
    except InputError as error:
        raise kind(str(error)) from error
    return names
