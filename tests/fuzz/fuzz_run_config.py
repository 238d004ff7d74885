"""config.json of a training run, which `train --resume` and `evaluate RUN` read."""

from __future__ import annotations

import json
from contextlib import suppress

from hypothesis import strategies as st

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.train.checkpoint import CONFIG, read_config
from dualtoken_deploy.train.config import make_config
from tests.fuzz.inputs import edited, other_values
from tests.fuzz.place import folder

TOKENS = [b"null", b"-1", b"1e999", b"NaN", b"{}", b"[]", b'"x"', b"[" * 2000, b"9" * 400, b"true", b"0.5", b"[1,2]"]


def seeds() -> list[bytes]:
    runs = [
        make_config(variant="t-mix", data="digits", epochs=3),
        make_config(variant="t-mix", data="scenes", task="detect", epochs=2),
        make_config(variant="tsm2", data="lorenz", task="forecast"),
    ]
    return [json.dumps(run.to_json(), indent=1).encode() for run in runs]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError; what is read is what a run can be made of."""
    place = folder("run")
    (place / CONFIG).write_bytes(data)
    found = read_config(place)
    made = make_config(**{name: getattr(found, name) for name in found.to_json()})  # checks the kind of each value
    made.lr_at(0.5), made.peak_lr


CASES = other_values(seeds(), ["head", "width"]) | edited(seeds(), TOKENS) | st.binary(max_size=100)


def check(data: bytes) -> None:
    """Raises where the reader raises what it may not, or takes what make_config refuses."""
    with suppress(DualTokenError):
        place = folder("run")
        (place / CONFIG).write_bytes(data)
        found = read_config(place)
        try:
            one(data)
        except DualTokenError as error:
            raise AssertionError(f"read_config took what no run is made of: {error}") from error
        found.to_json()
