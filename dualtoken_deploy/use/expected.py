"""What eager gives for a set of pictures, in a file: a device without torch holds its bundles against it.

The file is a golden.npz whose `input` are the sha256 of each picture's pixels as the model sees them, uint8 (N, 32),
and whose outputs have N for their batch. A device whose decoder gives other pixels is thereby seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.golden import MAX_ARRAY_BYTES, MAX_FILE_BYTES, read_golden
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.errors import BundleError, InputError, UsageError
from dualtoken_deploy.files import read_bytes
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.load import Runner
from dualtoken_deploy.targets.runner import run_each
from dualtoken_deploy.tasks.base import Outputs
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.validate import Tell, chunks

REMEDY = "run compare --on again, which writes it"


@dataclass(frozen=True)
class Expected:
    """Outputs for each picture, the batch first, and the sha256 of each picture's pixels, uint8 (N, 32)."""

    outputs: Sequence[Outputs]
    digests: Array

    def write(self, path: Path) -> None:
        """Raises UsageError where an output would be larger than what is read, or has no one shape."""
        joined = {}
        for name in self.outputs[0]:
            shapes = {each[name].shape[1:] for each in self.outputs}
            if len(shapes) > 1:
                raise UsageError(
                    f"{name} has another shape for each picture, and such outputs do not travel to a device"
                )
            joined[name] = np.concatenate([each[name] for each in self.outputs])
        for name, values in joined.items():
            if values.nbytes > MAX_ARRAY_BYTES:
                raise UsageError(
                    f"{name} of {len(self.outputs)} pictures has {values.nbytes >> 20} MiB and at most "
                    f"{MAX_ARRAY_BYTES >> 20} travel to a device; give a --limit"
                )
        members: dict[str, Any] = {"input": self.digests, **joined}
        np.savez_compressed(path, **members)


def digest_of(array: Array) -> Array:
    """sha256 as uint8 (32,)."""
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest(), np.uint8)


def run_all(bundle: Bundle, images: SampleSet, runner: Runner, who: str, tell: Tell) -> Expected:
    """The outputs of a runner for every picture of a set, and what it was fed."""
    contract, found, digests = bundle.manifest.input, list[Outputs](), list[Array]()
    for _, inputs in chunks(images, contract, get_task(bundle.manifest.task)):
        tell(f"running {who}: {len(found)}/{len(images)} images")
        digests += [digest_of(each) for each in inputs]
        found += run_each(runner, contract, inputs)
    return Expected(found, np.stack(digests))


def read_expected(path: Path, bundle: Bundle, count: int) -> Expected:
    """Of `count` pictures, for a bundle of the model. Raises InputError where the file is for something else."""
    manifest = bundle.manifest
    wanted = TensorSpec("input", "uint8", "NC", (count, 32))
    outputs = [replace(spec, shape=(count, *spec.shape[1:])) for spec in manifest.outputs]
    data = read_bytes(path, MAX_FILE_BYTES, InputError, REMEDY)
    try:
        found = read_golden(data, str(path), wanted, outputs)
    except BundleError as error:
        raise InputError(f"{str(error).partition('; export')[0]}; {REMEDY}") from error
    digests = found.pop("input")
    if any(len(values) != count for values in found.values()):
        raise InputError(f"{path} is not of {count} pictures; {REMEDY}")
    return Expected([{name: values[i : i + 1] for name, values in found.items()} for i in range(count)], digests)
