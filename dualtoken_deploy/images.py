"""From a picture to a tensor: the one way that calibration, validation, prediction and serving share. No torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dualtoken_deploy.errors import ImageError
from dualtoken_deploy.spec import InputContract

MAX_PIXELS = 50_000_000  # a decoded picture of this size takes 150 MB; Pillow itself refuses only above 178 megapixels

Pixels = NDArray[np.uint8]


def load_image(source: str | Path | bytes) -> Pixels:
    """Decodes a picture to uint8 RGB, (H, W, 3), upright by its EXIF orientation.

    The first frame of JPEG, PNG, WebP, GIF, BMP and TIFF. Grey (16 bit is scaled, not clipped), palette and CMYK are
    converted, transparency is laid over white, colour profiles are ignored. Raises ImageError on what is missing, not
    a picture, truncated, or over MAX_PIXELS (which is read from the header before anything is decoded).
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        _check_file(Path(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise _too_large(name, f"{width}x{height}")
                picture.load()
                return _to_rgb(ImageOps.exif_transpose(picture))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture that can be read; give a JPEG, PNG or WebP file") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError) as error:
        raise ImageError(f"{name} is damaged or truncated ({error}); copy or save it again") from error


def resize_and_crop(image: Pixels, size: tuple[int, int], crop_ratio: float) -> Pixels:
    """(H, W, 3) -> uint8 (height, width, 3): bicubic, antialiased, centre crop.

    The picture is scaled, keeping its shape, until it covers size / crop_ratio in both directions; for a square size
    that is its shorter side to side / crop_ratio. Only the region that the crop keeps is resampled, which gives the
    same pixels, and bounds the memory for pictures of any shape.
    """
    (height, width), (rows, columns) = image.shape[:2], size
    cover_rows, cover_columns = round(rows / crop_ratio), round(columns / crop_ratio)
    scale = max(cover_rows / height, cover_columns / width)
    scaled_height = max(round(height * scale), cover_rows)
    scaled_width = max(round(width * scale), cover_columns)
    top, left = (scaled_height - rows) // 2, (scaled_width - columns) // 2
    y, x = height / scaled_height, width / scaled_width  # source pixels a target pixel
    box = (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized)


def preprocess(image: Pixels, contract: InputContract) -> NDArray[Any]:
    """One picture as the contract wants it, without the batch axis.

    Kind "image": uint8 (H, W, 3). Kind "tensor": float32 (3, H, W), (x / 255 - mean) / std.
    """
    cropped = resize_and_crop(image, contract.size, contract.crop_ratio)
    if contract.kind == "image":
        return cropped
    normalised = (cropped / 255.0 - np.array(contract.mean)) / np.array(contract.std)
    out: NDArray[Any] = np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)
    return out


def load_batch(sources: Sequence[str | Path], contract: InputContract) -> NDArray[Any]:
    """Loads and preprocesses pictures: (N, ...) in the contract's dtype. Raises ImageError on the first bad one."""
    return np.stack([preprocess(load_image(source), contract) for source in sources])


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not a picture; name the files in it")
    if not path.exists():
        raise ImageError(f"no picture at {path}; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes); copy or save it again")


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(f"{name} is too large ({size}); at most {MAX_PIXELS // 1_000_000} megapixels: scale it down")


def _to_rgb(picture: Image.Image) -> Pixels:
    """uint8 RGB of any mode that Pillow decodes to."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel (modes I;16, I) or float (F, taken as 0..1 where it stays there) as mode L."""
    values = np.asarray(picture).astype(np.float64)
    full = 65535.0  # Pillow decodes 16-bit grey to I;16 and, in older versions, to I
    if picture.mode == "F":
        full = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))
