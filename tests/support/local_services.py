"""The two services as the data path sees them, in this process: the real namespace code on the engine in memory, and
blocks in a dictionary; both can be told to fail as the real ones do.

tests/contract/test_data_services.py holds the block store to what BlockClient promises.  LocalMetadata runs
metadata.core.dispatch itself; what is ours here is only the way there: a refusal rolls back, a retry gets the first
answer, every message goes through its encoding.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import msgspec
import trio

from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from fsd.file_data import DataPath, FileData
from fsd.ports import MetadataPort
from metadata.core import dispatch, reclaim, schema
from metadata.core.format import format_store
from metadata.core.schema import ROOT_INO
from metadata.engine.memory import MemoryEngine
from metadata.protocol import (
    AllocateSlices,
    CommitExtents,
    Create,
    GetLayout,
    LayoutReply,
    Mutation,
    StatFs,
    Unlink,
)
from metadata.status import file_system_status
from wire.checksum import Buffer
from wire.errors import BlockExists, DataLost, DeadlineExceeded, InvalidArgument, StoreError
from wire.message import Message, Request

R = TypeVar("R", bound=Message)


class Faults:
    """Which calls fail, and how.  A planned fault is used up by the call it hits."""

    def __init__(self) -> None:
        self.before: list[StoreError] = []  # Raised instead of doing it.
        self.after: list[StoreError | None] = []  # Raised after it was done: the caller cannot know.
        self.always: StoreError | None = None  # As `before`, for every call until it is taken away.

    def refuse(self) -> None:
        """Raise what is due before the call."""
        if self.always is not None:
            raise self.always
        if self.before:
            raise self.before.pop(0)

    def forget_answer(self) -> None:
        """Raise what is due after the call."""
        error = self.after.pop(0) if self.after else None
        if error is not None:
            raise error


async def turns(chance: random.Random | None) -> None:
    """Let others run for a while, so that replies come in another order than calls."""
    for _ in range(1 if chance is None else chance.randint(1, 6)):
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True)
class LocalPutResult:
    """As blockstore.client.PutResult."""

    copies: int
    degraded: bool


class MemoryBlocks:
    """Blocks in a dictionary."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.blocks: dict[BlockId, bytes] = {}
        self.puts = Faults()
        self.gets = Faults()
        self.gate: trio.Event | None = None  # Puts wait for it.
        self.discard = False  # Keep nothing and give zeros: for measurements of what is around.
        self.get_log: list[tuple[BlockId, int, int]] = []
        self.puts_under_way = 0
        self.puts_at_once = 0
        self._chance = chance

    async def put(
        self, block: BlockId, data: Buffer | Sequence[Buffer], *, replicas: int, timeout_s: float = 30.0
    ) -> LocalPutResult:
        """As BlockClient.put."""
        self.puts_under_way += 1
        self.puts_at_once = max(self.puts_at_once, self.puts_under_way)
        try:
            await turns(self._chance)
            if self.gate is not None:
                await self.gate.wait()
            self.puts.refuse()
            content = _content(data) if not self.discard else b"\0" * _length(data)
            if not 0 < len(content) <= BLOCK_SIZE_MAX:
                raise InvalidArgument(f"a block of {len(content)} bytes")
            if self.blocks.setdefault(block, content) != content:
                raise BlockExists(str(block))
            await turns(self._chance)
            self.puts.forget_answer()
            return LocalPutResult(replicas, degraded=False)
        finally:
            self.puts_under_way -= 1

    async def get(
        self, block: BlockId, *, offset: int, size: int, replicas: int, timeout_s: float = 30.0
    ) -> memoryview:
        """As BlockClient.get."""
        await turns(self._chance)
        self.gets.refuse()
        content = self.blocks.get(block)
        if content is None:
            raise DataLost(f"no server has {block}")
        if size < 1 or offset + size > len(content):
            raise InvalidArgument(f"{offset} + {size} of {len(content)} bytes")
        self.get_log.append((block, offset, size))
        await turns(self._chance)
        return memoryview(content)[offset : offset + size]

    async def delete(self, blocks: Sequence[BlockId], *, timeout_s: float = 30.0) -> bool:
        """As BlockClient.delete."""
        await turns(self._chance)
        for block in blocks:
            self.blocks.pop(block, None)
        return True


def _pieces(data: Buffer | Sequence[Buffer]) -> Sequence[Buffer]:
    return [data] if isinstance(data, bytes | bytearray | memoryview) else data


def _content(data: Buffer | Sequence[Buffer]) -> bytes:
    return b"".join(_pieces(data))


def _length(data: Buffer | Sequence[Buffer]) -> int:
    return sum(len(piece) for piece in _pieces(data))


class LocalMetadata:
    """The inode service: one session, every mutation in a transaction of its own."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.engine = MemoryEngine()
        self.now_ns = 1_000_000_000_000
        self.asks = Faults()
        self.mutations = Faults()
        self.log: list[Request[Message]] = []
        self.forget_answers_of: list[type[Message]] = []  # The next answer to such a request is lost.
        self.check_commit: Callable[[CommitExtents], None] = lambda commit: None
        self._sequence = 0
        self._chance = chance
        with self.engine.write() as txn:
            format_store(txn, now_ns=self.now_ns)
            txn.commit()

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        """As MetadataClient.ask."""
        request = _over_the_wire(make(1))
        await turns(self._chance)
        self.asks.refuse()
        self.log.append(request)
        with self.engine.read() as txn:
            if isinstance(request, StatFs):
                reply: Message = file_system_status(txn, request.ino, space_total=1 << 50, space_free=1 << 50)
            else:
                reply = dispatch.answer(txn, request)
        await turns(self._chance)
        return cast(R, _over_the_wire(reply))

    async def mutate(self, make: Callable[[int, int], Mutation[R]]) -> R:
        """As MetadataClient.mutate."""
        self._sequence += 1
        request = _over_the_wire(make(1, self._sequence))
        await turns(self._chance)
        self.mutations.refuse()
        self.log.append(request)
        reply = self.apply(request)
        await turns(self._chance)
        self.mutations.forget_answer()
        if type(request) in self.forget_answers_of:
            self.forget_answers_of.remove(type(request))
            raise DeadlineExceeded("no answer")
        return cast(R, _over_the_wire(reply))

    def apply(self, request: Mutation[Message]) -> Message:
        """Carry it out at once."""
        if isinstance(request, CommitExtents):
            self.check_commit(request)
        self.now_ns += 1000
        with self.engine.write() as txn:
            reply = dispatch.apply(txn, request, now_ns=self.now_ns)
            txn.commit()
        return reply

    async def allocate_slice(self) -> int:
        """As MetadataClient.allocate_slice."""
        return (await self.mutate(lambda session, sequence: AllocateSlices(session, sequence, count=1))).first

    def create(self, name: bytes) -> LayoutReply:
        """Make a file in the root directory."""
        self._sequence += 1
        reply = self.apply(Create(1, self._sequence, ROOT_INO, name, 0o100644, exclusive=True))
        assert isinstance(reply, LayoutReply)
        return reply

    def unlink(self, name: bytes, ino: int) -> None:
        """Remove a file in the root directory that nobody has open."""
        self._sequence += 1
        self.apply(Unlink(1, self._sequence, ROOT_INO, name, closed_ino=ino))

    def remove_inode(self, ino: int) -> None:
        """Another mount has removed the file's last name."""
        with self.engine.write() as txn:
            txn.delete(schema.inode_key(ino))
            txn.commit()

    def layout(self, ino: int) -> LayoutReply:
        """The file as it is at the service."""
        with self.engine.read() as txn:
            reply = dispatch.answer(txn, GetLayout(1, ino))
        assert isinstance(reply, LayoutReply)
        return reply

    def count(self, kind: type[Message]) -> int:
        """How many requests of this kind have come."""
        return sum(type(request) is kind for request in self.log)


M = TypeVar("M", bound=Message)


def _over_the_wire(message: M) -> M:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


@dataclass
class LocalWorld:
    """Both services, and mounts of them."""

    metadata: LocalMetadata
    blocks: MemoryBlocks
    names: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))
    block_size: int = BLOCK_SIZE_MAX

    @classmethod
    def make(cls, seed: int | None = None) -> LocalWorld:
        """A new world; with a seed, its replies come in a random order."""
        chance = None if seed is None else random.Random(seed)
        world = cls(LocalMetadata(chance), MemoryBlocks(chance))
        world.metadata.check_commit = world.refuse_commits_of_missing_blocks
        return world

    def refuse_commits_of_missing_blocks(self, commit: CommitExtents) -> None:
        """Invariant F12: a commit names only bytes of blocks that are durable."""
        for extent in commit.extents:
            at, end = extent.slice_offset, extent.slice_offset + extent.length
            while at < end:
                block_size = self.block_size
                index, start = divmod(at, block_size)
                stop = min(block_size, end - index * block_size)
                content = self.blocks.blocks.get(BlockId(extent.slice_id, index), b"")
                assert len(content) >= stop, f"F12: {extent} names bytes that no server has"
                at += stop - start

    @asynccontextmanager
    async def mount(
        self, budget_bytes: int = 64 << 20, *, metadata: MetadataPort | None = None
    ) -> AsyncIterator[DataPath]:
        """A data path that runs, with a session of its own if there is one; its budget is checked at the end."""
        path = DataPath(
            metadata=metadata or self.metadata,
            blocks=self.blocks,
            budget_bytes=budget_bytes,
            clock_ns=lambda: self.metadata.now_ns,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(path.run)
            yield path
            statistics = path.statistics()
            assert statistics.peak <= budget_bytes, "F9"
            nursery.cancel_scope.cancel()

    def reclaim(self) -> None:
        """Everything that waits for deletion goes, at once."""
        engine = self.metadata.engine
        more = True
        while more:
            with engine.write() as txn:
                more = reclaim.next_step(txn, now_ns=self.metadata.now_ns)
                txn.commit()
        with engine.write() as txn:
            dead = reclaim.slices_to_delete(txn, count=1 << 20)
            for slice_ in dead:
                for index in range(-(-slice_.size // self.block_size)):
                    self.blocks.blocks.pop(BlockId(slice_.slice_id, index), None)
            reclaim.slices_deleted(txn, [slice_.slice_id for slice_ in dead])
            txn.commit()

    def create(self, path: DataPath) -> FileData:
        """A new file, open."""
        layout = self.metadata.create(b"file%d" % next(self.names))
        return path.file(layout.ino, layout)

    async def content(self, ino: int) -> bytes:
        """What another mount, which has nothing in memory, reads."""
        async with self.mount() as path:
            data = path.file(ino, None)
            content = bytes(await data.read(0, 1 << 40))
            assert len(content) == self.metadata.layout(ino).inode.size
            await data.close()
            return content


@contextmanager
def failing(faults: Faults, error: StoreError) -> Iterator[None]:
    """Every call fails with `error`, for a while."""
    faults.always = error
    try:
        yield
    finally:
        faults.always = None
