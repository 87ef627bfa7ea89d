"""Bytes that were written and not flushed when the session was lost: kept where nobody changed the file, else told."""

from __future__ import annotations

import pytest
import trio

from fsd.file_data import FileData
from metadata.core.schema import INLINE_SIZE_MAX
from metadata.protocol import Caller, CommitExtents, InodeReply, Mutation, SetAttr, SetAttrMask, WriteInline
from tests.support.local_services import LocalWorld, failing
from wire.errors import DeadlineExceeded, StaleInode, TooFewReplicas, WritesLost
from wire.message import Message

LARGE = bytes(range(256)) * (INLINE_SIZE_MAX // 64)


@pytest.fixture
def world() -> LocalWorld:
    return LocalWorld.make()


def change(world: LocalWorld, data: FileData, content: bytes = b"theirs", offset: int = 0) -> None:
    """Another mount writes."""
    if world.metadata.layout(data.ino).inode.allocated > INLINE_SIZE_MAX:
        world.metadata.apply(SetAttr(9, 1, data.ino, mask=SetAttrMask.SIZE, size=0, caller=Caller()))
    reply = world.metadata.apply(WriteInline(9, 1, data.ino, offset, content, 1))
    assert isinstance(reply, InodeReply)


async def is_lost(data: FileData, *handles: object) -> bool:
    """Whether flush tells each of these handles so, once, and then no more."""
    told = []
    for handle in handles:
        try:
            await data.flush(handle)  # type: ignore[arg-type]
        except WritesLost:
            told.append(handle)
            await data.flush(handle)  # type: ignore[arg-type]
    assert told in ([], list(handles))
    return bool(told)


@pytest.mark.parametrize("content", [b"ours", LARGE])
async def test_a_file_that_nobody_changed_loses_nothing(world: LocalWorld, content: bytes) -> None:
    async with world.mount() as path:
        data = world.create(path)
        cursor = data.error_cursor()
        await data.write(0, content)
        path.session_lost()
        assert await data.read(0, len(content)) == content
        assert not await is_lost(data, cursor)
        assert world.metadata.layout(data.ino).inode.size == len(content)
        await data.write(len(content), b"more")
        await data.flush(cursor)
        await data.close()
    assert await world.content(data.ino) == content + b"more"


async def test_what_is_left_unflushed_is_flushed_at_once(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"ours")
        path.session_lost()
        with trio.fail_after(1.0):
            while data.unflushed:  # noqa: ASYNC110 (it is the mount that flushes)
                await trio.sleep(0.01)
        await data.close()


@pytest.mark.parametrize("content", [b"our bytes", LARGE])
@pytest.mark.parametrize("first", ["flush", "read", "write", "stat", "truncate"])
async def test_a_file_that_others_changed_keeps_their_bytes_and_every_handle_is_told_once(
    world: LocalWorld, content: bytes, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.mount() as path:
        data = world.create(path)
        cursors = [data.error_cursor(), data.error_cursor()]
        await data.write(0, content)
        path.session_lost()
        change(world, data)
        if first == "read":
            assert await data.read(0, 100) == b"theirs"
        elif first == "write":
            await data.write(6, b"+new")
        elif first == "stat":
            data.update_inode(world.metadata.layout(data.ino).inode)
            assert data.size == 6
        elif first == "truncate":
            await data.truncate(3, Caller())
        assert await is_lost(data, *cursors)
        assert not await is_lost(data, data.error_cursor()), "a handle that was opened later, when others were told"
        await data.close()
        assert path.statistics().dirty == 0
    now = {"write": b"theirs+new", "truncate": b"the"}.get(first, b"theirs")
    assert await world.content(data.ino) == now
    lost = [record for record in caplog.records if "writes_lost" in record.getMessage()]
    assert len(lost) == 1
    assert f"bytes={len(content)}" in lost[0].getMessage()
    assert "others have changed the file" in lost[0].getMessage()


async def test_an_append_from_before_overwrites_nothing_that_others_appended(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        cursor = data.error_cursor()
        await data.append(b"begin ")
        await data.flush()
        await data.append(b"ours, while alone")
        path.session_lost()
        change(world, data, b"theirs", offset=6)
        assert await is_lost(data, cursor)
        await data.close()
    assert await world.content(data.ino) == b"begin theirs"


class Meddler:
    """Another mount, which changes the file directly before a request of ours is carried out."""

    def __init__(self, world: LocalWorld, data: FileData) -> None:
        self.world, self.data = world, data
        self.real = world.metadata.apply
        world.metadata.apply = self.apply  # type: ignore[method-assign]

    def apply(self, request: Mutation[Message]) -> Message:
        if isinstance(request, WriteInline | CommitExtents) and request.session != 9:
            self.world.metadata.apply = self.real  # type: ignore[method-assign]
            change(self.world, self.data)
        return self.real(request)


@pytest.mark.parametrize("content", [b"our bytes", LARGE])
async def test_a_change_between_the_look_and_the_commit_is_not_overwritten(world: LocalWorld, content: bytes) -> None:
    async with world.mount() as path:
        data = world.create(path)
        cursor = data.error_cursor()
        await data.write(0, content)
        path.session_lost()
        assert await data.read(0, len(content)) == content
        Meddler(world, data)
        assert await is_lost(data, cursor)
        await data.close()
    assert await world.content(data.ino) == b"theirs"


@pytest.mark.parametrize(("content", "kind"), [(b"our bytes", WriteInline), (LARGE, CommitExtents)])
async def test_a_commit_that_was_done_and_whose_answer_was_lost_is_no_lost_write(
    world: LocalWorld, content: bytes, kind: type[Message]
) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, content)
        world.metadata.forget_answers_of.append(kind)
        with pytest.raises(DeadlineExceeded):
            await data.flush()
        assert data.unflushed
        path.session_lost()
        assert await data.read(0, len(content)) == content
        await data.flush()
        assert not data.unflushed
        await data.close()
    assert await world.content(data.ino) == content


async def test_a_commit_that_was_done_and_then_changed_by_others_does_not_come_back(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"our bytes")
        world.metadata.forget_answers_of.append(WriteInline)
        await data.settle()
        path.session_lost()
        change(world, data, b"the")
        await data.settle()
        assert not data.unflushed
        await data.close()
    assert await world.content(data.ino) == b"the bytes"


async def test_several_commits_of_one_file_follow_each_other(world: LocalWorld) -> None:
    """A large file in many slices: each commit is based on the one before."""
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, LARGE)
        await data.flush()
        for turn in range(3):
            await data.write(turn * len(LARGE), LARGE)
            with failing(world.blocks.puts, TooFewReplicas("down")), pytest.raises(TooFewReplicas):
                await data.flush()
        path.session_lost()
        await data.flush()
        await data.close()
    assert await world.content(data.ino) == LARGE * 3


async def test_while_bytes_cannot_be_flushed_they_stay_and_reads_show_them(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, LARGE)
        with failing(world.blocks.puts, TooFewReplicas("down")):
            path.session_lost()
            assert await data.read(0, len(LARGE)) == LARGE
            with pytest.raises(TooFewReplicas):
                await data.write(0, b"new")
        await data.flush()
        await data.close()
    assert await world.content(data.ino) == LARGE


async def test_a_file_that_others_removed_is_stale_and_its_bytes_are_told_lost(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        cursor = data.error_cursor()
        await data.write(0, b"ours")
        path.session_lost()
        world.metadata.remove_inode(data.ino)
        assert await is_lost(data, cursor)
        for attempt in (data.read(0, 10), data.write(0, b"x"), data.append(b"x"), data.truncate(0, Caller())):
            with pytest.raises(StaleInode):
                await attempt
        await data.close()
        assert path.statistics().dirty == 0


async def test_a_file_with_nothing_unflushed_is_looked_at_before_it_is_believed(world: LocalWorld) -> None:
    async with world.mount() as path:
        data = world.create(path)
        await data.write(0, b"ours")
        await data.flush()
        path.session_lost()
        change(world, data, b"theirs")
        assert data.read_nowait(0, 4) is None
        assert await data.read(0, 100) == b"theirs"
        assert data.write_nowait(6, b"!")
        await data.close()
    assert await world.content(data.ino) == b"theirs!"


async def test_a_change_that_is_seen_after_the_loss_is_not_told_to_the_kernel_again(world: LocalWorld) -> None:
    """The kernel was told to drop everything; a notification now would overtake the answer that has the new size."""
    told: list[int] = []
    async with world.mount() as path:
        path.on_foreign_change(told.append)
        data = world.create(path)
        await data.write(0, b"ours")
        await data.flush()
        path.session_lost()
        change(world, data, b"theirs")
        assert await data.read(0, 100) == b"theirs"
        assert told == []
        change(world, data, b"again!")
        data.update_inode(world.metadata.layout(data.ino).inode)
        assert told == [data.ino]
        await data.close()
