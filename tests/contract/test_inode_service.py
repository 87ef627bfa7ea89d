"""The inode service over real sockets with the real engine: what its clients may rely on."""

# ruff: noqa: B023  (every lambda is called before its loop goes on)
from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from blockstore.core.cluster_map import ClusterMap, ServerState
from blockstore.protocol import (
    BlockId,
    BlockServerStatus,
    Heartbeat,
    RegisterServer,
)
from metadata import server
from metadata.core import schema
from metadata.core.fsck import check
from metadata.core.schema import Extent, Inode
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.group_commit import GroupCommitLimits
from metadata.protocol import (
    AllocateSlices,
    ChangeRange,
    CloseSession,
    CommitExtents,
    CopyRange,
    Create,
    DegradedBlock,
    GetAttr,
    GetClusterStatus,
    GetLayout,
    GetMap,
    InodeReply,
    Lookup,
    MakeDirectory,
    OpenSession,
    OpenSessionDone,
    RangeOperation,
    ReadDir,
    RenewSession,
    ReportBadCopy,
    StatFs,
    Unlink,
    WriteInline,
)
from metadata.service import SERVICE_METHODS
from tests.support.engines import Gate, Twisted
from tests.support.inode_service import Service, channel_to, connect, running_service, until
from wire.errors import (
    EntryExists,
    InvalidArgument,
    NoRoom,
    NoSpace,
    NoSuchEntry,
    NotDirectory,
    OutcomeUnknown,
    ServerOverloaded,
    SessionExpired,
    StoreError,
    WrongCluster,
    WrongVersion,
)
from wire.rpc.server import Call, RpcServer, open_listener

MODE = 0o100644


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with running_service(tmp_path / "metadata") as running:
        yield running


# --- reads and mutations ----------------------------------------------------------------------------------------------


async def test_a_read_after_an_acknowledgement_sees_the_change(service: Service) -> None:
    async with service.client(b"/a") as one, service.client(b"/b") as other:
        for number in range(50):
            name = b"f%d" % number
            made = await one.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))
            found = await other.ask(lambda s: Lookup(s, 1, name))
            assert found.ino == made.ino


async def test_many_at_once_are_all_done_once(service: Service) -> None:
    async with service.client() as client:
        inos: list[int] = []

        async def create(number: int) -> None:
            made = await client.mutate(lambda s, q: Create(s, q, 1, b"f%d" % number, MODE, True))
            inos.append(made.ino)

        async with trio.open_nursery() as nursery:
            for number in range(1500):  # More than the window of sequence numbers.
                nursery.start_soon(create, number)
        assert len(set(inos)) == 1500
        assert (await client.ask(lambda s: GetAttr(s, 1))).inode.size == 1500


async def test_slice_ids_are_given_out_once(service: Service) -> None:
    async with service.client(b"/a") as one, service.client(b"/b") as other:
        ids = [await client.allocate_slice() for _ in range(600) for client in (one, other)]
    assert len(set(ids)) == len(ids)


async def test_concurrent_callers_of_allocate_slice_get_different_ids(service: Service) -> None:
    async with service.client() as client:
        ids: list[int] = []

        async def take() -> None:
            ids.append(await client.allocate_slice())

        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(take)
    assert len(set(ids)) == 1000


async def test_a_retry_after_a_restart_gets_the_first_answer(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, channel_to(service) as channel:
        session = (await channel.call(OpenSession("test", "boot", b"/mnt"), timeout_s=5)).session
        request = MakeDirectory(session, 7777, 1, b"d", 0o755)
        first = await channel.call(request, timeout_s=5)
        await service.stop()
        await service.start()
        assert await channel.call(request, timeout_s=5) == first
        with pytest.raises(EntryExists):
            await channel.call(MakeDirectory(session, 7778, 1, b"d", 0o755), timeout_s=5)


async def test_clients_go_on_over_a_restart_without_an_error(tmp_path: Path) -> None:
    lost: list[bool] = []

    async def on_lost() -> None:
        lost.append(True)

    async with (
        running_service(tmp_path / "metadata") as service,
        service.client(on_session_lost=on_lost) as client,
    ):
        session, stop = client.session, trio.Event()
        made: list[int] = []

        async def create_for_ever() -> None:
            while not stop.is_set():
                name = b"f%d" % len(made)
                made.append((await client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))).ino)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create_for_ever)
            for _ in range(3):
                before = len(made)
                await until(lambda: len(made) > before + 5)
                await service.stop()
                await service.start()
            stop.set()
        assert (await client.ask(lambda s: GetAttr(s, 1))).inode.size == len(made)
        assert client.session == session
        assert lost == []


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_second_session_is_not_opened_before_the_first_has_dropped_its_caches(service: Service) -> None:
    events: list[str] = []
    may_drop = trio.Event()

    async def on_sharing(alone: bool) -> None:
        events.append("drops" if not alone else "alone")
        if not alone:
            await may_drop.wait()
            events.append("has dropped")

    async with service.client(b"/a", on_sharing=on_sharing) as first:
        assert first.alone
        async with trio.open_nursery() as nursery:

            async def second() -> None:
                async with service.client(b"/b") as other:
                    events.append("second is open")
                    assert not other.alone
                    assert not first.alone

            nursery.start_soon(second)
            await until(lambda: events == ["drops"])
            await trio.sleep(0.1)
            assert events == ["drops"]
            assert first.alone, "it still has what only a lone client may have"
            may_drop.set()
        await until(lambda: first.alone)
        assert events == ["drops", "has dropped", "second is open", "alone"]


async def test_a_session_that_does_not_answer_holds_up_an_opening_for_one_lease_only(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata", lease_s=1.0) as service, channel_to(service) as channel:
        silent = await channel.call(OpenSession("silent", "boot", b"/silent"), timeout_s=5)
        assert silent.alone
        began = trio.current_time()
        async with service.client(b"/b") as client:
            assert 0.8 <= trio.current_time() - began <= 5.0
            await until(lambda: client.alone)
            with pytest.raises(SessionExpired):
                await channel.call(MakeDirectory(silent.session, 1, 1, b"fenced", 0o755), timeout_s=5)
            with pytest.raises(SessionExpired):
                await channel.call(GetAttr(silent.session, 1), timeout_s=5)
            with pytest.raises(NoSuchEntry):
                await client.ask(lambda s: Lookup(s, 1, b"fenced"))


async def test_a_mount_of_the_same_place_takes_over_at_once(service: Service) -> None:
    async with channel_to(service) as channel:
        dead = await channel.call(OpenSession("dead daemon", "boot", b"/mnt"), timeout_s=5)
        began = trio.current_time()
        async with service.client(b"/mnt") as client:
            assert trio.current_time() - began < 2
            assert client.session != dead.session
            with pytest.raises(SessionExpired):
                await channel.call(GetAttr(dead.session, 1), timeout_s=5)


async def test_a_replaced_daemon_that_lives_gets_a_session_of_its_own_and_ends_nobodys(service: Service) -> None:
    """As after a lazy unmount with files in use: two daemons of one place, of which neither may end the other's."""
    async with service.client(b"/mnt") as old:
        replaced = old.session
        async with service.client(b"/mnt") as new:
            session = new.session
            await old.mutate(lambda s, q: MakeDirectory(s, q, 1, b"of-old", 0o755))
            await new.mutate(lambda s, q: MakeDirectory(s, q, 1, b"of-new", 0o755))
            assert new.session == session
            assert old.session not in (replaced, session)
            assert not old.alone
            assert not new.alone
            await new.ask(lambda s: Lookup(s, 1, b"of-old"))
            await old.ask(lambda s: Lookup(s, 1, b"of-new"))
            assert (old.statistics().sessions_lost, new.statistics().sessions_lost) == (1, 0)


async def test_a_change_left_in_a_connection_that_was_given_up_is_not_made_after_newer_ones(service: Service) -> None:
    """As when this process stood still while its client lost patience, connected again and wrote newer bytes."""
    async with channel_to(service) as given_up, channel_to(service) as newer:
        await given_up.call(GetMap(), timeout_s=5)  # So it is accepted first.
        session = (await newer.call(OpenSession("c", "boot", b"/mnt"), timeout_s=5)).session
        ino = (await newer.call(Create(session, 1, 1, b"f", MODE, exclusive=True), timeout_s=5)).ino
        await newer.call(WriteInline(session, 3, ino, 0, b"newer", 0), timeout_s=5)
        with pytest.raises(OutcomeUnknown):
            await given_up.call(WriteInline(session, 2, ino, 0, b"older", 0), timeout_s=5)
        assert (await newer.call(GetLayout(session, ino), timeout_s=5)).inline == b"newer"


async def test_a_repeated_opening_gets_the_same_session(service: Service) -> None:
    async with channel_to(service) as channel:
        request = OpenSession("c", "boot", b"/mnt", b"/", "opening-1")
        first = await channel.call(request, timeout_s=5)
        again = await channel.call(request, timeout_s=5)
        assert (again.session, again.alone, again.turn) == (first.session, first.alone, first.turn)


async def test_an_expired_client_opens_a_new_session_after_dropping_its_caches(tmp_path: Path) -> None:
    events: list[str] = []

    async def on_lost() -> None:
        events.append("lost")

    async with (
        running_service(tmp_path / "metadata", lease_s=20.0) as service,
        service.client(on_session_lost=on_lost) as client,
        channel_to(service) as channel,
    ):
        first = client.session
        await channel.call(CloseSession(first), timeout_s=5)  # As if it had expired.
        await client.mutate(lambda s, q: MakeDirectory(s, q, 1, b"d", 0o755))
        assert client.session != first
        assert events == ["lost"]
        await until(lambda: client.alone)  # When it has told what it has open.


async def test_a_mount_that_hears_nothing_stops_acting_alone_before_its_lease_is_over(tmp_path: Path) -> None:
    events: list[tuple[bool, float]] = []

    async def on_sharing(alone: bool) -> None:
        events.append((alone, trio.current_time()))

    async with (
        running_service(tmp_path / "metadata", lease_s=2.0) as service,
        service.client(on_sharing=on_sharing) as client,
    ):
        await until(lambda: client.statistics().renewals > 2)
        await service.stop()
        heard = trio.current_time()
        await until(lambda: not client.alone)
        assert [alone for alone, _ in events] == [False]
        assert events[0][1] - heard < 2.0, "after its lease was over"
        await service.start()
        await until(lambda: client.alone)
        assert [alone for alone, _ in events] == [False, True]


async def test_dropping_caches_may_take_longer_than_the_lease(tmp_path: Path) -> None:
    async def on_sharing(alone: bool) -> None:
        if not alone:
            await trio.sleep(2.5)

    async with (
        running_service(tmp_path / "metadata", lease_s=1.5) as service,
        service.client(b"/a", on_sharing=on_sharing) as first,
    ):
        session, began = first.session, trio.current_time()
        async with service.client(b"/b", timeout_s=10):
            assert trio.current_time() - began > 2.0
            assert not first.alone
            await first.ask(lambda s: GetAttr(s, 1))
            assert first.session == session


async def test_a_mount_that_cannot_become_alone_shares_and_is_told_again(service: Service) -> None:
    failures = [NoSuchEntry("an open file is gone"), NoSuchEntry("another one")]

    async def on_sharing(alone: bool) -> None:
        if alone and failures:
            raise failures.pop()

    async with service.client(b"/a", on_sharing=on_sharing) as first:
        async with service.client(b"/b"):
            assert not first.alone
        await until(lambda: first.alone)
        assert failures == []


async def test_a_mount_may_ask_while_it_becomes_alone_after_its_session_was_lost(service: Service) -> None:
    events: list[str] = []

    async def on_sharing(alone: bool) -> None:
        assert (await client.ask(lambda s: GetAttr(s, 1))).ino == 1
        events.append("alone" if alone else "shares")

    async def on_lost() -> None:
        events.append("lost")

    async with (
        service.client(on_sharing=on_sharing, on_session_lost=on_lost) as client,
        channel_to(service) as channel,
    ):
        await channel.call(CloseSession(client.session), timeout_s=5)
        with pytest.raises(NoSuchEntry):
            await client.ask(lambda s: Lookup(s, 1, b"none"))
        await until(lambda: events == ["lost", "alone"])


async def test_a_change_that_may_have_been_made_before_the_session_was_lost_is_told_as_unknown() -> None:
    """A service that breaks the connection instead of answering, and then knows nothing of the session."""
    scope, inode, map = trio.CancelScope(), Inode(0o40755, 2, 0, 0, 0, 0, 0, 0, 0), ClusterMap(1, "c", 1)
    opened: list[int] = []

    def handle(call: Call) -> None:
        request = call.request
        if isinstance(request, OpenSession):
            opened.append(len(opened) + 1)
            call.reply(OpenSessionDone(opened[-1], 20_000, 1, inode, False, map))
        elif isinstance(request, MakeDirectory) and not scope.cancel_called:
            scope.cancel()
        elif isinstance(request, MakeDirectory) and request.session == 1:
            raise SessionExpired("never heard of it")
        elif isinstance(request, MakeDirectory):
            call.reply(InodeReply(2, inode))

    async def serve(port: int, *, task_status: trio.TaskStatus[int]) -> None:
        listener = await open_listener("127.0.0.1", port)
        task_status.started(listener.getsockname()[1])
        await RpcServer(service="metadata", methods=SERVICE_METHODS, handler=handle).serve([listener])

    async with trio.open_nursery() as nursery:

        async def first_life(*, task_status: trio.TaskStatus[int]) -> None:
            with scope:
                await serve(0, task_status=task_status)
            await nursery.start(serve, port)

        port: int = await nursery.start(first_life)
        async with connect(port) as client:
            with pytest.raises(OutcomeUnknown):
                await client.mutate(lambda s, q: MakeDirectory(s, q, 1, b"d", 0o755))
            await client.mutate(lambda s, q: MakeDirectory(s, q, 1, b"e", 0o755))
            assert client.session == 2
            client._closed = True  # This service would not answer CloseSession.
        nursery.cancel_scope.cancel()


async def test_what_an_ended_session_held_goes_with_it(service: Service) -> None:
    async with service.client(b"/a") as watcher:
        async with service.client(b"/b") as client:
            made = await client.mutate(lambda s, q: Create(s, q, 1, b"f", MODE, True))
            gone = await client.mutate(lambda s, q: Unlink(s, q, 1, b"f"))
            assert gone.held
            await watcher.ask(lambda s: GetAttr(s, made.ino))

        async def is_gone() -> bool:
            try:
                await watcher.ask(lambda s: GetAttr(s, made.ino))
            except NoSuchEntry:
                return True
            return False

        with trio.fail_after(5):
            while not await is_gone():  # noqa: ASYNC110  (of another process)
                await trio.sleep(0.01)


async def test_a_session_can_live_in_a_subdirectory(service: Service) -> None:
    async with service.client(b"/a") as client:
        made = await client.mutate(lambda s, q: MakeDirectory(s, q, 1, b"sub", 0o755))
        await client.mutate(lambda s, q: Create(s, q, 1, b"file", MODE, True))
        async with service.client(b"/b", subdirectory=b"/sub/") as below:
            assert (below.root_ino, below.root.mode) == (made.ino, made.inode.mode)
        for path, kind in ((b"/none", NoSuchEntry), (b"/file", NotDirectory), (b"/..", InvalidArgument)):
            with pytest.raises(kind):
                async with service.client(b"/c", subdirectory=path):
                    pytest.fail("opened")


async def test_sessions_survive_a_restart_and_an_ended_one_does_not_come_back(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service, channel_to(service) as channel:
        kept = await channel.call(OpenSession("kept", "boot", b"/kept"), timeout_s=5)
        await channel.call(CloseSession(kept.session), timeout_s=5)
        kept = await channel.call(OpenSession("kept", "boot", b"/kept"), timeout_s=5)
        await service.stop()
        await service.start()
        await channel.call(GetAttr(kept.session, 1), timeout_s=5)
        with pytest.raises(SessionExpired):
            await channel.call(GetAttr(kept.session - 1, 1), timeout_s=5)
        renewed = await channel.call(RenewSession(kept.session, 0, True, 0, kept.turn), timeout_s=5)
        assert renewed.alone


# --- the cluster map --------------------------------------------------------------------------------------------------


def registration(uuid: str = "u1", cluster_id: str = "", port: int = 4000) -> RegisterServer:
    return RegisterServer(uuid, cluster_id, "127.0.0.1", port, "rack", 10)


async def test_servers_join_fall_silent_and_come_back(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "metadata", server_down_after_s=1.5) as service,
        channel_to(service) as channel,
        service.client() as client,
    ):
        one = await channel.call(registration("u1"), timeout_s=5)
        two = await channel.call(registration("u2", port=4001), timeout_s=5)
        assert (one.server_id, two.server_id) == (1, 2)
        await until(lambda: client.map.epoch == two.map.epoch)  # The long poll has brought it.

        def state(server_id: int) -> ServerState:
            return next(s.state for s in client.map.servers if s.server_id == server_id)

        beat = Heartbeat(BlockServerStatus(1, 1000, 600, 0, 0, epoch=two.map.epoch))
        with trio.fail_after(5):
            while state(2) is not ServerState.DOWN:
                await channel.call(beat, timeout_s=5)
                await trio.sleep(0.05)
        assert state(1) is ServerState.UP
        reply = await channel.call(beat, timeout_s=5)
        assert reply.map == client.map, "an old epoch is answered with the new map"
        await channel.call(Heartbeat(BlockServerStatus(2, 1000, 600, 0, 0)), timeout_s=5)
        await until(lambda: state(2) is ServerState.UP)
        again = await channel.call(registration("u2", port=4005), timeout_s=5)
        assert again.server_id == 2
        with pytest.raises(WrongCluster):
            await channel.call(registration("u3", cluster_id="another"), timeout_s=5)
        with pytest.raises(NoSuchEntry):
            await channel.call(Heartbeat(BlockServerStatus(9, 1, 1, 0, 0)), timeout_s=5)
        await service.stop()
        await service.start()
        kept = await channel.call(GetMap(), timeout_s=5)
        assert kept.map.epoch >= again.map.epoch
        assert [s.port for s in kept.map.servers] == [4000, 4005]
        assert kept.map.cluster_id == one.map.cluster_id


async def test_statfs_counts_a_shared_disk_once_and_divides_by_the_copies(service: Service) -> None:
    async with channel_to(service) as channel, service.client() as client:
        for number, device in ((1, "disk"), (2, "disk"), (3, "other")):
            await channel.call(registration(f"u{number}", port=4000 + number), timeout_s=5)
            await channel.call(Heartbeat(BlockServerStatus(number, 1000, 600, 0, 0, device=device)), timeout_s=5)
        reply = await client.ask(lambda s: StatFs(s, 1))
        assert (reply.space_total, reply.space_free, reply.inode_count) == (1000, 600, 1)


async def test_space_that_is_not_there_cannot_be_allocated(service: Service) -> None:
    """What is allocated counts as used, for statfs and for the next allocation; holes give it back."""
    async with channel_to(service) as channel, service.client() as client:
        await channel.call(registration("u1", port=4001), timeout_s=5)
        await channel.call(Heartbeat(BlockServerStatus(1, 1 << 30, 1 << 20, 0, 0, device="disk")), timeout_s=5)
        inos = [(await client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))).ino for name in (b"a", b"b")]
        allocate, punch = RangeOperation.ALLOCATE, RangeOperation.PUNCH
        for _ in range(2):  # The second time there is nothing missing.
            done = await client.mutate(lambda s, q: ChangeRange(s, q, inos[0], allocate, 0, 400 << 10))
            assert done.inode.allocated == 400 << 10
        assert (await client.ask(lambda s: StatFs(s, 1))).space_free == (512 - 400) << 10
        with pytest.raises(NoRoom):
            await client.mutate(lambda s, q: ChangeRange(s, q, inos[1], allocate, 0, 200 << 10))
        assert (await client.ask(lambda s: GetAttr(s, inos[1]))).inode.allocated == 0
        await client.mutate(lambda s, q: ChangeRange(s, q, inos[0], punch, 0, 400 << 10))
        await client.mutate(lambda s, q: ChangeRange(s, q, inos[1], allocate, 0, 200 << 10))
        with pytest.raises(NoSuchEntry):
            await client.mutate(lambda s, q: ChangeRange(s, q, 999, allocate, 0, 1))


async def test_a_copy_sent_again_after_a_restart_counts_its_references_once(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "metadata") as service,
        service.client() as client,
        channel_to(service) as channel,
    ):
        inos = [(await client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))).ino for name in (b"a", b"b")]
        slice_id = await client.allocate_slice()
        await client.mutate(
            lambda s, q: CommitExtents(s, q, inos[0], (Extent(0, 10, slice_id, 0),), ((slice_id, 10),), 10, 0)
        )
        request = CopyRange(client.session, 7777, inos[0], 0, inos[1], 0, 10)
        first = await channel.call(request, timeout_s=5)
        assert first.done == 10
        await service.stop()
        await service.start()
        assert await channel.call(request, timeout_s=5) == first
    engine = LmdbEngine(tmp_path / "metadata" / "lmdb")
    with engine.read() as txn:
        assert txn.get(schema.slice_key(slice_id)) == schema.encode_pair(2, 10)
        assert [str(violation) for violation in check(txn)] == []
    engine.close()


async def test_bad_copies_are_kept_and_shown(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "metadata") as service,
        channel_to(service) as channel,
        service.client() as client,
    ):
        await channel.call(registration("u1"), timeout_s=5)
        made = await client.mutate(lambda s, q: Create(s, q, 1, b"f", MODE, True))
        slice_id = await client.allocate_slice()
        await client.mutate(
            lambda s, q: CommitExtents(
                s, q, made.ino, (Extent(0, 5 << 20, slice_id, 0),), ((slice_id, 5 << 20),), 5 << 20, 0
            )
        )
        short = await client.allocate_slice()
        await client.mutate(
            lambda s, q: CommitExtents(
                s,
                q,
                made.ino,
                (Extent(8 << 20, 100, short, 0),),
                ((short, 100),),
                0,
                0,
                degraded=(DegradedBlock(BlockId(short, 0), 1),),
            )
        )
        client.report_bad_copy(BlockId(slice_id, 1), 1, True)
        client.report_bad_copy(BlockId(slice_id, 1), 1, True)
        client.report_bad_copy(BlockId(slice_id, 2), 1, True)  # There is no such block.
        client.report_bad_copy(BlockId(short + 1, 0), 1, True)  # Nor this.

        async def shown() -> tuple[int, list[tuple[BlockId, int, str]]]:
            status = await channel.call(GetClusterStatus(), timeout_s=5)
            return status.bad_block_count, [(b.block, b.server_id, b.reason) for b in status.bad_blocks]

        expected = (2, [(BlockId(slice_id, 1), 1, "corrupt"), (BlockId(short, 0), 0, "degraded")])
        with trio.fail_after(5):
            while await shown() != expected or client._reports:  # noqa: ASYNC110  (of the service)
                await trio.sleep(0.01)
        assert await shown() == expected
        await service.stop()
        await service.start()
        assert await shown() == expected
        with pytest.raises(InvalidArgument):
            await channel.call(ReportBadCopy(BlockId(slice_id, 0), 99, False), timeout_s=5)


# --- limits and bad input ---------------------------------------------------------------------------------------------


async def test_overload_is_refused_at_once(tmp_path: Path) -> None:
    gate = Gate()
    gate.opened.set()

    def open_engine(directory: Path) -> Twisted:
        return Twisted(LmdbEngine(directory), gate)

    limits = GroupCommitLimits(queue_max=4)
    async with (
        running_service(tmp_path / "metadata", open_engine=open_engine, commit_limits=limits) as service,
        channel_to(service) as channel,
    ):
        session = (await channel.call(OpenSession("c", "boot", b"/m"), timeout_s=5)).session
        gate.opened.clear()
        refused: list[int] = []

        async def create(number: int) -> None:
            request = Create(session, number + 1, 1, b"f%d" % number, MODE, True)
            try:
                await channel.call(request, timeout_s=5, retry=False)
            except ServerOverloaded:
                refused.append(number)
            if len(refused) >= 10:
                gate.opened.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(create, number)
        directory = await channel.call(ReadDir(session, 1, 0, 100), timeout_s=5)
        assert len(refused) >= 10
        assert {e.name for e in directory.entries} == {b"f%d" % n for n in range(20) if n not in refused}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(where)], check=True)
    yield where
    subprocess.run(["umount", str(where)], check=True)


async def test_a_full_disk_refuses_changes_and_serves_reads_until_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 << 20))
    async with running_service(small_disk / "metadata") as service, service.client() as client:
        made: list[int] = []

        async def fill() -> None:
            for number in range(2000):
                file = await client.mutate(lambda s, q: Create(s, q, 1, b"f%d" % number, MODE, True))
                made.append(file.ino)
                await client.mutate(lambda s, q: WriteInline(s, q, file.ino, 0, bytes(16000), 0))

        with pytest.raises((NoSpace, NoRoom)):
            await fill()
        assert (await client.ask(lambda s: GetAttr(s, 1))).inode.size == len(made) > 50
        ballast.unlink()
        await client.mutate(lambda s, q: Create(s, q, 1, b"after", MODE, True))
        assert (await client.ask(lambda s: Lookup(s, 1, b"after"))).inode.nlink == 1


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\0" * 100])
async def test_garbage_on_the_port_harms_nobody(service: Service, garbage: bytes) -> None:
    async with service.client() as client:
        stream = await trio.open_tcp_stream("127.0.0.1", service.port)
        async with stream:
            await stream.send_all(garbage)
            with trio.fail_after(5):
                try:
                    while await stream.receive_some(65536):
                        continue
                except trio.BrokenResourceError:
                    pass
        await client.mutate(lambda s, q: MakeDirectory(s, q, 1, b"d", 0o755))


async def test_a_request_of_a_session_that_never_was_is_refused(service: Service) -> None:
    async with channel_to(service) as channel:
        with pytest.raises(SessionExpired):
            await channel.call(AllocateSlices(12345, 1, 10), timeout_s=5)


# --- the directory ----------------------------------------------------------------------------------------------------


async def test_a_second_service_on_the_directory_is_refused_with_a_sentence(service: Service) -> None:
    with pytest.raises(server.DirectoryInUse, match=r"another inode service .* runs on"):
        await server.run_inode_service(service.config)


async def test_a_directory_of_a_newer_schema_is_refused_with_a_sentence(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata"):
        pass
    engine = LmdbEngine(tmp_path / "metadata" / server.ENGINE_DIRECTORY)
    with engine.write() as txn:
        txn.put(schema.VERSION_KEY, schema.encode_u32(schema.SCHEMA_VERSION + 1))
        txn.commit()
    engine.close()
    with pytest.raises(WrongVersion, match=f"schema {schema.SCHEMA_VERSION + 1}"):
        await server.run_inode_service(server.InodeServiceConfig(tmp_path / "metadata", "127.0.0.1", 0))


async def test_a_taken_port_is_told(service: Service, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"127.0.0.1:{service.port}: another process listens there"):
        await server.run_inode_service(server.InodeServiceConfig(tmp_path / "other", "127.0.0.1", service.port))


async def test_nobody_there_is_told_within_the_time(tmp_path: Path) -> None:
    async with running_service(tmp_path / "metadata") as service:
        port = service.port
    began = trio.current_time()
    with pytest.raises(StoreError, match="cannot connect"):
        async with connect(port, timeout_s=0.5):
            pytest.fail("opened")
    assert trio.current_time() - began < 2
