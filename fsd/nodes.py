"""What this mount knows of inodes and names, and for how long it may believe it.

No I/O here, and no await: the parts of the file-system object call it between their awaits.

`NodeTable.now` counts moments: it is raised by whatever makes earlier knowledge doubtful.  Every fact is stamped with
the moment at which its *question* was asked, so that an answer which crossed a change is not believed.  Facts may be
told without asking again if they were asked for since the mount has been alone, or has shared under leases
(`asked >= believed_since`), and if nothing was recalled since then.  While the lease is over, that moment is NEVER.

Names that were recalled leave a *mark* in `names`, with its moment: answers to questions from before it do not count.

Invariant N1: a node that is open, or being opened or unlinked, is never evicted.
Invariant N2: every name that the kernel was told to keep is in `names` of its directory's node, or marked there as
told; when that goes, the kernel is told.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator

import msgspec
import trio

from fsd.core.error_log import ErrorCursor
from fsd.file_data import FileData
from fsd.frontend.ports import ROOT_NODEID, KernelName
from metadata.core.schema import Inode
from metadata.protocol import LayoutReply

NODE_COUNT_MAX = 50_000
"""Nodes with attributes that are kept; about 850 bytes each (measured), so 43 MB."""
NAME_COUNT_MAX = 200_000
"""Names that are kept, of all directories together; about 150 bytes each, so 30 MB."""
HINT_COUNT_MAX = 1024
"""Names remembered that are not believed: the kernel asks for a name just before it unlinks it."""
NEVER = 1 << 62
"""A moment that does not come."""
UNKNOWN = -1
"""In the place of a moment: not known, or not to be believed."""


class Node:
    """One inode.  `inode` is the newest attributes seen, asked for at `known_at`."""

    __slots__ = (
        "attached_cursor",
        "changed_at",
        "complete",
        "contended_until",
        "entries_changed_at",
        "entries_doubted_at",
        "file",
        "gone",
        "handle_count",
        "ino",
        "inode",
        "known_at",
        "layout",
        "lease_asked_s",
        "listing_is_doubtful",
        "locked_content",
        "may_have_pages",
        "may_write_behind",
        "names",
        "names_lost_at",
        "opening_count",
        "pages_are_doubtful",
        "pages_version",
        "recalled_s",
        "target",
        "unlinking_count",
        "unlinking_over",
        "write_doubted_at",
        "xattrs",
        "xattrs_at",
        "xattrs_complete",
    )

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.inode: Inode | None = None
        self.known_at = UNKNOWN
        self.changed_at = 0  # The last moment at which its attributes changed without an answer that shows them.
        # Of a directory: name -> ino; 0: there is none; below 0: a mark, of a name that is not known (_mark).
        self.names: dict[bytes, int] | None = None
        self.names_lost_at = 0  # The last moment at which a mark may have been lost.
        self.complete = False  # `names` has all of them.
        self.entries_changed_at = 0  # Of a directory: the last moment at which this mount changed its entries.
        self.entries_doubted_at = 0  # Of a directory: the last moment at which a name in it was recalled.
        self.listing_is_doubtful = False  # The kernel may have put an old listing into its pages.
        self.contended_until = 0.0  # Until then (trio's clock) the kernel is not to keep its names.
        self.xattrs: dict[bytes, bytes | None] = {}  # None: there is none of that name.
        self.xattrs_at = UNKNOWN
        self.xattrs_complete = False
        self.target: bytes | None = None  # Of a symlink; never changes.
        self.file: FileData | None = None  # While it is open and was read or written, or its bytes are on their way.
        self.attached_cursor: ErrorCursor | None = None  # What handles had been told when `file` came.
        self.layout: LayoutReply | None = None  # Of an open or create, for `file` when it comes.
        self.handle_count = 0
        self.opening_count = 0
        self.unlinking_count = 0
        self.unlinking_over: trio.Event | None = None
        self.gone = False  # Its last name went and nothing holds it; the kernel may still know it.
        # While sharing: of which content the kernel's pages were when a lock was got: `file` and its `foreign_changes`,
        # or without a `file` the data_version.
        self.locked_content: tuple[FileData | None, int] | None = None
        self.may_have_pages = True  # False: the kernel has surely no pages (of a directory: no listing) of it.
        self.pages_version: int | None = None  # The kernel's pages are good only if this is still the data_version.
        self.pages_are_doubtful = False  # The kernel may have pages that were read while nothing was believed.
        self.may_write_behind = False  # While sharing: the service has given this session the write lease.
        self.write_doubted_at = 0  # The last moment at which the write lease was recalled.
        self.recalled_s = -math.inf  # When anything of it was last recalled, and
        self.lease_asked_s = -math.inf  # when the write lease was last asked for (trio's clock).

    @property
    def is_used(self) -> bool:
        """Whether it is open here or about to be, so that it must be held when its last name goes."""
        return self.file is not None or self.handle_count > 0 or self.opening_count > 0

    @property
    def is_pinned(self) -> bool:
        """Whether the table must keep it (N1)."""
        return self.is_used or self.unlinking_count > 0 or self.gone or self.changed_at == NEVER


class NodeTable:
    """All nodes of a mount, and the kernel's look-up counts."""

    def __init__(
        self,
        root_ino: int,
        forget_names: Callable[[list[KernelName]], None],
        forget_pages: Callable[[int], None],
    ) -> None:
        """`forget_names` tells the kernel to drop names, `forget_pages` those pages that it has of an inode."""
        self.root_ino = root_ino
        self.now = 1
        self.is_sharing = True
        self.believed_since = NEVER
        self._since = NEVER  # What `believed_since` is while the lease runs.
        self._lease_runs = True
        self.lost_at = 0  # The last moment at which a node was evicted, and its changed_at with it.
        self.lookups: dict[int, int] = {}  # By ino; an absent key is 0.  The root is always known and not counted.
        self.accessed: dict[int, tuple[tuple[int, ...], int]] = {}  # Access times not told yet: access_times.py.
        self.name_count = 0
        self._nodes: dict[int, Node] = {}
        self._with_names: dict[int, Node] = {}
        self._hints: dict[tuple[int, bytes], int] = {}  # What the kernel was told of names that are not believed.
        self._forget_names = forget_names
        self._forget_pages = forget_pages

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    # --- numbers ---

    def ino_of(self, nodeid: int) -> int:
        """The service's number."""
        return self.root_ino if nodeid == ROOT_NODEID else nodeid

    def nodeid_of(self, ino: int) -> int:
        """The kernel's number."""
        return ROOT_NODEID if ino == self.root_ino else ino

    def kernel_nodeids(self) -> list[int]:
        """Every inode that the kernel knows, the root with them."""
        return [ROOT_NODEID, *map(self.nodeid_of, self.lookups)]

    # --- alone and sharing ---

    @property
    def awaits_leases(self) -> bool:
        """Whether it shares and believes nothing yet: see `begin_leases`."""
        return self._since == NEVER

    def begin_alone(self) -> None:
        """Nothing changes from now on but through this mount."""
        self.is_sharing = False
        self._begin_believing()

    def begin_leases(self) -> None:
        """Whatever the service tells from now on it recalls before it changes."""
        assert self.is_sharing
        self._begin_believing()

    def _begin_believing(self) -> None:
        self.now += 1
        self._since = self.now
        self._hints.clear()
        self.lease_runs(self._lease_runs)

    def lease_runs(self, runs: bool) -> None:
        """Whether the session's lease is running; if not, nothing is believed until it is known to have gone on."""
        self._lease_runs = runs
        self.believed_since = self._since if runs else NEVER

    def begin_sharing(self) -> None:
        """Nothing that was learnt before is believed, nor what is learnt from now on, until `begin_leases`."""
        self.now += 1
        self.is_sharing = True
        self.believed_since = self._since = NEVER
        for node in self._nodes.values():
            node.layout = None
            node.may_write_behind = False
            node.write_doubted_at = self.now
        for node in self._with_names.values():
            node.names = None
            node.complete = False
        self._with_names.clear()
        self.name_count = 0

    # --- nodes ---

    def find(self, ino: int) -> Node | None:
        """The node, if it is known."""
        return self._nodes.get(ino)

    def obtain(self, ino: int) -> Node:
        """The node, made if need be."""
        node = self._nodes.get(ino)
        if node is None:
            node = self._nodes[ino] = Node(ino)
            node.changed_at = node.names_lost_at = node.entries_doubted_at = node.write_doubted_at = self.lost_at
            if len(self._nodes) > NODE_COUNT_MAX:
                self._evict(node)
        return node

    def is_fresh(self, node: Node) -> bool:
        """Whether its attributes may be told without asking."""
        return node.known_at >= self.believed_since

    def learn(self, ino: int, inode: Inode, asked: int) -> Node:
        """Attributes came with the answer to a question of the moment `asked`; what is older than known is ignored."""
        node = self.obtain(ino)
        file = node.file
        known = node.inode if file is None else file.inode()
        if known is None or inode.version >= known.version:
            if file is None and known is not None and node.handle_count and inode.data_version != known.data_version:
                self._forget_pages(ino)  # Of an open file that is read from the kernel's pages alone.
            node.inode = inode
            node.known_at = asked if asked >= node.changed_at else UNKNOWN
            if file is not None:
                file.update_inode(inode, is_sure=node.known_at != UNKNOWN)
        return node

    def learn_or_doubt(self, ino: int, inode: Inode | None, asked: int) -> None:
        """As `learn`; without attributes, what is known becomes doubtful."""
        if inode is not None:
            self.learn(ino, inode, asked)
        else:
            self.doubt(ino)

    def doubt(self, ino: int) -> None:
        """It changed in a way that is not known: its attributes must be asked for."""
        node = self._next_moment(ino)
        if node is not None:
            if node.changed_at != NEVER:
                node.changed_at = self.now
            node.known_at = UNKNOWN

    def _next_moment(self, ino: int) -> Node | None:
        """Begin the moment of a change of `ino`; its node.  Without one, all nodes that come later start from it."""
        self.now += 1
        node = self._nodes.get(ino)
        if node is None:
            self.lost_at = self.now
        return node

    def recall(self, ino: int, *, now_s: float) -> Node | None:
        """Its attributes, extended ones too, may be changed elsewhere; nothing is believed of it until `recalled`."""
        self.doubt(ino)
        node = self._nodes.get(ino)
        if node is None and ino in self.lookups:
            node = self.obtain(ino)
        if node is not None:
            node.changed_at = NEVER
            node.xattrs = {}
            node.xattrs_at = UNKNOWN
            node.xattrs_complete = False
            node.recalled_s = now_s
        return node

    def recalled(self, ino: int) -> None:
        """The kernel has dropped it; what is asked for from now on counts again."""
        self.doubt(ino)
        node = self._nodes.get(ino)
        if node is not None:
            node.changed_at = self.now

    def recall_writing(self, ino: int) -> None:
        """What is written into it from now on must be committed before the write returns."""
        node = self._next_moment(ino)
        if node is not None:
            node.may_write_behind = False
            node.write_doubted_at = self.now

    def grant_writing(self, node: Node, asked: int) -> None:
        """The answer to a question of that moment gives the write lease."""
        node.may_write_behind = self.is_sharing and asked >= node.write_doubted_at

    def amend(self, ino: int, *, nlink: int, ctime_ns: int) -> None:
        """A name of it went: the link count and ctime are these."""
        self.now += 1
        node = self._nodes.get(ino)
        if node is None or node.inode is None:
            self.lost_at = self.now
            return
        if node.changed_at != NEVER:
            node.changed_at = self.now
        known = node.inode
        node.inode = msgspec.structs.replace(known, nlink=nlink, ctime_ns=max(ctime_ns, known.ctime_ns))
        if node.file is not None:
            node.file.lost_name(nlink=nlink, ctime_ns=ctime_ns)
        if node.layout is not None:  # Its version stays, so the file that is made of it could not tell.
            node.layout = msgspec.structs.replace(node.layout, inode=node.inode)

    def attributes(self, node: Node) -> Inode:
        """The newest attributes, with the effect of unflushed writes.  The node has some."""
        inode = node.inode if node.file is None else node.file.inode()
        assert inode is not None
        if self.accessed:
            accessed = self.accessed.get(node.ino)
            if accessed is not None and inode.atime_ns in accessed[0]:
                return msgspec.structs.replace(inode, atime_ns=accessed[1])
        return inode

    def set_atime(self, ino: int, from_ns: int, to_ns: int) -> None:
        """The service has a new access time for it, if it had the one from which that goes."""
        node = self._nodes.get(ino)
        if node is None:
            return
        if node.inode is not None and node.inode.atime_ns == from_ns:
            node.inode = msgspec.structs.replace(node.inode, atime_ns=to_ns)
        if node.file is not None:
            node.file.accessed(from_ns, to_ns)

    def count_lookup(self, node: Node) -> None:
        """The kernel is told of the inode; if it did not know it, it has no pages of it."""
        lookups, ino = self.lookups, node.ino
        count = lookups.get(ino, 0)
        if count == 0:
            node.may_have_pages = False
        lookups[ino] = count + 1

    def uncount(self, ino: int, count: int) -> bool:
        """The kernel gives back look-ups; True when it does not know the inode any more."""
        left = self.lookups.get(ino, 0) - count
        if left > 0:
            self.lookups[ino] = left
            return False
        self.lookups.pop(ino, None)
        return True

    def drop(self, ino: int) -> None:
        """The inode is no more, or the kernel has forgotten it; a node that is used or being recalled stays."""
        node = self._nodes.get(ino)
        if node is not None and not (node.is_used or node.unlinking_count or node.changed_at == NEVER):
            self._remove(node)

    # --- names ---

    def name(self, directory: Node, name: bytes) -> int | None:
        """The inode of that name if that is known for sure; 0: there is none; None: not known."""
        names = directory.names
        if names is None or self.believed_since == NEVER:
            return None
        found = names.get(name)
        if found is None:
            return 0 if directory.complete else None
        return found if found >= 0 else None

    def guess(self, directory: int, name: bytes) -> int:
        """The inode that the name was when the kernel was last told of it; 0: no idea."""
        node = self._nodes.get(directory)
        known = -1 if node is None or node.names is None else node.names.get(name, -1)
        return known if known >= 0 else self._hints.get((directory, name), 0)

    def is_told(self, directory: Node, name: bytes, ino: int) -> bool:
        """Whether the kernel may be told to keep this name as that inode."""
        names = directory.names
        return names is not None and self.believed_since != NEVER and names.get(name) == ino

    def learn_name(self, directory: Node, name: bytes, ino: int, asked: int) -> bool:
        """The name is (or was just made) that inode; 0: there is none.

        Whether that may be believed, and the kernel be told to keep it: not if the question crossed a recall.
        """
        if self.name_count >= NAME_COUNT_MAX:
            self._evict_names()
        names = directory.names
        if asked < self.believed_since or asked < directory.names_lost_at:
            if self._since != NEVER:  # A change of our own may have moved a name that the kernel keeps to this place.
                self._put_name(directory, name, _mark(self.now, is_told=True))
            self._hint(directory.ino, name, ino)
            return False
        known = 0 if names is None else names.get(name, 0)
        if known < 0 and asked < _marked_at(known):
            self._put_name(directory, name, known & ~1)  # As told, for the same reason.
            self._hint(directory.ino, name, ino)
            return False
        if known >= 0 and known != ino and asked < directory.entries_doubted_at and names is not None and name in names:
            # The mark of a recall may have been replaced by `known`, and this be from before it: nobody can tell.
            self._put_name(directory, name, _mark(self.now, is_told=True))
            self._hint(directory.ino, name, ino)
            return False
        self._put_name(directory, name, ino)
        return True

    def _put_name(self, directory: Node, name: bytes, value: int) -> None:
        names = directory.names
        if names is None:
            names = self._begin_names(directory)
        if name not in names:
            self.name_count += 1
        names[name] = value

    def learn_empty(self, directory: Node, asked: int) -> bool:
        """The directory had no entries when that was asked, or was just made; whether `names` can be all of them."""
        if asked < self.believed_since or asked < directory.names_lost_at:
            return False
        self._begin_names(directory)
        directory.complete = True
        return True

    def recall_name(self, ino: int, name: bytes) -> KernelName | None:
        """The name may be changed elsewhere from now on; what the kernel must forget, if it may know it (N2)."""
        directory = self._next_moment(ino)
        if directory is None:
            return None
        directory.entries_doubted_at = self.now
        names = directory.names
        if names is None:
            directory.names_lost_at = self.now
            return None
        if self.name_count >= NAME_COUNT_MAX:
            self.forget_names(directory)  # Marks and all; the kernel is told.
            return KernelName(self.nodeid_of(ino), name)
        known = names.get(name)
        is_told = known is not None and _is_told(known)
        told = KernelName(self.nodeid_of(ino), name) if is_told else None
        if known is not None and known > 0:
            self._hint(ino, name, known)  # It may be about to be removed.
        self._put_name(directory, name, _mark(self.now, is_told=is_told))
        return told

    def recalled_name(self, told: KernelName) -> None:
        """The kernel has forgotten it."""
        directory = self._nodes.get(self.ino_of(told.parent))
        if directory is not None and directory.names is not None:
            known = directory.names.get(told.name, 0)
            if known < 0:
                directory.names[told.name] = known | 1

    def recall_names(self, ino: int) -> list[KernelName]:
        """As `recall_name`, of all its names."""
        directory = self._next_moment(ino)
        if directory is None:
            return []
        directory.entries_doubted_at = self.now
        return self._lose_names(directory)

    def entries_changed(self, directory: Node) -> None:
        """This mount changed the directory's entries: listings read before are out of date."""
        self.now += 1
        directory.entries_changed_at = self.now

    def forget_names(self, directory: Node) -> None:
        """What is known of its entries is not sure any more."""
        told = self._lose_names(directory)
        if told:
            self._forget_names(told)

    def _lose_names(self, directory: Node) -> list[KernelName]:
        """Drop all its names and marks; those that the kernel may know."""
        self.now += 1
        directory.names_lost_at = self.now
        names = directory.names
        if names is None:
            return []
        told = [self.kernel_name(directory, name) for name, known in names.items() if _is_told(known)]
        self.name_count -= len(names)
        self._with_names.pop(directory.ino, None)
        directory.names = None
        directory.complete = False
        return told

    def told_names(self) -> list[KernelName]:
        """Every name that the kernel may have been told to keep."""
        return [
            self.kernel_name(node, name)
            for node in self._with_names.values()
            for name, known in (node.names or {}).items()
            if _is_told(known)
        ]

    def kernel_name(self, directory: Node, name: bytes) -> KernelName:
        """A name for the kernel to forget; what is not known to be a directory counts as none."""
        node = self._nodes.get((directory.names or {}).get(name, 0))
        is_directory = node is not None and node.inode is not None and stat.S_ISDIR(node.inode.mode)
        return KernelName(self.nodeid_of(directory.ino), name, is_directory)

    def _begin_names(self, directory: Node) -> dict[bytes, int]:
        if directory.names is not None:
            self.name_count -= len(directory.names)
        names: dict[bytes, int] = {}
        directory.names = names
        directory.complete = False
        self._with_names[directory.ino] = directory
        return names

    def _evict_names(self) -> None:
        """Drop the names of whole directories, oldest first, until a quarter of the room is free."""
        while self.name_count > NAME_COUNT_MAX * 3 // 4:
            self.forget_names(next(iter(self._with_names.values())))

    def _hint(self, directory: int, name: bytes, ino: int) -> None:
        hints = self._hints
        hints.pop((directory, name), None)
        if ino:
            hints[directory, name] = ino
            if len(hints) > HINT_COUNT_MAX:
                del hints[next(iter(hints))]

    # --- eviction ---

    def _evict(self, newest: Node) -> None:
        """Take away an eighth of the nodes, oldest first, skipping what is pinned."""
        victims: list[Node] = []
        for node in self._nodes.values():
            if node is not newest and not node.is_pinned and node.ino != self.root_ino:
                victims.append(node)
                if len(victims) == NODE_COUNT_MAX // 8:
                    break
        for node in victims:
            self._remove(node)

    def _remove(self, node: Node) -> None:
        self.forget_names(node)
        self.now += 1
        self.lost_at = self.now
        del self._nodes[node.ino]


def _mark(moment: int, *, is_told: bool) -> int:
    """In the place of a name's inode: it is not known, as it was recalled at `moment`; the kernel may keep it still."""
    return -(moment << 1) - 1 if not is_told else -(moment << 1) - 2


def _marked_at(mark: int) -> int:
    return (-mark - 1) >> 1


def _is_told(known: int) -> bool:
    return known >= 0 or not known & 1
