"""Sessions that end while their mount does not know: what each end may believe and do, at a real service."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from metadata import client as metadata_client
from metadata.core import schema, sessions
from metadata.core.locks import LockKind, LockSpace
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.protocol import (
    MUTATIONS,
    AllocateSlices,
    ChangeRange,
    CloseSession,
    CommitExtents,
    CopyRange,
    Create,
    EvictSession,
    GetAttr,
    GetClusterStatus,
    GetLayout,
    GetLock,
    Link,
    ListSessions,
    Lock,
    MakeDirectory,
    MakeNode,
    MakeSymlink,
    MakeTemporary,
    Mutation,
    OpenSession,
    RangeOperation,
    Reclaim,
    RegisterOpens,
    ReleaseInode,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    RenewSession,
    SessionEnd,
    SetAttr,
    SetAttrMask,
    SetFlags,
    SetLock,
    SetXattr,
    TouchAtimes,
    Unlink,
    WaitLock,
    WriteInline,
)
from metadata.session_keeper import SessionKeeper
from tests.support.inode_service import Service, channel_to, running_service, until
from wire.clocks import boot_time_s
from wire.errors import NoSuchEntry, SessionExpired
from wire.message import Message, Request
from wire.rpc.client import Channel

ROOT_INO = schema.ROOT_INO


def opening(mountpoint: bytes) -> OpenSession:
    return OpenSession("raw", "boot", mountpoint, opening=mountpoint.decode())


async def opened(channel: Channel, mountpoint: bytes) -> int:
    return (await channel.call(opening(mountpoint), timeout_s=10)).session


class SuspendedClock:
    """Boot time of a machine that can be suspended, which trio's clock does not see."""

    def __init__(self) -> None:
        self.suspended_s = 0.0

    def __call__(self) -> float:
        return boot_time_s() + self.suspended_s


# --- the lease, by the client's clock ---------------------------------------------------------------------------------


async def test_a_suspended_machine_stops_acting_alone_with_its_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_client, "WATCH_TICK_S", 1000.0)
    events: list[bool] = []

    async def on_sharing(alone: bool) -> None:
        events.append(alone)

    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=60.0) as service,
        service.client(on_sharing=on_sharing, clock_s=clock) as client,
    ):
        await until(lambda: client.statistics().renewals > 0)
        assert client.alone
        assert client.lease_left_s() > 0
        clock.suspended_s += 3600.0
        await client.ask(lambda session: GetAttr(session, 1))
        await until(lambda: events == [False], timeout_s=1.0)
        assert client.statistics().lease_scares == 1


async def test_an_idle_mount_notices_that_its_machine_was_suspended(tmp_path: Path) -> None:
    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=60.0) as service,
        service.client(clock_s=clock) as client,
    ):
        await until(lambda: client.statistics().renewals > 0)
        clock.suspended_s += 3600.0
        await until(lambda: client.statistics().lease_scares == 1, timeout_s=3 * metadata_client.WATCH_TICK_S)


async def test_a_lease_that_was_over_by_the_clients_clock_runs_again_with_the_next_renewal(tmp_path: Path) -> None:
    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=4.0) as service,
        service.client(clock_s=clock) as client,
    ):
        session = client.session
        await until(lambda: client.statistics().renewals > 0)
        clock.suspended_s += 100.0
        assert client.lease_left_s() <= 0
        await until(lambda: client.lease_left_s() > 0)
        assert client.session == session


async def test_no_lease_notices_that_the_wall_clock_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running_service(tmp_path / "metadata", lease_s=1.0) as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
    ):
        real = time.time_ns
        ahead_ns = 0
        monkeypatch.setattr(time, "time_ns", lambda: real() + ahead_ns)
        monkeypatch.setattr(time, "time", lambda: (real() + ahead_ns) / 1e9)
        for hours in (5, -5, 48):
            ahead_ns = hours * 3600 * 10**9
            wanted = first.statistics().renewals + 2
            await until(lambda: first.statistics().renewals >= wanted)  # noqa: B023 (within its turn)
            await second.ask(lambda session: GetAttr(session, 1))
        for client in (first, second):
            assert client.statistics().sessions_lost == 0
            assert client.statistics().lease_scares == 0


# --- what an ended session can still do -------------------------------------------------------------------------------

LOCK = Lock(2, LockSpace.POSIX, 7, LockKind.WRITE, 0, 9)


def mutation(kind: type[Mutation[Message]], session: int, sequence: int) -> Mutation[Message]:
    """One of each kind, on the inodes 1 (the root) and 2 (a file named "file")."""
    made: dict[type[Mutation[Message]], tuple[object, ...]] = {
        SetAttr: (2, SetAttrMask.SIZE),
        Create: (ROOT_INO, b"new", 0o100644, True),
        MakeNode: (ROOT_INO, b"node", 0o010644, 0),
        MakeDirectory: (ROOT_INO, b"directory", 0o755),
        MakeSymlink: (ROOT_INO, b"symlink", b"target"),
        Link: (2, ROOT_INO, b"link"),
        Unlink: (ROOT_INO, b"file"),
        RemoveDirectory: (ROOT_INO, b"empty"),
        Rename: (ROOT_INO, b"file", ROOT_INO, b"renamed"),
        SetXattr: (2, b"user.a", b"1"),
        RemoveXattr: (2, b"user.b"),
        WriteInline: (2, 0, b"late", 1),
        CommitExtents: (2, (), (), 100, 1, False),
        AllocateSlices: (5,),
        ReleaseInode: ((2,),),
        MakeTemporary: (ROOT_INO, 0o100600, True),
        SetFlags: (2, 0),
        TouchAtimes: ((),),
        ChangeRange: (2, RangeOperation.ALLOCATE, 0, 100),
        CopyRange: (2, 0, 2, 100, 5),
    }
    return kind(session, sequence, *made[kind])


def others(session: int) -> list[Request[Message]]:
    """Whatever else names a session and changes something, or tells what only a session may know."""
    return [
        SetLock(session, LOCK),
        GetLock(session, LOCK),
        WaitLock(session, 1, LOCK),
        Reclaim(session, "", (LOCK,)),
        RegisterOpens(session, (2,), True),
        RenewSession(session, 0, False),
        GetLayout(session, 2, open=True),
        GetAttr(session, 2),
    ]


def keys(service: Service, engine: LmdbEngine) -> list[tuple[bytes, bytes]]:
    """All that is stored."""
    with engine.read() as txn:
        return list(txn.scan(b"", b"\xff" * 16, 1 << 20))


@pytest.mark.parametrize("how", ["expired", "evicted", "closed"])
async def test_after_its_end_a_session_can_change_nothing(tmp_path: Path, how: str) -> None:
    engines: list[LmdbEngine] = []

    def open_engine(path: Path) -> LmdbEngine:
        engines.append(LmdbEngine(path))
        return engines[-1]

    async with (
        running_service(
            tmp_path / "metadata", open_engine=open_engine, lease_s=0.5 if how == "expired" else 60.0
        ) as service,
        service.client(b"/alive") as alive,
        channel_to(service) as channel,
    ):
        await alive.mutate(lambda s, n: Create(s, n, ROOT_INO, b"file", 0o100644, exclusive=True))
        session = await opened(channel, b"/dead")
        if how == "closed":
            await channel.call(CloseSession(session), timeout_s=5)
        elif how == "evicted":
            await channel.call(EvictSession(session), timeout_s=5)
        await until(lambda: session not in ended_not_cleaned(engines[0]))
        before = keys(service, engines[0])
        sequence = 0
        for request in [*(mutation(kind, session, (sequence := sequence + 1)) for kind in MUTATIONS), *others(session)]:
            with pytest.raises(SessionExpired):
                await channel.call(request, timeout_s=5)
        assert keys(service, engines[0]) == before
        await alive.tell(lambda s: SetLock(s, LOCK))  # And holds nothing back.


def ended_not_cleaned(engine: LmdbEngine) -> dict[int, bool]:
    """The session records that are there, and whether each is marked as ended; a cleaned one is gone."""
    with engine.read() as txn:
        return {number: record.ended for number, record in sessions.load(txn)}


async def test_an_eviction_is_durable_when_it_is_answered(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, channel_to(service) as channel:
        session = await opened(channel, b"/mnt")
        await channel.call(EvictSession(session), timeout_s=5)
        await service.stop()
        await service.start()
        with pytest.raises(SessionExpired):
            await channel.call(RenewSession(session, 0, False), timeout_s=5)
        with pytest.raises(NoSuchEntry):
            await channel.call(EvictSession(session), timeout_s=5)


async def test_whoever_is_let_in_because_another_session_ended_makes_that_end_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is killed after it has let the second in, before anything else marks the first."""
    monkeypatch.setattr(SessionKeeper, "_end_durably", lambda *_: None)
    async with running_service(tmp_path / "metadata", lease_s=1.0) as service, channel_to(service) as channel:
        first = await opened(channel, b"/a")  # It may believe to be alone, and is silent from now on.
        second = await opened(channel, b"/b")
        await service.stop()
        await service.start()
        await channel.call(RenewSession(second, 0, False), timeout_s=5)
        with pytest.raises(SessionExpired):
            await channel.call(RenewSession(first, 0, False), timeout_s=5)


async def test_sessions_are_listed_with_what_they_hold_and_how_they_ended(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "metadata", lease_s=1.0) as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
        channel_to(service) as channel,
    ):
        made = await first.mutate(lambda s, n: Create(s, n, ROOT_INO, b"file", 0o100644, exclusive=True, open=True))
        await first.tell(lambda s: SetLock(s, LOCK))
        await second.tell(lambda s: WaitLock(s, 1, LOCK))
        silent = await opened(channel, b"/c")
        evicted = await opened(channel, b"/d")
        await channel.call(EvictSession(evicted), timeout_s=5)
        listed = await channel.call(ListSessions(), timeout_s=5)
        by_number = {one.session: one for one in listed.sessions}
        assert by_number.keys() == {first.session, second.session, silent}
        one = by_number[first.session]
        assert (one.mountpoint, one.alone, one.reclaimed) == (b"/a", False, True)
        assert (one.open_inodes, one.locks, one.waiting_locks) == (1, 1, 0), made
        assert by_number[second.session].waiting_locks == 1
        assert 0 < one.lease_left_ms <= listed.lease_ms == 1000

        async def two_have_ended() -> bool:
            status = await channel.call(GetClusterStatus(), timeout_s=5)
            return status.fenced_count == 2 and status.session_count == 2

        with trio.fail_after(5):
            while not await two_have_ended():  # noqa: ASYNC110 (it is far away)
                await trio.sleep(0.05)
        ended = (await channel.call(ListSessions(), timeout_s=5)).ended
        assert [(one.session, one.how) for one in ended] == [
            (silent, SessionEnd.EXPIRED),
            (evicted, SessionEnd.EVICTED),
        ]
