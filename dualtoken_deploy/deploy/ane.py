"""The deploy form as Apple's Neural Engine prefers it: tokens are (B, C, 1, S), linear layers 1x1 convolutions.

Rules of one target, applied together behind those of rewrite.py: each module is replaced by one that computes the same
over transposed tokens, so that a map is a reshape away and nothing is permuted between layers. Exact: weights are
reordered, never changed. Source of the habits: Apple's "Deploying Transformers on the Apple Neural Engine" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.deploy import forms
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models import dualtoken_vit as vit
from dualtoken_deploy.models import layers
from dualtoken_deploy.models.layers import Grid

LAYOUTS = ("ane", "plain")


@torch.library.custom_op("dualtoken::channel_norm", mutates_args=())
def channel_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the channels of (B, C, ...). An operation of its own, so that a converter keeps it whole."""
    shape = (1, -1, *(1,) * (x.ndim - 2))
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    out = (x - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


@channel_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def to_ane_layout(module: nn.Module, whole_attention: bool) -> int:
    """Rewrites a deploy form in place to (B, C, 1, S) tokens; returns how many modules it replaced.

    `whole_attention`: attention stays one operation over (B, heads, S, d); otherwise it is two products that read the
    transposed tokens as they are. Raises UsageError on a module that has no such form.
    """
    count = 0
    for name, child in list(module.named_modules()):
        make = REPLACEMENTS.get(type(child))
        if make is not None:
            module.set_submodule(name, make(child, whole_attention))
            count += 1
        elif type(child) in UNFOLDED:
            raise UsageError(
                f"the ane layout needs the default deploy rules; {type(child).__name__} is left of the model"
            )
    count += _replace_leaves(module)
    tokens = getattr(module, "global_tokens", None)
    if tokens is not None:
        module.register_parameter("global_tokens", nn.Parameter(_turned(tokens), requires_grad=False))
    return count


def _replace_leaves(module: nn.Module) -> int:
    """Linear layers over channels become 1x1 convolutions, LayerNorms normalise the channel axis."""
    count = 0
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear:
            module.set_submodule(name, pointwise(child))
        elif type(child) is nn.LayerNorm:
            module.set_submodule(name, ChannelNorm(child))
        else:
            continue
        count += 1
    return count


def _turned(tokens: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, 1, N)."""
    return tokens.detach().transpose(1, 2).unsqueeze(2).contiguous()


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, C, 1, H*W) -> (B, C, H, W): a reshape and no transpose."""
    return x.reshape(x.shape[0], x.shape[1], *grid)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, H*W)."""
    return x.reshape(x.shape[0], x.shape[1], 1, -1)


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """W x + b over channels as a 1x1 convolution."""
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, dtype=layer.weight.dtype)
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].clone(), requires_grad=False)
    if layer.bias is not None and conv.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return conv


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, whole: bool, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + bias) v. q (B, C, W, N), k and v (B, C, W, n), W windows -> (B, C, W, N)."""
    (b, c, windows, n), d = q.shape, q.shape[1] // heads
    # (B, heads, d, N) for the one window of all tokens, else (B, heads, W, d, N): never more than five axes
    q, k, v = (
        t.reshape(b, heads, d, t.shape[3])
        if windows == 1
        else t.reshape(b, heads, d, windows, t.shape[3]).transpose(2, 3)
        for t in (q, k, v)
    )
    if whole:
        q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(-1, -2)
    else:
        scores = torch.matmul(q.transpose(-1, -2), k)  # (..., N, n)
        scores = scores if scale == 1.0 else scores * scale
        scores = scores if bias is None else scores + bias
        out = torch.matmul(v, scores.softmax(dim=-1).transpose(-1, -2))  # (..., d, N)
    out = out if windows == 1 else out.transpose(2, 3)
    return out.reshape(b, c, windows, n)


class ChannelNorm(nn.Module):
    """LayerNorm of tokens, over (B, C, 1, S)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = channel_norm(x, self.weight, self.bias, self.eps)
        return out


class AneStem(nn.Module):
    """Stem: (B, 3, H, W) -> (B, C, 1, H/8 * W/8)."""

    def __init__(self, stem: layers.Stem, _: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = stem.conv1, stem.conv2, stem.conv3, stem.conv4
        self.proj, self.norm = stem.proj, stem.norm

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv4(self.conv3(self.conv2(self.conv1(image))))
        out: Tensor = self.norm(to_tokens(self.proj(x)))
        return out


class AneConvEncoder(nn.Module):
    """ConvEncoder whose layer scale lies in its last layer."""

    def __init__(self, encoder: vit.ConvEncoder, _: bool) -> None:
        super().__init__()
        if not isinstance(encoder.scale, nn.Identity):
            raise UsageError("the ane layout needs the deploy rule fold_layer_scale")
        self.dw, self.norm, self.pw1, self.pw2 = encoder.dw, encoder.norm, encoder.pw1, encoder.pw2

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        z = to_tokens(self.dw(to_map(x, grid)))
        out: Tensor = x + self.pw2(F.gelu(self.pw1(self.norm(z))))
        return out


class AneWindowAttention(nn.Module):
    """WindowAttention: windows are the third axis of (B, C, windows, tokens)."""

    bias: Tensor

    def __init__(self, source: vit.WindowAttention, whole: bool) -> None:
        super().__init__()
        self.heads, self.window, self.scale, self.whole = source.heads, source.window, source.scale, whole
        self.norm, self.qkv = source.norm, source.qkv
        self.register_buffer("bias", source.bias().detach()[:, None])  # (heads, 1, T, T)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (b, c, _, _), (h, w), s = x.shape, grid, self.window
        z = F.pad(to_map(self.norm(x), grid), (0, -w % s, 0, -h % s))
        rows, cols = z.shape[2] // s, z.shape[3] // s
        z = z.reshape(b * c, rows, s, cols, s).transpose(2, 3).reshape(b, c, rows * cols, s * s)
        q, k, v = self.qkv(z).chunk(3, dim=1)
        # one window has no axis of its own in attention()
        bias = self.bias if rows * cols > 1 else self.bias[:, 0]
        z = attention(q, k, v, self.heads, self.scale, self.whole, bias)
        z = z.reshape(b * c, rows, cols, s, s).transpose(2, 3).reshape(b, c, rows * s, cols * s)
        return x + to_tokens(z[:, :, :h, :w])


class AneDownsample(nn.Module):
    """FoldedDownsample: an average, then convolutions of stride 2."""

    def __init__(self, source: forms.FoldedDownsample, _: bool) -> None:
        super().__init__()
        self.pool, self.convs = source.pool, source.convs

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.pool(to_map(x, grid))
        for conv in self.convs:
            x = conv(x)
        return to_tokens(x)


class AneOneStepDownsample(nn.Module):
    def __init__(self, source: vit.OneStepDownsample, _: bool) -> None:
        super().__init__()
        self.factor = source.factor

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return to_tokens(F.avg_pool2d(to_map(x, grid), self.factor, self.factor))


class AneAggregation(nn.Module):
    """GlobalAggregation over (B, C, 1, S)."""

    def __init__(self, source: vit.GlobalAggregation, whole: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.whole, self.qkv = source.heads, source.scale, whole, source.qkv

    def forward(self, x_ds: Tensor) -> Tensor:
        q, k, v = self.qkv(x_ds).chunk(3, dim=1)
        return attention(q, k, v, self.heads, self.scale, self.whole)


class AneBroadcast(nn.Module):
    """GlobalBroadcast: (B, C, 1, S), (B, C, 1, n) -> (B, C, 1, S)."""

    def __init__(self, source: vit.GlobalBroadcast, whole: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.whole = source.heads, source.scale, whole
        self.q, self.kv, self.proj = source.q, source.kv, source.proj

    def forward(self, x: Tensor, g_new: Tensor) -> Tensor:
        k, v = self.kv(g_new).chunk(2, dim=1)
        out: Tensor = self.proj(attention(self.q(x), k, v, self.heads, self.scale, self.whole))
        return out


class AneJoinedAggregation(nn.Module):
    """JoinedAggregation over (B, C, 1, S)."""

    def __init__(self, source: forms.JoinedAggregation, whole: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.whole = source.heads, source.scale, whole

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.heads, self.scale, self.whole)


class AneJoinedBroadcast(nn.Module):
    """JoinedBroadcast: (B, C, 1, S), (B, C, 1, n) -> (B, C, 1, S)."""

    def __init__(self, source: forms.JoinedBroadcast, whole: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.whole = source.heads, source.scale, whole
        self.kv, self.proj = source.kv, source.proj

    def forward(self, q: Tensor, g_new: Tensor) -> Tensor:
        k, v = self.kv(g_new).chunk(2, dim=1)
        out: Tensor = self.proj(attention(q, k, v, self.heads, self.scale, self.whole))
        return out


class AneJoinedTokenModule(nn.Module):
    """JoinedTokenModule over (B, C, 1, S)."""

    def __init__(self, source: forms.JoinedTokenModule, _: bool) -> None:
        super().__init__()
        self.norm, self.qkvq, self.resize, self.fuse = source.norm, source.qkvq, source.resize, source.fuse
        self.aggregate, self.broadcast = source.aggregate, source.broadcast  # replaced by themselves

    def forward(self, x_local: Tensor, g: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        q, k, v, q_image = self.qkvq(self.norm(x_local)).chunk(4, dim=1)
        x_ga = self.resize(self.aggregate(q, k, v), grid)
        g_new = x_ga if self.fuse is None else self.fuse(g, x_ga)
        return self.broadcast(q_image, g_new), g_new


class AneMatrixResize(nn.Module):
    """MatrixResize: X' = X R^T over the token axis."""

    matrix: Tensor

    def __init__(self, source: forms.MatrixResize, _: bool) -> None:
        super().__init__()
        self.register_buffer("matrix", source.matrix)

    def forward(self, x_ga: Tensor, grid: Grid) -> Tensor:
        return F.linear(x_ga, self.matrix)


class TokenLinear(nn.Module):
    """A linear layer over the token axis, which is the last one here."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class AneMixMlp(nn.Module):
    """MixMlp without its transposes."""

    def __init__(self, source: vit.MixMlp, _: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = source.fc1, TokenLinear(source.fc2)

    def forward(self, g: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(g))
        return out


class AneConstantTokens(nn.Module):
    value: Tensor

    def __init__(self, source: forms.ConstantTokens, _: bool) -> None:
        super().__init__()
        self.register_buffer("value", _turned(source.value))

    def forward(self, _: Tensor) -> Tensor:
        return self.value


class AneBiDim(nn.Module):
    """SplitBiDim over (B, C, 1, S)."""

    def __init__(self, source: forms.SplitBiDim, _: bool) -> None:
        super().__init__()
        self.norm = source.norm
        self.global_reduce, self.local_reduce = source.global_reduce, source.local_reduce
        self.channel_select = source.channel_select
        self.spatial_local, self.spatial_global = source.spatial_local, source.spatial_global

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        x_global = F.gelu(self.global_reduce(z.mean(3, keepdim=True)))  # (B, C/r, 1, 1)
        x_local = F.gelu(self.local_reduce(z))  # (B, C/r, 1, S)
        c_attn = torch.sigmoid(self.channel_select(x_global))  # (B, C, 1, 1)
        s_attn = torch.sigmoid(self.spatial_local(x_local) + self.spatial_global(x_global))  # (B, 1, 1, S)
        return x * c_attn * s_attn


class AneMerge(nn.Module):
    """ReshapeMerge: space-to-depth puts a channel's four patch elements side by side, the weights follow."""

    def __init__(self, source: forms.ReshapeMerge, _: bool) -> None:
        super().__init__()
        norm, reduce = source.norm, source.reduce
        if norm.elementwise_affine:
            raise UsageError("the ane layout needs the deploy rule fold_norm_affine")
        channels = reduce.in_features // 4
        order = torch.arange(4 * channels).reshape(4, channels).T.flatten()  # old column of each new one
        self.norm, self.residual = norm, source.residual
        self.reduce = nn.Linear(reduce.in_features, reduce.out_features, dtype=reduce.weight.dtype)
        self.reduce.weight = nn.Parameter(reduce.weight.detach()[:, order].clone(), requires_grad=False)
        self.reduce.bias = reduce.bias

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        rows = to_map(x, grid)
        patches = to_tokens(F.pixel_unshuffle(rows, 2))  # (B, 4C, 1, S/4)
        pooled = to_tokens(F.max_pool2d(rows, kernel_size=2, stride=2))
        out: Tensor = self.reduce(self.norm(patches)) + self.residual(pooled)
        return out


class AneHead(nn.Module):
    """ClassifierHead: (B, C, 1, S) -> (B, classes)."""

    def __init__(self, head: layers.ClassifierHead, _: bool) -> None:
        super().__init__()
        self.norm, self.neck, self.neck_norm, self.fc = head.norm, head.neck, head.neck_norm, head.fc

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.neck_norm(self.neck(self.norm(x))))
        return cast(Tensor, self.fc(x.mean(3, keepdim=True))).flatten(1)


REPLACEMENTS: MappingProxyType[type[nn.Module], Callable[[Any, bool], nn.Module]] = MappingProxyType(
    {
        layers.Stem: AneStem,
        vit.ConvEncoder: AneConvEncoder,
        vit.WindowAttention: AneWindowAttention,
        forms.FoldedDownsample: AneDownsample,
        vit.OneStepDownsample: AneOneStepDownsample,
        vit.GlobalAggregation: AneAggregation,
        vit.GlobalBroadcast: AneBroadcast,
        forms.JoinedTokenModule: AneJoinedTokenModule,
        forms.JoinedAggregation: AneJoinedAggregation,
        forms.JoinedBroadcast: AneJoinedBroadcast,
        forms.MatrixResize: AneMatrixResize,
        vit.MixMlp: AneMixMlp,
        forms.ConstantTokens: AneConstantTokens,
        forms.SplitBiDim: AneBiDim,
        forms.ReshapeMerge: AneMerge,
        layers.ClassifierHead: AneHead,
    }
)
# Modules that the default rules take away, and that have no form here.
UNFOLDED = (
    layers.BiDimAttention,
    layers.PatchMerge,
    vit.TokenResize,
    vit.Fuse,
    vit.Downsample,
    forms.ProjectedBroadcast,
)
