"""Opens at a real service: told before sharing is acknowledged, again after a restart, and over with their session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from metadata.client import MetadataClient
from metadata.core.schema import ROOT_INO
from metadata.protocol import (
    Create,
    GetAttr,
    GetLayout,
    Link,
    OpenSession,
    RegisterOpens,
    ReleaseInode,
    Rename,
    Unlink,
)
from tests.support.inode_service import running_service
from wire.errors import NoSuchEntry
from wire.rpc.client import Channel


class Holder:
    """A mount that has one inode open."""

    def __init__(self) -> None:
        self.inos: list[int] = []
        self.asked = trio.Event()
        self.may_answer = trio.Event()
        self.may_answer.set()

    async def open_inodes(self) -> Sequence[int]:
        self.asked.set()
        await self.may_answer.wait()
        return self.inos


async def make(client: MetadataClient, name: bytes, *, is_open: bool = False) -> int:
    reply = await client.mutate(lambda s, q: Create(s, q, ROOT_INO, name, 0o644, True, open=is_open))
    return reply.ino


async def unlink(client: MetadataClient, name: bytes, closed_ino: int = 0) -> bool:
    """Whether it is held for this client."""
    return (await client.mutate(lambda s, q: Unlink(s, q, ROOT_INO, name, closed_ino))).held


async def release(client: MetadataClient, *inos: int) -> None:
    await client.mutate(lambda s, q: ReleaseInode(s, q, inos=inos))


async def nlink(client: MetadataClient, ino: int) -> int | None:
    """The link count; None when it is gone."""
    try:
        return (await client.ask(lambda session: GetAttr(session, ino))).inode.nlink
    except NoSuchEntry:
        return None


async def until_gone(client: MetadataClient, ino: int, timeout_s: float = 10.0) -> None:
    with trio.fail_after(timeout_s):
        while await nlink(client, ino) is not None:  # noqa: ASYNC110  (of another task)
            await trio.sleep(0.005)


async def opened(client: MetadataClient, ino: int) -> None:
    await client.ask(lambda session: GetLayout(session, ino, open=True))


async def test_what_is_open_is_registered_before_sharing_is_acknowledged(tmp_path: Path) -> None:
    """The second mount is let in only when the first has told, though the first has long said that it shares."""
    holder, admitted = Holder(), trio.Event()
    holder.may_answer = trio.Event()
    async with running_service(tmp_path / "m") as service, service.client(open_inodes=holder.open_inodes) as first:
        ino = await make(first, b"f")
        holder.inos = [ino]

        async def second() -> None:
            async with service.client(b"/second") as client:
                admitted.set()
                assert not await unlink(client, b"f", ino)
                assert await nlink(client, ino) == 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            await holder.asked.wait()
            assert not first.alone
            for _ in range(20):
                await first.ask(lambda session: GetAttr(session, ino))
            assert not admitted.is_set()
            holder.may_answer.set()
        await release(first, ino)
        assert await nlink(first, ino) is None


async def test_an_acknowledgement_before_that_would_lose_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: what is open is not told."""

    async def register_nothing(client: MetadataClient) -> None:
        await trio.lowlevel.checkpoint()
        client._unregistered = False

    monkeypatch.setattr(MetadataClient, "_register", register_nothing)
    async with running_service(tmp_path / "m") as service, service.client() as first:
        ino = await make(first, b"f")
        async with service.client(b"/second") as second:
            await unlink(second, b"f", ino)
        assert await nlink(first, ino) is None


async def test_an_open_is_either_before_the_unlink_or_finds_nothing(tmp_path: Path) -> None:
    """Many at once, in any order: whoever was answered with the layout can use the file."""
    async with (
        running_service(tmp_path / "m") as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
    ):
        counts = {True: 0, False: 0}

        async def opens(ino: int) -> None:
            try:
                await opened(first, ino)
            except NoSuchEntry:
                counts[False] += 1
                return
            counts[True] += 1
            assert await nlink(first, ino) is not None

        for number in range(200):
            name = b"f%d" % number
            ino = await make(second, name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(opens, ino)
                if number % 3:
                    await trio.sleep(number % 3 * 0.0005)
                nursery.start_soon(unlink, second, name, ino)
        assert counts[True] > 0


async def test_the_last_of_several_lets_go(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "m") as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
        service.client(b"/c") as third,
    ):
        ino = await make(first, b"f", is_open=True)
        await opened(second, ino)
        assert not await unlink(third, b"f", ino)
        await release(first, ino)
        assert await nlink(first, ino) == 0
        await release(second, ino)
        assert await nlink(first, ino) is None


async def test_a_rename_over_holds_it_too_and_other_names_keep_it(tmp_path: Path) -> None:
    async with (
        running_service(tmp_path / "m") as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
    ):
        ino = await make(first, b"f", is_open=True)
        await first.mutate(lambda s, q: Link(s, q, ino, ROOT_INO, b"g"))
        assert not await unlink(second, b"g", ino)
        assert await nlink(first, ino) == 1
        await make(second, b"other")
        await second.mutate(lambda s, q: Rename(s, q, ROOT_INO, b"other", ROOT_INO, b"f", closed_ino=ino))
        assert await nlink(first, ino) == 0
        await release(first, ino)
        assert await nlink(first, ino) is None


async def test_a_session_that_ends_lets_go_of_everything(tmp_path: Path) -> None:
    async with running_service(tmp_path / "m", lease_s=2.0) as service, service.client(b"/a") as first:
        ino = await make(first, b"f")
        async with service.client(b"/b") as second:
            await opened(second, ino)
            await unlink(first, b"f", ino)
            assert await nlink(first, ino) == 0
        await until_gone(first, ino)


async def test_after_a_restart_everything_is_taken_for_open_until_it_was_told(tmp_path: Path) -> None:
    """The second mount, asked after the restart, has one of two files open still; the other one goes then."""
    holder = Holder()
    async with (
        running_service(tmp_path / "m") as service,
        service.client(b"/a") as first,
        service.client(b"/b", open_inodes=holder.open_inodes) as second,
    ):
        kept, closed = await make(first, b"kept"), await make(first, b"closed")
        await opened(second, kept)
        holder.inos, holder.asked, holder.may_answer = [kept], trio.Event(), trio.Event()
        await service.stop()
        await service.start()
        assert not await unlink(first, b"kept", kept)
        assert not await unlink(first, b"closed", closed)
        await holder.asked.wait()
        assert [await nlink(first, ino) for ino in (kept, closed)] == [0, 0]
        holder.may_answer.set()
        await until_gone(first, closed)
        assert await nlink(second, kept) == 0
        await release(second, kept)
        assert await nlink(first, kept) is None


async def test_an_open_that_was_made_before_a_restart_and_answered_after_it_holds(tmp_path: Path) -> None:
    """The answer to a create is lost with the service; sent again, it is answered as before, and open as before."""
    async with (
        running_service(tmp_path / "m") as service,
        service.client(b"/b") as other,
        trio.open_nursery() as nursery,
    ):
        channel = Channel("127.0.0.1", service.port, service="metadata")
        await nursery.start(channel.run)
        session = (await channel.call(OpenSession("test", "boot", b"/a"), timeout_s=5)).session
        request = Create(session, 1, ROOT_INO, b"f", 0o644, True, open=True)
        ino = (await channel.call(request, timeout_s=5)).ino
        await service.stop()
        await service.start()
        await channel.call(RegisterOpens(session, (), True), timeout_s=5)
        assert (await channel.call(request, timeout_s=5)).ino == ino
        assert not await unlink(other, b"f", ino)
        assert await nlink(other, ino) == 0
        nursery.cancel_scope.cancel()
