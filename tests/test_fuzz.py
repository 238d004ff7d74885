"""Each fuzz target for a moment: what was found before, and some inputs at random. For long: `make fuzz`."""

from __future__ import annotations

import pytest

from tests.fuzz import run

INPUTS = 200


@pytest.mark.parametrize("name", run.names())
def test_a_reader_answers_or_refuses(name: str) -> None:
    found = run.target(name)
    for file, data in run.corpus(name):
        try:
            found.check(data)
        except Exception as raised:
            raise AssertionError(f"corpus/{name}/{file}") from raised
    count, failed, error = run.explore(found, INPUTS, number=0)
    assert failed is None, f"{type(error).__name__}: {error} on {failed!r}"
    assert count >= INPUTS


def test_what_a_reader_should_not_do_is_found() -> None:
    """A target whose reader fails on one kind of input in a thousand."""

    class Broken:
        CASES = run.target("v2_json").CASES

        def check(self, data: bytes) -> None:
            if b"[[[[" in data:
                raise RecursionError("as a reader that follows every bracket")

    _, failed, error = run.explore(Broken(), 3000, number=1)
    assert failed is not None
    assert b"[[[[" in failed
    assert isinstance(error, RecursionError)
