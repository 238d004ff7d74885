"""TSM2: MambaMixer for time series (Behrouz, Santacatterina, Zabih, arXiv:2403.19888, section 5).

The whole model, to be read from top to bottom; equation numbers are the paper's. A series is (B, L, M): L steps of M
variates. Each variate is cut into P patches by itself; features are (B, M, P, D). What the paper leaves open, and what
was chosen: docs/decisions/015-tsm2.md. The scan is in scan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.scan import Scanned, chunked_scan
from dualtoken_deploy.models.vim2 import Average

KERNEL = 4  # of the convolution along the scan
EPS = 1e-5  # of RevIN's variance


@dataclass(frozen=True)
class TSM2Config:
    """Sizes of one TSM2."""

    lookback: int = 96  # L
    horizon: int = 24  # H
    variates: int = 8  # M
    patch: int = 8
    dim: int = 32  # D
    layers: int = 3
    states: int = 8  # N
    expansion: int = 2


class Selective(Scanned):
    """S6 along the last axis but one (eqs 1 to 5): (..., L, E) -> (..., L, E). D_t, B_t, C_t as in Mamba."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.rank, self.states = max(width // 16, 1), states
        self.select = nn.Linear(width, self.rank + 2 * states, bias=False)
        self.delta = nn.Linear(self.rank, width)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log()[:, None].repeat(1, width))
        self.skip = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            steps = torch.exp(torch.rand(width) * 4.60517 - 6.90776)  # ln 0.001 .. ln 0.1
            self.delta.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the step

    def forward(self, x: Tensor) -> Tensor:
        told, r, n = self.select(x), self.rank, self.states
        step, b, c = told[..., :r], told[..., r : r + n], told[..., r + n :]
        a = -torch.exp(self.a_log).unsqueeze(0)  # (1, N, E)
        return chunked_scan(x, F.softplus(self.delta(step)), a, b, c) + self.skip * x


class Along(nn.Module):
    """A causal depth-wise convolution along the last axis but one. (B, A, L, E) -> (B, A, L, E)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, (1, KERNEL), padding=(0, KERNEL - 1), groups=width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.permute(0, 3, 1, 2))[..., : x.shape[2]]
        return out.permute(0, 2, 3, 1)


class Mixer(nn.Module):
    """A selective mixer along the last axis but one, one way (eqs 6 to 11) or both (eqs 12 to 18). (B, A, L, D)."""

    def __init__(self, width: int, config: TSM2Config, ways: int) -> None:
        super().__init__()
        inner = config.expansion * width
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.convs = nn.ModuleList(Along(inner) for _ in range(ways))
        self.scans = nn.ModuleList(Selective(inner, config.states) for _ in range(ways))
        self.leave = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        gate, x = F.silu(self.gate(x)), self.enter(x)
        y = self.scans[0](F.silu(self.convs[0](x)))
        if len(self.scans) > 1:
            y = y + self.scans[1](F.silu(self.convs[1](x.flip(2)))).flip(2)
        out: Tensor = self.leave(y * gate)
        return out


class TSM2(nn.Module):
    """(B, L, M) -> the H steps that follow, (B, H, M).

    Layer l's token mixer (along time, one way) and channel mixer (along variates, both ways) read averages of all that
    earlier ones gave, with learned weights (eqs 19, 20), which begin as a residual network.
    """

    def __init__(self, config: TSM2Config) -> None:
        super().__init__()
        self.config = config
        patches = config.lookback // config.patch
        self.gain = nn.Parameter(torch.ones(config.variates))  # RevIN's, Kim et al., ICLR 2022
        self.shift = nn.Parameter(torch.zeros(config.variates))
        self.embed = nn.Linear(config.patch, config.dim)
        self.position = nn.Parameter(0.02 * torch.randn(patches, config.dim))
        self.variate = nn.Parameter(0.02 * torch.randn(config.variates, 1, config.dim))
        for layer in range(config.layers):
            self.add_module(f"token_average{layer + 1}", Average(2 * layer + 1))  # alpha, beta
            self.add_module(f"token{layer + 1}", Mixer(config.dim, config, ways=1))
            self.add_module(f"channel_average{layer + 1}", Average(2 * layer + 2))  # theta, gamma
            self.add_module(f"channel{layer + 1}", Mixer(config.dim, config, ways=2))
        self.average = Average(2 * config.layers + 1)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(patches * config.dim, config.horizon)

    def example_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """That of an input of (L, M) with a batch of one."""
        return (1, *size)

    def forward(self, series: Tensor) -> Tensor:
        mean = series.mean(1, keepdim=True)
        std = torch.sqrt(((series - mean) ** 2).mean(1, keepdim=True) + EPS)
        x = (series - mean) / std * self.gain + self.shift  # (B, L, M)
        x = x.transpose(1, 2)
        x = x.reshape(*x.shape[:2], -1, self.config.patch)  # (B, M, P, patch)
        features = [self.embed(x) + self.position + self.variate]  # (B, M, P, D)
        for layer in range(1, self.config.layers + 1):
            x = self.get_submodule(f"token_average{layer}")(features)
            features.append(self.get_submodule(f"token{layer}")(x))
            x = self.get_submodule(f"channel_average{layer}")(features).transpose(1, 2)  # (B, P, M, D)
            features.append(self.get_submodule(f"channel{layer}")(x).transpose(1, 2))
        x = self.norm(self.average(features)).flatten(2)
        y: Tensor = self.head(x).transpose(1, 2)  # (B, H, M)
        return (y - self.shift) / self.gain * std + mean


S = TSM2Config()
