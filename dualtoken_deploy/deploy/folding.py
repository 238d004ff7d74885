"""Rules that fold what a layer would do to its input or output into its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from dualtoken_deploy.deploy import algebra, forms
from dualtoken_deploy.deploy.modules import M, Size, linear, modules_of, replace, scale_rows
from dualtoken_deploy.models import lightvit
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.dualformer import Mlp
from dualtoken_deploy.models.dualtoken_vit import (
    AttentionFuse,
    ConvEncoder,
    Downsample,
    Fuse,
    GlobalAggregation,
    GlobalBroadcast,
    MixMlp,
    NormalTokenModule,
    PositionAwareTokenModule,
    TokenMlp,
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
from dualtoken_deploy.models.vim2 import ChannelMixer, Merge, TokenMixer


def fold_batch_norm(model: ImageModel, size: Size | None) -> int:
    """BN(W * x) = (r W) * x + (beta - r mean), r = gamma / sqrt(var + eps): the stem's four normalisations go."""
    for block in modules_of(model, ConvNormAct):
        conv, norm = block.conv, block.norm
        assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018 (for the type checker)
        weight, bias = algebra.norm_into_conv(
            conv.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        )
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        block.set_submodule("norm", nn.Identity())
    return len(modules_of(model, ConvNormAct))


def fold_layer_scale(model: ImageModel, size: Size | None) -> int:
    """gamma (W h + b) = (diag(gamma) W) h + gamma b: layer scale goes into the Conv Encoder's last linear layer."""
    for encoder in modules_of(model, ConvEncoder):
        scale_rows(encoder.pw2, 0, encoder.pw2.out_features, encoder.scale.gamma)
        encoder.set_submodule("scale", nn.Identity())
    return len(modules_of(model, ConvEncoder))


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
            layer = getattr(attention, name)
            if layer is None:  # global tokens whose query is that of the image tokens
                continue
            scale_rows(layer, 0, layer.in_features, attention.scale)
        attention.scale = 1.0
    return len(attentions)


def fold_fusion(model: ImageModel, size: Size | None) -> int:
    """alpha MLP(G) + (1 - alpha) R A v: alpha goes into the MLP's last linear layer, 1 - alpha into v = W x + b.

    Attention weights A and interpolation R are linear in v, so the factor passes through both.
    """
    modules = [m for m in modules_of(model, PositionAwareTokenModule) if type(m.fuse) is Fuse]
    for module in modules:
        fuse = module.fuse
        if not isinstance(fuse, Fuse) or not isinstance(fuse.mlp, TokenMlp | MixMlp):
            continue
        last, qkv = fuse.mlp.fc2, module.aggregate.qkv
        scale_rows(last, 0, last.out_features, fuse.alpha)
        scale_rows(qkv, 2 * qkv.in_features, 3 * qkv.in_features, 1 - fuse.alpha)
        module.set_submodule("fuse", forms.FoldedFuse(fuse.mlp))
    return len(modules)


def fold_norm_affine(model: ImageModel, size: Size | None) -> int:
    """W (gamma z + beta) + b = (W diag(gamma)) z + (W beta + b): LayerNorm's gain and shift go into what reads it.

    Average pooling and the mean over tokens commute with both. A zero-padded convolution or window does not: its
    border would see beta. Windows that do not fill the map keep their affine; in front of the convolution of stage 1's
    downsampling gamma and beta go behind the average. A token module's two norms are one normalisation after that.
    """
    readers: list[tuple[nn.Module, str, list[tuple[nn.Module, str]]]] = []
    for encoder in modules_of(model, ConvEncoder):
        readers.append((encoder, "norm", [(encoder, "pw1")]))
    for ffn in modules_of(model, FeedForward):
        readers.append((ffn, "norm", [(ffn, "fc1")]))
    for bidim in modules_of(model, BiDimAttention):
        readers.append((bidim, "norm", [(bidim, "global_reduce"), (bidim, "local_reduce")]))
    for merge in modules_of(model, PatchMerge):
        readers.append((merge, "norm", [(merge, "reduce")]))
    for token_merge in modules_of(model, TokenMerge):
        readers.append((token_merge, "norm", [(token_merge, "proj")]))
    for mlp in modules_of(model, Mlp):
        readers.append((mlp, "norm", [(mlp, "fc1")]))
    for token_mixer in modules_of(model, TokenMixer):
        readers.append((token_mixer, "norm", [(token_mixer, "expand")]))
        readers.append((token_mixer, "norm_out", [(token_mixer, "project")]))
    for channel_mixer in modules_of(model, ChannelMixer):
        readers.append((channel_mixer, "norm", [(channel_mixer, "enter")]))
        readers.append((channel_mixer, "norm_out", [(channel_mixer, "leave")]))
    for swin_merge in modules_of(model, Merge):
        readers.append((swin_merge, "norm", [(swin_merge, "reduce")]))
    for head in modules_of(model, ClassifierHead):
        readers.append((head, "norm", [(head, "neck")]))
    for pooled in modules_of(model, PooledHead):
        readers.append((pooled, "norm", [(pooled, "fc")]))
    for window, grid in _on_grids(model, size, WindowAttention):
        if _fills(grid, window.window):
            readers.append((window, "norm", [(window, "qkv")]))
    for block, grid in _on_grids(model, size, lightvit.Block):
        if _fills(grid, block.attention.window):
            names = ("qkv",) if block.attention.q_global is None else ("qkv", "q_global")
            readers.append((block, "norm", [(block.attention, name) for name in names]))
    for owner, name, layers in readers:
        _move_affine(owner, name, layers)
    tokens: list[Any] = [*modules_of(model, PositionAwareTokenModule), *modules_of(model, NormalTokenModule)]
    for module in tokens:
        share_normalisation(module)
    return len(readers) + len(tokens)


def share_normalisation(module: Any) -> None:
    """norm goes into the image tokens' query, norm_g into what makes the global tokens: the same is left of both.

    `module`: a PositionAwareTokenModule or a NormalTokenModule; nothing where it was done before.
    """
    norm, norm_g = module.norm, module.norm_g or module.norm
    if not norm.elementwise_affine:  # done
        return
    module.broadcast.q = _folded(module.broadcast.q, norm)
    convs = getattr(module.downsample, "convs", ())
    if len(convs):
        module.downsample.pool = forms.AffinePool(norm_g.weight, norm_g.bias)
    elif module.aggregate is None:
        module.fuse.kv = _folded(module.fuse.kv, norm_g)
    else:
        module.aggregate.qkv = _folded(module.aggregate.qkv, norm_g)
    module.norm = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    module.norm_g = None


def _folded(layer: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    return linear(*algebra.affine_into_linear(layer.weight, layer.bias, norm.weight, norm.bias))


def _on_grids(model: ImageModel, size: Size | None, kind: type[M]) -> list[tuple[M, Size | None]]:
    """Every module of that very type with the (rows, columns) of its stage's map."""
    grids = [None] * len(model.strides) if size is None else model.grids(size)
    return [
        (module, grid)
        for stage, grid in enumerate(grids, 1)
        for module in modules_of(model.get_submodule(f"stage{stage}"), kind)
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
        module.set_submodule(attribute, linear(*folded))
    plain = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    owner.set_submodule(name, plain)


def fold_pooling(model: ImageModel, size: Size | None) -> int:
    """avg2(W * x + b) = W' * x + b: a 3x3 convolution and the 2x2 average after it are one 4x4 convolution of stride 2.

    Each output reads 16 inputs instead of four times nine: 4/9 of the MACs.
    """

    def make(module: nn.Module) -> nn.Module:
        assert isinstance(module, Downsample)  # noqa: S101
        return forms.FoldedDownsample(module.pool, [_pooled(conv) for conv in module.convs])

    return replace(model, Downsample, make)


def _pooled(conv: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)  # noqa: S101
    kernel = algebra.pooled_kernel(conv.weight)
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1, dtype=kernel.dtype)
    made.weight, made.bias = nn.Parameter(kernel, False), conv.bias
    return made


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
            module.q, linear(k_weight, k_bias), linear(*values), module.proj.bias, module.heads, module.scale
        )

    return replace(model, GlobalBroadcast, make)
