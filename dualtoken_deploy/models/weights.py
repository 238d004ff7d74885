"""Weights files: where they are, what they say of themselves, and their tensors."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dualtoken_deploy.bundle.check import MAX_SIDE, strange_option
from dualtoken_deploy.bundle.decode import decode, parse
from dualtoken_deploy.bundle.labels import check_labels
from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.errors import InputError, WeightsError, first_line
from dualtoken_deploy.files import is_file, is_folder

HEADER = "dualtoken"  # key of our JSON in a safetensors header
_FOLDER = Path(__file__).parents[1] / "weights"

# Trained by this project and shipped with it; the JSON beside each says how.
BUILT_IN_WEIGHTS: Mapping[str, Path] = MappingProxyType(
    {
        "digits": _FOLDER / "digits-t-mix.safetensors",
        "shapes": _FOLDER / "shapes-t-mix.safetensors",
        "scenes-detect": _FOLDER / "scenes-detect-t-mix.safetensors",
        "scenes-segment": _FOLDER / "scenes-segment-t-mix.safetensors",
    }
)


# What safetensors, torch's unpickler and zip reader raise on damaged files: seen in fuzzing, or raised in their source.
DAMAGE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError, ImportError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
WRONG = (WeightsError, "copy or save it again")

BEST = "best.safetensors"  # of a run's folder


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file of a training run says of itself: `labels` name the classes (of a segmenter the first is what
    lies behind everything), `options` are the variant's. Of a head also its name and the `width` of its channels."""

    path: Path
    task: str
    variant: str
    options: Mapping[str, Any]
    image_size: tuple[int, int]
    labels: tuple[str, ...]
    data: str
    head: str | None = None
    width: int | None = None


@dataclass(frozen=True)
class _Said:
    """The header's JSON; what else a run wrote there is for people."""

    variant: str
    options: Mapping[str, Any]
    image_size: tuple[int, int]
    labels: tuple[str, ...]
    data: str
    task: str = CLASSIFY
    head: str | None = None
    width: int | None = None


def weights_path(weights: str | Path) -> Path:
    """The file of a word of BUILT_IN_WEIGHTS (a file of that name is reached by ./word), the best weights of a run's
    folder, or the path itself."""
    path = BUILT_IN_WEIGHTS.get(str(weights), Path(weights)) if isinstance(weights, str) else weights
    return path / BEST if is_folder(path) else path


def read_header(path: Path) -> dict[str, Any] | None:
    """The JSON that a safetensors file of a training run carries; None where it has none (other programs' files).

    Raises WeightsError where the file is missing or damaged.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    _need_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
    except (SafetensorError, *DAMAGE) as error:
        raise damaged(path, error) from error
    if text is None:
        return None
    data: dict[str, Any] = decode(parse(text, _header(path), *WRONG), dict[str, Any], _header(path), *WRONG)
    return data


def _header(path: Path) -> str:
    return f"the header of {path}"


def _need_file(path: Path) -> None:
    if not is_file(path):
        raise WeightsError(f"no weights at {path}; give a .safetensors file or a torch checkpoint")


def damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is not a whole safetensors file ({first_line(error)}); copy or save it again")


def describe_weights(weights: str | Path, task: str | None = None) -> WeightsInfo | None:
    """What the header of a safetensors file says; None where it says nothing (other programs' files).

    Raises WeightsError where the file is missing or damaged, or is for another task than the one given.
    """
    path = weights_path(weights)
    data = read_header(path)
    if data is None:
        return None
    said = decode(data, _Said, _header(path), *WRONG)
    try:
        check_labels(said.labels, _header(path))
    except InputError as error:
        raise WeightsError(str(error)) from error
    if not said.labels or not 1 <= min(said.image_size) <= max(said.image_size) <= MAX_SIDE:
        raise WeightsError(f"{_header(path)} says {len(said.labels)} labels and size {said.image_size}; {WRONG[1]}")
    if (bad := strange_option(said.options)) is not None:
        raise WeightsError(f"{_header(path)} has the option {bad!r}, which is none of a model; {WRONG[1]}")
    info = WeightsInfo(path=path, **{field.name: getattr(said, field.name) for field in fields(said)})
    if task not in (None, info.task):
        raise WeightsError(f"{weights} holds a model for the task {info.task}, not {task}; give weights for {task}")
    return info


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint. Never runs code from the file; else WeightsError."""
    _need_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_checkpoint(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, *DAMAGE) as error:
        raise damaged(path, error) from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, and loading it could run code; save model.state_dict() instead"
        ) from error
    except DAMAGE as error:
        raise WeightsError(
            f"{path} is not a whole torch checkpoint ({first_line(error)}); copy or save it again"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise WeightsError(f"{path} holds no state dict of tensors; save model.state_dict()")
    if odd := [k for k, t in data.items() if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]:
        raise WeightsError(f"{path}: {odd[0]} is no plain tensor of the CPU; save model.state_dict() of a float model")
    return {str(k): v for k, v in data.items()}
