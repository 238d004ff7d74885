"""A folder of pictures, of class folders, of pictures and label maps: the names in it, and what a label map holds."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from dualtoken_deploy.data.annotated import MAPS, open_annotated
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.errors import DualTokenError
from tests import hostile
from tests.fuzz.inputs import edited
from tests.fuzz.place import folder

MAX_FILES = 12
SEPARATOR = b"\n--\n"  # between a file's path and its contents, and between files
TOKENS = [b"\n--\n", b"/", b"..", b"\xff\xfe", b"\x1b]0;", b"val/masks/", b"labels.txt", b".png", b"\xe2\x80\xa8"]


def png(mode: str = "P", size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


def joined(*files: tuple[bytes, bytes]) -> bytes:
    return SEPARATOR.join(part for file in files for part in file)


def seeds() -> list[bytes]:
    labels, picture = (b"labels.txt", b"sky\nsea\n"), (b"val/images/a.png", png("RGB"))
    return [
        joined((b"a.png", png("RGB")), (b"b.png", png("RGB"))),
        joined((b"cat/a.png", png("RGB")), (b"dog/b.png", png("L"))),
        joined((b"train/cat/a.png", png("RGB")), (b"val/cat/b.png", png("RGB"))),
        joined(labels, picture, (b"val/masks/a.png", png())),
        joined(labels, picture, (b"val/masks/a.png", png("I;16"))),
        joined(labels, picture, (b"val/masks/a.png", hostile.png_of_chunks(3))),
        joined((b"\xff\xfe.png", png("RGB"))),
    ]


def lay_out(data: bytes) -> Path:
    """The files that the bytes tell of, in a folder that is new each time; none outside of it."""
    place = folder("folders")
    shutil.rmtree(place)
    place.mkdir()
    parts = data.split(SEPARATOR)
    for name, contents in list(zip(parts[::2], parts[1::2], strict=False))[:MAX_FILES]:
        path = Path(os.path.normpath(place / os.fsdecode(name[:120].replace(b"\0", b"").strip(b"/"))))
        if place not in path.parents:
            continue
        with suppress(OSError):  # a file where another's folder would be, a name that is too long
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
    return place


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    place, refused = lay_out(data), list[DualTokenError]()
    readers: tuple[Callable[[], SampleSet], ...] = (
        lambda: open_pictures(place),
        lambda: open_annotated(place, MAPS),
    )
    for read in readers:
        try:
            found = read()
            for index in found.indices[:2]:
                found.read(index)
        except DualTokenError as error:
            refused.append(error)
    if len(refused) == 2:
        raise refused[1]


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
