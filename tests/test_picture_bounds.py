"""Pictures of few bytes that would take a decoder minutes are refused for what they claim, ordinary ones are not."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy.data import picture_bounds
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.errors import ImageError
from tests import hostile

REFUSED: list[tuple[str, Callable[[], bytes], str]] = [
    ("scans", lambda: hostile.jpeg_of_scans(12_000), "more than 64 scans"),
    ("segments", lambda: hostile.jpeg_of_segments(1_000_000), "more than 4096 segments"),
    ("strips", lambda: hostile.tiff_of_strips(1_000_000), "more than 65536 strips"),
    ("strips of a big TIFF", lambda: hostile.tiff_of_strips(1_000_000, big=True), "more than 65536 strips"),
    ("chunks", lambda: hostile.png_of_chunks(300_000), "more than 65536 chunks"),
    ("comments", lambda: hostile.gif_of_comments(60_000), "more than 4096 blocks"),
    ("canvas", lambda: hostile.webp_of_canvas(2**16, 2**15), "65536x32768"),
]


@pytest.mark.parametrize(("make", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
@pytest.mark.parametrize("where", ["bytes", "file"])
def test_parts_without_end_are_refused_before_decoding(
    make: Callable[[], bytes], text: str, where: str, tmp_path: Path
) -> None:
    data = make()
    (tmp_path / "picture").write_bytes(data)
    start = time.process_time()
    with pytest.raises(ImageError, match=text):
        load_image(data if where == "bytes" else tmp_path / "picture")
    assert time.process_time() - start < 0.5, "the decoder itself takes seconds to minutes for each of these"


def encoded(kind: str, **options: object) -> tuple[bytes, Image.Image]:
    noise = np.random.default_rng(1).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue(), Image.open(io.BytesIO(out.getvalue()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True, "quality": 95}),
        ("JPEG", {"restart_marker_blocks": 1}),
        ("JPEG", {"icc_profile": b"\xff\xda" * 100_000, "comment": b"\xff\xda" * 30_000}),
        ("PNG", {"compress_level": 0}),
        ("TIFF", {"tiffinfo": {278: 1}}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {"comment": b"c" * 5000}),
        ("WEBP", {"icc_profile": bytes(1000), "lossless": True}),
        ("BMP", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_ordinary_pictures_pass(kind: str, options: dict[str, object]) -> None:
    """Markers inside of segments and of entropy-coded data are none."""
    data, reference = encoded(kind, **options)
    np.testing.assert_array_equal(load_image(data), np.array(reference.convert("RGB")))


def test_a_thumbnail_and_bytes_behind_the_end_are_not_counted() -> None:
    data, _ = encoded("JPEG", progressive=True)
    trailer = b"\xff\xda\x00\x02" * 1000  # a motion photo's video lies there
    load_image(data + trailer)
    segment = b"\xff\xe1" + (2 + len(trailer)).to_bytes(2, "big") + trailer
    load_image(data[:2] + segment + data[2:])


def test_counting_scans_is_linear() -> None:
    """A pattern that backtracks would take a run of 0xFF quadratic time."""
    start = time.process_time()
    picture_bounds.check_parts(b"\xff\xd8" + b"\xff" * 4_000_000, "JPEG")
    picture_bounds.check_parts(b"\xff\xd8" + b"\xff\x00" * 2_000_000, "JPEG")
    assert time.process_time() - start < 1


def test_formats_that_were_not_asked_for_are_not_decoded() -> None:
    data, _ = encoded("TIFF")
    with pytest.raises(ImageError, match="is not a JPEG, PNG or WebP picture; save it as one of them"):
        load_image(data, formats=("JPEG", "PNG", "WEBP"))
    assert load_image(data, formats=("TIFF",)).shape == (300, 200, 3)
