"""manifest.json: typed decoding and the check of a manifest against itself."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from dualtoken_deploy.bundle.consistency import check as check_itself
from dualtoken_deploy.bundle.consistency import count_classes
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.errors import DualTokenError
from tests.fuzz.inputs import edited, other_values

SCHEMA1 = Path(__file__).parents[1] / "data" / "schema1"


TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"{}",
    b"[]",
    b'"\\ud800"',
    b"NaN",
    b'"batch"',
    b"[" * 2000,
    b"9" * 400,
    b"0",
    b"true",
]


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(SCHEMA1.glob("*.json"))]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    manifest = Manifest.parse(data)
    check_itself(manifest, "the manifest")
    count_classes(manifest)
    Manifest.from_json(manifest.to_json())


CASES = other_values(seeds()) | edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
