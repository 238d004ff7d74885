"""From a picture to a tensor: the one way that calibration, validation, prediction and serving share. No torch."""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as Tag
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dualtoken_deploy.data.picture_bounds import ExcessError, canvas, check_parts
from dualtoken_deploy.data.stretch import stretch
from dualtoken_deploy.errors import ImageError, LargeImageError, UsageError, install_command
from dualtoken_deploy.spec import CROP, PICTURES, STRETCH, InputContract

MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow itself refuses only above 178 million

# (offset, magic bytes, decoder). Image.open would try every format it knows, and one of them starts Ghostscript; it
# would also answer a bomb with a warning, and catching warnings is not safe in a server's threads.
DECODERS: tuple[tuple[int, bytes, type[ImageFile.ImageFile]], ...] = (
    (0, b"\xff\xd8\xff", JpegImageFile),
    (0, b"\x89PNG\r\n\x1a\n", PngImageFile),
    (8, b"WEBP", WebPImageFile),
    (0, b"GIF87a", GifImageFile),
    (0, b"GIF89a", GifImageFile),
    (0, b"BM", BmpImageFile),
    (0, b"II*\0", TiffImageFile),
    (0, b"MM\0*", TiffImageFile),
    (0, b"II+\0", TiffImageFile),  # BigTIFF
    (0, b"MM\0+", TiffImageFile),
)

FORMATS: Mapping[str, str] = MappingProxyType(  # Pillow's name -> how a person writes it
    {
        "JPEG": "JPEG",
        "PNG": "PNG",
        "WEBP": "WebP",
        "AVIF": "AVIF",
        "HEIF": "HEIC",
        "GIF": "GIF",
        "BMP": "BMP",
        "TIFF": "TIFF",
    }
)

# Brands of a file in ISO boxes (ISO/IEC 23008-12 and the AVIF specification): what is in it.
AVIF_BRANDS, HEIF_BRANDS = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")

# What Pillow's decoders raise on damaged data: seen in a million damaged files, or raised in their source.
# libavif and libheif say RuntimeError for all of it.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    RuntimeError,
)  # fmt: skip

TURNS: Mapping[Any, Image.Transpose] = MappingProxyType(  # EXIF 2.32, tag 274: how to show what is stored
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)

KERNEL_RADIUS = 2  # of the Keys cubic, in pixels of the coarser side

Pixels = NDArray[np.uint8]


def load_image(
    source: str | Path | bytes, max_pixels: int | None = None, formats: Collection[str] | None = None
) -> Pixels:
    """Decodes a picture: a path, or the bytes of a file, to uint8 RGB (H, W, 3).

    JPEG, PNG, WebP, AVIF, HEIC (where pillow-heif is installed), and the first frame of GIF, BMP and TIFF. It is turned
    upright by its EXIF orientation; an EXIF block that cannot be read says nothing of the orientation. Grey of 16 bits
    is scaled to 8, palettes and CMYK are converted, transparency is laid over white, ICC profiles are ignored.
    `formats`: names of FORMATS that may be decoded; all unless given.
    Raises ImageError on what is missing, not a picture, damaged, truncated, empty, or over `max_pixels`
    (MAX_PIXELS unless given; read from the header, before anything is decoded), or of more parts (scans, strips,
    tiles) than any program writes.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    allowed = tuple(FORMATS) if formats is None else tuple(formats)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), source, "the picture", limit, allowed)
    path = Path(source)
    with _open(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise _empty(str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _decode(file, data, str(path), limit, allowed)


@contextmanager
def opened_picture(path: Path, kind: str) -> Iterator[Image.Image]:
    """A file of one of FORMATS as Pillow has it, decoded, in whatever mode it is. Raises ImageError as load_image does,
    of the block as well."""
    name, limit = str(path), MAX_PIXELS
    with _open(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise _empty(name)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, _mapped(name, limit):
            decoder = _decoder(data[:64], name, (kind,))
            _check_file(data, kind, name, limit)
            with decoder(file, name) as picture:
                _check_size(picture, name, limit)
                picture.load()
                yield picture


def resize_and_crop(image: Pixels, size: tuple[int, int], crop_ratio: float) -> Pixels:
    """Scales uint8 (h, w, 3) bicubically, antialiased, and crops its centre: uint8 (H, W, 3) with (H, W) = `size`.

    The picture keeps its aspect ratio and is made just large enough to cover round(size / crop_ratio) in both
    directions. For a square size that is torchvision's Resize(round(side / crop_ratio)) and CenterCrop(side).
    Only what the crop depends on is resampled: the same pixels, in memory that the picture's shape cannot blow up.
    Raises UsageError on a size below 1 or a crop_ratio outside of (0, 1].
    """
    if min(size) < 1 or not 0 < crop_ratio <= 1:
        raise UsageError(f"cannot crop to {size} at ratio {crop_ratio}; sizes start at 1, ratios lie in (0, 1]")
    height, width = image.shape[:2]
    rows, columns = (round(side / crop_ratio) for side in size)
    if rows * width >= columns * height:  # the height is what just covers
        columns = rows * width // height
    else:
        rows = columns * height // width
    vertical, top, bottom = _window(height, rows, size[0])
    horizontal, left, right = _window(width, columns, size[1])
    region = Image.fromarray(image[vertical, horizontal])
    # One pass after the other: the order shows, because each rounds and clips to uint8, and Pillow 13 chooses it by
    # cost, which a crop changes. Across first, always.
    across = region.resize((size[1], region.height), Image.Resampling.BICUBIC, box=(left, 0, right, region.height))
    return np.array(across.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=(0, top, size[1], bottom)))


def preprocess(image: Pixels, contract: InputContract) -> NDArray[Any]:
    """One uint8 (h, w, 3) picture as the contract wants it, without the batch axis.

    It is resized as `contract.resize` says, one of RESIZES. Kind "image": uint8 (H, W, 3). Kind "tensor": float32
    (3, H, W), (x / 255 - mean) / std.
    Raises UsageError on a contract that asks for another kind, resize or colour.
    """
    if contract.kind not in PICTURES or contract.resize not in RESIZES or contract.color != "RGB":
        asked = (contract.kind, contract.resize, contract.color)
        raise UsageError(
            f"the input contract asks for {asked}; this version prepares {' or '.join(PICTURES)}, "
            f"{' or '.join(RESIZES)}, RGB"
        )
    cropped = RESIZES[contract.resize](image, contract)
    if contract.kind == "image":
        return cropped
    out = np.empty((3, *contract.size), np.float32)  # HWC -> CHW
    for channel, values in enumerate(_normalised(tuple(contract.mean), tuple(contract.std))):
        np.take(values, cropped[:, :, channel], out=out[channel], mode="clip")  # "raise" would copy; a byte always fits
    return out


RESIZES: Mapping[str, Callable[[Pixels, InputContract], Pixels]] = MappingProxyType(
    {
        CROP: lambda image, contract: resize_and_crop(image, contract.size, contract.crop_ratio),
        STRETCH: lambda image, contract: stretch(image, contract.size)[0],
    }
)


@lru_cache(maxsize=8)
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """(3, 256): what each value of each channel becomes, in float64 and rounded once."""
    values = (np.arange(256)[:, None] / 255.0 - np.array(mean)) / np.array(std)
    return np.ascontiguousarray(values.T, dtype=np.float32)


def load_batch(sources: Sequence[str | Path | bytes], contract: InputContract) -> NDArray[Any]:
    """Loads and preprocesses pictures: uint8 (N, H, W, 3) or float32 (N, 3, H, W), by the contract's kind.

    Raises ImageError on the first picture that cannot be read, UsageError where there is none at all.
    """
    if not sources:
        raise UsageError("no pictures were given; name at least one")
    return np.stack([preprocess(load_image(source), contract) for source in sources])


def _open(path: Path) -> IO[bytes]:
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder, not a picture; name a file in it")
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise ImageError(f"{path} is not a regular file; save the picture to one")
        return path.open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"no picture at {path}; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ImageError(f"{path} cannot be opened ({_line(error)}); check the path and its permissions") from error


def _empty(name: str) -> ImageError:
    return ImageError(f"{name} is empty (0 bytes); copy or save it again")


def _decode(file: IO[bytes], data: bytes | mmap.mmap, name: str, limit: int, formats: Sequence[str]) -> Pixels:
    with _mapped(name, limit):
        start = data[:16]
        if not start:
            raise _empty(name)
        decoder = _decoder(data[:64], name, formats)
        _check_file(data, str(decoder.format), name, limit)
        with decoder(file, name) as picture:
            _check_size(picture, name, limit)
            picture.load()
            return _to_rgb(_upright(picture), name)
    raise AssertionError  # the block returns or raises


def _decoder(start: bytes, name: str, formats: Sequence[str]) -> type[ImageFile.ImageFile]:
    decoder = next((decoder for at, magic, decoder in DECODERS if start.startswith(magic, at)), None)
    decoder = _boxed(start, name, formats) if decoder is None and start[4:8] == b"ftyp" else decoder
    if decoder is None or decoder.format is None or decoder.format not in formats:
        raise ImageError(f"{name} is not a {_listed(formats)} picture; save it as {_one_of(formats)}")
    return decoder


@contextmanager
def _mapped(name: str, limit: int) -> Iterator[None]:
    """What Pillow's decoders raise, as ImageError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, _line(error), limit) from error
    except DAMAGE as error:
        raise ImageError(f"{name} is damaged, truncated or without pixels ({_line(error)}); save it again") from error


def _boxed(head: bytes, name: str, formats: Sequence[str]) -> type[ImageFile.ImageFile] | None:
    """The decoder of a file in ISO boxes, by its brands. Raises ImageError where it is not installed."""
    length = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(length, len(head)), 4))]
    if any(brand in AVIF_BRANDS for brand in brands):
        return AvifImageFile
    if not any(brand in HEIF_BRANDS for brand in brands) or "HEIF" not in formats:
        return None
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ModuleNotFoundError as error:
        raise ImageError(f"{name} is a HEIC picture, and reading it {_needs_heif()}") from error
    decoder: type[ImageFile.ImageFile] = HeifImageFile
    return decoder


def _needs_heif() -> str:
    return f"needs the extra [heif]; run: {install_command('heif')}"


def as_pixels(source: Any, color: str = "RGB", what: str = "the frame") -> Pixels:
    """uint8 RGB (H, W, 3) of a frame, a Pillow image, a path, or the bytes of a file.

    A frame is uint8 (H, W, 3), in RGB or as `color` says "BGR" (OpenCV's), or grey (H, W). Raises ImageError on another
    shape or dtype and on what load_image refuses, UsageError on another colour or kind of thing.
    """
    if color not in ("RGB", "BGR"):
        raise UsageError(f"unknown colour order {color!r}; valid: RGB, BGR")
    if isinstance(source, (str, Path, bytes)):
        return load_image(source)
    if isinstance(source, Image.Image):
        try:
            return _to_rgb(_upright(source), what)
        except DAMAGE as error:
            raise ImageError(f"{what} is damaged ({_line(error)}); save it again") from error
    if not isinstance(source, np.ndarray):
        raise UsageError(
            f"{what} is of type {type(source).__name__}; give a numpy array, a Pillow image, a path or bytes"
        )
    if source.dtype != np.uint8:
        raise ImageError(f"{what} is of dtype {source.dtype}; give uint8 in 0..255")
    if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3) or source.size == 0:
        raise ImageError(f"{what} has the shape {source.shape}; give (height, width, 3), or (height, width) in grey")
    if source.ndim == 2:
        return np.repeat(source[:, :, None], 3, axis=2)
    return np.ascontiguousarray(source[:, :, ::-1]) if color == "BGR" else source


def _check_file(data: bytes | mmap.mmap, kind: str, name: str, limit: int) -> None:
    """Before the decoder is made: some do in their constructor what takes the time."""
    try:
        check_parts(data, kind)
    except ExcessError as error:
        raise ImageError(f"{name} has {error}, which no program writes; save it as an ordinary picture") from error
    size = canvas(data, kind)
    if size is not None and size[0] * size[1] > limit:
        raise _too_large(name, f"{size[0]}x{size[1]}", limit)


def _listed(formats: Sequence[str]) -> str:
    names = [FORMATS[kind] for kind in FORMATS if kind in formats]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _one_of(formats: Sequence[str]) -> str:
    return "one of them" if len(formats) > 1 else "that"


def _check_size(picture: ImageFile.ImageFile, name: str, limit: int) -> None:
    width, height = picture.size
    if isinstance(picture, TiffImageFile):  # which decodes whole tiles, and they may exceed the picture
        width = max(width, picture.tag_v2.get(Tag.TileWidth, 0))
        height = max(height, picture.tag_v2.get(Tag.TileLength, 0))
    if width * height > limit:
        raise _too_large(name, f"{width}x{height}", limit)


def _too_large(name: str, size: str, limit: int) -> LargeImageError:
    return LargeImageError(f"{name} is too large ({size}); at most {limit / 1_000_000:.3g} megapixels: scale it down")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(picture: Image.Image) -> Image.Image:
    """ImageOps.exif_transpose without its rewriting of the EXIF block, which fails on damaged ones."""
    try:
        turn = TURNS.get(picture.getexif().get(Tag.Orientation))
    except DAMAGE:
        return picture
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image, name: str) -> Pixels:
    """uint8 (H, W, 3) of any mode whose full scale is known."""
    if picture.mode.startswith("I;16"):
        return _grey_of_16_bits(picture)
    if picture.mode in ("I", "F", "LAB"):
        raise ImageError(f"{name} holds samples of mode {picture.mode}, whose scale is unknown; save it as 8-bit RGB")
    if not picture.has_transparency_data:
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    # Premultiplied grey is the one mode that Pillow converts in two steps only.
    image = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _grey_of_16_bits(picture: Image.Image) -> Pixels:
    """Pillow's own conversion clips at 255; this scales 0..full to 0..255 and rounds."""
    values = np.asarray(picture).astype(np.uint32)
    full, white_is_zero = 65535, False
    if isinstance(picture, TiffImageFile):
        full = 2 ** picture.tag_v2[Tag.BitsPerSample][0] - 1  # 12 bits are not stretched to 16
        white_is_zero = picture.tag_v2[Tag.PhotometricInterpretation] == 0  # Pillow inverts up to 8 bits only
    grey = ((values * 255 + full // 2) // full).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    if "transparency" in picture.info:  # one value of a PNG, laid over white
        grey[values == picture.info["transparency"]] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)  # (H, W) -> (H, W, 3)


def _window(length: int, resized: int, kept: int) -> tuple[slice, float, float]:
    """Of an axis of `length` pixels resized to `resized` and centre-cropped to `kept`: the source pixels that the crop
    depends on, and where in them it begins and ends. Pillow holds these in float32, too coarse for a long axis."""
    step = length / resized  # source pixels a resized one
    start = round((resized - kept) / 2)  # as torchvision's CenterCrop
    begin, end = start * step, (start + kept) * step
    reach = KERNEL_RADIUS * max(step, 1.0) + 1
    low, high = max(0, math.floor(begin - reach)), min(length, math.ceil(end + reach))
    return slice(low, high), begin - low, min(end - low, high - low)
