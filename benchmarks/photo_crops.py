"""Fixed crops of the photographs that come with scikit-image, for calibration and for held-out agreement.

    python benchmarks/photo_crops.py FOLDER

Writes FOLDER/train and FOLDER/val: of each photograph the whole and nine overlapping squares of three fifths of its
shorter side, ten pictures each. No photograph is in both parts, and the stereo pair is in one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from dualtoken_deploy.datasets import open_dataset

VAL = (
    "chelsea.png",
    "rocket.jpg",
    "retina.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "coins.png",
    "grass.png",
)
SIDE = 0.6
STEPS = 3


def main(folder: str) -> None:
    for path in open_dataset("photographs").images:
        part = Path(folder) / ("val" if path.name in VAL else "train")
        part.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as file:
            picture = file.convert("RGB")
        picture.save(part / f"{path.stem}.png")
        width, height = picture.size
        side = round(SIDE * min(width, height))
        for i in range(STEPS * STEPS):
            left, top = (
                (extent - side) * step // (STEPS - 1) for extent, step in ((width, i % STEPS), (height, i // STEPS))
            )
            picture.crop((left, top, left + side, top + side)).save(part / f"{path.stem}-{i}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
