"""Ranges of files as a mount works on them: fallocate, SEEK_DATA and SEEK_HOLE, copies that share blocks, appends from
several mounts; against the real namespace code and blocks in memory."""

from __future__ import annotations

import os
import random
from unittest import mock

import pytest
import trio
import trio.testing

from fsd.file_data import DataPath, FileData
from metadata.core.fsck import check
from metadata.core.namespace import data as namespace_data
from metadata.core.namespace import ranges
from metadata.core.schema import InodeFlags
from metadata.protocol import (
    Caller,
    ChangeRange,
    CommitExtents,
    CopyRange,
    RangeOperation,
    RecallItem,
    RecallKind,
    WriteInline,
)
from tests.support.file_system import CALLER, ROOT, Mounted, mounted, soon
from tests.support.local_services import LocalWorld, failing
from wire.errors import DeadlineExceeded, InvalidArgument, NoSpace, NoSuchData, NotSupported

MIB = 1 << 20
APPEND = os.O_RDWR | os.O_APPEND
ALLOCATE, PUNCH, ZERO = RangeOperation
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE_RANGE = 1, 2, 16, 8


@pytest.fixture
def world() -> LocalWorld:
    return LocalWorld.make()


async def change(data: FileData, operation: RangeOperation, offset: int, length: int, keep_size: bool = False) -> None:
    await data.change_range(operation, offset, length, keep_size=keep_size, keep_privileges=True)


async def copy(target: FileData, source: FileData, source_offset: int, offset: int, length: int) -> int:
    done, inode = await target.copy_range(source, source_offset, offset, length, keep_privileges=True)
    assert (inode is None) == (done == 0) or done == 0
    return done


async def written(path: DataPath, world: LocalWorld, content: bytes, *, at: int = 0) -> FileData:
    data = world.create(path)
    for start in range(0, len(content), MIB):
        await data.write(at + start, content[start : start + MIB])
    await data.flush()
    return data


async def data_ranges(data: FileData) -> list[tuple[int, int]]:
    """Every range that SEEK_DATA and SEEK_HOLE call data."""
    found: list[tuple[int, int]] = []
    at = 0
    while True:
        try:
            start = await data.seek_data(at)
        except NoSuchData:
            return found
        at = await data.seek_hole(start)
        found.append((start, at))


def is_sound(world: LocalWorld) -> bool:
    with world.metadata.engine.read() as txn:
        return [str(violation) for violation in check(txn)] == []


# --- fallocate --------------------------------------------------------------------------------------------------------


async def test_a_hole_punched_into_bytes_not_yet_flushed_stays_a_hole(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 9 * MIB)
        await change(data, PUNCH, MIB, 7 * MIB)
        assert bytes(await data.read(0, 9 * MIB)) == b"x" * MIB + bytes(7 * MIB) + b"x" * MIB
        await data.flush()
        assert data.inode().allocated == 2 * MIB
        await data.close()
    assert await world.content(data.ino) == b"x" * MIB + bytes(7 * MIB) + b"x" * MIB
    assert is_sound(world)


async def test_allocated_space_reads_as_zeros_and_takes_writes(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await change(data, ALLOCATE, 0, 200 * MIB)
        assert (data.inode().size, data.inode().allocated) == (200 * MIB, 200 * MIB)
        assert bytes(await data.read(100 * MIB, 4096)) == bytes(4096)
        await data.write(100 * MIB + 5, b"here")
        await data.flush()
        assert (data.inode().size, data.inode().allocated) == (200 * MIB, 200 * MIB)
        assert await data_ranges(data) == [(100 * MIB + 5, 100 * MIB + 9)]
        await change(data, ZERO, 0, 200 * MIB)
        assert data.inode().allocated == 200 * MIB
        assert await data_ranges(data) == []
        await change(data, PUNCH, 0, 200 * MIB)
        assert (data.inode().size, data.inode().allocated) == (200 * MIB, 0)
        await data.close()
    assert is_sound(world)


async def test_what_is_allocated_beyond_the_end_waits_there(world: LocalWorld) -> None:
    """As on ext4: it counts in st_blocks, a growing file finds it, a truncation to the same size lets it go."""
    async with world.mount() as path:
        data = await written(path, world, b"x" * 20_000)
        await change(data, ALLOCATE, 0, MIB, keep_size=True)
        assert (data.inode().size, data.inode().allocated) == (20_000, MIB)
        await data.write(30_000, b"y")
        assert bytes(await data.read(0, MIB)) == b"x" * 20_000 + bytes(10_000) + b"y"
        await data.flush()
        assert data.inode().allocated == MIB
        await data.truncate(30_001, Caller())
        assert data.inode().allocated == 30_001
        await data.close()
    assert is_sound(world)


@pytest.mark.parametrize("operation", RangeOperation)
@pytest.mark.parametrize("keep_size", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 10), (50, 100), (90, 30_000), (16_000, 1_000), (20_000, 10)])
async def test_an_inline_file_is_changed_inline_or_moves_out(
    world: LocalWorld, operation: RangeOperation, keep_size: bool, offset: int, length: int
) -> None:
    async with world.mount() as path:
        data = await written(path, world, bytes(range(1, 101)))
        expected = bytearray(range(1, 101))
        end = offset + length
        if operation is not PUNCH and not keep_size:
            expected.extend(bytes(max(0, end - len(expected))))
        if operation is not ALLOCATE:
            stop = min(end, len(expected))
            expected[offset:stop] = bytes(max(stop - offset, 0))
        await change(data, operation, offset, length, keep_size=keep_size)
        assert bytes(await data.read(0, 1 << 20)) == expected
        inode = data.inode()
        if operation is not PUNCH:
            assert inode.allocated >= length
        await data.close()
    assert await world.content(data.ino) == expected
    assert is_sound(world)


async def test_a_hole_over_all_of_an_inline_file_frees_it(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = await written(path, world, b"x" * 100)
        await change(data, PUNCH, 0, 100)
        assert (data.inode().size, data.inode().allocated) == (100, 0)
        assert bytes(await data.read(0, 100)) == bytes(100)
        await data.close()
    assert not world.metadata.layout(data.ino).inode.flags & InodeFlags.INLINE


@pytest.mark.parametrize("operation", RangeOperation)
async def test_a_range_of_many_extents_takes_several_requests(world: LocalWorld, operation: RangeOperation) -> None:
    with mock.patch.object(ranges, "EXTENTS_PER_STEP", 5):
        async with world.mount() as path:
            data = world.create(path)
            for n in range(20):
                await data.write(n * 100_000, b"%02d" % n * 20_000)
                await data.flush()
            before = bytes(await data.read(0, 2_000_000))
            await change(data, operation, 150_000, 1_500_000)
            assert world.metadata.count(ChangeRange) > 2
            after = before if operation is ALLOCATE else before[:150_000] + bytes(1_500_000) + before[1_650_000:]
            assert await data.read(0, 2_000_000) == after
            data.doubt()
            assert await data.read(0, 2_000_000) == after
            await data.close()
    assert is_sound(world)


async def test_a_change_that_fails_leaves_what_was_written(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        with failing(world.metadata.mutations, NoSpace("full")), pytest.raises(NoSpace):
            await change(data, PUNCH, 0, 50_000)
        assert await data.read(0, 100_000) == b"x" * 100_000
        world.metadata.forget_answers_of.append(ChangeRange)
        with pytest.raises(DeadlineExceeded):
            await change(data, PUNCH, 0, 50_000)
        assert await data.read(0, 100_000) == bytes(50_000) + b"x" * 50_000, "the layout was asked for again"
        await data.close()


async def test_the_front_end_gets_fallocate_as_the_kernel_sends_it() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o106755, os.O_RDWR, CALLER))
        await soon(m.fs.fallocate(opened.fh, 0, 0, 100_000))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100_000))
        await soon(m.fs.fallocate(opened.fh, KEEP_SIZE, 0, 200_000))
        assert (await size_and_blocks(m, entry.nodeid)) == (100_000, 200_000)
        await soon(m.fs.fallocate(opened.fh, PUNCH_HOLE | KEEP_SIZE, 0, 40_000, kill_privileges=True))
        assert (await size_and_blocks(m, entry.nodeid)) == (100_000, 160_000)
        assert m.kernel.attributes == [entry.nodeid], "it believes that suid is there"
        assert (await soon(m.fs.getattr(entry.nodeid))).inode.mode == 0o100755
        await soon(m.fs.fallocate(opened.fh, ZERO_RANGE, 150_000, 100_000))
        assert (await size_and_blocks(m, entry.nodeid)) == (250_000, 210_000)
        assert bytes(await soon(m.fs.read(opened.fh, 30_000, 20_000))) == bytes(10_000) + b"x" * 10_000
        with pytest.raises(NotSupported):
            m.fs.fallocate(opened.fh, COLLAPSE_RANGE, 0, 4096)
        with pytest.raises(InvalidArgument):
            m.fs.fallocate(opened.fh, 0, 0, 0)
        await soon(m.fs.release(opened.fh))


async def size_and_blocks(m: Mounted, nodeid: int) -> tuple[int, int]:
    inode = (await soon(m.fs.getattr(nodeid))).inode
    return inode.size, inode.allocated


# --- lseek ------------------------------------------------------------------------------------------------------------


async def test_data_and_holes_are_told_to_the_byte_flushed_or_not(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = await written(path, world, b"x" * 100_000, at=50_000)
        await data.write(200_000, b"y" * 10)
        await data.write(140_000, b"z" * 20_000)
        wanted = [(50_000, 160_000), (200_000, 200_010)]
        assert await data_ranges(data) == wanted
        assert await data.seek_hole(0) == 0
        assert await data.seek_hole(50_000) == 160_000
        assert await data.seek_hole(200_005) == 200_010, "the end is a hole"
        for at in (200_010, 1 << 62, (1 << 64) - 5):
            for seek in (data.seek_data, data.seek_hole):
                with pytest.raises(NoSuchData):
                    await seek(at)
        await data.flush()
        assert await data_ranges(data) == wanted
        data.doubt()
        assert await data_ranges(data) == wanted
        await data.close()


async def test_holes_of_a_file_with_many_extents_are_found_page_by_page(world: LocalWorld) -> None:
    with mock.patch("metadata.core.namespace.data.EXTENTS_PER_MESSAGE_MAX", 3):
        async with world.mount() as path:
            data = world.create(path)
            for n in range(20):
                await data.write(n * 60_000, b"x" * (60_000 if n % 10 else 30_000))
                await data.flush()
            await change(data, ALLOCATE, 0, 3_000_000)
            data.doubt()
            assert await data_ranges(data) == [(0, 30_000), (60_000, 630_000), (660_000, 1_200_000)]
            await data.close()


async def test_a_call_that_would_load_too_much_calls_it_data(world: LocalWorld) -> None:
    with (
        mock.patch("metadata.core.namespace.data.EXTENTS_PER_MESSAGE_MAX", 1),
        mock.patch("fsd.seek.PAGES_MAX", 4),
    ):
        async with world.mount() as path:
            data = world.create(path)
            for n in range(10):
                await data.write(n * 60_000, b"x" * 60_000)
                await data.flush()
            await data.write(700_000, b"x")
            data.doubt()
            assert await data.seek_hole(0) == 700_001
            await data.close()


async def test_while_sharing_a_seek_sees_what_another_mount_has_written() -> None:
    async with mounted() as m:
        nodeid = await m.make(b"f", b"x" * 20_000)
        await m.fs.set_alone(False)
        opened = await soon(m.fs.open(nodeid, os.O_RDWR, CALLER))
        assert await soon(m.fs.seek(opened.fh, 0, os.SEEK_HOLE)) == 20_000
        async with m.world.mount() as path:
            other = path.file(nodeid, None)
            await other.write(30_000, b"y")
            await other.close()
        await m.fs.recall([RecallItem(nodeid, RecallKind.CONTENT)])
        assert await soon(m.fs.seek(opened.fh, 20_000, os.SEEK_DATA)) == 30_000
        with pytest.raises(InvalidArgument):
            m.fs.seek(opened.fh, 0, 0)
        await soon(m.fs.release(opened.fh))


# --- copies -----------------------------------------------------------------------------------------------------------


async def test_a_copy_shares_blocks_and_holes(world: LocalWorld) -> None:
    async with world.mount() as path:
        content = random.Random(1).randbytes(9 * MIB)
        source = await written(path, world, content, at=MIB)
        blocks = dict(world.blocks.blocks)
        target = await written(path, world, b"t" * 100)
        assert await copy(target, source, 0, 50, 1 << 40) == 10 * MIB
        assert target.inode().allocated == 9 * MIB + 50
        assert bytes(await target.read(0, 1 << 40)) == b"t" * 50 + bytes(MIB) + content
        assert await data_ranges(target) == [(0, 50), (MIB + 50, 10 * MIB + 50)]
        assert len(world.blocks.blocks) == len(blocks) + 1, "the inline bytes have moved, nothing else was written"
        assert await copy(target, source, 10 * MIB, 0, 100) == 0
        await source.close()
        await target.close()
    assert is_sound(world)


async def test_a_copy_is_of_what_was_written_before_it(world: LocalWorld) -> None:
    """Unflushed bytes of either file are in order with it."""
    async with world.mount() as path:
        source, target = world.create(path), world.create(path)
        await source.write(0, b"s" * 5 * MIB)
        await target.write(0, b"t" * 6 * MIB)
        assert await copy(target, source, MIB, 2 * MIB, 3 * MIB) == 3 * MIB
        await source.write(0, b"later" * MIB)
        expected = b"t" * 2 * MIB + b"s" * 3 * MIB + b"t" * MIB
        assert bytes(await target.read(0, 6 * MIB)) == expected
        await source.close()
        await target.close()
    assert await world.content(target.ino) == expected
    assert await world.content(source.ino) == b"later" * MIB


async def test_files_that_share_blocks_change_and_go_on_their_own(world: LocalWorld) -> None:
    async with world.mount() as path:
        content = random.Random(2).randbytes(6 * MIB)
        source = await written(path, world, content)
        target = world.create(path)
        await copy(target, source, 0, 0, len(content))
        await source.write(0, b"s" * MIB)
        await target.write(5 * MIB, b"t" * MIB)
        await source.flush()
        await target.flush()
        world.reclaim()
        assert bytes(await source.read(0, 6 * MIB)) == b"s" * MIB + content[MIB:]
        assert bytes(await target.read(0, 6 * MIB)) == content[: 5 * MIB] + b"t" * MIB
        await source.close()
        await target.close()
    world.metadata.unlink(b"file0", source.ino)
    world.reclaim()
    assert await world.content(target.ino) == content[: 5 * MIB] + b"t" * MIB
    world.metadata.unlink(b"file1", target.ino)
    world.reclaim()
    assert not world.blocks.blocks
    assert is_sound(world)


async def test_blocks_of_a_copy_would_be_lost_if_its_references_were_not_counted(world: LocalWorld) -> None:
    """The bug is planted: the copy's extents are entered without raising the count."""

    def put_extent(txn: object, ino: int, extent: object, references: object) -> None:
        original(txn, ino, extent, {})  # type: ignore[arg-type]

    original = namespace_data.put_extent
    with mock.patch.object(ranges, "put_extent", put_extent):
        async with world.mount() as path:
            source = await written(path, world, b"x" * MIB)
            target = world.create(path)
            await copy(target, source, 0, 0, MIB)
            await source.close()
            await target.close()
    assert not is_sound(world)


async def test_a_file_is_copied_within_itself(world: LocalWorld) -> None:
    async with world.mount() as path:
        content = random.Random(3).randbytes(6 * MIB)
        data = await written(path, world, content)
        assert await copy(data, data, 0, 6 * MIB, 6 * MIB) == 6 * MIB
        assert await copy(data, data, MIB, 3 * MIB, 2 * MIB) == 2 * MIB
        expected = content[: 3 * MIB] + content[MIB : 3 * MIB] + content[5 * MIB :] + content
        assert bytes(await data.read(0, 1 << 40)) == expected
        with pytest.raises(InvalidArgument):
            await copy(data, data, 0, MIB, MIB + 1)
        await data.close()
    assert await world.content(data.ino) == expected
    assert is_sound(world)


async def test_small_files_are_copied_inline_or_left_to_the_kernel(world: LocalWorld) -> None:
    async with world.mount() as path:
        source = await written(path, world, b"source")
        target = await written(path, world, b"target")
        assert await copy(target, source, 2, 4, 100) == 4
        assert bytes(await target.read(0, 100)) == b"targurce"
        large = await written(path, world, b"x" * MIB)
        for to, at in ((large, 0), (target, 20_000)):
            with pytest.raises(NotSupported):
                await copy(to, source, 0, at, 6)
        await source.close()
        await target.close()
        await large.close()
    assert world.metadata.count(CommitExtents) == 1
    assert await world.content(target.ino) == b"targurce"


async def test_a_copy_of_many_extents_goes_on_until_it_is_whole(world: LocalWorld) -> None:
    with mock.patch.object(ranges, "EXTENTS_PER_STEP", 5):
        async with world.mount() as path:
            source, target = world.create(path), world.create(path)
            for n in range(40):
                await source.write(n * 50_000, b"%02d" % n * 20_000)
                await source.flush()
            size = source.inode().size
            assert await copy(target, source, 0, 0, size) == size
            assert bytes(await target.read(0, size)) == bytes(await source.read(0, size))
            world.metadata.mutations.after = [None, DeadlineExceeded("lost")]
            assert 0 < await copy(target, source, 0, size, size) < size, "what was done before is told"
            await source.close()
            await target.close()
    assert is_sound(world)


async def test_a_commit_in_doubt_is_settled_before_its_bytes_are_copied(world: LocalWorld) -> None:
    """It had been done; its repetition finds its slice, which meanwhile is in two files, and takes itself for done."""
    async with world.mount() as path:
        source, target = world.create(path), world.create(path)
        await source.write(0, b"x" * MIB)
        world.metadata.forget_answers_of.append(CommitExtents)
        with pytest.raises(DeadlineExceeded):
            await source.flush()
        other = path.file(target.ino, None)
        world.metadata.apply(CopyRange(1, 1 << 20, source.ino, 0, target.ino, 0, MIB))
        await source.flush()
        assert await copy(target, source, 0, MIB, MIB) == MIB
        await source.close()
        await target.close()
        await other.close()
    assert await world.content(target.ino) == b"x" * 2 * MIB
    assert is_sound(world)


async def test_the_front_end_copies_at_most_what_its_reply_can_tell() -> None:
    async with mounted() as m:
        source = await m.make(b"source", b"x" * MIB)
        one = await soon(m.fs.open(source, 0, CALLER))
        two, entry = await soon(m.fs.create(ROOT, b"target", 0o106755, os.O_RDWR, CALLER))
        assert await soon(m.fs.copy_range(one.fh, 0, two.fh, 0, 1 << 62, kill_privileges=True)) == MIB
        assert (await size_and_blocks(m, entry.nodeid)) == (MIB, MIB)
        assert (await soon(m.fs.getattr(entry.nodeid))).inode.mode == 0o100755
        assert all(request.length < 1 << 32 for request in m.metadata.log if isinstance(request, CopyRange))
        await soon(m.fs.release(one.fh))
        await soon(m.fs.release(two.fh))


# --- appends from several mounts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_appends_of_several_mounts_are_all_there_whole_and_in_order(seed: int) -> None:
    """Records of all sizes: the file begins inline, and moves out while both append."""
    world, chance = LocalWorld.make(seed), random.Random(seed)
    ino = world.metadata.create(b"log").ino
    records = {
        name: [f"{name}{n:04}:".encode() + b"." * chance.choice([1, 100, 3_000]) for n in range(40)] for name in "abc"
    }

    async def append(path: DataPath, name: str) -> None:
        data = path.file(ino, None)
        for record in records[name]:
            inode = await data.append_sharing(record)
            assert bytes(await data.read(inode.size - len(record), len(record))) == record
        await data.close()

    async with world.mount() as one, world.mount() as other, trio.open_nursery() as nursery:
        nursery.start_soon(append, one, "a")
        nursery.start_soon(append, one, "b")
        nursery.start_soon(append, other, "c")
    content = await world.content(ino)
    assert len(content) == sum(len(record) for name in records for record in records[name])
    for name in records:
        at = 0
        for record in records[name]:
            at = content.index(record, at) + len(record)
    assert is_sound(world)


async def test_an_append_that_failed_is_not_in_the_file_and_leaves_no_block(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = await written(path, world, b"x" * 100_000)
        blocks = set(world.blocks.blocks)
        with failing(world.blocks.puts, NoSpace("full")), pytest.raises(NoSpace):
            await data.append_sharing(b"y" * 1000)
        world.metadata.mutations.before.append(InvalidArgument("no"))
        with pytest.raises(InvalidArgument):
            await data.append_sharing(b"y" * 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert set(world.blocks.blocks) == blocks
        assert data.size == 100_000
        await data.append_sharing(b"z" * 1000)
        assert bytes(await data.read(99_999, 2000)) == b"x" + b"z" * 1000
        await data.close()


async def test_an_append_comes_behind_what_this_mount_has_written(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 50_000)
        inode = await data.append_sharing(b"y" * 10)
        assert inode.size == 50_010
        await data.close()
    assert await world.content(data.ino) == b"x" * 50_000 + b"y" * 10


async def test_while_an_append_is_under_way_the_next_one_comes_behind_it(world: LocalWorld) -> None:
    """Though the mount is alone again, and appends stay in memory."""
    async with world.mount() as path, trio.open_nursery() as nursery:
        data = await written(path, world, b"x" * 50_000)
        world.blocks.gate = trio.Event()
        nursery.start_soon(data.append_sharing, b"a" * 10_000)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(data.append, b"b" * 10_000)
        await trio.testing.wait_all_tasks_blocked()
        world.blocks.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        await data.close()
    content = await world.content(data.ino)
    assert sorted([content[50_000:60_000], content[60_000:]]) == [b"a" * 10_000, b"b" * 10_000]


async def test_while_sharing_the_kernel_is_told_where_an_append_went() -> None:
    async with mounted() as m:
        nodeid = await m.make(b"log", b"x" * 20_000)
        before = await soon(m.fs.open(nodeid, APPEND, CALLER))
        assert not before.direct_io
        await m.fs.set_alone(False)
        after = await soon(m.fs.open(nodeid, APPEND, CALLER))
        assert after.direct_io
        async with m.world.mount() as path:
            other = path.file(nodeid, None)
            await other.append_sharing(b"other" * 1000)
            await other.close()
        await m.fs.recall([RecallItem(nodeid, RecallKind.CONTENT)])
        assert await soon(m.fs.write(before.fh, 20_000, b"mine")) == 4
        assert m.kernel.pages[-1] == (nodeid, 20_000, 5_004)
        assert bytes(await soon(m.fs.read(after.fh, 19_999, 6_000))) == b"x" + b"other" * 1000 + b"mine"
        assert await soon(m.fs.write(after.fh, 4096, b"pages", from_pages=True)) == 5
        assert bytes(await soon(m.fs.read(after.fh, 4096, 5))) == b"pages"


async def test_alone_again_an_append_goes_to_the_end_whatever_the_kernel_believes() -> None:
    """Its idea of the size may be old: it does not ask before it appends."""
    async with mounted() as m:
        nodeid = await m.make(b"log", b"x" * 20_000)
        opened = await soon(m.fs.open(nodeid, APPEND, CALLER))
        for from_pages in (False, None):
            assert await soon(m.fs.write(opened.fh, 10_000, b"end", from_pages=from_pages)) == 3
        assert bytes(await soon(m.fs.read(opened.fh, 19_999, 100))) == b"xendend"
        assert m.kernel.pages[-1] == (nodeid, 10_000, 0), "it has filled pages where the bytes are not"
        told = len(m.kernel.pages)
        assert await soon(m.fs.write(opened.fh, 20_006, b"end", from_pages=False)) == 3
        assert len(m.kernel.pages) == told
        await soon(m.fs.release(opened.fh))


async def test_before_another_mount_is_let_in_it_finds_what_was_written() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"log", 0o100644, APPEND, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100_000))
        await m.fs.set_alone(False)
        assert m.metadata.layout(entry.nodeid).inode.size == 100_000
        await soon(m.fs.release(opened.fh))


async def test_a_session_that_was_lost_waits_for_no_flush() -> None:
    async with mounted() as m:
        opened, _ = await soon(m.fs.create(ROOT, b"log", 0o100644, APPEND, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100))
        await m.fs.session_lost()
        assert m.metadata.count(WriteInline) == 0
        await soon(m.fs.release(opened.fh))


# --- syncfs -----------------------------------------------------------------------------------------------------------


async def test_sync_makes_every_file_durable_and_tells_an_error() -> None:
    async with mounted() as m:
        handles = []
        for n in range(40):
            opened, entry = await soon(m.fs.create(ROOT, b"f%d" % n, 0o100644, os.O_RDWR, CALLER))
            await soon(m.fs.write(opened.fh, 0, b"x" * (100 + 1000 * n)))
            handles.append((opened.fh, entry.nodeid, 100 + 1000 * n))
        with failing(m.metadata.mutations, NoSpace("full")), pytest.raises(NoSpace):
            await soon(m.fs.sync())
        await soon(m.fs.sync())
        for fh, nodeid, size in handles:
            assert m.metadata.layout(nodeid).inode.size == size
            with pytest.raises(NoSpace):  # Each handle is told of the failed attempt, once.
                await soon(m.fs.fsync(fh, False))
            assert m.fs.fsync(fh, False) is None
            await soon(m.fs.release(fh))
