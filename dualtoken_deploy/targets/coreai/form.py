"""The deploy form as coreai-torch 0.4.3 converts it: the same sums, written so that its optimiser does not trip.

It moves reshapes over additions and then cannot add (N, C) to (1, H, W, C), which ends the process; so tokens are made
of maps by flattening first and transposing then, and never by way of (B, H, W, C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.deploy.forms import ReshapeMerge
from dualtoken_deploy.models.layers import Grid, to_map
from dualtoken_deploy.targets.tracing import Around


class FlatMerge(nn.Module):
    """ReshapeMerge whose pooled map is flattened before it is transposed. (B, H*W, C) -> (B, H/2 * W/2, C')."""

    def __init__(self, source: ReshapeMerge) -> None:
        super().__init__()
        self.norm, self.reduce, self.residual = source.norm, source.reduce, source.residual

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (b, n, c), (h, w) = x.shape, grid
        patches = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(b, n // 4, 4 * c)
        pooled = F.max_pool2d(to_map(x, grid), kernel_size=2, stride=2).flatten(2).transpose(1, 2)
        out: Tensor = self.reduce(self.norm(patches)) + self.residual(pooled)
        return out


class HalfPrecision(Around):
    """A float16 model behind float32 inputs and outputs."""

    inside = "model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.model(x.half())
        if isinstance(found, tuple):
            return tuple(value.float() if value.is_floating_point() else value for value in found)
        out: Tensor = found.float()
        return out


def to_coreai_form(module: nn.Module) -> None:
    """Rewrites a deploy form in place."""
    for name, child in list(module.named_modules()):
        if type(child) is ReshapeMerge:
            module.set_submodule(name, FlatMerge(child))
