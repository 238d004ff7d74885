"""Rules that put another module in the place of one: the same result from fewer or better operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualtoken_deploy.deploy import algebra, forms
from dualtoken_deploy.deploy.folding import share_normalisation
from dualtoken_deploy.deploy.modules import Size, linear, modules_of, replace
from dualtoken_deploy.models import lightvit
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.dualformer import PartitionAttention
from dualtoken_deploy.models.dualtoken_vit import NoDownsample, NormalTokenModule, PositionAwareTokenModule, TokenResize
from dualtoken_deploy.models.layers import BiDimAttention, PatchMerge


def split_bidim(model: ImageModel, size: Size | None) -> int:
    """W [local; global] + b = W_l local + (W_g global + b): the concatenation goes, the second term broadcasts."""

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, BiDimAttention)  # noqa: S101
        select = module.spatial_select
        local, broadcast = algebra.split_columns(select.weight, module.local_reduce.out_features)
        return forms.SplitBiDim(
            module.norm, module.global_reduce, module.local_reduce, module.channel_select,
            linear(local, None), linear(broadcast, select.bias),
        )  # fmt: skip

    return replace(model, BiDimAttention, make)


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
        return forms.ReshapeMerge(norm, linear(weight, module.reduce.bias), module.residual)

    return replace(model, PatchMerge, make)


def constant_tokens(model: ImageModel, size: Size | None) -> int:
    """In the first block G is the learned parameter, so MLP(G) is a constant, or the query q(MLP(G)), or q(LN(G))."""
    g: Any = getattr(model, "global_tokens", None)
    if g is None:
        return 0
    block: Any = model.get_submodule("stage1.block1")
    if type(block) is lightvit.Block:
        query = block.attention.global_query(block.norm(g))
        block.attention.q_global = forms.ConstantQuery(query)
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

    return replace(model, TokenResize, make)


def join_queries(model: ImageModel, size: Size | None) -> int:
    """[W_qkv; W_q] x: stage 3 does not downsample, so its two attentions read the same tokens; one product for both."""

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, PositionAwareTokenModule)  # noqa: S101
        if not isinstance(module.downsample, NoDownsample):
            return None
        share_normalisation(module)  # what they read is the same without the affine of their norms
        aggregate, broadcast = module.aggregate, module.broadcast
        joined = linear(
            torch.cat((aggregate.qkv.weight, broadcast.q.weight)), torch.cat((aggregate.qkv.bias, broadcast.q.bias))
        )
        return forms.JoinedTokenModule(
            module.norm, joined, forms.JoinedAggregation(aggregate.heads, aggregate.scale), module.resize, module.fuse,
            forms.JoinedBroadcast(broadcast.kv, broadcast.proj, broadcast.heads, broadcast.scale),
        )  # fmt: skip

    return replace(model, PositionAwareTokenModule, make)


def own_global_query(model: ImageModel, size: Size | None) -> int:
    """q = (W_qkv g)[:C] = W_q g: the query of LightViT's global tokens as a layer of its own, of qkv's first C rows.

    A slice of a weight is no layer that a quantizer knows.
    """
    attentions = [m for m in modules_of(model, lightvit.BroadcastAttention) if m.q_global is None]
    for attention in attentions:
        qkv, c = attention.qkv, attention.qkv.in_features
        attention.q_global = linear(qkv.weight[:c].clone(), qkv.bias[:c].clone())
    return len(attentions)


def one_hot_partitions(model: ImageModel, size: Size | None) -> int:
    """sum over group k of x_i = (O^T x)_k, and what belongs to token i's group = (O y)_i, with one-hot rows O (N, K).

    Two matrix products for DualFormer's scattered sums and look-ups: nothing depends on the data in its shape.
    """

    def make(module: nn.Module) -> nn.Module | None:
        assert isinstance(module, PartitionAttention)  # noqa: S101
        return forms.OneHotPartition(module)

    return replace(model, PartitionAttention, make)


def pool_by_convolution(model: ImageModel, size: Size | None) -> int:
    """avg2(x) = a depth-wise 2x2 convolution of stride 2 with every weight 1/4, after `fold_pooling` alone.

    A gain and a shift of the average go into its weights and its bias.
    OpenVINO runs it channels-last, as the tokens lie; for its pooling it transposes them there and back.
    """
    folded = 0
    modules: list[Any] = [*modules_of(model, PositionAwareTokenModule), *modules_of(model, NormalTokenModule)]
    for module in modules:
        if isinstance(module.downsample, forms.FoldedDownsample):
            channels = module.norm.normalized_shape[0]
            affine = module.downsample.pool if isinstance(module.downsample.pool, forms.AffinePool) else None
            bias = affine is not None
            pool = nn.Conv2d(channels, channels, 2, stride=2, groups=channels, bias=bias, dtype=torch.float64)
            pool.weight = nn.Parameter(torch.full_like(pool.weight, 0.25), False)
            if affine is not None:
                pool.weight = nn.Parameter(pool.weight * affine.gain[..., None], False)
                pool.bias = nn.Parameter(affine.shift.flatten(), False)
            module.downsample.pool = pool
            folded += 1
    return folded
