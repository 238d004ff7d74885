"""LightViT: light-weight convolution-free vision transformers (arXiv:2207.05557).

The whole model, to be read from top to bottom; equation and section numbers are the paper's. Image tokens X are
(B, N, C) with N = H * W in row-major order, `grid` is (H, W); global tokens G are (B, T, C) and lie in front of X along
the token axis (the (c) of Figure 3), so that one LayerNorm and one feed-forward network take both.
The paper's appendix and the authors' code (hunto/LightViT) differ; `form` says which one a model follows: "published",
for which weights exist, or "appendix". docs/models-family.md says what else was left to choose.
"""

from __future__ import annotations

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
    PatchMerge,
    Stem,
    TokenMerge,
    crop_to_grid,
    from_windows,
    merge_heads,
    pad_to_windows,
    relative_index,
    split_heads,
    to_windows,
)

FORMS = ("published", "appendix")
PUBLISHED_EPS = 1e-6  # of the LayerNorms in blocks and before the neck; stem, BiDim, merges and neck have torch's 1e-5


@dataclass(frozen=True)
class LightViTConfig:
    """Sizes and options of one LightViT. Tuples have one entry a stage (Table 1)."""

    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    heads: tuple[int, int, int]
    global_tokens: int  # T, a number and not a side: they have no place in the image (Table 6)
    ffn_ratio: tuple[int, int, int] = (8, 4, 4)
    window: int = 7
    neck: int = 1280  # width in front of the classes
    form: str = "published"  # or "appendix" (the pseudo-code of 7.3)
    drop_path: float = 0.0
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)  # (H, W) that export uses; eager takes any size >= 64


class BroadcastAttention(nn.Module):
    """Aggregated self-attention with local-global broadcast (section 3.1, Figure 6). X (B, N, C), G (B, T, C).

    Published: global tokens have the image tokens' query, and what comes out is projected. Appendix: they have a query
    of their own, and nothing is projected. Both have the same number of parameters.
    """

    relative_index: Tensor

    def __init__(self, channels: int, heads: int, window: int, form: str = "published") -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_global: nn.Module | None = nn.Linear(channels, channels) if form == "appendix" else None
        self.proj = nn.Linear(channels, channels) if form == "published" else None
        self.kv_global = nn.Linear(channels, 2 * channels)
        self.position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_index", relative_index(window), persistent=False)

    def bias(self) -> Tensor:
        """Relative position bias of the windows, (heads, S*S, S*S)."""
        return self.position_bias[self.relative_index].permute(2, 0, 1)

    def forward(self, x: Tensor, g: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        z, padded = pad_to_windows(x, grid, self.window)
        qkv = self.qkv(z)  # (B, N', 3C), N' >= N where windows do not fill the map
        local = crop_to_grid(self.local(qkv, padded), padded, grid)  # eq. 1
        q, k, v = (split_heads(t, self.heads) for t in crop_to_grid(qkv, padded, grid).chunk(3, dim=-1))
        g_q = split_heads(self.global_query(g), self.heads)  # (B, heads, T, d)
        g_new = merge_heads(F.scaled_dot_product_attention(g_q, k, v, scale=self.scale))  # eq. 2
        g_k, g_v = (split_heads(t, self.heads) for t in self.kv_global(g_new).chunk(2, dim=-1))
        broadcast = merge_heads(F.scaled_dot_product_attention(q, g_k, g_v, scale=self.scale))  # eq. 3
        x_new = local + broadcast  # eq. 4
        return (x_new, g_new) if self.proj is None else (self.proj(x_new), self.proj(g_new))

    def global_query(self, g: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.q_global is not None:
            out: Tensor = self.q_global(g)
            return out
        c = self.qkv.in_features
        return F.linear(g, self.qkv.weight[:c], self.qkv.bias[:c])

    def local(self, qkv: Tensor, grid: Grid) -> Tensor:
        """Self-attention within windows: (B, N', 3C) -> (B, N', C)."""
        z = to_windows(qkv, grid, self.window)  # (B * windows, S*S, 3C)
        q, k, v = (split_heads(t, self.heads) for t in z.chunk(3, dim=-1))
        z = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(), scale=self.scale))
        return from_windows(z, grid, self.window)


class Block(nn.Module):
    """LightViT block (Figure 3): both tokens through attention and through the feed-forward network. (B, T+N, C)."""

    def __init__(self, config: LightViTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.channels[stage]
        self.tokens = config.global_tokens
        self.norm = nn.LayerNorm(channels)
        self.attention = BroadcastAttention(channels, config.heads[stage], config.window, config.form)
        self.ffn = FeedForward(channels, config.ffn_ratio[stage])
        if config.form == "published":
            self.norm.eps = self.ffn.norm.eps = PUBLISHED_EPS
        self.drop_path = DropPath(drop_path)

    def forward(self, y: Tensor, grid: Grid) -> Tensor:
        z = self.norm(y)
        x, g = self.attention(z[:, self.tokens :], z[:, : self.tokens], grid)
        y = y + self.drop_path(torch.cat((g, x), dim=1))
        out: Tensor = y + self.drop_path(self.ffn(y))
        return out


class LightViT(ImageModel):
    """LightViT; stages of strides 8, 16 and 32."""

    strides = (8, 16, 32)
    config: LightViTConfig

    def __init__(self, config: LightViTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.global_tokens
        self.stem = Stem(config.channels[0])
        self.global_tokens = nn.Parameter(torch.empty(1, config.global_tokens, config.channels[0]))
        for stage, rates in enumerate(drop_path_rates(config.drop_path, config.blocks)):
            blocks = [Block(config, stage, rate) for rate in rates]
            self.add_module(f"stage{stage + 1}", nn.ModuleDict({f"block{i}": b for i, b in enumerate(blocks, 1)}))
            if stage < 2:
                here, there = config.channels[stage], config.channels[stage + 1]
                self.add_module(f"merge{stage + 1}", PatchMerge(here, there))
                self.add_module(f"token_merge{stage + 1}", TokenMerge(here, there))
        self.head = ClassifierHead(config.channels[2], config.num_classes, config.neck)
        if config.form == "published":
            self.head.norm.eps = PUBLISHED_EPS
        self.apply(init_weights)
        nn.init.trunc_normal_(self.global_tokens, std=0.02)

    def stages(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Image tokens and grid at the end of each stage."""
        return [(y[:, self.tokens :], grid) for y, grid in self.both(image)]

    def forward(self, image: Tensor) -> Tensor:
        y, _ = self.both(image)[-1]
        # the published head takes the mean over global and image tokens, the appendix says "image features"
        logits: Tensor = self.head(y if self.config.form == "published" else y[:, self.tokens :])
        return logits

    def both(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Global and image tokens (B, T+N, C) at the end of each stage, and the grid of the image tokens."""
        image = self.pad(image)
        grid = image.shape[2] // 8, image.shape[3] // 8
        x = self.stem(image)  # (B, N, C1)
        y = torch.cat((self.global_tokens.expand(x.shape[0], -1, -1), x), dim=1)  # (B, T+N, C1)
        ends: list[tuple[Tensor, Grid]] = []
        for stage in (1, 2, 3):
            for block in self.get_submodule(f"stage{stage}").children():
                y = block(y, grid)
            ends.append((y, grid))
            if stage < 3:
                g, x = y[:, : self.tokens], y[:, self.tokens :]
                merged = self.get_submodule(f"token_merge{stage}")(g), self.get_submodule(f"merge{stage}")(x, grid)
                y = torch.cat(merged, dim=1)
                grid = grid[0] // 2, grid[1] // 2
        return ends


# Table 1.
T = LightViTConfig(channels=(64, 128, 256), blocks=(2, 6, 6), heads=(2, 4, 8), global_tokens=8)
S = LightViTConfig(channels=(96, 192, 384), blocks=(2, 6, 6), heads=(3, 6, 12), global_tokens=16)
B = LightViTConfig(channels=(128, 256, 512), blocks=(3, 8, 6), heads=(4, 8, 16), global_tokens=24)
