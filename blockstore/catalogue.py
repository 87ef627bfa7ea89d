"""What a block store knows in memory: its segments, the blocks that are not yet in the index, open files, checksums.

Shared by the writing, reading and recovering parts of the store, which run in several threads:

- `fresh` is changed only in the commit stage (one thread at a time) and read by any thread, without a lock, as single
  dictionary operations are atomic.  A block goes into `fresh` before it leaves the set of blocks in flight, and leaves
  `fresh` only after the commit that put it into the index: looking in that order never misses it.
- `commit_count` grows after a commit of the index and before `fresh` is emptied: rows that were read before are as
  good as new while it is the same.
- `generation` grows before any range is punched or cut off.  A reader that finds it changed after it has read
  looks its block up again, because it may have read zeros.
- the caches of open files and of checksum tables have a lock each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from blockstore.core.index_rows import DamagedRow, Entry, SegmentRow, decode_block_key, encode_block_key
from blockstore.core.segment import SEGMENT_RECORDS_OFFSET
from blockstore.files import SegmentFile, SegmentFiles
from blockstore.index import Index
from blockstore.protocol import BlockId
from wire.errors import BlockCorrupt, NoSuchBlock

OPEN_FILES_MAX = 256
"""Segments kept open: 64 GiB of blocks without an open(2); far below the usual limit of 1,024 descriptors."""
TABLES_SIZE_MAX = 32 << 20
"""Bytes of checksum tables kept, those of 128 GiB of large blocks."""
CORRUPT_KEPT_MAX = 65536


@dataclass
class Segment:
    """One segment, as far as the write and commit stages need it."""

    number: int
    seed: int
    end: int = SEGMENT_RECORDS_OFFSET  # Where the next record goes; moved by the write stage.
    durable: int = SEGMENT_RECORDS_OFFSET  # Synced, and in `fresh` or the index, up to here; moved by the commit stage.
    live_count: int = 0
    live_bytes: int = 0
    sealed: bool = False  # Nothing is appended any more.
    poisoned: bool = False  # A sync failed: what was written since the one before cannot be trusted.
    committed: SegmentRow | None = None  # As the index has it.

    @property
    def row(self) -> SegmentRow:
        """Its checkpoint.  It counts as sealed once all that was written to it is durable or given up."""
        sealed = self.sealed and self.durable == self.end
        return SegmentRow(self.durable, self.live_count, self.live_bytes, self.seed, sealed)


class Catalogue:
    """The state that the parts of one store share."""

    def __init__(self, files: SegmentFiles, index: Index) -> None:
        self.files = files
        self.index = index
        self.segments: dict[int, Segment] = {}
        self.fresh: dict[bytes, Entry] = {}
        self.fresh_bytes = 0
        self.generation = 0
        self.commit_count = 0
        self.corrupt: set[bytes] = set()
        self._open: OrderedDict[int, SegmentFile] = OrderedDict()
        self._open_lock = threading.Lock()
        self._tables: OrderedDict[bytes, bytes] = OrderedDict()
        self._tables_size = 0
        self._tables_lock = threading.Lock()

    # --- blocks -----------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> Entry | None:
        """Where the block lies; None when it is not here.

        Raises:
            BlockCorrupt: its row in the index is damaged; counted.
        """
        entry = self.fresh.get(key)
        if entry is not None:
            return entry
        try:
            return self.index.get(key)
        except DamagedRow as error:
            raise self.damaged(key, "its index row does not match its checksum") from error

    def locate(self, block: BlockId) -> tuple[bytes, Entry]:
        """The key of the block and where it lies.

        Raises:
            NoSuchBlock: it is not here.
            BlockCorrupt: its row in the index is damaged; counted.
        """
        key = encode_block_key(block)
        entry = self.find(key)
        if entry is None:
            raise NoSuchBlock(f"block {block.slice_id}.{block.index}")
        return key, entry

    def damaged(self, key: bytes, reason: str) -> BlockCorrupt:
        """Count the block as damaged; the error to raise."""
        if len(self.corrupt) < CORRUPT_KEPT_MAX:
            self.corrupt.add(key)
        block = decode_block_key(key)
        return BlockCorrupt(f"block {block.slice_id}.{block.index}: {reason}")

    def list_page(self, after: BlockId | None, count: int) -> list[tuple[BlockId, int]]:
        """Up to `count` blocks with ids above `after`, ascending, with their sizes (0: the row is damaged)."""
        key = None if after is None else encode_block_key(after)
        fresh = dict(self.fresh)  # Before the index: a block that moves meanwhile is seen twice, not never.
        rows = dict(self.index.page(key, count))
        rows.update((k, entry.size) for k, entry in fresh.items() if key is None or k > key)
        return [(decode_block_key(k), rows[k]) for k in sorted(rows)[:count]]

    # --- files ------------------------------------------------------------------------------------------------------

    def file(self, number: int) -> SegmentFile:
        """The open file of a segment.

        Raises:
            OSError: it cannot be opened.
        """
        with self._open_lock:
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
        return self.keep_open(number, self.files.open(number))

    def file_nowait(self, number: int) -> SegmentFile | None:
        """The same if it is open already."""
        return self._open.get(number)

    def keep_open(self, number: int, file: SegmentFile) -> SegmentFile:
        """Remember a file that was opened; the one to use, as another thread may have been faster."""
        with self._open_lock:
            file = self._open.setdefault(number, file)
            if len(self._open) > OPEN_FILES_MAX:
                self._open.popitem(last=False)
            return file

    def close_file(self, number: int) -> None:
        """Forget the file of a removed segment; it is closed when the last reader is done."""
        with self._open_lock:
            self._open.pop(number, None)

    # --- checksum tables --------------------------------------------------------------------------------------------

    def table(self, key: bytes, entry: Entry) -> bytes | None:
        """The checksum table of a block if it is at hand."""
        if entry.checksums:
            return entry.checksums
        with self._tables_lock:
            found = self._tables.get(key)
            if found is not None:
                self._tables.move_to_end(key)
            return found

    def keep_table(self, key: bytes, entry: Entry, table: bytes) -> None:
        """Remember a table that is not kept in the index."""
        if entry.checksums:
            return
        with self._tables_lock:
            old = self._tables.pop(key, b"")
            self._tables[key] = table
            self._tables_size += len(table) - len(old)
            while self._tables_size > TABLES_SIZE_MAX:
                self._tables_size -= len(self._tables.popitem(last=False)[1])

    def forget_table(self, key: bytes) -> None:
        """The block is deleted."""
        with self._tables_lock:
            self._tables_size -= len(self._tables.pop(key, b""))

    def close(self) -> None:
        """Close the index and let go of the files; no call may be under way."""
        with self._open_lock:
            self._open.clear()
        self.index.close()
