"""Weights files: where they are, what they say of themselves, and their tensors."""

from __future__ import annotations

import argparse
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dualtoken_deploy.bundle.consistency import MAX_SIDE, strange_option
from dualtoken_deploy.bundle.decode import decode, parse
from dualtoken_deploy.bundle.labels import check_labels
from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.errors import InputError, Note, WeightsError, first_line
from dualtoken_deploy.files import is_file, is_folder
from dualtoken_deploy.models import published

# Keys under which training programs keep a state dict: the network before its running average.
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_ema", "ema_model", "state_dict_ema", "ema")
HEADER = "dualtoken"  # key of our JSON in a safetensors header
_FOLDER = Path(__file__).parents[1] / "weights"

# Trained by this project and shipped with it; the JSON beside each says how.
BUILT_IN_WEIGHTS: Mapping[str, Path] = MappingProxyType(
    {
        "digits": _FOLDER / "digits-t-mix.safetensors",
        "shapes": _FOLDER / "shapes-t-mix.safetensors",
        "scenes-detect": _FOLDER / "scenes-detect-t-mix.safetensors",
        "scenes-segment": _FOLDER / "scenes-segment-t-mix.safetensors",
        "lorenz": _FOLDER / "lorenz-tsm2.safetensors",
        "shapes-tokens": _FOLDER / "shapes-tokens-tokenizer-s.safetensors",
    }
)


# What safetensors, torch's unpickler and zip reader raise on damaged files: seen in fuzzing, or raised in their source.
DAMAGE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError, ImportError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
WRONG = (WeightsError, "copy or save it again")

LISTED = 6  # names of a kind that an error shows
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
    """What the header of a safetensors file says, or what a LightViT of its authors is; None: nothing is known of it.

    Raises WeightsError where the file is missing or damaged, or is for another task than the one given.
    """
    path = weights_path(weights)
    data = read_header(path)
    if data is None:
        return _describe_published(path)
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
    if "form" not in info.options and ".attention.q_global.weight" in "".join(_keys(path)):
        info = replace(info, options={**info.options, "form": "appendix"})  # LightViT of when there was no other
    if task not in (None, info.task):
        raise WeightsError(f"{weights} holds a model for the task {info.task}, not {task}; give weights for {task}")
    return info


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _describe_published(path: Path) -> WeightsInfo | None:
    found = published.published_variant(_read_file(path)) if path.is_file() else None
    if found is None:
        return None
    variant, classes = found
    labels = tuple(f"class {i}" for i in range(classes))
    return WeightsInfo(path, CLASSIFY, variant, {}, (224, 224), labels, "its authors' training")


def some_names(names: Sequence[str]) -> str:
    """The first of them, as many as an error shows, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint. Never runs code from the file; else WeightsError.

    Those of other makers and of earlier versions come under the names of today, and a Note is issued of what was done.
    """
    state = _read_file(path)
    if published.is_published_lightvit(state):
        return published.rename_lightvit(state)
    current = published.split_token_norms(state)
    if len(current) > len(state):
        warnings.warn(
            f"{path} has one LayerNorm in each token module, where there are two now: both begin as the one, and the "
            "model computes what it did",
            Note,
            stacklevel=2,
        )
    return current


def _read_file(path: Path) -> dict[str, Tensor]:
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
        with torch.serialization.safe_globals([argparse.Namespace]):  # of arguments; a bag of values, and no code
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, and loading it could run code; save model.state_dict() instead"
        ) from error
    except DAMAGE as error:
        raise WeightsError(
            f"{path} is not a whole torch checkpoint ({first_line(error)}); copy or save it again"
        ) from error
    data = _unwrap(data, path)
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise WeightsError(f"{path} holds no state dict of tensors; save model.state_dict()")
    if odd := [k for k, t in data.items() if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]:
        raise WeightsError(f"{path}: {odd[0]} is no plain tensor of the CPU; save model.state_dict() of a float model")
    state = {str(k): v for k, v in data.items()}
    while state and all(k.startswith("module.") for k in state):  # of torch's data parallelism and of averages
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


def _unwrap(data: Any, path: Path) -> Any:
    """The state dict in a training checkpoint; where it has several, the first of WRAPPERS, and a Note says so."""
    while isinstance(data, dict):
        held = [key for key in WRAPPERS if isinstance(data.get(key), dict)]
        if not held:
            break
        if len(held) > 1:
            text = f"{path} holds several state dicts ({', '.join(held)}); {held[0]} was taken"
            warnings.warn(text, Note, stacklevel=2)
        data = data[held[0]]
    return data
