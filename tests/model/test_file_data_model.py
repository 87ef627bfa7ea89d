"""FileData against a bytearray: random writes, reads, flushes, truncations, failures, crashes, at random paces."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from unittest import mock

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsd.core.upload_queue import UploadQueue, UploadState
from fsd.file_data import DataPath, FileData
from fsd.flush import WriteBack
from metadata.protocol import Caller, RangeOperation
from tests.support.local_services import LocalWorld
from tests.support.small_world import BLOCK, small_world
from wire.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NoSpace,
    NoSuchData,
    NotSupported,
    StoreError,
    TooFewReplicas,
    Unreachable,
)

FILE_SIZE = 24 * BLOCK
MIB = 1 << 20
BUDGETS = [6 * BLOCK, 12 * BLOCK, 40 * BLOCK]
offsets = st.one_of(
    st.integers(0, FILE_SIZE), st.integers(0, 24).map(lambda n: n * BLOCK), st.sampled_from([0, 16383, 16384, 16385])
)
sizes = st.one_of(st.integers(1, 40), st.integers(1, 3 * BLOCK), st.sampled_from([BLOCK, 2 * BLOCK, 512]))
fills = st.integers(1, 255)
Step = tuple[str, *tuple[int, ...]]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), offsets, sizes, fills),
        st.tuples(st.just("write"), offsets, sizes, fills),
        st.tuples(st.just("stream"), offsets, st.integers(1, 12), fills),
        st.tuples(st.just("scatter"), st.integers(1, 40), fills),
        st.tuples(st.just("append"), sizes, fills),
        st.tuples(st.just("read"), offsets, st.integers(1, 6 * BLOCK)),
        st.tuples(st.just("read_beside"), offsets, st.integers(1, 6 * BLOCK)),
        st.tuples(st.just("truncate"), offsets),
        st.tuples(st.just("change_range"), st.integers(1, 3), offsets, sizes, st.integers(0, 1)),
        st.tuples(st.just("copy_range"), st.integers(0, 1), offsets, offsets, st.one_of(sizes, offsets)),
        st.tuples(st.just("append_sharing"), sizes, fills),
        st.tuples(st.just("seek"), offsets),
        st.tuples(st.just("flush")),
        st.tuples(st.just("flush_beside")),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("forget")),
        st.tuples(st.just("lose_session")),
        st.tuples(st.just("lose_session_to_others"), offsets, sizes, fills),
        st.tuples(st.just("elsewhere"), offsets, sizes, fills),
        st.tuples(st.just("turns"), st.integers(1, 20)),
        st.tuples(st.just("wait"), st.integers(1, 40)),
        st.tuples(st.just("fail_put"), st.integers(0, 2)),
        st.tuples(st.just("fail_mutation"), st.integers(0, 2)),
        st.tuples(st.just("lose_answer")),
        st.tuples(st.just("reclaim")),
        st.tuples(st.just("crash")),
    ),
    min_size=1,
    max_size=30,
)
ERRORS: list[StoreError] = [NoSpace("full"), TooFewReplicas("1 of 2"), Unreachable("away")]


class Run:
    """One scenario: the file, and what it may contain."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.world = LocalWorld.make(seed)
        self.world.block_size = BLOCK
        self.ino = self.world.metadata.create(b"file").ino
        self.budget = self.chance.choice(BUDGETS)
        self.content = bytearray()
        self.versions: list[bytes] = [b""]  # Every content the file has had since the last crash.
        self.early: list[tuple[int, int, bytes]] = []  # Reads that no version has explained so far.
        self.acknowledged = 0  # Index of the version that a flush that returned had seen.
        self.beside_count = 0  # Calls of other handles that are under way.
        self.other_ino = 0  # A file that others are copied from, and what is in it.
        self.other_content = b""

    def changed(self) -> None:
        self.versions.append(bytes(self.content))
        self.explain_early_reads()

    def explain_early_reads(self) -> None:
        for offset, size, got in self.early:
            assert self.versions[-1][offset : offset + size] == got
        self.early.clear()

    def put(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[offset:end] = data

    async def run(self, script: Sequence[Step]) -> None:
        """Mount, carry out steps until a crash, mount again."""
        rest = list(script)
        while rest:
            async with self.world.mount(self.budget) as path, trio.open_nursery() as nursery:
                data = self.open(path)
                while rest and rest[0][0] != "crash":
                    data = await self.step(path, data, nursery, rest.pop(0))
                    data._writes.dirty.check()
                if not rest:
                    await self.end(path, data)
                nursery.cancel_scope.cancel()
            if rest:
                rest.pop(0)
                await self.after_crash()
        await self.after_crash()

    def open(self, path: DataPath) -> FileData:
        known = self.chance.random() < 0.7
        return path.file(self.ino, self.world.metadata.layout(self.ino) if known else None)

    async def end(self, path: DataPath, data: FileData) -> None:
        """No more failures: everything gets there, no memory stays taken, and the budget was kept."""
        self.heal()
        await trio.sleep(40)
        self.explain_early_reads()
        await self.flush(data)  # It may tell an old error.
        await self.flush(data)
        await data.close()
        await trio.testing.wait_all_tasks_blocked()
        assert path.statistics().files == 0
        await trio.testing.wait_all_tasks_blocked()
        assert path.statistics().dirty == 0
        assert path.statistics().fetching == 0
        assert self.acknowledged == len(self.versions) - 1

    def heal(self) -> None:
        for faults in (self.world.blocks.puts, self.world.metadata.mutations):
            faults.before.clear()
            faults.after.clear()

    async def after_crash(self) -> None:
        """Each byte that the services have is one that the file had at, or after, the last acknowledged flush."""
        self.heal()
        found = await self.world.content(self.ino)
        allowed = self.versions[self.acknowledged :]
        assert min(map(len, allowed)) <= len(found) <= max(map(len, allowed))
        if found not in allowed:
            # A hole that a later write has left in front of itself reads as zero until that was committed.
            rows = {version[: len(found)].ljust(len(found), b"\0") for version in allowed}
            bad = [at for at, (byte, *values) in enumerate(zip(found, *rows, strict=True)) if byte not in values]
            assert not bad, f"bytes {bad[:5]} ... of {len(found)} are of no version since the last flush"
        self.content = bytearray(found)
        self.early.clear()
        self.versions, self.acknowledged = [found], 0

    # --- steps ---------------------------------------------------------------------------------------------------

    async def step(self, path: DataPath, data: FileData, nursery: trio.Nursery, step: Step) -> FileData:
        name, *arguments = step
        if name == "reopen":
            return await self.reopen(path, data)
        self.beside_count += name.endswith("_beside")
        if name == "flush_beside":
            nursery.start_soon(self.beside, path, self.flush)
        elif name == "read_beside":
            nursery.start_soon(self.beside, path, self.read, *arguments)
        elif name == "elsewhere":
            await self.elsewhere(data, *arguments)
        elif name == "copy_range":
            await self.copy_range(path, data, *arguments)
        elif name == "lose_session":  # Nobody changes the file meanwhile: nothing is lost.
            path.session_lost()
        elif name == "lose_session_to_others":
            await self.lose_session_to_others(path, data, *arguments)
        else:
            await getattr(self, name)(data, *arguments)
        return data

    async def beside(self, path: DataPath, call: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Another handle's call, which goes on while this one's go on."""
        data = path.file(self.ino, None)
        await call(data, *arguments)
        with suppress(StoreError):  # What it could not flush, the next one tries again.
            await data.close()
        self.beside_count -= 1

    async def lose_session_to_others(self, path: DataPath, data: FileData, offset: int, size: int, fill: int) -> None:
        """Another mount changes the file while the session is lost: what it has written stays as it is.

        A request that is under way would be refused by the service, which is not here: then nothing is done.
        """
        if self.beside_count or data._writes.lock.locked():
            return
        path.session_lost()
        theirs = await self.write_elsewhere(offset, size, fill)
        self.heal()
        for _ in range(2):  # It may tell an old error.
            with suppress(StoreError):
                await data.flush()
        assert not data.unflushed
        found = await self.world.content(self.ino)
        assert found[offset : offset + size] == theirs, "what others have written was overwritten"
        assert bytes(await data.read(0, 1 << 30)) == found
        self.content = bytearray(found)
        self.early.clear()
        self.versions, self.acknowledged = [found], 0

    async def write_elsewhere(self, offset: int, size: int, fill: int) -> bytes:
        self.heal()
        content = bytes([fill]) * size
        async with self.world.mount(self.budget) as other:
            theirs = other.file(self.ino, None)
            await theirs.read(0, 1)
            await theirs.write(offset, content)
            await theirs.close()
        return content

    async def write(self, data: FileData, offset: int, size: int, fill: int) -> None:
        content = bytes((fill + n) % 256 for n in range(size))
        try:
            if fill % 3 or not data.write_nowait(offset, content):
                written = await data.write(offset, content if fill % 2 else memoryview(bytearray(content)))
                assert written == size
        except StoreError:
            # Memory is full of what cannot be sent.  A long write may have been taken in part.
            await self.resync(data)
            return
        self.put(offset, content)
        self.changed()
        assert data.size == len(self.content)

    async def resync(self, data: FileData) -> None:
        self.heal()
        self.content = bytearray(await data.read(0, 1 << 30))
        self.changed()

    async def stream(self, data: FileData, offset: int, count: int, fill: int) -> None:
        for n in range(count):
            await self.write(data, offset + n * 700, 700, (fill + n) % 256)

    async def scatter(self, data: FileData, count: int, fill: int) -> None:
        for n in range(count):
            await self.write(data, (n * 601 * fill) % FILE_SIZE, 20, fill)

    async def append(self, data: FileData, size: int, fill: int) -> None:
        content = bytes([fill]) * min(size, 2 * BLOCK)
        try:
            if fill % 3 or not data.append_nowait(content):
                await data.append(content)
        except StoreError:
            await self.resync(data)
            return
        self.put(len(self.content), content)
        self.changed()

    async def read(self, data: FileData, offset: int, size: int) -> None:
        first = len(self.versions) - 1
        found = data.read_nowait(offset, size)
        got = bytes(await data.read(offset, size) if found is None else found)
        expected = [version[offset : offset + size] for version in self.versions[first:]]
        if got not in expected:
            # A change whose call has not returned yet may be seen; then the next version has it.
            self.early.append((offset, size, got))

    async def truncate(self, data: FileData, size: int) -> None:
        self.world.metadata.mutations.after.clear()
        try:
            reply = await data.truncate(size, Caller())
        except StoreError:
            return
        assert reply.inode.size == size
        self.content = self.content[:size].ljust(size, b"\0")
        self.changed()
        assert data.size == size

    async def change_range(self, data: FileData, kind: int, offset: int, length: int, keep_size: int) -> None:
        """A failure leaves the file as it was: all is done in one step here."""
        operation = RangeOperation(kind)
        self.world.metadata.mutations.after.clear()
        try:
            inode = await data.change_range(operation, offset, length, keep_size=bool(keep_size), keep_privileges=True)
        except StoreError:
            return
        if operation is not RangeOperation.PUNCH and not keep_size:
            self.put(max(offset + length - 1, 0), bytes(self.content[offset + length - 1 : offset + length]) or b"\0")
        if operation is not RangeOperation.ALLOCATE:
            end = min(offset + length, len(self.content))
            if offset < end:
                self.put(offset, bytes(end - offset))
        self.changed()
        assert data.size == len(self.content)
        assert inode.size <= data.size

    async def copy_range(
        self, path: DataPath, data: FileData, kind: int, source_offset: int, offset: int, length: int
    ) -> None:
        """From another file, which has holes, or from this one; what blocks cannot be shared for is refused."""
        self.world.metadata.mutations.after.clear()
        source = await self.other(path) if kind else path.file(self.ino, None)
        content = self.other_content if kind else bytes(self.content)
        try:
            done, _ = await data.copy_range(source, source_offset, offset, length, keep_privileges=True)
        except InvalidArgument:
            assert not kind
            assert abs(source_offset - offset) < length
            return
        except (NotSupported, NoSpace, TooFewReplicas, Unreachable):
            return
        finally:
            with suppress(StoreError):
                await source.close()
        assert done == max(min(length, len(content) - source_offset), 0)
        if done:
            self.put(offset, content[source_offset : source_offset + done])
            self.changed()
            assert data.size == len(self.content)

    async def other(self, path: DataPath) -> FileData:
        if not self.other_ino:
            self.heal()
            self.other_ino = self.world.metadata.create(b"other").ino
            other = path.file(self.other_ino, None)
            for at in (0, 2 * BLOCK, 9 * BLOCK + 100):
                self.other_content = self.other_content.ljust(at, b"\0") + self.chance.randbytes(5000)
                await other.write(at, self.other_content[at:])
            await other.flush()
            return other
        return path.file(self.other_ino, None)

    async def append_sharing(self, data: FileData, size: int, fill: int) -> None:
        content = bytes([fill]) * min(size, BLOCK)
        self.world.metadata.mutations.after.clear()
        try:
            inode = await data.append_sharing(content, keep_privileges=True)
        except StoreError:
            await self.resync(data)
            return
        self.put(len(self.content), content)
        self.changed()
        assert inode.size == len(self.content) == data.size

    async def seek(self, data: FileData, offset: int) -> None:
        """What is called a hole has no bytes but zeros; holes and data follow each other up to the end."""
        size = len(self.content)
        if offset >= size:
            for seek in (data.seek_data, data.seek_hole):
                with pytest.raises(NoSuchData):
                    await seek(offset)
            return
        at = offset
        while at < size:
            try:
                start = await data.seek_data(at)
            except NoSuchData:
                start = size
            assert at <= start <= size
            assert not any(self.content[at:start])
            if start == size:
                break
            at = await data.seek_hole(start)
            assert start < at <= size
            assert await data.seek_data(at - 1) == at - 1

    async def flush(self, data: FileData) -> None:
        seen = len(self.versions) - 1
        try:
            await data.flush()
        except StoreError:
            return
        self.acknowledged = max(self.acknowledged, seen)

    async def reopen(self, path: DataPath, data: FileData) -> FileData:
        seen = len(self.versions) - 1
        others = data.references > 1
        with suppress(StoreError):  # Its bytes are still there then, and found by the next open.
            await data.close()
            if not others:
                self.acknowledged = max(self.acknowledged, seen)
        return self.open(path)

    async def forget(self, data: FileData) -> None:
        data.doubt()

    async def elsewhere(self, data: FileData, offset: int, size: int, fill: int) -> None:
        """Another mount changes the file, while this one has nothing of its own."""
        if data.unflushed:
            return
        theirs = await self.write_elsewhere(offset, size, fill)
        if data.unflushed:
            return
        self.put(offset, theirs)
        self.changed()
        self.acknowledged = len(self.versions) - 1
        data.update_inode(self.world.metadata.layout(self.ino).inode)

    async def reclaim(self, data: FileData) -> None:
        self.world.reclaim()

    async def turns(self, data: FileData, count: int) -> None:
        for _ in range(count):
            await trio.lowlevel.checkpoint()

    async def wait(self, data: FileData, seconds: int) -> None:
        await trio.sleep(seconds)

    async def fail_put(self, data: FileData, kind: int) -> None:
        self.world.blocks.puts.before.append(ERRORS[kind])

    async def fail_mutation(self, data: FileData, kind: int) -> None:
        self.world.metadata.mutations.before.append(ERRORS[kind])

    async def lose_answer(self, data: FileData) -> None:
        self.world.metadata.mutations.after.append(DeadlineExceeded("lost"))


def run(script: Sequence[Step], seed: int) -> None:
    with small_world():
        trio.run(Run(seed).run, script, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(
    max_examples=150,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(steps, st.integers(0, 1 << 16))
def test_a_file_is_what_was_written_to_it(script: Sequence[Step], seed: int) -> None:
    run(script, seed)


def test_the_model_catches_a_commit_before_its_blocks_are_durable() -> None:
    """The bug is planted: uploads count as durable as soon as they are sealed."""

    def always(self: UploadQueue, number: int) -> bool:
        for upload in self._uploads:
            if upload.state is UploadState.SENDING:
                upload.slot.slice.slice_id = upload.slot.slice.slice_id or 1 + upload.number
                upload.state = UploadState.DURABLE
        return True

    script: list[Step] = [("write", 0, 5 * BLOCK, 1), ("flush",)]
    run(script, 0)
    with mock.patch.object(UploadQueue, "is_durable", always), pytest.raises(BaseExceptionGroup) as caught:
        run(script, 0)
    assert caught.group_contains(AssertionError, match="F12")


def test_the_model_catches_a_truncation_undone_by_an_older_commit() -> None:
    """The bug is planted: uploads under way are not cut."""
    script: list[Step] = [("write", 0, 5 * BLOCK, 1), ("truncate", 100), ("truncate", 3 * BLOCK), ("flush",)]
    run(script, 0)
    with mock.patch.object(UploadQueue, "truncate", return_value=None), pytest.raises(AssertionError):
        run(script, 0)


def test_the_model_catches_a_late_commit_of_a_lost_session() -> None:
    """The bug is planted: what was written in the lost session is committed as if nothing had happened."""
    script: list[Step] = [("write", 0, 5 * BLOCK, 1), ("lose_session_to_others", 100, BLOCK, 2)]
    run(script, 0)
    with mock.patch.object(WriteBack, "session_lost", return_value=None), pytest.raises(BaseExceptionGroup) as caught:
        run(script, 0)
    assert caught.group_contains(AssertionError, match="was overwritten")


@pytest.mark.parametrize("seed", range(3))
def test_many_files_share_a_small_budget_and_nobody_starves(seed: int) -> None:
    """Large constants, twelve files, 16 MiB; if two waited for each other, the clock would jump."""

    async def work(data: FileData, chance: random.Random) -> bytearray:
        content = bytearray()
        for _ in range(40):
            action, size = chance.random(), chance.choice([100, 4096, 70_000, 300_000, MIB])
            if action < 0.55:
                offset = chance.choice([chance.randrange(6 * MIB), len(content)])
                fresh = bytes([chance.randrange(1, 256)]) * size
                await data.write(offset, fresh)
                content.extend(bytes(max(0, offset + size - len(content))))
                content[offset : offset + size] = fresh
            elif action < 0.9:
                offset = chance.randrange(6 * MIB)
                found = data.read_nowait(offset, size)
                got = bytes(await data.read(offset, size) if found is None else found)
                assert got == bytes(content[offset : offset + size])
            else:
                await data.flush()
        await data.close()
        return content

    async def main() -> None:
        world = LocalWorld.make(seed)
        written: dict[int, bytearray] = {}

        async def run_one(data: FileData, number: int) -> None:
            written[data.ino] = await work(data, random.Random(seed * 100 + number))

        async with world.mount(16 * MIB) as path:
            async with trio.open_nursery() as nursery:
                for number in range(12):
                    nursery.start_soon(run_one, world.create(path), number)
            await trio.testing.wait_all_tasks_blocked()
            assert trio.current_time() < started + 30
            assert (path.statistics().dirty, path.statistics().files) == (0, 0)
        for ino, content in written.items():
            assert await world.content(ino) == bytes(content)

    clock = trio.testing.MockClock(autojump_threshold=0.05)
    started = clock.current_time()
    trio.run(main, clock=clock)


class Churn:
    """Files that are written, flushed, cut, removed and closed while all of it fails now and then."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = LocalWorld.make(seed)

    async def run(self) -> None:
        async with self.world.mount(16 * MIB) as path:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(self.work, path, random.Random(self.seed * 100 + number))
            for faults in (self.world.blocks.puts, self.world.metadata.mutations):
                faults.before.clear()
                faults.after.clear()
            await trio.sleep(400)
            statistics = path.statistics()
            assert (statistics.dirty, statistics.fetching, statistics.files) == (0, 0, 0)

    async def work(self, path: DataPath, chance: random.Random) -> None:
        for _ in range(4):
            data = self.world.create(path)
            async with trio.open_nursery() as nursery:
                for _ in range(chance.randrange(1, 15)):
                    with suppress(StoreError):
                        await self.act(data, chance, nursery)
                    for _ in range(chance.randrange(4)):
                        await trio.lowlevel.checkpoint()
                if chance.random() < 0.7:
                    inode = data.inode()
                    data.update_inode(msgspec.structs.replace(inode, nlink=0, version=inode.version + 100))
                    if chance.random() < 0.3:
                        self.world.metadata.remove_inode(data.ino)
                with suppress(StoreError):
                    await data.close()

    async def act(self, data: FileData, chance: random.Random, nursery: trio.Nursery) -> None:
        action = chance.random()
        if action < 0.6:
            await data.write(chance.randrange(6 * MIB), bytes(chance.choice([100, 4096, 70_000, 300_000, MIB])))
        elif action < 0.8:
            nursery.start_soon(data.settle)
        elif action < 0.9:
            await data.truncate(chance.randrange(3 * MIB), Caller())
        elif action < 0.95:
            self.world.metadata.mutations.after.append(DeadlineExceeded("lost"))
        else:
            chance.choice([self.world.blocks.puts, self.world.metadata.mutations]).before.append(NoSpace("full"))


@pytest.mark.parametrize("seed", range(8))
def test_files_removed_cut_and_closed_at_any_moment_leave_nothing_behind(seed: int) -> None:
    trio.run(Churn(seed).run, clock=trio.testing.MockClock(autojump_threshold=0.01))
