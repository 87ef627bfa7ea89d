"""The block server over real sockets: every request of its protocol, registration, restarts."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from blockstore.protocol import (
    BLOCK_SIZE_MAX,
    CHECKSUM_UNIT,
    BlockId,
    BlockInfo,
    DeleteBlocks,
    GetBlock,
    GetBlockDone,
    GetStatus,
    ListBlocks,
    PutBlock,
    VerifyBlock,
)
from blockstore.server import run_block_server
from tests.support.block_cluster import (
    CLUSTER_ID,
    ReportService,
    block_server,
    put_request,
    report_service,
    server_config,
)
from wire.checksum import first_bad_unit
from wire.errors import (
    BlockCorrupt,
    BlockExists,
    InvalidArgument,
    NoSuchBlock,
    StaleEpoch,
    StoreError,
    WrongCluster,
    WrongVersion,
)
from wire.rpc.client import Channel

TIMEOUT_S = 20.0
ONE = BlockId(1, 0)


@asynccontextmanager
async def one_server(directory: Path) -> AsyncIterator[Channel]:
    async with report_service(ReportService()) as port, block_server(directory, port) as channel:
        yield channel


async def get(channel: Channel, block: BlockId, *, offset: int = 0, size: int = BLOCK_SIZE_MAX) -> bytes:
    """The units that came, verified as a client does."""
    reply, payload = await channel.call_for_payload(GetBlock(block, offset, size), timeout_s=TIMEOUT_S)
    assert isinstance(reply, GetBlockDone)
    assert first_bad_unit(payload, reply.checksums, CHECKSUM_UNIT) is None
    return bytes(payload)


async def put(channel: Channel, block: BlockId, data: bytes) -> None:
    await channel.call(put_request(block, data), payload=data, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, CHECKSUM_UNIT, CHECKSUM_UNIT + 1, 300_000, BLOCK_SIZE_MAX])
async def test_a_block_comes_back_as_it_was_put_also_after_a_restart(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, data)
        assert await get(channel, ONE) == data
    async with one_server(tmp_path) as channel:
        assert await get(channel, ONE) == data
        assert (await channel.call(VerifyBlock(ONE), timeout_s=TIMEOUT_S)).size == size


async def test_a_range_is_answered_with_the_units_that_cover_it(tmp_path: Path) -> None:
    data = os.urandom(5 * CHECKSUM_UNIT + 100)
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, data)
        for offset, size in ((0, 1), (CHECKSUM_UNIT - 1, 2), (3 * CHECKSUM_UNIT, 5), (len(data) - 1, 4096)):
            reply, payload = await channel.call_for_payload(GetBlock(ONE, offset, size), timeout_s=TIMEOUT_S)
            first, last = offset // CHECKSUM_UNIT, min((offset + size - 1) // CHECKSUM_UNIT, 5)
            assert (reply.offset, reply.block_size) == (first * CHECKSUM_UNIT, len(data))
            assert bytes(payload) == data[first * CHECKSUM_UNIT : (last + 1) * CHECKSUM_UNIT]
            assert len(reply.checksums) == 4 * (last - first + 1)
        with pytest.raises(InvalidArgument):
            await get(channel, ONE, offset=len(data))


async def test_the_same_put_again_succeeds_and_another_content_is_refused(tmp_path: Path) -> None:
    data = os.urandom(70_000)
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, data)
        await put(channel, ONE, data)
        with pytest.raises(BlockExists):
            await put(channel, ONE, data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BlockExists):
            await put(channel, ONE, data[:100])
        assert await get(channel, ONE) == data
        assert (await channel.call(GetStatus(), timeout_s=TIMEOUT_S)).block_count == 1


async def test_a_payload_that_does_not_match_its_checksums_is_refused(tmp_path: Path) -> None:
    data = os.urandom(40_000)
    request = put_request(ONE, data)
    async with one_server(tmp_path) as channel:
        with pytest.raises(BlockCorrupt):
            await channel.call(request, payload=data[:-1] + bytes([data[-1] ^ 1]), timeout_s=TIMEOUT_S)
        with pytest.raises(BlockCorrupt):
            await channel.call(PutBlock(ONE, 9, request.checksums[4:]), payload=data, timeout_s=TIMEOUT_S)
        with pytest.raises(InvalidArgument):
            await channel.call(PutBlock(ONE, 9, b""), payload=b"", timeout_s=TIMEOUT_S)
        with pytest.raises(NoSuchBlock):
            await get(channel, ONE)


async def test_deleted_blocks_are_gone_and_deleting_is_idempotent(tmp_path: Path) -> None:
    blocks = [BlockId(7, index) for index in range(5)]
    async with one_server(tmp_path) as channel:
        for block in blocks:
            await put(channel, block, bytes([block.index]) * 10_000)
        reply = await channel.call(DeleteBlocks((*blocks[:3], BlockId(99, 0))), timeout_s=TIMEOUT_S)
        assert reply.deleted_count == 3
        assert (await channel.call(DeleteBlocks(tuple(blocks[:3])), timeout_s=TIMEOUT_S)).deleted_count == 0
    async with one_server(tmp_path) as channel:
        for block in blocks[:3]:
            with pytest.raises(NoSuchBlock):
                await get(channel, block)
        for block in blocks[3:]:
            assert await get(channel, block) == bytes([block.index]) * 10_000


async def test_the_list_is_paged_in_order_and_whole(tmp_path: Path) -> None:
    blocks = [BlockId(slice_id, index) for slice_id in (1, 2, 1 << 40) for index in range(20)]
    async with one_server(tmp_path) as channel, trio.open_nursery() as nursery:
        for block in reversed(blocks):
            nursery.start_soon(put, channel, block, b"x" * (block.index + 1))
        # The nursery waits for them all.
        nursery.cancel_scope.deadline = trio.current_time() + TIMEOUT_S
    async with one_server(tmp_path) as channel:
        found: list[BlockInfo] = []
        while True:
            after = found[-1].block if found else None
            page = (await channel.call(ListBlocks(after, 7), timeout_s=TIMEOUT_S)).blocks
            found += page
            if len(page) < 7:
                break
        assert found == [BlockInfo(block, block.index + 1) for block in blocks]


async def test_an_old_epoch_is_refused_and_a_newer_one_makes_the_server_ask(tmp_path: Path) -> None:
    service = ReportService()
    async with report_service(service) as port, block_server(tmp_path, port) as channel:
        with pytest.raises(StaleEpoch):
            await channel.call(put_request(ONE, b"1", epoch=1), payload=b"1", timeout_s=TIMEOUT_S)
        service.raise_epoch()
        epoch = service.map.epoch
        with trio.fail_after(TIMEOUT_S):
            while (await channel.call(GetStatus(), timeout_s=TIMEOUT_S)).epoch < epoch:
                await channel.call(put_request(ONE, b"1", epoch=epoch), payload=b"1", timeout_s=TIMEOUT_S)
        assert service.heartbeats[-1].server_id == 1
        assert service.heartbeats[-1].space_total > 0
        assert service.heartbeats[-1].device


async def test_a_server_that_was_forgotten_registers_again_under_its_id(tmp_path: Path) -> None:
    service = ReportService()
    async with report_service(service) as port, block_server(tmp_path, port):
        service.forgetful = True
        service.registered = trio.Event()
        with trio.fail_after(TIMEOUT_S):
            await service.registered.wait()
        assert not service.forgetful
        assert service.ids.keys() == {json.loads((tmp_path / "identity").read_text())["uuid"]}


async def test_a_known_directory_is_served_without_an_inode_service(tmp_path: Path) -> None:
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, b"kept")
    unused_port = 1  # Nothing answers there.
    async with block_server(tmp_path, unused_port) as channel:
        assert await get(channel, ONE) == b"kept"


async def run_until_refused(directory: Path, metadata_port: int) -> None:
    with trio.fail_after(TIMEOUT_S):
        await run_block_server(server_config(directory, metadata_port))


async def test_a_directory_of_another_cluster_is_refused(tmp_path: Path) -> None:
    async with one_server(tmp_path):
        pass
    other = ReportService(cluster_id="another")
    async with report_service(other) as port:
        with pytest.raises(WrongCluster, match="another"):
            await run_until_refused(tmp_path, port)
    identity = json.loads((tmp_path / "identity").read_text())
    assert identity["cluster_id"] == CLUSTER_ID


async def test_a_second_server_on_one_directory_is_refused(tmp_path: Path) -> None:
    async with one_server(tmp_path) as channel:
        with pytest.raises(StoreError, match="another block server is running"):
            await run_until_refused(tmp_path, 1)
        await put(channel, ONE, b"still works")


async def test_a_directory_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    async with one_server(tmp_path):
        pass
    identity = json.loads((tmp_path / "identity").read_text())
    (tmp_path / "identity").write_text(json.dumps({**identity, "format": 2}))
    with pytest.raises(WrongVersion, match="has format 2"):
        await run_until_refused(tmp_path, 1)


async def test_blocks_without_an_identity_do_not_join_as_a_new_server(tmp_path: Path) -> None:
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, b"data")
    (tmp_path / "identity").unlink()
    with pytest.raises(StoreError, match="no identity file"):
        await run_until_refused(tmp_path, 1)


async def test_garbage_on_the_port_leaves_other_connections_alone(tmp_path: Path) -> None:
    async with one_server(tmp_path) as channel:
        await put(channel, ONE, b"before")
        host, port = channel.peer.rsplit(":", 1)
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(100_000), b"\0" * 5000):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                try:
                    await stream.send_all(garbage)
                    await stream.receive_some(1000)
                except trio.BrokenResourceError:
                    pass  # It was thrown out while still talking.
        assert await get(channel, ONE) == b"before"
