"""What FileData promises, against the real namespace code and blocks in memory."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from blockstore.protocol import BLOCK_SIZE_MAX
from metadata.protocol import Caller, CommitExtents, GetLayout, SetAttr, SetAttrMask, WriteInline
from tests.support.local_services import LocalWorld, failing
from wire.errors import DataLost, DeadlineExceeded, FileTooLarge, NoSpace, NoSuchEntry, TooFewReplicas

MIB = 1 << 20


@pytest.fixture
def world() -> LocalWorld:
    return LocalWorld.make()


async def test_a_small_file_travels_in_one_request(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"hello")
        assert data.inode().size == 5
        assert await data.read(0, 100) == b"hello"
        await data.close()
    assert world.metadata.count(WriteInline) == 1
    assert not world.blocks.blocks
    assert await world.content(data.ino) == b"hello"


async def test_a_file_written_in_sequence_has_one_extent_per_slice(world: LocalWorld) -> None:
    content = bytes(range(256)) * 4096 * 21
    async with world.mount() as path:
        data = world.create(path)
        for at in range(0, len(content), MIB):
            await data.write(at, content[at : at + MIB])
        await data.flush()
        assert await data.read(3 * MIB + 5, 4 * MIB) == content[3 * MIB + 5 : 7 * MIB + 5]
        await data.close()
        assert path.statistics().dirty == 0
    assert world.blocks.puts_at_once > 1
    layout = world.metadata.layout(data.ino)
    assert len(layout.extents) == 1
    assert sorted(len(block) for block in world.blocks.blocks.values()) == [MIB] + [BLOCK_SIZE_MAX] * 5
    assert world.metadata.count(GetLayout) == 0, "what this mount has written needs no look"
    assert await world.content(data.ino) == content


async def test_an_inline_file_that_grows_keeps_its_bytes(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"a" * 10_000)
        await data.flush()
        await data.write(5_000, b"b" * 20_000)
        await data.flush()
        assert await data.read(0, 30_000) == b"a" * 5_000 + b"b" * 20_000
        await data.close()
    assert await world.content(data.ino) == b"a" * 5_000 + b"b" * 20_000


async def test_random_small_writes_leave_as_one_block_and_one_commit(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.truncate(1 << 40, Caller())
        for at in range(0, 400, 2):
            await data.write(at * 4096 * 100, bytes([at % 256]) * 4096)
        await data.flush()
        assert len(world.blocks.blocks) == 1
        assert world.metadata.count(CommitExtents) == 1
        for at in range(0, 400, 2):
            assert await data.read(at * 4096 * 100, 4096) == bytes([at % 256]) * 4096
        assert await data.read((1 << 40) - 10, 100) == bytes(10)
        await data.close()


async def test_an_error_is_told_to_every_handle_once_and_the_bytes_are_kept(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        first, second = data.error_cursor(), data.error_cursor()
        await data.write(0, b"x" * 100_000)
        with failing(world.blocks.puts, NoSpace("full")), pytest.raises(NoSpace):
            await data.flush(first)
        assert await data.read(0, 10) == b"x" * 10
        await data.flush(first)
        with pytest.raises(NoSpace):
            await data.flush(second)
        await data.flush(second)
        late = data.error_cursor()
        await data.flush(late)
        await data.close()
    assert await world.content(data.ino) == b"x" * 100_000


async def test_every_flush_that_could_not_write_fails(world: LocalWorld) -> None:
    async with world.mount() as path, trio.open_nursery() as nursery:
        data = world.create(path)
        handle = data.error_cursor()
        await data.write(0, b"x" * 100_000)
        failures = []

        async def flush() -> None:
            with pytest.raises(TooFewReplicas):
                await data.flush(handle)
            failures.append(1)

        with failing(world.blocks.puts, TooFewReplicas("1 of 2")):
            nursery.start_soon(flush)
            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked()
        assert len(failures) == 2
        await data.close()


async def test_a_failed_close_is_made_good_in_the_background(world: LocalWorld, autojump_clock: object) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        with failing(world.blocks.puts, NoSpace("full")):
            with pytest.raises(NoSpace):
                await data.close()
            await trio.sleep(60)
            assert path.statistics().files == 1
        await trio.sleep(60)
        assert path.statistics().files == 0
    assert await world.content(data.ino) == b"x" * 100_000


async def test_bytes_of_a_closed_file_are_given_up_after_a_while(world: LocalWorld, autojump_clock: object) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        with failing(world.blocks.puts, NoSpace("full")):
            with pytest.raises(NoSpace):
                await data.close()
            await trio.sleep(300)
            assert path.statistics().files == 0
            assert path.statistics().dirty == 0


async def test_old_bytes_leave_without_being_asked_to(world: LocalWorld, autojump_clock: object) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"old")
        await trio.sleep(10)
        assert not data.unflushed
        assert world.metadata.layout(data.ino).inline == b"old"
        await data.close()


async def test_writers_wait_for_memory_in_turn_and_the_budget_is_kept(world: LocalWorld) -> None:
    async with world.mount(budget_bytes=16 * MIB) as path, trio.open_nursery() as nursery:
        stream, small = world.create(path), world.create(path)
        world.blocks.gate = trio.Event()
        done = []

        async def write_stream() -> None:
            for at in range(0, 40 * MIB, MIB):
                await stream.write(at, bytes(MIB))
            done.append("stream")

        async def write_small() -> None:
            await small.write(0, b"s" * 4096)
            done.append("small")

        nursery.start_soon(write_stream)
        await trio.testing.wait_all_tasks_blocked()
        assert path.statistics().waiting_writers == 1
        nursery.start_soon(write_small)
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        world.blocks.gate.set()
        while not done:
            await trio.lowlevel.checkpoint()
        assert done == ["small"], "one stream does not keep others waiting for its end"
        while len(done) < 2:
            await trio.lowlevel.checkpoint()
        await stream.close()
        await small.close()
        assert path.statistics().peak <= 16 * MIB
        assert path.statistics().dirty == 0


async def test_scattered_writes_do_not_fill_the_memory_for_ever(world: LocalWorld) -> None:
    """They make no full blocks: only a flush gives their memory back."""
    async with world.mount(budget_bytes=16 * MIB) as path:
        data = world.create(path)
        for n in range(4000):
            await data.write(n * 10_000, b"r" * 5_000)
        assert path.statistics().put_count > 0
        await data.close()
    content = await world.content(data.ino)
    assert content[10_000:15_000] == b"r" * 5_000
    assert content[15_000:20_000] == bytes(5_000)


async def test_a_write_fails_when_what_fills_the_memory_cannot_be_sent(world: LocalWorld) -> None:
    async with world.mount(budget_bytes=16 * MIB) as path:
        data = world.create(path)
        with failing(world.blocks.puts, NoSpace("full")):
            for at in range(0, 7 * MIB, MIB):
                await data.write(at, bytes(MIB))
            with pytest.raises(NoSpace):
                await data.write(7 * MIB, bytes(MIB))
            with pytest.raises(NoSpace):
                await data.write(7 * MIB, bytes(MIB))
        await data.write(0, bytes(MIB))
        await data.close()


async def test_a_random_read_fetches_a_unit_and_a_second_one_nothing(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, bytes(range(256)) * 4096 * 8)
        await data.flush()
        assert await data.read(5 * MIB + 4096, 4096) == bytes(range(256)) * 16
        assert [(offset, size) for _, offset, size in world.blocks.get_log] == [(MIB, 16384)]
        await data.read(5 * MIB + 8192, 4096)
        assert len(world.blocks.get_log) == 1
        await data.read(3 * MIB + 16000, 4096)
        assert world.blocks.get_log[1][1:] == (3 * MIB, 32768)
        await data.close()


async def test_a_read_inside_one_block_is_not_copied(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, bytes(8 * MIB))
        await data.flush()
        got = await data.read(4 * MIB, MIB)
        assert isinstance(got, memoryview)
        assert any(got.obj is block for block in world.blocks.blocks.values())
        await data.close()


async def test_a_stream_is_fetched_once_and_in_parallel(world: LocalWorld) -> None:
    async with world.mount(budget_bytes=128 * MIB) as path:
        data = world.create(path)
        for at in range(0, 64 * MIB, MIB):
            await data.write(at, bytes([at // MIB]) * MIB)
        await data.flush()
        for at in range(0, 64 * MIB, MIB):
            assert await data.read(at, MIB) == bytes([at // MIB]) * MIB
        assert path.statistics().bytes_fetched == 64 * MIB
        assert path.statistics().get_count < 40
        await data.close()


async def test_a_file_with_many_extents_is_learned_page_by_page(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        for n in range(12_000):
            await data.write(n * 200, b"%08d" % n)
        await data.close()
    world.metadata.log.clear()
    async with world.mount() as path:
        data = path.file(data.ino, None)
        assert await data.read(11_000 * 200, 8) == b"00011000"
        assert world.metadata.count(GetLayout) <= 4
        await data.close()


async def test_a_file_removed_elsewhere_fails_the_flush_and_one_removed_here_does_not(world: LocalWorld) -> None:
    async with world.mount() as path:
        for here in (False, True):
            data = world.create(path)
            await data.write(0, b"x" * 100_000)
            if here:
                data.update_inode(msgspec.structs.replace(data.inode(), nlink=0, version=data.inode().version + 1))
            world.metadata.remove_inode(data.ino)
            if here:
                await data.close()
            else:
                with pytest.raises(NoSuchEntry):
                    await data.flush()
                await data.close()
        assert path.statistics().dirty == 0


async def test_an_unlinked_file_that_went_with_its_session_fails_the_fsync_of_its_handle(world: LocalWorld) -> None:
    for size in (100, 100_000):
        async with world.mount() as path:
            data = world.create(path)
            data.update_inode(msgspec.structs.replace(data.inode(), nlink=0, version=data.inode().version + 1))
            await data.write(0, b"x" * size)
            world.metadata.remove_inode(data.ino)
            with pytest.raises(NoSuchEntry):
                await data.flush()
            await data.close()
            assert path.statistics().dirty == 0


@pytest.mark.parametrize("offsets", [(20_000,), (0, 9_000), (0, 20_000)])
@pytest.mark.parametrize("known", [b"", b"a" * 10_000])
async def test_what_another_mount_wrote_elsewhere_in_a_small_file_stays(
    world: LocalWorld, known: bytes, offsets: tuple[int, ...]
) -> None:
    """The layout here is older than the other mount's write; what is flushed here must not bring back its bytes."""
    async with world.mount() as path, world.mount() as elsewhere:
        data = world.create(path)
        if known:
            await data.write(0, known)
            await data.flush()
        other = elsewhere.file(data.ino, None)
        await other.write(5_000, b"b" * 100)
        await other.close()
        for offset in offsets:
            await data.write(offset, b"c" * 1_000)
        await data.close()
    expected = bytearray(max(offsets) + 1_000)
    expected[: len(known)] = known[: len(expected)]
    expected[5_000:5_100] = b"b" * 100
    for offset in offsets:
        expected[offset : offset + 1_000] = b"c" * 1_000
    assert await world.content(data.ino) == bytes(expected)


async def test_a_move_out_of_line_that_may_have_been_done_does_not_undo_another_mounts_write(world: LocalWorld) -> None:
    async with world.mount() as path, world.mount() as elsewhere:
        data = world.create(path)
        await data.write(0, b"a" * 10_000)
        await data.flush()
        await data.write(20_000, b"c" * 1_000)
        world.metadata.forget_answers_of.append(CommitExtents)
        with pytest.raises(DeadlineExceeded):
            await data.flush()
        other = elsewhere.file(data.ino, None)
        await other.write(5_000, b"b" * 100)
        await other.close()
        await data.close()
    content = await world.content(data.ino)
    assert content[5_000:5_100] == b"b" * 100
    assert content[20_000:] == b"c" * 1_000


async def test_the_times_set_after_a_write_survive_its_flush(world: LocalWorld) -> None:
    async with world.mount() as path:
        for size in (100, 100_000):
            data = world.create(path)
            await data.write(0, b"x" * size)
            reply = await world.metadata.mutate(
                lambda session, sequence, ino=data.ino: SetAttr(  # type: ignore[misc]
                    session, sequence, ino=ino, mask=SetAttrMask.MTIME, mtime_ns=12345
                )
            )
            data.update_inode(reply.inode, mtime_set=True)
            await data.close()
            assert world.metadata.layout(data.ino).inode.mtime_ns == 12345


async def test_offsets_at_the_limit(world: LocalWorld) -> None:
    top = (1 << 63) - 1
    async with world.mount() as path:
        data = world.create(path)
        await data.write(top - 5, b"last!")
        assert data.size == top
        with pytest.raises(FileTooLarge):
            await data.write(top, b"x")
        with pytest.raises(FileTooLarge):
            await data.append(b"x")
        await data.flush()
        assert await data.read(top - 7, 100) == b"\0\0last!"
        assert await data.read(1 << 62, 8) == bytes(8)
        await data.close()


async def test_appends_of_many_tasks_never_overlap(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)

        async def append(mark: int) -> None:
            for _ in range(200):
                await data.append(bytes([mark]) * 100)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for mark in range(5):
                nursery.start_soon(append, mark)
        await data.close()
    content = await world.content(data.ino)
    records = [content[at : at + 100] for at in range(0, len(content), 100)]
    assert sorted(records) == sorted(bytes([mark]) * 100 for mark in range(5) for _ in range(200))


async def test_lost_blocks_are_an_error_and_never_other_bytes(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        await data.flush()
        world.blocks.blocks.clear()
        with pytest.raises(DataLost):
            await data.read(0, 100)
        await data.close()


async def test_the_last_close_of_a_removed_file_waits_for_a_commit_under_way(world: LocalWorld) -> None:
    async with world.mount() as path, trio.open_nursery() as nursery:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        nursery.start_soon(data.flush)
        while not world.metadata.count(CommitExtents):
            await trio.lowlevel.checkpoint()
        await data.write(0, b"y")
        data.update_inode(msgspec.structs.replace(data.inode(), nlink=0, version=data.inode().version + 9))
        await data.close()
        assert path.statistics().files == 0


async def test_blocks_that_no_commit_will_name_are_deleted(world: LocalWorld) -> None:
    async with world.mount() as path:
        gone, cut, kept = world.create(path), world.create(path), world.create(path)
        for data in (gone, cut, kept):
            for at in range(0, 20 * MIB, MIB):
                await data.write(at, bytes([1 + at // MIB]) * MIB)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.blocks.blocks) == 15
        gone.update_inode(msgspec.structs.replace(gone.inode(), nlink=0, version=gone.inode().version + 1))
        await gone.close()
        await cut.truncate(0, Caller())
        await cut.close()
        await kept.write(0, b"x" * 5 * MIB)
        await kept.flush()
        await trio.testing.wait_all_tasks_blocked()
        named = {extent.slice_id for extent in world.metadata.layout(kept.ino).extents}
        assert {block.slice_id for block in world.blocks.blocks} == named
        await kept.close()
    assert (await world.content(kept.ino))[: 6 * MIB] == b"x" * 5 * MIB + bytes([6]) * MIB


async def test_blocks_of_a_commit_whose_answer_was_lost_are_kept(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"x" * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        world.metadata.mutations.after[:] = [None, DeadlineExceeded("lost")]  # Of the slice id, of the commit.
        with pytest.raises(DeadlineExceeded):
            await data.flush()
        data.update_inode(msgspec.structs.replace(data.inode(), nlink=0, version=data.inode().version + 9))
        await data.close()
        await trio.testing.wait_all_tasks_blocked()
        assert world.blocks.blocks
    assert await world.content(data.ino) == b"x" * 100_000
