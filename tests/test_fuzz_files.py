"""Readers of files raise only errors of our tree: a short look at each target; `make fuzz` looks long."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from dualtoken_deploy.errors import DualTokenError

TARGETS = ("manifest", "golden", "labels", "safetensors", "checkpoint")
CORPUS = Path(__file__).parent / "fuzz" / "corpus"
FOUND = [(name, file) for name in TARGETS for file in sorted((CORPUS / name).glob("*"))]


def target(name: str) -> Any:
    return importlib.import_module(f"tests.fuzz.fuzz_{name}")


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_damaged_inputs(name: str) -> None:
    found = target(name)

    @settings(max_examples=150, database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(found.CASES)
    def run(data: bytes) -> None:
        found.check(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_good_inputs(name: str) -> None:
    """Of a target whose seeds are refused, edits would reach nothing."""
    taken = 0
    for seed in target(name).seeds():
        try:
            target(name).one(seed)
        except DualTokenError:
            continue
        taken += 1
    assert taken > 0


@pytest.mark.parametrize(("name", "file"), FOUND, ids=[f"{name}-{file.name}" for name, file in FOUND])
def test_what_was_found_before(name: str, file: Path) -> None:
    """Each of these once ended in an error outside of our tree, or in a wrong answer."""
    with pytest.raises(DualTokenError):
        target(name).one(file.read_bytes())
