"""BlockClient against block services over real sockets: copies, hand-offs, fall-backs, and what must not happen."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import trio

from blockstore.client import BlockClient, PutResult
from blockstore.core.cluster_map import ClusterMap, Server, ServerState
from blockstore.core.placement import placement
from blockstore.protocol import BLOCK_SIZE_MAX, CHECKSUM_UNIT, BlockId, DeleteBlocks, GetBlock, PutBlock
from tests.support.memory_block_service import MemoryBlockService, memory_block_services, start
from wire.errors import BlockExists, DataLost, NoSpace, TooFewReplicas, Unreachable

BLOCK = BlockId(42, 3)


@dataclass
class World:
    """Services, the map that shows them, and a client."""

    services: dict[int, MemoryBlockService]
    map: ClusterMap
    newer: list[ClusterMap] = field(default_factory=list)
    reports: list[tuple[BlockId, int, bool]] = field(default_factory=list)
    refreshed: int = 0

    def __post_init__(self) -> None:
        self.client = BlockClient(
            current_map=lambda: self.map,
            refresh_map=self.refresh,
            report_bad_copy=lambda block, server_id, corrupt: self.reports.append((block, server_id, corrupt)),
        )

    async def refresh(self) -> ClusterMap:
        self.refreshed += 1
        if self.newer:
            self.map = self.newer.pop(0)
        return self.map

    def order(self, block: BlockId = BLOCK) -> list[MemoryBlockService]:
        return [self.services[server.server_id] for server in placement(self.map, block)]

    def with_states(self, states: dict[int, ServerState], epoch: int = 2) -> ClusterMap:
        servers = tuple(
            msgspec.structs.replace(s, state=states.get(s.server_id, ServerState.UP)) for s in self.map.servers
        )
        return msgspec.structs.replace(self.map, epoch=epoch, servers=servers)

    def set_state(self, service: MemoryBlockService, state: ServerState) -> None:
        self.map = self.with_states({service.server_id: state})


@asynccontextmanager
async def world(count: int) -> AsyncIterator[World]:
    async with memory_block_services(count) as services, trio.open_nursery() as nursery:
        servers = tuple(Server(s.server_id, "127.0.0.1", s.port) for s in services)
        made = World({s.server_id: s for s in services}, ClusterMap(1, "c", 64, servers))
        await nursery.start(run_client, made.client)
        yield made
        nursery.cancel_scope.cancel()


async def run_client(client: BlockClient, *, task_status: trio.TaskStatus[None]) -> None:
    await client.run(task_status=task_status)


def holders(services: Sequence[MemoryBlockService], block: BlockId = BLOCK) -> list[bool]:
    return [block in service.blocks for service in services]


async def get_all(world: World, size: int, block: BlockId = BLOCK) -> bytes:
    return bytes(await world.client.get(block, offset=0, size=size, replicas=2, timeout_s=5))


@pytest.mark.parametrize("size", [1, 100, CHECKSUM_UNIT, CHECKSUM_UNIT + 1, 1_000_000, BLOCK_SIZE_MAX])
async def test_what_was_put_can_be_got_in_any_part(size: int) -> None:
    data = os.urandom(size)
    async with world(3) as w:
        assert await w.client.put(BLOCK, [data[: size // 3], memoryview(data)[size // 3 :]], replicas=2) == PutResult(
            2, False
        )
        assert holders(w.order()) == [True, True, False]
        for offset, length in {(0, size), (size // 2, size - size // 2), (size - 1, 1), (0, 1)}:
            got = await w.client.get(BLOCK, offset=offset, size=length, replicas=2)
            assert got == data[offset : offset + length]


async def test_a_put_again_is_the_same_put_and_other_content_is_refused() -> None:
    async with world(2) as w:
        for _ in range(2):
            assert await w.client.put(BLOCK, b"first", replicas=2) == PutResult(2, False)
        with pytest.raises(BlockExists):
            await w.client.put(BLOCK, b"other", replicas=2)
        assert await get_all(w, 5) == b"first"


async def test_a_copy_is_handed_off_when_its_server_has_stopped() -> None:
    async with world(4) as w:
        first, second, third, fourth = w.order()
        first.stop()
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, True)
        assert holders([second, third, fourth]) == [True, True, False]
        assert await get_all(w, 4) == b"data"


async def test_a_down_server_gets_no_new_copies_but_is_read_at_last() -> None:
    async with world(3) as w:
        first, second, third = w.order()
        await w.client.put(BLOCK, b"data", replicas=1)
        w.set_state(first, ServerState.DOWN)
        assert await get_all(w, 4) == b"data"
        other = next(BlockId(1, n) for n in range(99) if w.order(BlockId(1, n))[0] is first)
        assert await w.client.put(other, b"x", replicas=2) == PutResult(2, True)
        assert holders([first, second, third], other) == [False, True, True]


async def test_a_draining_server_serves_and_takes_nothing_and_that_is_not_degraded() -> None:
    async with world(3) as w:
        first, second, third = w.order()
        await w.client.put(BLOCK, b"data", replicas=1)
        w.set_state(first, ServerState.DRAINING)
        assert await get_all(w, 4) == b"data"
        assert isinstance(first.requests[-1], GetBlock)
        other = next(BlockId(1, n) for n in range(99) if w.order(BlockId(1, n))[0] is first)
        assert await w.client.put(other, b"x", replicas=2) == PutResult(2, False)
        assert holders([first, second, third], other) == [False, True, True]


async def test_one_copy_of_two_is_enough_but_degraded_and_none_is_an_error() -> None:
    async with world(2) as w:
        first, second = w.order()
        first.stop()
        assert await w.client.put(BLOCK, b"data", replicas=2, timeout_s=5) == PutResult(1, True)
        second.stop()
        with pytest.raises(TooFewReplicas, match=r"block 7\.0: 0 of 2 copies.*server .: .*server .: "):
            await w.client.put(BlockId(7, 0), b"data", replicas=2, timeout_s=0.5)


async def test_two_copies_of_three_are_needed() -> None:
    async with world(3) as w:
        for service in w.order()[1:]:
            service.stop()
        with pytest.raises(TooFewReplicas, match="1 of 3 copies"):
            await w.client.put(BLOCK, b"data", replicas=3, timeout_s=0.5)


async def test_a_put_waits_for_a_server_that_restarts() -> None:
    async with world(1) as w, trio.open_nursery() as nursery:
        (service,) = w.order()
        service.stop()
        results = []

        async def put() -> None:
            results.append(await w.client.put(BLOCK, b"data", replicas=2, timeout_s=20))

        nursery.start_soon(put)
        while not w.client.statistics().failed_attempts:  # noqa: ASYNC110
            await trio.sleep(0.001)
        await nursery.start(start, service)
        while not results:  # noqa: ASYNC110
            await trio.sleep(0.001)
        assert results == [PutResult(1, True)]
        nursery.cancel_scope.cancel()


async def test_a_full_server_hands_off_and_full_servers_are_no_space() -> None:
    async with world(2) as w:
        first, second = w.order()
        first.space_bytes = 0
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(1, True)
        assert holders([first, second]) == [False, True]
        second.space_bytes = 0
        with pytest.raises(NoSpace):
            await w.client.put(BlockId(8, 0), b"data", replicas=2)


async def test_a_damaged_copy_is_not_returned_but_reported_and_another_read() -> None:
    data = os.urandom(3 * CHECKSUM_UNIT)
    async with world(3) as w:
        await w.client.put(BLOCK, data, replicas=2)
        first, second, _ = w.order()
        first.damage(BLOCK, CHECKSUM_UNIT + 5)
        assert await w.client.get(BLOCK, offset=0, size=10, replicas=2) == data[:10]  # Another unit is damaged.
        assert w.reports == []
        assert await w.client.get(BLOCK, offset=CHECKSUM_UNIT, size=10, replicas=2) == data[CHECKSUM_UNIT:][:10]
        assert w.reports == [(BLOCK, first.server_id, True)]
        second.damage(BLOCK, CHECKSUM_UNIT + 6)
        with pytest.raises(DataLost, match=r"block 42\.3: no good copy; server .*BlockCorrupt.*BlockCorrupt"):
            await w.client.get(BLOCK, offset=CHECKSUM_UNIT, size=10, replicas=2)


async def test_a_missing_copy_is_reported_only_where_it_should_be_and_only_if_the_block_exists() -> None:
    async with world(3) as w:
        await w.client.put(BLOCK, b"data", replicas=3)
        first, second, _ = w.order()
        del first.blocks[BLOCK], second.blocks[BLOCK]
        assert bytes(await w.client.get(BLOCK, offset=0, size=4, replicas=1)) == b"data"
        assert w.reports == [(BLOCK, first.server_id, False)]
        w.reports.clear()
        with pytest.raises(DataLost):
            await w.client.get(BlockId(999, 0), offset=0, size=4, replicas=2)
        assert w.reports == []


async def test_a_silent_server_costs_one_attempt_and_is_then_asked_last() -> None:
    async with world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        first, _ = w.order()
        first.silent = True
        begun = trio.current_time()
        got = await w.client.get(BLOCK, offset=0, size=4, replicas=2, timeout_s=1.5)
        assert bytes(got) == b"data"
        assert 0.3 < trio.current_time() - begun < 1.4
        asked = len(first.requests)
        begun = trio.current_time()
        assert await get_all(w, 4) == b"data"
        assert trio.current_time() - begun < 0.3
        assert len(first.requests) == asked
        assert w.reports == []


async def test_an_overloaded_server_is_asked_again_rather_than_passed_by() -> None:
    async with world(3) as w:
        first = w.order()[0]
        first.overloads_left = 2
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, False)


async def test_a_stale_epoch_is_refreshed() -> None:
    async with world(2) as w:
        for service in w.services.values():
            service.epoch = 2
        w.newer.append(w.with_states({}, epoch=2))
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, False)
        assert w.refreshed >= 1


async def test_reads_find_a_server_that_only_the_newer_map_shows() -> None:
    async with world(2) as w:
        whole = w.map
        await w.client.put(BLOCK, b"data", replicas=2)
        first, second = w.order()
        del first.blocks[BLOCK]
        w.map = msgspec.structs.replace(
            whole, servers=tuple(s for s in whole.servers if s.server_id == first.server_id)
        )
        w.newer.append(msgspec.structs.replace(whole, epoch=2))
        assert await get_all(w, 4) == b"data"
        assert holders([first, second]) == [False, True]


async def test_no_reachable_server_is_not_told_as_lost_data() -> None:
    async with world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        for service in w.order():
            service.stop()
        with pytest.raises(Unreachable, match=r"block 42\.3: no copy could be read in time; server"):
            await w.client.get(BLOCK, offset=0, size=4, replicas=2, timeout_s=0.5)


async def test_a_delete_reaches_every_server_and_says_when_it_did_not() -> None:
    ids = [BlockId(1, n) for n in range(10)]
    async with world(3) as w:
        for block in ids:
            await w.client.put(block, b"data", replicas=2)
        assert await w.client.delete(ids[:5]) is True
        assert all(not set(ids[:5]) & set(s.blocks) for s in w.services.values())
        assert sum(len(s.blocks) for s in w.services.values()) == 10
        w.order()[0].stop()
        assert await w.client.delete(ids[5:], timeout_s=2) is False
        assert all(not s.blocks for s in w.order()[1:])
        assert all(isinstance(r, PutBlock | DeleteBlocks) for s in w.services.values() for r in s.requests)


async def test_channels_close_when_their_server_leaves_the_map() -> None:
    async with world(3) as w:
        await w.client.put(BLOCK, b"data", replicas=3)
        assert w.client.statistics().channels == 3
        gone = w.order()[2]
        w.map = w.with_states({gone.server_id: ServerState.DEAD})
        await get_all(w, 4)
        assert w.client.statistics().channels == 2


async def test_a_request_beyond_the_block_is_refused_and_blames_no_copy() -> None:
    async with world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        with pytest.raises(DataLost, match="has 4 bytes"):
            await w.client.get(BLOCK, offset=0, size=5, replicas=2)
        assert w.reports == []


async def test_readers_of_many_blocks_spread_over_the_replicas() -> None:
    async with world(2) as w:
        ids = [BlockId(n, 0) for n in range(40)]
        for block in ids:
            await w.client.put(block, b"data", replicas=2)
        for service in w.services.values():
            service.requests.clear()
        for block in ids:
            await get_all(w, 4, block)
        assert all(len(service.requests) >= 8 for service in w.services.values())


async def test_good_operation_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with world(3) as w:
        w.order()[0].stop()
        await w.client.put(BLOCK, b"data", replicas=2)
        await get_all(w, 4)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
