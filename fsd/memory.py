"""How this process keeps memory that it has freed.

glibc gives large buffers their own mapping and returns it when they are freed, so that each MiB that passes through
costs 256 page faults: 0.25 to 0.45 CPU-seconds per GB here, where the copy itself takes 0.03.  Kept in the heap, the
same memory is used again and again.  The data path's budget bounds how much that is.
"""

from __future__ import annotations

import ctypes

from wire.log import get_logger

M_TRIM_THRESHOLD = -1  # /usr/include/malloc.h
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD = 32 << 20
"""Buffers below this come from the heap: all that the data path makes; the largest value glibc takes."""
TRIM_THRESHOLD = 128 << 20
"""Free bytes at the end of the heap that are kept: what uploads, read-ahead and the kernel's requests turn over."""

log = get_logger("fsd.memory")


def keep_freed_buffers() -> bool:
    """Let malloc keep up to TRIM_THRESHOLD freed bytes; False if this libc has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)):
        log.info("malloc_keeps_its_ways")
        return False
    return True
