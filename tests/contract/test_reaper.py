"""The reaper with a real inode service and real block servers: what nobody refers to goes, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from blockstore.client import BlockClient
from blockstore.protocol import BlockId, ListBlocks
from blockstore.server import BlockServerConfig, run_block_server
from metadata.client import MetadataClient
from metadata.core import reclaim
from metadata.core.namespace import inodes
from metadata.core.schema import Extent
from metadata.engine.ports import WriteTxn
from metadata.protocol import CommitExtents, Create, GetClusterStatus, SetAttr, SetAttrMask, Unlink
from tests.support.inode_service import Service, running_service
from wire.rpc.client import Channel

MODE = 0o100644
SIZE = 5 << 20


class World:
    """An inode service, block servers that can be stopped, and one client of all."""

    def __init__(self, nursery: trio.Nursery, base: Path, service: Service, client: MetadataClient) -> None:
        self.nursery, self.base, self.service, self.client = nursery, base, service, client
        self.ports: dict[int, int] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.blocks = BlockClient(
            current_map=lambda: client.map, refresh_map=client.refresh_map, report_bad_copy=client.report_bad_copy
        )

    async def start_server(self, number: int) -> None:
        await self.nursery.start(self._run_server, number)

    async def _run_server(self, number: int, *, task_status: trio.TaskStatus[None]) -> None:
        config = BlockServerConfig(
            directory=self.base / f"block{number}",
            host="127.0.0.1",
            port=self.ports.get(number, 0),
            advertise_host="127.0.0.1",
            metadata_host="127.0.0.1",
            metadata_port=self.service.port,
        )
        with trio.CancelScope() as self.scopes[number]:
            async with trio.open_nursery() as nursery:
                _, self.ports[number] = await nursery.start(run_block_server, config)
                task_status.started()

    async def stored(self, number: int) -> set[BlockId]:
        """The blocks on one server."""
        async with trio.open_nursery() as nursery:
            channel = Channel("127.0.0.1", self.ports[number], service="block")
            await nursery.start(channel.run)
            listed = await channel.call(ListBlocks(None), timeout_s=5)
            nursery.cancel_scope.cancel()
        return {info.block for info in listed.blocks}

    async def write_file(self, name: bytes) -> tuple[int, int]:
        """A file of two blocks; its inode and its slice."""
        made = await self.client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))
        slice_id = await self.client.allocate_slice()
        await self.blocks.put(BlockId(slice_id, 0), bytes(4 << 20), replicas=2)
        await self.blocks.put(BlockId(slice_id, 1), bytes(1 << 20), replicas=2)
        await self.client.mutate(
            lambda s, q: CommitExtents(s, q, made.ino, (Extent(0, SIZE, slice_id, 0),), ((slice_id, SIZE),), SIZE, 0)
        )
        return made.ino, slice_id

    async def queue_size(self) -> int:
        status = await self.client._channel.call(GetClusterStatus(), timeout_s=5)
        return status.deletion_queue


@asynccontextmanager
async def world_of_two(tmp_path: Path) -> AsyncIterator[World]:
    async with (
        running_service(tmp_path / "metadata", server_down_after_s=0.5, delete_after_s=0.0) as service,
        service.client() as client,
        trio.open_nursery() as nursery,
    ):
        world = World(nursery, tmp_path, service, client)
        await nursery.start(world.blocks.run)
        await world.start_server(1)
        await world.start_server(2)
        with trio.fail_after(5):
            while len(client.map.servers) < 2:  # noqa: ASYNC110  (brought by the client's long poll)
                await trio.sleep(0.01)
        yield world
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 15.0) -> None:
    with trio.fail_after(timeout_s):
        while not await condition():  # noqa: ASYNC110  (conditions of other tasks)
            await trio.sleep(0.02)


async def test_blocks_of_removed_files_go_from_all_servers_and_others_stay(tmp_path: Path) -> None:
    async with world_of_two(tmp_path) as world:
        ino, _ = await world.write_file(b"dead")
        _, kept = await world.write_file(b"kept")
        await world.client.mutate(lambda s, q: Unlink(s, q, 1, b"dead", ino))

        async def is_gone() -> bool:
            return await world.queue_size() == 0

        await until(is_gone)
        for number in (1, 2):
            assert await world.stored(number) == {BlockId(kept, 0), BlockId(kept, 1)}


async def test_a_server_that_was_away_is_cleaned_when_it_is_back_also_after_a_restart(tmp_path: Path) -> None:
    async with world_of_two(tmp_path) as world:
        ino, _ = await world.write_file(b"dead")
        world.scopes[2].cancel()
        await world.client.mutate(lambda s, q: Unlink(s, q, 1, b"dead", ino))

        async def is_gone_from_the_first() -> bool:
            return await world.stored(1) == set()

        await until(is_gone_from_the_first)
        assert await world.queue_size() == 1, "the second server has not confirmed"
        await world.service.stop()
        await world.service.start()
        await world.start_server(2)

        async def is_gone() -> bool:
            return await world.queue_size() == 0 and await world.stored(2) == set()

        await until(is_gone)


async def test_blocks_of_truncated_and_overwritten_bytes_go(tmp_path: Path) -> None:
    async with world_of_two(tmp_path) as world:
        ino, _ = await world.write_file(b"f")
        await world.client.mutate(lambda s, q: SetAttr(s, q, ino, SetAttrMask.SIZE, size=0))

        async def is_gone() -> bool:
            return await world.queue_size() == 0 and await world.stored(1) == set()

        await until(is_gone)
        assert await world.stored(2) == set()


async def test_one_item_that_cannot_be_taken_apart_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of so many extents that it is taken apart in steps, and a bug that strikes at another one."""
    bad: list[int] = []

    def delete_keys(txn: WriteTxn, ino: int, *, limit: int, now_ns: int) -> bool:
        assert ino not in bad, "planted"
        return inodes.delete_keys(txn, ino, limit=limit, now_ns=now_ns)

    monkeypatch.setattr(reclaim, "delete_keys", delete_keys)
    async with running_service(tmp_path / "metadata") as service, service.client() as client:
        inos = []
        for name in (b"bad", b"good"):
            made = await client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))  # noqa: B023
            slice_id = await client.allocate_slice()
            extents = tuple(Extent(2 * n, 1, slice_id, 2 * n) for n in range(2000))
            await client.mutate(lambda s, q: CommitExtents(s, q, made.ino, extents, ((slice_id, 4000),), 0, 0))  # noqa: B023
            inos.append(made.ino)
        bad.append(inos[0])
        for name, ino in zip((b"bad", b"good"), inos, strict=True):
            await client.mutate(lambda s, q: Unlink(s, q, 1, name, ino))  # noqa: B023

        async def only_the_bad_one_is_left() -> bool:
            status = await client._channel.call(GetClusterStatus(), timeout_s=5)
            return status.deletion_queue == 2  # The bad inode, and the good one's slice: there is no block server.

        await until(only_the_bad_one_is_left)
