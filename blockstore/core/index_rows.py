"""The format of the index: where each block lies.  Format version 1.

The index is an LMDB environment in the directory `index` with four tables.  Keys are big-endian, so that they sort by
number; values are little-endian and end with the CRC32C of key and value, as LMDB itself has no checksums.

Table `blocks`:

    | part | size | field | content |
    |---|---|---|---|
    | key | 8 | slice id | |
    | key | 8 | index | |
    | value | 8 | segment | number of the segment |
    | value | 8 | offset | of the record in the segment |
    | value | 4 | size | bytes of the block |
    | value | 4 | table crc | CRC32C of the checksum table |
    | value | 0 to 64 | checksums | the checksum table, if it has at most 16 entries: read with one seek |
    | value | 4 | crc | |

Table `segments`: the checkpoint.  Of each segment everything before `indexed to` is as the other tables say, and
what follows is found by scanning.

    | part | size | field | content |
    |---|---|---|---|
    | key | 8 | number | |
    | value | 8 | indexed to | offset in the segment |
    | value | 8 | live count | blocks in it |
    | value | 8 | live bytes | sum of their sizes |
    | value | 4 | seed | of its record headers |
    | value | 4 | sealed | 1: nothing will be appended to it |
    | value | 4 | crc | |

Table `punches`: ranges whose blocks are deleted and whose space is not yet known to be given back.

    | part | size | field | content |
    |---|---|---|---|
    | key | 8 | segment | |
    | key | 8 | start | of the range |
    | value | 8 | end | |
    | value | 4 | crc | |

Table `meta`: `format` (value: version, 4 bytes) and `next` (value: 8 bytes, a number above that of every segment ever
made before the checkpoint; a file with a lower number that is not in `segments` is a removed segment), each with crc.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blockstore.core.segment import Layout, checksum_count, layout
from blockstore.protocol import BlockId
from wire.checksum import Buffer, crc32c

INDEX_VERSION = 1
KEPT_CHECKSUMS_MAX = 16
"""Checksum tables of up to this many entries (blocks of 256 KiB) are kept in the index."""

BLOCK_KEY = struct.Struct(">QQ")
BLOCK_VALUE = struct.Struct("<QQII")
SEGMENT_KEY = struct.Struct(">Q")
SEGMENT_VALUE = struct.Struct("<QQQII")
PUNCH_KEY = struct.Struct(">QQ")
PUNCH_VALUE = struct.Struct("<Q")
META_FORMAT = b"format"
META_NEXT = b"next"
VERSION_VALUE = struct.Struct("<I")
NEXT_VALUE = struct.Struct("<Q")
CRC = struct.Struct("<I")


class DamagedRow(Exception):
    """A row of the index does not match its checksum."""


def seal(key: bytes, value: bytes) -> bytes:
    """The value with the checksum of key and value behind it."""
    return value + CRC.pack(crc32c(value, crc32c(key)))


def unseal(key: Buffer, raw: Buffer) -> memoryview:
    """The value without its checksum.

    Raises:
        DamagedRow: key and value do not match it.
    """
    view = memoryview(raw)
    if len(view) < 4 or CRC.pack(crc32c(view[:-4], crc32c(key))) != view[-4:]:
        raise DamagedRow(f"row {bytes(key).hex()}")
    return view[:-4]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a block lies."""

    segment: int
    offset: int
    size: int
    table_crc: int
    checksums: bytes  # The checksum table; b"" when it is too large to be kept here.

    @property
    def layout(self) -> Layout:
        """Its record's parts."""
        return layout(self.offset, self.size)


def kept_checksums(checksums: bytes) -> bytes:
    """What an entry keeps of a checksum table."""
    return checksums if len(checksums) <= 4 * KEPT_CHECKSUMS_MAX else b""


def encode_block_key(block: BlockId) -> bytes:
    """The key of a block."""
    return BLOCK_KEY.pack(block.slice_id, block.index)


def decode_block_key(raw: Buffer) -> BlockId:
    """The block of a key."""
    return BlockId(*BLOCK_KEY.unpack(raw))


def encode_entry(key: bytes, entry: Entry) -> bytes:
    """The row of a block."""
    return seal(key, BLOCK_VALUE.pack(entry.segment, entry.offset, entry.size, entry.table_crc) + entry.checksums)


def decode_entry(key: Buffer, raw: Buffer) -> Entry:
    """The entry of a row.

    Raises:
        DamagedRow: it does not match its checksum.
    """
    value = unseal(key, raw)
    if len(value) < BLOCK_VALUE.size:
        raise DamagedRow(f"row {bytes(key).hex()} is short")
    segment, offset, size, table_crc = BLOCK_VALUE.unpack_from(value)
    checksums = bytes(value[BLOCK_VALUE.size :])
    if len(checksums) not in (0, 4 * checksum_count(size)):
        raise DamagedRow(f"row {bytes(key).hex()} has {len(checksums)} bytes of checksums")
    return Entry(segment, offset, size, table_crc, checksums)


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """The checkpoint of one segment."""

    indexed_to: int
    live_count: int
    live_bytes: int
    seed: int
    sealed: bool


def encode_segment_row(key: bytes, row: SegmentRow) -> bytes:
    """The row of a segment."""
    return seal(
        key, SEGMENT_VALUE.pack(row.indexed_to, row.live_count, row.live_bytes, row.seed, 1 if row.sealed else 0)
    )


def decode_segment_row(key: Buffer, raw: Buffer) -> SegmentRow:
    """The checkpoint of a row.

    Raises:
        DamagedRow: it does not match its checksum.
    """
    value = unseal(key, raw)
    if len(value) != SEGMENT_VALUE.size:
        raise DamagedRow(f"row {bytes(key).hex()} has {len(value)} bytes")
    indexed_to, live_count, live_bytes, seed, sealed = SEGMENT_VALUE.unpack(value)
    return SegmentRow(indexed_to, live_count, live_bytes, seed, sealed != 0)
