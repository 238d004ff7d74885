"""ViM2: MambaMixer for images (Behrouz, Santacatterina, Zabih, arXiv:2403.19888).

The whole model, to be read from top to bottom; equation numbers are the paper's. Tokens are (B, L, C) with L = H * W in
row-major order and `grid` = (H, W). The paper prints few of its choices: docs/decisions/012-vim2-by-counting.md has
each that was made here. The scan itself is in scan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.base import ImageModel, drop_path_rates, init_weights
from dualtoken_deploy.models.layers import DropPath, Grid, PooledHead, to_map, to_tokens
from dualtoken_deploy.models.scan import Scanned, chunked_scan

Four = tuple[int, int, int, int]
DIRECTIONS = 4  # row by row, column by column, and both backwards (VMamba's cross-scan)


@dataclass(frozen=True)
class ViM2Config:
    """Sizes and options of one ViM2. Tuples have one entry a stage (the appendix's table of sizes)."""

    channels: Four
    blocks: Four  # token mixers; after every second one comes a channel mixer
    channel_width: Four  # D of the channel mixer: 2C, the two layers side by side; C in stage 4
    expansion: int = 2  # of the token mixer
    states: int = 16  # N
    drop_path: float = 0.0
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)  # (H, W) that export uses; eager takes any size >= 64


def cross_scan(x: Tensor, grid: Grid) -> Tensor:
    """(B, L, c) of one for all, or (B, 4, L, c) of one a direction, in row-major order -> (B, 4, L, c) as scanned."""
    rows = x.unsqueeze(1).expand(-1, DIRECTIONS, -1, -1) if x.ndim == 3 else x
    ahead, down, back, up = (rows[:, i] for i in range(DIRECTIONS))
    forward = torch.stack((ahead, _turned(down, grid)), dim=1)
    backward = torch.stack((back, _turned(up, grid)), dim=1).flip(2)
    return torch.cat((forward, backward), dim=1)


def cross_merge(y: Tensor, grid: Grid) -> Tensor:
    """The sum of the four directions in row-major order: (B, 4, L, c) -> (B, L, c)."""
    both = y[:, :2] + y[:, 2:].flip(2)
    return both[:, 0] + _turned(both[:, 1], (grid[1], grid[0]))


def _turned(x: Tensor, grid: Grid) -> Tensor:
    """(B, H*W, c) row by row -> column by column."""
    b, _, c = x.shape
    return x.reshape(b, *grid, c).transpose(1, 2).flatten(1, 2)


class S6(Scanned):
    """Selective state spaces over the four orders of a map, added (eqs 1 to 5). (B, L, E) -> (B, L, E).

    Each direction has its own projections, A and D. D_t, B_t and C_t come from the scanned input, as in Mamba.
    """

    def __init__(self, width: int, rank: int, states: int) -> None:
        super().__init__()
        self.rank, self.states = rank, states
        self.select = nn.Linear(width, DIRECTIONS * (rank + 2 * states), bias=False)  # Linear_B, Linear_C, and of D
        self.delta = nn.Parameter(torch.empty(DIRECTIONS, rank, width))
        self.delta_bias = nn.Parameter(torch.empty(DIRECTIONS * width))
        self.a_log = nn.Parameter(torch.empty(DIRECTIONS, states, width))
        self.skip = nn.Parameter(torch.ones(DIRECTIONS * width))  # Mamba's D x_t
        self.reset()

    def reset(self) -> None:
        """Mamba's: A = -1 .. -N, steps of 0.001 to 0.1."""
        nn.init.uniform_(self.delta, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            steps = torch.exp(torch.rand_like(self.delta_bias) * 4.60517 - 6.90776)  # ln 0.001 .. ln 0.1
            self.delta_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the step
            order = torch.arange(1, self.states + 1, dtype=self.a_log.dtype, device=self.a_log.device)
            self.a_log.copy_(order.log()[None, :, None].expand_as(self.a_log))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        e, r, n = x.shape[2], self.rank, self.states
        selected = self.select(x).reshape(*x.shape[:2], DIRECTIONS, r + 2 * n).transpose(1, 2)  # (B, 4, L, R + 2N)
        selected = cross_scan(selected, grid)
        # slices, because a split in unequal parts is a sequence in ONNX
        step, b, c = selected[..., :r], selected[..., r : r + n], selected[..., r + n :]
        delta = F.softplus(step @ self.delta + self.delta_bias.reshape(DIRECTIONS, 1, e))  # (B, 4, L, E)
        a = -torch.exp(self.a_log).unsqueeze(1)  # (4, 1, N, E)
        y = chunked_scan(cross_scan(x, grid), delta, a, b, c)
        return cross_merge(y, grid) + self.skip.reshape(DIRECTIONS, e).sum(0) * x


class TokenMixer(nn.Module):
    """Linear C -> 2C, depth-wise 3x3, S6 in four directions, Linear back (eqs 6 to 11). (B, L, C)."""

    def __init__(self, channels: int, config: ViM2Config) -> None:
        super().__init__()
        width = config.expansion * channels
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, width, bias=False)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.s6 = S6(width, channels // 16, config.states)
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.expand(self.norm(x))  # (B, L, 2C)
        x = F.silu(to_tokens(self.dw(to_map(x, grid))))
        out: Tensor = self.project(self.norm_out(self.s6(x, grid)))
        return out


class ChannelMixer(nn.Module):
    """Linear across channels, S6 in the token mixer's directions, linear across channels (section 4). (B, L, D)."""

    def __init__(self, width: int, config: ViM2Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, width, bias=False)
        self.s6 = S6(width, width // 16, config.states)
        self.norm_out = nn.LayerNorm(width)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = F.silu(self.enter(self.norm(x)))
        out: Tensor = self.leave(self.norm_out(self.s6(x, grid)))
        return out


class Average(nn.Module):
    """sum_i a_i f_i over earlier features f_i (B, L, C), with learned a_i (eqs 19, 20)."""

    def __init__(self, ones: int, zeros: int = 0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.cat((torch.ones(ones), torch.zeros(zeros))))

    def forward(self, features: list[Tensor]) -> Tensor:
        total = self.weights[0] * features[0]
        for i, feature in enumerate(features[1:], 1):
            total = total + self.weights[i] * feature
        return total


class Stage(nn.Module):
    """Token mixers in pairs, each pair with a channel mixer behind, all on averages of what came before (section 3.3).

    The features of layer i are y_token^(i) and y_channel^(i); layer 0's are the stage's input. A channel mixer of width
    2C takes both layers of its pair side by side and gives both their y_channel; one of width C is the second
    layer's. All averages begin as a plain sum over each feature, once: as a residual network.
    """

    def __init__(self, config: ViM2Config, stage: int, rates: list[float]) -> None:
        super().__init__()
        channels, width, layers = config.channels[stage], config.channel_width[stage], config.blocks[stage]
        self.shares = width // channels  # layers that a channel mixer serves: 2 or 1
        known = 1  # earlier features: the input, once
        for pair in range(layers // 2):
            for i in (1, 2):
                layer = 2 * pair + i
                self.add_module(f"average{layer}", Average(known))  # alpha, beta
                self.add_module(f"token{layer}", TokenMixer(channels, config))
                known += 1
            for i in range(self.shares):
                # theta, gamma: layer i of two sees its own y_token and no later one
                last = 2 * pair + 3 - self.shares + i
                self.add_module(f"channel_average{last}", Average(known - (2 * pair + 2 - last)))
            self.add_module(f"channel{pair + 1}", ChannelMixer(width, config))
            known += self.shares
        self.average = Average(known)
        self.pairs = layers // 2
        self.drop_path = nn.ModuleList(DropPath(rate) for rate in rates)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        features = [x]  # of the averages, in the order in which they were made
        for pair in range(self.pairs):
            for layer in (2 * pair + 1, 2 * pair + 2):
                y = self.get_submodule(f"token{layer}")(self.get_submodule(f"average{layer}")(features), grid)
                features.append(self.drop_path[layer - 1](y))
            read = []
            for last in range(2 * pair + 3 - self.shares, 2 * pair + 3):
                seen = features[: len(features) - (2 * pair + 2 - last)]
                read.append(self.get_submodule(f"channel_average{last}")(seen))
            y = self.get_submodule(f"channel{pair + 1}")(torch.cat(read, dim=-1) if len(read) > 1 else read[0], grid)
            y, share = self.drop_path[2 * pair + 1](y), y.shape[-1] // self.shares
            features.extend(y[..., i * share : (i + 1) * share] for i in range(self.shares))
        out: Tensor = self.average(features)
        return out


class Merge(nn.Module):
    """Swin's patch merging: (B, H*W, C) -> (B, H/2 * W/2, C')."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, out_channels, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (b, n, c), (h, w) = x.shape, grid
        patches = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(b, n // 4, 4 * c)
        out: Tensor = self.reduce(self.norm(patches))
        return out


class ViM2(ImageModel):
    """ViM2; stages of strides 4, 8, 16 and 32."""

    strides = (4, 8, 16, 32)
    config: ViM2Config

    def __init__(self, config: ViM2Config) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.channels[0], 4, stride=4)
        self.stem_norm = nn.LayerNorm(config.channels[0])
        for stage, rates in enumerate(drop_path_rates(config.drop_path, config.blocks)):
            if stage:
                self.add_module(f"merge{stage}", Merge(config.channels[stage - 1], config.channels[stage]))
            self.add_module(f"stage{stage + 1}", Stage(config, stage, rates))
        self.head = PooledHead(config.channels[3], config.num_classes)
        self.apply(init_weights)

    def stages(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Tokens and grid at the end of each stage."""
        image = self.pad(image)
        grid = image.shape[2] // 4, image.shape[3] // 4
        x = self.stem_norm(to_tokens(self.stem(image)))  # (B, H/4 * W/4, C1)
        ends: list[tuple[Tensor, Grid]] = []
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"stage{stage}")(x, grid)
            ends.append((x, grid))
            if stage < 4:
                x = self.get_submodule(f"merge{stage}")(x, grid)
                grid = grid[0] // 2, grid[1] // 2
        return ends


# The appendix's table of sizes.
T = ViM2Config(channels=(96, 192, 384, 768), blocks=(2, 2, 6, 2), channel_width=(192, 384, 768, 768))
S = ViM2Config(channels=(96, 192, 384, 768), blocks=(2, 2, 18, 2), channel_width=(192, 384, 768, 768))
B = ViM2Config(channels=(128, 256, 512, 1024), blocks=(2, 2, 18, 2), channel_width=(256, 512, 1024, 1024))
