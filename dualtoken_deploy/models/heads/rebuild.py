"""Dense models for bundles: random ones that find something, and the one that a bundle was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.errors import WeightsError
from dualtoken_deploy.models.heads.mask_rcnn import MaskRCNN
from dualtoken_deploy.models.heads.output_forms import FORMS
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.table import create_dense_model
from dualtoken_deploy.models.registry import DEFAULT_SEED, randomise, weights_sha256

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


def rebuild_dense(manifest: Manifest) -> nn.Module:
    """The eager model that a dense bundle was made from, in the bundle's form.

    Raises WeightsError where the file is gone or the tensors are not those of the export (sha256).
    """
    weights, said = manifest.weights, manifest.dense or {}
    head = str(manifest.head)
    if weights.source == RANDOM:
        model = random_dense_model(
            head, weights.random_seed, variant=manifest.variant, classes=said["classes"], width=said["width"],
            **manifest.options,
        )  # fmt: skip
    else:
        model = create_dense_model(head, manifest.variant, weights=weights.source, image_size=manifest.input.size)
    if weights_sha256(model) != weights.sha256:
        raise WeightsError(
            f"the eager weights of {head} on {manifest.variant} from {weights.source!r} are not those that the "
            "bundle was made from (sha256 differs); export it again"
        )
    return FORMS[head][said["form"]](model, manifest.input.size)
