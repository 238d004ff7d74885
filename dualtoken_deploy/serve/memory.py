"""What the C library does with memory that was freed: given back at once, it is asked for again by the next picture."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 8 * 2**20  # at most, at the end of each arena: what a picture of a megapixel is decoded and resized in
LARGE_BYTES = 4 * 2**20  # from here on a block is the kernel's own, and goes back when it is freed


def keep_freed_memory() -> bool:
    """Keeps a little of what is freed, for the whole process: a page that the kernel clears costs more than its use.

    False where the C library has no mallopt (musl), and everything stays as it was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
