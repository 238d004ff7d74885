"""What a picture's file claims, counted before a decoder sees it.

Decoders take time and memory by the number of their parts (scans, chunks, strips, tiles), not by pixels alone: 550 KB
of JPEG may hold 12,000 scans of 29 ms each. Everything here is linear in the file and stops at the first count too
many; what is damaged is left to the decoder, which says so.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

Data = bytes | mmap.mmap

MAX_SCANS = 64  # libjpeg's own progressive script has 10, the longest that mozjpeg tries has 23
MAX_SEGMENTS = 4096  # of a JPEG: 255 each of ICC and extended XMP are the most that those formats allow
MAX_CHUNKS = 65_536  # of a PNG; libpng writes 8 KiB in each
MAX_STRIPS = 65_536  # strips, tiles or any other list of a TIFF; a picture of one row a strip has as many as rows
MAX_TIFF_TAGS = 4096
MAX_GIF_BLOCKS = 4096  # before the first frame: a comment of 1 MB

# A marker outside of segments: in entropy-coded data 0xFF is followed by 0 or by a restart marker (T.81, B.1.1.2)
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
JPEG_SOI, JPEG_EOI, JPEG_SOS, JPEG_TEM = 0xD8, 0xD9, 0xDA, 0x01
TIFF_BYTES = (1, 2, 6, 7)  # types whose values are kept as they lie: BYTE, ASCII, SBYTE, UNDEFINED
TIFF_PARTS: Mapping[int, str] = MappingProxyType({273: "strips", 279: "strips", 324: "tiles", 325: "tiles"})


class ExcessError(Exception):
    """More parts than any program writes; the text names them."""


def check_parts(data: Data, kind: str) -> None:
    """Raises ExcessError where a file of this kind (Pillow's name of the format) has too many parts."""
    check = CHECKS.get(kind)
    if check is None:
        return
    try:
        check(data)
    except (struct.error, IndexError):  # cut off: the decoder's to say
        return


def canvas(data: Data, kind: str) -> tuple[int, int] | None:
    """Width and height of an extended WebP: its decoder reserves them when it is made, before Pillow tells them."""
    if kind != "WEBP" or data[12:16] != b"VP8X" or len(data) < 30:
        return None
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")


def _jpeg(data: Data) -> None:
    at, scans, segments = 2, 0, 0
    while (found := JPEG_MARKER.search(data, at)) is not None:
        at, kind = found.end(), data[found.end() - 1]
        if kind == JPEG_EOI:
            return
        if kind in (JPEG_SOI, JPEG_TEM):
            continue
        scans, segments = scans + (kind == JPEG_SOS), segments + 1
        if scans > MAX_SCANS:
            raise ExcessError(f"more than {MAX_SCANS} scans")
        if segments > MAX_SEGMENTS:
            raise ExcessError(f"more than {MAX_SEGMENTS} segments")
        at += max(2, int.from_bytes(data[at : at + 2], "big"))


def _png(data: Data) -> None:
    at, chunks = 8, 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at, chunks = at + 12 + int.from_bytes(data[at : at + 4], "big"), chunks + 1
        if chunks > MAX_CHUNKS:
            raise ExcessError(f"more than {MAX_CHUNKS} chunks")


def _tiff(data: Data) -> None:
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    entry = struct.Struct(f"{order}HHQ8x" if big else f"{order}HHI4x")  # tag, type, count, then the value or its place
    start, number = (f"{order}Q", 8) if big else (f"{order}I", 4), f"{order}Q" if big else f"{order}H"
    (at,) = struct.unpack_from(start[0], data, start[1])
    (count,) = struct.unpack_from(number, data, at)
    if count > MAX_TIFF_TAGS:
        raise ExcessError(f"more than {MAX_TIFF_TAGS} tags")
    at += struct.calcsize(number)
    for index in range(count):
        tag, kind, values = entry.unpack_from(data, at + index * entry.size)
        if kind not in TIFF_BYTES and values > MAX_STRIPS:
            raise ExcessError(f"more than {MAX_STRIPS} {TIFF_PARTS.get(tag, 'values of a tag')}")


def _gif(data: Data) -> None:
    at = 13 + (3 << (1 + (data[10] & 7)) if data[10] & 0x80 else 0)  # behind the global colour table
    blocks = 0
    while data[at] == 0x21:  # an extension: its label, then blocks of up to 255 bytes, the last one empty
        at += 2
        while (size := data[at]) != 0:
            at, blocks = at + 1 + size, blocks + 1
            if blocks > MAX_GIF_BLOCKS:
                raise ExcessError(f"more than {MAX_GIF_BLOCKS} blocks before its first frame")
        at += 1


CHECKS: Mapping[str, Callable[[Data], None]] = MappingProxyType(
    {"JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "GIF": _gif}
)
