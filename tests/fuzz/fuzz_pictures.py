"""Pictures of every format, small ones: what is in them is read in the decoders' processes, and by every command."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from dualtoken_deploy.data.images import FORMATS, load_image
from dualtoken_deploy.errors import ImageError
from tests import hostile
from tests.fuzz.inputs import edited

MAX_PIXELS = 100_000


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


Image.init()
SEEDS = [
    *(encoded(kind) for kind in FORMATS if kind in Image.SAVE),  # HEIF is an extra
    hostile.jpeg_of_scans(3, side=16),
    hostile.tiff_of_strips(9),
    hostile.gif_of_comments(2),
]
CASES = edited(
    SEEDS, [b"\xff\xda", b"\xff" * 60, b"\xff\xd9", b"IDAT", b"VP8X", b"\x21\xfe\x01", b"\0" * 40]
) | st.binary(max_size=64)


def check(data: bytes) -> None:
    try:
        found = load_image(data, MAX_PIXELS)
    except ImageError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[0] * found.shape[1] <= MAX_PIXELS
