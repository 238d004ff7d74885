"""Core ML's weight file: reads the blobs that a program points to.

Layout (storage format version 2, little-endian): a 64-byte header (u32 count, u32 version, zeros); each blob has 64
bytes of metadata at the offset that the program names (u32 sentinel, u32 dtype, u64 bytes, u64 offset of the data, u64
bits of padding, zeros), and its data aligned to 64 bytes. Elements of less than a byte are packed, lowest bit first.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.targets.runner import Array

SENTINEL = 0xDEADBEEF
VERSION = 2
_HEADER = struct.Struct("<II")
_METADATA = struct.Struct("<IIQQQ")
_BLOCK = 64  # bytes of the header and of each blob's metadata

# Dtypes of MIL tensors by name: numpy's, and the bits that an element takes in the file.
NUMPY_DTYPES: dict[str, tuple[type[np.generic], int]] = {
    "BOOL": (np.bool_, 8),
    "FLOAT16": (np.float16, 16),
    "FLOAT32": (np.float32, 32),
    "FLOAT64": (np.float64, 64),
    "INT8": (np.int8, 8),
    "INT16": (np.int16, 16),
    "INT32": (np.int32, 32),
    "INT64": (np.int64, 64),
    "UINT8": (np.uint8, 8),
    "UINT16": (np.uint16, 16),
    "UINT32": (np.uint32, 32),
    "UINT64": (np.uint64, 64),
    "INT4": (np.int8, 4),
    "UINT6": (np.uint8, 6),
    "UINT4": (np.uint8, 4),
    "UINT3": (np.uint8, 3),
    "UINT2": (np.uint8, 2),
    "UINT1": (np.uint8, 1),
}


def unpack_bits(data: Array, count: int, bits: int, signed: bool = False) -> Array:
    """`count` elements of `bits` bits each from packed bytes, the lowest bit first; uint8, or int8 where signed."""
    flat = np.unpackbits(data.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    values: Array = (flat * (1 << np.arange(bits, dtype=np.uint16))).sum(axis=1)
    if signed:
        values = np.where(values >= 1 << (bits - 1), values.astype(np.int16) - (1 << bits), values)
        signed_out: Array = values.astype(np.int8)
        return signed_out
    out: Array = values.astype(np.uint8)
    return out


def decode(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> Array:
    """An array of `shape` from its bytes in the file or in the program. Raises ValueError where the size is wrong."""
    kind, bits = NUMPY_DTYPES[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{dtype} of shape {shape} needs {-(-count * bits // 8)} bytes, not {len(data)}")
    if bits < 8:
        return unpack_bits(np.frombuffer(data, np.uint8), count, bits, dtype.startswith("INT")).reshape(shape)
    return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).reshape(shape)


class WeightFile:
    """One weight file, mapped into memory. `path` need not exist before something is read from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: memoryview | None = None

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The blob whose metadata lies at `offset`. Raises BundleError where the file is missing, short or broken."""
        data = self._open()
        if offset + _BLOCK > len(data):
            raise self._broken(f"it ends before the blob at byte {offset}")
        sentinel, _, size, start, _ = _METADATA.unpack_from(data, offset)
        if sentinel != SENTINEL:
            raise self._broken(f"no blob begins at byte {offset}")
        if start + size > len(data):
            raise self._broken(f"the blob at byte {offset} is cut off")
        try:
            return decode(data[start : start + size], dtype, shape)
        except ValueError as error:
            raise self._broken(f"the blob at byte {offset}: {error}") from error

    def _open(self) -> memoryview:
        if self._bytes is None:
            try:
                data = memoryview(self.path.read_bytes())
            except OSError as error:
                raise BundleError(
                    f"the package lacks its weight file {self.path} ({error.strerror}); copy the whole folder"
                ) from error
            if len(data) < _BLOCK or _HEADER.unpack_from(data)[1] != VERSION:
                raise self._broken(f"it is no weight file of storage version {VERSION}")
            self._bytes = data
        return self._bytes

    def _broken(self, why: str) -> BundleError:
        return BundleError(f"{self.path} is damaged: {why}; copy the package anew or export it again")
