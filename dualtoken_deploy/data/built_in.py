"""Labelled sets that need no download, written once as ordinary folders of pictures into the user's cache.

<cache>/<set>-<version>/{train,val}/<class>/<number>.png      ImageNet's layout
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.errors import OutputError, missing_extra
from dualtoken_deploy.files import cache_folder

Picture = tuple[str, str, NDArray[np.uint8]]  # part, class, pixels: grey (H, W) or RGB (H, W, 3)

SPLIT_SEED = 0
DIGITS_VAL = 360  # of 1,797
SHAPES_TRAIN, SHAPES_VAL = 120, 30  # pictures a class


def built_in_folder(name: str) -> Path:
    """The folder of a set of BUILT_IN, drawn first where the cache lacks it.

    Raises MissingError where it needs a package that is not here, OutputError where the cache cannot be written.
    """
    version, make = BUILT_IN[name]
    folder = cache_folder() / f"{name}-{version}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        _write(temporary, make())
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and made the same
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the data set to {folder}: {error.strerror or error}; set DUALTOKEN_CACHE to a folder with room"
    )


def _write(folder: Path, pictures: Iterator[Picture]) -> None:
    from PIL import Image

    for number, (part, name, pixels) in enumerate(pictures):
        place = folder / part / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:05d}.png")


def _digits() -> Iterator[Picture]:
    """scikit-learn's bundled UCI digits, 8x8 of 17 grey levels, with a border of a pixel for the evaluation crop."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing_extra("train", "the digits data set") from error
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    held_out = set(order[:DIGITS_VAL].tolist())
    for i, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        grey = np.pad(np.rint(image * (255 / 16)).astype(np.uint8), 1)
        yield "val" if i in held_out else "train", str(label), grey


def _shapes() -> Iterator[Picture]:
    from dualtoken_deploy.data.shapes import CLASSES, draw_picture

    for part, count in (("train", SHAPES_TRAIN), ("val", SHAPES_VAL)):
        for index, name in enumerate(CLASSES):
            for i in range(count):  # each picture has its own seed: more of them change none of the others
                seed = np.random.SeedSequence((SPLIT_SEED, part == "val", index, i))
                yield part, name, draw_picture(name, np.random.default_rng(seed))


# name -> (version, to be raised whenever a picture changes; what makes them)
BUILT_IN: Mapping[str, tuple[str, Callable[[], Iterator[Picture]]]] = MappingProxyType(
    {"digits": ("v1", _digits), "shapes": ("v1", _shapes)}
)
