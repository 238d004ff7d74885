"""RetinaNet (Lin et al., arXiv:1708.02002) on a three-stage backbone, as DualToken-ViT's Table 4 has it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualtoken_deploy.boxes import make_anchors
from dualtoken_deploy.models.heads.neck import Backbone, FeaturePyramid

STRIDES = (8, 16, 32, 64, 128)
SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))  # three a octave, the smallest four strides wide (section 4)
RATIOS = (0.5, 1.0, 2.0)
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
    """Normalised image (B, 3, H, W) -> class logits (B, A, classes) and box offsets (B, A, 4), for A `anchors`."""

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


def anchors(image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Anchors (A, 4) of an image of (H, W) in the order of RetinaNet's outputs: level by level, the finest first."""
    height, width = (side + -side % 32 for side in image_size)
    grids = [(height // s, width // s) for s in (8, 16, 32)]
    for _ in range(2):  # a 3x3 stride-2 convolution with padding 1 rounds up
        grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)))
    return np.concatenate([make_anchors(g, s, SCALES, RATIOS) for g, s in zip(grids, STRIDES, strict=True)])
