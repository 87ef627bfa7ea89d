"""CRC32C, the one checksum of fsd: of frames, of blocks, of records on disk.

The `crc32c` package uses the processor's instruction (measured here: 26 GB/s, it takes memoryviews and lets other
threads run meanwhile); crcmod, in C but by table (0.45 GB/s), is the fallback and the independent oracle of the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What holds bytes here; a memoryview is contiguous and of single bytes."""


def by_table() -> Callable[[Buffer, int], int]:
    """crc32c computed by crcmod: the fallback, and the tests' oracle."""
    import crcmod.predefined

    compute = crcmod.predefined.mkPredefinedCrcFun("crc-32c")

    def crc32c_by_table(data: Buffer, value: int = 0) -> int:
        return cast("int", compute(data, value))

    return crc32c_by_table


def _fastest() -> Callable[..., int]:
    try:
        from crc32c import crc32c as by_instruction
    except ImportError:  # No wheel for this processor.
        return by_table()
    return by_instruction


crc32c: Callable[..., int] = _fastest()
"""crc32c(data, value=0): the checksum of `data` appended to bytes whose checksum is `value`; 0 to 2**32 - 1.

A plain name for the C function, as a wrapper would cost as much as the checksum of a small frame.
"""


def unit_checksums(data: Buffer, unit: int) -> bytes:
    """One little-endian u32 per `unit` bytes of `data`; the last unit may be short.  No data, no checksums."""
    size = len(data)
    if size <= unit:
        return crc32c(data).to_bytes(4, "little") if size else b""
    view = memoryview(data)
    sums = [crc32c(view[start : start + unit]) for start in range(0, size, unit)]
    return struct.pack(f"<{len(sums)}I", *sums)


def unit_checksums_of_pieces(pieces: Sequence[Buffer], unit: int) -> bytes:
    """As unit_checksums of all `pieces` one behind the other, without joining them."""
    sums: list[int] = []
    value, room = 0, unit  # Of the unit being filled: its checksum so far, and how many bytes it still takes.
    for piece in pieces:
        view, start = memoryview(piece), 0
        while start < len(view):
            part = view[start : start + room]
            value = crc32c(part, value)
            start += len(part)
            room -= len(part)
            if room == 0:
                sums.append(value)
                value, room = 0, unit
    if room < unit:
        sums.append(value)
    return struct.pack(f"<{len(sums)}I", *sums)


def first_bad_unit(data: Buffer, checksums: bytes, unit: int) -> int | None:
    """Index of the first unit of `data` that does not match `checksums`; None when all do.

    A count that does not fit the size of `data` is a mismatch of the first unit that is missing or too many.
    """
    found = unit_checksums(data, unit)
    if found == checksums:
        return None
    for index in range(min(len(found), len(checksums)) // 4):
        if found[4 * index : 4 * index + 4] != checksums[4 * index : 4 * index + 4]:
            return index
    return min(len(found), len(checksums)) // 4
