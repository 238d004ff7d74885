"""Runs the fuzz targets: python -m tests.fuzz.run [--seconds 600] [--seed N] [TARGET ...], one JSON line each.

The corpus first, then as many inputs as the time allows, others at each run unless a seed is given. An input that fails
is made small by Hypothesis, written into the target's corpus, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

HERE = Path(__file__).parent
ROUND = 2000  # inputs of one seed


class Target(Protocol):
    """A fuzz_*.py."""

    CASES: SearchStrategy[bytes]

    def check(self, data: bytes) -> None: ...


def names() -> list[str]:
    return sorted(file.stem.removeprefix("fuzz_") for file in HERE.glob("fuzz_*.py"))


def target(name: str) -> Target:
    return cast(Target, importlib.import_module(f"tests.fuzz.fuzz_{name}"))


def corpus(name: str) -> Iterator[tuple[str, bytes]]:
    """What was found before, by file name."""
    for file in sorted((HERE / "corpus" / name).glob("*")):
        yield file.name, file.read_bytes()


def explore(found: Target, inputs: int, number: int) -> tuple[int, bytes | None, BaseException | None]:
    """Up to `inputs` inputs of one seed: how many were run, and the smallest that failed, and how."""
    count, last = 0, b""

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(found.CASES)
    def one(data: bytes) -> None:
        nonlocal count, last
        count += 1
        last = data
        found.check(data)

    try:
        cast(Callable[[], None], one)()
    except Exception as error:  # noqa: BLE001  # whatever the reader raised is what is looked for
        return count, last, error
    return count, None, None


def run(name: str, seconds: float, first: int) -> dict[str, object]:
    """One target for a time, the seeds counted up from `first`."""
    found, start, count = target(name), time.monotonic(), 0
    for _, data in corpus(name):
        found.check(data)
        count += 1
    number = first
    while time.monotonic() - start < seconds:
        more, failed, error = explore(found, ROUND, number)
        count, number = count + more, number + 1
        if failed is not None:
            file = HERE / "corpus" / name / hashlib.sha256(failed).hexdigest()[:12]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(failed)
            return {
                "target": name,
                "inputs": count,
                "failed": f"{type(error).__name__}: {error}"[:300],
                "input": file.name,
            }
    took = round(time.monotonic() - start)
    return {"target": name, "inputs": count, "failed": None, "seconds": took, "seeds": [first, number - 1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*names(), []], default=[])
    parser.add_argument("--seconds", type=float, default=600.0, help="for each target")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; one of this run's own unless given")
    arguments = parser.parse_args()
    first = secrets.randbits(32) if arguments.seed is None else arguments.seed
    results = []
    for name in arguments.targets or names():
        results.append(run(name, arguments.seconds, first))
        print(json.dumps(results[-1]), flush=True)
    return int(any(result["failed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
