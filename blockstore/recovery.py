"""Opening a block store: what the index says, completed by scanning what was appended after its checkpoint.

A scan takes every undamaged record whose bytes match their checksums, also behind damaged ones: a fault in one record
must not cost the acknowledged ones after it.  What follows the last good record is cut off.  Records before the
checkpoint are not looked at, so a deleted one never comes back (invariant B2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blockstore.catalogue import Catalogue, Segment
from blockstore.core.index_rows import Entry, encode_block_key, kept_checksums
from blockstore.core.segment import (
    KIND_BLOCK,
    LARGE_SIZE_MIN,
    RECORD_ALIGNMENT,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SEGMENT_RECORDS_OFFSET,
    RecordHeader,
    checksum_count,
    decode_record_header,
    decode_segment_header,
    layout,
    next_page,
)
from blockstore.files import SegmentFile
from blockstore.index import Changes
from blockstore.protocol import CHECKSUM_UNIT
from wire.checksum import crc32c, first_bad_unit
from wire.errors import BlockCorrupt
from wire.log import get_logger

SEARCH_BYTES = 1 << 20
"""Bytes read at a time while looking for the next record behind a damaged one."""

log = get_logger("blockstore")


@dataclass
class Recovered:
    """What the writer goes on with."""

    next_number: int
    active: Segment | None
    to_punch: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class _Found:
    """What the scans found: to be committed."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    dead: list[tuple[int, int, int]] = field(default_factory=list)


def recover(catalogue: Catalogue) -> Recovered:
    """Fill the catalogue from index and segments, and bring the index up to date.

    Raises:
        IndexDamaged: the checkpoint cannot be read.
        WrongVersion: a segment was written by a newer version of fsd.
        OSError: a disk does not read or write.
    """
    index, files = catalogue.index, catalogue.files
    next_number = index.next_number()
    rows = index.segments()
    numbers = files.numbers()
    for number in numbers:
        if number in rows:
            row = rows[number]
            catalogue.segments[number] = Segment(
                number, row.seed, row.indexed_to, row.indexed_to, row.live_count, row.live_bytes, row.sealed
            )
        elif number < next_number:
            files.remove(number)  # Removed from the index, and the crash came before the file was.
        else:
            _adopt(catalogue, number)
    for number in rows.keys() - set(numbers):
        # Its blocks answer with BlockCorrupt, so that their other copies are used and they are written again.
        log.error("segment_missing", segment=number, blocks=rows[number].live_count)
        next_number = max(next_number, number + 1)
    next_number = max([next_number, *(number + 1 for number in numbers)])
    found = _Found()
    for number in sorted(catalogue.segments):
        if not catalogue.segments[number].sealed:
            _scan(catalogue, catalogue.segments[number], found)
    active = _choose_active(catalogue)
    _commit(catalogue, found, next_number)
    return Recovered(next_number, active, index.punches())


def _adopt(catalogue: Catalogue, number: int) -> None:
    """A segment that was made after the checkpoint."""
    file = catalogue.files.open(number)
    raw = bytearray(SEGMENT_RECORDS_OFFSET)
    size = file.read_into(raw, 0)
    header = decode_segment_header(raw[:size])
    if header is None and not any(raw):
        # Its making was cut short, before any record: that comes only after header and name are synced.
        catalogue.files.remove(number)
    elif header is None or header.number != number:
        log.error("segment_set_aside", segment=number, reason="both copies of its header are damaged")
        catalogue.files.set_aside(number)
    else:
        catalogue.segments[number] = Segment(number, header.seed)


def _scan(catalogue: Catalogue, segment: Segment, found: _Found) -> None:
    """Take the records behind the checkpoint of one segment, in order, and cut off what follows the last good one."""
    file = catalogue.file(segment.number)
    size = file.size()
    position = end = segment.durable
    while position < size:
        header = _record_at(file, segment, position)
        table = None if header is None else _sound_table(file, header)
        if header is None or (header.kind == KIND_BLOCK and table is None):
            at_page = next_page(position)
            if position == end < at_page and _record_at(file, segment, at_page) is not None:
                position = at_page  # The unused bytes before a large record.
            else:
                position = _next_record(file, segment, position + RECORD_ALIGNMENT, size)
            continue
        if next_page(end) < position or (end < position and header.size < LARGE_SIZE_MIN):
            log.warning("damaged_range", segment=segment.number, offset=end, size=position - end)
            found.dead.append((segment.number, end, position))
        if header.kind == KIND_BLOCK and table is not None:
            _take(catalogue, segment, header, table, found)
        position = end = layout(position, header.size).end
    if end < size:
        log.info("tail_cut", segment=segment.number, offset=end, size=size - end)
        file.truncate(end)
    if size > segment.durable:
        file.sync()  # What was read may never have left the page cache; the index must not get ahead of it.
    segment.end = segment.durable = end


def _record_at(file: SegmentFile, segment: Segment, position: int) -> RecordHeader | None:
    raw = bytearray(RECORD_HEADER_SIZE)
    count = file.read_into(raw, position)
    return decode_record_header(raw[:count], offset=position, seed=segment.seed)


def _sound_table(file: SegmentFile, header: RecordHeader) -> bytes | None:
    """The checksum table of a record whose table and data are undamaged, else None."""
    where = layout(header.offset, header.size)
    whole = memoryview(bytearray(where.data + header.size - where.table))
    if file.read_into(whole, where.table) < len(whole):
        return None
    table = bytes(whole[: 4 * checksum_count(header.size)])
    if crc32c(table) != header.table_crc:
        return None
    bad_unit = first_bad_unit(whole[where.data - where.table :], table, CHECKSUM_UNIT)
    return table if bad_unit is None else None


def _next_record(file: SegmentFile, segment: Segment, position: int, size: int) -> int:
    """Where the next undamaged record header is, from `position` on; `size` when there is none."""
    while position < size:
        chunk = bytearray(min(SEARCH_BYTES, size - position))
        file.read_into(chunk, position)
        at = chunk.find(RECORD_MAGIC)
        while at >= 0:
            candidate = position + at
            if candidate % RECORD_ALIGNMENT == 0 and _record_at(file, segment, candidate) is not None:
                return candidate
            at = chunk.find(RECORD_MAGIC, at + 1)
        position += len(chunk)  # A multiple of RECORD_ALIGNMENT, so no aligned magic lies across the border.
    return size


def _take(catalogue: Catalogue, segment: Segment, header: RecordHeader, table: bytes, found: _Found) -> None:
    """Put a record into the index to be; a copy that it replaces is dead."""
    key = encode_block_key(header.block)
    entry = Entry(segment.number, header.offset, header.size, header.table_crc, kept_checksums(table))
    old = found.entries.get(key) or _indexed(catalogue, key)
    if old is not None and old != entry:
        before = catalogue.segments.get(old.segment)
        if before is not None:
            before.live_count -= 1
            before.live_bytes -= old.size
            found.dead.append((old.segment, old.offset, old.layout.end))
    found.entries[key] = entry
    segment.live_count += 1
    segment.live_bytes += entry.size


def _indexed(catalogue: Catalogue, key: bytes) -> Entry | None:
    try:
        return catalogue.find(key)
    except BlockCorrupt:  # Its row is damaged; this record takes its place.
        return None


def _choose_active(catalogue: Catalogue) -> Segment | None:
    """The newest segment is gone on with; older ones that were still open are sealed."""
    unsealed = sorted(number for number, segment in catalogue.segments.items() if not segment.sealed)
    for number in unsealed[:-1]:
        catalogue.segments[number].sealed = True
    return catalogue.segments[unsealed[-1]] if unsealed else None


def _commit(catalogue: Catalogue, found: _Found, next_number: int) -> None:
    changes = Changes(next_number=next_number)
    changes.blocks.update(found.entries)
    changes.segments.update({number: segment.row for number, segment in catalogue.segments.items()})
    changes.punches = found.dead
    catalogue.index.commit(changes)
    for segment in catalogue.segments.values():
        segment.committed = segment.row
