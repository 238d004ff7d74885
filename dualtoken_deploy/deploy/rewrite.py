"""The rules that turn an eager model into its deploy form, in the order in which they are applied.

A rule rewrites a private float64 copy in place and says how often it applied. Its docstring is its algebra. No rule
changes what the model computes; whether one makes a target faster is measured, and each exporter names its own set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dualtoken_deploy.deploy import algebra, forms
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models import lightvit
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.dualformer import Mlp, PartitionAttention
from dualtoken_deploy.models.dualtoken_vit import (
    AttentionFuse,
    ConvEncoder,
    Fuse,
    GlobalAggregation,
    GlobalBroadcast,
    MixMlp,
    NoDownsample,
    NormalTokenModule,
    PositionAwareTokenModule,
    TokenMlp,
    TokenResize,
    WindowAttention,
)
from dualtoken_deploy.models.layers import (
    BiDimAttention,
    ClassifierHead,
    ConvNormAct,
    FeedForward,
    PatchMerge,
    PooledHead,
    TokenMerge,
)
from dualtoken_deploy.models.lightvit import BroadcastAttention

Size = tuple[int, int]  # (H, W) of the image or of a map
M = TypeVar("M", bound=nn.Module)


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
    model: ImageModel, rules: Iterable[str] | None = None, image_size: Size | None = None, any_size: bool = False
) -> DeployForm:
    """Rewrites a copy of the model for one image size (the model's own unless given); the model is left as it is.

    `any_size`: for all sizes instead, without what only holds at one.

    `rules`: names from RULES, applied in the order of that table whatever the order given; None: DEFAULT_RULES.
    Folding is done in float64, the result has the model's dtype. Raises UsageError on an unknown rule.
    """
    wanted = set(DEFAULT_RULES if rules is None else rules)
    if unknown := wanted - set(RULES):
        raise UsageError(f"unknown deploy rules {', '.join(sorted(unknown))}; valid rules: {', '.join(RULES)}")
    dtype = next(model.parameters()).dtype
    working = copy.deepcopy(model).eval().requires_grad_(False).double()
    size = None if any_size else image_size or model.config.image_size
    with torch.no_grad():
        counts = {name: rule.apply(working, size) for name, rule in RULES.items() if name in wanted}
    return DeployForm(working.to(dtype), MappingProxyType(counts))


# --- helpers ---------------------------------------------------------------------------------------------------------


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer of these tensors, (out, in) and (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer


def _replace(model: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Puts `make(module)` in the place of every module of that very type, where it does not give None."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is kind and (new := make(module)) is not None:
            model.set_submodule(name, new)
            count += 1
    return count


def _modules(model: nn.Module, kind: type[M]) -> list[M]:
    return [m for m in model.modules() if type(m) is kind]


def _scale_rows(layer: nn.Linear, start: int, stop: int, gain: Tensor | float) -> None:
    weight, bias = algebra.gain_into_linear(layer.weight[start:stop], layer.bias[start:stop], gain)
    layer.weight[start:stop], layer.bias[start:stop] = weight, bias


# --- rules -----------------------------------------------------------------------------------------------------------


def fold_batch_norm(model: ImageModel, size: Size | None) -> int:
    """BN(W * x) = (r W) * x + (beta - r mean), r = gamma / sqrt(var + eps): the stem's four normalisations go."""
    for block in _modules(model, ConvNormAct):
        conv, norm = block.conv, block.norm
        assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018 (for the type checker)
        weight, bias = algebra.norm_into_conv(
            conv.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        )
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        block.set_submodule("norm", nn.Identity())
    return len(_modules(model, ConvNormAct))


def fold_layer_scale(model: ImageModel, size: Size | None) -> int:
    """gamma (W h + b) = (diag(gamma) W) h + gamma b: layer scale goes into the Conv Encoder's last linear layer."""
    for encoder in _modules(model, ConvEncoder):
        _scale_rows(encoder.pw2, 0, encoder.pw2.out_features, encoder.scale.gamma)
        encoder.set_submodule("scale", nn.Identity())
    return len(_modules(model, ConvEncoder))


def fold_attention_scale(model: ImageModel, size: Size | None) -> int:
    """(s q) . k with q = W x + b: s = 1/sqrt(d) goes into the rows of W and b that give q."""
    queries: dict[type, tuple[str, ...]] = {  # the linear layers whose first rows give q
        GlobalAggregation: ("qkv",),
        WindowAttention: ("qkv",),
        GlobalBroadcast: ("q",),
        AttentionFuse: ("q",),
        BroadcastAttention: ("qkv", "q_global"),  # the image's q serves its windows and the broadcast
    }
    attentions: list[Any] = [m for m in model.modules() if type(m) in queries]
    for attention in attentions:
        for name in queries[type(attention)]:
            layer = attention.get_submodule(name)
            _scale_rows(layer, 0, layer.in_features, attention.scale)
        attention.scale = 1.0
    return len(attentions)


def fold_fusion(model: ImageModel, size: Size | None) -> int:
    """alpha MLP(G) + (1 - alpha) R A v: alpha goes into the MLP's last linear layer, 1 - alpha into v = W x + b.

    Attention weights A and interpolation R are linear in v, so the factor passes through both.
    """
    modules = [m for m in _modules(model, PositionAwareTokenModule) if type(m.fuse) is Fuse]
    for module in modules:
        fuse = module.fuse
        if not isinstance(fuse, Fuse) or not isinstance(fuse.mlp, TokenMlp | MixMlp):
            continue
        last, qkv = fuse.mlp.fc2, module.aggregate.qkv
        _scale_rows(last, 0, last.out_features, fuse.alpha)
        _scale_rows(qkv, 2 * qkv.in_features, 3 * qkv.in_features, 1 - fuse.alpha)
        module.set_submodule("fuse", forms.FoldedFuse(fuse.mlp))
    return len(modules)


def fold_norm_affine(model: ImageModel, size: Size | None) -> int:
    """W (gamma z + beta) + b = (W diag(gamma)) z + (W beta + b): LayerNorm's gain and shift go into what reads it.

    Average pooling and the mean over tokens commute with both. A zero-padded convolution or window does not: its
    border would see beta. Stage 1's token module (its downsampling has a convolution) and windows that do not fill the
    map keep their affine.
    """
    readers: list[tuple[nn.Module, str, list[tuple[nn.Module, str]]]] = []
    for encoder in _modules(model, ConvEncoder):
        readers.append((encoder, "norm", [(encoder, "pw1")]))
    for ffn in _modules(model, FeedForward):
        readers.append((ffn, "norm", [(ffn, "fc1")]))
    for bidim in _modules(model, BiDimAttention):
        readers.append((bidim, "norm", [(bidim, "global_reduce"), (bidim, "local_reduce")]))
    for merge in _modules(model, PatchMerge):
        readers.append((merge, "norm", [(merge, "reduce")]))
    for token_merge in _modules(model, TokenMerge):
        readers.append((token_merge, "norm", [(token_merge, "proj")]))
    for mlp in _modules(model, Mlp):
        readers.append((mlp, "norm", [(mlp, "fc1")]))
    for head in _modules(model, ClassifierHead):
        readers.append((head, "norm", [(head, "neck")]))
    for pooled in _modules(model, PooledHead):
        readers.append((pooled, "norm", [(pooled, "fc")]))
    for module in _modules(model, PositionAwareTokenModule):
        if not _has_convolution(module.downsample):
            readers.append((module, "norm", [(module.aggregate, "qkv"), (module.broadcast, "q")]))
    for normal in _modules(model, NormalTokenModule):
        if not _has_convolution(normal.downsample):
            source = (normal.fuse, "kv") if normal.aggregate is None else (normal.aggregate, "qkv")
            readers.append((normal, "norm", [source, (normal.broadcast, "q")]))
    for window, grid in _on_grids(model, size, WindowAttention):
        if _fills(grid, window.window):
            readers.append((window, "norm", [(window, "qkv")]))
    for block, grid in _on_grids(model, size, lightvit.Block):
        if _fills(grid, block.attention.window):
            readers.append((block, "norm", [(block.attention, "qkv"), (block.attention, "q_global")]))
    for owner, name, layers in readers:
        _move_affine(owner, name, layers)
    return len(readers)


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def _on_grids(model: ImageModel, size: Size | None, kind: type[M]) -> list[tuple[M, Size | None]]:
    """Every module of that very type with the (rows, columns) of its stage's map."""
    grids = [None] * len(model.strides) if size is None else model.grids(size)
    return [
        (module, grid)
        for stage, grid in enumerate(grids, 1)
        for module in _modules(model.get_submodule(f"stage{stage}"), kind)
    ]


def _fills(grid: Size | None, window: int) -> bool:
    return grid is not None and grid[0] % window == 0 and grid[1] % window == 0


def _move_affine(owner: nn.Module, name: str, layers: list[tuple[nn.Module, str]]) -> None:
    norm = owner.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)  # noqa: S101 (for the type checker)
    for module, attribute in layers:
        layer = module.get_submodule(attribute)
        assert isinstance(layer, nn.Linear)  # noqa: S101
        folded = algebra.affine_into_linear(layer.weight, layer.bias, norm.weight, norm.bias)
        module.set_submodule(attribute, _linear(*folded))
    plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    owner.set_submodule(name, plain)


def split_bidim(model: ImageModel, size: Size | None) -> int:
    """W [local; global] + b = W_l local + (W_g global + b): the concatenation goes, the second term broadcasts."""

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, BiDimAttention)  # noqa: S101
        select = module.spatial_select
        local, broadcast = algebra.split_columns(select.weight, module.local_reduce.out_features)
        return forms.SplitBiDim(
            module.norm, module.global_reduce, module.local_reduce, module.channel_select,
            _linear(local, None), _linear(broadcast, select.bias),
        )  # fmt: skip

    return _replace(model, BiDimAttention, make)


def reshape_merge(model: ImageModel, size: Size | None) -> int:
    """reduce(norm(P z)) with P a permutation of the patches: the weights' columns (and the norm's affine) in P's order.

    Row-major patches are one reshape and transpose of the map; LayerNorm's statistics do not depend on the order.
    """

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, PatchMerge)  # noqa: S101
        norm = module.norm
        if norm.elementwise_affine:
            for parameter in (norm.weight, norm.bias):
                parameter.copy_(algebra.row_major_patches(parameter))
        weight = algebra.row_major_patches(module.reduce.weight)
        return forms.ReshapeMerge(norm, _linear(weight, module.reduce.bias), module.residual)

    return _replace(model, PatchMerge, make)


def constant_tokens(model: ImageModel, size: Size | None) -> int:
    """In the first block G is the learned parameter, so MLP(G) is a constant, or the query q(MLP(G)), or q(LN(G))."""
    g: Any = getattr(model, "global_tokens", None)
    if g is None:
        return 0
    block: Any = model.get_submodule("stage1.block1")
    if type(block) is lightvit.Block:
        block.attention.set_submodule("q_global", forms.ConstantQuery(block.attention.q_global(block.norm(g))))
    elif type(block.token) is NormalTokenModule:
        fuse = block.token.fuse
        fuse.set_submodule("q", forms.ConstantQuery(fuse.q(fuse.mlp(g))))
        fuse.set_submodule("mlp", nn.Identity())
    else:
        block.token.fuse.set_submodule("mlp", forms.ConstantTokens(block.token.fuse.mlp(g)))
    return 1


def constant_resize(model: ImageModel, size: Size | None) -> int:
    """interpolate(X_ga) = R X_ga with a constant R at a fixed size; where the grid is G's own, R = I and goes.

    For any size it stays an interpolation, without the question whether the grid is G's own.
    """
    grid = None if size is None else model.grids(size)[-1]  # every stage pools to that of the last

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, TokenResize)  # noqa: S101
        target = (module.side, module.side)
        if module.side == 0 or grid == target:
            return forms.NoResize()
        if grid is None:
            return forms.AnyResize(module.side)
        return forms.MatrixResize(algebra.resize_matrix(grid, target))

    return _replace(model, TokenResize, make)


def join_queries(model: ImageModel, size: Size | None) -> int:
    """[W_qkv; W_q] x: stage 3 does not downsample, so its two attentions read the same tokens; one product for both."""

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, PositionAwareTokenModule)  # noqa: S101
        aggregate, broadcast = module.aggregate, module.broadcast
        if not isinstance(module.downsample, NoDownsample):
            return None
        joined = _linear(
            torch.cat((aggregate.qkv.weight, broadcast.q.weight)), torch.cat((aggregate.qkv.bias, broadcast.q.bias))
        )
        return forms.JoinedTokenModule(
            module.norm, joined, forms.JoinedAggregation(aggregate.heads, aggregate.scale), module.resize, module.fuse,
            forms.JoinedBroadcast(broadcast.kv, broadcast.proj, broadcast.heads, broadcast.scale),
        )  # fmt: skip

    return _replace(model, PositionAwareTokenModule, make)


def fold_projection(model: ImageModel, size: Size | None) -> int:
    """sum_h P_h (A_h v_h) = sum_h A_h (P_h v_h): the broadcast's output projection goes into its values.

    Shorter where heads * tokens < tokens + C (stage 1), longer elsewhere; a broadcast that `join_queries` took stays.
    """

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, GlobalBroadcast)  # noqa: S101
        k_weight, v_weight = module.kv.weight.chunk(2)
        k_bias, v_bias = module.kv.bias.chunk(2)
        values = algebra.project_values(v_weight, v_bias, module.proj.weight, module.heads)
        return forms.ProjectedBroadcast(
            module.q, _linear(k_weight, k_bias), _linear(*values), module.proj.bias, module.heads, module.scale
        )

    return _replace(model, GlobalBroadcast, make)


def one_hot_partitions(model: ImageModel, size: Size | None) -> int:
    """sum over group k of x_i = (O^T x)_k, and what belongs to token i's group = (O y)_i, with one-hot rows O (N, K).

    Two matrix products for DualFormer's scattered sums and look-ups: nothing depends on the data in its shape.
    """

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, PartitionAttention)  # noqa: S101
        return forms.OneHotPartition(module)

    return _replace(model, PartitionAttention, make)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        function.__name__: Rule(function.__name__, function)
        for function in (
            fold_batch_norm,
            fold_layer_scale,
            fold_attention_scale,
            fold_fusion,
            fold_norm_affine,
            split_bidim,
            reshape_merge,
            constant_tokens,
            constant_resize,
            join_queries,
            fold_projection,
            one_hot_partitions,
        )
    }
)
DEFAULT_RULES = tuple(name for name in RULES if name != "fold_projection")
