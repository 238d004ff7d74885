"""The small variants of the tests and what their bundles are made of; light to import, for processes of their own."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from dualtoken_deploy.models import dualformer, dualtoken_vit, lightvit, registry, vim2
from dualtoken_deploy.models.registry import Variant

# T (mix) with a block of stage 1, whose tokens are constant, and one of stage 3, which gets them from it and has no
# Conv Encoder: every kind of layer that there is, and a fifth of the time to trace. Stage 2 is a downsampling alone.
TINY = Variant("tiny-mix", "two blocks", replace(dualtoken_vit.T, blocks=(1, 0, 1), token_mlp="mix"))
TINY_LIGHT = Variant(
    "tiny-lightvit",
    "one block a stage",
    replace(lightvit.T, channels=(32, 64, 96), blocks=(1, 1, 1), heads=(2, 2, 4), global_tokens=4),
)
TINY_DUAL = Variant(
    "tiny-dualformer",
    "one block a stage",
    replace(dualformer.T, channels=(32, 48, 64, 96), blocks=(1, 1, 1, 1), expansion=(2, 2, 2, 2), heads=4),
)
TINY_VIM = Variant(
    "tiny-vim2",
    "one pair of layers in the last two stages, whose scans are short",
    replace(vim2.T, channels=(32, 32, 48, 64), blocks=(0, 0, 2, 2), channel_width=(64, 64, 96, 64), states=4),
)
SMALL = {"variant": TINY.name, "image_size": 64, "num_classes": 10}


def make_known() -> None:
    """Makes them variants like any other in this process."""
    small = {v.name: v for v in (TINY, TINY_LIGHT, TINY_DUAL, TINY_VIM)}
    registry.VARIANTS = MappingProxyType({**registry.VARIANTS, **small})
