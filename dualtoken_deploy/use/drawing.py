"""Draws what a dense bundle found over its picture, and writes a PNG. No torch."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.errors import OutputError, UsageError
from dualtoken_deploy.use.predict_dense import DensePrediction

OPACITY = 0.5  # of a mask over the picture
GOLDEN_RATIO = 0.618034  # of the colour circle from one class to the next: neighbours are far apart


def colour(index: int) -> tuple[int, int, int]:
    """RGB of a class, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def check_png(path: Path) -> None:
    """Raises UsageError on another ending, OutputError where the folder is not there: before anything is run."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} does not end in .png; what was found is drawn as a PNG")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: no folder {path.parent}; make it first")


def draw(prediction: DensePrediction, path: Path) -> None:
    """Writes the picture with its boxes, labels and scores, masks, or the colours of its classes.

    Raises UsageError, OutputError.
    """
    check_png(path)
    picture = paint(load_image(prediction.image), prediction)
    try:
        Image.fromarray(picture).save(path, format="PNG")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def paint(picture: NDArray[np.uint8], prediction: DensePrediction) -> NDArray[np.uint8]:
    """The picture uint8 (h, w, 3) with what was found over it."""
    out = picture.astype(np.float64)
    found = prediction.found
    if found.label_map is not None:
        for area in prediction.areas:
            _lay(out, found.label_map == area.index, area.index)
    if found.masks is not None:
        for mask, item in zip(found.masks.shapes[::-1], prediction.objects[::-1], strict=True):  # the best on top
            _lay(out, mask, item.index)
    image = Image.fromarray(np.rint(out).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    side = min(image.size)
    font = ImageFont.load_default(max(10, side // 40))
    for item in prediction.objects[::-1]:
        x1, y1, x2, y2 = item.box
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour(item.index), width=max(1, side // 300))
        text = f"{item.label} {item.score:.2f}"
        left, top, right, bottom = pen.textbbox((x1, y1), text, font=font, anchor="lb")
        down = max(-top, 0)  # a label above the picture moves into it
        pen.rectangle((left, top + down, right, bottom + down), fill=colour(item.index))
        pen.text((x1, y1 + down), text, fill="black", font=font, anchor="lb")
    return np.array(image)


def _lay(picture: NDArray[np.float64], mask: NDArray[np.bool_], index: int) -> None:
    picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * np.array(colour(index), np.float64)
