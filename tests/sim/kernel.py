"""A model of Linux's side of one FUSE mount: what it caches, for how long, what it locks, and how it takes
notifications.

Modelled after fs/fuse/{dir,file,inode,dev}.c of Linux 6: names with timeouts, and a lock per directory that look-ups
share and changes have to themselves; attributes with timeouts and the version that keeps late answers from undoing
an invalidation; one page per file (files here are at most a page long), locked while it is read or written; reads
refused by nothing but the daemon. Notifications come from a thread of the daemon and wait for the locks that Linux
waits for. Not here: mappings, writeback, read-ahead, permissions, directories' cached listings.

System calls run in the process of the program; requests wait in a queue until the daemon's loop takes them, in the
daemon's process. A reply is acted upon when the program runs again: what happened in between is as it is in Linux.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import trio

from fsd.frontend.kernel_notifier import ThreadNotifier
from fsd.frontend.ports import ROOT_NODEID, Answer, Changes, Entry, FileLock, Opened, Operations
from metadata.core.locks import LAST_BYTE, LockKind
from metadata.core.schema import Inode
from metadata.protocol import Caller
from tests.sim.fibers import block, in_fiber
from tests.sim.world import Process, World
from wire.errors import StoreError

T = TypeVar("T")
PAGE_SIZE = 4096
CALLER = Caller(0, 0)


class Refused(Exception):
    """The errno of a system call."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


class RwLock:
    """A directory's lock (i_rwsem): many share it, or one has it; who waits is served in order."""

    def __init__(self) -> None:
        self._sharers = 0
        self._taken = False
        self._waiting: deque[tuple[bool, trio.Event]] = deque()

    async def acquire(self, *, shared: bool) -> None:
        """Wait for it."""
        if not self._taken and not self._waiting and (shared or not self._sharers):
            self._take(shared)
            return
        turn = trio.Event()
        self._waiting.append((shared, turn))
        await turn.wait()

    def _take(self, shared: bool) -> None:
        if shared:
            self._sharers += 1
        else:
            self._taken = True

    def release(self, *, shared: bool) -> None:
        """Give it back."""
        if shared:
            self._sharers -= 1
        else:
            self._taken = False
        while self._waiting and not self._taken and (self._waiting[0][0] or not self._sharers):
            shared, turn = self._waiting.popleft()
            self._take(shared)
            turn.set()

    @asynccontextmanager
    async def held(self, *, shared: bool = False) -> AsyncIterator[None]:
        """For the block."""
        await self.acquire(shared=shared)
        try:
            yield
        finally:
            self.release(shared=shared)


@dataclass(eq=False)
class KernelInode:
    """struct fuse_inode."""

    nodeid: int
    lookups: int = 0
    opens: int = 0
    inode: Inode | None = None
    valid_until: float = 0.0
    version: int = 0
    size: int = 0
    page: bytes | None = None  # None: not up to date.
    lock: RwLock = field(default_factory=RwLock)
    page_lock: trio.Lock = field(default_factory=trio.Lock)


@dataclass(eq=False)
class KernelName:
    """struct dentry; nodeid 0: negative."""

    nodeid: int
    valid_until: float
    epoch: int


@dataclass(eq=False)
class OpenFile:
    """struct file."""

    inode: KernelInode
    fh: int
    flags: int
    direct_io: bool


class _Request:
    """What waits for the daemon, or for its answer."""

    __slots__ = ("answer", "call", "done", "error")

    def __init__(self, call: Callable[[Operations], Any]) -> None:
        self.call = call
        self.done = trio.Event()
        self.answer: Any = None
        self.error = 0

    def reply(self, answer: object) -> None:
        self.answer = answer
        self.done.set()

    def fail(self, number: int) -> None:
        self.error = number
        self.done.set()


class Kernel:
    """One mount, as long as its daemon lives."""

    def __init__(self, world: World, daemon: Process) -> None:
        self.world = world
        self.daemon = daemon
        self.connected = False
        self.epoch = 0
        self.request_counts: dict[str, int] = {}
        self._inodes: dict[int, KernelInode] = {ROOT_NODEID: KernelInode(ROOT_NODEID, lookups=1)}
        self._names: dict[tuple[int, bytes], KernelName] = {}
        self._version = 1
        self._queue: deque[_Request] = deque()
        self._arrived = trio.Event()
        self._under_way: dict[_Request, None] = {}

    # --- the device ---

    async def serve(self, operations: Operations) -> None:
        """The daemon's loop; as fsd.frontend.direct.loop, in its process."""
        self.connected = True
        async with trio.open_nursery() as nursery:
            while True:
                while self._queue:
                    self._begin(operations, self._queue.popleft(), nursery)
                self._arrived = trio.Event()
                await self._arrived.wait()

    def _begin(self, operations: Operations, request: _Request, nursery: trio.Nursery) -> None:
        try:
            answer = request.call(operations)
        except StoreError as error:
            request.fail(error.errno)
            return
        if isinstance(answer, Coroutine):
            nursery.start_soon(self._finish, request, answer)
        else:
            request.reply(answer)

    async def _finish(self, request: _Request, answer: Coroutine[Any, Any, object]) -> None:
        try:
            result = await answer
        except StoreError as error:
            request.fail(error.errno)
        else:
            request.reply(result)

    def disconnect(self) -> None:
        """The daemon is gone: everybody is told."""
        self.connected = False
        for request in list(self._under_way):
            if not request.done.is_set():
                request.fail(errno.ENOTCONN)

    async def _ask(self, call: Callable[[Operations], Answer[T]]) -> T:
        request = self._send(call)
        try:
            await request.done.wait()
        finally:
            del self._under_way[request]
        if request.error:
            raise Refused(request.error)
        return cast(T, request.answer)

    def _send(self, call: Callable[[Operations], Any]) -> _Request:
        request = _Request(call)
        self._under_way[request] = None
        if not self.connected:
            request.fail(errno.ENOTCONN)
        else:
            self._queue.append(request)
            self._arrived.set()
        return request

    def _send_without_answer(self, call: Callable[[Operations], Any]) -> None:
        request = self._send(call)
        del self._under_way[request]

    # --- inodes ---

    def _know(self, entry: Entry, version: int) -> KernelInode:
        """fuse_iget: the inode of a reply that counts as a look-up."""
        node = self._inodes.get(entry.nodeid)
        if node is None:
            node = self._inodes[entry.nodeid] = KernelInode(entry.nodeid)
        node.lookups += 1
        self._change_attributes(node, entry, version)
        return node

    def _change_attributes(self, node: KernelInode, entry: Entry, version: int) -> None:
        """fuse_change_attributes: unless something happened to the inode since the question was asked."""
        if node.version > version:
            return
        self._version += 1
        node.version = self._version
        node.valid_until = trio.current_time() + entry.attr_timeout_s
        node.inode = entry.inode
        if node.size != entry.inode.size:
            node.size = entry.inode.size
            if node.page is not None:
                node.page = node.page[: node.size]

    def _invalidate_attributes(self, node: KernelInode) -> None:
        node.valid_until = 0.0

    async def _attributes(self, node: KernelInode) -> Inode:
        if node.inode is not None and node.valid_until > trio.current_time():
            return node.inode
        version = self._version
        entry = await self._ask(lambda operations: operations.getattr(node.nodeid))
        self._change_attributes(node, entry, version)
        return entry.inode

    # --- names ---

    async def _look_up(
        self, parent: KernelInode, name: bytes, *, again: bool, locked: bool = False
    ) -> KernelInode | None:
        """The inode of that name; None: there is none.  `again`: do not believe what is known (LOOKUP_REVAL)."""
        key = (parent.nodeid, name)
        known = self._names.get(key)
        if known is not None:
            if self._is_good(known) and not again:
                return self._inodes[known.nodeid] if known.nodeid else None
            node = await self._revalidate(parent, name, known) if known.nodeid else None
            if node is not None:
                return node
            if self._names.get(key) is known:
                del self._names[key]
        if locked:
            return await self._look_up_slowly(parent, name)
        async with parent.lock.held(shared=True):
            known = self._names.get(key)
            if known is not None and self._is_good(known):
                return self._inodes[known.nodeid] if known.nodeid else None
            return await self._look_up_slowly(parent, name)

    def _is_good(self, name: KernelName) -> bool:
        return name.valid_until > trio.current_time() and name.epoch == self.epoch

    async def _revalidate(self, parent: KernelInode, name: bytes, known: KernelName) -> KernelInode | None:
        """fuse_dentry_revalidate: without any lock."""
        epoch, version = self.epoch, self._version
        entry = await self._ask(lambda operations: operations.lookup(parent.nodeid, name))
        if entry.nodeid == 0:
            return None
        if entry.nodeid != known.nodeid:
            self._forget(entry.nodeid, 1)
            return None
        node = self._know(entry, version)
        known.valid_until = trio.current_time() + entry.entry_timeout_s
        known.epoch = epoch
        return node

    async def _look_up_slowly(self, parent: KernelInode, name: bytes) -> KernelInode | None:
        epoch, version = self.epoch, self._version
        entry = await self._ask(lambda operations: operations.lookup(parent.nodeid, name))
        node = self._know(entry, version) if entry.nodeid else None
        self._names[parent.nodeid, name] = KernelName(entry.nodeid, trio.current_time() + entry.entry_timeout_s, epoch)
        return node

    def _forget(self, nodeid: int, count: int) -> None:
        self._send_without_answer(lambda operations: operations.forget([(nodeid, count)]))

    def shrink(self) -> None:
        """Memory is short: names go, and inodes that nobody has open."""
        self._names.clear()
        for node in list(self._inodes.values()):
            if node.opens == 0 and node.inode is not None and stat.S_ISREG(node.inode.mode):
                del self._inodes[node.nodeid]
                self._forget(node.nodeid, node.lookups)

    async def _walk(self, path: bytes, *, again: bool = False) -> KernelInode:
        node = self._inodes[ROOT_NODEID]
        for name in path.split(b"/"):
            found = await self._look_up(node, name, again=again)
            if found is None:
                raise Refused(errno.ENOENT)
            node = found
        return node

    async def _parent(self, path: bytes, *, again: bool) -> tuple[KernelInode, bytes]:
        directory, _, name = path.rpartition(b"/")
        if not directory:
            return self._inodes[ROOT_NODEID], name
        return await self._walk(directory, again=again), name

    async def _retrying(self, call: Callable[[bool], Coroutine[Any, Any, T]]) -> T:
        """ESTALE: once more, with every name asked for (LOOKUP_REVAL)."""
        try:
            return await call(False)
        except Refused as refused:
            if refused.errno != errno.ESTALE:
                raise
        return await call(True)

    # --- system calls: names ---

    async def stat(self, path: bytes) -> Inode:
        """stat(2)."""
        return (await self.stat_with_ino(path))[1]

    async def stat_with_ino(self, path: bytes) -> tuple[int, Inode]:
        """The inode's number, and what stat(2) tells."""

        async def look(again: bool) -> tuple[int, Inode]:
            node = await self._walk(path, again=again)
            return node.nodeid, await self._attributes(node)

        return await self._retrying(look)

    async def mkdir(self, path: bytes) -> None:
        """mkdir(2)."""

        async def mkdir(again: bool) -> None:
            parent, name = await self._parent(path, again=again)
            async with parent.lock.held():
                if await self._look_up(parent, name, again=again, locked=True) is not None:
                    raise Refused(errno.EEXIST)
                epoch, version = self.epoch, self._version
                entry = await self._ask(lambda operations: operations.mkdir(parent.nodeid, name, 0o40755, CALLER))
                self._made(parent, name, entry, version, epoch)

        await self._retrying(mkdir)

    def _made(self, parent: KernelInode, name: bytes, entry: Entry, version: int, epoch: int) -> KernelInode:
        node = self._know(entry, version)
        until = trio.current_time() + entry.entry_timeout_s
        self._names[parent.nodeid, name] = KernelName(entry.nodeid, until, epoch)
        self._invalidate_attributes(parent)
        return node

    async def create(self, path: bytes) -> OpenFile:
        """open(2) with O_RDWR, O_CREAT and O_EXCL."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL

        async def create(again: bool) -> OpenFile:
            parent, name = await self._parent(path, again=again)
            async with parent.lock.held():
                if await self._look_up(parent, name, again=again, locked=True) is not None:
                    raise Refused(errno.EEXIST)
                epoch, version = self.epoch, self._version
                opened, entry = await self._ask(
                    lambda operations: operations.create(parent.nodeid, name, 0o100644, flags, CALLER)
                )
                node = self._made(parent, name, entry, version, epoch)
                node.opens += 1
                return OpenFile(node, opened.fh, flags, opened.direct_io)

        return await self._retrying(create)

    async def unlink(self, path: bytes) -> None:
        """unlink(2)."""

        async def unlink(again: bool) -> None:
            parent, name = await self._parent(path, again=again)
            async with parent.lock.held():
                node = await self._look_up(parent, name, again=again, locked=True)
                if node is None:
                    raise Refused(errno.ENOENT)
                async with node.lock.held():
                    await self._ask(lambda operations: operations.unlink(parent.nodeid, name, CALLER))
                    self._names.pop((parent.nodeid, name), None)
                    self._invalidate_attributes(parent)
                    self._bump(node)

        await self._retrying(unlink)

    async def rename(self, path: bytes, new_path: bytes) -> None:
        """rename(2)."""

        async def rename(again: bool) -> None:
            old, name = await self._parent(path, again=again)
            new, new_name = await self._parent(new_path, again=again)
            async with AsyncExitStack() as stack:
                for directory in sorted({old.nodeid, new.nodeid}):
                    await stack.enter_async_context(self._inodes[directory].lock.held())
                node = await self._look_up(old, name, again=again, locked=True)
                if node is None:
                    raise Refused(errno.ENOENT)
                target = await self._look_up(new, new_name, again=again, locked=True)
                if target is node:
                    return
                await self._ask(lambda operations: operations.rename(old.nodeid, name, new.nodeid, new_name, 0, CALLER))
                self._names.pop((old.nodeid, name), None)
                self._names[new.nodeid, new_name] = KernelName(node.nodeid, 0.0, self.epoch)
                for changed in (old, new, node):
                    self._invalidate_attributes(changed)
                if target is not None:
                    self._bump(target)

        await self._retrying(rename)

    def _bump(self, node: KernelInode) -> None:
        """What is known of its attributes is not so any more, and neither are answers under way."""
        self._version += 1
        node.version = self._version
        self._invalidate_attributes(node)

    async def list(self, path: bytes) -> list[tuple[bytes, int]]:
        """opendir(3), readdir(3) to the end, closedir(3)."""
        node = self._inodes[ROOT_NODEID] if not path else await self._walk(path)
        opened = await self._ask(lambda operations: operations.opendir(node.nodeid))
        found: list[tuple[bytes, int]] = []
        cookie = 0
        while True:
            page: list[tuple[bytes, int, int]] = []

            def add(name: bytes, entry: Entry, after: int, page: list[tuple[bytes, int, int]] = page) -> bool:
                page.append((name, entry.nodeid, after))
                return True

            at = cookie
            async with node.lock.held(shared=True):
                await self._ask(lambda operations, at=at: operations.readdir(opened.fh, at, False, add))  # type: ignore[misc]
            if not page:
                break
            found += [(name, nodeid) for name, nodeid, _ in page if name not in (b".", b"..")]
            cookie = page[-1][2]
        self._send_without_answer(lambda operations: operations.releasedir(opened.fh))
        return found

    # --- system calls: files ---

    async def open(self, path: bytes, flags: int = os.O_RDWR) -> OpenFile:
        """open(2) of what is there."""

        async def open_it(again: bool) -> OpenFile:
            node = await self._walk(path, again=again)
            node.opens += 1
            try:
                opened: Opened = await self._ask(lambda operations: operations.open(node.nodeid, flags, CALLER))
            except Refused:
                node.opens -= 1
                raise
            if flags & os.O_TRUNC:
                node.size, node.page = 0, None
                self._bump(node)
            if not opened.keep_cache and not opened.direct_io:
                async with node.page_lock:
                    node.page = None
            return OpenFile(node, opened.fh, flags, opened.direct_io)

        return await self._retrying(open_it)

    async def fstat(self, file: OpenFile) -> Inode:
        """fstat(2)."""
        return await self._attributes(file.inode)

    async def read(self, file: OpenFile, offset: int = 0, size: int = PAGE_SIZE) -> bytes:
        """pread(2) within the first page."""
        node = file.inode
        if file.direct_io:
            return bytes(await self._ask(lambda operations: operations.read(file.fh, offset, size)))
        if offset + size > node.size:
            await self._attributes(node)
        if offset >= node.size:
            return b""
        page = node.page
        if page is None:
            async with node.page_lock:
                page = node.page
                if page is None:
                    page = node.page = await self._read_page(file)
        return page.ljust(node.size, b"\0")[offset : min(offset + size, node.size)]

    async def _read_page(self, file: OpenFile) -> bytes:
        node, version = file.inode, self._version
        page = bytes(await self._ask(lambda operations: operations.read(file.fh, 0, PAGE_SIZE)))
        if len(page) < node.size and node.version <= version:
            node.size = len(page)  # fuse_read_update_size: it has been cut.
        return page

    async def write(self, file: OpenFile, data: bytes, offset: int = 0) -> int:
        """pwrite(2), or write(2) of a handle with O_APPEND."""
        node = file.inode
        async with node.lock.held():
            at = node.size if file.flags & os.O_APPEND else offset
            if file.direct_io:
                return await self._write(file, data, at)
            async with node.page_lock:
                if node.page is not None:
                    node.page = _overlaid(node.page, at, data)
                try:
                    return await self._write(file, data, at)
                except Refused:
                    node.page = None
                    raise

    async def _write(self, file: OpenFile, data: bytes, at: int) -> int:
        node = file.inode
        written = await self._ask(lambda operations: operations.write(file.fh, at, data, from_pages=False))
        self._bump(node)
        node.size = max(node.size, at + written)
        if file.direct_io:
            node.page = None
        return written

    async def truncate(self, file: OpenFile, size: int) -> None:
        """ftruncate(2)."""
        node = file.inode
        async with node.lock.held():
            version = self._version
            entry = await self._ask(lambda operations: operations.setattr(node.nodeid, Changes(size=size), CALLER))
            self._change_attributes(node, entry, version)
            if node.page is not None:
                node.page = node.page[:size]

    async def fsync(self, file: OpenFile) -> None:
        """fsync(2)."""
        async with file.inode.lock.held():
            await self._ask(lambda operations: operations.fsync(file.fh, False))

    async def close(self, file: OpenFile, owner: int = 0) -> None:
        """close(2): what FLUSH answers; the handle is gone in any case."""
        try:
            await self._ask(lambda operations: operations.flush(file.fh, owner))
        finally:
            file.inode.opens -= 1
            self._send_without_answer(lambda operations: operations.release(file.fh, lock_owner=owner))

    async def lock(self, file: OpenFile, owner: int, *, wait: bool = True) -> None:
        """fcntl(2) with F_SETLKW or F_SETLK: the whole file, exclusively."""
        lock = FileLock(LockKind.WRITE, 0, LAST_BYTE, owner)
        await self._ask(lambda operations: operations.set_lock(file.fh, owner, lock, flock=False, wait=wait))

    async def unlock(self, file: OpenFile, owner: int) -> None:
        """fcntl(2) with F_UNLCK."""
        lock = FileLock(LockKind.UNLOCK, 0, LAST_BYTE, owner)
        await self._ask(lambda operations: operations.set_lock(file.fh, owner, lock, flock=False, wait=False))

    # --- notifications: fsd.frontend.kernel_notifier.Channel ---

    def forget_attributes(self, nodeid: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE with a negative offset."""
        node = self._known(nodeid)
        self._bump(node)

    def forget_pages(self, nodeid: int, offset: int, size: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE: waits for a page that is being read or written."""
        node = self._known(nodeid)
        self._bump(node)
        _acquire(node.page_lock.acquire)
        node.page = None
        node.page_lock.release()

    def forget_entry(self, parent: int, name: bytes) -> None:
        """FUSE_NOTIFY_INVAL_ENTRY: waits for the directory's lock."""
        directory = self._known(parent)
        _acquire(lambda: directory.lock.acquire(shared=False))
        found = self._names.pop((parent, name), None)
        directory.lock.release(shared=False)
        if found is None:
            raise OSError(errno.ENOENT, name)

    def doubt_entry(self, parent: int, name: bytes) -> None:
        """FUSE_NOTIFY_INVAL_ENTRY with FUSE_EXPIRE_ONLY."""
        directory = self._known(parent)
        _acquire(lambda: directory.lock.acquire(shared=False))
        found = self._names.get((parent, name))
        if found is not None:
            found.valid_until = 0.0
        directory.lock.release(shared=False)
        if found is None:
            raise OSError(errno.ENOENT, name)

    def forget_all_names(self) -> None:
        """FUSE_NOTIFY_INC_EPOCH: takes no lock."""
        self.epoch += 1

    def _known(self, nodeid: int) -> KernelInode:
        if not self.connected and nodeid not in self._inodes:
            raise OSError(errno.ENODEV, "the mount is gone")
        if nodeid not in self._inodes:
            raise OSError(errno.ENOENT, str(nodeid))
        return self._inodes[nodeid]


def _acquire(acquire: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Take a lock of the kernel's in the thread of the daemon that notifies it."""
    assert in_fiber(), "a notification that may wait for a lock was sent from the daemon's loop: it would hang"
    block(acquire)


def _overlaid(page: bytes, at: int, data: bytes) -> bytes:
    page = page.ljust(at, b"\0")
    return page[:at] + data + page[at + len(data) :]


class FrontEnd:
    """In the place of fsd.frontend.direct.direct_frontend.DirectMount."""

    def __init__(self, kernel: Kernel) -> None:
        self.notifier = ThreadNotifier(kernel)
        self.notifier.start()
        self._kernel = kernel
        self._stopped = trio.Event()

    async def serve(self, operations: Operations) -> None:
        """Answer until stopped."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._kernel.serve, operations)
            await self._stopped.wait()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Unmounted."""
        self._stopped.set()

    def close(self) -> None:
        """The device is closed."""
        self._kernel.disconnect()
        self.notifier.stop()
