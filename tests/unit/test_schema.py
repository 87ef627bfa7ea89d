"""Keys sort as their numbers do, stay within the engine's limits, and are the bytes they always were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.core.cluster_map import Server, ServerState
from metadata import protocol
from metadata.core import fsck, schema
from metadata.core.format import format_store, is_formatted
from metadata.core.schema import (
    AnswerRecord,
    BadBlockRecord,
    ClusterRecord,
    Extent,
    Inode,
    MigrationRecord,
    ServerRecord,
    SessionRecord,
)
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import KEY_SIZE_MAX
from wire.errors import WrongVersion

U64 = st.integers(0, (1 << 64) - 1)
OFFSETS = st.integers(0, schema.FILE_SIZE_MAX)
NAMES = st.binary(min_size=1, max_size=schema.NAME_SIZE_MAX)

GOLDEN = {
    "inode_key": (schema.inode_key(258), "69000000000000010241"),
    "link_key": (schema.link_key(258, 1), "690000000000000102420000000000000001"),
    "dirent_key": (schema.dirent_key(1, b"name"), "690000000000000001442be049c21549b76d6e616d65"),
    "extent_key": (schema.extent_key(258, 4096), "690000000000000102450000000000001000"),
    "inline_key": (schema.inline_key(258), "69000000000000010249"),
    "symlink_key": (schema.symlink_key(258), "6900000000000001024c"),
    "xattr_key": (schema.xattr_key(258, b"user.a"), "6900000000000001024e757365722e61"),
    "xattr_part_key": (schema.xattr_part_key(258, b"user.a", 1), "69000000000000010256757365722e610001"),
    "truncation_key": (schema.truncation_key(258), "69000000000000010254"),
    "usage_key": (schema.usage_key(258), "69000000000000010252"),
    "usage_key_1": (schema.usage_key_1(258), "69000000000000010255"),
    "quota_key": (schema.quota_key(258), "750000000000000102"),
    "slice_key": (schema.slice_key(9), "730000000000000009"),
    "queued_inode_key": (schema.queued_inode_key(9), "71490000000000000009"),
    "queued_slice_key": (schema.queued_slice_key(9), "71530000000000000009"),
    "queued_truncation_key": (schema.queued_truncation_key(9), "71540000000000000009"),
    "held_key": (schema.held_key(3, 9), "6800000000000000030000000000000009"),
    "reservation_key": (schema.reservation_key(3, 9), "7200000000000000030000000000000009"),
    "session_key": (schema.session_key(3), "6e0000000000000003"),
    "answer_key": (schema.answer_key(3, 1023), "61000000000000000303ff"),
    "server_key": (schema.server_key(4), "6d5300000004"),
    "bad_block_key": (schema.bad_block_key(9, 1, 4), "6200000000000000090000000100000004"),
    "dirent": (schema.encode_dirent(258, 0o100644), "000000000000010208"),
    "extent": (schema.encode_extent(Extent(0, 4096, 9, 512)), "00001000000000000000000900000200"),
    "pair": (schema.encode_pair(2, 3), "00000000000000020000000000000003"),
    "usage": (schema.encode_usage(1, 2, 3, 1), "000000000000000100000000000000020000000000000003" + "01"),
    "time": (schema.encode_time(-1), "ffffffffffffffff"),
    "inode": (
        schema.encode_record(Inode(0o100644, 1, 1000, 1000, 5, 1, 2, 3, 4, 0, 1, 5, 6, 7, 1, 2)),
        "dc0010cd81a401cd03e8cd03e80501020304000105060701" + "02",
    ),
    "session": (
        schema.encode_record(SessionRecord("c", "b", b"/m", "o", 1, 2)),
        "97a163a162c4022f6da16f0102c2",
    ),
    "answer": (schema.encode_record(AnswerRecord(5, 0, b"x")), "930500c40178"),
    "cluster": (schema.encode_record(ClusterRecord("id", 1, 64, 2)), "94a26964014002"),
    "server": (
        schema.encode_record(ServerRecord("u", Server(1, "h", 2, "r", 3, ServerState.UP), 7)),
        "93a175960" + "1a16802a172030107",
    ),
    "migration": (schema.encode_record(MigrationRecord(1, 2, 300)), "930102cd012c"),
    "bad_block": (schema.encode_record(BadBlockRecord("corrupt", 7, 0)), "93a7636f72727570740700"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_a_format_never_change(name: str) -> None:
    got, wanted = GOLDEN[name]
    assert got.hex() == wanted


@pytest.mark.parametrize(
    "key",
    [
        schema.inode_key,
        schema.slice_key,
        schema.queued_slice_key,
        lambda number: schema.extent_key(7, number),
        lambda number: schema.held_key(7, number),
        lambda number: schema.link_key(7, number),
    ],
)
def test_keys_sort_as_their_numbers(key: Callable[[int], bytes]) -> None:
    @given(U64, U64)
    def run(one: int, other: int) -> None:
        assert (key(one) < key(other)) == (one < other)

    run()


@given(st.integers(0, (1 << 64) - 2), NAMES, st.binary(min_size=1, max_size=schema.XATTR_NAME_SIZE_MAX), OFFSETS)
def test_everything_of_an_inode_lies_in_its_range_and_within_the_engines_limit(
    ino: int, name: bytes, xattr: bytes, offset: int
) -> None:
    start, end = schema.inode_range(ino)
    for key in (
        schema.inode_key(ino),
        schema.link_key(ino, schema.OFFSET_MAX),
        schema.dirent_key(ino, name),
        schema.extent_key(ino, offset),
        schema.inline_key(ino),
        schema.symlink_key(ino),
        schema.xattr_key(ino, xattr),
        schema.xattr_part_key(ino, xattr, 1),
        schema.truncation_key(ino),
        schema.usage_key(ino),
    ):
        assert start <= key < end
        assert len(key) <= KEY_SIZE_MAX
        assert not schema.inode_range(ino + 1)[0] <= key < schema.inode_range(ino + 1)[1]


@given(NAMES)
def test_cookies_are_for_entries_only(name: bytes) -> None:
    assert protocol.FIRST_COOKIE <= schema.name_hash(name) < 1 << 63


def test_schema_and_protocol_agree_on_the_first_cookie() -> None:
    assert schema.COOKIE_FIRST == protocol.FIRST_COOKIE


@given(OFFSETS, st.integers(1, schema.SLICE_SIZE_MAX), U64, st.integers(0, schema.SLICE_SIZE_MAX - 1))
def test_extents_are_read_as_they_were_written(offset: int, length: int, slice_id: int, slice_offset: int) -> None:
    extent = Extent(offset, length, slice_id, slice_offset)
    key = schema.extent_key(7, offset + length)
    assert schema.decode_extent(key, schema.encode_extent(extent)) == extent
    assert schema.extent_range(7, from_offset=offset)[0] <= key
    assert schema.extent_range(7, from_offset=offset + length)[0] > key


def test_a_store_of_another_schema_is_refused_with_a_sentence() -> None:
    engine = MemoryEngine()
    with engine.write() as txn:
        assert not is_formatted(txn)
        format_store(txn, now_ns=1)
        assert is_formatted(txn)
        txn.put(schema.VERSION_KEY, schema.encode_u32(schema.SCHEMA_VERSION + 1))
        with pytest.raises(WrongVersion, match=r"schema 3, this program knows schemas up to 2"):
            is_formatted(txn)


@pytest.mark.parametrize("documented", [schema, fsck])
def test_the_reference_has_the_tables_of_the_code(documented: ModuleType) -> None:
    reference = (Path(__file__).parents[2] / "docs/reference/key-space.md").read_text()
    rows = [line for line in (documented.__doc__ or "").splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert "\n".join(rows) in reference
