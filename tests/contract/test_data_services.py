"""What the data path relies on, kept by the real services on loopback and by the ones its fast tests run on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from fsd.ports import BlockPort, MetadataPort
from metadata.core.schema import ROOT_INO, Extent
from metadata.protocol import CommitExtents, Create, GetLayout, WriteInline
from tests.support.local_services import LocalWorld
from tests.support.real_services import real_services
from wire.checksum import Buffer
from wire.errors import BlockExists, DataLost, InvalidArgument, MovedOutOfLine, NoSuchEntry, StoreError


@asynccontextmanager
async def services(kind: str, directory: Path) -> AsyncIterator[tuple[MetadataPort, BlockPort]]:
    if kind == "local":
        world = LocalWorld.make()
        yield world.metadata, world.blocks
        return
    async with real_services(directory) as cluster, cluster.clients(b"/mnt") as clients:
        yield clients


@pytest.fixture(params=["local", "real"])
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


async def test_a_block_is_what_was_put(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, blocks):
        block = BlockId(await metadata.allocate_slice(), 0)
        content = bytes(range(256)) * 300
        parts: list[Buffer] = [content[:1000], bytearray(content[1000:5000]), memoryview(content)[5000:]]
        result = await blocks.put(block, parts, replicas=2)
        assert (result.copies, result.degraded) == (2, False)
        for offset, size in [(0, len(content)), (16384, 16384), (70_000, 6_800), (5, 1)]:
            assert await blocks.get(block, offset=offset, size=size, replicas=2) == content[offset : offset + size]
        largest = BlockId(block.slice_id, 1)
        await blocks.put(largest, bytes(BLOCK_SIZE_MAX), replicas=2)
        assert len(await blocks.get(largest, offset=0, size=BLOCK_SIZE_MAX, replicas=2)) == BLOCK_SIZE_MAX


async def test_a_block_is_put_twice_only_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, blocks):
        block = BlockId(await metadata.allocate_slice(), 0)
        await blocks.put(block, b"one", replicas=2)
        await blocks.put(block, [b"on", b"e"], replicas=2)
        with pytest.raises(BlockExists):
            await blocks.put(block, b"two", replicas=2)
        assert bytes(await blocks.get(block, offset=0, size=3, replicas=2)) == b"one"


async def test_a_block_that_is_nowhere_is_lost(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, blocks):
        block = BlockId(await metadata.allocate_slice(), 0)
        with pytest.raises(DataLost):
            await blocks.get(block, offset=0, size=3, replicas=2, timeout_s=5)
        await blocks.put(block, b"one", replicas=2)
        assert await blocks.delete([block])
        with pytest.raises(DataLost):
            await blocks.get(block, offset=0, size=3, replicas=2, timeout_s=5)


async def test_a_read_beyond_the_block_is_refused(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, blocks):
        block = BlockId(await metadata.allocate_slice(), 0)
        await blocks.put(block, b"x" * 100, replicas=2)
        with pytest.raises(StoreError):
            await blocks.get(block, offset=0, size=101, replicas=2, timeout_s=5)


async def test_slices_are_never_given_out_twice(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, _):
        ids = [await metadata.allocate_slice() for _ in range(600)]
        assert len(set(ids)) == 600


async def test_a_slice_is_committed_once_and_a_refusal_changes_nothing(kind: str, tmp_path: Path) -> None:
    async with services(kind, tmp_path) as (metadata, blocks):
        made = await metadata.mutate(
            lambda session, sequence: Create(session, sequence, ROOT_INO, b"f", 0o100644, exclusive=True)
        )
        slice_id, ino = await metadata.allocate_slice(), made.ino
        await blocks.put(BlockId(slice_id, 0), b"0123456789", replicas=2)

        def commit(session: int, sequence: int) -> CommitExtents:
            return CommitExtents(
                session,
                sequence,
                ino,
                extents=(Extent(0, 10, slice_id, 0),),
                slice_sizes=((slice_id, 10),),
                size_min=10,
                mtime_ns=5,
            )

        reply = await metadata.mutate(commit)
        assert (reply.inode.size, reply.inode.mtime_ns) == (10, 5)
        assert reply.inode.data_version == made.inode.data_version + 1
        with pytest.raises(InvalidArgument):
            await metadata.mutate(commit)
        with pytest.raises(MovedOutOfLine):
            await metadata.mutate(lambda session, sequence: WriteInline(session, sequence, ino, 0, b"x", 0))
        layout = await metadata.ask(lambda session: GetLayout(session, ino))
        assert layout.inode == reply.inode
        assert layout.extents == (Extent(0, 10, slice_id, 0),)
        with pytest.raises(NoSuchEntry):
            await metadata.ask(lambda session: GetLayout(session, 999))
