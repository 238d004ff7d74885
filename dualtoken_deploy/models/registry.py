"""Variants by name, with the paper's figures beside them, and the way from a name and a weights file to a model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dualtoken_deploy.errors import UsageError, WeightsError
from dualtoken_deploy.models import dualformer, dualtoken_vit, lightvit, vim2
from dualtoken_deploy.models.base import ImageModel, ModelConfig
from dualtoken_deploy.models.dualformer import DualFormer, DualFormerConfig
from dualtoken_deploy.models.dualtoken_vit import DualTokenConfig, DualTokenViT
from dualtoken_deploy.models.lightvit import LightViT, LightViTConfig
from dualtoken_deploy.models.published import State
from dualtoken_deploy.models.vim2 import ViM2, ViM2Config
from dualtoken_deploy.models.weights import read_tensors, some_names, weights_path

MIN_IMAGE_SIZE = 64
MAX_IMAGE_SIZE = 4096
DEFAULT_SEED = 0
OWN_ARGUMENTS = ("num_classes", "image_size")  # of create_model, beside its options


@dataclass(frozen=True)
class Family:
    """A paper's models: `model(config)` builds one. `sizes` are the fields of the configuration that a variant fixes;
    the others are options, and `choices` lists the values of those that have a list."""

    config: type
    model: Callable[[Any], ImageModel]
    sizes: tuple[str, ...]
    choices: Mapping[str, tuple[object, ...]]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(f.name for f in fields(self.config) if f.name not in self.sizes)


@dataclass(frozen=True)
class Variant:
    """A named model and what its paper prints for it (None where it has no row)."""

    name: str
    title: str
    config: ModelConfig
    paper_params_m: float | None = None
    paper_macs_g: float | None = None


FAMILIES = (
    Family(
        DualTokenConfig,
        DualTokenViT,
        sizes=("channels", "blocks", "heads", "ffn_ratio", "conv_kernel", "window"),
        choices={
            "global_tokens": (0, 3, 4, 5, 6, 7, 8),
            "token_method": ("position-aware", "normal", "normal-star"),
            "downsampling": ("stepwise", "onestep"),
            "local_attention": ("conv", "window"),
            "token_mlp": ("mlp", "mix"),
        },
    ),
    Family(
        LightViTConfig,
        LightViT,
        sizes=("channels", "blocks", "heads", "ffn_ratio", "window", "neck"),
        choices={"global_tokens": (2, 4, 8, 16, 24, 32), "form": lightvit.FORMS},  # Table 6, and 24 for B
    ),
    Family(
        DualFormerConfig,
        DualFormer,
        sizes=("channels", "blocks", "ffn_ratio", "expansion", "reduction", "conv_kernel", "heads"),
        choices={"hyperplanes": (1, 2, 3, 4)},
    ),
    Family(
        ViM2Config,
        ViM2,
        sizes=("channels", "blocks", "channel_width", "expansion", "states"),
        choices={},
    ),
)


def _table(*variants: Variant) -> Mapping[str, Variant]:
    table = {v.name: v for v in variants}
    if len(table) != len(variants):
        raise ValueError("two variants share a name")
    return MappingProxyType(table)


VARIANTS = _table(
    Variant("t", "DualToken-ViT-T", dualtoken_vit.T),
    Variant("t-mix", "DualToken-ViT-T (mix)", replace(dualtoken_vit.T, token_mlp="mix"), 5.8, 0.5),
    Variant("s", "DualToken-ViT-S", dualtoken_vit.S, 11.9, 1.05),
    Variant("s-mix", "DualToken-ViT-S (mix)", replace(dualtoken_vit.S, token_mlp="mix"), 11.4, 1.04),
    Variant("lightvit-t", "LightViT-T", lightvit.T, 9.4, 0.7),
    Variant("lightvit-s", "LightViT-S", lightvit.S, 19.2, 1.7),
    Variant("lightvit-b", "LightViT-B", lightvit.B, 35.2, 3.9),
    Variant("dualformer-t", "DualFormer-T", dualformer.T, 5.5, 1.3),
    Variant("dualformer-xs", "DualFormer-XS", dualformer.XS, 10.5, 2.3),
    Variant("dualformer-s", "DualFormer-S", dualformer.S, 22.6, 4.4),
    Variant("dualformer-b", "DualFormer-B", dualformer.B, 74.0, 15.8),
    Variant("vim2-t", "ViM2-T", vim2.T, 20.0),
    Variant("vim2-s", "ViM2-S", vim2.S, 43.0),
    Variant("vim2-b", "ViM2-B", vim2.B, 74.0),
)


def family_of(config: ModelConfig) -> Family:
    """The family that a configuration belongs to."""
    return next(family for family in FAMILIES if isinstance(config, family.config))


def options_of(config: ModelConfig) -> dict[str, Any]:
    """The options of a configuration with their values, in the order of its fields."""
    return {name: getattr(config, name) for name in family_of(config).options}


def get_variant(name: str) -> Variant:
    """The variant of that name. Raises UsageError that lists the valid ones."""
    if name not in VARIANTS:
        raise UsageError(f"unknown variant {name!r}; valid variants: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def parse_image_size(size: int | tuple[int, int] | str) -> tuple[int, int]:
    """(H, W) of 224, (256, 320), "224" or "256x320". Raises UsageError below 64, above 4096 or on anything else."""
    try:
        sides = [int(s) for s in size.lower().split("x")] if isinstance(size, str) else size
        height, width = (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])
        if not isinstance(sides, int) and len(sides) not in (1, 2):
            raise ValueError
    except (ValueError, IndexError, TypeError) as error:
        raise UsageError(f"image size {size!r} is not a side or HxW, such as 224 or 256x320") from error
    if min(height, width) < MIN_IMAGE_SIZE:
        raise UsageError(f"image size {height}x{width} is too small; each side must be at least {MIN_IMAGE_SIZE}")
    if max(height, width) > MAX_IMAGE_SIZE:
        raise UsageError(f"image size {height}x{width} is too large; each side must be at most {MAX_IMAGE_SIZE}")
    return height, width


def make_config(variant: str, **options: Any) -> ModelConfig:
    """The variant's configuration with options changed. Raises UsageError on an unknown option or value."""
    config = get_variant(variant).config
    family = family_of(config)
    for name, value in options.items():
        if name not in family.options:
            offered = ", ".join(o for o in family.options if o not in OWN_ARGUMENTS)
            raise UsageError(f"unknown option {name!r} of {variant}; valid options: {offered}")
        if name in family.choices and value not in family.choices[name]:
            raise UsageError(f"{name} {value!r} is not one of {', '.join(map(str, family.choices[name]))}")
    if "image_size" in options:
        options["image_size"] = parse_image_size(options["image_size"])
    config = replace(config, **options)  # type: ignore[type-var]  # every configuration is a dataclass
    if not 0.0 <= getattr(config, "alpha", 0.0) <= 1.0 or not 0.0 <= config.drop_path < 1.0:
        raise UsageError(f"alpha must lie in [0, 1] and drop_path in [0, 1), unlike {options}")
    if getattr(config, "token_method", "") in ("normal", "normal-star") and not getattr(config, "global_tokens", 0):
        raise UsageError("token_method normal and normal-star need global_tokens; the paper has 8")
    if config.num_classes < 1:
        raise UsageError(f"num_classes must be at least 1, not {config.num_classes}")
    return config


def takes_any_size(config: ModelConfig) -> bool:
    """Whether one graph can serve every image size: neither windows nor a scan can be cut from a map whose sides
    are symbols."""
    return not isinstance(config, LightViTConfig | ViM2Config) and getattr(config, "local_attention", "") != "window"


def build(config: ModelConfig) -> ImageModel:
    """The model of a configuration, freshly initialised."""
    return family_of(config).model(config)


def create_model(
    variant: str,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | str = 224,
    weights: str | Path | None = None,
    replace_head: bool = False,
    seed: int = DEFAULT_SEED,
    **options: Any,
) -> ImageModel:
    """A variant's model in evaluation mode, float32, on the CPU.

    `weights`: a word of BUILT_IN_WEIGHTS, a safetensors file, or a torch checkpoint (read with weights_only=True; a
    dict under "model" or "state_dict" is looked into); None initialises at random from `seed`. `replace_head`: take
    weights of another class count and leave the last layer as initialised. `options`: those of the variant's family;
    DualToken-ViT has global_tokens, token_method, downsampling, local_attention, token_mlp, alpha, drop_path.
    Raises UsageError on names and values, WeightsError on the file.
    """
    config = make_config(variant, num_classes=num_classes, image_size=image_size, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    if weights is not None:
        load_weights(model, weights_path(weights), replace_head, variant)
    return model.eval()


def random_model(variant: str, seed: int = DEFAULT_SEED, **options: Any) -> ImageModel:
    """A model whose every parameter and statistic is random: for work on latency and for tests without weights.

    A freshly initialised model is no stand-in for a trained one: its zero biases and unit gains vanish in a converter,
    and its layer scale of 1e-6 hides the Conv Encoder from every comparison.
    """
    model = create_model(variant, seed=seed, **options)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every bias, gain and statistic of a freshly initialised model a random value, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1.0 + 0.2 * noise.abs())
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            elif name.endswith("gamma"):
                tensor.copy_(0.5 + 0.1 * noise)
            elif name.rpartition(".")[2] == "global_tokens":
                tensor.copy_(noise)
            elif tensor.ndim == 1 or name.endswith("position_bias"):
                tensor.copy_(0.1 * noise)


def load_weights(model: torch.nn.Module, path: Path, replace_head: bool = False, variant: str = "this model") -> None:
    """Loads every tensor or none. Raises WeightsError with the variant that they are of, if there is one, or with
    missing, unexpected and mis-shaped keys, of each as many as a line holds."""
    given, wanted = read_tensors(path), model.state_dict()
    if replace_head:
        for key in ("head.fc.weight", "head.fc.bias"):
            if key in given and given[key].shape != wanted[key].shape:
                given[key] = wanted[key]
    problems = {
        "missing": [k for k in wanted if k not in given],
        "unexpected": [k for k in given if k not in wanted],
        "mis-shaped": [
            f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
            for k in wanted
            if k in given and given[k].shape != wanted[k].shape
        ],
    }
    if any(problems.values()):
        if any(k.endswith(".attention.q_global.weight") for k in problems["unexpected"]):
            raise WeightsError(
                f"{path} holds LightViT in the form of its paper's appendix; give the option form=appendix"
            )
        if (other := _variant_of(given)) is not None and other != variant:
            raise WeightsError(f"{path} holds weights of variant {other}, not of {variant}; give --variant {other}")
        listed = "; ".join(f"{len(names)} {kind}: {some_names(names)}" for kind, names in problems.items() if names)
        hint = "; another class count needs replace_head=True" if _only_head(problems) else ""
        raise WeightsError(f"{path} does not fit variant {variant} with these options: {listed}{hint}")
    if not all(torch.isfinite(t).all() for t in given.values() if t.is_floating_point()):
        bad = [k for k, t in given.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        raise WeightsError(f"{path} holds NaN or infinity in {some_names(bad)}; train or save it again")
    model.load_state_dict(given)


def _variant_of(state: Mapping[str, torch.Tensor]) -> str | None:
    """The variant that these are weights of, whatever its classes; None: of none with its usual options."""
    shapes = _body(state)
    return next((name for name, row in VARIANTS.items() if shapes == _shapes(row)), None)


def _body(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items() if not name.startswith("head.fc.")}


@functools.cache
def _shapes(row: Variant) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _body(build(row.config).state_dict())


def _only_head(problems: Mapping[str, list[str]]) -> bool:
    shaped = problems["mis-shaped"]
    return bool(shaped) and not problems["missing"] and all(k.startswith("head.fc.") for k in shaped)


def weights_sha256(model: torch.nn.Module, view: Callable[[State], State] = dict) -> str:
    """Hash over the names, dtypes, shapes and bytes of a model's state, in the order of the names.

    `view`: what of the state is hashed; all of it unless given.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(view(model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_variants() -> list[dict[str, Any]]:
    """Every variant with its options, counted parameters and MACs at 224x224, and the paper's figures (or None)."""
    from dualtoken_deploy.models.count import count_macs, count_params

    rows = []
    for name, variant in VARIANTS.items():
        with torch.device("meta"):  # shapes alone: counting the largest row takes a second and no memory
            model = build(variant.config).eval()
        rows.append(
            {
                "variant": name,
                "title": variant.title,
                "options": options_of(variant.config),
                "params": count_params(model),
                "macs": count_macs(model, variant.config.image_size),
                "paper_params_m": variant.paper_params_m,
                "paper_macs_g": variant.paper_macs_g,
            }
        )
    return rows
