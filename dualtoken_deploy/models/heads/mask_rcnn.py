"""Mask R-CNN (He et al., arXiv:1703.06870) on a three-stage backbone, as DualToken-ViT's Table 3 has it.

The learned parts are modules over fixed shapes; what depends on the data (choosing proposals, suppression, pasting) is
in numpy between them, with `boxes.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.heads.neck import Backbone, FeaturePyramid

STRIDES = (4, 8, 16, 32, 64)
RPN_RATIOS = (0.5, 1.0, 2.0)
BOX_SIDE, MASK_SIDE = 7, 14  # cells a side of what RoIAlign cuts out


def roi_align(features: Tensor, boxes: Tensor, stride: int, side: int, samples: int = 2) -> Tensor:
    """RoIAlign by its definition: (C, h, w), boxes (R, 4) in image pixels -> (R, C, side, side).

    Each of side x side cells of a box is the mean of samples x samples bilinear readings at regularly spaced points;
    feature (i, j) lies at ((j + 0.5), (i + 0.5)) * stride. Points beyond the outermost features read the border.
    """
    height, width = features.shape[1:]
    at = (torch.arange(side * samples, dtype=features.dtype, device=features.device) + 0.5) / (side * samples)
    x = boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * at  # (R, side * samples), pixels
    y = boxes[:, 1:2] + (boxes[:, 3:] - boxes[:, 1:2]) * at
    x, y = 2 * x / (stride * width) - 1, 2 * y / (stride * height) - 1  # to -1 .. 1 over the map
    count = side * samples
    grid = torch.stack(
        (x[:, None, :].expand(-1, count, -1), y[:, :, None].expand(-1, -1, count)), dim=-1
    )  # (R, count, count, 2)
    read = F.grid_sample(
        features.expand(boxes.shape[0], -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(read, samples, samples)


class ProposalHead(nn.Module):
    """RPN: a 3x3 convolution, objectness and box offsets of three anchors a cell. (B, 256, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, len(RPN_RATIOS), 1)
        self.deltas = nn.Conv2d(width, 4 * len(RPN_RATIOS), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(x))
        return self.objectness(x), self.deltas(x)


class BoxHead(nn.Module):
    """Two layers of 1024, then class logits (background last) and box offsets for each class. (R, 256, 7, 7)."""

    def __init__(self, width: int, classes: int, hidden: int = 1024) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width * BOX_SIDE**2, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.classify = nn.Linear(hidden, classes + 1)
        self.deltas = nn.Linear(hidden, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))
        return self.classify(x), self.deltas(x).reshape(x.shape[0], -1, 4)


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a 2x2 transposed one, a mask a class: (R, 256, 14, 14) -> logits (R, classes, 28, 28)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predict = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        out: Tensor = self.predict(torch.relu(self.upsample(x)))
        return out


class MaskRCNN(nn.Module):
    """The learned parts. `forward` gives what every image needs: the pyramid, and RPN's outputs for each level."""

    def __init__(self, backbone: Backbone, channels: tuple[int, int, int], classes: int, width: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = FeaturePyramid(channels, width, extra=1, finer="read")
        self.proposals = ProposalHead(width)
        self.boxes = BoxHead(width, classes)
        self.masks = MaskHead(width, classes)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        levels = self.neck(self.backbone(image))
        return levels, [self.proposals(x) for x in levels]
