"""Weights into a model of the user's: every tensor or none, and every name that does not fit is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import WeightsError
from dualtoken_deploy.models.weights import read_tensors, some_names

_COUNTER = "num_batches_tracked"  # training's alone; checkpoints of old versions have none


def load_user_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file or a torch checkpoint, in place; nothing in the file is run.

    A tensor that the model holds under several names is needed under one. Raises WeightsError that names missing,
    unexpected and mis-shaped tensors, or those with NaN.
    """
    given, wanted = read_tensors(path), model.state_dict()
    problems = {
        "missing": _missing(given, wanted),
        "unexpected": [k for k in given if k not in wanted],
        "mis-shaped": [
            f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
            for k in wanted
            if k in given and given[k].shape != wanted[k].shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {kind}: {some_names(names)}" for kind, names in problems.items() if names)
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {said}{_hint(given, wanted)}")
    bad = [k for k, t in given.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise WeightsError(f"{path} holds NaN or infinity in {some_names(bad)}; train or save it again")
    model.load_state_dict(given, strict=False)


def _missing(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    here = {_where(wanted[k]) for k in given if k in wanted}
    return [k for k, t in wanted.items() if k not in given and not k.endswith(_COUNTER) and _where(t) not in here]


def _where(tensor: Tensor) -> tuple[object, ...]:
    """The same for tensors that are one in memory; an empty one is only itself."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (id(tensor),)


def _hint(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What a common way of saving would have done to the names."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if given and all(k.startswith(prefix) for k in given) and {k.removeprefix(prefix) for k in given} & set(wanted):
            return f"; its names begin with {prefix!r}, which is a wrapper's: save the state dict of the model inside"
    return ""
