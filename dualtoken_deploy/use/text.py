"""Text of others (labels, paths, what a vendor said) for a terminal: nothing in it moves the cursor or sets a title."""

from __future__ import annotations

import unicodedata

# Control characters, line and paragraph separators, halves of a pair. Of the format characters those that turn the
# direction of what follows: the others join letters in some scripts.
_ESCAPED = frozenset({"Cc", "Zl", "Zp", "Cs"})
_TURNS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c")


def printable(text: str, lines: bool = False) -> str:
    """`text` with what a terminal would act on as escapes of Python's; `lines`: line feeds stay."""
    return "".join(c if _is_plain(c) or (lines and c == "\n") else _escape(c) for c in text)


def _is_plain(character: str) -> bool:
    return unicodedata.category(character) not in _ESCAPED and character not in _TURNS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
