"""TOML of people: recipes, devices and tolerances, each by the reader of all three."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.prove.tolerances import ROWS, Tolerances
from dualtoken_deploy.recipe.file import read_recipe
from dualtoken_deploy.remote.devices import read_devices
from tests.fuzz.inputs import edited
from tests.fuzz.place import filed

RECIPE = b"""output = "out"
[model]
variant = "t-mix"
weights = "digits"
options = { norm = "two" }
[[export]]
targets = ["onnxruntime", "openvino"]
precisions = ["fp32", "int8"]
int8 = { calibration = "digits", max_drop = 0.5 }
[gates]
sqnr_db = 30.0
[verify]
baselines = "ci"
[report]
html = "report.html"
"""
DEVICES = b'[pi]\nurl = "ssh://me@pi:2222"\nenvironment = "own"\n'
TOLERANCES = b'[allow]\nsize_mib = "2 %"\nsqnr_db = 1\n[at_least]\ntop1 = 0.98\n[at_most]\nsize_mib = 12.5\n'
TOKENS = [
    b"9" * 5000, b"1e999", b"nan", b"-inf", b"[" * 1500, b"{a=" * 300, b"\xe9", b"\xe2\x80\xa8", b'"""', b"\n[", b"=",
    b"true", b"1979-05-27T07:32:00Z", b'"\\U00110000"', b'"\\ud800"', b"a.b.c=1\n", b"a=" + b"1" * 400 + b"\n",
]  # fmt: skip


def seeds() -> list[bytes]:
    return [RECIPE, DEVICES, TOLERANCES]


def tolerances(path: Path) -> None:
    """Read, and used as `verify` does."""
    found = Tolerances.read(path)
    for name in ROWS:
        str(found.allow[name]) + f"{found.allow[name].of(3.0):g}"
    for limits in (found.at_least, found.at_most):
        for value in limits.values():
            if value != value:
                raise AssertionError("a limit that nothing passes or everything does")


READERS: tuple[Callable[[Path], object], ...] = (read_recipe, read_devices, tolerances)


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError: where all three refuse, the last one's."""
    refused: list[DualTokenError] = []
    for read in READERS:
        try:
            read(filed(data, ".toml"))
        except DualTokenError as error:
            refused.append(error)
    if len(refused) == len(READERS):
        raise refused[-1]


CASES = edited(seeds(), TOKENS) | st.binary(max_size=100)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
