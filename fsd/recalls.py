"""Recalls: what another mount is about to change, this one and its kernel stop believing (decision 0013).

One task, the session's, calls `obey`, one recall after another; when it returns the recall is acknowledged.  The order:

1. what was recalled is doubted here, in one step: from now on nobody is told it, for no time;
2. bytes that were written behind are committed, pages of mappings first (FLUSH);
3. the kernel drops what it was told; `KernelNotifier.drop` says which of its calls may wait for what;
4. inodes are doubted once more: what was asked for meanwhile may be older than the change.

Dropping a name takes the lock of its directory in the kernel, and a change of ours that waits at the service for the
acknowledgement of another mount may hold it, while that mount waits for ours.  So where a change of that directory is
under way, or the kernel has not done it after NAMES_S, all names of the mount are made void instead, which takes no
lock, and for a while the kernel is not to keep names of the directory: then there is nothing to drop.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence

import trio

from fsd.file_data import FileData
from fsd.frontend.ports import KernelName
from fsd.mount_state import MountState, log
from metadata.protocol import RecallItem, RecallKind
from wire.errors import StoreError

NAMES_S = 0.05
"""How long the kernel may take for dropping names before all are made void: it takes microseconds, unless it waits."""


class _Work:
    """What one recall makes the kernel do."""

    def __init__(self) -> None:
        self.inos: set[int] = set()  # Recalled; to be doubted again.
        self.attributes: set[int] = set()
        self.pages: set[int] = set()
        self.names: list[KernelName] = []
        self.flushes: set[int] = set()


class Recalls:
    """Obeys recalls for one mount."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._nodes = state.nodes
        self.void_count = 0  # How often all names were made void.

    async def obey(self, items: Sequence[RecallItem]) -> None:
        """Stop believing these, the kernel included; none of them may be EVERYTHING."""
        work = _Work()
        for item in items:
            self._doubt(item, work)
        if work.flushes:
            await self._flush(work.flushes)
        await self._tell_kernel(work)
        for ino in work.inos:
            self._nodes.recalled(ino)
            self._state.recalled(ino)

    # --- doubting ---

    def _doubt(self, item: RecallItem, work: _Work) -> None:
        nodes, ino, kind = self._nodes, item.ino, item.kind
        if kind is RecallKind.NAME:
            told = nodes.recall_name(ino, item.name)
            if told is None and not self._state.notifier.is_idle:
                told = KernelName(nodes.nodeid_of(ino), item.name)  # It may be among those being dropped.
            if told is not None:
                work.names.append(told)
            work.pages.add(ino)  # The listing.
        elif kind is RecallKind.ALL_NAMES:
            work.names += nodes.recall_names(ino)
            work.pages.add(ino)
            self._doubt_inode(ino, work)
        elif kind is RecallKind.FLUSH:
            nodes.recall_writing(ino)
            work.flushes.add(ino)
        else:
            is_kept = kind is RecallKind.ATTRS and self._keeps_pages(ino)
            self._doubt_inode(ino, work)
            if is_kept:
                work.attributes.add(ino)
            else:
                self._doubt_content(ino)
                work.pages.add(ino)
                node = self._nodes.find(ino)
                if node is not None:
                    node.pages_version = None

    def _keeps_pages(self, ino: int) -> bool:
        """Whether the kernel may keep the pages of an inode whose attributes are recalled.

        From the acknowledgement on the service tells of no change any more, until something is asked for again.  So the
        next open must be able to compare versions, and nobody may read the pages before that.
        """
        node = self._nodes.find(ino)
        if node is None or node.inode is None:
            return False
        if stat.S_ISDIR(node.inode.mode):  # Its listing goes with its names.
            return True
        if node.is_used:
            return False
        if node.pages_version is None:
            node.pages_version = node.inode.data_version
        return True

    def _doubt_inode(self, ino: int, work: _Work) -> None:
        node = self._nodes.recall(ino, now_s=trio.current_time())
        if node is not None:
            node.layout = None
        work.inos.add(ino)

    def _doubt_content(self, ino: int) -> None:
        file = self._state.data.find(ino)
        if file is not None:
            file.doubt()

    # --- bytes written behind ---

    async def _flush(self, inos: Iterable[int]) -> None:
        """Commit what was written into these before; what cannot be is kept, and told to who fsyncs or closes."""
        files = [file for ino in inos if (file := self._state.data.find(ino)) is not None]
        # A mapping's pages reach us as writes, which are committed before this returns.
        await self._state.notifier.drop(
            [], [self._nodes.nodeid_of(file.ino) for file in files if self._may_be_mapped(file.ino)]
        )
        async with trio.open_nursery() as nursery:
            for file in files:
                if file.unflushed:
                    nursery.start_soon(self._flush_one, file)

    def _may_be_mapped(self, ino: int) -> bool:
        node = self._nodes.find(ino)
        return node is not None and node.may_have_pages and node.handle_count > 0

    async def _flush_one(self, file: FileData) -> None:
        try:
            await file.settle()
        except StoreError as error:
            log.warning("recalled_bytes_not_flushed", ino=file.ino, error=error)

    # --- the kernel ---

    async def _tell_kernel(self, work: _Work) -> None:
        nodes = self._nodes
        async with trio.open_nursery() as nursery:
            names = self._names_to_drop(work.names)
            if names:
                nursery.start_soon(self._drop_names, names)
            pages = [nodes.nodeid_of(ino) for ino in work.pages]
            await self._state.notifier.drop([nodes.nodeid_of(ino) for ino in work.attributes - work.pages], pages)

    def _names_to_drop(self, names: list[KernelName]) -> list[KernelName]:
        """Those that the kernel must be told to drop; none of them is in a directory with a change of ours under way.

        In a contended directory the kernel has kept no name since all were made void.
        """
        state, nodes, now_s = self._state, self._nodes, trio.current_time()
        left: list[KernelName] = []
        changing: set[int] = set()
        for name in names:
            ino = nodes.ino_of(name.parent)
            node = nodes.find(ino)
            is_contended = node is not None and node.contended_until > now_s
            if node is not None and is_contended and ino in state.changing:
                state.contend(node)
            if is_contended:
                nodes.recalled_name(name)
                continue
            left.append(name)
            if ino in state.changing:
                changing.add(ino)
        if changing and self._make_void(changing):
            for name in left:
                nodes.recalled_name(name)
            return []
        return left

    async def _drop_names(self, names: list[KernelName]) -> None:
        with trio.move_on_after(NAMES_S) as scope:
            await self._state.notifier.drop_names(names)
        if scope.cancelled_caught and not self._make_void({self._nodes.ino_of(name.parent) for name in names}):
            await self._state.notifier.drop_names(names)  # There is no other way; the lease bounds it.
        for name in names:
            self._nodes.recalled_name(name)

    def _make_void(self, directories: Iterable[int]) -> bool:
        """Make all names of the mount void because of these directories; False: the kernel cannot do that."""
        for ino in directories:
            node = self._nodes.find(ino)
            if node is not None:
                self._state.contend(node)
        self.void_count += 1
        return self._state.notifier.make_names_void()
