"""golden.npz, read without trust: every array's header is judged before memory is taken for it."""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.spec import TensorSpec

MAX_FILE_BYTES = 1 << 30
MAX_ARRAY_BYTES = 1 << 30  # one float32 input of 64 pictures of 1024 x 1024 takes 0.8 GiB
MAX_HEADER = 10_000  # numpy's own limit for a header that is not trusted
KINDS = "fiub"  # numbers and truth values

# What zipfile, zlib and numpy raise on damaged files: seen in fuzzing, or raised in their source.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError, SyntaxError, ValueError,
    TypeError, AttributeError, LookupError, ArithmeticError, OSError, EOFError, RuntimeError, MemoryError,
)  # fmt: skip

Array = NDArray[Any]


def read_golden(data: bytes, what: str, wanted: TensorSpec, outputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """`input` and the outputs by name. Raises BundleError, which names `what`, whatever the bytes.

    `wanted`: what the input has to be, in dtype and shape. An output has its own shape, or is one long row of values
    where golden keeps every n-th only.
    """
    shapes: Mapping[str, TensorSpec] = {"input": wanted, **{spec.name: spec for spec in outputs}}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: _member(archive, name, spec, name == "input") for name, spec in shapes.items()}
    except BundleError as error:
        raise BundleError(f"{what}: {error}; export the bundle again") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BundleError(f"{what} cannot be read ({reason}); export the bundle again") from error


def _member(archive: zipfile.ZipFile, name: str, spec: TensorSpec, exact: bool) -> Array:
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        raise BundleError(f"it has no {name}") from error
    if entry.file_size > MAX_ARRAY_BYTES:
        raise BundleError(f"{name} has {entry.file_size >> 20} MiB, at most {MAX_ARRAY_BYTES >> 20} are read")
    with archive.open(entry) as file:
        shape, fortran, dtype = _header(file)
        if dtype.kind not in KINDS or dtype.hasobject:
            raise BundleError(f"{name} is of {dtype}, not of numbers")
        size = math.prod(shape) * dtype.itemsize
        if size > entry.file_size:
            raise BundleError(f"{name} says {size} bytes and has {entry.file_size}")
        if (exact and dtype != np.dtype(spec.dtype)) or not _fits(shape, spec, exact):
            said = "x".join(map(str, spec.shape))
            raise BundleError(f"{name} is {dtype} of {shape}, the manifest says {spec.dtype} of {said}")
        values = np.frombuffer(file.read(size), dtype)
    if values.nbytes != size:
        raise BundleError(f"{name} is cut short")
    return values.reshape(shape, order="F" if fortran else "C").copy()


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise BundleError(f"an array has numpy's format {version[0]}.{version[1]}")
    shape, fortran, dtype = read(file, max_header_size=MAX_HEADER)
    if any(side < 0 for side in shape) or len(shape) > 8:
        raise BundleError(f"an array has the shape {shape}")
    return shape, fortran, dtype


def _fits(shape: tuple[int, ...], spec: TensorSpec, exact: bool) -> bool:
    if len(shape) != len(spec.shape):
        return not exact and len(shape) == 1 and shape[0] > 0
    named = all(side >= (1 if exact else 0) for side in shape)
    return named and all(isinstance(want, str) or want == side for want, side in zip(spec.shape, shape, strict=True))
