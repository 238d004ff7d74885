"""RetinaNet (Lin et al., arXiv:1708.02002) on a three-stage backbone, as DualToken-ViT's Table 4 has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dualtoken_deploy.models.heads.neck import Backbone, FeaturePyramid
from dualtoken_deploy.tasks.anchors import RATIOS, SCALES

PRIOR = 0.01  # probability that an untrained head gives to every class (section 4.1)


class Tower(nn.Module):
    """Four 3x3 convolutions with ReLU, then one to `outputs` channels; shared by all levels."""

    def __init__(self, width: int, outputs: int, depth: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.predict = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        out: Tensor = self.predict(x)
        return out


class RetinaNet(nn.Module):
    """Normalised image (B, 3, H, W) -> class logits (B, A, classes) and box offsets (B, A, 4).

    A are the anchors of `detection.anchors`, in their order.
    """

    def __init__(self, backbone: Backbone, channels: tuple[int, int, int], classes: int, width: int = 256) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = backbone
        self.neck = FeaturePyramid(channels, width, extra=2, finer="unread")
        count = len(SCALES) * len(RATIOS)
        self.class_tower = Tower(width, count * classes)
        self.box_tower = Tower(width, count * 4)
        nn.init.constant_(self.class_tower.predict.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.neck(self.backbone(image))
        logits = torch.cat([_by_anchor(self.class_tower(x), self.classes) for x in levels], dim=1)
        deltas = torch.cat([_by_anchor(self.box_tower(x), 4) for x in levels], dim=1)
        return logits, deltas


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """(B, A * values, h, w) -> (B, h * w * A, values)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)
