"""getattr, setattr, statfs."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from fsd.file_data import FileData
from fsd.frontend.ports import Answer, Changes, Entry
from fsd.mount_state import MountState, log
from fsd.nodes import Node
from metadata.core.schema import Inode, InodeFlags
from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL, Caller, SetAttr, SetAttrMask, SetFlags, StatFs, StatFsDone
from wire.errors import NoSuchEntry, StaleInode, StoreError

INODE_SIZE = 4096
"""Bytes that a file takes at least, for df(1)."""


def privilege_bits(inode: Inode, caller: Caller | None) -> int:
    """The bits of the mode that a write by `caller`, without CAP_FSETID, takes away.

    suid; sgid if the group may execute, or the caller is not of the group (Linux setattr_should_drop_sgid; groups
    other than the caller's first are not known here, so a member by such a one may lose an sgid that means nothing).
    None: a caller of whom nothing else is known loses an sgid only if the group may execute.
    """
    mode = inode.mode
    if not stat.S_ISREG(mode):
        return 0
    bits = mode & stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or (caller is not None and caller.gid != inode.gid)):
        bits |= stat.S_ISGID
    return bits


TIME_MIN_NS = -(1 << 63)
TIME_MAX_NS = (1 << 64) - 1
"""Nanoseconds around 1970: what MessagePack can say on the wire and in an inode."""


class Attributes:
    """Attributes of inodes."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._nodes = state.nodes

    def getattr(self, nodeid: int) -> Answer[Entry]:
        """See ports.Operations."""
        nodes = self._nodes
        node = nodes.find(nodes.ino_of(nodeid))
        if node is not None and (node.known_at >= nodes.believed_since or node.gone):
            return self._state.attributes_entry(node)
        return self._getattr(nodes.obtain(nodes.ino_of(nodeid)))

    async def _getattr(self, node: Node) -> Entry:
        await self._state.fetch(node)
        return self._state.attributes_entry(node)

    def setattr(self, nodeid: int, changes: Changes, caller: Caller) -> Answer[Entry]:
        """See ports.Operations."""
        return self._setattr(self._nodes.obtain(self._nodes.ino_of(nodeid)), changes, caller)

    async def _setattr(self, node: Node, changes: Changes, caller: Caller) -> Entry:
        """Unflushed writes go first when their commit would undo the change: it sets mtime and clears suid and sgid."""
        state = self._state
        mask = mask_of(changes)
        if not mask:
            await self.clear_privileges(node, caller)
            if not self._nodes.is_fresh(node):
                await state.fetch(node)
            return state.attributes_entry(node)
        file = node.file
        if file is not None and file.unflushed and must_follow_writes(changes):
            await file.settle()
        if changes.size is not None and changes.kill_privileges:
            await self.clear_privileges(node, caller)
        if changes.size is not None and (file is not None or state.data.holds(node.ino)):
            await self._truncate(node, file, changes.size, caller)
            mask &= ~SetAttrMask.SIZE
        if mask:
            await self._send(node, mask, changes, caller)
        return state.attributes_entry(node)

    async def _truncate(self, node: Node, file: FileData | None, size: int, caller: Caller) -> None:
        """In order with the bytes that wait to be flushed; without `file`, those that the last close left behind."""
        asked = self._nodes.now
        left_behind = self._state.data.file(node.ino, None) if file is None else None
        data = file or left_behind
        assert data is not None
        try:
            reply = await data.truncate(size, caller)
        finally:
            if left_behind is not None:
                await self._let_go(left_behind)
        self._nodes.learn(node.ino, reply.inode, asked)

    @staticmethod
    async def _let_go(left_behind: FileData) -> None:
        try:
            await left_behind.close()
        except StoreError as error:  # As before; whoever closed the file was told.
            log.info("flush_failed_again", ino=left_behind.ino, error=error)

    async def _send(self, node: Node, mask: int, changes: Changes, caller: Caller) -> None:
        ino = node.ino
        if mask & (SetAttrMask.ATIME | SetAttrMask.ATIME_NOW):
            await self._state.access_times.settle(ino)
        asked = self._nodes.now
        try:
            reply = await self._state.mutate(
                lambda session, sequence: SetAttr(
                    session,
                    sequence,
                    ino=ino,
                    mask=mask,
                    mode=changes.mode or 0,
                    uid=changes.uid or 0,
                    gid=changes.gid or 0,
                    size=changes.size or 0,
                    atime_ns=storable(changes.atime_ns or 0),
                    mtime_ns=storable(changes.mtime_ns or 0),
                    ctime_ns=storable(changes.ctime_ns or 0),
                    caller=caller,
                ),
                inos=(ino,),
                entries=(),
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        if mask & (SetAttrMask.MTIME | SetAttrMask.MTIME_NOW):
            file = self._nodes.obtain(ino).file
            if file is not None:
                file.update_inode(reply.inode, mtime_set=True)
        self._nodes.learn(ino, reply.inode, asked)

    # --- flags ---

    def get_flags(self, nodeid: int) -> Answer[int]:
        """See ports.Operations."""
        node = self._nodes.obtain(self._nodes.ino_of(nodeid))
        return file_flags(self._nodes.attributes(node)) if self._nodes.is_fresh(node) else self._get_flags(node)

    async def _get_flags(self, node: Node) -> int:
        await self._state.fetch(node)
        return file_flags(self._nodes.attributes(node))

    def set_flags(self, nodeid: int, flags: int, caller: Caller) -> Answer[None]:
        """See ports.Operations."""
        return self._set_flags(self._nodes.obtain(self._nodes.ino_of(nodeid)), flags, caller)

    async def _set_flags(self, node: Node, flags: int, caller: Caller) -> None:
        """What was written before goes first, as on ext4."""
        if node.file is not None and node.file.unflushed:
            await node.file.settle()
        asked, ino = self._nodes.now, node.ino
        try:
            reply = await self._state.mutate(
                lambda session, sequence: SetFlags(session, sequence, ino=ino, flags=flags, caller=caller),
                inos=(ino,),
                entries=(),
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        self._nodes.learn(ino, reply.inode, asked)
        self._state.notifier.invalidate_attributes_now(self._nodes.nodeid_of(ino))  # It has another ctime.

    async def clear_privileges(self, node: Node, caller: Caller | None) -> None:
        """Take suid and sgid from a file that is about to be written by somebody who may not keep them."""
        if not self._nodes.is_fresh(node):
            await self._state.fetch(node)
        inode = self._nodes.attributes(node)
        bits = privilege_bits(inode, caller)
        if bits:
            changes = Changes(mode=stat.S_IMODE(inode.mode) & ~bits)
            await self._send(node, SetAttrMask.MODE, changes, caller or Caller())

    def statfs(self) -> Answer[StatFsDone]:
        """See ports.Operations."""
        return self._statfs()

    async def _statfs(self) -> StatFsDone:
        root = self._nodes.root_ino
        told = await self._state.ask(lambda session: StatFs(session, root))
        if told.inodes_total >= 0:
            return told
        free = told.space_free // INODE_SIZE  # No quota of inodes: as many as could have a block each.
        return replace(told, inodes_total=told.inode_count + free, inodes_free=free)


def file_flags(inode: Inode) -> int:
    """The flags as FS_IOC_GETFLAGS has them."""
    flags = FS_IMMUTABLE_FL if inode.flags & InodeFlags.IMMUTABLE else 0
    return flags | FS_APPEND_FL if inode.flags & InodeFlags.APPEND_ONLY else flags


def storable(time_ns: int) -> int:
    """The nearest time that an inode can have, 1677 to 2554; Linux does the same for file systems with less room."""
    return min(max(time_ns, TIME_MIN_NS), TIME_MAX_NS)


def mask_of(changes: Changes) -> int:
    """The mask of SetAttr for these changes."""
    mask = 0
    for value, bit in (
        (changes.mode, SetAttrMask.MODE),
        (changes.uid, SetAttrMask.UID),
        (changes.gid, SetAttrMask.GID),
        (changes.size, SetAttrMask.SIZE),
        (changes.atime_ns, SetAttrMask.ATIME),
        (changes.mtime_ns, SetAttrMask.MTIME),
        (changes.ctime_ns, SetAttrMask.CTIME),
    ):
        if value is not None:
            mask |= int(bit)
    if changes.atime_now:
        mask |= int(SetAttrMask.ATIME_NOW)
    if changes.mtime_now and changes.size is None:  # A new size sets mtime anyway.
        mask |= int(SetAttrMask.MTIME_NOW)
    return mask


def must_follow_writes(changes: Changes) -> bool:
    """Whether a commit that came later, of bytes written before, would undo these changes."""
    sets_privileges = changes.mode is not None and changes.mode & (stat.S_ISUID | stat.S_ISGID)
    return bool(sets_privileges) or bool(mask_of(changes) & (SetAttrMask.MTIME | SetAttrMask.MTIME_NOW))
