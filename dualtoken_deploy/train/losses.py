"""Losses of the dense heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualtoken_deploy.data.objects import IGNORE
from dualtoken_deploy.train.matching import NOTHING, UNDECIDED

ALPHA, GAMMA = 0.25, 2.0  # RetinaNet, section 4.1
BETA = 1 / 9  # error from which smooth L1 is linear: Detectron's value for RetinaNet
AUXILIARY = 0.4  # share of the auxiliary head's loss (PSPNet, section 5.1)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t) of every logit (RetinaNet, equation 5); targets of 0 and 1, the same shape."""
    p = torch.sigmoid(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # -log(p_t)
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * (1 - p_t) ** gamma * entropy


def detection_losses(logits: Tensor, deltas: Tensor, classes: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss and smooth L1, each summed and divided by the anchors that took an object (at least 1).

    logits (B, A, C), deltas (B, A, 4); targets of `targets.match`: classes (B, A), offsets (B, A, 4).
    """
    decided, positive = classes != UNDECIDED, classes > NOTHING
    count = positive.sum().clamp(min=1)
    hot = F.one_hot(classes.clamp(min=0), logits.shape[-1]).to(logits.dtype) * positive[..., None]
    by_class = focal_loss(logits, hot)[decided].sum() / count
    by_box = F.smooth_l1_loss(deltas[positive], offsets[positive].to(deltas.dtype), reduction="sum", beta=BETA) / count
    return by_class, by_box


def segmentation_loss(logits: Tensor, auxiliary: Tensor, label_map: Tensor) -> Tensor:
    """Mean cross entropy over the pixels that are not IGNORE, and AUXILIARY times that of the auxiliary head.

    logits and auxiliary (B, C, H, W), label_map (B, H, W) int64.
    """
    count = (label_map != IGNORE).sum().clamp(min=1)
    main, second = (
        F.cross_entropy(x, label_map, ignore_index=IGNORE, reduction="sum") / count for x in (logits, auxiliary)
    )
    return main + AUXILIARY * second
