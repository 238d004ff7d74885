"""The pictures that ranges are taken from, and those that the loss is measured on: never the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualtoken_deploy.bundle.blocks import Calibration
from dualtoken_deploy.data.samples import Sample, SampleSet, readable
from dualtoken_deploy.errors import DatasetError, UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import InputContract
from dualtoken_deploy.tasks.base import Task

MIN_IMAGES = 10  # ranges of fewer pictures say little
RANDOM = "random"
FITTED = "second-order rounding"  # a method by which weights are fitted to the pictures


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs in the contract's own form, (N, ...), with the name and the hash of where they came from."""

    name: str
    inputs: Array
    sha256: str

    def __post_init__(self) -> None:
        if not np.isfinite(self.inputs).all():
            raise DatasetError(f"the calibration set {self.name} has NaN or infinite values; clean it")

    def part(self, chosen: Array) -> CalibrationSet:
        """Some of the inputs, by their numbers; of a part there may be fewer than ranges are otherwise taken from."""
        digest = hashlib.sha256(f"{self.sha256} {chosen.tolist()}".encode()).hexdigest()
        return CalibrationSet(f"{self.name}, a part", self.inputs[chosen], digest)

    def describe(self, method: str, quantizer: str) -> Calibration:
        """What a manifest says of ranges that were taken from it."""
        return Calibration(
            name=self.name, images=len(self.inputs), sha256=self.sha256, method=method, quantizer=quantizer
        )

    @staticmethod
    def of_arrays(name: str, inputs: Array, contract: InputContract) -> CalibrationSet:
        """From inputs that are prepared already. Raises DatasetError on too few, or another dtype or shape than the
        contract's."""
        if len(inputs) < MIN_IMAGES:
            raise DatasetError(f"the calibration set {name} has {len(inputs)} images; at least {MIN_IMAGES} are needed")
        spec = contract.tensor
        wanted, given = tuple(spec.shape[1:]), inputs.shape[1:]
        if given != wanted or inputs.dtype != np.dtype(spec.dtype):
            raise DatasetError(
                f"the calibration set {name} is {inputs.dtype} {given}, the model takes {spec.dtype} {wanted} a sample"
            )
        return CalibrationSet(name, inputs, hashlib.sha256(np.ascontiguousarray(inputs).tobytes()).hexdigest())


@dataclass(frozen=True)
class HeldOut:
    """Inputs (N, ...) that calibration did not see; for each the truth, without pixels, and its picture's (h, w).

    `known`: whether the truth says what the task's own measure needs.
    """

    name: str
    inputs: Array
    truth: tuple[tuple[Sample, tuple[int, int]], ...]
    known: bool


def open_calibration(
    task: Task, source: str | Path, contract: InputContract, size: int, labels: Sequence[str]
) -> tuple[CalibrationSet, HeldOut]:
    """A calibration set of up to `size` pictures and the pictures that the loss is measured on.

    `source`: a folder or a word that the task opens. Where it has a train and a val part, calibration takes pictures of
    the first, spread over it, and the loss is measured on the second; else two thirds at most calibrate and the others
    measure. "random": noise, which calibrates nothing; measured on photographs.
    Raises DatasetError, ImageError, UsageError.
    """
    if size < 1:
        raise UsageError(f"a calibration size of {size} leaves no images; give at least {MIN_IMAGES}")
    if source == RANDOM:
        return _random(contract, size), _held_out(task, task.examples(contract), contract, labels)
    train, val = task.open(source, "train"), task.open(source, "val")
    if train.digest == val.digest:
        chosen = train.limit(max(min(size, len(train) * 2 // 3), 1))
        val = train.without(chosen)
    else:
        chosen = train.limit(size)
    if len(chosen) < MIN_IMAGES:
        raise DatasetError(
            f"the calibration set {chosen.name} has {len(chosen)} images; at least {MIN_IMAGES} are needed"
        )
    chosen = readable(chosen)
    inputs = np.stack([task.prepare(chosen[i], contract) for i in range(len(chosen))])
    return CalibrationSet.of_arrays(chosen.name, inputs, contract), _held_out(task, val, contract, labels)


def examples(task: Task, contract: InputContract) -> CalibrationSet:
    """The task's built-in ones, for a precision that measures ranges where nothing else was given."""
    images = task.examples(contract)
    inputs = np.stack([task.prepare(images[i], contract) for i in range(len(images))])
    return CalibrationSet.of_arrays(images.name, inputs, contract)


def _held_out(task: Task, images: SampleSet, contract: InputContract, labels: Sequence[str]) -> HeldOut:
    known = task.known(images)
    if known:
        images = task.match(images, labels)
    if task.held_out is not None:
        images = images.limit(task.held_out)
    images = readable(images)
    truth, inputs = [], []
    for i in range(len(images)):
        sample = images[i]
        truth.append((task.keep(sample, contract), sample.size))
        inputs.append(task.prepare(sample, contract))
    return HeldOut(images.name, np.stack(inputs), tuple(truth), known)


def _random(contract: InputContract, size: int) -> CalibrationSet:
    spec = contract.tensor
    random = np.random.default_rng(0)
    shape = (size, *(int(d) for d in spec.shape[1:]))
    values = random.random(shape)
    inputs = (values * 255).astype(np.uint8) if spec.dtype == "uint8" else (4 * values - 2).astype(np.float32)
    return CalibrationSet.of_arrays(RANDOM, inputs, contract)
