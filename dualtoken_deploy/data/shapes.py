"""A labelled set of pictures that the project draws itself: shapes, textures and glyphs, made hard on purpose.

It needs no download, every picture follows from one seed, and a small model does not solve it, so that a loss of a
point in quantization shows. Not a benchmark of anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 96  # pixels of a finished picture; the models' preprocessing enlarges it
CANVAS = 2 * SIDE  # drawn twice as large and scaled down, which smooths the edges
Generator = np.random.Generator
Mask = Image.Image  # mode "L", CANVAS x CANVAS


def _polygon(points: list[tuple[float, float]]) -> Callable[[Generator], Mask]:
    """A class whose canonical form is a polygon in [-1, 1]^2; filled, or sometimes an outline."""

    def draw(random: Generator) -> Mask:
        mask = Image.new("L", (CANVAS, CANVAS))
        placed = _place(points, random, turn=math.pi)
        pen = ImageDraw.Draw(mask)
        if random.random() < 0.3:
            pen.line([*placed, placed[0], placed[1]], fill=255, width=int(random.integers(7, 13)), joint="curve")
        else:
            pen.polygon(placed, fill=255)
        return mask

    return draw


def _place(points: list[tuple[float, float]], random: Generator, turn: float) -> list[tuple[float, float]]:
    """Canonical points turned by up to `turn`, stretched, scaled and moved onto the canvas."""
    angle, size = random.uniform(-turn, turn), random.uniform(0.30, 0.43) * CANVAS
    stretch = random.uniform(0.87, 1.15)
    middle = CANVAS / 2 + random.uniform(-0.12, 0.12, 2) * CANVAS
    cos, sin = math.cos(angle), math.sin(angle)
    out = []
    for x, y in points:
        x, y = x * stretch * size, y / stretch * size
        out.append((middle[0] + cos * x - sin * y, middle[1] + sin * x + cos * y))
    return out


def _regular(corners: int) -> list[tuple[float, float]]:
    return [(math.sin(2 * math.pi * i / corners), -math.cos(2 * math.pi * i / corners)) for i in range(corners)]


def _star(tips: int, inner: float) -> list[tuple[float, float]]:
    radii = (1.0, inner)
    angles = [math.pi * i / tips for i in range(2 * tips)]
    return [(radii[i % 2] * math.sin(a), -radii[i % 2] * math.cos(a)) for i, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    steps = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    across = np.sin(steps) ** 3
    down = -(13 * np.cos(steps) - 5 * np.cos(2 * steps) - 2 * np.cos(3 * steps) - np.cos(4 * steps)) / 16
    return list(zip(across.tolist(), down.tolist(), strict=True))


def _crescent() -> list[tuple[float, float]]:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 40)
    inner = outer[::-1]
    points = [(math.cos(a), math.sin(a)) for a in outer]
    return points + [(0.38 + 0.66 * math.cos(a), 0.66 * math.sin(a) * 1.02) for a in inner]


_CROSS = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
          (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]  # fmt: skip
_ARROW = [(0, -1), (0.75, -0.1), (0.28, -0.1), (0.28, 1), (-0.28, 1), (-0.28, -0.1), (-0.75, -0.1)]


def _texture(pattern: Callable[[NDArray[Any], NDArray[Any], Generator], NDArray[Any]]) -> Callable[[Generator], Mask]:
    """A class that is a repeated pattern, seen through an irregular blob. `pattern`: turned pixel grids to 0..1."""

    def draw(random: Generator) -> Mask:
        angle = random.uniform(0, math.pi)
        ys, xs = np.mgrid[0:CANVAS, 0:CANVAS] - CANVAS / 2
        u, v = xs * math.cos(angle) + ys * math.sin(angle), ys * math.cos(angle) - xs * math.sin(angle)
        waves = 5 * random.uniform(0.5, 1.5, 2)
        v = v + waves[0] * np.sin(u / random.uniform(14, 30))  # bent a little, so that no two are congruent
        filled = np.clip(pattern(u, v, random), 0, 1)
        steps = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        blob = [(math.cos(a) * r, math.sin(a) * r) for a, r in zip(steps, random.uniform(0.75, 1.1, 14), strict=True)]
        window = Image.new("L", (CANVAS, CANVAS))
        ImageDraw.Draw(window).polygon(_place(blob, random, math.pi), fill=255)
        return Image.fromarray((filled * np.asarray(window)).astype(np.uint8))

    return draw


def _stripes(_u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    return np.asarray(np.sin(v * 2 * math.pi / random.uniform(12, 24)) > 0, dtype=float)


def _checks(u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    period = random.uniform(16, 30)
    return np.asarray((np.floor(u * 2 / period) + np.floor(v * 2 / period)) % 2, dtype=float)


def _dots(u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    period = random.uniform(15, 26)
    near = (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2
    return np.asarray(near < (0.33 * period) ** 2, dtype=float)


def _mesh(u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    period = random.uniform(16, 28)
    return np.asarray((u % period < 0.28 * period) | (v % period < 0.28 * period), dtype=float)


def _bricks(u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    height = random.uniform(11, 18)
    row = np.floor(v / height)
    across = u + (row % 2) * height * 1.1
    return np.asarray((v % height > 0.2 * height) & (across % (2.2 * height) > 0.2 * height), dtype=float)


def _rings(u: NDArray[Any], v: NDArray[Any], random: Generator) -> NDArray[Any]:
    radius = np.hypot(u - random.uniform(-20, 20), v - random.uniform(-20, 20))
    return np.asarray(np.sin(radius * 2 * math.pi / random.uniform(12, 22)) > 0, dtype=float)


def _glyph(letter: str) -> Callable[[Generator], Mask]:
    """A letter of Pillow's own scalable font, turned by up to 30 degrees and slanted."""

    def draw(random: Generator) -> Mask:
        size = random.uniform(0.55, 0.85) * CANVAS
        mask = Image.new("L", (CANVAS, CANVAS))
        middle = tuple(CANVAS / 2 + random.uniform(-0.1, 0.1, 2) * CANVAS)
        font = ImageFont.load_default(size)
        ImageDraw.Draw(mask).text((middle[0], middle[1]), letter, fill=255, font=font, anchor="mm")
        slant = random.uniform(-0.3, 0.3)
        mask = mask.transform(
            mask.size, Image.Transform.AFFINE, (1, slant, -slant * CANVAS / 2, 0, 1, 0), Image.Resampling.BILINEAR
        )
        return mask.rotate(random.uniform(-30, 30), Image.Resampling.BILINEAR)

    return draw


CLASSES: Mapping[str, Callable[[Generator], Mask]] = MappingProxyType(
    {
        "arrow": _polygon(_ARROW),
        "circle": _polygon(_regular(40)),
        "crescent": _polygon(_crescent()),
        "cross": _polygon(_CROSS),
        "heart": _polygon(_heart()),
        "hexagon": _polygon(_regular(6)),
        "pentagon": _polygon(_regular(5)),
        "square": _polygon(_regular(4)),
        "star-4": _polygon(_star(4, 0.42)),
        "star-5": _polygon(_star(5, 0.45)),
        "star-6": _polygon(_star(6, 0.5)),
        "triangle": _polygon(_regular(3)),
        "texture-bricks": _texture(_bricks),
        "texture-checks": _texture(_checks),
        "texture-dots": _texture(_dots),
        "texture-mesh": _texture(_mesh),
        "texture-rings": _texture(_rings),
        "texture-stripes": _texture(_stripes),
        **{f"glyph-{letter}": _glyph(letter) for letter in "AFKPRS58"},
    }
)


def draw_picture(name: str, random: Generator) -> NDArray[np.uint8]:
    """One picture of a class: uint8 (SIDE, SIDE, 3)."""
    ground = random.uniform(30, 225, 3)
    canvas = Image.fromarray(_background(ground, random))
    _clutter(canvas, random, count=int(random.integers(2, 7)), longest=0.25)
    canvas.paste(Image.new("RGB", canvas.size, _other_colour(ground, random)), mask=CLASSES[name](random))
    _clutter(canvas, random, count=int(random.integers(0, 3)), longest=0.18)
    picture = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0.0, 1.8)))
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)
    noisy = small + random.normal(0, random.uniform(2, 14), small.shape)
    out: NDArray[np.uint8] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return out


def _background(ground: NDArray[Any], random: Generator) -> NDArray[np.uint8]:
    """A colour with a slope of light and soft blotches."""
    ys, xs = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS - 0.5
    slope = (xs * random.uniform(-50, 50) + ys * random.uniform(-50, 50))[..., None]
    coarse = Image.fromarray(random.uniform(-30, 30, (6, 6)).astype(np.float32))
    blotches = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))[..., None]
    out: NDArray[np.uint8] = np.clip(ground + slope + blotches, 0, 255).astype(np.uint8)
    return out


def _other_colour(ground: NDArray[Any], random: Generator) -> tuple[int, int, int]:
    """A colour whose brightness differs from the ground's by 60 to 130 levels."""
    step = random.uniform(60, 130)
    bright = ground.mean()
    step = -step if bright + step > 250 or (bright - step > 5 and random.random() < 0.5) else step
    red, green, blue = np.clip(ground + step + random.uniform(-45, 45, 3), 0, 255).astype(int).tolist()
    return red, green, blue


def _clutter(canvas: Image.Image, random: Generator, count: int, longest: float) -> None:
    """Lines and small ellipses of any colour, in front of or behind what counts."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        x, y = random.uniform(0, CANVAS, 2)
        dx, dy = random.uniform(-longest, longest, 2) * CANVAS
        red, green, blue = random.integers(0, 256, 3).tolist()
        if random.random() < 0.65:
            pen.line((x, y, x + dx, y + dy), fill=(red, green, blue), width=int(random.integers(2, 7)))
        else:
            box = (x, y, x + abs(dx) / 2 + 2, y + abs(dy) / 2 + 2)
            pen.ellipse(box, fill=(red, green, blue))
