"""Plain data from outside as typed, frozen dataclasses, and back; anything else ends in a BundleError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import msgspec

from dualtoken_deploy.errors import BundleError, InputError

T = TypeVar("T")


def decode(
    data: object,
    kind: type[T],
    what: str,
    error: type[InputError] = BundleError,
    mend: str = "export the bundle again",
) -> T:
    """`data` (dicts, lists, numbers, text) as a dataclass; fields that the class does not know are left out.

    Raises `error`, which names `what`, the field and how to mend it, where one is missing or of another type.
    """
    try:
        return msgspec.convert(data, kind)
    except (msgspec.MsgspecError, RecursionError, OverflowError) as reason:
        raise error(f"{what} cannot be read ({reason}); {mend}") from reason


def parse(
    text: bytes | str,
    what: str,
    error: type[InputError] = BundleError,
    mend: str = "export the bundle again",
) -> Any:
    """JSON as plain data. Raises `error`, which names `what`, on anything else, NaN and infinity included."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise error(f"{what} is not JSON ({reason}); {mend}") from reason


def plain(value: Any) -> Any:
    """A dataclass as plain data for JSON, the fields that are None left out."""
    if is_dataclass(value) and not isinstance(value, type):
        named = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: plain(own) for name, own in named if own is not None}
    if isinstance(value, Mapping):
        return {key: plain(own) for key, own in value.items()}
    return [plain(own) for own in value] if isinstance(value, (list, tuple)) else value
