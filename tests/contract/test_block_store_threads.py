"""The block store with its threads: writers, deleters and readers at once, each answer held against what may be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from blockstore.protocol import BLOCK_SIZE_MAX, CHECKSUM_UNIT, BlockId
from blockstore.reader import Units
from blockstore.store import BlockStore, open_store
from blockstore.writer import Writer
from wire.checksum import first_bad_unit, unit_checksums
from wire.errors import NoSuchBlock, ServerOverloaded

SIZES = (100, 4096, 20_000, 70_000, 300_000)
SEGMENT_SIZE = 6 << 20


class Traffic:
    """Blocks that come and go; a block's bytes follow from its id."""

    def __init__(self, store: BlockStore, seed: int) -> None:
        self.store = store
        self.dice = random.Random(seed)
        self.base = self.dice.randbytes(SIZES[-1] + 256)
        self.next_slice = 0
        self.stored: set[BlockId] = set()  # Acknowledged, and no delete begun.
        self.going: set[BlockId] = set()  # Delete begun, perhaps finished.
        self.reads = 0

    def data(self, block: BlockId) -> bytes:
        size = SIZES[block.slice_id % len(SIZES)]
        start = block.slice_id % 256
        return self.base[start : start + size]

    async def write(self, count: int) -> None:
        for _ in range(count):
            self.next_slice += 1
            block = BlockId(self.next_slice, 0)
            data = self.data(block)
            await self.store.put(block, unit_checksums(data, CHECKSUM_UNIT), data)
            self.stored.add(block)

    async def delete(self, stop: trio.Event) -> None:
        while not stop.is_set():
            chosen = self.dice.sample(sorted(self.stored), min(len(self.stored), self.dice.randint(0, 8)))
            self.stored.difference_update(chosen)
            self.going.update(chosen)
            counts: list[int] = []

            async def once(blocks: list[BlockId] = chosen, counts: list[int] = counts) -> None:
                counts.append(await self.store.delete(blocks))

            async with trio.open_nursery() as nursery:  # As a retry that overtakes the first request.
                nursery.start_soon(once)
                await trio.sleep(self.dice.choice([0, 0.001]))
                nursery.start_soon(once)
            assert sum(counts) == len(chosen)
            for block in chosen:
                with pytest.raises(NoSuchBlock):
                    await self.store.get(block, offset=0, size=1)

    async def read(self, stop: trio.Event) -> None:
        while not stop.is_set():
            await trio.lowlevel.checkpoint()
            known = [*self.stored, *list(self.going)[-20:]]
            if known:
                await self.read_one(self.dice.choice(known))

    async def read_one(self, block: BlockId) -> None:
        offset = self.dice.randrange(len(self.data(block)))
        try:
            units = self.store.get_nowait(block, offset=offset, size=self.dice.choice([1, 5000, BLOCK_SIZE_MAX]))
            if units is None:
                units = await self.store.get(block, offset=offset, size=BLOCK_SIZE_MAX)
        except NoSuchBlock:
            assert block in self.going
            return
        self.reads += 1
        self.check(block, units)

    def check(self, block: BlockId, units: Units) -> None:
        """Also a block that is being deleted is read whole or not at all."""
        assert first_bad_unit(units.data, units.checksums, CHECKSUM_UNIT) is None
        assert units.data == self.data(block)[units.offset : units.offset + len(units.data)]


async def run_traffic(directory: Path, seed: int, puts: int) -> Traffic:
    store = await open_store(directory, segment_size_max=SEGMENT_SIZE)
    traffic = Traffic(store, seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        stop = trio.Event()
        for work in (traffic.delete, traffic.delete, traffic.read, traffic.read):
            nursery.start_soon(work, stop)
        async with trio.open_nursery() as writers:
            for _ in range(6):
                writers.start_soon(traffic.write, puts)
        stop.set()
        nursery.cancel_scope.cancel()
    return traffic


@pytest.mark.parametrize("seed", range(2))
async def test_readers_never_see_the_holes_of_deleted_blocks(tmp_path: Path, seed: int) -> None:
    with trio.fail_after(60):
        traffic = await run_traffic(tmp_path, seed, puts=60)
    assert traffic.reads > 100
    store = await open_store(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for block in traffic.stored:
            traffic.check(block, await store.get(block, offset=0, size=BLOCK_SIZE_MAX))
        listed = {block for block, _ in await store.list_page(None, 1 << 20)}
        assert traffic.stored <= listed <= traffic.stored | traffic.going
        assert store.figures().block_count == len(listed)
        nursery.cancel_scope.cancel()


async def test_a_full_queue_refuses_and_takes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockstore.store.QUEUE_COUNT_MAX", 4)
    store = await open_store(tmp_path)
    outcomes: list[object] = []
    for number in range(4):  # Nobody works on them yet.
        store.put_nowait(BlockId(number, 0), unit_checksums(b"x", CHECKSUM_UNIT), b"x", outcomes.append)
    with pytest.raises(ServerOverloaded):
        store.put_nowait(BlockId(9, 0), unit_checksums(b"x", CHECKSUM_UNIT), b"x", outcomes.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await store.put(BlockId(10, 0), unit_checksums(b"x", CHECKSUM_UNIT), b"x")
        assert len(outcomes) == 4
        nursery.cancel_scope.cancel()


async def test_a_bug_in_a_writing_thread_ends_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("planted")

    store = await open_store(tmp_path)
    monkeypatch.setattr(Writer, "commit", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with trio.fail_after(10), pytest.RaisesGroup(AssertionError):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            store.put_nowait(BlockId(1, 0), unit_checksums(b"x", CHECKSUM_UNIT), b"x", lambda _: None)
            store.kick()
            await trio.sleep_forever()
