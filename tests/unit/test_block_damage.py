"""Whatever happens to the files of a block store, a reader gets the right bytes or an error, never others."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from blockstore.index import Changes, Index, IndexDamaged
from blockstore.protocol import BlockId
from blockstore.writer import Delete, Group, Put, Writer
from tests.support.block_directory import Directory, put_of
from tests.support.power_disk import PowerDisk
from wire.checksum import crc32c
from wire.errors import BlockCorrupt, NoSpace, NoSuchBlock, ServerOverloaded, StoreError, WrongVersion

Blocks = dict[BlockId, bytes]
DELETED = BlockId(2, 3)


def fill(path: Path, dice: random.Random) -> Blocks:
    """A store with blocks before and after its checkpoint, and a deleted one; what is in it."""
    blocks = {BlockId(n, i): dice.randbytes(dice.choice([50, 4096, 20_000])) for n in range(4) for i in range(8)}
    store = Directory(path)
    store.put({block: data for block, data in blocks.items() if block.slice_id < 3}, checkpoint=True)
    store.delete([DELETED])
    store.put({block: data for block, data in blocks.items() if block.slice_id == 3})
    store.close()
    del blocks[DELETED]
    return blocks


def flip_a_bit(path: Path, dice: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["index/data.mdb", "segments/*.seg"])
def test_flipped_bits_never_give_wrong_bytes_and_cost_little(kind: str, tmp_path: Path) -> None:
    dice = random.Random(7)
    blocks = fill(tmp_path / "good", dice)
    lost = 0
    for _ in range(40):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        flip_a_bit(next((tmp_path / "bad").glob(kind)), dice)
        store = Directory(tmp_path / "bad")
        assert store.read(DELETED) is None
        for block, data in blocks.items():
            found = store.read(block)
            assert found in (None, data)
            lost += found is None
        new = put_of(BlockId(99, 0), b"still works")
        store.run([new], checkpoint=True)
        assert new.outcome is None
        store.close()
        shutil.rmtree(tmp_path / "bad")
    assert lost < 40 * len(blocks) / 10, "one flipped bit must not cost many blocks"


def test_each_kind_of_damage_to_a_record_is_found_by_verify(tmp_path: Path) -> None:
    block, data = BlockId(1, 1), random.Random(1).randbytes(50_000)
    store = Directory(tmp_path)
    store.put({block: data}, checkpoint=True)
    assert store.reader.verify(block) == len(data)
    entry = store.catalogue.locate(block)[1]
    file = store.catalogue.file(entry.segment)
    for offset in (entry.offset, entry.layout.table, entry.layout.data, entry.layout.data + len(data) - 1):
        byte = bytearray(1)
        file.read_into(byte, offset)
        file.write([bytes([byte[0] ^ 1])], offset)
        with pytest.raises(BlockCorrupt):
            store.reader.verify(block)
        assert len(store.catalogue.corrupt) == 1
        file.write([byte], offset)
    assert store.reader.verify(block) == len(data)
    assert not store.catalogue.corrupt, "what is whole again no longer counts"
    store.close()


def test_a_put_of_a_damaged_block_heals_it(tmp_path: Path) -> None:
    block, data = BlockId(1, 1), random.Random(1).randbytes(50_000)
    store = Directory(tmp_path)
    store.put({block: data}, checkpoint=True)
    entry = store.catalogue.locate(block)[1]
    store.catalogue.file(entry.segment).write([b"damage"], entry.layout.data + 100)
    assert store.read(block) is None
    store.put({block: data})
    assert store.read(block) == data
    assert sum(segment.live_count for segment in store.catalogue.segments.values()) == 1
    store.close()
    store = Directory(tmp_path)
    assert store.read(block) == data
    assert sum(segment.live_count for segment in store.catalogue.segments.values()) == 1
    store.close()


def test_a_lost_index_is_made_again_without_the_deleted_blocks(tmp_path: Path) -> None:
    blocks = fill(tmp_path, random.Random(3))
    for name in ("data.mdb", "lock.mdb"):
        (tmp_path / "index" / name).unlink()
    store = Directory(tmp_path)
    assert {block: store.read(block) for block in blocks} == blocks
    with pytest.raises(NoSuchBlock):
        store.reader.read(DELETED, offset=0, size=1)
    store.close()


@pytest.mark.parametrize("size", [0, 100, 5000, 20_000])
def test_an_index_that_was_cut_short_is_made_again(tmp_path: Path, size: int) -> None:
    blocks = fill(tmp_path, random.Random(3))
    with open(tmp_path / "index" / "data.mdb", "r+b") as file:
        file.truncate(size)
    store = Directory(tmp_path)
    assert {block: store.read(block) for block in blocks} == blocks
    assert store.read(DELETED) is None
    store.close()


def test_an_index_that_was_found_damaged_while_running_is_made_again_at_the_next_start(tmp_path: Path) -> None:
    blocks = fill(tmp_path, random.Random(3))
    store = Directory(tmp_path)
    error = store.catalogue.index._damaged(lmdb.CorruptedError("mdb_get: MDB_CORRUPTED"))
    assert isinstance(error, IndexDamaged)
    store.close()
    store = Directory(tmp_path)
    assert (tmp_path / "index.damaged").exists()
    assert {block: store.read(block) for block in blocks} == blocks
    assert store.read(DELETED) is None
    store.close()


def test_a_lost_segment_is_told_and_its_blocks_can_be_written_again(tmp_path: Path) -> None:
    blocks = fill(tmp_path, random.Random(3))
    Directory(tmp_path).close()  # So that the index has them all.
    next((tmp_path / "segments").iterdir()).unlink()
    store = Directory(tmp_path)
    block, data = next(iter(blocks.items()))
    with pytest.raises(BlockCorrupt):
        store.reader.read(block, offset=0, size=1)
    store.put({block: data})
    assert store.read(block) == data
    store.close()


def test_a_segment_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, random.Random(3))
    index = Index(tmp_path / "index")
    index.close()
    (tmp_path / "index" / "data.mdb").unlink()
    segment = next((tmp_path / "segments").iterdir())
    raw = bytearray(segment.read_bytes())

    for start in (0, 64):
        raw[start + 8] = 2
        raw[start + 60 : start + 64] = crc32c(raw[start : start + 60]).to_bytes(4, "little")
    segment.write_bytes(raw)
    with pytest.raises(WrongVersion, match="has format 2"):
        Directory(tmp_path)


# --- deleting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["file_nowait", "file"])
def test_a_read_overtaken_by_a_delete_gives_no_hole(tmp_path: Path, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delete comes between finding the block and reading its bytes, which are punched out by then."""
    block, data = BlockId(1, 1), random.Random(1).randbytes(50_000)
    store = Directory(tmp_path)
    store.put({block: data}, checkpoint=True)
    open_file = getattr(store.catalogue, hook)

    def overtaken(number: int) -> object:
        monkeypatch.setattr(store.catalogue, hook, open_file)
        assert store.delete([block]).deleted_count == 1
        return open_file(number)

    monkeypatch.setattr(store.catalogue, hook, overtaken)
    if hook == "file_nowait":
        assert store.reader.read_nowait(block, offset=0, size=1) is None
    with pytest.raises(NoSuchBlock):
        store.reader.read(block, offset=0, size=1)
    assert not store.catalogue.corrupt
    store.close()


def test_a_verification_overtaken_by_a_delete_finds_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = BlockId(1, 1)
    store = Directory(tmp_path)
    store.put({block: b"data" * 10_000}, checkpoint=True)
    open_file = store.catalogue.file

    def overtaken(number: int) -> object:
        monkeypatch.setattr(store.catalogue, "file", open_file)
        store.delete([block])
        return open_file(number)

    monkeypatch.setattr(store.catalogue, "file", overtaken)
    with pytest.raises(NoSuchBlock):
        store.reader.verify(block)
    assert not store.catalogue.corrupt
    store.close()


@pytest.mark.parametrize("size", [100, 1000, 5000, 20_000])
@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_blocks_deleted_one_by_one_give_back_the_pages_they_shared(tmp_path: Path, size: int, order: str) -> None:
    dice = random.Random(5)
    blocks = {BlockId(1, n): dice.randbytes(size) for n in range(60)}
    disk = PowerDisk()
    store = Directory(tmp_path, files=disk)
    store.put(blocks)
    dying = {"ascending": sorted(blocks), "descending": sorted(blocks, reverse=True), "random": [*blocks]}[order]
    if order == "random":
        dice.shuffle(dying)
    kept = BlockId(1, 30)
    for block in dying:
        if block != kept:
            store.delete([block])
    content, entry = disk.names[1], store.catalogue.locate(kept)[1]
    touched = range(entry.offset // 4096, -(-entry.layout.end // 4096))
    for page in range(1, len(content.cache) // 4096):
        if page not in touched:
            assert not any(content.cache[4096 * page : 4096 * (page + 1)]), f"page {page} was not given back"
    assert store.read(kept) == blocks[kept]
    store.close()


# --- two stages at once ----------------------------------------------------------------------------------------------


class CommitsMeanwhile(PowerDisk):
    """While a segment is made, the other thread commits."""

    def __init__(self) -> None:
        super().__init__()
        self.other_thread: Callable[[], None] = lambda: None

    def sync_directory(self) -> None:
        self.other_thread()
        super().sync_directory()


def test_a_segment_made_during_a_commit_is_not_taken_for_a_removed_one(tmp_path: Path) -> None:
    disk = CommitsMeanwhile()
    store = Directory(tmp_path, files=disk, segment_size_max=60_000)
    first, second = {BlockId(1, 0): b"1" * 40_000}, {BlockId(2, 0): b"2" * 40_000}
    store.put(first)
    disk.other_thread = lambda: store.writer.commit(Group(), checkpoint=True)
    store.put(second)
    assert len(disk.numbers()) == 2
    store.close()
    disk.other_thread = lambda: None
    store = Directory(tmp_path, files=disk)
    expected = first | second
    assert {block: store.read(block) for block in expected} == expected
    store.close()


class FailsToNameSegments(PowerDisk):
    """The directory cannot be synced, and what was made cannot be removed again."""

    failures = 2

    def sync_directory(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        super().sync_directory()

    def remove(self, number: int) -> None:
        if self.failures:
            raise OSError(errno.EIO, "Input/output error")
        super().remove(number)


def test_a_segment_that_could_not_be_made_does_not_stop_the_next(tmp_path: Path) -> None:
    disk = FailsToNameSegments()
    store = Directory(tmp_path, files=disk)
    for _ in range(2):
        put = put_of(BlockId(1, 0), b"data")
        store.run([put])
        assert type(put.outcome) is StoreError
    store.put({BlockId(1, 0): b"data"})
    store.close()
    store = Directory(tmp_path, files=disk)
    assert store.read(BlockId(1, 0)) == b"data"
    store.close()


# --- a disk that fails -----------------------------------------------------------------------------------------------


def test_a_failed_sync_refuses_its_puts_and_the_store_goes_on(tmp_path: Path) -> None:
    disk = PowerDisk()
    store = Directory(tmp_path, files=disk)
    store.put({BlockId(1, 0): b"before"})
    disk.sync_errors = 1
    lost, behind = put_of(BlockId(2, 0), b"lost"), put_of(BlockId(3, 0), b"behind")
    first, second = Group(), Group()
    store.writer.write([lost], first)
    store.writer.write([behind], second)  # In the page cache of the same file when the sync fails.
    store.writer.commit(first)
    store.writer.commit(second)
    for put in (lost, behind):
        assert type(put.outcome) is StoreError
        with pytest.raises(NoSuchBlock):
            store.reader.read(put.block, offset=0, size=1)
    store.put({BlockId(4, 0): b"after", BlockId(2, 0): b"lost"})
    store.close()
    disk.lose_power(random.Random(1))
    store = Directory(tmp_path, files=disk)
    expected = {BlockId(1, 0): b"before", BlockId(4, 0): b"after", BlockId(2, 0): b"lost"}
    assert {block: store.read(block) for block in expected} == expected
    store.close()


def test_a_full_disk_refuses_puts_and_goes_on_with_reads_and_deletes(tmp_path: Path) -> None:
    disk = PowerDisk(capacity=300_000)
    store = Directory(tmp_path, files=disk, segment_size_max=100_000)
    stored: Blocks = {}
    refused = 0
    for n in range(40):
        put = put_of(BlockId(n, 0), bytes([n]) * 20_000)
        store.run([put])
        if put.outcome is None:
            stored[put.block] = bytes(put.data)
        else:
            assert isinstance(put.outcome, NoSpace)
            refused += 1
    assert refused
    assert len(stored) > 5
    assert disk.used <= disk.capacity
    assert {block: store.read(block) for block in stored} == stored
    assert store.delete([*stored]).outcome is None
    store.run([], checkpoint=True)
    store.put({BlockId(100, 0): b"room again" * 1000})
    store.close()


class LiesAboutSpace(PowerDisk):
    """Free space as others may take it a moment later: the write itself finds out."""

    def free_bytes(self) -> int:
        return 1 << 40


def test_a_write_that_finds_the_disk_full_is_cut_off_again(tmp_path: Path) -> None:
    disk = LiesAboutSpace(capacity=100_000)
    store = Directory(tmp_path, files=disk)
    store.put({BlockId(1, 0): b"1" * 60_000})
    large, small = put_of(BlockId(2, 0), b"2" * 60_000), put_of(BlockId(3, 0), b"3" * 1000)
    store.run([large])
    assert isinstance(large.outcome, NoSpace)
    store.run([small])
    assert small.outcome is None
    store.close()
    store = Directory(tmp_path, files=disk)
    assert [store.read(BlockId(n, 0)) for n in (1, 2, 3)] == [b"1" * 60_000, None, b"3" * 1000]
    store.close()


class FullIndex(Index):
    """An index on a disk that is full for the next commits."""

    failures = 0

    def commit(self, changes: Changes) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().commit(changes)


@pytest.mark.parametrize("has_reserve", [True, False])
def test_a_delete_on_a_full_disk_uses_the_reserve_or_changes_nothing(tmp_path: Path, has_reserve: bool) -> None:
    store = Directory(tmp_path)
    store.put({BlockId(1, 0): b"one", BlockId(2, 0): b"two"}, checkpoint=True)
    store.catalogue.index.close()
    index = FullIndex(tmp_path / "index")
    store.catalogue.index = index
    index.failures = 1
    store.writer = Writer(
        store.catalogue,
        store.reader,
        next_number=2,
        active=store.catalogue.segments[1],
        release_reserve=lambda: has_reserve,
    )
    delete = store.delete([BlockId(1, 0)])
    if has_reserve:
        assert (delete.outcome, delete.deleted_count) == (None, 1)
        assert store.read(BlockId(1, 0)) is None
    else:
        assert isinstance(delete.outcome, NoSpace)
        assert store.read(BlockId(1, 0)) == b"one"
        assert store.delete([BlockId(1, 0)]).outcome is None
    assert store.catalogue.segments[1].live_count == 1
    assert store.read(BlockId(2, 0)) == b"two"
    store.close()


def test_a_put_behind_a_delete_of_the_same_block_is_sent_away_to_try_again(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    store.put({BlockId(1, 0): b"old"})
    again = put_of(BlockId(1, 0), b"old")
    operations: list[Put | Delete] = [Delete([BlockId(1, 0)]), again]
    store.run(operations)
    assert isinstance(again.outcome, ServerOverloaded)
    assert store.read(BlockId(1, 0)) is None
    store.put({BlockId(1, 0): b"old"})
    store.close()
