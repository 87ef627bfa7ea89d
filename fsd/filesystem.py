"""The file-system object: POSIX calls on one side, the inode service and the data path on the other.

It implements `fsd.frontend.ports.Operations` and knows no front end.  The work is in its parts: names, attributes,
directories, files, xattrs; this module puts them together and follows the changes between alone and sharing.

Tasks: the front end's (one per request that needs the network) and `run`, which tells the service of closes.
Shared state: MountState, from the trio thread only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import trio

from fsd.attributes import Attributes
from fsd.core.access_times import AccessTimeRule
from fsd.directories import Directories
from fsd.file_data import DataPath
from fsd.files import Files
from fsd.frontend.ports import Answer, KernelName, KernelNotifier, Operations
from fsd.locks import Locks
from fsd.mount_state import Metadata, MountState, log
from fsd.names import Names
from fsd.nodes import Node
from fsd.ranges import Ranges
from fsd.recalls import Recalls
from fsd.xattrs import Xattrs
from metadata.client import Holdings
from metadata.protocol import OPENS_PER_MESSAGE_MAX, RecallItem, RecallKind, ReleaseInode
from wire.errors import StaleInode, StoreError

SHARE_FLUSH_S = 10.0
"""How long another mount waits for the unflushed bytes of this one before it is let in: half a budget of them on slow
disks; half the default lease."""
KERNEL_DROP_MAX_S = 1.0
"""How long a new session waits for the kernel to drop what it has of the lost one.  A read that is under way keeps its
pages locked until it is answered, which takes a session: then the kernel drops them after that."""
CLOSE_DELAY_S = 0.2
"""How long closes are gathered while sharing, before the service is told: five messages a second at most, and a file
that is opened again at once need not wait for one under way."""
RELEASE_RETRY_S = 5.0
"""Pause after a release that failed; nothing but space at the service depends on it."""


@dataclasses.dataclass(frozen=True)
class FileSystemStatistics:
    """Counts of one moment."""

    is_alone: bool
    nodes: int
    names: int
    kernel_inodes: int
    file_handles: int
    directory_handles: int
    held_inodes: int


class FileSystem:
    """See fsd.frontend.ports.Operations for what each operation promises."""

    def __init__(
        self,
        *,
        metadata: Metadata,
        data: DataPath,
        notifier: KernelNotifier,
        access_times: AccessTimeRule | None = None,
    ) -> None:
        """`access_times`: which reads change them; None: as with relatime."""
        state = self._state = MountState(
            metadata=metadata, data=data, notifier=notifier, access_times=access_times or AccessTimeRule()
        )
        attributes = Attributes(state)
        self.getattr, self.setattr, self.statfs = attributes.getattr, attributes.setattr, attributes.statfs
        self.get_flags, self.set_flags = attributes.get_flags, attributes.set_flags
        names = Names(state)
        self.lookup = names.lookup
        self.forget = names.forget
        self.readlink = names.readlink
        self.mknod = names.mknod
        self.mkdir = names.mkdir
        self.symlink = names.symlink
        self.link = names.link
        self.unlink, self.rmdir = names.unlink, names.rmdir
        self.rename = names.rename
        files = Files(state, attributes)
        self.create, self.tmpfile = files.create, files.tmpfile
        self.open = files.open
        self.read = files.read
        self.write = files.write
        self.fsync = files.fsync
        self._files = files
        locks = self._locks = Locks(state)
        self.get_lock, self.set_lock = locks.get_lock, locks.set_lock
        self.locks_ready = locks.ready
        ranges = Ranges(state, files)
        self.fallocate, self.seek, self.copy_range = ranges.fallocate, ranges.seek, ranges.copy_range
        self.sync = ranges.sync
        directories = Directories(state)
        self.opendir = directories.opendir
        self.readdir = directories.readdir
        self.releasedir = directories.releasedir
        self.fsyncdir = directories.fsyncdir
        self._recalls = Recalls(state)
        self.woken = state.look_at_lease
        xattrs = Xattrs(state)
        self.getxattr = xattrs.getxattr
        self.listxattr = xattrs.listxattr
        self.setxattr = xattrs.setxattr
        self.removexattr = xattrs.removexattr

    # --- what ends locks as well ---

    def flush(self, fh: int, lock_owner: int = 0) -> Answer[None]:
        """See ports.Operations.  The bytes leave before the locks that protect them."""
        node = self._state.handles.file(fh).node
        written = self._files.flush(fh)
        if written is not None:
            return self._flush_and_unlock(written, node, lock_owner)
        return self._locks.closing(node, lock_owner)

    async def _flush_and_unlock(self, written: Answer[None], node: Node, lock_owner: int) -> None:
        assert written is not None
        try:
            await written
        finally:
            unlocked = self._locks.closing(node, lock_owner)
            if unlocked is not None:
                await unlocked

    def release(self, fh: int, *, lock_owner: int = 0, flock: bool = False) -> Answer[None]:
        """See ports.Operations."""
        handle = self._state.handles.files.get(fh)
        unlocked = None if handle is None else self._locks.released(handle, lock_owner, flock=flock)
        closed = self._files.release(fh)
        if unlocked is None:
            return closed
        return self._unlock_and_close(unlocked, closed)

    async def _unlock_and_close(self, unlocked: Answer[None], closed: Answer[None]) -> None:
        assert unlocked is not None
        try:
            await unlocked
        finally:
            if closed is not None:
                await closed

    # --- in the background ---

    async def run(self) -> None:
        """Tell the service of closes and of held inodes that become free, and see to locks; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._locks.run)
            nursery.start_soon(self._state.access_times.run)
            nursery.start_soon(self._gather_closes)
            nursery.start_soon(self._send_releases)

    async def _gather_closes(self) -> None:
        while True:
            await self._state.wait_closed(CLOSE_DELAY_S)

    async def _send_releases(self) -> None:
        while True:
            inos = await self._state.wait_releasable(OPENS_PER_MESSAGE_MAX)
            if not await self._release(inos):
                await trio.sleep(RELEASE_RETRY_S)

    async def _release(self, inos: tuple[int, ...]) -> bool:
        """Whether it succeeded; if not, they wait for the next time."""
        state = self._state
        try:
            await state.metadata.mutate(lambda session, sequence: ReleaseInode(session, sequence, inos=inos))
        except StoreError as error:
            log.warning("release_failed", count=len(inos), error=error)
            state.return_releasable()
            return False
        except BaseException:
            state.released()
            raise
        state.released()
        return True

    # --- alone and sharing ---

    async def set_alone(self, alone: bool) -> None:
        """The service says whether other sessions are open; when this returns, nothing old is believed.

        When sharing begins: own caches go first, then the kernel's; replies made meanwhile are for their moment only.
        No lock is granted here from the first moment on, and when this returns the service has all of them.
        Then the bytes that were written are flushed, so that the others find the end of a file behind them, and
        neither read nor append before it; for a bounded time, as they wait.
        When it ends: what was read while sharing may be old, in the kernel's pages too, so all of it goes as well, and
        only then are long times told again.
        """
        state = self._state
        if not alone:
            await self._begin_sharing()
            await self._flush_before_sharing()
            return
        for node in list(state.nodes):
            if node.is_used:
                try:
                    await state.fetch(node)
                except StaleInode:  # Somebody removed it meanwhile.
                    node.gone = True
                    state.nodes.amend(node.ino, nlink=0, ctime_ns=0)
        state.data.doubt_layouts()
        await self._invalidate_kernel([])
        state.data.sharing = False
        state.nodes.begin_alone()
        await self._locks.begin_alone()

    def holdings(self) -> Holdings:
        """What the service is to know of this mount and keeps in memory only."""
        return self._locks.holdings()

    async def _begin_sharing(self) -> None:
        self._locks.stop_granting()
        await self._drop_everything()
        await self._locks.push()

    async def _drop_everything(self) -> None:
        """Nothing that was learnt until now is believed; of what is asked from then on, what comes under a lease."""
        state = self._state
        entries = state.nodes.told_names()
        state.dropping += 1
        try:
            state.nodes.begin_sharing()
            state.data.sharing = True
            state.data.doubt_layouts()
            await self._invalidate_kernel(entries)
        finally:
            state.dropping -= 1
            state.look_at_lease()

    async def recall(self, items: Sequence[RecallItem]) -> None:
        """The service is about to let others change these; when this returns, nothing old is believed of them."""
        if any(item.kind is RecallKind.EVERYTHING for item in items):
            await self._drop_everything()
            await self._flush_before_sharing()
        else:
            await self._recalls.obey(items)

    async def _flush_before_sharing(self) -> None:
        with trio.move_on_after(SHARE_FLUSH_S) as scope:
            try:
                await self._state.data.flush_all()
            except StoreError as error:
                log.warning("flush_before_sharing_failed", error=error)
        if scope.cancelled_caught:
            log.warning("flush_before_sharing_takes_long", waited_s=SHARE_FLUSH_S)

    async def session_lost(self) -> None:
        """The session is over: others may have changed anything.

        Caches go, locks are lost; held inodes are the service's again; bytes not flushed may be too late (decision
        0014).  When this returns a new session may be opened.  By then the kernel has dropped what it has, unless it
        waits for a request that waits for the new session: what is told meanwhile is told for its moment only.
        """
        self._locks.session_lost()
        self._state.session_lost()
        self._state.data.session_lost()
        with trio.move_on_after(KERNEL_DROP_MAX_S) as scope:
            await self._begin_sharing()
        if scope.cancelled_caught:
            log.info("kernel_drops_later", waited_s=KERNEL_DROP_MAX_S)

    async def open_inodes(self) -> list[int]:
        """What is open or held here, after `set_alone(False)`: whatever is opened later is told by itself.

        Access times that wait are told before; if that takes long they go on waiting.
        """
        await self._state.access_times.flush()
        return await self._state.open_inodes()

    async def _invalidate_kernel(self, entries: list[KernelName]) -> None:
        state = self._state
        await state.notifier.invalidate_all(state.nodes.kernel_nodeids(), entries)

    # --- the end ---

    async def close(self, timeout_s: float) -> None:
        """Make all bytes durable and release what can be, in at most `timeout_s` seconds; what could not is logged."""
        state = self._state
        await state.data.drain(timeout_s)
        await state.access_times.flush()
        state.release_closed()
        while True:
            await state.wait_released()
            inos = state.releasable_nowait(OPENS_PER_MESSAGE_MAX)
            if not inos or not await self._release(inos):
                return

    def statistics(self) -> FileSystemStatistics:
        """Counts of this moment."""
        state = self._state
        return FileSystemStatistics(
            is_alone=state.metadata.alone,
            nodes=len(state.nodes),
            names=state.nodes.name_count,
            kernel_inodes=len(state.nodes.lookups),
            file_handles=len(state.handles.files),
            directory_handles=len(state.handles.directories),
            held_inodes=len(state.held),
        )


def _check_interface(file_system: FileSystem) -> Operations:
    return file_system
