"""Dense models by name, on any classifier of the registry with stages of strides 8, 16 and 32 among its last three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models import registry
from dualtoken_deploy.models.heads.mask_rcnn import MaskRCNN
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.segmentation import Segmenter

Channels = tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """A kind of dense model: `make(backbone, channels, classes)`; the paper's row is on `variant` with `classes`."""

    name: str
    make: Callable[[Backbone, Channels, int], nn.Module]
    classes: int
    variant: str
    image_size: tuple[int, int]  # at which the paper counts
    paper_params_m: float
    paper_macs_g: float


HEADS: Mapping[str, Head] = MappingProxyType(
    {
        head.name: head
        for head in (
            Head("retinanet", RetinaNet, 80, "s", (800, 1280), 20.0, 170),
            Head("mask-rcnn", MaskRCNN, 80, "s-mix", (800, 1280), 30.0, 191),
            Head("deeplabv3", lambda b, c, n: Segmenter(b, c, n, "deeplabv3"), 150, "s", (512, 512), 26.3, 68.4),
            Head("pspnet", lambda b, c, n: Segmenter(b, c, n, "pspnet"), 150, "s", (512, 512), 21.7, 58.3),
        )
    }
)


def create_dense_model(
    head: str, variant: str | None = None, classes: int | None = None, seed: int = registry.DEFAULT_SEED, **options: Any
) -> nn.Module:
    """A dense model in evaluation mode, freshly initialised from `seed`; variant and classes default to the paper's.

    `options` are the classifier's. Raises UsageError on an unknown name or option.
    """
    if head not in HEADS:
        raise UsageError(f"unknown head {head!r}; valid heads: {', '.join(HEADS)}")
    row = HEADS[head]
    name = variant or row.variant
    model = registry.create_model(name, seed=seed, **options)
    channels = tuple(getattr(model.config, "channels"))[-3:]  # noqa: B009 (every family has them)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = row.make(Backbone(model, channels), channels, row.classes if classes is None else classes)
    return dense.eval()
