"""Open files: open, create, read, write, flush, fsync, release.

Shared state: `Node.file` is there from the first read or write until the bytes of the last close are durable; one
reference to the FileData is held through it, however many handles there are.

Awaits that may not move: nothing between reading `unlinking_over` (nobody unlinks it) and raising `opening_count`;
nothing between seeing that no handle is left and clearing `Node.file`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Coroutine

import trio

from fsd.attributes import Attributes, privilege_bits
from fsd.core.error_log import ErrorCursor
from fsd.file_data import FileData
from fsd.frontend.ports import Answer, Entry, Opened
from fsd.handles import FileHandle, writes
from fsd.mount_state import MountState, log
from fsd.names import check_name, note_inode, note_made
from fsd.nodes import NEVER, UNKNOWN, Node
from metadata.core.namespace.permissions import FROZEN, IMMUTABLE
from metadata.core.schema import Inode
from metadata.protocol import Caller, Create, GetLayout, MakeTemporary
from wire.errors import (
    EntryExists,
    InvalidArgument,
    IsDirectory,
    NoSuchEntry,
    NotPermitted,
    QuotaExceeded,
    StaleInode,
    StoreError,
)

LEASE_PAUSE_S = 1.0
"""After a recall, how long a file is written through before the write lease is asked for again: while somebody reads it
time and again, a lease would be recalled as often, which costs more than it saves."""


def check_flags(inode: Inode, flags: int) -> None:
    """Raises NotPermitted when what is immutable or append-only must not be opened with these flags (may_open)."""
    changes = flags & (os.O_ACCMODE | os.O_TRUNC)
    if changes and (inode.flags & IMMUTABLE or flags & os.O_TRUNC or not flags & os.O_APPEND):
        raise NotPermitted("the file is immutable or append-only")


PAGE_SIZE = 4096


class Files:
    """Handles of regular files, and the bytes behind them."""

    def __init__(self, state: MountState, attributes: Attributes) -> None:
        self._state = state
        self._nodes = state.nodes
        self._attributes = attributes
        self._handles = state.handles.files

    # --- open and create ---

    def open(self, nodeid: int, flags: int, caller: Caller, *, kill_privileges: bool = False) -> Answer[Opened]:
        """See ports.Operations."""
        nodes = self._nodes
        node = nodes.obtain(nodes.ino_of(nodeid))
        if flags & os.O_TRUNC or node.unlinking_count or node.gone or self._must_ask(node, flags):
            return self._open(node, flags, caller, kill_privileges)
        if self._state.access_times.is_due_at_open(node, flags):
            self._state.access_times.count_open(node)
        return self._opened(node, flags)

    def _must_ask(self, node: Node, flags: int) -> bool:
        """Whether the service has to be asked, or told, before the file is open.

        While sharing not if what is known of it is believed, the service takes it to be open here already, and, for
        writing, the write lease is here.
        """
        if node.known_at < self._nodes.believed_since:
            return True
        if not self._nodes.is_sharing:
            return False
        return not self._state.is_known_open(node.ino) or (writes(flags) and self._state.must_write_through(node))

    async def _open(self, node: Node, flags: int, caller: Caller, kill_privileges: bool) -> Opened:
        while node.unlinking_over is not None:
            await node.unlinking_over.wait()
        node.opening_count += 1
        try:
            if node.gone:
                raise StaleInode(f"inode {node.ino} has no name any more")
            if self._must_ask(node, flags):
                await self._fetch_layout(node, write=writes(flags))
            assert node.inode is not None
            if node.inode.flags & FROZEN:
                check_flags(node.inode, flags)
            if flags & os.O_TRUNC:
                await self._truncate(node, caller, kill_privileges)
            if self._state.access_times.is_due_at_open(node, flags):
                self._state.access_times.count_open(node)
            return self._opened(node, flags)
        finally:
            node.opening_count -= 1
            if node.handle_count == 0 and node.opening_count == 0:
                await self._close(node)

    async def _fetch_layout(self, node: Node, *, write: bool = False) -> None:
        """Ask for attributes and layout, and with `write` for the write lease; attributes are there when this returns.

        Raises StaleInode when the file is gone.
        """
        state = self._state
        ino = node.ino
        await state.wait_not_releasing(ino)
        asked = self._nodes.now
        if write:
            node.lease_asked_s = trio.current_time()
        try:
            layout = await state.ask(
                lambda session: GetLayout(
                    session, ino, open=state.is_told_open(ino), write=write and state.data.sharing
                )
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        self._nodes.learn(ino, layout.inode, asked)
        node.layout = layout if asked >= node.changed_at else None
        if layout.write_lease:
            self._nodes.grant_writing(node, asked)

    async def _truncate(self, node: Node, caller: Caller, kill_privileges: bool) -> None:
        if kill_privileges:
            await self._attributes.clear_privileges(node, caller)
        asked = self._nodes.now
        reply = await self._attached(node).truncate(0, caller)
        self._nodes.learn(node.ino, reply.inode, asked)

    def _opened(self, node: Node, flags: int) -> Opened:
        """A handle of a file whose attributes are known.

        The kernel's pages of it are good, as what is recalled they lose; unless they were read while nothing was
        believed, or the content has changed since the attributes alone were recalled.
        """
        nodes = self._nodes
        keep_cache = nodes.believed_since != NEVER and not node.pages_are_doubtful
        if node.pages_version is not None and node.pages_version != nodes.attributes(node).data_version:
            keep_cache = False
        node.pages_are_doubtful, node.pages_version = False, None  # Otherwise the kernel drops them with this answer.
        assert node.inode is not None
        if not stat.S_ISREG(node.inode.mode):
            raise IsDirectory("open") if stat.S_ISDIR(node.inode.mode) else InvalidArgument("not a regular file")
        if node.inode.flags & FROZEN:
            check_flags(node.inode, flags)
        fh = self._state.handles.next()
        handle = self._handles[fh] = FileHandle(fh, node, flags, counts_reads=self._state.access_times.counts(flags))
        if node.file is not None:
            handle.error_cursor = node.file.error_cursor()
        node.handle_count += 1
        if not keep_cache:
            node.may_have_pages = False  # The kernel drops them when it has the answer.
        # The kernel's idea of where an append goes is not worth keeping while others append, too.  And who writes
        # through must not hold a page locked meanwhile: the commit may wait for another mount's pages to be dropped,
        # and those be locked by a write that waits for ours.
        state = self._state
        direct_io = state.data.sharing and (handle.appends or (handle.writable and state.must_write_through(node)))
        # Never FOPEN_NOFLUSH, not even for a handle that cannot write: closing *any* descriptor of a file ends
        # the POSIX locks that the process has on it by others, and the flush is how the kernel tells of it.
        return Opened(fh, keep_cache, direct_io=direct_io)

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> Answer[tuple[Opened, Entry]]:
        """See ports.Operations."""
        check_name(name)
        return self._create(self._nodes.obtain(self._nodes.ino_of(parent)), name, mode, flags, caller)

    async def _create(
        self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Opened, Entry]:
        """Always exclusively: the kernel has not checked whether this caller may open what somebody else has made."""
        state, nodes = self._state, self._nodes
        asked, parent = nodes.now, directory.ino
        told_open = False

        def request(session: int, sequence: int) -> Create:
            nonlocal told_open
            told_open = nodes.is_sharing
            return Create(session, sequence, parent, name, mode, exclusive=True, caller=caller, open=told_open)

        with state.creating():
            try:
                reply = await state.mutate(request, inos=(), entries=((directory, name),))
            except EntryExists as error:
                nodes.forget_names(directory)
                if flags & os.O_EXCL:
                    raise
                raise StaleInode(error.detail) from error
            node, name_timeout_s = note_made(state, directory, name, reply.ino, reply.inode, reply.parent, asked)
            if asked >= node.changed_at:
                node.layout = reply
            if told_open:
                state.registered.add(reply.ino)
                node.lease_asked_s = trio.current_time()
            if reply.write_lease:
                nodes.grant_writing(node, asked)
            opened = self._opened(node, flags)
        return opened, state.entry(node, name_timeout_s)

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> Answer[tuple[Opened, Entry]]:
        """See ports.Operations."""
        return self._tmpfile(self._nodes.ino_of(parent), mode, flags, caller)

    async def _tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Opened, Entry]:
        state, nodes = self._state, self._nodes
        asked = nodes.now
        linkable = not flags & os.O_EXCL
        with state.creating():
            reply = await state.mutate(
                lambda session, sequence: MakeTemporary(session, sequence, parent, mode, linkable, caller),
                inos=(),
                entries=(),
            )
            state.held.add(reply.ino)
            node = note_inode(nodes, reply.ino, reply.inode, asked)
            if asked >= node.changed_at:
                node.layout = reply
            opened = self._opened(node, flags)
        return opened, state.entry(node, 0.0)

    # --- the bytes of a node ---

    def _attached(self, node: Node) -> FileData:
        """The bytes of an open file, whose attributes are known; made at the first read or write.

        Many files are opened and never read here: the kernel has their pages.
        """
        file = node.file
        if file is None:
            assert node.inode is not None
            layout, node.layout = node.layout, None
            if layout is not None and layout.inode.version != node.inode.version:
                layout = None
            file = self._state.data.file(node.ino, layout)
            if layout is None:
                file.update_inode(node.inode, is_sure=node.known_at != UNKNOWN)
            node.file = file
            node.attached_cursor = file.error_cursor()
        return file

    async def attach(self, node: Node) -> FileData:
        """The bytes of an open file, after its attributes were asked for if need be.  Raises: StaleInode, faults."""
        if self._attached_nowait(node) is None:
            await self._fetch_layout(node)
        return self._attached(node)

    def _attached_nowait(self, node: Node) -> FileData | None:
        """As `_attached`; None when the attributes must be asked for first, as they may be out of date."""
        if node.file is None and node.known_at < self._nodes.believed_since and node.layout is None:
            return None
        return self._attached(node)

    def _cursor(self, handle: FileHandle) -> ErrorCursor:
        """Which errors the handle has been told: if it is older than the FileData, those from before that."""
        cursor = handle.error_cursor
        if cursor is None:
            attached = handle.node.attached_cursor
            assert attached is not None
            cursor = handle.error_cursor = ErrorCursor(attached.seen)
        return cursor

    def read(self, fh: int, offset: int, size: int) -> Answer[bytes | memoryview]:
        """See ports.Operations."""
        handle = self._state.handles.file(fh)
        if handle.lost_locks:
            handle.refuse_without_locks()
        node = handle.node
        file = node.file or self._attached_nowait(node)
        if file is None:
            return self._read_later(handle, offset, size)
        node.may_have_pages = True
        if self._nodes.believed_since == NEVER:
            node.pages_are_doubtful = True
        if handle.counts_reads:
            self._state.access_times.maybe_count(node)
        found = file.read_nowait(offset, size)
        return file.read(offset, size) if found is None else found

    async def _read_later(self, handle: FileHandle, offset: int, size: int) -> bytes | memoryview:
        await self.attach(handle.node)
        read = self.read(handle.fh, offset, size)
        return await read if isinstance(read, Coroutine) else read

    def write(
        self,
        fh: int,
        offset: int,
        data: bytes,
        *,
        kill_privileges: bool = False,
        caller: Caller | None = None,
        from_pages: bool | None = None,
    ) -> Answer[int]:
        """See ports.Operations.

        Without `kill_privileges` suid and sgid stay: a kernel that does not send it sends an empty setattr before a
        write that clears them.
        With O_APPEND the kernel gives the end of the file as it knows it, which may not be the end any more; pages of a
        mapping that it writes back through such a handle stay where they are.
        """
        handle = self._state.handles.file(fh)
        if handle.lost_locks:
            handle.refuse_without_locks()
        node = handle.node
        if node.inode is not None and node.inode.flags & IMMUTABLE and not from_pages:  # As ext4 since Linux 5.3.
            raise NotPermitted(f"inode {node.ino} is immutable")
        node.may_have_pages = True
        if self._state.data.sharing:
            if handle.appends and not from_pages:
                return self._append_sharing(handle, offset, data, keep_privileges=not kill_privileges)
            if self._state.must_write_through(node):
                return self._write_through(handle, offset, data, caller, from_pages, kill_privileges=kill_privileges)
        return self._write_behind(handle, offset, data, caller, from_pages, kill_privileges=kill_privileges)

    def _write_behind(
        self,
        handle: FileHandle,
        offset: int,
        data: bytes,
        caller: Caller | None,
        from_pages: bool | None,
        *,
        kill_privileges: bool,
    ) -> Answer[int]:
        """As `write`, into memory."""
        node = handle.node
        file = node.file or self._attached_nowait(node)
        if kill_privileges:
            if file is None or not self._nodes.is_fresh(node) or privilege_bits(file.inode(), caller):
                return self._write_unprivileged(handle, offset, data, caller, from_pages)
        elif file is None:
            return self._write_later(handle, offset, data, from_pages, keep_privileges=True)
        if handle.synchronous:
            return self._write_later(handle, offset, data, from_pages, keep_privileges=True)
        if handle.appends and _is_append(file, offset, len(data), from_pages):
            if offset != file.size:
                return self._write_later(handle, offset, data, from_pages, keep_privileges=True)
            return len(data) if file.append_nowait(data) else file.append(data, keep_privileges=True)
        if file.write_nowait(offset, data):
            return len(data)
        return self._write_later(handle, offset, data, from_pages, keep_privileges=True)

    async def _write_through(
        self,
        handle: FileHandle,
        offset: int,
        data: bytes,
        caller: Caller | None,
        from_pages: bool | None,
        *,
        kill_privileges: bool,
    ) -> int:
        """As `write`; the write lease is asked for again if nothing of the file was recalled for a while."""
        node, now_s = handle.node, trio.current_time()
        if now_s - max(node.recalled_s, node.lease_asked_s) >= LEASE_PAUSE_S:
            await self._fetch_layout(node, write=True)
        if kill_privileges:
            return await self._write_unprivileged(handle, offset, data, caller, from_pages)
        return await self._write_later(handle, offset, data, from_pages, keep_privileges=True)

    async def _append_sharing(self, handle: FileHandle, offset: int, data: bytes, *, keep_privileges: bool) -> int:
        """Append where the file ends for all mounts.

        The kernel believes that the bytes went to `offset`, and may have filled its pages there: those, and the ones
        where they are, are told to go.
        """
        node, nodes = handle.node, self._state.nodes
        file, asked = await self.attach(node), nodes.now
        try:
            inode = await file.append_sharing(data, keep_privileges=keep_privileges)
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        nodes.learn(node.ino, inode, asked)
        start = min(offset, inode.size - len(data))
        end = max(offset + len(data), inode.size)
        self._state.notifier.invalidate_pages(nodes.nodeid_of(node.ino), start, end - start)
        return len(data)

    async def _write_unprivileged(
        self, handle: FileHandle, offset: int, data: bytes, caller: Caller | None, from_pages: bool | None
    ) -> int:
        """Take suid and sgid away, tell the kernel, which believes its own attributes, and write.

        While sharing it is the commit that takes them away: another mount may have set them since they were asked for.
        """
        node = handle.node
        if self._nodes.is_fresh(node):
            await self._attributes.clear_privileges(node, caller)
            self._state.notifier.invalidate_attributes_now(self._nodes.nodeid_of(node.ino))
        return await self._write_later(handle, offset, data, from_pages, keep_privileges=self._nodes.is_fresh(node))

    async def _write_later(
        self, handle: FileHandle, offset: int, data: bytes, from_pages: bool | None, *, keep_privileges: bool
    ) -> int:
        """Write when the attributes have been asked for, or through to the disks (O_SYNC)."""
        file = await self.attach(handle.node)
        if handle.appends and _is_append(file, offset, len(data), from_pages):
            end = file.size
            size = await file.append(data, keep_privileges=keep_privileges)
            if offset != end:  # The kernel did not know what others have appended, and has filled the wrong pages.
                nodeid = self._nodes.nodeid_of(handle.node.ino)
                self._state.notifier.invalidate_pages(nodeid, min(offset, end), 0)
        else:
            size = await file.write(offset, data, keep_privileges=keep_privileges)
        if handle.synchronous or self._state.must_write_through(handle.node):  # Now: the lease may have gone meanwhile.
            await file.flush(self._cursor(handle))
        return size

    def flush(self, fh: int, lock_owner: int = 0) -> Answer[None]:
        """See ports.Operations."""
        handle = self._state.handles.file(fh)
        return self._flush(handle) if handle.writable else None

    def fsync(self, fh: int, datasync: bool) -> Answer[None]:
        """See ports.Operations."""
        return self._flush(self._state.handles.file(fh))

    def _flush(self, handle: FileHandle) -> Answer[None]:
        file = handle.node.file
        if file is None:
            return None
        cursor = self._cursor(handle)
        return file.flush(cursor) if file.needs_flush(cursor) else None

    # --- closing ---

    def release(self, fh: int, *, lock_owner: int = 0, flock: bool = False) -> Answer[None]:
        """See ports.Operations."""
        handle = self._handles.pop(fh, None)
        if handle is None:
            return None
        node = handle.node
        node.handle_count -= 1
        if node.handle_count or node.opening_count:
            return None
        may_keep = not (handle.writable or node.may_write_behind)
        if node.file is not None:
            return self._close(node, may_keep=may_keep)
        node.layout = None
        self._state.maybe_release(node.ino, may_keep=may_keep)
        return None

    async def _close(self, node: Node, *, may_keep: bool = False) -> None:
        """Let go of the bytes when they are durable, unless it is opened again meanwhile."""
        node.layout = None
        file = node.file
        if file is None:
            self._state.maybe_release(node.ino, may_keep=may_keep)
            return
        if self._nodes.attributes(node).nlink:
            await file.settle()
        if node.handle_count or node.opening_count or node.file is not file:
            return
        node.inode = file.inode()
        node.file = node.locked_content = None
        if file.unflushed:
            self._nodes.doubt(node.ino)
        try:
            await file.close()
        except StoreError as error:
            tell = log.warning if isinstance(error, QuotaExceeded) else log.error
            tell("flush_failed_at_close", ino=node.ino, error=error)
        self._state.maybe_release(node.ino, may_keep=may_keep)


def _is_append(file: FileData, offset: int, size: int, from_pages: bool | None) -> bool:
    """Whether a write through a handle with O_APPEND belongs at the end of the file.

    A front end that cannot tell written-back pages (None) leaves a guess: what looks like whole pages inside the file.
    """
    if from_pages is not None:
        return not from_pages
    end = offset + size
    looks_like_pages = offset % PAGE_SIZE == 0 and (end % PAGE_SIZE == 0 or end == file.size)
    return offset >= file.size or not looks_like_pages
