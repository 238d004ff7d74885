"""The rules that turn an eager model into its deploy form, in the order in which they are applied.

A rule rewrites a private float64 copy in place and says how often it applied. Its docstring is its algebra. No rule
changes what the model computes; whether one makes a target faster is measured, and each exporter names its own set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from dualtoken_deploy.deploy import folding, reshaping
from dualtoken_deploy.deploy.general import apply_general
from dualtoken_deploy.deploy.modules import Size
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.heads.neck import Backbone


@dataclass(frozen=True)
class Rule:
    """`apply(model, image size)` rewrites the model and returns how many places it changed; size None: any size."""

    name: str
    apply: Callable[[ImageModel, Size | None], int]


@dataclass(frozen=True)
class DeployForm:
    """`module` computes what the eager model does; `rules` maps each rule asked for to how often it applied."""

    module: nn.Module
    rules: Mapping[str, int]


def deploy_form(
    model: nn.Module, rules: Iterable[str] | None = None, image_size: Size | None = None, any_size: bool = False
) -> DeployForm:
    """Rewrites a copy of the model for one image size (the model's own unless given); the model is left as it is.

    `any_size`: for all sizes instead, without what only holds at one.

    `rules`: names from RULES, applied in the order of that table whatever the order given; None: DEFAULT_RULES.
    Folding is done in float64, the result has the model's dtype. Raises UsageError on an unknown rule.

    A dense model, or a form of one, comes back whole with the classifier in its Backbone rewritten. Of any other module
    the general rules (general.py) apply where they are proved to hold at `image_size`; without one, none does.
    """
    wanted = set(DEFAULT_RULES if rules is None else rules)
    if unknown := wanted - set(RULES):
        raise UsageError(f"unknown deploy rules {', '.join(sorted(unknown))}; valid rules: {', '.join(RULES)}")
    if not isinstance(model, ImageModel):
        return _other_form(model, wanted, None if any_size else image_size)
    dtype = next(model.parameters()).dtype
    working = copy.deepcopy(model).eval().requires_grad_(False).double()
    size = None if any_size else image_size or model.config.image_size
    with torch.no_grad():
        counts = {name: rule.apply(working, size) for name, rule in RULES.items() if name in wanted}
    return DeployForm(working.to(dtype), MappingProxyType(counts))


def _other_form(model: nn.Module, rules: set[str], image_size: Size | None) -> DeployForm:
    backbone = next((m for m in model.modules() if isinstance(m, Backbone)), None)
    if backbone is not None:
        whole = copy.deepcopy(model).eval().requires_grad_(False)
        inner = next(m for m in whole.modules() if isinstance(m, Backbone))
        form = deploy_form(backbone.model, rules, image_size)
        inner.set_submodule("model", form.module)
        return DeployForm(whole, form.rules)
    if image_size is None:
        return DeployForm(model, MappingProxyType({name: 0 for name in RULES if name in rules}))
    module, counts = apply_general(model, rules, image_size)
    return DeployForm(module, MappingProxyType({name: counts.get(name, 0) for name in RULES if name in rules}))


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        function.__name__: Rule(function.__name__, function)
        for function in (
            folding.fold_batch_norm,
            reshaping.own_global_query,
            folding.fold_layer_scale,
            folding.fold_attention_scale,
            folding.fold_fusion,
            folding.fold_norm_affine,
            reshaping.split_bidim,
            reshaping.reshape_merge,
            reshaping.constant_tokens,
            reshaping.constant_resize,
            reshaping.join_queries,
            folding.fold_projection,
            folding.fold_pooling,
            reshaping.pool_by_convolution,
            reshaping.one_hot_partitions,
        )
    }
)
# Exact, and slower in what they were tried on: docs/decisions/003-rules-per-target.md
SPECIAL = ("fold_projection", "pool_by_convolution")
DEFAULT_RULES = tuple(name for name in RULES if name not in SPECIAL)
