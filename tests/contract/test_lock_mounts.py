"""The file-system objects of several mounts at one real inode service: their programs' locks exclude each other."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from blockstore.client import BlockClient
from fsd import locks as fsd_locks
from fsd.file_data import DataPath
from fsd.filesystem import FileSystem
from fsd.frontend.ports import FileLock
from fsd.locks import Mode
from metadata.client import Holdings, MetadataClient
from metadata.core.locks import LAST_BYTE, LockKind, LockSpace
from metadata.protocol import EvictSession, ListLocks, ListLocksDone, SetLock
from tests.support.file_system import CALLER, NotingKernel, at_once, needs_network, soon
from tests.support.inode_service import Service, running_service
from wire.errors import Deadlock, LocksLost, OutcomeUnknown, Unreachable, WouldBlock
from wire.message import Message, Request
from wire.rpc.client import Channel

READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
ROOT = 1


class Mount:
    """One mount without a kernel."""

    def __init__(self, fs: FileSystem, metadata: MetadataClient, kernel: NotingKernel) -> None:
        self.fs = fs
        self.metadata = metadata
        self.kernel = kernel

    async def open(self, name: bytes = b"file", flags: int = os.O_RDWR) -> int:
        entry = await soon(self.fs.lookup(ROOT, name))
        if entry.nodeid == 0:
            opened, entry = await soon(self.fs.create(ROOT, name, 0o100644, flags, CALLER))
            return opened.fh
        return (await soon(self.fs.open(entry.nodeid, flags, CALLER))).fh

    async def set(
        self, fh: int, owner: int, kind: LockKind, start: int = 0, end: int = LAST_BYTE, *, flock: bool = False
    ) -> bool:
        try:
            await soon(self.fs.set_lock(fh, owner, FileLock(kind, start, end, owner), flock=flock, wait=False))
        except WouldBlock:
            return False
        return True

    async def wait(self, fh: int, owner: int, kind: LockKind = WRITE, *, flock: bool = False) -> None:
        lock = FileLock(kind, 0, LAST_BYTE, owner)
        await soon(self.fs.set_lock(fh, owner, lock, flock=flock, wait=True))

    def holds(self, fh: int, owner: int) -> bool:
        file = (self.fs._state.handles.file(fh).node.ino, LockSpace.POSIX)
        return bool(self.locks.table.segments(file, (0, owner)))

    @property
    def locks(self) -> fsd_locks.Locks:
        return self.fs._locks


@asynccontextmanager
async def mount(service: Service, mountpoint: bytes) -> AsyncIterator[Mount]:
    made: list[Mount] = []

    async def on_sharing(alone: bool) -> None:
        for one in made:
            await one.fs.set_alone(alone)

    async def on_session_lost() -> None:
        for one in made:
            await one.fs.session_lost()

    async with service.client(
        mountpoint,
        on_sharing=on_sharing,
        on_session_lost=on_session_lost,
        holdings=lambda: made[0].fs.holdings() if made else Holdings(),
        on_locks_ready=lambda numbers: made[0].fs.locks_ready(numbers),
        timeout_s=5.0,
    ) as metadata:
        blocks = BlockClient(
            current_map=lambda: metadata.map,
            refresh_map=metadata.refresh_map,
            report_bad_copy=metadata.report_bad_copy,
        )
        data, kernel = DataPath(metadata=metadata, blocks=blocks, budget_bytes=16 << 20), NotingKernel()
        async with trio.open_nursery() as nursery:
            await nursery.start(blocks.run)
            await nursery.start(data.run)
            fs = FileSystem(metadata=metadata, data=data, notifier=kernel)
            made.append(Mount(fs, metadata, kernel))
            nursery.start_soon(fs.run)
            yield made[0]
            await fs.close(5.0)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def mounts(directory: Path, count: int, *, lease_s: float = 20.0) -> AsyncIterator[tuple[Service, list[Mount]]]:
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(directory / "metadata", lease_s=lease_s))
        yield service, [await stack.enter_async_context(mount(service, b"/%d" % n)) for n in range(count)]


async def listed(service: Service) -> ListLocksDone:
    async with trio.open_nursery() as nursery:
        channel = Channel("127.0.0.1", service.port, service="metadata")
        await nursery.start(channel.run)
        answer = await channel.call(ListLocks(), timeout_s=5)
        nursery.cancel_scope.cancel()
    return answer


async def eventually(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 5.0) -> None:
    """Return when it is so; the test fails when that takes too long."""
    with trio.fail_after(timeout_s):
        while not (await found if isinstance(found := condition(), Awaitable) else found):  # noqa: ASYNC110 (far away)
            await trio.sleep(0.01)


async def until_waiting(service: Service) -> None:
    """The service, or the mount that is alone, knows of a waiter."""

    async def waits() -> bool:
        return any(one.waiting for one in (await listed(service)).locks)

    await eventually(waits)


# --- alone ------------------------------------------------------------------------------------------------------------


async def test_a_mount_that_is_alone_asks_nobody(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (_, (a,)):
        fh = await a.open()
        lock = FileLock(WRITE, 5, 9, 77)
        at_once(a.fs.set_lock(fh, 1, lock, flock=False, wait=True))
        held = at_once(a.fs.get_lock(fh, 2, FileLock(READ, 0, LAST_BYTE, 78)))
        assert held is not None
        assert (held.kind, held.start, held.end, held.pid) == (WRITE, 5, 9, 77)
        with pytest.raises(WouldBlock):
            at_once(a.fs.set_lock(fh, 2, lock, flock=False, wait=False))
        at_once(a.fs.set_lock(fh, 2, lock, flock=True, wait=False))
        at_once(a.fs.flush(fh, 1))
        assert at_once(a.fs.get_lock(fh, 2, lock)) is None


async def test_who_waits_gets_the_lock_when_its_holder_closes_and_a_cancelled_one_does_not(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (_, (a,)), trio.open_nursery() as nursery:
        fh = await a.open()
        assert await a.set(fh, 1, WRITE)
        with trio.move_on_after(0.05):
            await a.wait(fh, 2)
        nursery.start_soon(a.wait, fh, 3)
        await trio.testing.wait_all_tasks_blocked()
        assert [waiter.wanted.owner for waiter in a.locks.table.waiters()] == [(0, 3)]
        await soon(a.fs.flush(fh, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert [held.owner for held in a.locks.table.held()] == [(0, 3)]
        assert not list(a.locks.table.waiters())


async def test_the_last_close_of_an_open_file_ends_what_was_locked_through_it_alone(tmp_path: Path) -> None:
    """A flock, and locks of the open file description; those of a process that has used another handle since stay."""
    async with mounts(tmp_path, 1) as (_, (a,)):
        fh, other = await a.open(), await a.open()
        assert await a.set(fh, 1, WRITE, flock=True)
        assert await a.set(fh, 2, WRITE, 0, 9)
        assert await a.set(fh, 3, WRITE, 10, 19)
        assert await a.set(other, 3, WRITE, 20, 29)
        await soon(a.fs.release(fh, lock_owner=1, flock=True))
        assert [(held.owner, held.segment[:2]) for held in a.locks.table.held()] == [((0, 3), (10, 29))]
        await soon(a.fs.release(other))
        assert not list(a.locks.table.held())
        assert not a.locks._through


# --- sharing ----------------------------------------------------------------------------------------------------------


async def test_locks_exclude_between_mounts(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        for flock in (False, True):
            assert await a.set(in_a, 1, WRITE, flock=flock)
            assert not await b.set(in_b, 1, READ, flock=flock)
            assert not await a.set(in_a, 2, READ, flock=flock)
        found = await soon(b.fs.get_lock(in_b, 1, FileLock(READ, 3, 4, 9)))
        assert found is not None
        assert (found.kind, found.start, found.end, found.pid) == (WRITE, 0, LAST_BYTE, 1)
        await soon(a.fs.flush(in_a, 1))
        assert await b.set(in_b, 1, READ)
        assert not await b.set(in_b, 1, READ, flock=True)
        await soon(a.fs.release(in_a, lock_owner=1, flock=True))
        assert await b.set(in_b, 1, READ, flock=True)
        assert len((await listed(service)).locks) == 2


async def test_a_close_without_locks_makes_no_round_trip(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (_, (a, _)):
        fh = await a.open()
        assert not needs_network(a.fs.flush(fh, 1))


async def test_who_waits_in_another_mount_gets_the_lock(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)), trio.open_nursery() as nursery:
        in_a, in_b = await a.open(), await b.open()
        for flock in (False, True):
            assert await a.set(in_a, 1, WRITE, flock=flock)
            nursery.start_soon(partial(b.wait, in_b, 1, flock=flock))
            await until_waiting(service)
            assert await a.set(in_a, 1, UNLOCK, flock=flock)
            await eventually(lambda: any(b.locks.table.held()), 1.0)
            assert not await a.set(in_a, 1, READ, flock=flock)
            assert await b.set(in_b, 1, UNLOCK, flock=flock)


async def test_a_cancelled_wait_leaves_neither_waiter_nor_lock(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.wait, in_b, 1)
                await until_waiting(service)
                scope.cancel()

        async def nobody_waits() -> bool:
            return not any(one.waiting for one in (await listed(service)).locks)

        await eventually(nobody_waits)
        await soon(a.fs.flush(in_a, 1))
        assert not (await listed(service)).locks


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancellation_that_crosses_the_grant_ends_with_the_lock_or_without(turns: int, tmp_path: Path) -> None:
    """At whichever moment: what the program is told, what the mount notes and what the service has are the same."""
    async with mounts(tmp_path, 2) as (service, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE)
        granted = False

        async def wait() -> None:
            nonlocal granted
            with trio.CancelScope() as scope:
                scopes.append(scope)
                await b.wait(in_b, 1)
                granted = True

        scopes: list[trio.CancelScope] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await until_waiting(service)
            await a.set(in_a, 1, UNLOCK)
            for _ in range(turns):
                await trio.sleep(0.0005)
            scopes[0].cancel()
        assert bool(list(b.locks.table.held())) is granted
        await eventually(lambda: not (b.locks._withdrawals), 2.0)
        assert bool((await listed(service)).locks) is granted


async def test_a_circle_over_two_mounts_is_refused(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)), trio.open_nursery() as nursery:
        one, two = (await a.open(b"1"), await a.open(b"2")), (await b.open(b"1"), await b.open(b"2"))
        assert await a.set(one[0], 1, WRITE)
        assert await b.set(two[1], 1, WRITE)
        nursery.start_soon(a.wait, one[1], 1)
        await until_waiting(service)
        with pytest.raises(Deadlock):
            await b.wait(two[0], 1)
        await soon(b.fs.flush(two[1], 1))


async def test_a_lock_shows_what_was_written_under_it_before(tmp_path: Path) -> None:
    """With both files open all the time: an unlock flushes, and a lock drops what was cached."""
    async with mounts(tmp_path, 2) as (_, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        for turn in range(3):
            assert await a.set(in_a, 1, WRITE)
            await soon(a.fs.write(in_a, 0, b"turn %d" % turn))
            assert await a.set(in_a, 1, UNLOCK)
            dropped = len(b.kernel.everything)
            assert await b.set(in_b, 1, READ)
            assert len(b.kernel.everything) > dropped, "the kernel's pages"
            assert bytes(await soon(b.fs.read(in_b, 0, 100))) == b"turn %d" % turn
            assert await b.set(in_b, 1, UNLOCK)
        dropped = len(b.kernel.everything)
        assert await b.set(in_b, 1, READ)
        assert len(b.kernel.everything) == dropped, "nothing has changed"


async def test_own_writes_drop_nothing(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (_, (a, _)):
        fh = await a.open()
        await soon(a.fs.write(fh, 0, b"first"))
        await soon(a.fs.fsync(fh, False))
        assert await a.set(fh, 1, WRITE)
        dropped = len(a.kernel.everything)
        for _ in range(3):
            await soon(a.fs.write(fh, 0, b"again"))
            assert await a.set(fh, 1, UNLOCK)
            assert await a.set(fh, 1, WRITE)
        assert len(a.kernel.everything) == dropped


# --- from one to the other --------------------------------------------------------------------------------------------


async def test_locks_of_a_lone_mount_hold_when_another_comes(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (service, (a,)), trio.open_nursery() as nursery:
        in_a = await a.open()
        assert await a.set(in_a, 1, WRITE)
        await soon(a.fs.write(in_a, 0, b"under the lock"))
        nursery.start_soon(a.wait, in_a, 2)
        await trio.testing.wait_all_tasks_blocked()
        async with mount(service, b"/b") as b:
            assert a.locks._mode is Mode.SHARING
            in_b = await b.open()
            assert not await b.set(in_b, 1, READ)
            await until_waiting(service)
            assert await a.set(in_a, 1, UNLOCK)
            await eventually(lambda: a.holds(in_a, 2), 1.0)
            assert not await b.set(in_b, 1, READ)
            await soon(a.fs.flush(in_a, 2))
            assert await b.set(in_b, 1, READ)


async def test_what_was_written_under_a_lock_while_alone_is_seen_by_who_comes(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (service, (a,)):
        in_a = await a.open()
        assert await a.set(in_a, 1, WRITE)
        await soon(a.fs.write(in_a, 0, b"written"))
        at_once(a.fs.set_lock(in_a, 1, FileLock(UNLOCK, 0, LAST_BYTE, 1), flock=False, wait=False))
        assert a.fs._state.handles.file(in_a).node.file.unflushed  # type: ignore[union-attr]
        async with mount(service, b"/b") as b:
            in_b = await b.open()
            assert await b.set(in_b, 1, READ)
            assert bytes(await soon(b.fs.read(in_b, 0, 100))) == b"written"


async def test_alone_again_locks_are_granted_here_and_hold_when_the_next_mount_comes(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (service, (a,)), trio.open_nursery() as nursery:
        in_a = await a.open()
        async with mount(service, b"/b") as b:
            in_b = await b.open()
            assert await b.set(in_b, 1, WRITE)
            assert await a.set(in_a, 1, WRITE, flock=True)
            nursery.start_soon(a.wait, in_a, 1)
            await until_waiting(service)
            assert await b.set(in_b, 1, UNLOCK)
        await eventually(lambda: a.locks._mode is Mode.ALONE)
        await eventually(lambda: not (len(list(a.locks.table.held())) < 2), 2.0)
        at_once(a.fs.set_lock(in_a, 1, FileLock(UNLOCK, 0, LAST_BYTE, 1), flock=True, wait=False))
        assert not list(a.locks.table.waiters())
        async with mount(service, b"/c") as c:
            in_c = await c.open()
            assert not await c.set(in_c, 1, READ)
            assert await c.set(in_c, 1, WRITE, flock=True), "let go of while alone: the service's record was old"


async def test_without_the_push_at_sharing_two_mounts_hold_one_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug; what the test before the last relies on."""

    async def push(self: fsd_locks.Locks) -> None:
        self._change(Mode.SHARING)

    monkeypatch.setattr(fsd_locks.Locks, "push", push)
    async with mounts(tmp_path, 1) as (service, (a,)):
        assert await a.set(await a.open(), 1, WRITE)
        async with mount(service, b"/b") as b:
            assert await b.set(await b.open(), 1, WRITE)


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_a_restart_of_the_service_gives_nobody_what_somebody_holds(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)), trio.open_nursery() as nursery:
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE, 0, 9)
        assert await b.set(in_b, 1, WRITE, 10, 19)
        nursery.start_soon(b.wait, in_b, 2)
        await until_waiting(service)
        await service.stop()
        await service.start()
        assert not await b.set(in_b, 3, READ, 0, 9)  # Waits for the end of the grace period.
        assert not await a.set(in_a, 3, READ, 10, 19)
        assert await a.set(in_a, 3, READ, 20, 29)
        await soon(a.fs.flush(in_a, 3))
        await soon(a.fs.flush(in_a, 1))
        await soon(b.fs.flush(in_b, 1))
        await eventually(lambda: b.holds(in_b, 2), 5.0)


async def test_a_restart_while_alone_costs_nothing(tmp_path: Path) -> None:
    async with mounts(tmp_path, 1) as (service, (a,)):
        in_a = await a.open()
        assert await a.set(in_a, 1, WRITE)
        await service.stop()
        at_once(a.fs.set_lock(in_a, 2, FileLock(WRITE, 0, 1, 1), flock=True, wait=False))
        await service.start()
        async with mount(service, b"/b") as b:
            in_b = await b.open()
            assert not await b.set(in_b, 1, WRITE)
            assert not await b.set(in_b, 1, WRITE, flock=True)


async def test_while_nobody_knows_who_decides_a_try_ends_in_time_and_an_unlock_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone mount is to share and cannot tell its locks: the service is away."""
    monkeypatch.setattr(fsd_locks, "TRY_TIMEOUT_S", 0.2)
    async with mounts(tmp_path, 1) as (service, (a,)):
        in_a = await a.open()
        assert await a.set(in_a, 1, WRITE, 0, 9)
        assert await a.set(in_a, 1, WRITE, 20, 29)
        reclaim, is_away = a.metadata.reclaim, True

        async def away() -> None:
            if is_away:
                await trio.sleep(0.1)
                raise Unreachable("away")
            await reclaim()

        monkeypatch.setattr(a.metadata, "reclaim", away)
        async with trio.open_nursery() as nursery:
            came = trio.Event()

            async def other() -> None:
                async with mount(service, b"/b") as b:
                    in_b = await b.open()
                    assert await b.set(in_b, 1, WRITE, 0, 9)
                    assert not await b.set(in_b, 1, READ, 20, 29)
                    came.set()

            nursery.start_soon(other)
            await eventually(lambda: a.locks._mode is Mode.LEAVING)
            for refused in (WRITE, UNLOCK):
                with pytest.raises(Unreachable):
                    await a.set(in_a, 1, refused, 0, 9)
            with pytest.raises(Unreachable):
                await soon(a.fs.get_lock(in_a, 2, FileLock(READ, 0, 1, 1)))
            assert not came.is_set()
            is_away = False
            with trio.fail_after(5):
                await came.wait()


async def test_many_who_wait_leave_the_mount_free_for_others_and_all_get_their_turn(tmp_path: Path) -> None:
    count = 300
    async with mounts(tmp_path, 2) as (service, (a, b)), trio.open_nursery() as nursery:
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE)
        served: list[int] = []

        async def wait(owner: int) -> None:
            await b.wait(in_b, owner)
            served.append(owner)
            assert await b.set(in_b, owner, UNLOCK)

        for owner in range(1, count + 1):
            nursery.start_soon(wait, owner)

        async def all_wait() -> bool:
            return sum(one.waiting for one in (await listed(service)).locks) == count

        await eventually(all_wait)
        with trio.fail_after(2):
            await soon(b.fs.getattr(ROOT))
        assert not served
        assert await a.set(in_a, 1, UNLOCK)
        await eventually(lambda: len(served) == count, 20.0)
        assert sorted(served) == list(range(1, count + 1))


async def test_a_lost_session_has_lost_its_locks(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2, lease_s=1.0) as (_, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE)
        first = a.metadata.session
        a.metadata._session_expired(first)  # As an answer says that came before the service had ended the session.
        await eventually(lambda: a.metadata.session != first, 5.0)
        assert not list(a.locks.table.held())
        await eventually(lambda: b.set(in_b, 1, WRITE))
        assert not await a.set(in_a, 1, WRITE)
        await soon(a.fs.flush(in_a, 1))


async def lose_session(service: Service, mount: Mount) -> None:
    """End it at the service, and wait until the mount has another one."""
    first = mount.metadata.session
    async with trio.open_nursery() as nursery:
        channel = Channel("127.0.0.1", service.port, service="metadata")
        await nursery.start(channel.run)
        await channel.call(EvictSession(first), timeout_s=5)
        nursery.cancel_scope.cancel()
    await eventually(lambda: mount.metadata.session != first and mount.metadata._lost is None, 5.0)


async def has_lost_locks(mount: Mount, fh: int) -> bool:
    """Whether what is read and written through the descriptor fails."""
    refused = []
    for attempt in (lambda: mount.fs.read(fh, 0, 1), lambda: mount.fs.write(fh, 0, b"x")):
        try:
            await soon(attempt())
        except LocksLost:
            refused.append(True)
    assert len(refused) in (0, 2)
    return bool(refused)


@pytest.mark.parametrize("flock", [False, True])
async def test_who_has_lost_a_lock_is_told_by_what_it_reads_and_writes(tmp_path: Path, flock: bool) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)):
        locked, other, in_b = await a.open(), await a.open(), await b.open()
        assert await a.set(locked, 1, WRITE, flock=flock)
        await soon(a.fs.write(locked, 0, b"under the lock"))
        await lose_session(service, a)
        assert await has_lost_locks(a, locked)
        assert not await has_lost_locks(a, other), "it was opened by somebody who held nothing"
        assert await b.set(in_b, 1, WRITE, flock=flock), "others may have the lock"
        assert not await a.set(locked, 1, WRITE, flock=flock)
        assert await has_lost_locks(a, locked), "a lock that was refused is not got"
        assert await b.set(in_b, 1, UNLOCK, flock=flock)
        assert await a.set(locked, 1, WRITE, flock=flock)
        assert not await has_lost_locks(a, locked), "it has the lock again"


async def test_a_lock_that_was_lost_is_let_go_of_by_parts_and_by_closing(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, _)):
        fh, closed = await a.open(), await a.open(b"another")
        assert await a.set(fh, 1, WRITE, 0, 9)
        assert await a.set(fh, 1, READ, 20, 29)
        assert await a.set(closed, 2, WRITE)
        await lose_session(service, a)
        assert await a.set(fh, 1, UNLOCK, 0, 9)
        assert await has_lost_locks(a, fh), "the other range is believed in"
        assert await a.set(fh, 1, READ, 20, 29)
        assert not await has_lost_locks(a, fh)
        assert await has_lost_locks(a, closed)
        await soon(a.fs.flush(closed, 2))  # Its process has closed another descriptor of the file.
        assert not await has_lost_locks(a, closed)
        await soon(a.fs.release(closed))
        assert not list(a.locks._lost.held())


async def test_the_marks_of_a_lost_lock_go_with_its_descriptor(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, _)):
        fh = await a.open()
        assert await a.set(fh, 1, WRITE, flock=True)
        await lose_session(service, a)
        await lose_session(service, a)
        assert await has_lost_locks(a, fh)
        await soon(a.fs.flush(fh, 77))
        await soon(a.fs.release(fh, lock_owner=1, flock=True))
        assert not list(a.locks._lost.held())
        assert not await has_lost_locks(a, await a.open())


async def test_new_locks_and_questions_work_at_once_in_the_new_session(tmp_path: Path) -> None:
    async with mounts(tmp_path, 2) as (service, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, WRITE)
        assert await b.set(in_b, 9, WRITE, 100, 109) is False
        await lose_session(service, a)
        assert await b.set(in_b, 9, WRITE, 100, 109)
        found = await soon(a.fs.get_lock(in_a, 1, FileLock(WRITE, 0, LAST_BYTE, 1)))
        assert found is not None
        assert (found.start, found.end) == (100, 109)
        assert await a.set(in_a, 1, WRITE, 0, 9)


async def test_a_request_whose_outcome_is_unknown_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has granted and the answer is lost: the program was told of an error, so nobody holds the lock."""
    async with mounts(tmp_path, 2) as (service, (a, b)):
        in_a, in_b = await a.open(), await b.open()
        assert await a.set(in_a, 1, READ, 0, 9)
        tell, losing = a.metadata.tell, itertools.count()

        async def lossy(make: Callable[[int], Request[Message]]) -> Message:
            answer = await tell(make)
            if isinstance(make(1), SetLock) and next(losing) == 0:
                raise OutcomeUnknown("lost")
            return answer

        monkeypatch.setattr(a.metadata, "tell", lossy)
        with pytest.raises(OutcomeUnknown):
            await a.set(in_a, 1, WRITE, 5, 19)
        await eventually(lambda: not (a.locks._doubts), 5.0)
        assert await b.set(in_b, 1, WRITE, 10, 19)
        assert await b.set(in_b, 1, READ, 0, 9)
        assert not await b.set(in_b, 1, WRITE, 0, 9)
        held = {(one.session, one.lock.kind, one.lock.start, one.lock.end) for one in (await listed(service)).locks}
        assert (a.metadata.session, READ, 0, 9) in held
