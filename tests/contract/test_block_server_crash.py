"""Real block server processes, killed at random moments under load: what was acknowledged is so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from blockstore.protocol import (
    BLOCK_SIZE_MAX,
    CHECKSUM_UNIT,
    BlockId,
    DeleteBlocks,
    GetBlock,
    GetBlockDone,
    VerifyBlock,
)
from tests.support.block_cluster import ReportService, channel_to, put_request, report_service
from tests.support.block_server_process import server_process
from wire.checksum import first_bad_unit
from wire.errors import NoSuchBlock, OutcomeUnknown, StoreError, Unreachable
from wire.rpc.client import Channel

TIMEOUT_S = 20.0
WRITERS = 8
SIZES = (100, 4096, 20_000, 300_000, 1 << 20)


class Load:
    """Writers of blocks that nobody else writes, and what was acknowledged to them."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.kept: dict[BlockId, bytes] = {}
        self.unsure: dict[BlockId, bytes] = {}
        self.deleted: set[BlockId] = set()
        self.next_slice = 0

    async def write(self, channel: Channel) -> None:
        """Put and delete until the server is gone."""
        try:
            while True:
                await self._put(channel)
                if self.dice.random() < 0.3:
                    await self._delete(channel)
        except (OutcomeUnknown, Unreachable):
            return

    async def _put(self, channel: Channel) -> None:
        self.next_slice += 1
        block = BlockId(self.next_slice, 0)
        data = self.dice.randbytes(self.dice.choice(SIZES))
        self.unsure[block] = data
        await channel.call(put_request(block, data), payload=data, timeout_s=TIMEOUT_S, retry=False)
        self.kept[block] = self.unsure.pop(block)

    async def _delete(self, channel: Channel) -> None:
        if not self.kept:
            return
        block = self.dice.choice(sorted(self.kept))
        self.unsure[block] = self.kept.pop(block)
        await channel.call(DeleteBlocks((block,)), timeout_s=TIMEOUT_S, retry=False)
        del self.unsure[block]
        self.deleted.add(block)

    async def check(self, channel: Channel) -> None:
        for block, data in self.kept.items():
            assert await read(channel, block) == data
            await channel.call(VerifyBlock(block), timeout_s=TIMEOUT_S)
        for block in self.deleted:
            assert await read(channel, block) is None
        for block, data in self.unsure.items():
            found = await read(channel, block)
            assert found in (None, data)
            if found is not None:
                self.kept[block] = data
        self.unsure.clear()


async def read(channel: Channel, block: BlockId) -> bytes | None:
    try:
        reply, payload = await channel.call_for_payload(GetBlock(block, 0, BLOCK_SIZE_MAX), timeout_s=TIMEOUT_S)
    except NoSuchBlock:
        return None
    assert isinstance(reply, GetBlockDone)
    assert first_bad_unit(payload, reply.checksums, CHECKSUM_UNIT) is None
    return bytes(payload)


async def run_rounds(directory: Path, rounds: int, seed: int) -> Load:
    load = Load(random.Random(seed))
    async with report_service(ReportService()) as metadata_port:
        for _ in range(rounds):
            async with server_process(directory, metadata_port) as server, channel_to("127.0.0.1", server.port) as c:
                await load.check(c)
                async with trio.open_nursery() as nursery:
                    for _ in range(WRITERS):
                        nursery.start_soon(load.write, c)
                    # A random moment, not a wait for a condition: the moment is what is tested.
                    await trio.sleep(load.dice.uniform(0.02, 0.4))
                    await server.kill()
        async with server_process(directory, metadata_port) as server, channel_to("127.0.0.1", server.port) as c:
            await load.check(c)
    return load


async def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    load = await run_rounds(tmp_path, rounds=4, seed=1)
    assert len(load.kept) > 10, "the load was too small to show anything"
    assert load.deleted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
async def test_many_killed_servers_keep_what_they_acknowledged(tmp_path: Path, seed: int) -> None:
    await run_rounds(tmp_path, rounds=12, seed=seed)


async def test_a_killed_server_is_found_out_by_its_callers(tmp_path: Path) -> None:
    async with (
        report_service(ReportService()) as metadata_port,
        server_process(tmp_path, metadata_port) as server,
        channel_to("127.0.0.1", server.port) as channel,
    ):
        assert await read(channel, BlockId(1, 0)) is None
        await server.kill()
        with pytest.raises(StoreError):
            await channel.call(put_request(BlockId(1, 0), b"x"), payload=b"x", timeout_s=TIMEOUT_S, retry=False)
