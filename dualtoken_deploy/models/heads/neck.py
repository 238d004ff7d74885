"""From a classifier's stages to maps for dense heads: a LayerNorm a stage, and LightViT's three-stage FPN.

Source: LightViT section 5.2 and Figure 5 (b); FPN (Lin et al., arXiv:1612.03144).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.layers import to_map


class Backbone(nn.Module):
    """The last three stages (strides 8, 16, 32) of a classifier without its head, each through a LayerNorm."""

    def __init__(self, model: ImageModel, channels: tuple[int, int, int]) -> None:
        super().__init__()
        model.set_submodule("head", nn.Identity())
        self.model = model
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s) for s = 8, 16, 32 of the padded image."""
        ends = self.model.stages(image)[-3:]
        return [to_map(norm(x), grid) for norm, (x, grid) in zip(self.norms, ends, strict=True)]


class FeaturePyramid(nn.Module):
    """FPN over three stages. `extra` stride-2 convolutions add coarser levels.

    `finer`: LightViT's 2x2 transposed convolution adds a level of stride 4. The paper's RetinaNet has it among its
    parameters although its head does not read it; then it is there and does not run.
    """

    def __init__(self, channels: tuple[int, int, int], width: int, extra: int, finer: str) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.extra = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(extra))
        self.finer = finer == "read"

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Levels (B, width, h, w), the finest first."""
        levels = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for i in (1, 0):  # the top-down path
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.output, levels, strict=True)]
        if self.finer:
            outputs.insert(0, self.upsample(outputs[0]))
        for conv in self.extra:
            outputs.append(conv(outputs[-1]))
        return outputs
