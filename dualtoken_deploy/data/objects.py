"""What a picture is annotated with, and what is found in it: objects with a class each, or a map of labels."""

from __future__ import annotations

from dataclasses import dataclass

from dualtoken_deploy.numerics import Array

IGNORE = 255  # in a label map: a pixel that is of no class and counts nowhere


@dataclass(frozen=True)
class Objects:
    """Objects of one image: `shapes` are boxes (N, 4) or masks (N, H, W) of bool; `scores` None for the true ones."""

    shapes: Array
    classes: Array
    scores: Array | None = None
