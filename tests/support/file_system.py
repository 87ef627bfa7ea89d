"""The file-system object on services in this process, with a kernel that only takes notes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import trio
from msgspec.structs import replace

from fsd.core.access_times import AccessTimeRule
from fsd.filesystem import FileSystem
from fsd.frontend.ports import Answer, Entry, KernelName
from metadata.core.schema import ROOT_INO, Inode
from metadata.protocol import Caller, GetLayout, LayoutReply, Mutation
from tests.support.local_services import LocalMetadata, LocalWorld
from wire.message import Message, Request

T = TypeVar("T")
R = TypeVar("R", bound=Message)

ROOT = 1
LEASE_S = 20.0
CALLER = Caller(0, 0)


class SessionMetadata(LocalMetadata):
    """LocalMetadata with what a session adds; replies of some kinds can be held up on their way back."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = True
        self.recalls = True
        self.root_ino = ROOT_INO
        self.root: Inode = self.layout_of_root()
        self.held_replies: dict[type[Message], trio.Event] = {}
        self.lease_s = LEASE_S
        self.gives_write_leases = False

    def layout_of_root(self) -> Inode:
        """The root's attributes."""
        return self.layout(ROOT_INO).inode

    def lease_left_s(self) -> float:
        """As MetadataClient.lease_left_s."""
        return self.lease_s

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        """As MetadataClient.ask."""
        reply = await super().ask(make)
        request = make(1)
        if isinstance(request, GetLayout) and isinstance(reply, LayoutReply) and request.write:
            reply = replace(reply, write_lease=self.gives_write_leases)
        await self._hold(type(make(1)))
        return reply

    async def mutate(self, make: Callable[[int, int], Mutation[R]]) -> R:
        """As MetadataClient.mutate."""
        reply = await super().mutate(make)
        await self._hold(type(make(1, 1)))
        return reply

    async def tell(self, make: Callable[[int], Request[R]]) -> R:
        """As MetadataClient.tell."""
        return await super().ask(make)

    async def reclaim(self) -> None:
        """As MetadataClient.reclaim: there is nobody who would forget."""
        await trio.lowlevel.checkpoint()

    async def _hold(self, kind: type[Message]) -> None:
        gate = self.held_replies.get(kind)
        if gate is not None:
            await gate.wait()


class NotingKernel:
    """What a front end would tell the kernel."""

    def __init__(self) -> None:
        self.attributes: list[int] = []
        self.pages: list[tuple[int, int, int]] = []
        self.entries: list[KernelName] = []
        self.everything: list[tuple[list[int], list[KernelName]]] = []
        self.is_idle = True
        self.dropped: list[tuple[Sequence[int], Sequence[int]]] = []
        self.dropped_names: list[KernelName] = []
        self.void_count = 0
        self.can_make_void = True
        self.dropping: trio.Event | None = None  # Drops wait for it,
        self.dropping_names: trio.Event | None = None  # and those of names for this.

    def invalidate_attributes(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self.attributes.append(nodeid)

    def invalidate_attributes_now(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self.attributes.append(nodeid)

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self.pages.append((nodeid, offset, size))

    def invalidate_entries(self, entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self.entries += entries

    async def invalidate_all(self, nodeids: list[int], entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self.everything.append((nodeids, entries))
        await trio.lowlevel.checkpoint()

    async def drop(self, attributes: Sequence[int], pages: Sequence[int]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        if attributes or pages:
            self.dropped.append((attributes, pages))
        await trio.lowlevel.checkpoint()
        if self.dropping is not None:
            await self.dropping.wait()

    async def drop_names(self, names: Sequence[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        await trio.lowlevel.checkpoint()
        if self.dropping_names is not None:
            await self.dropping_names.wait()
        self.dropped_names += names

    def make_names_void(self) -> bool:
        """See fsd.frontend.ports.KernelNotifier."""
        self.void_count += self.can_make_void
        return self.can_make_void


class Mounted:
    """One file system with its surroundings."""

    def __init__(self, fs: FileSystem, metadata: SessionMetadata, kernel: NotingKernel, world: LocalWorld) -> None:
        self.fs = fs
        self.metadata = metadata
        self.kernel = kernel
        self.world = world

    async def make(self, name: bytes, data: bytes = b"", *, parent: int = ROOT) -> int:
        """A file that is closed again; its number."""
        opened, entry = await soon(self.fs.create(parent, name, 0o100644, 1, CALLER))
        if data:
            await soon(self.fs.write(opened.fh, 0, data))
        await soon(self.fs.flush(opened.fh))
        await soon(self.fs.release(opened.fh))
        return entry.nodeid

    async def list(self, nodeid: int = ROOT, *, room: int = 1 << 30) -> list[bytes]:
        """Every name, in replies of at most `room` entries."""
        fh = (await soon(self.fs.opendir(nodeid))).fh
        names: list[bytes] = []
        cookie = 0
        while True:
            reply: list[tuple[bytes, int]] = []

            def add(name: bytes, entry: Entry, after: int, reply: list[tuple[bytes, int]] = reply) -> bool:
                if len(reply) == room:
                    return False
                reply.append((name, after))
                return True

            await soon(self.fs.readdir(fh, cookie, True, add))
            if not reply:
                self.fs.releasedir(fh)
                return names
            names += [name for name, _ in reply]
            cookie = reply[-1][1]


async def soon(answer: Answer[T]) -> T:
    """The answer, however it comes."""
    if isinstance(answer, Coroutine):
        return cast(T, await answer)
    return answer


def at_once(answer: Answer[T]) -> T:
    """The answer, which must be there without asking anybody."""
    if isinstance(answer, Coroutine):
        answer.close()
        raise AssertionError("the answer needed the network")
    return answer


def needs_network(answer: Answer[Any]) -> bool:
    """Whether the answer would have been asked for (it is not)."""
    if isinstance(answer, Coroutine):
        answer.close()
        return True
    return False


@asynccontextmanager
async def mounted(*, access_times: AccessTimeRule | None = None) -> AsyncIterator[Mounted]:
    """A file system at work."""
    metadata = SessionMetadata()
    world = LocalWorld.make()
    world.metadata = metadata
    kernel = NotingKernel()
    async with world.mount() as data, trio.open_nursery() as nursery:
        fs = FileSystem(metadata=metadata, data=data, notifier=kernel, access_times=access_times)
        nursery.start_soon(fs.run)
        yield Mounted(fs, metadata, kernel, world)
        nursery.cancel_scope.cancel()
