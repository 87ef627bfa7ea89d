"""Where data and holes of a file are, for lseek(2) with SEEK_DATA and SEEK_HOLE.

Data are what was written: pieces in memory, inline bytes, extents.  What is allocated and was never written is a hole,
as on ext4; so is what lies between the last byte and the end of the file, and, as POSIX has it, the end itself.
Where data touch a hole to the byte, that byte is told, not its block.
"""

from __future__ import annotations

from fsd.core.dirty_map import DirtyMap
from fsd.file_layout import FileLayout

PAGES_MAX = 256
"""Pages of layout that one call loads: a million extents.  Beyond, all is called data, which it may be called."""


async def find_data(layout: FileLayout, dirty: DirtyMap, offset: int) -> int | None:
    """The first offset from `offset` on that has data; None: there is none, or `offset` is not in the file."""
    for _ in range(PAGES_MAX):
        if layout.must_load:
            await layout.load(offset)
            continue
        written = dirty.next_start(offset)
        end = layout.inode.size if written is None else min(layout.inode.size, written)
        if layout.is_inline:
            if layout.inline is None:
                await layout.load(0)
                continue
            committed = offset if offset < min(len(layout.inline), end) else None
        else:
            committed = layout.extents.next_start(offset)
            known_end = layout.first_unknown(offset, end)
            if committed is None or committed >= (end if known_end is None else known_end):
                committed = None
                if known_end is not None:
                    await layout.load(known_end)
                    continue
        return written if committed is None else committed
    return offset


async def find_hole(layout: FileLayout, dirty: DirtyMap, offset: int) -> int | None:
    """The first offset from `offset` on that has no data, at most the end of the file; None: it is not in the file."""
    at = offset
    for _ in range(PAGES_MAX):
        if layout.must_load:
            await layout.load(offset)
            continue
        size = max(layout.inode.size, dirty.end)
        if offset >= size:
            return None
        unknown = None
        before = -1
        while before != at < size and unknown is None:
            before = at
            at = dirty.end_of_run(at)
            if at < layout.inode.size:
                unknown = layout.first_unknown(at, at + 1)
                if unknown is None:
                    at = _end_of_committed(layout, at)
        if unknown is None:
            return min(at, size)
        await layout.load(unknown)
    return max(layout.inode.size, dirty.end)


def _end_of_committed(layout: FileLayout, at: int) -> int:
    if layout.is_inline:
        return max(at, len(layout.inline or b""))
    return layout.extents.end_of_run(at)
