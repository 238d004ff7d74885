"""coremltools checks the whole program after each of its hundred passes: here it is checked once, at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def validated_once() -> Iterator[None]:
    """The program that coremltools validated last is validated when the block ends well, and none before.

    The checks between passes find faults of coremltools' own, and took a third of a conversion. What is saved is held
    against eager anyway.
    """
    from coremltools.converters.mil.mil import Program

    check = Program.validate
    last: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def put_off(program: Any, *arguments: Any, **options: Any) -> None:
        last[:] = [(program, arguments, options)]

    Program.validate = put_off
    try:
        yield
    finally:
        Program.validate = check
    for program, arguments, options in last:
        check(program, *arguments, **options)
