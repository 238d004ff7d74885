"""The sources of this package that are no classifiers: by name, with weights that say what they are of, or random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_deploy.bundle.blocks import Origin
from dualtoken_deploy.errors import InputError, UsageError, WeightsError
from dualtoken_deploy.models.registry import load_weights, randomise
from dualtoken_deploy.models.source import Size, Source
from dualtoken_deploy.models.systems import (
    create_system,
    get_system,
    input_size,
    system_config,
    system_options,
)
from dualtoken_deploy.models.tokenizer import STRIDE, TokenizerConfig
from dualtoken_deploy.models.tsm2 import TSM2Config
from dualtoken_deploy.models.weights import describe_weights, weights_path
from dualtoken_deploy.spec import Dim, TensorSpec


def system_source(
    name: str,
    weights: str | Path | None,
    image_size: Any,
    labels: Sequence[str],
    seed: int,
    origin_of_weights: dict[str, Any],
    **options: Any,
) -> Source:
    """What weights say of themselves is taken unless told otherwise. `labels`: of a forecaster its variates.

    Raises UsageError, WeightsError, InputError.
    """
    row = get_system(name)
    info = None if weights is None else describe_weights(weights, row.task)
    if info is not None:
        if info.variant != name:
            raise WeightsError(f"{weights} are weights of variant {info.variant}, not of {name}")
        options = {**info.options, **options}
        labels = labels or info.labels
    config = _sized(name, image_size, info, options)
    names = "variates" if isinstance(config, TSM2Config) else "num_classes"
    count = getattr(config, names)
    if labels and len(labels) != count:
        raise InputError(f"the labels have {len(labels)} names, the model {count} {names}; give one each")

    def make() -> nn.Module:
        model = create_system(name, seed, **_arguments(config))
        if weights is None:
            randomise(model, seed)
        else:
            load_weights(model, weights_path(weights), variant=name)
        return model

    word = "variate" if isinstance(config, TSM2Config) else "class"
    return Source(
        name=name,
        task=row.task,
        size=input_size(config),
        origin=Origin(kind="variant", name=name),
        make=make,
        outputs=lambda at, batch: _outputs(config, at, batch),
        labels=tuple(labels) or tuple(f"{word} {i + 1}" for i in range(count)),
        weights=origin_of_weights,
        described={"variant": name, "options": _arguments(config)},
        why_one_size=name,
    )


def _sized(name: str, image_size: Any, info: Any, options: dict[str, Any]) -> Any:
    config = system_config(name, **{k: v for k, v in options.items() if k != "image_size"})
    if isinstance(config, TSM2Config):
        if image_size is not None:
            raise UsageError(f"{name} takes a series; give --option lookback=... and variates=... instead of a size")
        return config
    size = image_size or options.get("image_size") or (info.image_size if info is not None else config.image_size)
    size = tuple(size) if isinstance(size, list) else size
    return system_config(name, **{**options, "image_size": size})


def _arguments(config: Any) -> dict[str, Any]:
    size = {"image_size": list(config.image_size)} if isinstance(config, TokenizerConfig) else {}
    return {**system_options(config), **size}


def _outputs(config: Any, at: Size, batch: Dim) -> tuple[TensorSpec, ...]:
    if isinstance(config, TSM2Config):
        return (TensorSpec("forecast", "float32", "NLC", (batch, config.horizon, config.variates)),)
    (height, width), coarse = at, 4 * STRIDE
    pixels, parts = height * width // STRIDE**2, height * width // coarse**2
    return (
        TensorSpec("reconstruction", "float32", "NCHW", (batch, 3, height, width)),
        TensorSpec("pixel_codes", "int32", "NLC", (batch, pixels, config.depth)),
        TensorSpec("semantic_codes", "int32", "NLC", (batch, parts, config.depth)),
        TensorSpec("logits", "float32", "NC", (batch, config.num_classes)),
    )
