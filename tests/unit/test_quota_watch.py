"""A writer is told by its write that a quota is used up, and nobody else is asked anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio.testing

from fsd.file_data import DataPath, FileData
from fsd.quota_watch import ASK_AGAIN_BYTES
from metadata.core.schema import ROOT_INO
from metadata.protocol import Caller, CommitExtents, SetXattr, StatFs, WriteInline
from tests.support.local_services import LocalWorld, failing
from wire.errors import DeadlineExceeded, QuotaExceeded

MIB = 1 << 20
STEP = 128 << 10
CALLER = Caller()


def limit(world: LocalWorld, size: int) -> None:
    world.metadata.apply(SetXattr(1, 1, ROOT_INO, b"fsd.quota.bytes", b"%d" % size))


@asynccontextmanager
async def opened(world: LocalWorld, budget_bytes: int = 64 << 20) -> AsyncIterator[tuple[DataPath, FileData]]:
    async with world.mount(budget_bytes) as path:
        yield path, world.create(path)


async def write_until_refused(data: FileData, step: int = STEP, most: int = 64 * MIB) -> int:
    """Write in sequence; how many bytes were taken before EDQUOT."""
    while data.size < most:
        try:
            at = data.size
            taken = await data.write(at, bytes(step))
            await trio.testing.wait_all_tasks_blocked()  # Each write is a request of its own; others run in between.
        except QuotaExceeded:
            break
        assert data.size == at + taken
    return data.size


@pytest.mark.parametrize("room", [3 * MIB, 5 * MIB + 1, 12 * MIB + 12_345])
async def test_a_stream_stops_at_the_last_byte_that_there_is_room_for(room: int) -> None:
    world = LocalWorld.make()
    limit(world, room)
    async with opened(world) as (_, data):
        assert await write_until_refused(data) == room
        await data.flush()
        with pytest.raises(QuotaExceeded):
            await data.write(room, b"x")
        await data.close()
    assert len(await world.content(data.ino)) == room
    assert world.metadata.count(StatFs) < 20


async def test_appends_stop_there_too() -> None:
    world = LocalWorld.make()
    limit(world, 2 * MIB + 100)
    async with opened(world) as (_, data):
        for _ in range(17):
            await data.append(bytes(STEP))
            await trio.testing.wait_all_tasks_blocked()
        assert data.size == 2 * MIB + 100
        with pytest.raises(QuotaExceeded):
            await data.append(b"x")
        await data.close()


async def test_without_a_quota_a_large_file_costs_one_question_and_no_waiting() -> None:
    world = LocalWorld.make()
    async with opened(world) as (_, data):
        for at in range(0, 32 * MIB, MIB):
            await data.write(at, bytes(MIB))
        await data.close()
    assert world.metadata.count(StatFs) == 1
    assert ASK_AGAIN_BYTES > 32 * MIB


async def test_a_service_that_does_not_answer_the_question_stops_no_writer() -> None:
    world = LocalWorld.make()
    async with opened(world) as (_, data):
        with failing(world.metadata.asks, DeadlineExceeded("no answer")):
            for at in range(0, 4 * MIB, MIB):
                await data.write(at, bytes(MIB))
            await trio.testing.wait_all_tasks_blocked()
        await data.close()
    assert world.metadata.layout(data.ino).inode.size == 4 * MIB


async def test_small_files_ask_nothing() -> None:
    world = LocalWorld.make()
    limit(world, 100 * MIB)
    async with world.mount() as path:
        for size in (10, 16_000, 900_000):
            data = world.create(path)
            await data.write(0, bytes(size))
            await data.close()
    assert world.metadata.count(StatFs) == 0


async def test_overwriting_in_a_full_quota_is_free_and_asks_nothing() -> None:
    world = LocalWorld.make()
    limit(world, 4 * MIB)
    async with opened(world) as (_, data):
        assert await write_until_refused(data) == 4 * MIB
        await data.flush()
        asked = world.metadata.count(StatFs)
        for at in range(0, 4 * MIB, MIB):
            await data.write(at, b"x" * MIB)
        await data.flush()
        assert world.metadata.count(StatFs) == asked
        await data.close()


async def test_writing_goes_on_when_there_is_room_again() -> None:
    world = LocalWorld.make()
    limit(world, 2 * MIB)
    async with opened(world) as (_, data):
        assert await write_until_refused(data) == 2 * MIB
        limit(world, 3 * MIB)
        assert await write_until_refused(data) == 3 * MIB
        await data.truncate(MIB, caller=CALLER)
        assert await write_until_refused(data) == 3 * MIB
        limit(world, 0)
        assert await write_until_refused(data, most=6 * MIB) == 6 * MIB
        await data.close()


async def test_what_a_flush_was_refused_is_told_to_the_next_write_and_stored_when_there_is_room() -> None:
    """The bytes were taken before anybody knew: a small file, or one whose quota others have used up."""
    world = LocalWorld.make()
    async with opened(world) as (_, data):
        await data.write(0, bytes(100_000))
        limit(world, 50_000)
        with pytest.raises(QuotaExceeded):
            await data.flush()
        with pytest.raises(QuotaExceeded):
            await data.write(100_000, b"more")
        assert world.metadata.layout(data.ino).inode.allocated == 0
        limit(world, 200_000)
        await data.write(100_000, b"more")
        await data.flush()
        await data.close()
    assert await world.content(data.ino) == bytes(100_000) + b"more"


async def test_refused_bytes_of_a_closed_file_are_given_up_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    """And tried a bounded number of times until then."""
    world = LocalWorld.make()
    async with opened(world) as (path, data):
        limit(world, 5)
        await data.write(0, b"too long")
        with pytest.raises(QuotaExceeded):
            await data.close()
        await trio.sleep(300)
        assert not path.holds(data.ino)
        assert path.statistics().dirty == 0
        attempts = world.metadata.count(WriteInline) + world.metadata.count(CommitExtents)
        assert attempts < 15
        await trio.sleep(3000)
        assert world.metadata.count(WriteInline) + world.metadata.count(CommitExtents) == attempts


async def test_a_mount_that_is_full_of_refused_bytes_still_serves_others() -> None:
    """The refused bytes hold memory while their file is open; the budget has room for other files, and they flush."""
    world = LocalWorld.make()
    async with opened(world, budget_bytes=16 << 20) as (path, data):
        await data.write(0, bytes(900_000))
        limit(world, MIB)
        other = world.create(path)
        await other.write(0, bytes(200_000))
        await other.flush()
        with pytest.raises(QuotaExceeded):
            await data.flush()
        await other.write(0, bytes(200_000))
        await other.flush()
        await other.close()
        limit(world, 0)
        await data.close()


@pytest.mark.parametrize("end", ["truncated", "unlinked", "given up"])
async def test_blocks_of_refused_bytes_are_deleted_when_those_are_dropped(
    end: str, autojump_clock: trio.testing.MockClock
) -> None:
    world = LocalWorld.make()
    async with opened(world) as (_, data):
        limit(world, 5)
        await data.write(0, bytes(900_000))
        with pytest.raises(QuotaExceeded):
            await data.flush()
        assert len(world.blocks.blocks) == 1
        if end == "truncated":
            await data.truncate(0, caller=CALLER)
            await data.close()
        elif end == "unlinked":
            data.lost_name(nlink=0, ctime_ns=1)
            await data.close()
        else:
            with pytest.raises(QuotaExceeded):
                await data.close()
            await trio.sleep(300)
        await trio.testing.wait_all_tasks_blocked()
        assert world.blocks.blocks == {}
