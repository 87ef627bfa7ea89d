"""What the open files of one mount share: the two services, memory, the read path, and limits on uploads.

Shared state: `slice_lock` sees to it that one slice id is asked for once; the rest belongs to its own module.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import trio

from blockstore.protocol import BlockId
from fsd.budget import MountBudget
from fsd.core.block_cache import BlockCache
from fsd.core.upload_queue import Slice
from fsd.ports import BlockPort, MetadataPort
from fsd.read_path import ReadPath
from wire.errors import StoreError
from wire.log import get_logger

UPLOADS_LARGE_MAX = 12
"""Uploads above UPLOAD_SMALL under way at a time: 48 MiB, what two disks' flushes of 10 ms let 2 GB/s keep busy."""
UPLOADS_SMALL_MAX = 32
"""Small uploads under way at a time; they have a limit of their own, so that an fsync need not wait for streams."""
UPLOAD_SMALL = 256 << 10
DISCARDS_MAX = 4
"""Deletions of blocks that nothing names, at a time: nobody waits for them."""
EXTENTS_CACHED_MAX = 256 << 10
"""Extents of all files in memory, about 40 MB; beyond, the layouts not used for longest are forgotten."""


log = get_logger("fsd.data")


class ForgetsExtents(Protocol):
    """A cached layout."""

    def forget(self) -> None:
        """Drop what can be asked for again."""
        ...


class DataServices:
    """One per mount."""

    def __init__(
        self,
        *,
        metadata: MetadataPort,
        blocks: BlockPort,
        budget_bytes: int,
        on_pressure: Callable[[], None],
        on_dirty: Callable[[], None],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.metadata = metadata
        self.blocks = blocks
        self.cache = BlockCache()
        self.budget = MountBudget(budget_bytes, self.cache.evict, on_pressure)
        self.reads = ReadPath(blocks, self.cache, self.budget)
        self.on_dirty = on_dirty
        self.on_foreign_change: Callable[[int], None] = lambda ino: None  # Another mount changed this file's content.
        self.clock_ns = clock_ns
        self.nursery: trio.Nursery | None = None
        self.sharing = False  # Other mounts may append to the same files.
        self.large_uploads = trio.CapacityLimiter(UPLOADS_LARGE_MAX)
        self.small_uploads = trio.CapacityLimiter(UPLOADS_SMALL_MAX)
        self.bytes_put = 0
        self.put_count = 0
        self.commit_count = 0
        self._slice_lock = trio.Lock()
        self._discards = trio.CapacityLimiter(DISCARDS_MAX)
        self._extents: OrderedDict[ForgetsExtents, int] = OrderedDict()
        self._extent_count = 0

    def start(self, nursery: trio.Nursery) -> None:
        """Tasks of uploads and fetches run in `nursery` from now on."""
        self.nursery = nursery
        self.reads.start(nursery)

    async def name_slice(self, slice_: Slice) -> int:
        """The slice's id, which is asked for when its first block leaves."""
        if slice_.slice_id is None:
            async with self._slice_lock:
                if slice_.slice_id is None:
                    slice_.slice_id = await self.metadata.allocate_slice()
        return slice_.slice_id

    def discard(self, blocks: list[BlockId]) -> None:
        """Nothing names these blocks, nor ever will: delete them in the background, if the servers can be reached."""
        if blocks and self.nursery is not None:
            self.nursery.start_soon(self._discard, blocks)

    async def _discard(self, blocks: list[BlockId]) -> None:
        try:
            async with self._discards:
                await self.blocks.delete(blocks)
        except StoreError as error:  # Garbage collection finds them.
            log.info("blocks_left_behind", first=blocks[0], count=len(blocks), error=type(error).__name__)

    def count_extents(self, layout: ForgetsExtents, count: int) -> None:
        """The layout holds `count` extents now; if all together are too many, the others' are forgotten first."""
        self._extent_count += count - self._extents.pop(layout, 0)
        if count:
            self._extents[layout] = count
        while self._extent_count > EXTENTS_CACHED_MAX and len(self._extents) > 1:
            next(iter(self._extents)).forget()  # It counts itself out.
