"""Where a target's bytes lie while a reader of files reads them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def _folder() -> Path:
    place = Path(tempfile.mkdtemp(prefix="dualtoken-fuzz."))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def folder(name: str) -> Path:
    """A folder of a target's own, which may have files in it from the input before."""
    place = _folder() / name
    place.mkdir(exist_ok=True)
    return place


def filed(data: bytes, suffix: str) -> Path:
    """A file with these bytes; the next call with the suffix writes it anew."""
    path = _folder() / f"input{suffix}"
    path.unlink(missing_ok=True)  # another file, should a reader still have the last one mapped
    path.write_bytes(data)
    return path
