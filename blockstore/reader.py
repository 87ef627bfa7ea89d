"""Reading blocks from their segments.

What is read is not verified here (the reader at the far end verifies it, with the checksums that it gets along), except
for the checksum table itself and by `verify`.  `read_nowait` never waits for a disk; everything else may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from blockstore.catalogue import Catalogue
from blockstore.core.index_rows import Entry
from blockstore.core.segment import KIND_BLOCK, RECORD_HEADER_SIZE, checksum_count, decode_record_header
from blockstore.files import SegmentFile
from blockstore.protocol import CHECKSUM_UNIT, BlockId
from wire.checksum import crc32c, first_bad_unit
from wire.errors import BlockCorrupt, InvalidArgument

HOT_COUNT_MAX = 16384
"""Blocks whose place is remembered ready for use, 20 MiB with their checksum tables; all dropped when full."""


class Units(NamedTuple):
    """Whole checksum units of a block, the last one perhaps short."""

    offset: int  # In the block, a multiple of CHECKSUM_UNIT.
    block_size: int
    checksums: bytes  # Of these units.
    data: memoryview


@dataclass(frozen=True, slots=True)
class _Range:
    """The units that cover a request."""

    first: int
    last: int  # The one after the last.
    start: int  # Bytes in the block.
    end: int


def _covering(entry: Entry, offset: int, size: int) -> _Range:
    if offset >= entry.size:
        raise InvalidArgument(f"offset {offset} in a block of {entry.size} bytes")
    first = offset // CHECKSUM_UNIT
    last = checksum_count(min(offset + size, entry.size))
    return _Range(first, last, first * CHECKSUM_UNIT, min(last * CHECKSUM_UNIT, entry.size))


class _Hot(NamedTuple):
    """Where a block lies, ready for reading; true while the catalogue's generation is the same."""

    generation: int
    segment: int
    data: int  # Offset in the segment.
    size: int
    table: bytes


class Reader:
    """Reads of one store; its methods may be called from any thread, several at a time, `read_nowait` from one only."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._hot: dict[BlockId, _Hot] = {}

    def read_nowait(self, block: BlockId, *, offset: int, size: int) -> Units | None:
        """The units covering [offset, offset + size) if they lie in the page cache; None: ask `read`, in a thread.

        Raises: as `read`.
        """
        catalogue = self._catalogue
        generation = catalogue.generation
        hot = self._hot.get(block)
        if hot is None or hot.generation != generation:
            hot = self._heat(block, generation)
        if hot is None or offset >= hot.size:
            return None  # `read` tells an offset past the end.
        file = catalogue.file_nowait(hot.segment)
        if file is None:
            return None
        first = offset // CHECKSUM_UNIT
        last = (min(offset + size, hot.size) - 1) // CHECKSUM_UNIT + 1
        start = first * CHECKSUM_UNIT
        data = bytearray(min(last * CHECKSUM_UNIT, hot.size) - start)
        try:
            count = file.read_nowait(data, hot.data + start)
        except OSError:
            return None  # The same error shows itself to `read`, which tells it.
        if count < len(data) or catalogue.generation != generation:
            return None
        return Units(start, hot.size, hot.table[4 * first : 4 * last], memoryview(data))

    def _heat(self, block: BlockId, generation: int) -> _Hot | None:
        """Find the block and its checksum table, without waiting; None: the table is not at hand."""
        catalogue = self._catalogue
        key, entry = catalogue.locate(block)
        table = catalogue.table(key, entry)
        if table is None:
            file = catalogue.file_nowait(entry.segment)
            try:
                table = None if file is None else self._table_nowait(key, entry, file)
            except OSError:
                return None
        if table is None:
            return None
        if len(self._hot) >= HOT_COUNT_MAX:
            self._hot.clear()
        hot = self._hot[block] = _Hot(generation, entry.segment, entry.layout.data, entry.size, table)
        return hot

    def _table_nowait(self, key: bytes, entry: Entry, file: SegmentFile) -> bytes | None:
        raw = bytearray(4 * checksum_count(entry.size))
        if file.read_nowait(raw, entry.layout.table) < len(raw) or crc32c(raw) != entry.table_crc:
            return None
        table = bytes(raw)
        self._catalogue.keep_table(key, entry, table)
        return table

    def read(self, block: BlockId, *, offset: int, size: int) -> Units:
        """The units covering [offset, offset + size) of a block; a size past its end is cut there.

        Raises:
            NoSuchBlock: it is not here (any more).
            InvalidArgument: `offset` is at or past its end.
            BlockCorrupt: the disk fails the read, or index or checksum table are damaged; counted.
        """
        while True:
            generation = self._catalogue.generation
            key, entry = self._catalogue.locate(block)
            wanted = _covering(entry, offset, size)
            try:
                units = self._read_units(key, entry, wanted)
            except BlockCorrupt:
                if self._catalogue.generation == generation:
                    raise
                continue
            if self._catalogue.generation == generation or self._catalogue.find(key) == entry:
                return units

    def _read_units(self, key: bytes, entry: Entry, wanted: _Range) -> Units:
        catalogue = self._catalogue
        where = entry.layout
        table = catalogue.table(key, entry)
        try:
            file = catalogue.file(entry.segment)
            if table is None and wanted.start == 0:  # One read for both, as they lie side by side.
                whole = memoryview(bytearray(where.data - where.table + wanted.end))
                complete = file.read_into(whole, where.table) == len(whole)
                table, data = bytes(whole[: 4 * checksum_count(entry.size)]), whole[where.data - where.table :]
            else:
                if table is None:
                    raw = bytearray(4 * checksum_count(entry.size))
                    file.read_into(raw, where.table)
                    table = bytes(raw)
                data = memoryview(bytearray(wanted.end - wanted.start))
                complete = file.read_into(data, where.data + wanted.start) == len(data)
        except OSError as error:
            raise self._failed(key, entry, f"reading it failed: {error.strerror}") from error
        if not complete:
            raise self._failed(key, entry, "its segment ends before it does")
        if crc32c(table) != entry.table_crc:
            raise self._failed(key, entry, "its checksum table is damaged")
        catalogue.keep_table(key, entry, table)
        return Units(wanted.start, entry.size, table[4 * wanted.first : 4 * wanted.last], data)

    def _failed(self, key: bytes, entry: Entry, reason: str) -> BlockCorrupt:
        """Count the damage, unless the block was deleted or moved while it was read: then the bytes prove nothing."""
        if self._catalogue.find(key) == entry:
            return self._catalogue.damaged(key, reason)
        return BlockCorrupt(reason)

    def verify(self, block: BlockId) -> int:
        """Read the whole record and hold it against its checksums and the index; the block's size.

        Raises:
            NoSuchBlock: it is not here (any more).
            BlockCorrupt: header, checksum table or data are damaged, or the disk fails the read; counted.
        """
        while True:
            generation = self._catalogue.generation
            key, entry = self._catalogue.locate(block)
            reason = self.damage(block, entry)
            if reason is None:
                self._catalogue.corrupt.discard(key)
                return entry.size
            if self._catalogue.generation == generation or self._catalogue.find(key) == entry:
                raise self._catalogue.damaged(key, reason)

    def damage(self, block: BlockId, entry: Entry) -> str | None:
        """What is wrong with the record at `entry`; None: nothing."""
        where = entry.layout
        whole = memoryview(bytearray(where.data + entry.size - entry.offset))
        try:
            if self._catalogue.file(entry.segment).read_into(whole, entry.offset) < len(whole):
                return "its segment ends before it does"
        except OSError as error:
            return f"reading it failed: {error.strerror}"
        segment = self._catalogue.segments.get(entry.segment)
        if segment is None:
            return "its segment is gone"
        header = decode_record_header(whole[:RECORD_HEADER_SIZE], offset=entry.offset, seed=segment.seed)
        if header is None or header.kind != KIND_BLOCK or header.block != block or header.size != entry.size:
            return "its header is damaged"
        table = bytes(whole[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + 4 * checksum_count(entry.size)])
        if crc32c(table) != entry.table_crc or (entry.checksums and entry.checksums != table):
            return "its checksum table is damaged"
        if first_bad_unit(whole[where.data - entry.offset :], table, CHECKSUM_UNIT) is not None:
            return "its bytes do not match their checksums"
        return None

    def checksums(self, key: bytes, entry: Entry) -> bytes | None:
        """The whole checksum table of a block; None when it cannot be read undamaged."""
        table = self._catalogue.table(key, entry)
        if table is not None:
            return table
        raw = bytearray(4 * checksum_count(entry.size))
        try:
            self._catalogue.file(entry.segment).read_into(raw, entry.layout.table)
        except OSError:
            return None
        return bytes(raw) if crc32c(raw) == entry.table_crc else None
