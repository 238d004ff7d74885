"""Generated scenes for dense tasks: shapes in front of clutter, with boxes, masks and label maps known exactly.

The same seed gives the same scenes. Shapes lie in front of one another; a mask is what is seen of its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.objects import Objects

VERSION = 1  # to be raised whenever a scene changes
CLUTTER = "clutter"  # class 0 of a label map
CLASSES = ("disc", "square", "triangle", "cross")
SEEN = 40  # pixels that must be seen of a shape, else it is no object


@dataclass(frozen=True)
class Scene:
    """`image` uint8 (H, W, 3); `boxes` and `masks` hold the same objects; `labels` (H, W): 0 clutter, class + 1."""

    image: NDArray[np.uint8]
    boxes: Objects
    masks: Objects
    labels: NDArray[np.uint8]


def make_scene(seed: int, size: tuple[int, int] = (96, 96), most: int = 4) -> Scene:
    """One scene of (H, W) with one to `most` shapes of 18 to 40 pixels."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = _clutter(rng, size)
    owner = np.zeros(size, np.int64)  # 0: clutter; i + 1: shape i is seen
    kinds = rng.integers(0, len(CLASSES), int(rng.integers(1, most + 1)))
    for i, kind in enumerate(kinds):
        side = int(rng.integers(18, 41))
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        drawn = _shape(int(kind), side)
        colour = rng.integers(0, 256, 3)
        texture = np.clip(colour + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
        image[top : top + side, left : left + side][drawn] = texture[drawn]
        owner[top : top + side, left : left + side][drawn] = i + 1
    masks = np.array([owner == i + 1 for i in range(len(kinds))])
    kept = masks.sum((1, 2)) >= SEEN
    labels = np.zeros(size, np.uint8)
    for mask, kind in zip(masks, kinds, strict=True):
        labels[mask] = kind + 1  # also where too little is seen to be an object: the pixel is what it is
    boxes = np.array([_box(mask) for mask in masks[kept]]).reshape(-1, 4)
    return Scene(image, Objects(boxes, kinds[kept]), Objects(masks[kept], kinds[kept]), labels)


def _clutter(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A coarse colour field, lines and noise: edges and colours that belong to no shape."""
    height, width = size
    coarse = rng.integers(30, 226, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float64)
    field = np.kron(coarse, np.ones((16, 16, 1)))[:height, :width]
    for _ in range(6):
        row, column = int(rng.integers(0, height)), int(rng.integers(0, width))
        if rng.random() < 0.5:
            field[row : row + 2] = rng.integers(0, 256, 3)
        else:
            field[:, column : column + 2] = rng.integers(0, 256, 3)
    return np.clip(field + rng.normal(0, 15, field.shape), 0, 255).astype(np.uint8)


def _shape(kind: int, side: int) -> NDArray[np.bool_]:
    """The shape of a class in a square of `side` pixels."""
    at = (np.arange(side) + 0.5) / side * 2 - 1  # -1 .. 1
    x, y = at[None, :], at[:, None]
    if CLASSES[kind] == "disc":
        return np.asarray(x**2 + y**2 <= 1)
    if CLASSES[kind] == "square":
        return np.ones((side, side), bool)
    if CLASSES[kind] == "triangle":
        return np.asarray(np.abs(x) <= (y + 1) / 2)
    return np.asarray((np.abs(x) <= 0.3) | (np.abs(y) <= 0.3))


def _box(mask: NDArray[np.bool_]) -> list[float]:
    """The smallest box around what is seen."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
