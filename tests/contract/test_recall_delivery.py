"""Recalls at the client's end: obeyed in order, acknowledged after that, whatever the connection does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
import trio.testing

from blockstore.core.cluster_map import ClusterMap
from metadata.client import MetadataClient
from metadata.core.schema import ROOT_INO, Inode
from metadata.protocol import (
    METADATA_METHODS,
    AckRecalls,
    CloseSession,
    Done,
    OpenSession,
    OpenSessionDone,
    Recall,
    RecallItem,
    RecallKind,
    RenewSession,
    RenewSessionDone,
)
from metadata.recall_inbox import RECALLS_WAITING_MAX
from tests.support.inode_service import connect
from tests.support.rpc_service import run_server, wait_until
from wire.errors import StoreError, Unreachable
from wire.rpc.server import Call, Line, RpcServer, open_listener

ROOT = Inode(0o40755, 2, 0, 0, 0, 0, 0, 0, 0)
EVERYTHING = (RecallItem(0, RecallKind.EVERYTHING),)


def attrs(*inos: int) -> tuple[RecallItem, ...]:
    return tuple(RecallItem(ino, RecallKind.ATTRS) for ino in inos)


@dataclass
class Recaller:
    """As much of an inode service as recalls need; its test sends them."""

    life: str = "life"
    lines: list[Line] = field(default_factory=list)
    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    lose_acknowledgements: bool = False
    sessions: int = 0

    def __post_init__(self) -> None:
        self.rpc = RpcServer(service="metadata", methods=METADATA_METHODS, handler=self.handle)
        self.scope = trio.CancelScope()
        self.port = 0

    def handle(self, call: Call) -> None:
        request = call.request
        if isinstance(request, OpenSession):
            self.sessions += 1
            self.lines.append(call.line)
            call.reply(
                OpenSessionDone(self.sessions, 20_000, ROOT_INO, ROOT, True, ClusterMap(1, "c", 1), life=self.life)
            )
        elif isinstance(request, RenewSession):
            if not self.lines or call.line.number != self.lines[-1].number or not self.lines[-1].is_open:
                self.lines.append(call.line)
            if not request.wait_ms:
                call.reply(RenewSessionDone(True, None, life=request.life))
        elif isinstance(request, AckRecalls):
            self.acknowledged.append((request.life, request.number))
            if not self.lose_acknowledgements:
                call.reply(Done())
        elif isinstance(request, CloseSession):
            call.reply(Done())
        else:
            raise StoreError(f"{type(request).__name__} is not for here")

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Anew at the same port whenever the test has broken the connections."""
        while True:
            listener = await open_listener("127.0.0.1", self.port)
            self.port = listener.getsockname()[1]
            with trio.CancelScope() as self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(run_server, self.rpc, [listener])
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED

    async def reconnected(self) -> None:
        """Break the connection, and wait until the client has renewed over another one."""
        count = len(self.lines)
        self.scope.cancel()
        await wait_until(lambda: len(self.lines) > count)

    def recall(self, number: int, items: Sequence[RecallItem], *, session: int = 1) -> None:
        assert self.lines[-1].notify(Recall(session, self.life, number, tuple(items)))


@dataclass
class Mount:
    """What the client's user was told."""

    obeyed: list[tuple[int, ...]] = field(default_factory=list)
    may_return: trio.Event = field(default_factory=trio.Event)
    faults: int = 0

    async def on_recall(self, items: Sequence[RecallItem]) -> None:
        if self.faults:
            self.faults -= 1
            raise Unreachable("planted")
        self.obeyed.append(tuple(item.ino for item in items))
        await self.may_return.wait()


@asynccontextmanager
async def talking(mount: Mount | None) -> AsyncIterator[tuple[Recaller, MetadataClient]]:
    service = Recaller()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(service.run))
        async with connect(service.port, on_recall=mount.on_recall if mount else None) as client:
            await wait_until(lambda: client.statistics().renewals > 0)
            yield service, client
        nursery.cancel_scope.cancel()


async def test_a_recall_is_acknowledged_when_the_mount_has_obeyed_and_not_before() -> None:
    mount = Mount()
    async with talking(mount) as (service, client):
        service.recall(1, attrs(7, 8))
        await wait_until(lambda: mount.obeyed == [(7, 8)])
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert service.acknowledged == []
        mount.may_return.set()
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        assert client.statistics().recalls == 1


async def test_recalls_are_obeyed_one_after_another_and_acknowledged_together() -> None:
    mount = Mount()
    async with talking(mount) as (service, _):
        for number in range(1, 21):
            service.recall(number, attrs(number))
        await wait_until(lambda: mount.obeyed == [(1,)])
        mount.may_return.set()
        await wait_until(lambda: bool(service.acknowledged) and service.acknowledged[-1] == ("life", 20))
        assert mount.obeyed == [(number,) for number in range(1, 21)]
        assert len(service.acknowledged) < 20


async def test_a_mount_without_a_memory_acknowledges_at_once() -> None:
    async with talking(None) as (service, _):
        service.recall(1, EVERYTHING)
        await wait_until(lambda: service.acknowledged == [("life", 1)])


async def test_a_recall_that_comes_again_is_obeyed_once_and_acknowledged_again() -> None:
    """Its acknowledgement was lost with the connection."""
    mount = Mount()
    mount.may_return.set()
    async with talking(mount) as (service, _):
        service.lose_acknowledgements = True
        service.recall(1, attrs(7))
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        service.lose_acknowledgements = False
        await service.reconnected()
        await wait_until(lambda: len(service.acknowledged) >= 2)  # The channel repeats what was not answered.
        service.acknowledged.clear()
        service.recall(1, attrs(7))
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        assert mount.obeyed == [(7,)]


async def test_a_recall_under_way_when_the_connection_breaks_is_acknowledged_over_the_next() -> None:
    mount = Mount()
    async with talking(mount) as (service, _):
        service.recall(1, attrs(7))
        service.recall(2, attrs(8))
        await wait_until(lambda: mount.obeyed == [(7,)])
        await service.reconnected()
        service.recall(1, attrs(7))
        service.recall(2, attrs(8))
        service.recall(3, attrs(9))
        mount.may_return.set()
        await wait_until(lambda: bool(service.acknowledged) and service.acknowledged[-1] == ("life", 3))
        assert mount.obeyed == [(7,), (8,), (9,)]


async def test_numbers_begin_anew_with_the_life_of_the_service() -> None:
    """Number 1 of the second life is another recall than number 1 of the first, and has to be obeyed."""
    mount = Mount()
    mount.may_return.set()
    async with talking(mount) as (service, _):
        service.recall(1, attrs(7))
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        service.life = "second life"
        service.recall(1, attrs(8))
        await wait_until(lambda: service.acknowledged[-1] == ("second life", 1))
        assert mount.obeyed == [(7,), (8,)]


async def test_recalls_of_another_session_are_not_obeyed() -> None:
    mount = Mount()
    mount.may_return.set()
    async with talking(mount) as (service, _):
        service.recall(1, attrs(7), session=99)
        service.recall(1, attrs(8))
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        assert mount.obeyed == [(8,)]


async def test_a_mount_that_fails_to_obey_is_asked_until_it_has(caplog: pytest.LogCaptureFixture) -> None:
    mount = Mount(faults=2)
    mount.may_return.set()
    async with talking(mount) as (service, _):
        service.recall(1, attrs(7))
        await wait_until(lambda: service.acknowledged == [("life", 1)])
        assert mount.obeyed == [(7,)]
    assert caplog.text.count("dropping-caches-failed") == 2


async def test_more_recalls_than_a_client_keeps_become_one_of_everything() -> None:
    mount = Mount()
    async with talking(mount) as (service, _):
        last = RECALLS_WAITING_MAX + 10
        for number in range(1, last + 1):
            service.recall(number, attrs(number))
        await trio.sleep(0.05)
        mount.may_return.set()
        await wait_until(lambda: bool(service.acknowledged) and service.acknowledged[-1] == ("life", last))
        assert mount.obeyed[0] == (1,)
        assert (0,) in mount.obeyed
        assert len(mount.obeyed) < RECALLS_WAITING_MAX
