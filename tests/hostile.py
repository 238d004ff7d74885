"""Inputs that cost a reader far more than they cost their sender; here small, and of the kind of the large ones."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def jpeg_of_scans(scans: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is there many times over."""
    out = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def jpeg_of_segments(segments: int) -> bytes:
    """A JPEG with many empty comments before its picture."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    data = out.getvalue()
    return data[:2] + b"\xff\xfe\x00\x02" * segments + data[2:]


def tiff_of_strips(strips: int, big: bool = False) -> bytes:
    """A TIFF, classic or big, that lists many strips."""
    shorts = {256: 8, 257: strips, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    entries = [*((tag, 4, 1, value) for tag, value in shorts.items()), (273, 4, strips, 0), (279, 4, strips, 0)]
    entries.sort()
    entry, count, head = ("<HHQQ", "<Q", 16) if big else ("<HHII", "<H", 8)
    behind = head + struct.calcsize(count) + len(entries) * struct.calcsize(entry) + 8
    rows = [(tag, kind, n, behind if n > 1 else value) for tag, kind, n, value in entries]
    start = b"II+\0\x08\0\0\0" + struct.pack("<Q", head) if big else b"II*\0" + struct.pack("<I", head)
    table = struct.pack(count, len(rows)) + b"".join(struct.pack(entry, *row) for row in rows) + bytes(8)
    return start + table + struct.pack("<I", behind) * strips + bytes(8)


def png_of_chunks(chunks: int) -> bytes:
    """A PNG with many empty chunks of nobody's."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    data = out.getvalue()
    empty = struct.pack(">I4sI", 0, b"prIv", zlib.crc32(b"prIv"))
    return data[:33] + empty * chunks + data[33:]


def gif_of_comments(blocks: int) -> bytes:
    """A GIF with a comment of many blocks, each of which Pillow appends to those before."""
    out = io.BytesIO()
    Image.new("P", (8, 8)).save(out, "GIF")
    data = out.getvalue()
    at = 13 + (3 << (1 + (data[10] & 7)) if data[10] & 0x80 else 0)
    return data[:at] + b"\x21\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0" + data[at:]


def webp_of_canvas(width: int, height: int) -> bytes:
    """The head of an extended WebP that claims a canvas."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body
