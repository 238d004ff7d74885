"""Labelled crops of the photographs that come with scikit-image: which photograph is it? A set of real pictures to
train a model briefly on, to calibrate, and to measure what INT8 changes.

    python benchmarks/photo_crops.py FOLDER

Writes FOLDER/train/CLASS and FOLDER/val/CLASS: 30 squares of the left two thirds of every photograph, and 8 of its
right third, which the first do not touch. Positions are fixed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from dualtoken_deploy.data.folders import open_dataset

GRID = {"train": (5, 6), "val": (2, 4)}  # columns, rows
SHARE = 0.8  # of the third's width, or of the height where that is less


def main(folder: str) -> None:
    for path in open_dataset("photographs").images:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        width, height = picture.size
        border = width * 2 // 3
        side = round(SHARE * min(width - border, height))
        for part, (left, right) in {"train": (0, border), "val": (border, width)}.items():
            into = Path(folder) / part / path.stem
            into.mkdir(parents=True, exist_ok=True)
            columns, rows = GRID[part]
            for i in range(columns * rows):
                x = left + (right - left - side) * (i % columns) // (columns - 1)
                y = (height - side) * (i // columns) // (rows - 1)
                picture.crop((x, y, x + side, y + side)).save(into / f"{i:02}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
