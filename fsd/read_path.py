"""Bytes of blocks, from memory or from block servers: one cache for the whole mount.

Tasks: a reader fetches what it needs in its own task; what is fetched besides (read-ahead, the other blocks of the
same read) has a task each in the mount's nursery, at most FETCHES_MAX at a time.
Shared state: the cache and the budget.  A gap is looked up, paid for and registered as a segment on its way without
an await between; so no two tasks fetch the same bytes.  Whoever finds a segment on its way waits for it; if it fails,
the waiter fetches the gap itself and gets the error as its own.  Bytes that have arrived are taken from the segment at
once, before anything else can evict it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import trio

from blockstore.protocol import CHECKSUM_UNIT, BlockId
from fsd.budget import MountBudget
from fsd.core.block_cache import BlockCache, Key, Segment
from fsd.ports import BlockPort
from wire.errors import StoreError
from wire.log import get_logger

FETCHES_MAX = 16
"""Fetches in the background of one mount: 64 MiB of whole blocks under way, four streams' full read-ahead."""
SPAN_GAP_MAX = 64 << 10
"""Ranges of one block closer than this are fetched as one: 64 KiB take less time than a request does."""

log = get_logger("fsd.read")


class Span(NamedTuple):
    """Bytes [start, end) of a block, which certainly has bytes up to `limit`."""

    key: Key
    start: int
    end: int
    limit: int


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Spans of the same block that are near each other, as one; in the order of their first bytes in the file."""
    merged: dict[Key, list[Span]] = {}
    order: list[Key] = []
    for span in spans:
        known = merged.get(span.key)
        if known is None:
            merged[span.key] = [span]
            order.append(span.key)
            continue
        last = known[-1]
        if last.start <= span.start <= last.end + SPAN_GAP_MAX:
            known[-1] = Span(span.key, last.start, max(last.end, span.end), max(last.limit, span.limit))
        else:
            known.append(span)
    return [span for key in order for span in merged[key]]


class ReadPath:
    """Reads blocks for all files of one mount."""

    def __init__(self, blocks: BlockPort, cache: BlockCache, budget: MountBudget) -> None:
        self._blocks = blocks
        self._cache = cache
        self._budget = budget
        self._nursery: trio.Nursery | None = None
        self._fetches = 0
        self.bytes_fetched = 0
        self.get_count = 0

    def start(self, nursery: trio.Nursery) -> None:
        """Fetches in the background run in `nursery` from now on."""
        self._nursery = nursery

    def cached(self, key: Key, start: int, end: int) -> memoryview | None:
        """The bytes, if one segment has them all."""
        segments = self._cache.find(key, start, end)
        if len(segments) != 1:
            return None
        segment = segments[0]
        if segment.data is None or segment.start > start or segment.end < end:
            return None
        self._used(segment, end)
        return segment.data[start - segment.start : end - segment.start]

    def prefetch(self, spans: Iterable[Span], replicas: int) -> None:
        """Begin to fetch what of the spans is not here, as far as there is room for it."""
        for span in spans:
            start, end = _whole_units(span)
            for low, high in self._cache.gaps(span.key, start, end):
                if self._fetches >= FETCHES_MAX or self._nursery is None:
                    return
                segment = self._try_expect(span.key, low, high, ahead=True)
                if segment is None:
                    return
                self._fetches += 1
                self._nursery.start_soon(self._fetch_in_background, segment, replicas)

    async def read(self, span: Span, replicas: int) -> list[memoryview]:
        """The bytes of the span, in one or several parts.

        Raises: what BlockClient.get raises; the cache is as if it had not been asked.
        """
        parts: list[memoryview] = []
        at, end = span.start, span.end
        limit = _whole_units(span)[1]
        while at < end:
            found = self._cache.find(span.key, at, end)
            segment = found[0] if found else None
            if segment is None or segment.start > at:
                low = self._round_down(span.key, at)
                segment = self._try_expect(span.key, low, segment.start if segment else limit, ahead=False)
                if segment is None:
                    await self._budget.wait_fetch_done()
                    continue
                data = await self._fetch(segment, replicas)
            elif segment.data is None:
                await _arrival(segment).wait()
                continue
            else:
                data = segment.data
            stop = min(end, segment.end)
            parts.append(data[at - segment.start : stop - segment.start])
            if segment.data is not None:
                self._touch(segment, stop)
            at = stop
        return parts

    def _touch(self, segment: Segment, end: int) -> None:
        if segment in self._cache.find(segment.key, segment.start, segment.end):  # Not evicted meanwhile.
            self._used(segment, end)

    def _used(self, segment: Segment, end: int) -> None:
        self._cache.used(segment, end)
        excess = self._cache.cold_excess()
        if excess > 0:
            self._budget.core.release_clean(excess)

    def _round_down(self, key: Key, at: int) -> int:
        """Where the fetch of a gap at `at` begins: with its checksum unit, unless a segment reaches into that."""
        low = at - at % CHECKSUM_UNIT
        before = self._cache.find(key, low, at)
        return before[-1].end if before else low

    def _try_expect(self, key: Key, start: int, end: int, *, ahead: bool) -> Segment | None:
        """Pay for a gap and register it; None if there is no room."""
        charge = Segment(key, start, end).charge
        if not self._budget.try_fetch(charge, ahead=ahead):
            return None
        return self._cache.expect(key, start, end)

    async def _fetch(self, segment: Segment, replicas: int) -> memoryview:
        """Bring a registered segment; on any error it is gone, and those who wait for it look again."""
        size = segment.end - segment.start
        arrived = False
        try:
            data = await self._blocks.get(BlockId(*segment.key), offset=segment.start, size=size, replicas=replicas)
            assert len(data) == size
            arrived = True
        finally:
            if arrived:
                self._cache.arrived(segment, data)
                self._budget.fetched(segment.charge)
            else:
                self._cache.failed(segment)
                self._budget.release_fetch(segment.charge)
            if segment.waiting is not None:
                _arrival(segment).set()
        self.bytes_fetched += size
        self.get_count += 1
        return data

    async def _fetch_in_background(self, segment: Segment, replicas: int) -> None:
        try:
            await self._fetch(segment, replicas)
        except StoreError as error:  # Whoever needs the bytes will ask again, and be told.
            log.info("read_ahead_failed", block=segment.key, error=type(error).__name__, detail=error.detail)
        finally:
            self._fetches -= 1


def _whole_units(span: Span) -> tuple[int, int]:
    """The span rounded out to checksum units, as far as the block is known to have bytes."""
    start = span.start - span.start % CHECKSUM_UNIT
    return start, max(span.end, min(span.limit, -(-span.end // CHECKSUM_UNIT) * CHECKSUM_UNIT))


def _arrival(segment: Segment) -> trio.Event:
    if segment.waiting is None:
        segment.waiting = trio.Event()
    assert isinstance(segment.waiting, trio.Event)
    return segment.waiting
