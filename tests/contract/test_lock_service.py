"""Locks of several sessions at a real inode service: who gets them, who is told, what is left of them by whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from metadata.client import Holdings, MetadataClient
from metadata.core.locks import LAST_BYTE, LockKind, LockSpace
from metadata.protocol import (
    GetLock,
    ListLocks,
    ListLocksDone,
    Lock,
    Reclaim,
    SetLock,
    SetLockDone,
    WaitLock,
)
from tests.support.inode_service import Service, ServiceProcess, connect, running_service
from wire.errors import Deadlock, GracePeriod, OutcomeUnknown, WouldBlock
from wire.rpc.client import Channel

READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
ROOT = 1


def lock(kind: LockKind, *, ino: int = ROOT, owner: int = 1, space: LockSpace = LockSpace.POSIX) -> Lock:
    return Lock(ino, space, owner, kind, 0, LAST_BYTE, 4242)


class Client:
    """A session that does with locks what a mount does, with nothing kept but what it says that it holds."""

    def __init__(self) -> None:
        self.metadata: MetadataClient
        self.holds: tuple[Lock, ...] = ()
        self.ready: dict[int, trio.Event] = {}
        self.is_mute = False

    def holdings(self) -> Holdings:
        return Holdings(self.holds)

    def on_ready(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self.ready.setdefault(number, trio.Event()).set()

    async def set(self, wanted: Lock, number: int = 0) -> SetLockDone:
        return await self.metadata.tell(lambda session: SetLock(session, wanted, number))

    async def set_when_granted(self, wanted: Lock) -> None:
        """As a mount does, which waits out the grace period."""
        while True:
            try:
                await self.set(wanted)
                return
            except GracePeriod:
                await trio.sleep(0.02)

    async def can(self, wanted: Lock) -> bool:
        try:
            await self.set(wanted)
        except WouldBlock:
            return False
        return True

    async def wait(self, wanted: Lock, number: int) -> bool:
        return (await self.metadata.tell(lambda session: WaitLock(session, number, wanted))).ready

    async def told(self, number: int) -> None:
        with trio.fail_after(5):
            await self.ready.setdefault(number, trio.Event()).wait()


@asynccontextmanager
async def client(service: Service | int, mountpoint: bytes) -> AsyncIterator[Client]:
    made = Client()
    open_client = service.client if isinstance(service, Service) else partial(connect, service)
    async with open_client(mountpoint, holdings=made.holdings, on_locks_ready=made.on_ready) as made.metadata:
        yield made


@asynccontextmanager
async def two_clients(directory: Path, *, lease_s: float = 20.0) -> AsyncIterator[tuple[Service, Client, Client]]:
    async with (
        running_service(directory / "metadata", lease_s=lease_s) as service,
        client(service, b"/a") as a,
        client(service, b"/b") as b,
    ):
        yield service, a, b


async def listed(port: int, ino: int = 0) -> ListLocksDone:
    async with trio.open_nursery() as nursery:
        channel = Channel("127.0.0.1", port, service="metadata")
        await nursery.start(channel.run)
        answer = await channel.call(ListLocks(ino), timeout_s=5)
        nursery.cancel_scope.cancel()
    return answer


async def test_a_lock_excludes_other_sessions_and_other_owners_of_the_same(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        assert await a.can(lock(WRITE, owner=1))
        assert not await a.can(lock(WRITE, owner=2)), "two processes of one mount"
        assert not await b.can(lock(WRITE, owner=1)), "the same number in another mount is another process"
        told = await b.metadata.tell(lambda session: GetLock(session, lock(READ)))
        assert told.session == a.metadata.session
        assert told.lock == lock(WRITE, owner=1)
        assert await b.can(lock(WRITE, space=LockSpace.FLOCK)), "flock and fcntl know nothing of each other"
        await a.set(lock(UNLOCK, owner=1))
        assert await b.can(lock(WRITE, owner=1))
        assert (await a.metadata.tell(lambda session: GetLock(session, lock(READ, ino=77)))).lock is None


async def test_a_lock_comes_with_the_attributes_of_the_moment(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        done = await a.set(lock(READ))
        assert done.inode is not None
        assert done.inode.mode & 0o170000 == 0o040000
        assert (await b.set(lock(READ, ino=4711))).inode is None, "an inode that is gone can be locked by who has it"


async def test_a_waiter_is_told_when_it_may_try_and_only_the_first_of_those_who_exclude_each_other(
    tmp_path: Path,
) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        assert await a.can(lock(WRITE, owner=1))
        assert not await b.wait(lock(WRITE, owner=1), 1)
        assert not await b.wait(lock(WRITE, owner=2), 2)
        await a.set(lock(UNLOCK, owner=1))
        await b.told(1)
        assert 2 not in b.ready
        with pytest.raises(WouldBlock):
            await a.set(lock(WRITE, owner=1), 7)  # It would wait, so it gives way.
        await b.set(lock(WRITE, owner=1), 1)
        await b.set(lock(UNLOCK, owner=1))
        await b.told(2)


async def test_a_promise_that_nobody_comes_for_passes_to_the_next(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        assert await a.can(lock(WRITE))
        assert not await b.wait(lock(WRITE, owner=1), 1)
        assert not await a.wait(lock(WRITE, owner=2), 1)
        await a.set(lock(UNLOCK))
        await b.told(1)
        await a.told(1)  # A second later, as b does nothing.
        await a.set(lock(WRITE, owner=2), 1)


async def test_a_waiter_that_withdraws_is_not_told_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        assert await a.can(lock(WRITE))
        assert not await b.wait(lock(WRITE, owner=1), 1)
        assert not await a.wait(lock(WRITE, owner=2), 1)
        await b.metadata.tell(lambda session: WaitLock(session, 1, lock(WRITE, owner=1), withdraw=True))
        with trio.fail_after(0.9):  # Before a promise to b would have run out.
            await a.set(lock(UNLOCK))
            await a.told(1)
        assert not b.ready


async def test_who_waits_for_what_is_free_may_try_at_once(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, _):
        assert await a.wait(lock(WRITE), 1)
        await a.set(lock(WRITE), 1)


async def test_a_circle_over_two_mounts_is_refused(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (_, a, b):
        assert await a.can(lock(WRITE, ino=5))
        assert await b.can(lock(WRITE, ino=6))
        assert not await a.wait(lock(WRITE, ino=6), 1)
        with pytest.raises(Deadlock):
            await b.wait(lock(WRITE, ino=5), 1)
        await b.set(lock(UNLOCK, ino=6))
        await a.told(1)


async def test_a_session_that_closes_lets_go(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, client(service, b"/a") as a:
        async with client(service, b"/b") as b:
            assert await b.can(lock(WRITE))
            assert not await a.wait(lock(WRITE), 1)
        await a.told(1)
        await a.set(lock(WRITE), 1)


async def test_a_mount_of_the_same_place_frees_the_locks_of_the_one_before_at_once(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (service, a, b):
        assert await b.can(lock(WRITE))
        assert not await a.wait(lock(WRITE), 1)
        b.metadata._renewal_scope.cancel()
        async with client(service, b"/b"):
            await a.told(1)


async def test_locks_of_a_session_that_falls_silent_are_free_after_its_lease(tmp_path: Path) -> None:
    async with two_clients(tmp_path, lease_s=1.5) as (_, a, b):
        assert await b.can(lock(WRITE))
        assert not await a.wait(lock(WRITE), 1)
        began = trio.current_time()
        b.metadata._closed = True  # Its upkeep ends; nobody tells the service.
        b.metadata._renewal_scope.cancel()
        await a.told(1)
        assert trio.current_time() - began > 0.5
        b.metadata._closed = False


async def test_an_order_from_a_connection_that_was_given_up_is_refused(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (service, a, _), trio.open_nursery() as nursery:
        old, new = (Channel("127.0.0.1", service.port, service="metadata") for _ in range(2))
        for channel in (old, new):
            await nursery.start(channel.run)
            session = a.metadata.session
            await channel.call(SetLock(session, lock(READ)), timeout_s=5)
        with pytest.raises(OutcomeUnknown):
            await old.call(SetLock(session, lock(UNLOCK)), timeout_s=5)
        with pytest.raises(OutcomeUnknown):
            await old.call(WaitLock(session, 1, lock(WRITE)), timeout_s=5)
        with pytest.raises(OutcomeUnknown):
            await old.call(Reclaim(session, ""), timeout_s=5)
        assert len((await listed(service.port)).locks) == 1
        nursery.cancel_scope.cancel()


# --- a restart --------------------------------------------------------------------------------------------------------


async def test_after_a_restart_nobody_gets_what_somebody_held(tmp_path: Path) -> None:
    async with two_clients(tmp_path) as (service, a, b):
        a.holds, b.holds = (lock(WRITE, ino=5),), (lock(READ, ino=6),)
        await a.set(a.holds[0])
        await b.set(b.holds[0])
        await service.stop()
        await service.start()
        await b.set_when_granted(lock(READ, ino=7))
        assert not await b.can(lock(WRITE, ino=5))
        assert not await a.can(lock(WRITE, ino=6))
        held = {(one.session, one.lock) for one in (await listed(service.port)).locks}
        expected = [(a, a.holds[0]), (b, b.holds[0]), (b, lock(READ, ino=7))]
        assert held == {(one.metadata.session, what) for one, what in expected}


async def test_while_one_session_has_not_told_its_locks_nothing_new_is_granted(tmp_path: Path) -> None:
    """One has died with the service: its lease bounds the grace period; who waits is told at its end."""
    service = ServiceProcess(tmp_path / "metadata", "--lease", "2")
    service.start()
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(client(service.port, b"/a"))
        b = await stack.enter_async_context(client(service.port, b"/b"))
        await b.set(lock(WRITE))
        service.kill()
        b.metadata._closed = True
        b.metadata._renewal_scope.cancel()
        service.start()
        with pytest.raises(GracePeriod):
            await a.set(lock(WRITE))
        with pytest.raises(GracePeriod):
            await a.metadata.tell(lambda session: GetLock(session, lock(WRITE)))
        await a.set(lock(UNLOCK))
        assert not await a.wait(lock(WRITE), 1)
        assert (await listed(service.port)).grace
        await a.told(1)
        await a.set(lock(WRITE), 1)
        b.metadata._closed = False
    service.kill()


async def test_what_a_session_claims_later_is_not_taken(tmp_path: Path) -> None:
    """A lock that was granted while the claim was on its way must not be lost by it."""
    async with two_clients(tmp_path) as (service, a, _):
        await a.set(lock(WRITE))
        await a.metadata.reclaim()
        assert [one.lock for one in (await listed(service.port)).locks] == [lock(WRITE)]


async def test_a_claim_for_another_life_of_the_service_is_told_again(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, client(service, b"/a") as a:
        a.holds = (lock(WRITE),)
        a.metadata._life = "an earlier one"
        await a.metadata.reclaim()
        assert a.metadata._life not in ("", "an earlier one")


async def test_a_list_asks_the_session_that_is_alone(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, client(service, b"/a") as a:
        a.holds = (lock(WRITE), lock(READ, ino=5))
        with trio.fail_after(1.5):
            found = await listed(service.port)
            one = await listed(service.port, 5)
        assert [entry.lock for entry in found.locks] == list(a.holds)
        assert [(holder.mountpoint, holder.answered) for holder in found.holders] == [(b"/a", True)]
        assert [entry.lock for entry in one.locks] == [lock(READ, ino=5)]


async def test_a_list_says_which_session_did_not_answer(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, client(service, b"/a") as a:
        a.metadata._closed = True
        a.metadata._renewal_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        found = await listed(service.port)
        assert [(holder.mountpoint, holder.answered) for holder in found.holders] == [(b"/a", False)]
        a.metadata._closed = False
