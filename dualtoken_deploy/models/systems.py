"""Models that are no classifiers, by name: what a bundle of each needs, as registry.py has it of the classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models import tokenizer, tsm2
from dualtoken_deploy.models.count import count_macs, count_params
from dualtoken_deploy.models.registry import DEFAULT_SEED, build, make_config, parse_image_size
from dualtoken_deploy.models.tokenizer import Tokenizer, TokenizerConfig
from dualtoken_deploy.models.tsm2 import TSM2, TSM2Config


@dataclass(frozen=True)
class System:
    """A named model for a task of its own. `options`: fields of the configuration that a user may set."""

    name: str
    title: str
    task: str
    config: Any
    options: tuple[str, ...]


TSM2_OPTIONS = ("lookback", "horizon", "variates", "patch", "dim", "layers", "states")
TOKENIZER_OPTIONS = ("codes", "depth", "code_dim", "num_classes")

SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        row.name: row
        for row in (
            System("tsm2", "TSM2 (MambaMixer)", "forecast", tsm2.S, TSM2_OPTIONS),
            System("dualtoken-tokenizer-s", "DualToken tokenizer", "tokenize", tokenizer.S, TOKENIZER_OPTIONS),
        )
    }
)


def is_system(name: object) -> bool:
    return name in SYSTEMS


def get_system(name: str) -> System:
    """Raises UsageError that lists the valid names."""
    if name not in SYSTEMS:
        raise UsageError(f"unknown variant {name!r}; valid ones that are no classifiers: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def systems_of(task: str) -> tuple[str, ...]:
    """The names of the rows for a task."""
    return tuple(row.name for row in SYSTEMS.values() if row.task == task)


def system_config(name: str, **options: Any) -> Any:
    """The configuration with options changed. Raises UsageError on an unknown option, or a number that is none."""
    row = get_system(name)
    for key, value in options.items():
        if key not in row.options and not (key == "image_size" and isinstance(row.config, TokenizerConfig)):
            raise UsageError(f"unknown option {key!r} of {name}; valid options: {', '.join(row.options)}")
        default = getattr(row.config, key)
        if isinstance(default, int) and not (isinstance(value, int) and value >= 1):
            raise UsageError(f"{key} must be a whole number of at least 1, not {value!r}")
    if isinstance(row.config, TSM2Config):
        return _whole_patches(replace(row.config, **options))
    if "image_size" in options:
        options["image_size"] = _whole_cells(parse_image_size(options["image_size"]))
    return replace(row.config, **options)


def _whole_patches(config: TSM2Config) -> TSM2Config:
    if config.lookback % config.patch:
        raise UsageError(f"patch {config.patch} does not divide the lookback of {config.lookback}; change one of them")
    return config


def input_size(config: Any) -> tuple[int, int]:
    """(H, W) of the picture, or (L, M) of the series."""
    size: tuple[int, int] = (config.lookback, config.variates) if isinstance(config, TSM2Config) else config.image_size
    return size


def _whole_cells(size: tuple[int, int]) -> tuple[int, int]:
    if any(side % 32 for side in size):
        raise UsageError(f"a tokenizer takes sides that 32 divides, not {size[0]}x{size[1]}")
    return size


def build_system(config: Any) -> nn.Module:
    """The model of a configuration, freshly initialised."""
    if isinstance(config, TSM2Config):
        return TSM2(config)
    backbone = make_config(config.backbone, image_size=config.image_size)
    return Tokenizer(build(backbone), backbone.channels, config)  # type: ignore[attr-defined]


def create_system(name: str, seed: int = DEFAULT_SEED, **options: Any) -> nn.Module:
    """A model in evaluation mode, with random weights of `seed`."""
    config = system_config(name, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_system(config).eval()


def system_options(config: Any) -> dict[str, Any]:
    """The options of a configuration with their values, in the order of its fields."""
    row = next(row for row in SYSTEMS.values() if type(row.config) is type(config))
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in row.options}


def describe_systems() -> list[dict[str, Any]]:
    """Every system as describe_variants has the classifiers; at its own size. The papers print no counts of them."""
    rows = []
    for row in SYSTEMS.values():
        with torch.device("meta"):
            model = build_system(row.config).eval()
        rows.append(
            {
                "variant": row.name,
                "title": row.title,
                "options": system_options(row.config),
                "params": count_params(model),
                "macs": count_macs(model, input_size(row.config)),
                "paper_params_m": None,
                "paper_macs_g": None,
            }
        )
    return rows
