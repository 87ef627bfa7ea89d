"""What FileData promises, against the real namespace code and blocks in memory."""

from __future__ import annotations

import pytest

from blockstore.protocol import BLOCK_SIZE_MAX
from metadata.protocol import Caller, CommitExtents, GetLayout, WriteInline
from tests.support.local_services import LocalWorld

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
    assert world.blocks.puts_at_once > 2
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
