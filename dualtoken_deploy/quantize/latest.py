"""What was made last, for the next target of the same model: a trace, a calibration, eager's outputs."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Made = TypeVar("Made")


class Latest(Generic[Made]):
    """Keeps one thing, under a key that says all that it was made of: targets follow one another in a process, and two
    graphs with their weights are too much to keep."""

    def __init__(self) -> None:
        self._kept: dict[str, Made] = {}

    def get(self, key: str | None, make: Callable[[], Made]) -> Made:
        """What has this key, made anew where it is not the latest; a key of None is never kept."""
        if key is None:
            return make()
        if key not in self._kept:
            made = make()
            self._kept.clear()
            self._kept[key] = made
        return self._kept[key]


class _Pickler(pickle.Pickler):
    """Tensors by their content: their storages are pickled with addresses."""

    def reducer_override(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            content = given.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return str, (f"{given.dtype} {tuple(given.shape)} {hashlib.sha256(content).hexdigest()}",)
        return NotImplemented


def fingerprint(module: nn.Module, *parts: object) -> str | None:
    """A hash of a module, weights, classes and settings, and of what `parts` print as. None: it cannot be pickled."""
    content = io.BytesIO()
    try:
        _Pickler(content).dump(module)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None
    key = hashlib.sha256(content.getvalue())
    for part in parts:
        key.update(f"{part}\0".encode())
    return key.hexdigest()
