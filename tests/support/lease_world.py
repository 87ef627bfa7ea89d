"""Two mounts in one process: the real file-system objects, a model of the service's leases, a model of their kernels.

The service (decision 0013 in few lines): what it tells a session it may recall; a change is answered when all who were
told have obeyed; what is being changed is told to nobody else before that.  The kernel keeps names, attributes, pages
and listings as long as it is told, holds a directory's lock around changes and look-ups and a page's around reads and
writes, and takes late answers as Linux does.

Programs count: each change writes a number that is one higher, and once it has returned nobody may see a lower one.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar, cast

import pytest
import trio
from msgspec.structs import replace

from fsd.core.access_times import AccessTimeMode, AccessTimeRule
from fsd.filesystem import FileSystem
from fsd.frontend.ports import Changes, Entry, KernelName
from fsd.nodes import NodeTable
from metadata.core import dispatch
from metadata.core.schema import ROOT_INO, Inode
from metadata.engine.ports import ReadTxn
from metadata.protocol import (
    CommitExtents,
    Create,
    GetAttr,
    GetLayout,
    InodeReply,
    LayoutReply,
    Lookup,
    MakeSymlink,
    Mutation,
    ReadDir,
    ReadDirDone,
    ReadLink,
    RecallItem,
    RecallKind,
    ReleaseInode,
    Rename,
    RenameDone,
    SetAttr,
    WriteInline,
)
from tests.support.file_system import CALLER, ROOT, soon
from tests.support.local_services import LocalMetadata, LocalWorld
from wire.errors import NoSuchEntry, StaleInode
from wire.message import Message, Request

R = TypeVar("R", bound=Message)
Thing = tuple[int, bytes]
"""(inode, b""): its attributes and content; (directory, name)."""


class Pending:
    """A change that sessions have still to obey."""

    def __init__(self, things: set[Thing], outstanding: set[int]) -> None:
        self.things = things
        self.outstanding = outstanding
        self.over = trio.Event()

    def obeyed(self, session: int) -> None:
        self.outstanding.discard(session)
        if not self.outstanding:
            self.over.set()


class LeaseService:
    """The store and who was told what of it."""

    def __init__(self, chance: random.Random) -> None:
        self.local = LocalMetadata()
        self.chance = chance
        self.waits_for_kernels = True  # A planted bug: it takes recalls for obeyed that are only sent.
        self._nursery: trio.Nursery
        self._told: dict[Thing, set[int]] = defaultdict(set)  # (directory, b"*"): names in it.
        self._pending: list[Pending] = []
        self._writers: dict[int, int] = {}
        self._open: dict[int, set[int]] = defaultdict(set)
        self._recalls: dict[int, trio.MemorySendChannel[tuple[list[RecallItem], Pending]]] = {}

    async def turns(self) -> None:
        """Let others go first, for a random while, which now and then is long."""
        for _ in range(self.chance.randint(1, 5 if self.chance.random() < 0.8 else 80)):
            await trio.lowlevel.checkpoint()

    def start(self, nursery: trio.Nursery, obey: list[Callable[[Sequence[RecallItem]], Awaitable[None]]]) -> None:
        """Recalls of sessions 1, 2 ... go there."""
        self._nursery = nursery
        for session, one in enumerate(obey, 1):
            self._connect(session, one)

    def _connect(self, session: int, obey: Callable[[Sequence[RecallItem]], Awaitable[None]]) -> None:
        """Recalls of the session go there, one after another."""
        send, receive = trio.open_memory_channel[tuple[list[RecallItem], Pending]](1000)
        self._recalls[session] = send

        async def work() -> None:
            async for items, pending in receive:
                await self.turns()
                await obey(items)
                await self.turns()
                pending.obeyed(session)

        self._nursery.start_soon(work)

    # --- questions ---

    async def ask(self, session: int, request: Request[Message]) -> Message:
        """Answer when nobody else believes what was before."""
        await self.turns()
        while True:
            try:
                with self.local.engine.read() as txn:
                    reply: Message | NoSuchEntry = dispatch.answer(cast(ReadTxn, txn), request)
            except NoSuchEntry as error:
                reply = error
            things = _told_by(request, reply)
            flushed = [self._flush(ino) for ino, _ in things if self._writers.get(ino, session) != session]
            if not flushed:
                break
            for pending in flushed:
                await pending.over.wait()
        if isinstance(request, GetLayout) and request.open and isinstance(reply, LayoutReply):
            reply = await self._opened(session, request, reply)
        self._tell(session, things)
        await self._wait(session, things)
        await self.turns()
        if isinstance(reply, NoSuchEntry):
            raise reply
        return reply

    async def _opened(self, session: int, request: GetLayout, reply: LayoutReply) -> LayoutReply:
        self._open[request.ino].add(session)
        if (
            not request.write
            or self._open[request.ino] != {session}
            or any((request.ino, b"") in one.things for one in self._pending)
        ):
            return reply
        self._writers[request.ino] = session
        pending = self._recall(session, [RecallItem(request.ino, RecallKind.ATTRS)])
        await pending.over.wait()
        return replace(reply, write_lease=self._writers.get(request.ino) == session)

    def _tell(self, session: int, things: set[Thing]) -> None:
        for ino, name in things:
            self._told[ino, b"*" if name else b""].add(session)

    async def _wait(self, session: int, things: set[Thing]) -> None:
        for pending in list(self._pending):
            if pending.things & things and session not in pending.outstanding:
                await pending.over.wait()

    def _flush(self, ino: int) -> Pending:
        return self._send(self._writers.pop(ino), [RecallItem(ino, RecallKind.FLUSH)])

    def _send(self, session: int, items: list[RecallItem]) -> Pending:
        pending = Pending(set(), {session})
        self._recalls[session].send_nowait((items, pending))
        return pending

    # --- changes ---

    async def mutate(self, session: int, request: Mutation[Message]) -> Message:
        """Change it; answered when all others have obeyed."""
        await self.turns()
        before = self._named(request)
        reply = self.local.apply(request)
        if isinstance(request, ReleaseInode):
            for ino in request.inos:
                self._open[ino].discard(session)
                if self._writers.get(ino) == session:
                    del self._writers[ino]
        items = _touched(request, reply, before)
        pending = self._recall(session, items)
        things = {(item.ino, item.name) for item in items}
        self._tell(session, things)
        await pending.over.wait()
        await self.turns()
        return reply

    def _named(self, request: Mutation[Message]) -> list[int]:
        """The inode that a rename replaces."""
        if isinstance(request, Rename):
            try:
                with self.local.engine.read() as txn:
                    found = dispatch.answer(cast(ReadTxn, txn), Lookup(1, request.new_parent, request.new_name))
                assert isinstance(found, InodeReply)
                return [found.ino]
            except NoSuchEntry:
                return []
        return []

    def _recall(self, changer: int, items: list[RecallItem]) -> Pending:
        by_session: dict[int, list[RecallItem]] = defaultdict(list)
        for item in items:
            key = (item.ino, b"*" if item.name else b"")
            for session in self._told[key] - {changer}:
                by_session[session].append(item)
                if not item.name:
                    self._told[key].discard(session)  # From when it is sent; what is told after that counts anew.
        pending = Pending({(item.ino, item.name) for item in items}, set(by_session))
        for session, wanted in by_session.items():
            self._recalls[session].send_nowait((wanted, pending))
        if not by_session or not self.waits_for_kernels:
            pending.outstanding.clear()
            pending.over.set()
        else:
            self._pending.append(pending)
            self._nursery.start_soon(self._end, pending)
        return pending

    async def _end(self, pending: Pending) -> None:
        await pending.over.wait()
        self._pending.remove(pending)


def _told_by(request: Request[Message], reply: Message | NoSuchEntry) -> set[Thing]:
    things: set[Thing] = set()
    if isinstance(request, Lookup):
        things.add((request.parent, request.name))
    if isinstance(request, GetAttr | GetLayout | ReadLink):
        things.add((request.ino, b""))
    if isinstance(reply, InodeReply):
        things.add((reply.ino, b""))
    if isinstance(request, ReadDir) and isinstance(reply, ReadDirDone):
        things.add((request.ino, b"*"))
        for entry in reply.entries:
            things |= {(request.ino, entry.name), (entry.ino, b"")}
    return things


def _touched(request: Mutation[Message], reply: Message, before: list[int]) -> list[RecallItem]:
    attrs, content, name = RecallKind.ATTRS, RecallKind.CONTENT, RecallKind.NAME
    if isinstance(request, SetAttr):
        return [RecallItem(request.ino, content if request.mask & 8 else attrs)]
    if isinstance(request, WriteInline | CommitExtents):
        return [RecallItem(request.ino, content)]
    if isinstance(request, Create | MakeSymlink):
        return [RecallItem(request.parent, attrs), RecallItem(request.parent, name, request.name)]
    if isinstance(request, Rename) and isinstance(reply, RenameDone):
        return [
            *(RecallItem(ino, attrs) for ino in {request.parent, request.new_parent, reply.ino, *before}),
            RecallItem(request.parent, name, request.name),
            RecallItem(request.new_parent, name, request.new_name),
        ]
    return []


class LeaseSession:
    """What a MetadataClient is to a mount."""

    def __init__(self, service: LeaseService, session: int) -> None:
        self._service = service
        self._session = session
        self._sequence = 0
        self.alone = False
        self.recalls = True
        self.root_ino = ROOT_INO
        self.root: Inode = service.local.layout(ROOT_INO).inode

    def lease_left_s(self) -> float:
        return 20.0

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        return cast(R, await self._service.ask(self._session, cast(Request[Message], make(self._session))))

    tell = ask

    async def mutate(self, make: Callable[[int, int], Mutation[R]]) -> R:
        self._sequence += 1
        request = cast(Mutation[Message], make(self._session, self._sequence))
        return cast(R, await self._service.mutate(self._session, request))

    async def reclaim(self) -> None:
        await trio.lowlevel.checkpoint()

    async def allocate_slice(self) -> int:
        return await self._service.local.allocate_slice()


class ModelKernel:
    """One mount's kernel: what it was told to keep, and what its locks hold up.  Only the root directory has names."""

    def __init__(self, chance: random.Random) -> None:
        self.fs: FileSystem
        self.drops_pages = self.drops_names = self.drops_attributes = True  # False: planted bugs.
        self.is_idle = True
        self._chance = chance
        self._names: dict[bytes, int] = {}
        self._epoch = 0
        self._attributes: dict[int, Inode] = {}
        self._attributes_version: dict[int, int] = defaultdict(int)
        self._pages: dict[int, bytes] = {}
        self._page_locks: dict[int, trio.Lock] = defaultdict(trio.Lock)
        self._directory_lock = trio.Lock()
        self._listing: list[bytes] | None = None

    async def _turns(self) -> None:
        for _ in range(self._chance.randint(1, 5)):
            await trio.lowlevel.checkpoint()

    # --- the notifier ---

    def invalidate_attributes(self, nodeid: int) -> None:
        self.invalidate_attributes_now(nodeid)

    def invalidate_attributes_now(self, nodeid: int) -> None:
        self._attributes_version[nodeid] += 1
        self._attributes.pop(nodeid, None)

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        self.invalidate_attributes_now(nodeid)
        self._pages.pop(nodeid, None)

    def invalidate_entries(self, entries: list[KernelName]) -> None:
        for entry in entries:
            self._names.pop(entry.name, None)

    async def invalidate_all(self, nodeids: list[int], entries: list[KernelName]) -> None:
        await self.drop([], nodeids)
        await self.drop_names(entries)

    async def drop(self, attributes: Sequence[int], pages: Sequence[int]) -> None:
        await self._turns()
        for nodeid in [*attributes, *pages]:
            if self.drops_attributes:
                self.invalidate_attributes_now(nodeid)
        for nodeid in pages:
            if nodeid == ROOT and self.drops_names:
                self._listing = None
            if self.drops_pages:
                async with self._page_locks[nodeid]:
                    self._pages.pop(nodeid, None)
        await self._turns()

    async def drop_names(self, names: Sequence[KernelName]) -> None:
        async with self._directory_lock:
            if self.drops_names:
                for name in names:
                    self._names.pop(name.name, None)
        await self._turns()

    def make_names_void(self) -> bool:
        self._epoch += 1
        self._names.clear()
        return True

    # --- what programs call ---

    def _keep(self, name: bytes, entry: Entry, epoch: int, version: int) -> None:
        if entry.entry_timeout_s > 0 and epoch == self._epoch:
            self._names[name] = entry.nodeid
        else:
            self._names.pop(name, None)
        if entry.nodeid:
            self._keep_attributes(entry, version)

    def _keep_attributes(self, entry: Entry, version: int) -> None:
        if entry.attr_timeout_s > 0 and version == self._attributes_version[entry.nodeid]:
            self._attributes[entry.nodeid] = entry.inode

    async def lookup(self, name: bytes) -> int:
        """The inode; 0: there is none."""
        async with self._directory_lock:
            if name in self._names:
                return self._names[name]
            epoch, versions = self._epoch, dict(self._attributes_version)
            entry = await soon(self.fs.lookup(ROOT, name))
            self._keep(name, entry, epoch, versions.get(entry.nodeid, 0))
            return entry.nodeid

    async def stat(self, ino: int) -> Inode:
        """fstat."""
        if ino not in self._attributes:
            version = self._attributes_version[ino]
            entry = await soon(self.fs.getattr(ino))
            self._keep_attributes(entry, version)
            return entry.inode
        return self._attributes[ino]

    async def chmod(self, ino: int, mode: int) -> None:
        version = self._attributes_version[ino]
        self._keep_attributes(await soon(self.fs.setattr(ino, Changes(mode=mode), CALLER)), version)

    async def create(self, name: bytes) -> None:
        async with self._directory_lock:
            epoch = self._epoch
            opened, entry = await soon(self.fs.create(ROOT, name, 0o100644, os.O_RDWR, CALLER))
            self._keep(name, entry, epoch, self._attributes_version[entry.nodeid])
            self._listing = None
            self.invalidate_attributes_now(ROOT)
        await soon(self.fs.flush(opened.fh))
        await soon(self.fs.release(opened.fh))

    async def replace_link(self, name: bytes, target: bytes, temporary: bytes) -> None:
        async with self._directory_lock:
            epoch = self._epoch
            entry = await soon(self.fs.symlink(ROOT, temporary, target, CALLER))
            self._keep(temporary, entry, epoch, self._attributes_version[entry.nodeid])
            await soon(self.fs.rename(ROOT, temporary, ROOT, name, 0, CALLER))
            self._names.pop(name, None)
            moved = self._names.pop(temporary, None)
            if moved is not None:
                self._names[name] = moved  # The name moves with its time.
            self._listing = None
            self.invalidate_attributes_now(ROOT)

    async def readlink(self, ino: int) -> bytes:
        return await soon(self.fs.readlink(ino))

    async def listing(self) -> list[bytes]:
        opened = await soon(self.fs.opendir(ROOT))
        if not opened.keep_cache:
            self._listing = None
        if self._listing is not None:
            self.fs.releasedir(opened.fh)
            return self._listing
        names: list[bytes] = []
        cookie = 0
        while True:
            reply: list[tuple[bytes, int]] = []

            def add(name: bytes, entry: Entry, after: int, reply: list[tuple[bytes, int]] = reply) -> bool:
                if len(reply) >= 7:
                    return False
                if name not in (b".", b"..") and entry.entry_timeout_s > 0:
                    self._names[name] = entry.nodeid
                reply.append((name, after))
                return True

            await soon(self.fs.readdir(opened.fh, cookie, True, add))
            if not reply:
                break
            names += [name for name, _ in reply]
            cookie = reply[-1][1]
        self._listing = names
        self.fs.releasedir(opened.fh)
        return names

    async def read(self, ino: int) -> bytes:
        """open, read, close."""
        opened = await soon(self.fs.open(ino, os.O_RDONLY, CALLER))
        if not opened.keep_cache:
            async with self._page_locks[ino]:
                self._pages.pop(ino, None)
        content = await self.pread(ino, opened.fh)
        await soon(self.fs.flush(opened.fh))
        await soon(self.fs.release(opened.fh))
        return content

    async def pread(self, ino: int, fh: int) -> bytes:
        """Read from the pages, filling them; a page that is being read or written is waited for."""
        found = self._pages.get(ino)
        if found is not None:
            return found
        async with self._page_locks[ino]:
            content = bytes(await soon(self.fs.read(fh, 0, 4096)))
            self._pages[ino] = content
            return content

    async def rewrite(self, ino: int, content: bytes) -> Callable[[], Awaitable[None]]:
        """open, write; what closes it."""
        opened = await soon(self.fs.open(ino, os.O_RDWR, CALLER))
        if not opened.keep_cache or opened.direct_io:
            async with self._page_locks[ino]:
                self._pages.pop(ino, None)
        if opened.direct_io:
            await soon(self.fs.write(opened.fh, 0, content))
            self._pages.pop(ino, None)
        else:
            async with self._page_locks[ino]:
                await soon(self.fs.write(opened.fh, 0, content))
                if ino in self._pages:
                    self._pages[ino] = content
        self.invalidate_attributes_now(ino)

        async def close() -> None:
            await soon(self.fs.flush(opened.fh))
            await soon(self.fs.release(opened.fh))

        return close


class Stale(AssertionError):
    """Somebody was shown something older than what had returned."""


class Program:
    """What programs do on one mount; `floors` has, by kind, the number that nobody may see less than."""

    def __init__(self, kernel: ModelKernel, floors: dict[str, int], locks: dict[str, trio.Lock], me: int) -> None:
        self._kernel = kernel
        self._floors = floors
        self._locks = locks
        self._me = me
        self._kept = 0

    async def step(self, kind: str, *, change: bool) -> None:
        """One change, or one look."""
        if not change:
            floor = self._floors["content" if kind == "open file" else kind]
            seen = await self._see(kind)
            if seen < floor:
                raise Stale(f"{kind}: {seen} < {floor}, on mount {self._me}")
            return
        async with self._locks[kind]:
            number = self._floors[kind] + 1
            close = await self._change(kind, number)
            self._floors[kind] = number
            if close is not None:
                await close()

    async def _change(self, kind: str, number: int) -> Callable[[], Awaitable[None]] | None:
        kernel = self._kernel
        if kind == "mode":
            await kernel.chmod(await kernel.lookup(b"mode"), number)
        elif kind == "content":
            return await kernel.rewrite(await kernel.lookup(b"content"), b"%06d" % number)
        elif kind == "link":
            await kernel.replace_link(b"link", b"%d" % number, b"new-%d" % self._me)
        else:
            await kernel.create(b"n%d" % number)
        return None

    async def _see(self, kind: str) -> int:
        kernel = self._kernel
        if kind == "mode":
            return (await kernel.stat(await kernel.lookup(b"mode"))).mode & 0o7777
        if kind == "content":
            return int(await kernel.read(await kernel.lookup(b"content")) or b"0")
        if kind == "open file":
            ino = await kernel.lookup(b"content")
            if not self._kept:
                self._kept = (await soon(kernel.fs.open(ino, os.O_RDONLY, CALLER))).fh
            return int(await kernel.pread(ino, self._kept) or b"0")
        if kind == "link":
            for _ in range(RETRIES_MAX):
                try:
                    return int(await kernel.readlink(await kernel.lookup(b"link")))
                except StaleInode:  # Replaced between the two; the kernel looks it up again.
                    continue
            raise Stale("the name of a link that is gone")
        if kind == "listing":
            return sum(name[:1] == b"n" and name[1:2] != b"e" for name in await kernel.listing())
        floor = self._floors["listing"]
        return (
            self._floors[kind]
            if all([await kernel.lookup(b"n%d" % at) for at in range(floor, floor + 1) if at])
            else -1
        )


RETRIES_MAX = 100
KINDS = ("mode", "content", "link", "listing")


class LeaseWorld:
    """Everything of one run."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.kernels: list[ModelKernel] = []
        self.service: LeaseService
        self.floors = {**dict.fromkeys(KINDS, 0), "names": 0}
        self.changed: tuple[str, ...] = KINDS
        self.seen: tuple[str, ...] = (*KINDS, "names", "open file")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Two mounts that share."""
        service = self.service = LeaseService(self.chance)
        local = service.local
        world = LocalWorld.make()
        world.metadata = local
        for name in (b"mode", b"content"):
            local.create(name)
        local.apply(SetAttr(1, 9001, ino=_ino(service, b"mode"), mask=1, mode=0))
        local.apply(MakeSymlink(1, 9002, parent=ROOT_INO, name=b"link", target=b"0", caller=CALLER))
        async with AsyncExitStack() as stack:
            for session in (1, 2):
                metadata = LeaseSession(service, session)
                data = await stack.enter_async_context(world.mount(metadata=metadata))
                kernel = ModelKernel(self.chance)
                kernel.fs = FileSystem(
                    metadata=metadata, data=data, notifier=kernel, access_times=AccessTimeRule(AccessTimeMode.NEVER)
                )
                self.kernels.append(kernel)
            async with trio.open_nursery() as nursery:
                service.start(nursery, [kernel.fs.recall for kernel in self.kernels])
                for kernel in self.kernels:
                    nursery.start_soon(kernel.fs.run)
                yield
                nursery.cancel_scope.cancel()

    async def run(self, steps: int) -> None:
        """Several programs on each mount, at the same time."""
        locks = {kind: trio.Lock() for kind in self.floors}
        async with trio.open_nursery() as nursery:
            for me, kernel in enumerate(self.kernels):
                program = Program(kernel, self.floors, locks, me)
                for _ in range(3):
                    nursery.start_soon(self._work, program, steps)

    async def _work(self, program: Program, steps: int) -> None:
        chance = self.chance
        for _ in range(steps):
            change = chance.random() < 0.35
            kind = chance.choice(self.changed if change else self.seen)
            await program.step(kind, change=change)
            if chance.random() < 0.1:
                await trio.sleep(chance.choice((0.01, 0.3, 1.1)))


def _ino(service: LeaseService, name: bytes) -> int:
    with service.local.engine.read() as txn:
        found = dispatch.answer(cast(ReadTxn, txn), Lookup(1, ROOT_INO, name))
    assert isinstance(found, InodeReply)
    return found.ino


def plant_belief_in_older_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a recall forgets what is known and does not mark the moment."""

    def forget_only(self: NodeTable, ino: int) -> None:
        node = self.obtain(ino)
        node.known_at = -1
        node.changed_at = 0

    monkeypatch.setattr(NodeTable, "doubt", forget_only)
    monkeypatch.setattr(NodeTable, "recalled", forget_only)
