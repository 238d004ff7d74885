"""What a bundle of a dense model computes: its raw outputs, or what they come to, as modules of fixed shapes.

form         head                    outputs for one image
raw          retinanet               logits (1, A, classes), deltas (1, A, 4)
raw          deeplabv3, pspnet       logits (1, classes, H, W)
labels       deeplabv3, pspnet       labels (1, H, W) int32
detections   retinanet, mask-rcnn    boxes (1, D, 4), scores (1, D), classes (1, D) int32, best first; where there
                                     are fewer than D, score 0 and class -1 follow
             mask-rcnn               and masks (1, D, 28, 28): probabilities over each box
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.heads import custom_operators as operations
from dualtoken_deploy.models.heads.mask_rcnn import BOX_SIDE, MASK_SIDE, RPN_RATIOS, STRIDES, MaskRCNN
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.segmentation import Segmenter
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.tasks.anchors import CANDIDATES, DETECTIONS, OVERLAP, SCORE, anchors
from dualtoken_deploy.tasks.boxes import MAX_LOG_SCALE, make_anchors

RAW, LABELS, DETECTED = "raw", "labels", "detections"

Size = tuple[int, int]  # (H, W)

# Mask R-CNN with a feature pyramid (arXiv:1612.03144, section 5; arXiv:1703.06870, section 3.1).
RPN_SCALE = 8.0  # of the stride: anchors of 32 to 512 pixels on strides 4 to 64
RPN_OVERLAP, PROPOSALS = 0.7, 1000
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 2  # a box of 224 pixels is cut out of the level of stride 16
POOLED_LEVELS = 4  # boxes are cut out of strides 4 to 32


class RetinaDetector(nn.Module):
    """RetinaNet with what `detection.detect` does behind it: (1, 3, H, W) -> boxes, scores, classes."""

    anchors: Tensor
    bounds: Tensor

    def __init__(self, model: RetinaNet, size: Size) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("anchors", torch.from_numpy(anchors(size)).float())
        self.register_buffer("bounds", torch.tensor([size[1], size[0]], dtype=torch.float32))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, deltas = self.model(image)
        scores, at = _best(torch.sigmoid(logits[0]).flatten(), CANDIDATES)
        which, classes = at // logits.shape[2], at % logits.shape[2]
        boxes = decode(deltas[0][which], self.anchors[which], self.bounds)
        boxes, scores, classes, _ = _detections(boxes, scores, classes, logits.shape[2], OVERLAP)
        return boxes, scores, classes


class LabelMap(nn.Module):
    """A segmenter with the most likely class of each pixel instead of its logits: (1, 3, H, W) -> (1, H, W) int32."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.model(image).argmax(1).to(torch.int32)
        return out


class MaskDetector(nn.Module):
    """Mask R-CNN from image to detections with masks: (1, 3, H, W) -> boxes, scores, classes, masks.

    Proposals are at most PROPOSALS a level and in all. Each is cut out of every level and the level of its size is
    chosen afterwards, so that no shape depends on the data.
    """

    anchors: Tensor
    levels: Tensor
    bounds: Tensor

    def __init__(self, model: MaskRCNN, size: Size) -> None:
        super().__init__()
        self.model = model
        self.counts = [h * w * len(RPN_RATIOS) for h, w in grids(size)]
        self.register_buffer("anchors", torch.from_numpy(rpn_anchors(size)).float())
        self.register_buffer("bounds", torch.tensor([size[1], size[0]], dtype=torch.float32))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels, outputs = self.model(image)
        boxes, there = self.propose(outputs)  # (P, 4), (P,)
        logits, deltas = self.model.boxes(self.pool(levels, boxes, BOX_SIDE))
        classes = logits.shape[1] - 1
        scores, at = _best((torch.softmax(logits, dim=1)[:, :classes] * there[:, None]).flatten(), CANDIDATES)
        which, kinds = at // classes, at % classes
        decoded = decode(deltas.flatten(0, 1)[at], boxes[which], self.bounds)
        found, scores, kinds, kept = _detections(decoded, scores, kinds, classes, OVERLAP)
        masks = self.model.masks(self.pool(levels, decoded[kept], MASK_SIDE))  # (D, classes, 28, 28)
        rows = torch.arange(masks.shape[0], device=masks.device)
        masks = masks.flatten(0, 1)[rows * classes + kinds[0].clamp(min=0)]
        return found, scores, kinds, torch.sigmoid(masks)[None]

    def propose(self, outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The best boxes (P, 4) of the image by objectness, after suppression within each level; and 1 for each, (P,),
        or 0 where fewer than P are left and empty boxes fill the rest."""
        boxes, scores, levels = [], [], []
        for level, ((objectness, deltas), grid) in enumerate(
            zip(outputs, torch.split(self.anchors, self.counts), strict=True)
        ):
            score, at = _best(_by_anchor(objectness, 1).flatten(), PROPOSALS)
            boxes.append(decode(_by_anchor(deltas, 4)[at], grid[at], self.bounds))
            scores.append(score)
            levels.append(torch.full_like(at, level))
        every, values = torch.cat(boxes), torch.cat(scores)
        values = values - values.amin(0) + 1  # positive, in the same order; a sigmoid would make the best of them equal
        mask = _keep(every, values, torch.cat(levels), len(outputs), RPN_OVERLAP, 0.0, PROPOSALS)
        values, kept = _best(values * mask, PROPOSALS)
        there = (values > 0).to(every.dtype)
        return every[kept] * there[:, None], there

    def pool(self, levels: list[Tensor], boxes: Tensor, side: int) -> Tensor:
        """Boxes (R, 4) cut out of the level that suits their size: (R, C, side, side)."""
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
        level = CANONICAL_LEVEL + torch.floor(0.5 * torch.log2(sides.prod(1)) - _LOG2_CANONICAL + 1e-6)
        level = level.clamp(0, POOLED_LEVELS - 1)
        parts = [
            torch.ops.dualtoken.roi_align(levels[k], boxes, STRIDES[k], side)
            * (level == k).to(boxes.dtype)[:, None, None, None]
            for k in range(POOLED_LEVELS)
        ]
        return torch.stack(parts).sum(0)


_LOG2_CANONICAL = float(torch.log2(torch.tensor(float(CANONICAL_SIDE))))


def grids(size: Size) -> list[tuple[int, int]]:
    """Cells of the pyramid's levels, strides 4 to 64, for an image of (H, W)."""
    height, width = (side + -side % 32 for side in size)
    out = [(height // s, width // s) for s in STRIDES[:-1]]
    return [*out, (-(-out[-1][0] // 2), -(-out[-1][1] // 2))]  # a stride-2 convolution rounds up


def rpn_anchors(size: Size) -> Any:
    """Anchors (A, 4) of the proposal head in the order of its outputs: level by level, cell by cell."""
    import numpy as np

    pairs = zip(grids(size), STRIDES, strict=True)
    return np.concatenate([make_anchors(grid, stride, (RPN_SCALE,), RPN_RATIOS) for grid, stride in pairs])


def decode(deltas: Tensor, origins: Tensor, bounds: Tensor) -> Tensor:
    """`boxes.decode` in torch: offsets (N, 4) from boxes (N, 4), clipped to (0, 0) and `bounds` = (W, H)."""
    centre = (origins[:, :2] + origins[:, 2:]) / 2
    scale = origins[:, 2:] - origins[:, :2]
    centre = centre + deltas[:, :2] * scale
    sides = scale * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp()
    low, high = (torch.minimum(torch.relu(centre + s * sides), bounds) for s in (-0.5, 0.5))
    return torch.cat((low, high), dim=1)


def _best(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The largest values of (N,), at most `limit`, and where they are."""
    values, at = torch.topk(scores, min(limit, scores.shape[0]))
    return values, at


def _keep(
    boxes: Tensor, scores: Tensor, groups: Tensor, count: int, overlap: float, score: float, limit: int
) -> Tensor:
    """1 for the boxes (N, 4) that suppression within their group keeps, 0 for the others: (N,)."""
    member = (groups[None] == torch.arange(count, device=groups.device)[:, None]).to(scores.dtype)  # (groups, N)
    kept: Tensor = torch.ops.dualtoken.keep_best(boxes, scores[None] * member, overlap, score, limit)
    return kept.sum(0)


def _detections(
    boxes: Tensor, scores: Tensor, classes: Tensor, count: int, overlap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best DETECTIONS candidates after suppression by class, with the batch axis, and which of them they were."""
    mask = _keep(boxes, scores, classes, count, overlap, SCORE, DETECTIONS)
    values, kept = _best(scores * mask, DETECTIONS)
    there = values > 0
    kinds = torch.where(there, classes[kept], torch.full_like(kept, -1)).to(torch.int32)
    return (boxes[kept] * there[:, None].to(boxes.dtype))[None], values[None], kinds[None], kept


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """(1, A * values, h, w) -> (h * w * A, values)."""
    return x.permute(0, 2, 3, 1).reshape(-1, values)


# head -> the forms on offer, the first is the default: how each is made of the model and the size
FORMS: Mapping[str, Mapping[str, Callable[[Any, Size], nn.Module]]] = MappingProxyType(
    {
        "retinanet": {RAW: lambda model, _: model, DETECTED: RetinaDetector},
        "mask-rcnn": {DETECTED: MaskDetector},
        "deeplabv3": {RAW: lambda model, _: model, LABELS: lambda model, _: LabelMap(model)},
        "pspnet": {RAW: lambda model, _: model, LABELS: lambda model, _: LabelMap(model)},
    }
)


def choose_form(head: str, suppress: bool, argmax: bool) -> str:
    """The form that the options ask for. Raises UsageError on an option that is not this head's."""
    if suppress and DETECTED not in FORMS[head]:
        raise UsageError(f"--suppress belongs to detectors, not to {head}; leave it out")
    if argmax and LABELS not in FORMS[head]:
        raise UsageError(f"--argmax belongs to segmenters, not to {head}; leave it out")
    return DETECTED if suppress else LABELS if argmax else next(iter(FORMS[head]))


def outputs_of(head: str, form: str, classes: int, size: Size) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of a form's outputs for one image of (H, W)."""
    if form == LABELS:
        return (TensorSpec("labels", "int32", "NHW", (1, *size)),)
    if form == RAW and head == "retinanet":
        count = len(anchors(size))
        return (
            TensorSpec("logits", "float32", "NAC", (1, count, classes)),
            TensorSpec("deltas", "float32", "NA4", (1, count, 4)),
        )
    if form == RAW:
        return (TensorSpec("logits", "float32", "NCHW", (1, classes, *size)),)
    found = min(DETECTIONS, _candidates(head, classes, size))
    outputs = [
        TensorSpec("boxes", "float32", "ND4", (1, found, 4)),
        TensorSpec("scores", "float32", "ND", (1, found)),
        TensorSpec("classes", "int32", "ND", (1, found)),
    ]
    if head == "mask-rcnn":
        outputs.append(TensorSpec("masks", "float32", "NDHW", (1, found, 2 * MASK_SIDE, 2 * MASK_SIDE)))
    return tuple(outputs)


def _candidates(head: str, classes: int, size: Size) -> int:
    sources = min(PROPOSALS, len(rpn_anchors(size))) if head == "mask-rcnn" else len(anchors(size))
    return min(CANDIDATES, sources * classes)


assert operations  # noqa: S101  # importing it registers torch.ops.dualtoken
