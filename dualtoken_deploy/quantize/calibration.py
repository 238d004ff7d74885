"""The pictures that ranges are taken from, and those that the loss is measured on: never the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.blocks import Calibration
from dualtoken_deploy.data.folders import ImageSet, match_labels, open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import DatasetError, UsageError
from dualtoken_deploy.spec import InputContract

MIN_IMAGES = 10  # ranges of fewer pictures say little
RANDOM = "random"
Array = NDArray[Any]


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs in the contract's own form, (N, ...), with the name and the hash of where they came from."""

    name: str
    inputs: Array
    sha256: str

    def __post_init__(self) -> None:
        if len(self.inputs) < MIN_IMAGES:
            raise DatasetError(
                f"the calibration set {self.name} has {len(self.inputs)} images; at least {MIN_IMAGES} are needed"
            )
        if not np.isfinite(self.inputs).all():
            raise DatasetError(f"the calibration set {self.name} has NaN or infinite values; clean it")

    def describe(self, method: str, quantizer: str) -> Calibration:
        """What a manifest says of ranges that were taken from it."""
        return Calibration(
            name=self.name, images=len(self.inputs), sha256=self.sha256, method=method, quantizer=quantizer
        )

    @staticmethod
    def of_arrays(name: str, inputs: Array, contract: InputContract) -> CalibrationSet:
        """From inputs that are prepared already. Raises DatasetError on another dtype or shape than the contract's."""
        spec = contract.tensor
        wanted, given = tuple(spec.shape[1:]), inputs.shape[1:]
        if given != wanted or inputs.dtype != np.dtype(spec.dtype):
            raise DatasetError(
                f"the calibration set {name} is {inputs.dtype} {given}, the model takes {spec.dtype} {wanted} a sample"
            )
        return CalibrationSet(name, inputs, hashlib.sha256(np.ascontiguousarray(inputs).tobytes()).hexdigest())


@dataclass(frozen=True)
class HeldOut:
    """Inputs that calibration did not see; `labels` (class indices of the model) where the data has them."""

    name: str
    inputs: Array
    labels: Array | None


def open_calibration(
    source: str | Path, contract: InputContract, size: int, labels: Sequence[str]
) -> tuple[CalibrationSet, HeldOut]:
    """A calibration set of up to `size` pictures and the pictures that the loss is measured on.

    `source`: a folder or a word that open_dataset takes. Where it has a train and a val part, calibration takes
    pictures of the first, spread over its classes, and the loss is measured on the whole of the second; else two
    thirds at most calibrate and the others measure. "random": noise, which calibrates nothing; measured on photographs.
    Raises DatasetError, ImageError, UsageError.
    """
    if size < 1:
        raise UsageError(f"a calibration size of {size} leaves no images; give at least {MIN_IMAGES}")
    if source == RANDOM:
        return _random(contract, size), _held_out(open_dataset("photographs"), contract, labels)
    train, val = open_dataset(source, "train"), open_dataset(source, "val")
    if train.images == val.images:
        train, val = _divide(train, size)
    chosen = train.limit(size)
    if len(chosen) < MIN_IMAGES:
        raise DatasetError(
            f"the calibration set {chosen.name} has {len(chosen)} images; at least {MIN_IMAGES} are needed"
        )
    inputs = load_batch(chosen.images, contract)
    return CalibrationSet(chosen.name, inputs, chosen.digest(contents=True)), _held_out(val, contract, labels)


def _divide(images: ImageSet, size: int) -> tuple[ImageSet, ImageSet]:
    """Of one set: up to `size`, but at most two thirds, and the rest."""
    chosen = images.limit(max(min(size, len(images) * 2 // 3), 1))
    taken = set(chosen.images)
    rest = [i for i, path in enumerate(images.images) if path not in taken]
    labels = None if images.labels is None else tuple(images.labels[i] for i in rest)
    return chosen, ImageSet(images.name, tuple(images.images[i] for i in rest), labels, images.classes)


def _held_out(images: ImageSet, contract: InputContract, labels: Sequence[str]) -> HeldOut:
    known = None if images.labels is None else np.array(match_labels(images, labels))
    return HeldOut(images.name, load_batch(images.images, contract), known)


def _random(contract: InputContract, size: int) -> CalibrationSet:
    spec = contract.tensor
    random = np.random.default_rng(0)
    shape = (size, *(int(d) for d in spec.shape[1:]))
    values = random.random(shape)
    inputs = (values * 255).astype(np.uint8) if spec.dtype == "uint8" else (4 * values - 2).astype(np.float32)
    return CalibrationSet.of_arrays(RANDOM, inputs, contract)
