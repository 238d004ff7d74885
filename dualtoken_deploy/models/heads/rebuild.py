"""Dense models for bundles: random ones that find something, and the one that a bundle was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualtoken_deploy.models.heads.mask_rcnn import MaskRCNN
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.table import create_dense_model
from dualtoken_deploy.models.registry import DEFAULT_SEED, randomise

OFFSETS = 0.15  # of an anchor's sides: by so much random boxes differ from their anchors
RARE = -3.0  # bias of random class logits of RetinaNet: most of what it sees is nothing


def random_dense_model(head: str, seed: int = DEFAULT_SEED, **options: Any) -> nn.Module:
    """A dense model whose every parameter is random, with scores and boxes spread enough that detectors find something.

    A freshly initialised one gives every anchor the same score: nothing would come out of suppression to compare.
    `options`: those of create_dense_model but weights.
    """
    model = create_dense_model(head, seed=seed, **options)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.startswith("backbone.") or not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                continue
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(model, RetinaNet):
            model.class_tower.predict.get_parameter("bias").fill_(RARE)
            model.box_tower.predict.weight.mul_(OFFSETS)
        if isinstance(model, MaskRCNN):
            model.proposals.deltas.weight.mul_(OFFSETS)
            model.boxes.deltas.weight.mul_(OFFSETS)
    return model
