"""Verified bytes of blocks in memory, or on their way, with the least recently used leaving first.

Blocks are immutable, so that nothing here is ever stale: only a file's layout can be.  A *segment* is a range of one
block.  A segment that was read to its end is *cold*: the kernel has those pages now, and it is the first to leave.

Invariant F7: the segments of a block do not overlap.
Invariant F8: `charged` is the sum of the charges of all segments that are here (not those on their way).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from operator import attrgetter

from blockstore.protocol import CHECKSUM_UNIT

SEGMENT_OVERHEAD = 512
"""Bytes charged for a segment besides its data: its objects and its places in two tables."""

COLD_MAX = 32 << 20
"""Bytes of cold segments that are kept.  They serve whoever reads a little behind; more of them would only have every
fetch go into fresh memory, whose page faults cost ten times what copying does (measured: 0.3 CPU-seconds per GB)."""

Key = tuple[int, int]
"""(slice id, index) of a block."""

_START = attrgetter("start")


class Segment:
    """Bytes [start, end) of a block."""

    __slots__ = ("charge", "cold", "data", "end", "key", "start", "waiting")

    def __init__(self, key: Key, start: int, end: int) -> None:
        self.key = key
        self.start = start
        self.end = end
        # What is received is whole checksum units, and is kept alive by any part of it.
        self.charge = -(-(end - start % CHECKSUM_UNIT) // CHECKSUM_UNIT) * CHECKSUM_UNIT + SEGMENT_OVERHEAD
        self.data: memoryview | None = None  # None: on its way.
        self.waiting: object | None = None  # What the shell wakes when it is here or has failed.
        self.cold = False


class BlockCache:
    """Segments of many blocks."""

    def __init__(self) -> None:
        self._blocks: dict[Key, list[Segment]] = {}
        self._hot: OrderedDict[Segment, None] = OrderedDict()
        self._cold: OrderedDict[Segment, None] = OrderedDict()
        self.charged = 0
        self._cold_charged = 0

    def __len__(self) -> int:
        return sum(len(segments) for segments in self._blocks.values())

    def find(self, key: Key, start: int, end: int) -> list[Segment]:
        """The segments that overlap [start, end) of a block, ascending, here or on their way."""
        segments = self._blocks.get(key)
        if segments is None:
            return []
        first = bisect_left(segments, start, key=_START)
        if first and segments[first - 1].end > start:
            first -= 1
        return segments[first : bisect_left(segments, end, first, key=_START)]

    def gaps(self, key: Key, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges of [start, end) that are neither here nor on their way."""
        missing = []
        for segment in self.find(key, start, end):
            if segment.start > start:
                missing.append((start, segment.start))
            start = segment.end
        if start < end:
            missing.append((start, end))
        return missing

    def expect(self, key: Key, start: int, end: int) -> Segment:
        """A segment for a gap, on its way from now on."""
        segment = Segment(key, start, end)
        segments = self._blocks.setdefault(key, [])
        segments.insert(bisect_left(segments, start, key=_START), segment)
        return segment

    def arrived(self, segment: Segment, data: memoryview) -> None:
        """Its bytes are here."""
        assert len(data) == segment.end - segment.start
        segment.data = data
        self._hot[segment] = None
        self.charged += segment.charge

    def failed(self, segment: Segment) -> None:
        """It will not come."""
        self._unlist(segment)

    def used(self, segment: Segment, end: int) -> None:
        """A reader took bytes of it up to `end`."""
        if end >= segment.end and not segment.cold:
            del self._hot[segment]
            segment.cold = True
            self._cold[segment] = None
            self._cold_charged += segment.charge
        (self._cold if segment.cold else self._hot).move_to_end(segment)

    def cold_excess(self) -> int:
        """Bytes of cold segments above COLD_MAX: to be evicted soon."""
        return self._cold_charged - COLD_MAX

    def evict(self, size: int) -> int:
        """Let go of at least `size` bytes if there are as many; return how many it was."""
        freed = 0
        while freed < size:
            if self._cold:
                segment, _ = self._cold.popitem(last=False)
                self._cold_charged -= segment.charge
            elif self._hot:
                segment, _ = self._hot.popitem(last=False)
            else:
                break
            self._unlist(segment)
            freed += segment.charge
        self.charged -= freed
        return freed

    def _unlist(self, segment: Segment) -> None:
        segments = self._blocks[segment.key]
        segments.remove(segment)
        if not segments:
            del self._blocks[segment.key]
