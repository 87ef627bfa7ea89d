"""The formats of segments and index: frozen bytes, tables that tell the truth, and readers that trust nothing."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.core import index_rows, segment
from blockstore.core.index_rows import DamagedRow, Entry, SegmentRow
from blockstore.core.segment import KIND_BLOCK, KIND_DELETED, RecordHeader, SegmentHeader
from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from wire.checksum import crc32c
from wire.errors import WrongVersion

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "blocks.txt"
SEGMENT = SegmentHeader(7, bytes(range(16)))
RECORD = RecordHeader(KIND_BLOCK, BlockId(0x1122334455667788, 9), 4096, 70_000, 0xDEADBEEF)
KEY = index_rows.encode_block_key(RECORD.block)
ENTRY = Entry(7, 4096, 20_000, 0xDEADBEEF, b"\x01\x02\x03\x04\x05\x06\x07\x08")
SEGMENT_KEY = index_rows.SEGMENT_KEY.pack(7)
ROW = SegmentRow(1 << 20, 12, 345_678, 0xCAFEBABE, True)

sizes = st.integers(1, BLOCK_SIZE_MAX)
offsets = st.integers(16, 1 << 25).map(lambda n: 8 * n)


def examples() -> dict[str, bytes]:
    return {
        "segment-header": segment.encode_segment_header(SEGMENT),
        "record-header": segment.encode_record_header(RECORD, SEGMENT.seed),
        "block-key": KEY,
        "block-row": index_rows.encode_entry(KEY, ENTRY),
        "segment-row": index_rows.encode_segment_row(SEGMENT_KEY, ROW),
        "next-row": index_rows.seal(index_rows.META_NEXT, index_rows.NEXT_VALUE.pack(8)),
        "format-row": index_rows.seal(index_rows.META_FORMAT, index_rows.VERSION_VALUE.pack(1)),
        "punch-row": index_rows.seal(index_rows.PUNCH_KEY.pack(7, 4096), index_rows.PUNCH_VALUE.pack(8192)),
    }


def test_the_bytes_are_those_of_the_frozen_file() -> None:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert {name: bytes.fromhex(raw) for name, raw in lines} == examples()


def test_what_is_encoded_is_decoded() -> None:
    assert segment.decode_segment_header(segment.encode_segment_header(SEGMENT)) == SEGMENT
    raw = segment.encode_record_header(RECORD, SEGMENT.seed)
    assert segment.decode_record_header(raw, offset=4096, seed=SEGMENT.seed) == RECORD
    assert index_rows.decode_entry(KEY, index_rows.encode_entry(KEY, ENTRY)) == ENTRY
    assert index_rows.decode_segment_row(SEGMENT_KEY, index_rows.encode_segment_row(SEGMENT_KEY, ROW)) == ROW


@given(st.integers(0, 63), st.integers(0, 7))
def test_any_flipped_bit_in_one_segment_header_leaves_the_other(byte: int, bit: int) -> None:
    for start in (0, 64):
        raw = bytearray(segment.encode_segment_header(SEGMENT))
        raw[start + byte] ^= 1 << bit
        assert segment.decode_segment_header(raw) == SEGMENT
    raw[byte] ^= 1 << bit
    assert segment.decode_segment_header(raw) is None


@given(st.integers(0, segment.RECORD_HEADER_SIZE - 1), st.integers(0, 7))
def test_any_flipped_bit_in_a_record_header_is_noticed(byte: int, bit: int) -> None:
    raw = bytearray(segment.encode_record_header(RECORD, SEGMENT.seed))
    raw[byte] ^= 1 << bit
    assert segment.decode_record_header(raw, offset=4096, seed=SEGMENT.seed) is None


@given(st.binary(max_size=200))
def test_garbage_is_no_header_and_no_row(raw: bytes) -> None:
    assert segment.decode_segment_header(raw) is None
    assert segment.decode_record_header(raw, offset=4096, seed=SEGMENT.seed) is None
    with pytest.raises(DamagedRow):
        index_rows.decode_entry(KEY, raw)


def test_a_record_elsewhere_or_of_another_segment_is_not_taken() -> None:
    raw = segment.encode_record_header(RECORD, SEGMENT.seed)
    assert segment.decode_record_header(raw, offset=8192, seed=SEGMENT.seed) is None
    assert segment.decode_record_header(raw, offset=4096, seed=SegmentHeader(8, SEGMENT.nonce).seed) is None


@given(st.integers(0, 200), st.integers(0, 7))
def test_any_flipped_bit_in_a_row_or_its_key_is_noticed(byte: int, bit: int) -> None:
    raw = bytearray(index_rows.encode_entry(KEY, ENTRY))
    raw[byte % len(raw)] ^= 1 << bit
    with pytest.raises(DamagedRow):
        index_rows.decode_entry(KEY, raw)
    key = bytearray(KEY)
    key[byte % len(key)] ^= 1 << bit
    with pytest.raises(DamagedRow):
        index_rows.decode_entry(key, index_rows.encode_entry(KEY, ENTRY))


def test_newer_formats_are_refused_with_a_sentence() -> None:
    raw = bytearray(segment.encode_segment_header(SEGMENT))
    raw[8] = 2
    raw[60:64] = crc32c(raw[:60]).to_bytes(4, "little")
    with pytest.raises(WrongVersion, match="segment 7 has format 2"):
        segment.decode_segment_header(raw)
    record = bytearray(segment.encode_record_header(RECORD, SEGMENT.seed))
    record[4] = 2
    record[44:] = crc32c(record[:44], SEGMENT.seed).to_bytes(4, "little")
    with pytest.raises(WrongVersion, match="a record has format 2"):
        segment.decode_record_header(record, offset=4096, seed=SEGMENT.seed)


@given(offsets, sizes)
def test_the_parts_of_a_record_follow_each_other_and_large_ones_own_their_pages(end: int, size: int) -> None:
    start = segment.record_start(end, size)
    where = segment.layout(start, size)
    assert end <= start < end + segment.PAGE_SIZE
    assert start + segment.RECORD_HEADER_SIZE == where.table
    assert where.table + 4 * segment.checksum_count(size) <= where.data
    assert where.data + size <= where.end <= where.data + size + segment.PAGE_SIZE
    assert where.end % segment.RECORD_ALIGNMENT == 0
    assert where.end - end <= segment.record_size_max(size)
    assert size < segment.PAGE_SIZE or where.data % segment.PAGE_SIZE == 0
    assert size < segment.LARGE_SIZE_MIN or start % segment.PAGE_SIZE == where.end % segment.PAGE_SIZE == 0


@given(st.integers(0, (1 << 64) - 1))
def test_a_segments_name_is_its_number(number: int) -> None:
    assert segment.segment_number(segment.segment_name(number)) == number


@pytest.mark.parametrize("name", ["", "1.seg", "0000000000000001.SEG", "000000000000000G.seg", "0000000000000001.seg~"])
def test_other_names_are_no_segments(name: str) -> None:
    assert segment.segment_number(name) is None


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text: rows of cells, without the line of dashes."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.strip().startswith("|"):
            found.append([])
        elif not all(re.fullmatch("-+", cell) for cell in cells):
            found[-1].append(cells)
    return [table for table in found if table]


@pytest.mark.parametrize("module", [segment, index_rows])
def test_the_reference_has_the_tables_of_the_modules(module: ModuleType) -> None:
    reference = tables((ROOT / "docs/reference/block-format.md").read_text())
    for table in tables(module.__doc__ or ""):
        assert table in reference


def test_the_tables_of_headers_add_up_to_their_structs() -> None:
    header, record = tables(segment.__doc__ or "")
    for table, size in ((header, segment.SEGMENT_HEADER_SIZE), (record, segment.RECORD_HEADER_SIZE)):
        at = 0
        for offset, part, *_ in table[1:]:
            assert int(offset) == at
            at += int(part)
        assert at == size


def test_the_tables_of_rows_add_up_to_their_structs() -> None:
    structs = {
        "slice id": (index_rows.BLOCK_KEY, index_rows.BLOCK_VALUE),
        "number": (index_rows.SEGMENT_KEY, index_rows.SEGMENT_VALUE),
        "segment": (index_rows.PUNCH_KEY, index_rows.PUNCH_VALUE),
    }
    for table in tables(index_rows.__doc__ or ""):
        key, value = structs[table[1][2]]
        for part, expected in (("key", key.size), ("value", value.size + 4)):
            assert sum(int(row[1]) for row in table[1:] if row[0] == part and row[1].isdigit()) == expected


def test_deleted_marks_keep_the_size_so_that_scans_pass_over_them() -> None:
    gone = RecordHeader(KIND_DELETED, RECORD.block, RECORD.offset, RECORD.size, RECORD.table_crc)
    raw = segment.encode_record_header(gone, SEGMENT.seed)
    assert segment.decode_record_header(raw, offset=4096, seed=SEGMENT.seed) == gone
