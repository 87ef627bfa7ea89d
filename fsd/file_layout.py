"""What the inode service says of one file: attributes, inline bytes, extents; and how far that is known here.

Tasks: readers and the writer's flush call `load`, which awaits the service.  Shared state: `inode`, `inline` and
`extents` describe one and the same data_version.  Whoever changes one of them changes all that belongs to it before
the next await.

Replies may overtake each other (the attributes of a GetAttr, a page of layout, the reply to our own commit).  The
versions in the inode put them in order: an older reply is ignored; a reply with a content version that our own change
does not explain means that another mount has changed the file, and the cached layout is dropped.

Invariant F10: what is known here at data_version v is what the service had at v.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from fsd.core.extent_map import INFINITY, ExtentMap
from fsd.data_services import DataServices
from metadata.core.schema import SLICE_SIZE_MAX, Extent, Inode, InodeFlags
from metadata.protocol import GetLayout, LayoutReply
from wire.errors import NoSuchEntry, StaleInode

INLINE = int(InodeFlags.INLINE)
"""As a plain number: `&` with an enum's member costs as much as the rest of a cached read."""
LOADS_MAX = 8
"""How often a page of layout is asked for again because the file had changed before it came."""


class FileLayout:
    """The committed state of one file."""

    def __init__(self, services: DataServices, ino: int) -> None:
        self._services = services
        self.ino = ino
        self.known_inode: Inode | None = None
        self.inline: bytes | None = None  # The first bytes of an INLINE file; None: not known, or not INLINE.
        self.extents = ExtentMap()
        self.foreign_changes = 0  # Contents seen that our own changes do not explain.
        # The kernel was told to drop all it has, and no attributes came since.  Whatever they show, it is not told once
        # more: a notification that overtakes the answer makes the kernel ignore the size in that.
        self.kernel_was_told = False
        self.is_doubted = False  # The file may have changed elsewhere: ask before anything is read.
        self.doubts = 0
        self._load_lock = trio.Lock()

    @property
    def inode(self) -> Inode:
        """The attributes as last heard."""
        assert self.known_inode is not None, "attributes are not known before the first load"
        return self.known_inode

    @property
    def must_load(self) -> bool:
        """Whether the service must be asked before anything is said of the file, even of its size."""
        return self.known_inode is None or self.is_doubted

    @property
    def is_inline(self) -> bool:
        """True if the bytes live with the inode."""
        return bool(self.inode.flags & INLINE)

    @property
    def may_be_inline(self) -> bool:
        """True if small bytes may be written into the inode: it is inline, or has no bytes yet."""
        return self.is_inline or self.inode.allocated == 0

    # --- learning ------------------------------------------------------------------------------------------------

    def saw(self, inode: Inode) -> bool:
        """Attributes came from the service; True if they are news."""
        known = self.known_inode
        if known is not None:
            if inode.version < known.version:
                return False
            if inode.data_version != known.data_version:
                self._changed_elsewhere()
        self.known_inode = inode
        self.kernel_was_told = False
        return True

    def learn(self, reply: LayoutReply, asked_from: int) -> None:
        """A page of layout came."""
        if self.saw(reply.inode):
            if reply.inode.flags & INLINE:
                self.inline = reply.inline or b""
            else:
                until = INFINITY if reply.complete_until >= reply.inode.size else reply.complete_until
                self.extents.learn(asked_from, until, reply.extents)
            self._count()

    def applied(self, inode: Inode, change: Callable[[], None]) -> None:
        """Our own mutation was done: `inode` came back, and `change` does to the layout here what it did there.

        `change` is called only if the layout here is that of the version before.
        """
        known = self.known_inode
        if known is None:
            self.known_inode = inode
            return
        if inode.data_version == known.data_version + 1:
            change()
        elif inode.data_version > known.data_version:
            self._changed_elsewhere()
        if inode.version >= known.version:
            self.known_inode = inode
        self._count()

    def overlay(self, extents: tuple[Extent, ...]) -> None:
        """These extents were committed; inline bytes, if there were any, are gone."""
        if self.is_inline:
            self.inline = None
            self.extents.clear()
            self.extents.truncate(0)
        self.extents.truncate(self.inode.size)  # Beyond the size before, only what is new.
        self.extents.overlay(extents)

    def overlay_inline(self, offset: int, data: bytes) -> None:
        """These bytes were written into the inode."""
        if self.is_inline and self.inline is None:
            return
        before = self.inline or b""
        self.inline = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]

    def grown(self) -> None:
        """The file may have become longer, by a hole."""
        self.extents.truncate(self.inode.size)

    def punch(self, start: int, end: int) -> None:
        """[start, end) reads as zeros now; the file may have become longer by that."""
        if self.inline is not None:
            zeros = bytes(max(min(end, len(self.inline)) - start, 0))
            self.inline = self.inline[:start] + zeros + self.inline[end:]
        self.grown()
        self.extents.punch(start, end)

    def truncate(self, size: int) -> None:
        """The file was cut, or made longer, to `size`."""
        if self.inline is not None:
            self.inline = self.inline[:size]
        self.extents.truncate(min(size, self.inode.size))

    def _changed_elsewhere(self) -> None:
        self.foreign_changes += 1
        self.forget()
        if not self.kernel_was_told:
            self._services.on_foreign_change(self.ino)

    def forget(self) -> None:
        """Drop what can be asked for again."""
        self.inline = None
        self.extents.clear()
        self._count()

    def doubt(self) -> None:
        """It may have changed elsewhere; answers to questions that have been asked do not count any more."""
        self.forget()
        self.is_doubted = True
        self.doubts += 1

    def _count(self) -> None:
        self._services.count_extents(self, len(self.extents))

    # --- asking --------------------------------------------------------------------------------------------------

    def first_unknown(self, start: int, end: int) -> int | None:
        """The lowest offset in [start, end) whose layout must be loaded; None: all is known."""
        inode = self.known_inode
        if inode is None or self.is_doubted:
            return start
        if inode.flags & INLINE:
            return start if self.inline is None and start < end else None
        return self.extents.first_unknown(start, min(end, inode.size))

    async def load(self, offset: int) -> None:
        """Bring the layout around `offset`.  Raises: StaleInode, and faults; what is known stays."""
        async with self._load_lock:
            start = offset - offset % SLICE_SIZE_MAX  # A page from a little before serves reads that go backwards.
            for _ in range(LOADS_MAX):
                if self.first_unknown(offset, offset + 1) is None:
                    return
                await self._ask_and_learn(start)
                start = offset

    async def _ask(self, start: int) -> LayoutReply:
        try:
            return await self._services.metadata.ask(lambda session: GetLayout(session, self.ino, start))
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error

    async def reload(self) -> None:
        """Bring the attributes and the beginning of the layout, whatever is known."""
        await self._ask_and_learn(0)

    async def _ask_and_learn(self, start: int) -> None:
        doubts = self.doubts
        reply = await self._ask(start)
        if doubts == self.doubts:
            self.is_doubted = False
            self.learn(reply, start)
        elif self.known_inode is None:
            self.known_inode = reply.inode
