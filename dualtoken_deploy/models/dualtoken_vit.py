"""DualToken-ViT: position-aware efficient vision transformer with dual token fusion (arXiv:2309.12424).

The whole model, to be read from top to bottom; equation numbers are the paper's, as are the symbols. Sizes that
the paper leaves open are those that reproduce every parameter count it prints (docs/model.md). Image tokens X are
(B, N, C) with N = H * W in row-major order, and `grid` is (H, W); the position-aware global tokens G are (B, n*n, C).
Nothing here knows of deployment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.base import ImageModel, drop_path_rates, init_weights
from dualtoken_deploy.models.layers import (
    ClassifierHead,
    DropPath,
    FeedForward,
    Grid,
    LayerScale,
    PatchMerge,
    Stem,
    TokenMerge,
    crop_to_grid,
    from_windows,
    merge_heads,
    pad_to_windows,
    relative_index,
    split_heads,
    to_map,
    to_tokens,
    to_windows,
)


@dataclass(frozen=True)
class DualTokenConfig:
    """Sizes and options of one DualToken-ViT. Tuples have one entry a stage (Table 1)."""

    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    heads: tuple[int, int, int] = (2, 4, 8)
    ffn_ratio: tuple[int, int, int] = (8, 4, 4)
    conv_kernel: tuple[int, int, int] = (5, 7, 0)  # Conv Encoder's depth-wise kernel; stage 3 has no Conv Encoder
    global_tokens: int = 7  # side n of the n x n grid; 0: none (Table 7); "normal" ones: their number
    token_method: str = "position-aware"  # or "normal", "normal-star" (Figure 3 (c), (d), Table 6)
    downsampling: str = "stepwise"  # or "onestep" (Table 9)
    local_attention: str = "conv"  # or "window" (Table 8)
    token_mlp: str = "mlp"  # or "mix" (eq. 3.8, 3.9)
    alpha: float = 0.1  # weight of G in the fusion (eq. 3.7)
    window: int = 7
    drop_path: float = 0.0
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)  # (H, W) that export uses; eager takes any size >= 64


class ConvEncoder(nn.Module):
    """Local attention by convolution, a ConvNeXt block with its residual (eq. 3.1)."""

    def __init__(self, channels: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pw1 = nn.Linear(channels, 4 * channels)
        self.pw2 = nn.Linear(4 * channels, channels)
        self.scale = LayerScale(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        z = to_tokens(self.dw(to_map(x, grid)))  # (B, N, C)
        z = self.pw2(F.gelu(self.pw1(self.norm(z))))
        out: Tensor = x + self.drop_path(self.scale(z))
        return out


class WindowAttention(nn.Module):
    """Local attention within windows, with a relative position bias and the residual (Table 8's ablation)."""

    relative_index: Tensor

    def __init__(self, channels: int, heads: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (channels // heads) ** -0.5
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.drop_path = DropPath(drop_path)
        self.register_buffer("relative_index", relative_index(window), persistent=False)

    def bias(self) -> Tensor:
        """Relative position bias, (heads, T, T)."""
        return self.position_bias[self.relative_index].permute(2, 0, 1)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        z, padded = pad_to_windows(self.norm(x), grid, self.window)
        z = to_windows(z, padded, self.window)  # (B * windows, T, C)
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(z).chunk(3, dim=-1))
        z = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(), scale=self.scale))
        z = crop_to_grid(from_windows(z, padded, self.window), padded, grid)
        out: Tensor = x + self.drop_path(z)
        return out


class Downsample(nn.Module):
    """Step-wise downsampling (eq. 3.2), steps + 1 halvings of both sides: (B, N, C) -> (B, N/4^(steps+1), C)."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.pool: nn.Module = nn.AvgPool2d(2)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(steps))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.pool(to_map(x, grid))
        for conv in self.convs:
            x = F.avg_pool2d(conv(x), kernel_size=2, stride=2)
        return to_tokens(x)


class OneStepDownsample(nn.Module):
    """One average pooling by `factor` (Table 9's ablation). (B, N, C) -> (B, N/factor^2, C)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return to_tokens(F.avg_pool2d(to_map(x, grid), self.factor, self.factor))


class NoDownsample(nn.Module):
    """Stage 3 is on the stride-32 grid already."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return x


class NoLocal(nn.Module):
    """Stage 3 has no local attention: there X_local = X."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return x


class GlobalAggregation(nn.Module):
    """Multi-head self-attention over the pooled tokens (eq. 3.3), without output projection. (B, h*w, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x_ds: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x_ds).chunk(3, dim=-1))
        return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))


class TokenResize(nn.Module):
    """Brings X_ga to the grid of G (end of section 3.3): (B, h*w, C) -> (B, n*n, C), bilinear; n = 0 keeps h*w."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x_ga: Tensor, grid: Grid) -> Tensor:
        target = (self.side, self.side)
        if self.side == 0 or grid == target:
            return x_ga
        return to_tokens(F.interpolate(to_map(x_ga, grid), target, mode="bilinear", align_corners=False))


class TokenMlp(nn.Module):
    """MLP over channels (eq. 3.8). (B, n*n, C)."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, g: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(g)))
        return out


class MixMlp(nn.Module):
    """MLP over channels, then over tokens, without activation (eq. 3.9). (B, n*n, C)."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(tokens, tokens)

    def forward(self, g: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(g).transpose(1, 2)).transpose(1, 2)
        return out


TOKEN_MLPS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": TokenMlp, "mix": MixMlp}


class Fuse(nn.Module):
    """Position-aware fusion: G_new = alpha MLP(G) + (1 - alpha) X_ga (eq. 3.7). Both (B, n*n, C)."""

    def __init__(self, mlp: nn.Module, alpha: float) -> None:
        super().__init__()
        self.mlp, self.alpha = mlp, alpha

    def forward(self, g: Tensor, x_ga: Tensor) -> Tensor:
        out: Tensor = self.alpha * self.mlp(g) + (1 - self.alpha) * x_ga
        return out


class AttentionFuse(nn.Module):
    """Fusion by multi-head attention: MLP(G) (B, T, C) reads X (B, N, C) (Figure 3 (c), (d)). (B, T, C)."""

    def __init__(self, mlp: nn.Module, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.mlp = mlp
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        q = split_heads(self.q(self.mlp(g)), self.heads)  # (B, heads, T, d)
        k, v = (split_heads(t, self.heads) for t in self.kv(x).chunk(2, dim=-1))  # (B, heads, N, d)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))


class GlobalBroadcast(nn.Module):
    """Image tokens read G_new by multi-head attention (eq. 3.5). (B, N, C), (B, n*n, C) -> (B, N, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, g_new: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.heads)  # (B, heads, N, d)
        k, v = (split_heads(t, self.heads) for t in self.kv(g_new).chunk(2, dim=-1))  # (B, heads, n*n, d)
        out: Tensor = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))
        return out


class PositionAwareTokenModule(nn.Module):
    """Downsampling, Global Aggregation, fusion with G, Global Broadcast (section 3.1 (1)-(4), Figure 3b).

    What goes into the global tokens has a LayerNorm of its own, and so have the image tokens that read them: with two,
    2C more a block than with one, every row of the paper's tables agrees to the printed digit (docs/model.md). Without
    global tokens there is one.
    """

    def __init__(self, config: DualTokenConfig, stage: int) -> None:
        super().__init__()
        channels, heads, side = config.channels[stage], config.heads[stage], config.global_tokens
        self.norm = nn.LayerNorm(channels)
        self.norm_g = nn.LayerNorm(channels) if side else None
        self.factor = 2 ** (2 - stage)  # strides 8, 16, 32 against the stride-32 grid
        self.downsample = make_downsample(config, stage)
        self.aggregate = GlobalAggregation(channels, heads)
        self.resize = TokenResize(side)
        self.fuse = Fuse(TOKEN_MLPS[config.token_mlp](channels, side * side), config.alpha) if side else None
        self.broadcast = GlobalBroadcast(channels, heads)

    def forward(self, x_local: Tensor, g: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.norm(x_local)
        source = x if self.norm_g is None else self.norm_g(x_local)
        pooled = grid[0] // self.factor, grid[1] // self.factor
        x_ga = self.resize(self.aggregate(self.downsample(source, grid)), pooled)  # (B, n*n, C)
        g_new = x_ga if self.fuse is None else self.fuse(g, x_ga)
        return self.broadcast(x, g_new), g_new


class NormalTokenModule(nn.Module):
    """Table 6's other ways: T global tokens without a place attend to X ("normal") or to X_ga ("normal-star").

    "normal" keeps Global Aggregation in stage 3, where nothing else lets image tokens see each other: with it the
    paper's parameters and FLOPs come out, without it neither does.
    """

    def __init__(self, config: DualTokenConfig, stage: int) -> None:
        super().__init__()
        channels, heads = config.channels[stage], config.heads[stage]
        aggregates = config.token_method == "normal-star" or stage == 2
        self.norm = nn.LayerNorm(channels)
        self.norm_g: nn.LayerNorm | None = nn.LayerNorm(channels)
        self.downsample = make_downsample(config, stage) if aggregates else NoDownsample()
        self.aggregate = GlobalAggregation(channels, heads) if aggregates else None
        mlp = TOKEN_MLPS[config.token_mlp](channels, config.global_tokens)
        self.fuse = AttentionFuse(mlp, channels, heads)
        self.broadcast = GlobalBroadcast(channels, heads)

    def forward(self, x_local: Tensor, g: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.norm(x_local)
        source = x if self.norm_g is None else self.norm_g(x_local)
        if self.aggregate is not None:
            source = self.aggregate(self.downsample(source, grid))
        g_new = self.fuse(g, source)  # (B, T, C)
        return self.broadcast(x, g_new), g_new


def make_token_module(config: DualTokenConfig, stage: int) -> nn.Module:
    if config.token_method == "position-aware":
        return PositionAwareTokenModule(config, stage)
    return NormalTokenModule(config, stage)


def make_downsample(config: DualTokenConfig, stage: int) -> nn.Module:
    """The way from a stage's grid to the stride-32 grid: strides 8, 16, 32 leave 2, 1, 0 halvings."""
    halvings = 2 - stage
    if halvings == 0:
        return NoDownsample()
    if config.downsampling == "onestep":
        return OneStepDownsample(2**halvings)
    return Downsample(config.channels[stage], steps=halvings - 1)


def make_local(config: DualTokenConfig, stage: int, drop_path: float) -> nn.Module:
    if stage == 2:
        return NoLocal()
    if config.local_attention == "window":
        return WindowAttention(config.channels[stage], config.heads[stage], config.window, drop_path)
    return ConvEncoder(config.channels[stage], config.conv_kernel[stage], drop_path)


class Block(nn.Module):
    """Dual Token Block (Figure 2): local attention, token module, fusion (eq. 3.6), feed-forward with BiDim."""

    def __init__(self, config: DualTokenConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        self.local = make_local(config, stage, drop_path)
        self.token = make_token_module(config, stage)
        self.ffn = FeedForward(config.channels[stage], config.ffn_ratio[stage])
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, g: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        x_local = self.local(x, grid)  # (B, N, C)
        x_global, g_new = self.token(x_local, g, grid)
        x = x_local + self.drop_path(x_global)  # eq. 3.6
        x = x + self.drop_path(self.ffn(x))
        return x, None if g is None else g + g_new  # "after adding the identical mapping"


class DualTokenViT(ImageModel):
    """DualToken-ViT; stages of strides 8, 16 and 32."""

    strides = (8, 16, 32)
    config: DualTokenConfig

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.config = config
        c1, _, c3 = config.channels
        self.stem = Stem(c1)
        n = config.global_tokens ** (2 if config.token_method == "position-aware" else 1)
        self.global_tokens = nn.Parameter(torch.empty(1, n, c1)) if n else None
        for stage, rates in enumerate(drop_path_rates(config.drop_path, config.blocks)):
            blocks = [Block(config, stage, rate) for rate in rates]
            names = {f"block{i}": block for i, block in enumerate(blocks, 1)}
            self.add_module(f"stage{stage + 1}", nn.ModuleDict(names))
            if stage < 2:
                here, there = config.channels[stage], config.channels[stage + 1]
                self.add_module(f"merge{stage + 1}", PatchMerge(here, there))
                if n:
                    self.add_module(f"token_merge{stage + 1}", TokenMerge(here, there))
        self.head = ClassifierHead(c3, config.num_classes)
        self.apply(init_weights)
        if self.global_tokens is not None:
            nn.init.trunc_normal_(self.global_tokens, std=0.02)

    def stages(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Tokens and grid at the end of each stage: (B, N, C1) of stride 8, (B, N/4, C2) of 16, (B, N/16, C3) of 32."""
        image = self.pad(image)
        grid = image.shape[2] // 8, image.shape[3] // 8
        x = self.stem(image)  # (B, N, C1)
        g: Tensor | None = self.global_tokens  # (1, n*n, C1), broadcast over the batch by the first fusion's sum
        if g is not None and self.config.token_method != "position-aware":  # attention does not broadcast
            g = g.expand(x.shape[0], -1, -1)
        ends: list[tuple[Tensor, Grid]] = []
        for stage in (1, 2, 3):
            for block in self.get_submodule(f"stage{stage}").children():
                x, g = block(x, g, grid)
            ends.append((x, grid))
            if stage < 3:
                x = self.get_submodule(f"merge{stage}")(x, grid)
                g = None if g is None else self.get_submodule(f"token_merge{stage}")(g)
                grid = grid[0] // 2, grid[1] // 2
        return ends


# Table 1. T and S differ in channels and in the blocks of stage 3; "mix" takes MixMLP for MLP.
T = DualTokenConfig(channels=(48, 96, 192), blocks=(2, 6, 4))
S = DualTokenConfig(channels=(64, 128, 256), blocks=(2, 6, 6))
