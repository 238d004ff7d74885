"""Pictures in, tensors out. The resize is held against the Keys cubic written out densely in float64, and PyTorch's."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from dualtoken_deploy.data import images
from dualtoken_deploy.data.images import Pixels, load_batch, load_image, preprocess, resize_and_crop
from dualtoken_deploy.errors import ImageError, UsageError
from dualtoken_deploy.spec import InputContract, TensorSpec


def scene(height: int = 12, width: int = 20) -> Pixels:
    """Smooth, with all four corners and all three channels different, so that no flip or swap goes unseen."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return np.stack([40 + 180 * x, 30 + 200 * y, 220 - 110 * (x + y)], axis=2).round().astype(np.uint8)


def noise(height: int, width: int, low: int = 0, high: int = 256) -> Pixels:
    return np.random.default_rng([height, width]).integers(low, high, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image | NDArray[Any], fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """An 8-bit RGB PNG that ends where its pixels should begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">II", zlib.crc32(body), 99) + b"IDAT"


def tiff(tags: Mapping[int, tuple[int, ...]], data: bytes, order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip: what Pillow reads but cannot write. All values are longs."""
    tags = {259: (1,), 273: (8,), 279: (len(data),)} | dict(tags)
    entries, extra = b"", b""
    at = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            packed, extra = struct.pack(f"{order}L", at + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHL", tag, 4, len(values)) + packed
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HL", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra


def worst(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())


# -- resize and crop


def cubic(x: NDArray[np.float64], a: float = -0.5) -> NDArray[np.float64]:
    """Keys 1981, equation 15: the cubic convolution kernel."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def weights(length: int, resized: int, start: int, kept: int) -> NDArray[np.float64]:
    """(kept, length): rows `start`... of the matrix that resizes an axis, the kernel widened by the shrinkage."""
    step = length / resized
    centres = (np.arange(start, start + kept) + 0.5) * step
    table = cubic((np.arange(length) + 0.5 - centres[:, None]) / max(step, 1.0))
    normalised: NDArray[np.float64] = table / table.sum(axis=1, keepdims=True)
    return normalised


def to_uint8(values: NDArray[Any]) -> NDArray[Any]:
    return np.clip(np.floor(values + 0.5), 0, 255)


def covering(height: int, width: int, size: tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """The whole resized picture: for a square size torchvision's Resize of an int, in its own words."""
    rows, columns = round(size[0] / crop_ratio), round(size[1] / crop_ratio)
    if width / height >= columns / rows:
        return rows, int(rows * width / height)
    return int(columns * height / width), columns


def dense(image: Pixels, size: tuple[int, int], crop_ratio: float) -> NDArray[np.float64]:
    """Resize, then crop as torchvision's CenterCrop; across first, uint8 between the passes."""
    height, width, _ = image.shape
    rows, columns = covering(height, width, size, crop_ratio)
    top, left = round((rows - size[0]) / 2.0), round((columns - size[1]) / 2.0)
    across = to_uint8(np.einsum("xw,hwc->hxc", weights(width, columns, left, size[1]), image.astype(np.float64)))
    return to_uint8(np.einsum("yh,hxc->yxc", weights(height, rows, top, size[0]), across))


SIDES = st.integers(1, 90)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([0.875, 1.0, 0.9, 0.5]))
@example(37, 53, 32, 32, 0.875)
@example(64, 64, 64, 64, 1.0)
@example(90, 7, 33, 12, 0.875)
@example(400, 300, 32, 32, 0.5)  # shrinks, and the crop cuts the kernel's support
def test_resize_is_the_dense_cubic(height: int, width: int, rows: int, columns: int, crop_ratio: float) -> None:
    image = noise(height, width)
    result = resize_and_crop(image, (rows, columns), crop_ratio)
    assert result.dtype == np.uint8
    expected = dense(image, (rows, columns), crop_ratio)
    # Pillow's weights have 22 bits: a tie may round the other way in either pass. Measured: 1, on 3 % of the values.
    assert worst(result, expected) <= 2
    assert (result != expected).mean() <= 0.05 or result.size < 100


@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (300, 300), (100, 131)])
def test_resize_is_torch_bicubic_antialiased(shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="torch holds the reference")
    image = noise(*shape, low=100, high=156)  # overshoot stays inside of 0..255, so only rounding differs
    rows, columns = covering(*shape, (224, 224), 0.875)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    whole = torch.nn.functional.interpolate(tensor, size=(rows, columns), mode="bicubic", antialias=True)[0]
    top, left = round((rows - 224) / 2), round((columns - 224) / 2)
    expected = whole[:, top : top + 224, left : left + 224].permute(1, 2, 0).numpy()
    # Half a level each pass, the first amplified by at most 1.25 (the sum of the kernel's absolute weights).
    assert worst(resize_and_crop(image, (224, 224), 0.875), expected) <= 1.2


def test_resize_of_a_photograph_is_pillows(photograph: Path) -> None:
    image = load_image(photograph)[:400]  # (400, 512, 3)
    whole = Image.fromarray(image).resize((327, 400), Image.Resampling.BICUBIC)  # across, then down
    expected = np.asarray(whole.resize((327, 256), Image.Resampling.BICUBIC))[16:240, 52:276]
    result = resize_and_crop(image, (224, 224), 0.875)
    assert worst(result, expected) <= 1  # Pillow holds the crop's edges in float32
    assert (result != expected).mean() < 0.001


def test_result_can_be_written_to() -> None:
    result = resize_and_crop(scene(), (8, 8), 1.0)
    assert result.flags.writeable
    assert result.flags.c_contiguous


@pytest.mark.parametrize(("height", "width"), [(1, 2000), (2000, 1), (1, 1), (3, 4001)])
def test_extreme_shapes_are_the_dense_cubic(height: int, width: int) -> None:
    image = noise(height, width)
    assert worst(resize_and_crop(image, (224, 224), 0.875), dense(image, (224, 224), 0.875)) <= 2


@pytest.mark.parametrize("shape", ["(1, 2000, 3)", "(2000, 1, 3)", "(1, 40_000_000, 3)", "(40_000_000, 1, 3)"])
def test_extreme_shapes_take_little_memory(shape: str) -> None:
    """Resizing before cropping would take 0.5 GB for the first, and 10 TB for the last."""
    pytest.importorskip("resource", reason="POSIX limits")
    program = (
        "import resource, numpy as np; from dualtoken_deploy.data.images import resize_and_crop;"
        f"image = np.full({shape}, 77, np.uint8); resize_and_crop(image[:9, :9], (8, 8), 1.0);"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**25,) * 2);"  # 32 MiB
        "assert (resize_and_crop(image, (224, 224), 0.875) == 77).all()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20, env=os.environ | {"PYTHONPATH": ROOT})


ROOT = str(Path(images.__file__).parents[2])


@pytest.mark.parametrize(("size", "crop_ratio"), [((0, 8), 0.9), ((8, 8), 0.0), ((8, 8), 1.1), ((8, 8), float("nan"))])
def test_a_crop_that_cannot_be_is_refused(size: tuple[int, int], crop_ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio"):
        resize_and_crop(scene(), size, crop_ratio)


# -- the contract


def contract(kind: str, size: tuple[int, int] = (8, 6), **changes: Any) -> InputContract:
    return InputContract(TensorSpec("input", "uint8", "NHWC", ("N", *size, 3)), kind, size, **changes)


def test_preprocess_image_is_the_crop() -> None:
    result = preprocess(scene(), contract("image"))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, resize_and_crop(scene(), (8, 6), 0.875))


def test_preprocess_tensor_is_normalised_channels_first() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = preprocess(scene(), contract("tensor", mean=mean, std=std))
    crop = resize_and_crop(scene(), (8, 6), 0.875)
    assert result.dtype == np.float32
    assert result.shape == (3, 8, 6)
    assert result.flags.c_contiguous
    for channel in range(3):
        expected = (crop[:, :, channel].astype(np.float64) / 255 - mean[channel]) / std[channel]
        np.testing.assert_array_equal(result[channel], expected.astype(np.float32))  # float64, rounded once


@pytest.mark.parametrize("changes", [{"kind": "video"}, {"resize": "bilinear"}, {"color": "BGR"}])
def test_a_contract_of_another_kind_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes.values()))):
        preprocess(scene(), contract(**({"kind": "image"} | changes)))


def test_load_batch_stacks_in_order(tmp_path: Path) -> None:
    pictures = [scene(), scene()[::-1], scene(30, 10)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    batch = load_batch(paths, contract("tensor"))
    assert batch.shape == (3, 3, 8, 6)
    for row, picture in zip(batch, pictures, strict=True):
        np.testing.assert_array_equal(row, preprocess(picture, contract("tensor")))
    np.testing.assert_array_equal(load_batch([str(paths[1]), paths[2].read_bytes()], contract("tensor")), batch[1:])


def test_load_batch_refuses_none_and_names_the_bad_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pictures"):
        load_batch([], contract("image"))
    with pytest.raises(ImageError, match=r"gone\.png"):
        load_batch([encode(scene(), "PNG"), tmp_path / "gone.png"], contract("image"))


# -- decoding

LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"big_tiff": True}),
]


@pytest.mark.parametrize(("fmt", "options"), LOSSLESS)
def test_lossless_formats_come_out_exactly(fmt: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = encode(scene(), fmt, **options)
    path = tmp_path / "PICTURE"  # the content says what it is, not the suffix
    path.write_bytes(data)
    for source in (data, path, str(path)):
        result = load_image(source)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, scene())


@pytest.mark.parametrize("fmt", ["JPEG", "MPO", "WEBP"])
def test_lossy_formats_come_out_nearly(fmt: str) -> None:
    assert worst(load_image(encode(scene(48, 64), fmt, quality=95)), scene(48, 64)) <= 8


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_counts(fmt: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert (load_image(data) == (255, 0, 0)).all()


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF 2.32, tag 274: what shows a stored picture upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("fmt", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_exif_orientation_is_applied_once(fmt: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = load_image(encode(scene(), fmt, **options))
    result = load_image(encode(scene(), fmt, exif=exif, **options))
    np.testing.assert_array_equal(result, UPRIGHT[orientation](stored))


def test_16_bit_grey_is_turned_too() -> None:
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[274] = 6
    np.testing.assert_array_equal(load_image(encode(stored, "PNG", exif=exif))[..., 0], [[3, 0], [4, 1], [5, 2]])


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage that is no TIFF", b"MM\0*\0\0\0\x08\xff\xff", b"MM\0*\0\0", b"M"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_unreadable_exif_says_nothing(fmt: str, exif: bytes) -> None:
    plain = load_image(encode(scene(), fmt))
    np.testing.assert_array_equal(load_image(encode(scene(), fmt, exif=b"Exif\0\0" + exif)), plain)


def test_a_turn_outlives_damage_elsewhere_in_exif() -> None:
    """A floating-point value in a text tag: ImageOps.exif_transpose fails on it with an AttributeError."""
    entries = struct.pack(">HHLHH", 274, 3, 1, 6, 0) + struct.pack(">HHLf", 270, 11, 1, 1.5)
    exif = b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 2) + entries + bytes(4)
    stored = load_image(encode(scene(), "JPEG"))
    np.testing.assert_array_equal(load_image(encode(scene(), "JPEG", exif=exif)), np.rot90(stored, -1))


def row(*values: Any, dtype: Any = np.uint8) -> NDArray[Any]:
    """One row of pixels: (1, W) or (1, W, channels)."""
    return np.array([values], dtype)


def palette(*, mode: str = "P") -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    return image.convert(mode)


WHITE = (255, 255, 255)
GREY_12 = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0])  # 0, 2048, 4095 in 12 bits each, padded
GREY_TAGS = {256: (3,), 257: (1,), 258: (16,), 262: (1,), 277: (1,)}
MODES: dict[str, tuple[bytes, list[tuple[int, int, int]]]] = {
    "grey": (encode(row(0, 100, 255), "PNG"), [(0, 0, 0), (100, 100, 100), WHITE]),
    "1 bit": (encode(Image.fromarray(row(False, True, dtype=bool)), "PNG"), [(0, 0, 0), WHITE]),
    # round(v / 257): 300 and 60100 clip to white in Pillow's own conversion
    "grey 16": (encode(row(0, 300, 60100, 65535, dtype=np.uint16), "PNG"), [(0,) * 3, (1,) * 3, (234,) * 3, WHITE]),
    "grey 16 key": (
        encode(row(0, 300, 60000, dtype=np.uint16), "PNG", transparency=300),
        [(0, 0, 0), WHITE, (233, 233, 233)],
    ),
    "grey 16 tiff": (tiff(GREY_TAGS, struct.pack("<3H", 0, 300, 60000)), [(0,) * 3, (1,) * 3, (233,) * 3]),
    "grey 16 tiff, big-endian": (
        tiff(GREY_TAGS, struct.pack(">3H", 0, 300, 60000), ">"),
        [(0,) * 3, (1,) * 3, (233,) * 3],
    ),
    "grey 16 tiff, white is 0": (
        tiff(GREY_TAGS | {262: (0,)}, struct.pack("<3H", 0, 300, 60000)),
        [WHITE, (254,) * 3, (22,) * 3],
    ),
    "grey 12 tiff": (tiff(GREY_TAGS | {258: (12,)}, GREY_12), [(0,) * 3, (128,) * 3, WHITE]),
    "grey + alpha": (encode(row((100, 0), (100, 128), (100, 255)), "PNG"), [WHITE, (177,) * 3, (100,) * 3]),
    "grey + premultiplied alpha": (
        tiff(GREY_TAGS | {258: (8, 8), 277: (2,), 338: (1,)}, bytes([0, 0, 50, 128, 100, 255])),
        [WHITE, (177,) * 3, (100,) * 3],
    ),
    "grey with a clear value": (encode(row(7, 100), "PNG", transparency=7), [WHITE, (100,) * 3]),
    "rgba": (
        encode(row((200, 100, 0, 0), (200, 100, 0, 51), (200, 100, 0, 255)), "PNG"),
        [WHITE, (244, 224, 204), (200, 100, 0)],  # 51 / 255 is one fifth
    ),
    "rgb with a clear colour": (
        encode(row((1, 2, 3), (3, 2, 1)), "PNG", transparency=(1, 2, 3)),
        [WHITE, (3, 2, 1)],
    ),
    "palette": (encode(palette(), "PNG"), [(255, 0, 0), (0, 255, 0), (10, 20, 30)]),
    "palette with a clear index": (encode(palette(), "PNG", transparency=1), [(255, 0, 0), WHITE, (10, 20, 30)]),
    "palette with alpha": (
        encode(palette(), "PNG", transparency=bytes([0, 255, 51])),
        [WHITE, (0, 255, 0), (206, 208, 210)],
    ),
    "gif": (encode(palette(), "GIF"), [(255, 0, 0), (0, 255, 0), (10, 20, 30)]),
    "gif with a clear index": (encode(palette(), "GIF", transparency=2), [(255, 0, 0), (0, 255, 0), WHITE]),
    "bmp palette": (encode(palette(), "BMP"), [(255, 0, 0), (0, 255, 0), (10, 20, 30)]),
    "webp with alpha": (encode(row((200, 100, 0, 51)), "WEBP", lossless=True, exact=True), [(244, 224, 204)]),
    "cmyk tiff": (  # (255 - ink) * (255 - key) / 255
        encode(Image.fromarray(row((0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 0, 51)), "CMYK"), "TIFF"),
        [(255, 0, 0), (0, 0, 0), (0, 204, 204)],
    ),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_becomes_rgb(kind: str) -> None:
    data, expected = MODES[kind]
    result = load_image(data)
    assert result.shape == (1, len(expected), 3)
    assert result[0].tolist() == [list(colour) for colour in expected]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 255, 0), (0, 255, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((0,) * 4, WHITE)],
)
def test_adobe_cmyk_jpeg_is_not_inverted(ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
    assert b"Adobe" in data  # the marker; with it the stored samples are inverted, as Photoshop writes them
    assert worst(load_image(data)[0, 0], np.array(colour)) <= 3


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_samples_of_unknown_scale_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode}.*8-bit RGB"):
        load_image(encode(Image.new(mode, (2, 2)), "TIFF"))


# -- what must not come through


def refused(source: str | Path | bytes, match: str) -> None:
    """Fails with ImageError, one line, no warning."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=match) as caught:
            load_image(source)
    assert "\n" not in str(caught.value)
    assert not heard, [str(warning.message) for warning in heard]


def test_paths_without_a_picture_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.jpg").write_text("BMs are not what this file is about, nor any picture\n")
    (tmp_path / "page.png").write_text("<!doctype html><html>404</html>")
    os.mkfifo(tmp_path / "pipe.png")
    for name, match in {
        "gone.png": "no picture at .*gone.png; check the path",
        ".": "is a folder, not a picture",
        "empty.png": r"empty.png is empty \(0 bytes\)",
        "notes.jpg": "notes.jpg is damaged",
        "page.png": "page.png is not a JPEG, PNG",
        "pipe.png": "pipe.png is not a regular file",
        "n" * 300: "cannot be opened",
        "page.png/inner.png": "cannot be opened|no picture at",
        "a\0b": "cannot be opened|no picture at",
    }.items():
        refused(tmp_path / name, match)
    refused(b"", "the picture is empty")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    refused(png_header(*size), "without pixels")


def jpeg_of_size(width: int, height: int) -> bytes:
    data = encode(scene(), "JPEG")
    return re.sub(rb"(\xff\xc0..\x08)....", lambda m: m[1] + struct.pack(">HH", height, width), data, flags=re.DOTALL)


def webp_header(width: int, height: int) -> bytes:
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f" + bits + bytes(5)


GIF_FRAME = (
    b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"," + struct.pack("<4HB", 0, 0, 60000, 60000, 0) + b"\x02"
)
BMP_HEADER = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6)
TILES = {256: (9,), 257: (9,), 322: (9216,), 323: (9216,), 324: (8,), 325: (9,), 258: (8,), 262: (1,), 277: (1,)}
BOMBS: dict[str, Callable[[], bytes]] = {
    "png header": lambda: png_header(60_000, 60_000),
    "png between Pillow's limit and ours": lambda: encode(Image.new("1", (8000, 8000)), "PNG"),
    "png that Pillow warns of": lambda: encode(Image.new("1", (10_000, 10_000)), "PNG"),
    "jpeg": lambda: jpeg_of_size(60_000, 60_000),
    "jpeg that Pillow warns of": lambda: jpeg_of_size(10_000, 10_000),
    "webp": lambda: webp_header(16_384, 16_384),
    "gif": lambda: b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + GIF_FRAME[13:],
    "gif with a frame beyond its screen": lambda: GIF_FRAME,
    "bmp": lambda: BMP_HEADER,
    "tiff": lambda: tiff(GREY_TAGS | {256: (60_000,), 257: (60_000,)}, b""),
    "tiff with a tile beyond its picture": lambda: tiff(TILES, b""),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header(kind: str) -> None:
    refused(BOMBS[kind](), "too large .*at most 50 megapixels")


def test_the_limit_is_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert load_image(encode(scene(3, 4), "PNG")).shape == (3, 4, 3)
    refused(encode(scene(1, 13), "PNG"), "13x1")


WHOLE: dict[str, bytes] = {
    "jpeg": encode(scene(), "JPEG"),
    "progressive jpeg": encode(scene(), "JPEG", progressive=True),
    "cmyk jpeg": encode(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
    "png": encode(scene(), "PNG"),
    "png 16": encode(scene()[..., 0].astype(np.uint16) * 257, "PNG"),
    "webp": encode(scene(), "WEBP"),
    "webp lossless": encode(scene(), "WEBP", lossless=True),
    "gif": encode(scene(), "GIF"),
    "bmp": encode(scene(), "BMP"),
    "tiff": encode(scene(), "TIFF"),
    "tiff lzw": encode(scene(), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encode(scene(), "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of damaged metadata
def test_truncated_files_never_give_a_picture(kind: str) -> None:
    """Only marks that follow the last pixel may be missing: at most a PNG's last chunk and checksum, 21 bytes."""
    data = WHOLE[kind]
    whole = load_image(data)
    for length in range(1, len(data)):
        try:
            result = load_image(data[:length])
        except ImageError:
            continue
        assert len(data) - length <= 21, f"{kind} accepted at {length} of {len(data)} bytes"
        np.testing.assert_array_equal(result, whole)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.sampled_from([*WHOLE]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_nothing_but_image_error(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE[kind])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        result = load_image(bytes(data))
    except ImageError:
        return
    assert result.dtype == np.uint8
    assert result.shape[2:] == (3,)


def test_pillow_and_warnings_stay_as_they_were() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(WHOLE["jpeg"])
    for bad in (WHOLE["jpeg"][:-9], png_header(60_000, 60_000), b"GIF"):
        with pytest.raises(ImageError):
            load_image(bad)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_files_are_closed(tmp_path: Path) -> None:
    for name, data in {"good": WHOLE["tiff lzw"], "cut": WHOLE["jpeg"][:-9]}.items():
        (tmp_path / name).write_bytes(data)
        before = len(list(Path("/proc/self/fd").iterdir()))
        try:
            load_image(tmp_path / name)
        except ImageError:
            assert name == "cut"
        assert len(list(Path("/proc/self/fd").iterdir())) == before
