"""Draws answers over a picture. No torch."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dualtoken_deploy.tasks.base import Found, Pixels

LEAST_TEXT, LEAST_LINE, PADDING = 13, 2, 2  # pixels
OPACITY = 0.5  # of a mask over the picture
MOST_AREAS = 255  # colours of a palette, beside none
GOLDEN_RATIO = 0.618034  # of the colour circle from one class to the next: neighbours are far apart


def colour(index: int) -> tuple[int, int, int]:
    """RGB of a class, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def ink(paper: tuple[int, int, int]) -> str:
    """Black or white, which can be read on a colour: the one with more contrast (WCAG 2, relative luminance)."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in paper]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def paint_areas(picture: Pixels, found: Found, answers: Sequence[Any]) -> Pixels:
    """The picture uint8 (h, w, 3) with each class of the label map in its colour."""
    out = picture.astype(np.float64)
    for area in answers:
        _lay(out, found.label_map == area.index, area.index)
    return np.rint(out).astype(np.uint8)


def paint_objects(picture: Pixels, found: Found, answers: Sequence[Any]) -> Pixels:
    """The picture uint8 (h, w, 3) with masks, boxes, labels and scores; the best on top."""
    out = picture.astype(np.float64)
    if found.masks is not None:
        for mask, item in zip(found.masks.shapes[::-1], answers[::-1], strict=True):
            _lay(out, mask, item.index)
    image = Image.fromarray(np.rint(out).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    side = min(image.size)
    font, width = ImageFont.load_default(max(LEAST_TEXT, side // 30)), max(LEAST_LINE, side // 160)
    for item in answers[::-1]:
        x1, y1, x2, y2 = item.box
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour(item.index), width=width)
        text = f"{item.label} {item.score:.2f}"
        left, top, right, bottom = pen.textbbox((x1, y1), text, font=font, anchor="lb")
        down = max(PADDING - top, 0)  # a label above the picture moves into it
        along = (
            min(0, image.width - right - PADDING) if right - left < image.width else -left
        )  # and one beyond its side
        place = (left + along - PADDING, top + down - PADDING, right + along + PADDING, bottom + down + PADDING)
        pen.rectangle(place, fill=colour(item.index))
        pen.text((x1 + along, y1 + down), text, fill=ink(colour(item.index)), font=font, anchor="lb")
    return np.array(image)


def areas(found: Found, answers: Sequence[Any], longest: int) -> Image.Image | None:
    """What belongs to the answers, each class in its colour, over nothing: every n-th pixel, so that no side is longer
    than `longest`. None where there is neither a label map nor a mask."""
    whole = found.label_map
    if whole is None and found.masks is not None:
        whole = found.masks.shapes
    if whole is None or not answers:
        return None
    height, width = whole.shape[-2:]
    step = -(-max(height, width) // longest)
    marks = np.zeros((-(-height // step), -(-width // step)), np.uint8)
    palette = [0, 0, 0]
    for number, item in reversed(list(enumerate(answers[:MOST_AREAS], 1))):  # the best on top
        one = whole == item.index if found.label_map is not None else whole[number - 1]
        marks[one[::step, ::step]] = number
    for item in answers[:MOST_AREAS]:
        palette += colour(item.index)
    image = Image.fromarray(marks, "P")
    image.putpalette(palette)
    image.info["transparency"] = bytes([0]) + bytes([round(255 * OPACITY)]) * len(answers[:MOST_AREAS])
    return image


def _lay(picture: NDArray[np.float64], mask: NDArray[np.bool_], index: int) -> None:
    picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * np.array(colour(index), np.float64)
