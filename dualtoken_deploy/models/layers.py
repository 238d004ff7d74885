"""Layers that more than one family has: stem, windows, BiDim feed-forward, patch merging, head.

Sources: LightViT (Huang et al., arXiv:2207.05557), cited below by section; DualToken-ViT (Chu et al.,
arXiv:2309.12424). Tokens are (B, N, C) with N = H * W in row-major order; what needs the map gets `grid` = (H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]  # (H, W) of a token map


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, H*W, C) -> channels-first map (B, C, H, W)."""
    return x.reshape(x.shape[0], *grid, x.shape[2]).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Channels-first map (B, C, H, W) -> tokens (B, H*W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C/heads)."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads*d)."""
    b, heads, n, d = x.shape
    return x.transpose(1, 2).reshape(b, n, heads * d)


def pad_to_windows(x: Tensor, grid: Grid, side: int) -> tuple[Tensor, Grid]:
    """(B, H*W, C) -> (B, H'*W', C) and (H', W'): zeros at the right and the bottom up to whole windows."""
    (b, _, c), (h, w) = x.shape, grid
    padded = h + -h % side, w + -w % side
    if padded == grid:
        return x, grid
    rows = F.pad(x.reshape(b, h, w, c), (0, 0, 0, padded[1] - w, 0, padded[0] - h))
    return rows.reshape(b, padded[0] * padded[1], c), padded


def crop_to_grid(x: Tensor, padded: Grid, grid: Grid) -> Tensor:
    """(B, H'*W', C) -> (B, H*W, C): takes away what `pad_to_windows` added."""
    if padded == grid:  # slicing everything is an alias to torch.export, which Core ML's converter does not know
        return x
    rows = x.reshape(x.shape[0], *padded, x.shape[2])[:, : grid[0], : grid[1]]
    return rows.flatten(1, 2)


def to_windows(x: Tensor, grid: Grid, side: int) -> Tensor:
    """(B, H*W, C) -> (B * windows, side*side, C), windows and the tokens in each of them in row-major order."""
    (b, _, c), rows, columns = x.shape, grid[0] // side, grid[1] // side
    z = x.reshape(b, rows, side, columns, side, c).transpose(2, 3)
    return z.reshape(b * rows * columns, side * side, c)


def from_windows(z: Tensor, grid: Grid, side: int) -> Tensor:
    """(B * windows, side*side, C) -> (B, H*W, C)."""
    (n, _, c), rows, columns = z.shape, grid[0] // side, grid[1] // side
    x = z.reshape(n // (rows * columns), rows, columns, side, side, c).transpose(2, 3)
    return x.reshape(n // (rows * columns), grid[0] * grid[1], c)


def relative_index(window: int) -> Tensor:
    """Which of the (2*window - 1)^2 offsets lies between two tokens of a window: (T, T) with T = window * window."""
    side = torch.arange(window)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    at = torch.stack((rows.flatten(), columns.flatten()))  # (2, T)
    offset = at[:, :, None] - at[:, None, :] + window - 1  # (2, T, T), each in 0 .. 2*window-2
    return offset[0] * (2 * window - 1) + offset[1]


class DropPath(nn.Module):
    """Stochastic depth: drops the whole residual branch of a sample with probability `rate` while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep


class LayerScale(nn.Module):
    """Learned gain per channel, as ConvNeXt has it behind its last linear layer."""

    def __init__(self, channels: int, init: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, GELU unless told not to. (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3, act: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class Stem(nn.Module):
    """Overlapping patch embedding of stride 8 (LightViT 4.1): (B, 3, H, W) -> tokens (B, H/8 * W/8, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvNormAct(3, half, stride=2)
        self.conv2 = ConvNormAct(half, half, stride=1, groups=half)
        self.conv3 = ConvNormAct(half, half, stride=1, groups=half)
        self.conv4 = ConvNormAct(half, half, stride=2, groups=half)
        self.proj = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv4(self.conv3(self.conv2(self.conv1(image))))  # (B, C/2, H/4, W/4)
        out: Tensor = self.norm(to_tokens(self.proj(x)))  # (B, H/8 * W/8, C)
        return out


class BiDimAttention(nn.Module):
    """Gates tokens over channels and over space from one global and one local view (LightViT 3.2 and 7.4)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        reduced = channels // reduction
        self.norm = nn.LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, reduced)
        self.local_reduce = nn.Linear(channels, reduced)
        self.channel_select = nn.Linear(reduced, channels)
        self.spatial_select = nn.Linear(2 * reduced, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        x_global = F.gelu(self.global_reduce(z.mean(1, keepdim=True)))  # (B, 1, C/r)
        x_local = F.gelu(self.local_reduce(z))  # (B, N, C/r)
        c_attn = torch.sigmoid(self.channel_select(x_global))  # (B, 1, C)
        both = torch.cat((x_local, x_global.expand(-1, x.shape[1], -1)), dim=-1)  # (B, N, 2C/r)
        s_attn = torch.sigmoid(self.spatial_select(both))  # (B, N, 1)
        return x * (c_attn * s_attn)


class FeedForward(nn.Module):
    """Pre-norm feed-forward network followed by BiDim attention; the residual is the block's. (B, N, C)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)
        self.bidim = BiDimAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(self.norm(x))))
        out: Tensor = self.bidim(x)
        return out


class PatchMerge(nn.Module):
    """Residual patch merging (LightViT 4.1, Figure 5c): (B, H*W, C) -> (B, H/2 * W/2, C').

    The four tokens of a 2x2 patch are concatenated in the order (0,0), (1,0), (0,1), (1,1) of (row, column).
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, out_channels, bias=False)
        self.residual = nn.Linear(channels, out_channels, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        rows = x.reshape(x.shape[0], *grid, x.shape[2])  # (B, H, W, C)
        patches = torch.cat([rows[:, row::2, col::2] for col in (0, 1) for row in (0, 1)], dim=-1).flatten(1, 2)
        pooled = to_tokens(F.max_pool2d(to_map(x, grid), kernel_size=2, stride=2))  # (B, H/2 * W/2, C)
        out: Tensor = self.reduce(self.norm(patches)) + self.residual(pooled)
        return out


class TokenMerge(nn.Module):
    """Takes the global tokens to the next stage's channels: (B, n, C) -> (B, n, C')."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, out_channels, bias=False)

    def forward(self, g: Tensor) -> Tensor:
        out: Tensor = self.proj(self.norm(g))
        return out


class ClassifierHead(nn.Module):
    """LightViT's head: tokens (B, N, C) -> logits (B, classes)."""

    def __init__(self, channels: int, num_classes: int, hidden: int = 1280) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.neck = nn.Linear(channels, hidden)
        self.neck_norm = nn.LayerNorm(hidden)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.neck_norm(self.neck(self.norm(x))))  # (B, N, 1280)
        out: Tensor = self.fc(x.mean(1))
        return out


class PooledHead(nn.Module):
    """LayerNorm, mean over tokens, linear layer: tokens (B, N, C) -> logits (B, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(x).mean(1))
        return out
