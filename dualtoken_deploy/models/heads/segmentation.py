"""DeepLabv3 (Chen et al., arXiv:1706.05587) and PSPNet (Zhao et al., arXiv:1612.01105) of DualToken-ViT's Table 5.

Both read the last stage at stride 8: its map is interpolated there, where the paper's FLOPs of DeepLabv3 put it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.heads.neck import Backbone

DILATIONS = (12, 24, 36)
POOLS = (1, 2, 3, 6)


class ConvNormRelu(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class AtrousPyramid(nn.Module):
    """DeepLabv3's ASPP: 1x1, three dilated 3x3 and image pooling side by side, then a 3x3 bottleneck."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvNormRelu(inputs, width, 1), *(ConvNormRelu(inputs, width, 3, d) for d in DILATIONS)]
        )
        self.pooled = ConvNormRelu(inputs, width, 1)
        self.bottleneck = ConvNormRelu(5 * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        out: Tensor = self.bottleneck(torch.cat([pooled, *(branch(x) for branch in self.branches)], dim=1))
        return out


class PyramidPooling(nn.Module):
    """PSPNet's module: average pools of 1, 2, 3, 6 cells a side through 1x1 convolutions, then a 3x3 bottleneck."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvNormRelu(inputs, width, 1) for _ in POOLS)
        self.bottleneck = ConvNormRelu(inputs + len(POOLS) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2], x.shape[3]
        pools = [
            F.interpolate(branch(F.adaptive_avg_pool2d(x, side)), size, mode="bilinear", align_corners=False)
            for side, branch in zip(POOLS, self.branches, strict=True)
        ]
        out: Tensor = self.bottleneck(torch.cat([x, *pools], dim=1))
        return out


CONTEXTS = {"deeplabv3": AtrousPyramid, "pspnet": PyramidPooling}


class Segmenter(nn.Module):
    """Normalised image (B, 3, H, W) -> class logits (B, classes, H, W); in training also the auxiliary head's.

    The auxiliary head is an FCN on stage 2 (a 3x3 convolution to 256 and a 1x1 to the classes).
    """

    def __init__(
        self, backbone: Backbone, channels: tuple[int, int, int], classes: int, context: str, width: int = 512
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.context = CONTEXTS[context](channels[2], width)
        self.classify = nn.Conv2d(width, classes, 1)
        self.auxiliary = nn.Sequential(ConvNormRelu(channels[1], 256, 3), nn.Conv2d(256, classes, 1))

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        fine, middle, coarse = self.backbone(image)
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)  # to stride 8
        logits = _to_image(self.classify(self.context(coarse)), image)
        return (logits, _to_image(self.auxiliary(middle), image)) if self.training else logits


def _to_image(x: Tensor, image: Tensor) -> Tensor:
    """Logits of the padded image's grid, interpolated to its pixels and cut to the image."""
    height, width = (side + -side % 32 for side in image.shape[2:])
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    if (height, width) == tuple(image.shape[2:]):  # slicing everything is an alias to torch.export: Core ML has none
        return x
    return x[:, :, : image.shape[2], : image.shape[3]]
