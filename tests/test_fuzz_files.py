"""Fuzz targets of files: edits begin at good inputs, and what was found is refused. What is new: test_fuzz.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy.errors import DualTokenError

TARGETS = (
    *("manifest", "golden", "labels", "safetensors", "checkpoint", "coco", "folders"),
    *("settings", "series", "baseline", "run_config"),
)
CORPUS = Path(__file__).parent / "fuzz" / "corpus"
FOUND = [(name, file) for name in TARGETS for file in sorted((CORPUS / name).glob("*"))]


def target(name: str) -> Any:
    return importlib.import_module(f"tests.fuzz.fuzz_{name}")


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
