"""DualFormer: dual path transformer with partition attention (Jiang et al., 2023).

The whole model, to be read from top to bottom; equation numbers are the paper's. Tokens are (B, N, C) with N = H * W in
row-major order and `grid` = (H, W). Sizes that the paper leaves open are those that fit the four rows of its Table 1
(docs/decisions/008-dualformer-by-counting.md). This is the definition, with groups by index; the deploy form has the
same sums as matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.base import ImageModel, drop_path_rates, init_weights
from dualtoken_deploy.models.layers import (
    ConvNormAct,
    DropPath,
    Grid,
    PooledHead,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)

Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class DualFormerConfig:
    """Sizes and options of one DualFormer. Tuples have one entry a stage (Table 1 gives channels and blocks)."""

    channels: Four
    blocks: Four
    ffn_ratio: Four = (8, 8, 4, 4)
    expansion: Four = (8, 8, 3, 6)  # of the MBConv path
    reduction: Four = (4, 2, 1, 1)  # k: side of the cells that partition attention downsamples to one token
    conv_kernel: int = 5
    heads: int = 8
    hyperplanes: int = 2  # a head's groups are K = 2^hyperplanes (eq. 5)
    drop_path: float = 0.0
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)  # (H, W) that export uses; eager takes any size >= 64


class Importance(nn.Module):
    """A coefficient in (0, 1) for each partition from its descriptor, as in SENet: (..., d) -> (..., 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        reduced = max(width // 4, 1)
        self.fc1 = nn.Linear(width, reduced)
        self.fc2 = nn.Linear(reduced, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.gelu(self.fc1(x))))


class PartitionAttention(nn.Module):
    """Multi-head partition attention (section 3.2): groups by locality-sensitive hashing, attention within and between.

    Eq. 6 divides each feature by its group's sum, which for features of both signs can vanish; the features that weigh
    are therefore sigmoid(x), positive and bounded. The hash reads x itself. An empty group takes no part in eq. 9.
    """

    planes: Tensor

    def __init__(self, width: int, heads: int, hyperplanes: int) -> None:
        super().__init__()
        self.heads, self.partitions = heads, 2**hyperplanes
        self.register_buffer("planes", torch.randn(heads, width // heads, hyperplanes))  # beta, "pre-defined"
        self.value = nn.Linear(width, width)  # x -> x~
        self.importance = Importance(width // heads)
        self.mix = nn.Linear(2 * width, width)

    def sides(self, x: Tensor) -> Tensor:
        """beta . x: (B, heads, N, d) -> (B, heads, N, hyperplanes). The sign is the side of the hyperplane (eq. 4)."""
        return x @ self.planes

    def groups(self, x: Tensor) -> Tensor:
        """H(x) of eq. 5: (B, heads, N, d) -> (B, heads, N), int64 in 0 .. K-1."""
        powers = 2 ** torch.arange(self.planes.shape[2], device=x.device)
        return ((self.sides(x) >= 0).long() * powers).sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        value = split_heads(self.value(x), self.heads)  # (B, heads, N, d)
        x = split_heads(x, self.heads)
        index = self.groups(x).unsqueeze(-1)  # (B, heads, N, 1)
        weight = torch.sigmoid(x)
        weight = weight / self._of_group(self._sum(weight, index), index)  # eq. 6
        intra = weight * value / self._of_group(self._sum(weight, index), index)  # eq. 7
        count = self._sum(torch.ones_like(x[..., :1]), index)  # l_k, (B, heads, K, 1)
        descriptor = self._sum(value, index) / count.clamp(min=1)  # eq. 8, (B, heads, K, d)
        m = self.importance(descriptor) * count.clamp(max=1)
        inter = self._of_group(descriptor * (m / m.sum(2, keepdim=True)), index)  # eq. 9
        out: Tensor = self.mix(torch.cat((merge_heads(intra), merge_heads(inter)), dim=-1))
        return out

    def _sum(self, x: Tensor, index: Tensor) -> Tensor:
        """Sums over the tokens of each group: (B, heads, N, d) -> (B, heads, K, d)."""
        sums = x.new_zeros(*x.shape[:2], self.partitions, x.shape[3])
        return sums.scatter_add(2, index.expand_as(x), x)

    def _of_group(self, sums: Tensor, index: Tensor) -> Tensor:
        """Each token gets what belongs to its group: (B, heads, K, d) -> (B, heads, N, d)."""
        return sums.gather(2, index.expand(-1, -1, -1, sums.shape[3]))


class AttentionPath(nn.Module):
    """Partition attention on a grid k times coarser, and back by channel-to-spatial, with a skip. (B, N, C)."""

    def __init__(self, width: int, reduction: int, config: DualFormerConfig) -> None:
        super().__init__()
        k = self.reduction = reduction
        self.down = nn.Conv2d(width, width, k, stride=k, groups=width) if k > 1 else None
        self.attention = PartitionAttention(width, config.heads, config.hyperplanes)
        self.up = nn.Linear(width, k * k * width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        z = x if self.down is None else to_tokens(self.down(to_map(x, grid)))  # (B, N/k^2, C)
        z = self.up(self.attention(z))  # (B, N/k^2, k*k*C)
        return x + channel_to_spatial(z, grid, self.reduction)


def channel_to_spatial(x: Tensor, grid: Grid, k: int) -> Tensor:
    """(B, N/k^2, k*k*C) -> (B, N, C): a token's channels are its k x k cell, row by row."""
    if k == 1:
        return x
    b, _, c = x.shape
    h, w = grid[0] // k, grid[1] // k
    return x.reshape(b, h, w, k, k, c // k**2).transpose(2, 3).reshape(b, grid[0] * grid[1], c // k**2)


class ConvPath(nn.Module):
    """MBConv: 1x1 expansion, depth-wise convolution, 1x1 projection, each with BatchNorm. (B, N, C)."""

    def __init__(self, width: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = expansion * width
        self.expand = ConvNormAct(width, hidden, kernel=1)
        self.dw = ConvNormAct(hidden, hidden, kernel=kernel, groups=hidden)
        self.project = ConvNormAct(hidden, width, kernel=1, act=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return to_tokens(self.project(self.dw(self.expand(to_map(x, grid)))))


class Mlp(nn.Module):
    """Pre-norm feed-forward network; the residual is the block's. (B, N, C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class Block(nn.Module):
    """Dual attention block (Figure 3): half of the channels through each path, both into the feed-forward network."""

    def __init__(self, config: DualFormerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        channels = config.channels[stage]
        half = channels // 2
        self.norm = nn.LayerNorm(channels)
        self.attention = AttentionPath(half, config.reduction[stage], config)
        self.conv = ConvPath(half, config.expansion[stage], config.conv_kernel)
        self.proj = nn.Linear(channels, channels)
        self.ffn = Mlp(channels, config.ffn_ratio[stage] * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        a, c = self.norm(x).chunk(2, dim=-1)
        both = torch.cat((self.attention(a, grid), self.conv(c, grid)), dim=-1)
        x = x + self.drop_path(self.proj(both))
        out: Tensor = x + self.drop_path(self.ffn(x))
        return out


class DualFormer(ImageModel):
    """DualFormer; stages of strides 4, 8, 16 and 32."""

    strides = (4, 8, 16, 32)

    def __init__(self, config: DualFormerConfig) -> None:
        super().__init__()
        self.config = config
        c1 = config.channels[0]
        self.stem = nn.Sequential(ConvNormAct(3, c1 // 2, stride=2), ConvNormAct(c1 // 2, c1, stride=2))
        for stage, rates in enumerate(drop_path_rates(config.drop_path, config.blocks)):
            if stage:
                here, there = config.channels[stage - 1], config.channels[stage]
                self.add_module(f"merge{stage}", ConvNormAct(here, there, stride=2, kernel=2, act=False))
            blocks = [Block(config, stage, rate) for rate in rates]
            self.add_module(f"stage{stage + 1}", nn.ModuleDict({f"block{i}": b for i, b in enumerate(blocks, 1)}))
        self.head = PooledHead(config.channels[3], config.num_classes)
        self.apply(init_weights)

    def smallest_margin(self, image: Tensor) -> Tensor:
        return smallest_margin(self, image)

    def stages(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Tokens and grid at the end of each stage."""
        image = self.pad(image)
        grid = image.shape[2] // 4, image.shape[3] // 4
        x = to_tokens(self.stem(image))  # (B, H/4 * W/4, C1)
        ends: list[tuple[Tensor, Grid]] = []
        for stage in (1, 2, 3, 4):
            for block in self.get_submodule(f"stage{stage}").children():
                x = block(x, grid)
            ends.append((x, grid))
            if stage < 4:
                x = to_tokens(self.get_submodule(f"merge{stage}")(to_map(x, grid)))
                grid = grid[0] // 2, grid[1] // 2
        return ends


def smallest_margin(model: nn.Module, image: Tensor) -> Tensor:
    """min |cos| of the angle between a token's feature and a hyperplane's normal, over all that a run hashes, (B,).

    Where it is of the size of rounding errors, a token can come to lie on the other side, in another group.
    """
    smallest = image.new_ones(image.shape[0])

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal smallest
        assert isinstance(module, PartitionAttention)  # noqa: S101 (for the type checker)
        x = split_heads(arguments[0], module.heads)
        norms = x.norm(dim=-1, keepdim=True) * module.planes.norm(dim=1)[:, None]  # (B, heads, N, hyperplanes)
        cosine = (module.sides(x) / norms.clamp(min=1e-12)).abs()
        smallest = torch.minimum(smallest, cosine.flatten(1).amin(1))

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, PartitionAttention)]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return smallest


# Table 1; T's feed-forward ratio is half of the others'.
T = DualFormerConfig(channels=(64, 128, 256, 320), blocks=(2, 2, 4, 2), ffn_ratio=(4, 4, 2, 2))
XS = DualFormerConfig(channels=(64, 128, 320, 368), blocks=(2, 2, 4, 2))
S = DualFormerConfig(channels=(64, 128, 320, 512), blocks=(4, 4, 7, 3))
B = DualFormerConfig(channels=(64, 128, 368, 560), blocks=(6, 12, 25, 7))
