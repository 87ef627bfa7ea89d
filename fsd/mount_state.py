"""What the parts of the file-system object share: the services, the nodes, the handles, and how replies are stamped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from fsd.access_times import AccessTimes
from fsd.core.access_times import AccessTimeRule
from fsd.file_data import DataPath
from fsd.frontend.ports import Entry, KernelNotifier
from fsd.handles import HandleTable
from fsd.nodes import NEVER, Node, NodeTable
from fsd.ports import MetadataPort, R
from metadata.core.schema import Inode
from metadata.protocol import GetAttr, Mutation
from wire.errors import NoSuchEntry, Refusal, StaleInode
from wire.log import get_logger
from wire.message import Request

CONTENDED_S = 10.0
"""How long the kernel is not to keep names of a directory in which a recall met a change of ours: dropping a name takes
the directory's lock, which that change holds while it waits for others to obey recalls of their own."""
KEPT_MAX = 20_000
"""Files that were read and closed and are still taken for open at the service, so that the next open needs no round
trip: data sets of so many files are read again without one; 100 bytes each here and there."""
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

    @property
    def recalls(self) -> bool:
        """The service recalls what it has told: it may be believed while sharing."""
        ...

    def lease_left_s(self) -> float:
        """For how long nobody changes what was told to this session; 0 or less: others may have."""
        ...


class MountState:
    """Shared by names, attributes, directories, files and xattrs.  Used from the trio thread only."""

    def __init__(
        self, *, metadata: Metadata, data: DataPath, notifier: KernelNotifier, access_times: AccessTimeRule
    ) -> None:
        self.metadata = metadata
        self.data = data
        self.notifier = notifier
        self.nodes = NodeTable(metadata.root_ino, notifier.invalidate_entries, self.forget_pages)
        data.on_foreign_change(self.forget_pages)
        self.access_times = AccessTimes(
            access_times, nodes=self.nodes, metadata=metadata, notifier=notifier, clock_ns=data.clock_ns
        )
        self.handles = HandleTable()
        self.held: set[int] = set()  # Inodes without a name that the service keeps for this session.
        self.registered: set[int] = set()  # Inodes that the service takes to be open here; closes are told of these.
        self._releasable: dict[int, None] = {}
        self._closed: dict[int, None] = {}  # As `_releasable`, but there is time: it may be opened again.
        self._kept: dict[int, None] = {}  # Closed after reading: the service takes them for open until one is recalled.
        self._release_wanted = trio.Event()
        self._close_wanted = trio.Event()
        self._releasing: set[int] = set()  # On their way to the service,
        self._released = trio.Event()  # which has answered.
        self._creates: set[trio.Event] = set()  # Creates under way.
        self.changing: dict[int, int] = {}  # Directories: changes of their entries that are under way.
        self.dropping = 0  # While caches are being dropped because sharing begins, no lease is believed.
        self.kernel_timeout_s = 0.0  # How long the kernel may keep what is believed: what is left of the lease.
        data.sharing = not metadata.alone
        if metadata.alone:
            self.nodes.begin_alone()
        self.look_at_lease()
        self.nodes.learn(metadata.root_ino, metadata.root, self.nodes.now)

    # --- the lease ---

    def look_at_lease(self) -> None:
        """Believe nothing if the lease is over, and let the kernel keep nothing for longer than it runs.

        To be called whenever this process may have slept: with each wake-up of what reads requests, and before an
        answer that took time is told.
        """
        left_s = self.metadata.lease_left_s()
        nodes = self.nodes
        if left_s > 0:
            self.kernel_timeout_s = float(int(left_s))  # Whole seconds: cheaper to tell.
            if nodes.believed_since == NEVER:
                nodes.lease_runs(True)
                if nodes.awaits_leases and nodes.is_sharing and self.metadata.recalls and not self.dropping:
                    self._begin_leases()
        else:
            self.kernel_timeout_s = 0.0
            nodes.lease_runs(False)
            self.data.doubt_layouts()

    def must_write_through(self, node: Node) -> bool:
        """Whether bytes must be committed before a write of them returns: others read the file, or may at any time."""
        return self.data.sharing and self.metadata.recalls and not node.may_write_behind

    def _begin_leases(self) -> None:
        """What the kernel has read until now is covered by nothing."""
        self.nodes.begin_leases()
        for node in self.nodes:
            if node.pages_are_doubtful:
                node.pages_are_doubtful = False
                self.forget_pages(node.ino)

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        """Ask the service; then the lease is looked at, as time has passed."""
        reply = await self.metadata.ask(make)
        self.look_at_lease()
        return reply

    def forget_pages(self, ino: int) -> None:
        """The content has changed elsewhere: the kernel, which does not look at mtimes, is told to drop its pages."""
        self.notifier.invalidate_pages(self.nodes.nodeid_of(ino), 0, 0)

    # --- replies ---

    def timeout_s(self, node: Node) -> float:
        """How long the kernel may keep the node's attributes.

        Not at all while there are unflushed writes: the flush gives the file another ctime, and nobody would tell.
        """
        if node.known_at < self.nodes.believed_since or (node.file is not None and node.file.unflushed):
            return 0.0
        return self.kernel_timeout_s

    def name_timeout_s(self, directory: Node) -> float:
        """How long the kernel may keep a name of this directory that is believed here."""
        if directory.contended_until and trio.current_time() < directory.contended_until:
            return 0.0
        return self.kernel_timeout_s

    def contend(self, directory: Node) -> None:
        """The kernel is not to keep names of this directory for a while."""
        directory.contended_until = trio.current_time() + CONTENDED_S

    def attributes_entry(self, node: Node) -> Entry:
        """The reply to getattr and setattr."""
        nodes = self.nodes
        return Entry(nodes.nodeid_of(node.ino), nodes.attributes(node), 0.0, self.timeout_s(node))

    def entry(self, node: Node, name_timeout_s: float) -> Entry:
        """The reply with a name, which the kernel may keep for so long; counts a look-up."""
        nodes = self.nodes
        ino = node.ino
        if ino == nodes.root_ino:
            return self.attributes_entry(node)
        nodes.count_lookup(node)
        return Entry(ino, nodes.attributes(node), name_timeout_s, self.timeout_s(node))

    def named_entry(self, directory: Node, name: bytes, ino: int, asked: int) -> Entry:
        """Take note of a name of an inode that is known; the reply."""
        is_sure = self.nodes.learn_name(directory, name, ino, asked)
        return self.entry(self.nodes.obtain(ino), self.name_timeout_s(directory) if is_sure else 0.0)

    def no_entry(self, directory: Node, name: bytes, asked: int) -> Entry:
        """Take note that a name does not exist; the reply."""
        is_sure = self.nodes.learn_name(directory, name, 0, asked)
        return Entry(0, NO_INODE, self.name_timeout_s(directory) if is_sure else 0.0, 0.0)

    # --- asking ---

    async def fetch(self, node: Node) -> None:
        """Ask the service for the node's attributes.  Raises StaleInode when it is gone."""
        asked, ino = self.nodes.now, node.ino
        try:
            reply = await self.ask(lambda session: GetAttr(session, ino))
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
        nodes = self.nodes
        changing = self.changing
        for directory, _ in entries:
            changing[directory.ino] = changing.get(directory.ino, 0) + 1
        try:
            return await self.metadata.mutate(make)
        except Refusal:
            raise
        except BaseException:
            # First of all, while it is known which of them are directories.
            names = [nodes.kernel_name(directory, name) for directory, name in entries]
            for ino in inos:
                nodes.doubt(ino)
                self.notifier.invalidate_attributes(nodes.nodeid_of(ino))
            for directory, _ in entries:
                nodes.entries_changed(directory)
                nodes.forget_names(directory)
                nodes.doubt(directory.ino)
                self.forget_pages(directory.ino)  # The kernel may keep its listing.
            self.notifier.invalidate_entries(names)
            raise
        finally:
            for directory, _ in entries:
                changing[directory.ino] -= 1
                if not changing[directory.ino]:
                    del changing[directory.ino]
            self.look_at_lease()

    # --- what the service is told of open inodes ---

    def is_told_open(self, ino: int) -> bool:
        """Whether a request that is being made now has to say that it opens `ino`; the close will be told then."""
        if not self.nodes.is_sharing:
            return False
        self.registered.add(ino)
        return True

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Around a request whose inode will be open when it is answered."""
        over = trio.Event()
        self._creates.add(over)
        try:
            yield
        finally:
            self._creates.remove(over)
            over.set()

    async def open_inodes(self) -> list[int]:
        """Everything that is open or held here, for the service, which does not know; called while sharing.

        Waits for creates that may have been sent before it was so, and for closes that are on their way: told later,
        they would take away what is told here.
        """
        for over in list(self._creates):
            await over.wait()
        await self.wait_released()
        self.registered -= self._kept.keys()
        self._kept.clear()
        inos = {node.ino for node in self.nodes if node.is_used} | self.held
        self.registered |= inos
        return sorted(inos)

    async def wait_not_releasing(self, ino: int) -> None:
        """Before an open: a close of the same inode that is on its way must not take away what the open registers."""
        while ino in self._releasing:
            await self._released.wait()

    async def wait_released(self) -> None:
        """Until no close is on its way."""
        while self._releasing:
            await self._released.wait()

    def is_known_open(self, ino: int) -> bool:
        """Whether the service takes it to be open here, and nothing that says otherwise is on its way."""
        return ino in self.registered and ino not in self._releasing

    def recalled(self, ino: int) -> None:
        """Somebody changes it: if it is only taken for open here, that must not keep others from the write lease."""
        if ino in self._kept:
            del self._kept[ino]
            self.maybe_release(ino)

    def maybe_release(self, ino: int, *, may_keep: bool = False) -> None:
        """Tell the service to let go of an inode, if it keeps it for this mount and nobody here can use it any more.

        `may_keep`: it has only been read, and may be read again: then it is not told before something is recalled.
        What lost its name here may still be opened through /proc, until the kernel has forgotten it.  Of what another
        mount has removed the kernel would keep the name for as long as it likes, and nobody needs it any more.
        """
        held = self.held
        if ino not in held and ino not in self.registered:
            return
        node = self.nodes.find(ino)
        if node is not None and node.is_used:
            return
        if ino not in held:
            if may_keep and self.nodes.believed_since != NEVER and self.nodes.is_sharing:
                self._kept.pop(ino, None)
                self._kept[ino] = None
                if len(self._kept) <= KEPT_MAX:
                    return
                ino = next(iter(self._kept))
            self._kept.pop(ino, None)
            self._closed[ino] = None
            self._close_wanted.set()
            return
        if ino in self.nodes.lookups:
            return
        if node is not None:
            self.nodes.drop(ino)
        held.discard(ino)
        self._releasable[ino] = None
        self._release_wanted.set()

    def got_a_name(self, ino: int) -> None:
        """It was linked: if it had no name before, the service holds it no longer, but takes it for open here."""
        if ino in self.held:
            self.held.discard(ino)
            self.registered.add(ino)

    async def wait_closed(self, delay_s: float) -> None:
        """Wait for closes, and `delay_s` for more of them and for opens that make them void; then release them."""
        while not self._closed:
            self._close_wanted = trio.Event()
            await self._close_wanted.wait()
        await trio.sleep(delay_s)
        self.release_closed()

    def release_closed(self) -> None:
        """All that is closed can be told now."""
        self._releasable.update(self._closed)
        self._closed.clear()
        self._release_wanted.set()

    async def wait_releasable(self, count_max: int) -> tuple[int, ...]:
        """The next inodes to release, at most `count_max`; waits until there are some.  See `releasable_nowait`."""
        while True:
            await self.wait_released()
            if inos := self.releasable_nowait(count_max):
                return inos
            self._release_wanted = trio.Event()
            await self._release_wanted.wait()

    def releasable_nowait(self, count_max: int) -> tuple[int, ...]:
        """The next inodes to release; may be none.  Opens of them wait until `released` or `return_releasable`."""
        assert not self._releasing
        while self._releasable and len(self._releasing) < count_max:
            ino = next(iter(self._releasable))
            del self._releasable[ino]
            node = self.nodes.find(ino)
            if node is None or not node.is_used:
                self._releasing.add(ino)
                if node is not None:
                    node.may_write_behind = False
                    node.write_doubted_at = self.nodes.now = self.nodes.now + 1
        self.registered -= self._releasing
        return tuple(self._releasing)

    def released(self) -> None:
        """The service has let go of them."""
        self._releasing.clear()
        self._released.set()
        self._released = trio.Event()

    def return_releasable(self) -> None:
        """They could not be released yet."""
        self._releasable.update(dict.fromkeys(self._releasing))
        self.registered |= self._releasing
        self.released()

    def session_lost(self) -> None:
        """The service has let go of everything."""
        self.held.clear()
        self.registered.clear()
        self._closed.clear()
        self._kept.clear()
        self._releasable.clear()
