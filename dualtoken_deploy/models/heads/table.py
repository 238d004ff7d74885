"""Dense models by name, on any classifier of the registry with stages of strides 8, 16 and 32 among its last three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dualtoken_deploy.errors import UsageError, WeightsError
from dualtoken_deploy.models import registry
from dualtoken_deploy.models.count import count_macs, count_params, count_part
from dualtoken_deploy.models.heads.mask_rcnn import BOX_SIDE, MASK_SIDE, MaskRCNN
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.segmentation import Segmenter
from dualtoken_deploy.models.weights import WeightsInfo, describe_weights

Channels = tuple[int, int, int]
STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Head:
    """A kind of dense model: `make(backbone, channels, classes, width)`; the paper's row is on `variant`."""

    name: str
    task: str  # detect or segment
    make: Callable[[Backbone, Channels, int, int], nn.Module]
    width: int  # channels of the pyramid or of the context, the paper's
    classes: int
    variant: str
    image_size: tuple[int, int]  # at which the paper counts
    paper_params_m: float
    paper_macs_g: float


def _segmenter(context: str) -> Callable[[Backbone, Channels, int, int], nn.Module]:
    return lambda backbone, channels, classes, width: Segmenter(backbone, channels, classes, context, width)


HEADS: Mapping[str, Head] = MappingProxyType(
    {
        head.name: head
        for head in (
            Head("retinanet", "detect", RetinaNet, 256, 80, "s", (800, 1280), 20.0, 170),
            Head("mask-rcnn", "detect", MaskRCNN, 256, 80, "s-mix", (800, 1280), 30.0, 191),
            Head("deeplabv3", "segment", _segmenter("deeplabv3"), 512, 150, "s", (512, 512), 26.3, 68.4),
            Head("pspnet", "segment", _segmenter("pspnet"), 512, 150, "s", (512, 512), 21.7, 58.3),
        )
    }
)


PROPOSALS, DETECTIONS = 1000, 100  # regions of an image whose boxes, and whose masks, are counted


def describe_heads() -> list[dict[str, Any]]:
    """Every head on the paper's variant, with counted parameters and MACs at the paper's size, and its figures."""
    rows = []
    for head in HEADS.values():
        with torch.device("meta"):
            model = create_dense_model(head.name)
        macs = count_macs(model, head.image_size)
        if isinstance(model, MaskRCNN):
            macs += count_part(model.boxes, (PROPOSALS, head.width, BOX_SIDE, BOX_SIDE))
            macs += count_part(model.masks, (DETECTIONS, head.width, MASK_SIDE, MASK_SIDE))
        rows.append(
            {
                "head": head.name,
                "task": head.task,
                "variant": head.variant,
                "classes": head.classes,
                "image_size": list(head.image_size),
                "params": count_params(model),
                "macs": macs,
                "paper_params_m": head.paper_params_m,
                "paper_macs_g": head.paper_macs_g,
            }
        )
    return rows


def get_head(name: str) -> Head:
    """The row of a head. Raises UsageError that lists the valid ones."""
    if name not in HEADS:
        raise UsageError(f"unknown head {name!r}; valid heads: {', '.join(HEADS)}")
    return HEADS[name]


def create_dense_model(
    head: str,
    variant: str | None = None,
    classes: int | None = None,
    width: int | None = None,
    weights: str | Path | None = None,
    image_size: int | tuple[int, int] | str | None = None,
    seed: int = registry.DEFAULT_SEED,
    **options: Any,
) -> nn.Module:
    """A dense model in evaluation mode, float32, on the CPU.

    `weights`: those of a dense run (its folder, a safetensors file, or a word of BUILT_IN_WEIGHTS), which say variant,
    classes, width, size and options themselves; None initialises at random from `seed`, and what is not given is the
    paper's. `width`: channels of the pyramid or of the context. `options` are the classifier's.
    Raises UsageError on an unknown name or option, WeightsError where the weights are of another model.
    """
    row = get_head(head)
    if weights is not None:
        said = describe_head(weights)
        check_same(said, weights, head=head, variant=variant, classes=classes, width=width)
        variant, classes, width = said.variant, len(said.labels), said.width
        image_size, options = image_size or said.image_size, {**said.options, **options}
    if width is not None and width < 1:
        raise UsageError(f"width must be at least 1, not {width}; the paper's is {row.width}")
    name = variant or row.variant
    if image_size is not None:
        options["image_size"] = image_size
    model = registry.create_model(name, seed=seed, **options)
    if model.strides[-3:] != STRIDES:
        raise UsageError(f"{name} has stages of strides {model.strides}; dense heads need {STRIDES} as the last three")
    channels = tuple(getattr(model.config, "channels"))[-3:]  # noqa: B009 (every family has them)
    count = row.classes if classes is None else classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = row.make(Backbone(model, channels), channels, count, width or row.width)
    if weights is not None:
        registry.load_weights(dense, said.path, variant=f"{head} on {name}")
    return dense.eval()


def describe_head(weights: str | Path) -> WeightsInfo:
    """What the weights of a head say of it: a run's folder, a file, or a word of BUILT_IN_WEIGHTS.

    Raises WeightsError where the file is missing or damaged, or holds no detector or segmenter.
    """
    said = describe_weights(weights)
    if said is None or said.head is None or said.width is None:
        raise WeightsError(
            f"{weights} does not say that it holds a detector or segmenter; give those of a "
            "run of train with --task detect or segment"
        )
    return said


def check_same(said: WeightsInfo, weights: str | Path, **given: str | int | None) -> None:
    """Raises WeightsError where something that was asked for is not what the weights say."""
    found = {"head": said.head, "variant": said.variant, "classes": len(said.labels), "width": said.width}
    for name, value in given.items():
        if value is not None and value != found[name]:
            raise WeightsError(
                f"{weights} are weights with {name} {found[name]}, not {value}; give {name} {found[name]}"
            )
