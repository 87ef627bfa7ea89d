"""BlockClient against block servers over real sockets: copies, hand-offs, fall-backs, and what must not happen.

`any_world` tests run against real servers and against servers in memory; those with `memory_world` need a server that
behaves in a way a real one cannot be made to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from blockstore.client import PutResult
from blockstore.core.cluster_map import ClusterMap, ServerState
from blockstore.core.placement import placement
from blockstore.protocol import BLOCK_SIZE_MAX, CHECKSUM_UNIT, BlockId, GetBlock
from tests.support.client_world import BLOCK, MemoryService, Service, World, drop, memory_world, real_world
from tests.support.raw_peer import proxy
from tests.support.rpc_service import wait_until
from wire.checksum import Buffer
from wire.errors import BlockExists, DataLost, NoSpace, TooFewReplicas, Unreachable

Make = Callable[[int], AbstractAsyncContextManager[World]]


@pytest.fixture(params=["memory", "real"])
def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return memory_world
    return partial(real_world, directory=tmp_path)


def lead(cluster_map: ClusterMap, block: BlockId) -> set[int]:
    """The first two servers of a block."""
    return {server.server_id for server in placement(cluster_map, block)[:2]}


def memory(service: Service) -> MemoryService:
    assert isinstance(service, MemoryService)
    return service


@pytest.mark.parametrize("size", [1, CHECKSUM_UNIT, CHECKSUM_UNIT + 1, BLOCK_SIZE_MAX])
async def test_what_was_put_can_be_got_in_any_part(any_world: Make, size: int) -> None:
    data = os.urandom(size)
    async with any_world(3) as w:
        pieces: list[Buffer] = [data[: size // 3], memoryview(data)[size // 3 :]]
        assert await w.client.put(BLOCK, pieces, replicas=2) == PutResult(2, False)
        assert await w.holders() == [True, True, False]
        for offset, length in {(0, size), (size // 2, size - size // 2), (size - 1, 1), (0, 1)}:
            got = await w.client.get(BLOCK, offset=offset, size=length, replicas=2)
            assert got == data[offset : offset + length]


async def test_a_put_again_is_the_same_put_and_other_content_is_refused(any_world: Make) -> None:
    async with any_world(2) as w:
        for _ in range(2):
            assert await w.client.put(BLOCK, b"first", replicas=2) == PutResult(2, False)
        with pytest.raises(BlockExists):
            await w.client.put(BLOCK, b"other", replicas=2)
        assert await w.get(5) == b"first"


async def test_a_copy_is_handed_off_when_its_server_has_stopped(any_world: Make) -> None:
    async with any_world(4) as w:
        first = w.order()[0]
        await first.stop()
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, True)
        assert await w.get(4) == b"data"
        await first.start()
        assert await w.holders() == [False, True, True, False]
        assert await w.get(4) == b"data"


async def test_a_down_server_gets_no_new_copies_but_is_read_at_last(any_world: Make) -> None:
    async with any_world(3) as w:
        first = w.order()[0]
        await w.client.put(BLOCK, b"data", replicas=1)
        w.set_state(first, ServerState.DOWN)
        assert await w.get(4) == b"data"
        other = w.block_led_by(first)
        assert await w.client.put(other, b"x", replicas=2) == PutResult(2, True)
        assert await w.holders(other) == [False, True, True]


async def test_a_draining_server_serves_and_takes_nothing_and_that_is_not_degraded() -> None:
    async with memory_world(3) as w:
        first = memory(w.order()[0])
        await w.client.put(BLOCK, b"data", replicas=1)
        w.set_state(first, ServerState.DRAINING)
        assert await w.get(4) == b"data"
        assert isinstance(first.requests[-1], GetBlock)
        other = w.block_led_by(first)
        assert await w.client.put(other, b"x", replicas=2) == PutResult(2, False)
        assert await w.holders(other) == [False, True, True]


async def test_one_copy_of_two_is_enough_but_degraded_and_none_is_an_error() -> None:
    async with memory_world(2) as w:
        first, second = w.order()
        await first.stop()
        assert await w.client.put(BLOCK, b"data", replicas=2, timeout_s=5) == PutResult(1, True)
        await second.stop()
        with pytest.raises(TooFewReplicas, match=r"block 7\.0: 0 of 2 copies.*server .: .*server .: "):
            await w.client.put(BlockId(7, 0), b"data", replicas=2, timeout_s=0.5)


async def test_two_copies_of_three_are_needed() -> None:
    async with memory_world(3) as w:
        for service in w.order()[1:]:
            await service.stop()
        with pytest.raises(TooFewReplicas, match="1 of 3 copies"):
            await w.client.put(BLOCK, b"data", replicas=3, timeout_s=0.5)


async def test_a_put_waits_for_a_server_that_restarts(any_world: Make) -> None:
    async with any_world(1) as w, trio.open_nursery() as nursery:
        (service,) = w.order()
        await service.stop()
        results: list[PutResult] = []

        async def put() -> None:
            results.append(await w.client.put(BLOCK, b"data", replicas=2, timeout_s=20))

        nursery.start_soon(put)
        await wait_until(lambda: w.client.statistics().failed_attempts > 0)
        assert results == []
        await service.start()
        await wait_until(lambda: bool(results), 20)
        assert results == [PutResult(1, True)]


async def test_a_full_server_hands_off_and_full_servers_are_no_space() -> None:
    async with memory_world(2) as w:
        first, second = map(memory, w.order())
        first.space_bytes = 0
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(1, True)
        assert await w.holders() == [False, True]
        second.space_bytes = 0
        with pytest.raises(NoSpace):
            await w.client.put(BlockId(8, 0), b"data", replicas=2)


async def test_a_damaged_copy_is_not_returned_but_reported_and_another_read(any_world: Make) -> None:
    data = os.urandom(3 * CHECKSUM_UNIT)
    async with any_world(3) as w:
        await w.client.put(BLOCK, data, replicas=2)
        first, second, _ = w.order()
        first.damage(data, CHECKSUM_UNIT + 5)
        assert await w.client.get(BLOCK, offset=0, size=10, replicas=2) == data[:10]  # Another unit is damaged.
        assert w.reports == []
        assert await w.client.get(BLOCK, offset=CHECKSUM_UNIT, size=10, replicas=2) == data[CHECKSUM_UNIT:][:10]
        assert w.reports == [(BLOCK, first.server_id, True)]
        second.damage(data, CHECKSUM_UNIT + 6)
        with pytest.raises(DataLost, match=r"block 42\.3: no good copy; server .*BlockCorrupt.*BlockCorrupt"):
            await w.client.get(BLOCK, offset=CHECKSUM_UNIT, size=10, replicas=2)


async def test_a_missing_copy_is_reported_only_where_it_should_be_and_only_if_the_block_exists(any_world: Make) -> None:
    async with any_world(3) as w:
        await w.client.put(BLOCK, b"data", replicas=3)
        first, second, _ = w.order()
        await drop(first, BLOCK)
        await drop(second, BLOCK)
        assert bytes(await w.client.get(BLOCK, offset=0, size=4, replicas=1)) == b"data"
        assert w.reports == [(BLOCK, first.server_id, False)]
        w.reports.clear()
        with pytest.raises(DataLost):
            await w.client.get(BlockId(999, 0), offset=0, size=4, replicas=2)
        assert w.reports == []


async def test_requests_to_a_hanging_server_end_when_the_map_says_that_it_is_down() -> None:
    async with memory_world(3) as w, trio.open_nursery() as nursery:
        other = BlockId(BLOCK.slice_id, BLOCK.index + 1)
        await w.client.put(BLOCK, b"data", replicas=2)
        first = memory(w.order()[0])
        first.silent = True
        done: list[object] = []

        async def put() -> None:
            done.append(await w.client.put(other, b"more", replicas=3))

        async def get() -> None:
            done.append(bytes(await w.get(4)))

        began = trio.current_time()
        nursery.start_soon(put)
        nursery.start_soon(get)
        await wait_until(lambda: len(first.requests) >= 3)
        w.map = w.with_states({first.server_id: ServerState.DOWN})
        w.told.set()
        await wait_until(lambda: len(done) == 2)
        assert trio.current_time() - began < 1.5
        assert {b"data", PutResult(2, True)} == set(done)


async def test_a_silent_server_costs_one_attempt_and_is_then_asked_last() -> None:
    async with memory_world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        first = memory(w.order()[0])
        first.silent = True
        begun = trio.current_time()
        got = await w.client.get(BLOCK, offset=0, size=4, replicas=2, timeout_s=1.5)
        assert bytes(got) == b"data"
        assert 0.3 < trio.current_time() - begun < 1.4
        asked = len(first.requests)
        begun = trio.current_time()
        assert await w.get(4) == b"data"
        assert trio.current_time() - begun < 0.3
        assert len(first.requests) == asked
        assert w.reports == []


async def test_an_overloaded_server_is_asked_again_rather_than_passed_by() -> None:
    async with memory_world(3) as w:
        memory(w.order()[0]).overloads_left = 2
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, False)


async def test_a_stale_epoch_is_refreshed() -> None:
    async with memory_world(2) as w:
        for service in w.services.values():
            memory(service).epoch = w.map.epoch + 1
        w.newer.append(w.with_states({}))
        assert await w.client.put(BLOCK, b"data", replicas=2) == PutResult(2, False)
        assert w.refreshed >= 1


async def test_reads_find_a_server_that_only_the_newer_map_shows() -> None:
    async with memory_world(2) as w:
        whole = w.map
        await w.client.put(BLOCK, b"data", replicas=2)
        first = w.order()[0]
        await drop(first, BLOCK)
        alone = tuple(s for s in whole.servers if s.server_id == first.server_id)
        w.map = msgspec.structs.replace(whole, servers=alone)
        w.newer.append(msgspec.structs.replace(whole, epoch=whole.epoch + 1))
        assert await w.get(4) == b"data"


async def test_no_reachable_server_is_not_told_as_lost_data(any_world: Make) -> None:
    async with any_world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        for service in w.order():
            await service.stop()
        with pytest.raises(Unreachable, match=r"block 42\.3: no copy could be read in time; server"):
            await w.client.get(BLOCK, offset=0, size=4, replicas=2, timeout_s=0.5)


async def test_a_server_of_another_cluster_at_the_old_address_takes_nothing(any_world: Make) -> None:
    async with any_world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        first, second = w.order()
        for service in (first, second):
            await service.stop()
        first.port, second.port = second.port, first.port
        for service in (first, second):
            await service.start()
        with pytest.raises(TooFewReplicas, match="this is about"):
            await w.client.put(BlockId(9, 9), b"data", replicas=2, timeout_s=1)
        assert await w.holders(BlockId(9, 9)) == [False, False]
        with pytest.raises(Unreachable, match="this is about"):
            await w.client.get(BLOCK, offset=0, size=4, replicas=2, timeout_s=1)
        assert w.reports == []


async def test_a_delete_reaches_every_server_and_says_when_it_did_not(any_world: Make) -> None:
    ids = [BlockId(1, n) for n in range(10)]
    async with any_world(3) as w:
        for block in ids:
            await w.client.put(block, b"data", replicas=2)
        assert await w.client.delete(ids[:5]) is True
        assert [sum(await w.holders(block)) for block in ids] == [0] * 5 + [2] * 5
        stopped = w.order(ids[5])[0]
        await stopped.stop()
        assert await w.client.delete(ids[5:], timeout_s=2) is False
        await stopped.start()
        assert await w.holders(ids[5]) == [True, False, False]
        assert await w.client.delete(ids[5:]) is True
        assert [sum(await w.holders(block)) for block in ids] == [0] * 10


async def test_channels_close_when_their_server_leaves_the_map() -> None:
    async with memory_world(3) as w:
        await w.client.put(BLOCK, b"data", replicas=3)
        assert w.client.statistics().channels == 3
        gone = w.order()[2]
        w.map = w.with_states({gone.server_id: ServerState.DEAD})
        await w.get(4)
        assert w.client.statistics().channels == 2


async def test_a_request_beyond_the_block_is_refused_and_blames_no_copy(any_world: Make) -> None:
    async with any_world(2) as w:
        await w.client.put(BLOCK, b"data", replicas=2)
        with pytest.raises(DataLost, match="has 4 bytes"):
            await w.client.get(BLOCK, offset=0, size=5, replicas=2)
        assert w.reports == []


async def test_readers_of_many_blocks_spread_over_the_replicas() -> None:
    async with memory_world(2) as w:
        ids = [BlockId(n, 0) for n in range(40)]
        for block in ids:
            await w.client.put(block, b"data", replicas=2)
        for service in w.services.values():
            memory(service).requests.clear()
        for block in ids:
            await w.get(4, block)
        assert all(len(memory(service).requests) >= 8 for service in w.services.values())


async def test_a_large_cluster_costs_channels_only_to_the_servers_that_are_used() -> None:
    async with memory_world(2) as w:
        more = tuple(msgspec.structs.replace(w.map.servers[0], server_id=n) for n in range(100, 120))
        servers = (*w.map.servers, *more)
        w.map = msgspec.structs.replace(w.map, epoch=w.map.epoch + 1, group_count=1 << 14, servers=servers)
        block = next(b for b in (BlockId(n, 0) for n in range(10**6)) if {1, 2} == lead(w.map, b))
        assert await w.client.put(block, b"data", replicas=2) == PutResult(2, False)
        assert await w.get(4, block) == b"data"
        assert w.client.statistics().channels == 2


@pytest.mark.parametrize("seed", range(3))
async def test_bits_flipped_on_the_way_never_reach_a_reader_nor_a_disk(seed: int) -> None:
    chance = random.Random(seed)
    flips = 0

    def treat(data: bytes) -> bytes:
        nonlocal flips
        if chance.random() > 0.05:
            return data
        flips += 1
        damaged = bytearray(data)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        return bytes(damaged)

    async with memory_world(2) as w, contextlib.AsyncExitStack() as stack:
        servers = [
            msgspec.structs.replace(server, port=await stack.enter_async_context(proxy(server.port, treat)))
            for server in w.map.servers
        ]
        w.map = msgspec.structs.replace(w.map, epoch=w.map.epoch + 1, servers=tuple(servers))
        sent: dict[BlockId, bytes] = {}
        written: dict[BlockId, bytes] = {}
        for number in range(30):
            block, data = BlockId(number, 0), chance.randbytes(200_000)
            sent[block] = data
            with contextlib.suppress(TooFewReplicas):
                await w.client.put(block, data, replicas=2, timeout_s=5)
                written[block] = data
        good = 0
        for block, data in written.items():
            with contextlib.suppress(DataLost, Unreachable):
                assert await w.client.get(block, offset=0, size=len(data), replicas=2, timeout_s=5) == data
                good += 1
        assert flips > 5
        assert good > 20
        for service in w.services.values():
            assert all(sent[block] == data for block, (data, _) in memory(service).blocks.items())


async def test_good_operation_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with memory_world(3) as w:
        await w.order()[0].stop()
        await w.client.put(BLOCK, b"data", replicas=2)
        await w.get(4)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("seed", [1, 2])
async def test_what_a_put_acknowledged_stays_readable_while_servers_come_and_go(any_world: Make, seed: int) -> None:
    """One of four servers at a time is stopped and started again; no block is lost, none comes out wrong."""
    chance = random.Random(seed)
    async with any_world(4) as w, trio.open_nursery() as nursery:
        written: dict[BlockId, bytes] = {}
        done = trio.Event()

        async def come_and_go() -> None:
            while not done.is_set():
                service = chance.choice(list(w.services.values()))
                await service.stop()
                await trio.sleep(0.02 * chance.random())
                if isinstance(service, MemoryService):
                    service.overloads_left = chance.randrange(2)
                await service.start()
                await trio.sleep(0.02 * chance.random())

        async def write_and_read(writer: int) -> None:
            for number in range(12):
                block = BlockId(writer, number)
                data = chance.randbytes(chance.choice([1, 5000, 300_000]))
                result = await w.client.put(block, data, replicas=2)
                assert result.copies in (1, 2)
                written[block] = data
                known = chance.choice(list(written))
                expected = written[known]
                got = await w.client.get(known, offset=0, size=len(expected), replicas=2)
                assert got == expected

        nursery.start_soon(come_and_go)
        async with trio.open_nursery() as writers:
            for writer in range(4):
                writers.start_soon(write_and_read, writer)
        done.set()
