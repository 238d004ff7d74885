"""A run's files. Each is written beside its place and renamed, so that a kill at any moment leaves the old or the new.

<run>/
  config.json          the recipe
  last.safetensors     weights, averaged weights and optimiser state; its header says the epoch and the metrics
  best.safetensors     the weights with the best top-1 so far, for create_model and export; best.json beside it
  metrics.csv          one line an epoch; curve.svg: the same as a picture
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualtoken_deploy.errors import WeightsError
from dualtoken_deploy.files import write_atomically
from dualtoken_deploy.models.published import split_token_norms
from dualtoken_deploy.models.weights import DAMAGE, HEADER
from dualtoken_deploy.train.config import TrainConfig

CONFIG, LAST, BEST, METRICS, CURVE = "config.json", "last.safetensors", "best.safetensors", "metrics.csv", "curve.svg"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes contiguous CPU copies; `header` goes into the file as JSON."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda p: save_file(flat, p, {HEADER: json.dumps(header)}), SafetensorError)


def save_weights(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], half: bool = False) -> None:
    """Weights that create_model takes, float32 or float16, with their description inside and as JSON beside."""
    kept = {k: t.half() if half and t.is_floating_point() else t for k, t in tensors.items()}
    save_tensors(path, kept, header)
    write_json(path.with_suffix(".json"), header)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of save_tensors. Raises WeightsError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            if not isinstance(header, dict):
                raise TypeError("its header is no JSON object")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, *DAMAGE) as error:
        raise WeightsError(f"{path} is no whole checkpoint of a training run ({error}); train anew") from error


def pack(
    model: torch.nn.Module, average: Mapping[str, Tensor] | None, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything that a run needs to go on, as named tensors: "model.*", "ema.*" and "<state>.*" of the optimiser."""
    out = {f"model.{k}": t for k, t in model.state_dict().items()}
    out |= {f"ema.{k}": t for k, t in (average or {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            out[f"optimiser.{key}.{name}"] = torch.as_tensor(value)
    return out


def unpack(
    tensors: Mapping[str, Tensor], model: torch.nn.Module, optimiser: torch.optim.Optimizer, path: Path
) -> dict[str, Tensor]:
    """Puts what `pack` made back; returns the averaged weights (empty: none). Raises WeightsError on another model."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    try:
        model.load_state_dict(split_token_norms(parts["model"]))
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the model of its run; train anew") from error
    for name, parameter in model.named_parameters():
        for key_and_name, tensor in parts["optimiser"].items():
            key, _, owner = key_and_name.partition(".")
            if owner == name:
                if tensor.shape not in ((), parameter.shape):
                    raise WeightsError(f"{path} does not fit the model of its run ({key_and_name}); train anew")
                where = "cpu" if key == "step" else parameter.device
                optimiser.state[parameter][key] = tensor.to(where)
    average, state = split_token_norms(parts["ema"]), model.state_dict()
    if average and {k: t.shape for k, t in average.items()} != {k: t.shape for k, t in state.items()}:
        raise WeightsError(f"{path} does not fit the model of its run (ema); train anew")
    return average


def read_config(run: Path) -> TrainConfig:
    """The recipe of a run. Raises WeightsError where `run` is none."""
    try:
        return TrainConfig.from_json(json.loads((run / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise WeightsError(f"{run} is no training run: it has no {CONFIG}; start one with --output {run}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{run / CONFIG} cannot be read as a recipe ({error}); train anew") from error


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line an epoch, with the names in the first."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
