"""Pictures stretched to a model's size, and what is found in them back in the picture's own pixels. No torch.

A picture is stretched to the model's fixed size, its two sides each by a factor of its own: nothing is cropped and
nothing padded, so every object stays in sight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualtoken_deploy.numerics import Array

Size = tuple[int, int]  # (H, W)
Scale = tuple[float, float]  # the model's size over the picture's: (vertical, horizontal)


def stretch(image: NDArray[np.uint8], size: Size) -> tuple[NDArray[np.uint8], Scale]:
    """A picture uint8 (h, w, 3) stretched to uint8 (H, W, 3), bilinear and antialiased, and the factors (H/h, W/w)."""
    height, width = image.shape[:2]
    scale = size[0] / height, size[1] / width
    if (height, width) == size:
        return image, scale
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)), scale


def boxes_to_model(boxes: Array, scale: Scale) -> NDArray[np.float64]:
    """Boxes (N, 4) in the picture's pixels as boxes in the model's."""
    vertical, horizontal = scale
    out: NDArray[np.float64] = boxes.astype(np.float64) * (horizontal, vertical, horizontal, vertical)
    return out


def boxes_to_picture(boxes: Array, scale: Scale) -> NDArray[np.float64]:
    """Boxes (N, 4) in the model's pixels as boxes in the picture's."""
    return boxes_to_model(boxes, (1 / scale[0], 1 / scale[1]))


def resize_map(labels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """A label map (h, w) at another size (H, W), either way: each pixel takes the class under its centre."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return np.ascontiguousarray(labels[rows[:, None], columns[None]])
