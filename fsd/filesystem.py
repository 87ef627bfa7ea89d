"""The file-system object: POSIX calls on one side, the inode service and the data path on the other.

It implements `fsd.frontend.ports.Operations` and knows no front end.  The work is in its parts: names, attributes,
directories, files, xattrs; this module puts them together and follows the changes between alone and sharing.

Tasks: the front end's (one per request that needs the network) and `run`, which releases held inodes.
Shared state: MountState, from the trio thread only.
"""

from __future__ import annotations

import dataclasses

import trio

from fsd.attributes import Attributes
from fsd.directories import Directories
from fsd.file_data import DataPath
from fsd.files import Files
from fsd.frontend.ports import KernelNotifier, Operations
from fsd.mount_state import Metadata, MountState, log
from fsd.names import Names
from fsd.xattrs import Xattrs
from metadata.protocol import ReleaseInode
from wire.errors import StaleInode, StoreError

RELEASE_COUNT_MAX = 1024
"""Inodes in one ReleaseInode (its message's bound)."""
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

    def __init__(self, *, metadata: Metadata, data: DataPath, notifier: KernelNotifier) -> None:
        state = self._state = MountState(metadata=metadata, data=data, notifier=notifier)
        attributes = Attributes(state)
        self.getattr = attributes.getattr
        self.setattr = attributes.setattr
        self.statfs = attributes.statfs
        names = Names(state)
        self.lookup = names.lookup
        self.forget = names.forget
        self.readlink = names.readlink
        self.mknod = names.mknod
        self.mkdir = names.mkdir
        self.symlink = names.symlink
        self.link = names.link
        self.unlink = names.unlink
        self.rmdir = names.rmdir
        self.rename = names.rename
        files = Files(state, attributes)
        self.create = files.create
        self.open = files.open
        self.read = files.read
        self.write = files.write
        self.flush = files.flush
        self.fsync = files.fsync
        self.release = files.release
        directories = Directories(state)
        self.opendir = directories.opendir
        self.readdir = directories.readdir
        self.releasedir = directories.releasedir
        self.fsyncdir = directories.fsyncdir
        xattrs = Xattrs(state)
        self.getxattr = xattrs.getxattr
        self.listxattr = xattrs.listxattr
        self.setxattr = xattrs.setxattr
        self.removexattr = xattrs.removexattr

    async def run(self) -> None:
        """Release held inodes as they become free; runs until cancelled."""
        state = self._state
        while True:
            inos = await state.wait_releasable(RELEASE_COUNT_MAX)
            try:
                await self._release(inos)
            except StoreError as error:
                log.warning("release_failed", count=len(inos), error=error)
                state.return_releasable(inos)
                await trio.sleep(RELEASE_RETRY_S)

    async def _release(self, inos: tuple[int, ...]) -> None:
        await self._state.metadata.mutate(lambda session, sequence: ReleaseInode(session, sequence, inos=inos))

    # --- alone and sharing ---

    async def set_alone(self, alone: bool) -> None:
        """The service says whether other sessions are open; when this returns, nothing old is believed.

        When sharing begins: own caches go first, then the kernel's; replies made meanwhile are for their moment only.
        When it ends: what was read while sharing may be old, in the kernel's pages too, so all of it goes as well, and
        only then are long times told again.
        """
        state = self._state
        if not alone:
            entries = state.nodes.told_names()
            state.nodes.begin_sharing()
            state.data.forget_layouts()
            await self._invalidate_kernel(entries)
            return
        for node in list(state.nodes):
            if node.is_used:
                try:
                    await state.fetch(node)
                except StaleInode:  # Somebody removed it meanwhile.
                    node.gone = True
                    state.nodes.amend(node.ino, nlink=0, ctime_ns=0)
        state.data.forget_layouts()
        await self._invalidate_kernel([])
        state.nodes.begin_alone()

    async def session_lost(self) -> None:
        """The lease ran out: others may have changed anything.  Caches go; held inodes are the service's again."""
        self._state.held.clear()
        await self.set_alone(False)

    async def _invalidate_kernel(self, entries: list[tuple[int, bytes]]) -> None:
        state = self._state
        await state.notifier.invalidate_all(state.nodes.kernel_nodeids(), entries)

    # --- the end ---

    async def close(self, timeout_s: float) -> None:
        """Make all bytes durable and release what can be, in at most `timeout_s` seconds; what could not is logged."""
        state = self._state
        await state.data.drain(timeout_s)
        while inos := state.releasable_nowait(RELEASE_COUNT_MAX):
            try:
                await self._release(inos)
            except StoreError as error:
                log.warning("release_failed", count=len(inos), error=error)
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
