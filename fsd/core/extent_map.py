"""What one file's committed bytes are made of, as far as this mount knows: extents, holes, and what is unknown.

The map answers from memory which blocks a range of the file comes from.  It is filled by pages of GetLayout, and
brought up to date by this mount's own commits, so that a commit costs no new look.  A range is either known (each of
its bytes is in an extent or is a hole) or unknown (it must be asked for).

Invariant F1: the extents are in ascending order, do not overlap, and lie in known ranges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from metadata.core.schema import FILE_SIZE_MAX, SLICE_SIZE_MAX, Extent

EXTENTS_MAX = 64 << 10
"""Extents of one file kept in memory, about 10 MiB: 16 pages of GetLayout; beyond, the map starts again."""

INFINITY = FILE_SIZE_MAX


class RangeSet:
    """A set of byte offsets, as ascending ranges that do not touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add [start, end)."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)  # The first range that ends at or after `start`: it touches or follows.
        last = bisect_right(self._starts, end)  # One past the last range that begins at or before `end`.
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def first_missing(self, start: int, end: int) -> int | None:
        """The lowest offset in [start, end) that is not in the set."""
        if start >= end:
            return None
        at = bisect_right(self._starts, start) - 1
        covered = self._ends[at] if at >= 0 and self._ends[at] > start else start
        return None if covered >= end else covered

    def clear(self) -> None:
        """Empty the set."""
        self._starts.clear()
        self._ends.clear()


class ExtentMap:
    """The committed layout of one file."""

    __slots__ = ("_extents", "_known", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._extents: list[Extent] = []
        self._known = RangeSet()

    def __len__(self) -> int:
        """How many extents are in memory."""
        return len(self._extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def copy(self) -> ExtentMap:
        """Another map with the same extents, all else unknown."""
        other = ExtentMap()
        other._starts = self._starts.copy()
        other._extents = self._extents.copy()
        return other

    def first_unknown(self, start: int, end: int) -> int | None:
        """The lowest offset in [start, end) that must be asked for; None: all of it is known."""
        return self._known.first_missing(start, end)

    def learn(self, start: int, end: int, extents: Iterable[Extent]) -> None:
        """A page came: `extents` is all there is in [start, end); they may reach out of it on both sides."""
        if len(self._extents) > EXTENTS_MAX:
            self.clear()
        self._cut_out(start, end)
        for extent in extents:
            self._put(extent)
            self._known.add(extent.offset, extent.offset + extent.length)
        self._known.add(start, end)

    def next_start(self, at: int) -> int | None:
        """The first offset from `at` on that is known to be in an extent; None: there is none."""
        index = bisect_right(self._starts, at) - 1
        if index >= 0 and self._end(index) > at:
            return at
        return self._starts[index + 1] if index + 1 < len(self._starts) else None

    def end_of_run(self, at: int) -> int:
        """Where the extents that follow each other without a hole from `at` on end; `at` if none has it."""
        index = bisect_right(self._starts, at) - 1
        if index < 0 or self._end(index) <= at:
            return at
        while index + 1 < len(self._starts) and self._starts[index + 1] == self._end(index):
            index += 1
        return self._end(index)

    def punch(self, start: int, end: int) -> None:
        """[start, end) became a hole."""
        self._cut_out(start, end)
        self._known.add(start, end)

    def overlay(self, extents: Iterable[Extent]) -> None:
        """These were committed: they replace what they cover."""
        for extent in extents:
            self._put(extent)
            self._known.add(extent.offset, extent.offset + extent.length)

    def truncate(self, size: int) -> None:
        """The file was cut, or made longer, to `size`: beyond it there is nothing."""
        self._cut_out(size, INFINITY)
        self._known.add(size, INFINITY)

    def clear(self) -> None:
        """Forget all: somebody else changed the file."""
        self._starts.clear()
        self._extents.clear()
        self._known.clear()

    def lookup(self, start: int, end: int) -> list[Extent]:
        """The extents that overlap [start, end), whole, ascending; what they leave out is a hole.  It is known."""
        assert self._known.first_missing(start, end) is None, "lookup in an unknown range"
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._end(first) <= start:
            first += 1
        return self._extents[first : bisect_left(self._starts, end, first)]

    def _cut_out(self, start: int, end: int) -> int:
        """Remove what lies in [start, end); return the index where something at `start` belongs."""
        first = bisect_left(self._starts, start)
        if first and self._end(first - 1) > start:  # One begins before `start` and reaches in.
            before = self._extents[first - 1]
            self._extents[first - 1] = _part(before, before.offset, start)
            if before.offset + before.length > end:
                self._starts.insert(first, end)
                self._extents.insert(first, _part(before, end, before.offset + before.length))
                return first
        last = bisect_left(self._starts, end, first)
        if last > first and self._end(last - 1) > end:  # The last one reaches out.
            after = self._extents[last - 1]
            last -= 1
            self._starts[last] = end
            self._extents[last] = _part(after, end, after.offset + after.length)
        del self._starts[first:last]
        del self._extents[first:last]
        return first

    def _put(self, extent: Extent) -> None:
        at = self._cut_out(extent.offset, extent.offset + extent.length)
        if at and _follows(self._extents[at - 1], extent):
            before = self._extents[at - 1]
            length = before.length + extent.length
            self._extents[at - 1] = Extent(before.offset, length, before.slice_id, before.slice_offset)
            return
        self._starts.insert(at, extent.offset)
        self._extents.insert(at, extent)

    def _end(self, index: int) -> int:
        extent = self._extents[index]
        return extent.offset + extent.length


def _part(extent: Extent, start: int, end: int) -> Extent:
    return Extent(start, end - start, extent.slice_id, extent.slice_offset + start - extent.offset)


def _follows(before: Extent, after: Extent) -> bool:
    """True if the two are one: next to each other in the file and in the slice."""
    return (
        before.offset + before.length == after.offset
        and before.slice_id == after.slice_id
        and before.slice_offset + before.length == after.slice_offset
        and before.length + after.length <= SLICE_SIZE_MAX
    )
