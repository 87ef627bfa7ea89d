"""What the parts of the file-system object share: the services, the nodes, the handles, and how replies are stamped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from fsd.file_data import DataPath
from fsd.frontend.ports import Entry, KernelNotifier
from fsd.handles import HandleTable
from fsd.nodes import Node, NodeTable
from fsd.ports import MetadataPort, R
from metadata.core.schema import Inode
from metadata.protocol import GetAttr, Mutation
from wire.errors import NoSuchEntry, Refusal, StaleInode
from wire.log import get_logger
from wire.message import Request

ALONE_TIMEOUT_S = 3600.0
"""How long the kernel may keep names and attributes while nobody else has the file system open (decision 0003)."""
NO_INODE = Inode(mode=0, nlink=0, uid=0, gid=0, size=0, atime_ns=0, mtime_ns=0, ctime_ns=0, btime_ns=0)
"""In the place of attributes in the entry of a name that does not exist."""

log = get_logger("fsd.filesystem")


class Metadata(MetadataPort, Protocol):
    """What the file-system object needs of a MetadataClient."""

    root_ino: int
    root: Inode

    @property
    def alone(self) -> bool:
        """No other session is open."""
        ...

    async def tell(self, make: Callable[[int], Request[R]]) -> R:
        """Send what `make(session)` makes, to the session of that moment and no other."""
        ...

    async def reclaim(self) -> None:
        """Tell the service all that the mount holds."""
        ...


class MountState:
    """Shared by names, attributes, directories, files and xattrs.  Used from the trio thread only."""

    def __init__(self, *, metadata: Metadata, data: DataPath, notifier: KernelNotifier) -> None:
        self.metadata = metadata
        self.data = data
        self.notifier = notifier
        forget_names = None if notifier.drops_all_names else notifier.invalidate_entries
        self.nodes = NodeTable(metadata.root_ino, forget_names, self.forget_pages)
        data.on_foreign_change(self.forget_pages)
        self.handles = HandleTable()
        self.held: set[int] = set()  # Inodes without a name that the service keeps for this session.
        self._releasable: list[int] = []
        self._release_wanted = trio.Event()
        data.sharing = not metadata.alone
        if metadata.alone:
            self.nodes.begin_alone()
        self.nodes.learn(metadata.root_ino, metadata.root, self.nodes.now)

    def forget_pages(self, ino: int) -> None:
        """The content has changed elsewhere: the kernel, which does not look at mtimes, is told to drop its pages."""
        self.notifier.invalidate_pages(self.nodes.nodeid_of(ino), 0, 0)

    # --- replies ---

    def timeout_s(self, node: Node) -> float:
        """How long the kernel may keep the node's attributes.

        Not at all while there are unflushed writes: the flush gives the file another ctime, and nobody would tell.
        """
        if node.known_at < self.nodes.alone_since or (node.file is not None and node.file.unflushed):
            return 0.0
        return ALONE_TIMEOUT_S

    def attributes_entry(self, node: Node) -> Entry:
        """The reply to getattr and setattr."""
        nodes = self.nodes
        return Entry(nodes.nodeid_of(node.ino), nodes.attributes(node), 0.0, self.timeout_s(node))

    def entry(self, node: Node, asked: int) -> Entry:
        """The reply with a name that was asked for at `asked`; counts a look-up."""
        nodes = self.nodes
        ino = node.ino
        if ino == nodes.root_ino:
            return self.attributes_entry(node)
        lookups = nodes.lookups
        lookups[ino] = lookups.get(ino, 0) + 1
        entry_timeout_s = ALONE_TIMEOUT_S if asked >= nodes.alone_since else 0.0
        return Entry(ino, nodes.attributes(node), entry_timeout_s, self.timeout_s(node))

    def no_entry(self, asked: int) -> Entry:
        """The reply that a name does not exist."""
        return Entry(0, NO_INODE, ALONE_TIMEOUT_S if asked >= self.nodes.alone_since else 0.0, 0.0)

    # --- asking ---

    async def fetch(self, node: Node) -> None:
        """Ask the service for the node's attributes.  Raises StaleInode when it is gone."""
        asked, ino = self.nodes.now, node.ino
        try:
            reply = await self.metadata.ask(lambda session: GetAttr(session, ino))
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        self.nodes.learn(ino, reply.inode, asked)

    async def mutate(
        self, make: Callable[[int, int], Mutation[R]], *, inos: tuple[int, ...], entries: tuple[tuple[Node, bytes], ...]
    ) -> R:
        """Send a mutation of these inodes and entries.

        Raises: the service's refusal, with nothing changed; or a fault, after which nobody knows whether it was done:
        then neither this mount nor the kernel believes what it knew of them.
        """
        try:
            return await self.metadata.mutate(make)
        except Refusal:
            raise
        except BaseException:
            nodes = self.nodes
            for ino in inos:
                nodes.doubt(ino)
                self.notifier.invalidate_attributes(nodes.nodeid_of(ino))
            for directory, _ in entries:
                nodes.entries_changed(directory)
                nodes.forget_names(directory)
                nodes.doubt(directory.ino)
                self.forget_pages(directory.ino)  # The kernel may keep its listing.
            self.notifier.invalidate_entries([(nodes.nodeid_of(directory.ino), name) for directory, name in entries])
            raise

    # --- held inodes ---

    def maybe_release(self, node_ino: int) -> None:
        """Tell the service to let go of an inode, if it is held and neither a handle nor the kernel has it any more."""
        if node_ino not in self.held or node_ino in self.nodes.lookups:
            return
        node = self.nodes.find(node_ino)
        if node is not None and node.is_used:
            return
        if node is not None:
            self.nodes.drop(node_ino)
        self.held.discard(node_ino)
        self._releasable.append(node_ino)
        self._release_wanted.set()

    async def wait_releasable(self, count_max: int) -> tuple[int, ...]:
        """The next inodes to release, at most `count_max`; waits until there are some."""
        while not self._releasable:
            self._release_wanted = trio.Event()
            await self._release_wanted.wait()
        return self.releasable_nowait(count_max)

    def releasable_nowait(self, count_max: int) -> tuple[int, ...]:
        """The next inodes to release; may be none."""
        batch = tuple(self._releasable[:count_max])
        del self._releasable[: len(batch)]
        return batch

    def return_releasable(self, inos: tuple[int, ...]) -> None:
        """They could not be released yet."""
        self._releasable[:0] = inos
