"""What every image model of this package has, whatever its paper: stages of tokens, their maps, and a head."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.layers import ClassifierHead, Grid, PooledHead, to_map


class ModelConfig(Protocol):
    """The part of a configuration that does not depend on the family."""

    @property
    def num_classes(self) -> int: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def drop_path(self) -> float: ...


class ImageModel(nn.Module):
    """Takes a normalised image (B, 3, H, W), H and W >= 64; gives logits (B, num_classes).

    A family's class names the strides of its stages and computes `stages`. Sides that the last stride does not divide
    are padded with zeros at the right and the bottom.
    """

    strides: ClassVar[tuple[int, ...]]
    config: ModelConfig
    head: ClassifierHead | PooledHead

    def stages(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        """Tokens (B, h*w, C) and grid (h, w) at the end of each stage, whose strides are `strides`."""
        raise NotImplementedError

    def features(self, image: Tensor) -> list[Tensor]:
        """The stage maps for dense tasks: (B, C, H/s, W/s) for every s in `strides`, of the padded image."""
        return [to_map(x, grid) for x, grid in self.stages(image)]

    def forward(self, image: Tensor) -> Tensor:
        tokens, _ = self.stages(image)[-1]
        logits: Tensor = self.head(tokens)
        return logits

    def smallest_margin(self, image: Tensor) -> Tensor | None:
        """How near each image (B, 3, H, W) comes to a point where the model jumps, (B,); None: it never jumps.

        Below a margin of the size of rounding errors two exact implementations may differ by a jump.
        """
        return None

    @classmethod
    def pad(cls, image: Tensor) -> Tensor:
        """Zeros (the mean colour) at the right and the bottom, up to whole cells of the last stage."""
        stride = cls.strides[-1]
        return F.pad(image, (0, -image.shape[3] % stride, 0, -image.shape[2] % stride))

    @classmethod
    def grids(cls, size: tuple[int, int]) -> tuple[Grid, ...]:
        """The grid of each stage for an image of (H, W)."""
        height, width = (side + -side % cls.strides[-1] for side in size)
        return tuple((height // s, width // s) for s in cls.strides)


def init_weights(module: nn.Module) -> None:
    """Truncated normal 0.02 for linear layers, He's by fan-out for convolutions, zero biases. For nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, blocks: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth that rises linearly over all blocks, from 0 to `rate`; one list a stage."""
    total = sum(blocks)
    rates = iter(rate * i / max(total - 1, 1) for i in range(total))
    return [[next(rates) for _ in range(count)] for count in blocks]
