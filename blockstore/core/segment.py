"""The format of segment files: append-only files in which a block server packs its blocks.  Format version 1.

All numbers are little-endian.  A segment is a header and then records, each begun where the one before it
ended, or at the next multiple of 4 KiB.

Segment header: twice, at offsets 0 and 64, so that no single fault makes a segment unreadable; records from 128.

    | offset | size | field | content |
    |---|---|---|---|
    | 0 | 8 | magic | "fsdSEGM" and a line feed |
    | 8 | 2 | version | 1; a reader that meets a newer one refuses |
    | 10 | 2 | header size | 64 |
    | 12 | 4 | checksum unit | 16384: bytes of a block under one checksum |
    | 16 | 8 | number | of the segment, never used twice in a store |
    | 24 | 16 | nonce | random, drawn when the segment was made |
    | 40 | 20 | zero | |
    | 60 | 4 | crc | CRC32C of bytes 0 to 59 |

Record header, at a multiple of 8:

    | offset | size | field | content |
    |---|---|---|---|
    | 0 | 4 | magic | "fBLK" |
    | 4 | 2 | version | 1 |
    | 6 | 2 | kind | 1: a block; 2: a block that was deleted |
    | 8 | 8 | slice id | first half of the block's name |
    | 16 | 8 | index | second half |
    | 24 | 8 | offset | of this header in its segment, so that a misdirected write is noticed |
    | 32 | 4 | size | bytes of the block, 1 to 4 MiB |
    | 36 | 4 | checksum count | one for each begun checksum unit |
    | 40 | 4 | table crc | CRC32C of the checksum table |
    | 44 | 4 | crc | CRC32C of bytes 0 to 43, begun with the segment's seed |

After the header: the checksum table (4 bytes for each unit), then the block's bytes, then zeros up to a multiple of 8.
The bytes of a block of 4 KiB or more begin at a multiple of 4 KiB, zeros before them, so that its pages can be punched
out whole; smaller blocks follow their table at once.  The record of a block of 64 KiB or more begins and ends at a
multiple of 4 KiB, so that it can be written past the page cache; what lies before it is not used.

The seed is the CRC32C of the segment header's number and nonce.  As the nonce is not known outside, bytes of a block
that look like a record (a stored copy of a segment, or malice) are not taken for one when a damaged segment is
searched for the next record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blockstore.protocol import BLOCK_SIZE_MAX, CHECKSUM_UNIT, BlockId
from wire.checksum import Buffer, crc32c
from wire.errors import WrongVersion

SEGMENT_MAGIC = b"fsdSEGM\n"
SEGMENT_VERSION = 1
SEGMENT_HEADER_SIZE = 64
SEGMENT_RECORDS_OFFSET = 2 * SEGMENT_HEADER_SIZE
NONCE_SIZE = 16
SEGMENT_HEADER = struct.Struct("<8sHHIQ16s20x")

RECORD_MAGIC = b"fBLK"
RECORD_VERSION = 1
KIND_BLOCK = 1
KIND_DELETED = 2
RECORD_HEADER = struct.Struct("<4sHHQQQIII")
RECORD_HEADER_SIZE = RECORD_HEADER.size + 4
RECORD_ALIGNMENT = 8
PAGE_SIZE = 4096
"""What a file system gives back when a hole is punched; blocks of at least this size begin at a multiple of it."""

LARGE_SIZE_MIN = 64 << 10
"""Blocks of at least this size have pages of their own: rounding costs at most an eighth, and 1/512 at 4 MiB."""
CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Which segment a file is."""

    number: int
    nonce: bytes

    @property
    def seed(self) -> int:
        """What the checksums of this segment's record headers begin with."""
        return crc32c(self.number.to_bytes(8, "little") + self.nonce)


def encode_segment_header(header: SegmentHeader) -> bytes:
    """Both copies: the first SEGMENT_RECORDS_OFFSET bytes of a segment file."""
    assert len(header.nonce) == NONCE_SIZE
    raw = SEGMENT_HEADER.pack(
        SEGMENT_MAGIC, SEGMENT_VERSION, SEGMENT_HEADER_SIZE, CHECKSUM_UNIT, header.number, header.nonce
    )
    return (raw + CRC.pack(crc32c(raw))) * 2


def decode_segment_header(raw: Buffer) -> SegmentHeader | None:
    """The header from the first SEGMENT_RECORDS_OFFSET bytes of a file; None when both copies are damaged.

    Raises:
        WrongVersion: an undamaged copy is of a format that this version does not read.
    """
    view = memoryview(raw)
    for start in (0, SEGMENT_HEADER_SIZE):
        copy = view[start : start + SEGMENT_HEADER_SIZE]
        if len(copy) < SEGMENT_HEADER_SIZE or CRC.pack(crc32c(copy[:-4])) != copy[-4:]:
            continue
        magic, version, size, unit, number, nonce = SEGMENT_HEADER.unpack_from(copy)
        if magic != SEGMENT_MAGIC:
            continue
        if version != SEGMENT_VERSION or size != SEGMENT_HEADER_SIZE or unit != CHECKSUM_UNIT:
            raise WrongVersion(
                f"segment {number} has format {version} with checksums per {unit} bytes; this version of fsd reads "
                f"format {SEGMENT_VERSION} with checksums per {CHECKSUM_UNIT} bytes"
            )
        return SegmentHeader(number, nonce)
    return None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a record are, as offsets in its segment."""

    table: int
    data: int
    end: int  # Of the record, a multiple of RECORD_ALIGNMENT.


def checksum_count(size: int) -> int:
    """Checksums of a block of `size` bytes."""
    return -(-size // CHECKSUM_UNIT)


def record_start(end: int, size: int) -> int:
    """Where the record of a block of `size` bytes begins when the one before it ends at `end`."""
    return end if size < LARGE_SIZE_MIN else next_page(end)


def layout(offset: int, size: int) -> Layout:
    """The parts of the record at `offset` with a block of `size` bytes."""
    table = offset + RECORD_HEADER_SIZE
    data = table + 4 * checksum_count(size)
    if size >= PAGE_SIZE:
        data = next_page(data)
    end = data + size
    alignment = RECORD_ALIGNMENT if size < LARGE_SIZE_MIN else PAGE_SIZE
    return Layout(table, data, -(-end // alignment) * alignment)


def next_page(offset: int) -> int:
    """The first multiple of PAGE_SIZE that is not below `offset`."""
    return -(-offset // PAGE_SIZE) * PAGE_SIZE


def record_size_max(size: int) -> int:
    """Bytes that the record of a block of `size` bytes takes at most, wherever it begins."""
    return RECORD_HEADER_SIZE + 4 * checksum_count(size) + size + 3 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of itself."""

    kind: int
    block: BlockId
    offset: int
    size: int
    table_crc: int


def encode_record_header(header: RecordHeader, seed: int) -> bytes:
    """The RECORD_HEADER_SIZE bytes at the record's beginning."""
    raw = RECORD_HEADER.pack(
        RECORD_MAGIC,
        RECORD_VERSION,
        header.kind,
        header.block.slice_id,
        header.block.index,
        header.offset,
        header.size,
        checksum_count(header.size),
        header.table_crc,
    )
    return raw + CRC.pack(crc32c(raw, seed))


def decode_record_header(raw: Buffer, *, offset: int, seed: int) -> RecordHeader | None:
    """The header read at `offset` of the segment with that seed; None when there is none or it is damaged.

    Raises:
        WrongVersion: it is undamaged, and of a format that this version does not read.
    """
    view = memoryview(raw)[:RECORD_HEADER_SIZE]
    if len(view) < RECORD_HEADER_SIZE or view[:4] != RECORD_MAGIC:
        return None
    if CRC.pack(crc32c(view[:-4], seed)) != view[-4:]:
        return None
    _, version, kind, slice_id, index, own_offset, size, count, table_crc = RECORD_HEADER.unpack_from(view)
    if own_offset != offset:
        return None
    if version != RECORD_VERSION:
        raise WrongVersion(f"a record has format {version}; this version of fsd reads format {RECORD_VERSION}")
    if kind not in (KIND_BLOCK, KIND_DELETED) or not 1 <= size <= BLOCK_SIZE_MAX or count != checksum_count(size):
        return None
    return RecordHeader(kind, BlockId(slice_id, index), own_offset, size, table_crc)


def whole_pages(start: int, end: int) -> tuple[int, int] | None:
    """The part of [start, end) that is whole pages, which can be punched out; None when there is no page."""
    first = next_page(start)
    last = end // PAGE_SIZE * PAGE_SIZE
    return (first, last) if first < last else None


def segment_name(number: int) -> str:
    """The name of the file of a segment."""
    return f"{number:016x}.seg"


def segment_number(name: str) -> int | None:
    """The number in a file name; None when it is not that of a segment."""
    stem, dot, kind = name.partition(".")
    if not dot or kind != "seg" or len(stem) != 16 or not set(stem) <= set("0123456789abcdef"):
        return None
    return int(stem, 16)
