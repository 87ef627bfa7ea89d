"""Names: lookup, making and removing entries, rename, links and symlinks.

The kernel holds the directory's lock around everything that changes its entries, so two changes of one name never run
at once from this mount.  What may run at once is an open of an inode that is being unlinked: `Node.unlinking_count`
makes opens wait (files.py), so that `closed_ino` stays true until the service has answered.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import trio

from fsd.frontend.ports import Answer, Entry
from fsd.mount_state import MountState
from fsd.nodes import Node, NodeTable
from metadata.core.schema import NAME_SIZE_MAX, SYMLINK_SIZE_MAX, Inode, InodeFlags
from metadata.protocol import (
    Caller,
    InodeReply,
    Link,
    Lookup,
    MakeDirectory,
    MakeNode,
    MakeSymlink,
    Mutation,
    ReadLink,
    Removed,
    RemoveDirectory,
    Rename,
    RenameDone,
    RenameFlags,
    Unlink,
)
from wire.errors import InvalidArgument, NameTooLong, NoSuchEntry, StaleInode


def check_name(name: bytes) -> None:
    """Refuse a name that is too long; the kernel lets names of up to 1024 bytes through."""
    if len(name) > NAME_SIZE_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes")


class Names:
    """Entries of directories."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._nodes = state.nodes

    # --- looking ---

    def lookup(self, parent: int, name: bytes) -> Answer[Entry]:
        """See ports.Operations."""
        nodes = self._nodes
        directory = nodes.find(nodes.ino_of(parent))
        if directory is not None:
            ino = nodes.name(directory, name)
            if ino == 0:
                check_name(name)
                return self._state.no_entry(directory, name, nodes.now)
            if ino is not None:
                node = nodes.find(ino)
                if node is not None and nodes.is_fresh(node):
                    return self._state.entry(node, self._state.name_timeout_s(directory))
        check_name(name)
        if name in (b".", b".."):
            return self._lookup_dots(nodes.ino_of(parent), name)
        return self._lookup(nodes.obtain(nodes.ino_of(parent)), name)

    async def _lookup(self, directory: Node, name: bytes) -> Entry:
        nodes = self._nodes
        asked, parent = nodes.now, directory.ino
        try:
            reply = await self._state.ask(lambda session: Lookup(session, parent, name))
        except NoSuchEntry:
            return self._state.no_entry(directory, name, asked)
        nodes.learn(reply.ino, reply.inode, asked)
        return self._state.named_entry(directory, name, reply.ino, asked)

    async def _lookup_dots(self, ino: int, name: bytes) -> Entry:
        """Answer for "." and "..", which only file handles (NFS export, open_by_handle_at) ask for."""
        nodes = self._nodes
        node = nodes.obtain(ino)
        if not nodes.is_fresh(node):
            await self._state.fetch(node)
        if name == b".." and ino != nodes.root_ino:
            node = nodes.obtain(nodes.attributes(node).parent)
            if not nodes.is_fresh(node):
                await self._state.fetch(node)
        return self._state.entry(node, 0.0)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """See ports.Operations."""
        nodes, held = self._nodes, self._state.held
        for nodeid, count in forgotten:
            ino = nodes.ino_of(nodeid)
            if nodes.uncount(ino, count):
                if ino in held:
                    self._state.maybe_release(ino)
                node = nodes.find(ino)
                if node is not None and node.gone:
                    nodes.drop(ino)

    def readlink(self, nodeid: int) -> Answer[bytes]:
        """See ports.Operations."""
        node = self._nodes.obtain(self._nodes.ino_of(nodeid))
        if node.target is None:
            return self._readlink(node)
        self._state.access_times.maybe_count(node)
        return node.target

    async def _readlink(self, node: Node) -> bytes:
        ino = node.ino
        try:
            node.target = (await self._state.ask(lambda session: ReadLink(session, ino))).target
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        self._state.access_times.maybe_count(node)
        return node.target

    # --- making ---

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Answer[Entry]:
        """See ports.Operations."""
        check_name(name)
        ino = self._nodes.ino_of(parent)
        return self._make(
            ino,
            name,
            lambda session, sequence: MakeNode(
                session, sequence, parent=ino, name=name, mode=mode, rdev=rdev, caller=caller
            ),
        )

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Answer[Entry]:
        """See ports.Operations."""
        check_name(name)
        ino = self._nodes.ino_of(parent)
        return self._make(
            ino,
            name,
            lambda session, sequence: MakeDirectory(session, sequence, parent=ino, name=name, mode=mode, caller=caller),
        )

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Answer[Entry]:
        """See ports.Operations."""
        check_name(name)
        if len(target) > SYMLINK_SIZE_MAX:
            raise NameTooLong(f"a symlink's target of {len(target)} bytes")
        ino = self._nodes.ino_of(parent)
        return self._make(
            ino,
            name,
            lambda session, sequence: MakeSymlink(
                session, sequence, parent=ino, name=name, target=target, caller=caller
            ),
        )

    async def _make(self, parent: int, name: bytes, request: Callable[[int, int], Mutation[InodeReply]]) -> Entry:
        nodes = self._nodes
        asked = nodes.now
        directory = nodes.obtain(parent)
        reply = await self._state.mutate(request, inos=(), entries=((directory, name),))
        node, name_timeout_s = note_made(self._state, directory, name, reply.ino, reply.inode, reply.parent, asked)
        if stat.S_ISDIR(reply.inode.mode) and not nodes.is_sharing:  # The service has told nothing of names in it.
            nodes.learn_empty(node, asked)
        return self._state.entry(node, name_timeout_s)

    def link(self, nodeid: int, parent: int, name: bytes, caller: Caller) -> Answer[Entry]:
        """See ports.Operations."""
        check_name(name)
        nodes = self._nodes
        return self._link(nodes.obtain(nodes.ino_of(nodeid)), nodes.obtain(nodes.ino_of(parent)), name, caller)

    async def _link(self, node: Node, directory: Node, name: bytes, caller: Caller) -> Entry:
        nodes = self._nodes
        asked, ino, parent = nodes.now, node.ino, directory.ino
        reply = await self._state.mutate(
            lambda session, sequence: Link(session, sequence, ino=ino, parent=parent, name=name, caller=caller),
            inos=(ino,),
            entries=((directory, name),),
        )
        nodes.entries_changed(directory)
        nodes.learn(ino, reply.inode, asked)
        self._state.got_a_name(ino)
        nodes.learn_or_doubt(parent, reply.parent, asked)
        return self._state.named_entry(directory, name, ino, asked)

    # --- removing ---

    def unlink(self, parent: int, name: bytes, caller: Caller) -> Answer[None]:
        """See ports.Operations."""
        check_name(name)
        return self._unlink(self._nodes.obtain(self._nodes.ino_of(parent)), name, caller)

    async def _unlink(self, directory: Node, name: bytes, caller: Caller) -> None:
        nodes = self._nodes
        asked, parent = nodes.now, directory.ino
        guess = nodes.guess(parent, name)
        with self._losing_a_name(guess) as closed_ino:
            reply = await self._state.mutate(
                lambda session, sequence: Unlink(
                    session, sequence, parent=parent, name=name, closed_ino=closed_ino, caller=caller
                ),
                inos=(guess,) if guess else (),
                entries=((directory, name),),
            )
            self._removed(directory, name, reply, asked)

    def rmdir(self, parent: int, name: bytes, caller: Caller) -> Answer[None]:
        """See ports.Operations."""
        check_name(name)
        return self._rmdir(self._nodes.obtain(self._nodes.ino_of(parent)), name, caller)

    async def _rmdir(self, directory: Node, name: bytes, caller: Caller) -> None:
        asked, parent = self._nodes.now, directory.ino
        expected = self._nodes.guess(parent, name)
        reply = await self._state.mutate(
            lambda session, sequence: RemoveDirectory(
                session, sequence, parent=parent, name=name, caller=caller, expected_ino=expected
            ),
            inos=(),
            entries=((directory, name),),
        )
        self._removed(directory, name, reply, asked)

    def _removed(self, directory: Node, name: bytes, reply: Removed, asked: int) -> None:
        nodes = self._nodes
        nodes.entries_changed(directory)
        nodes.learn_name(directory, name, 0, asked)
        nodes.learn_or_doubt(directory.ino, reply.parent, asked)
        self._lost_a_name(reply)

    @contextmanager
    def _losing_a_name(self, ino: int) -> Iterator[int]:
        """Around a request that may remove the last name of `ino` (0: not known): opens of it wait.

        Yields the number for `closed_ino`: `ino` if it is not open here, else 0.
        """
        if not ino:
            yield 0
            return
        node = self._nodes.obtain(ino)
        node.unlinking_count += 1
        if node.unlinking_over is None:
            node.unlinking_over = trio.Event()
        try:
            yield 0 if node.is_used else ino
        finally:
            node.unlinking_count -= 1
            if node.unlinking_count == 0:
                node.unlinking_over.set()
                node.unlinking_over = None
                if node.gone and ino not in self._nodes.lookups:
                    self._nodes.drop(ino)

    def _lost_a_name(self, removed: Removed) -> None:
        """An inode lost a name: keep its attributes right, and remember to release it if the service holds it."""
        ino = removed.ino
        if not ino:
            return
        state, nodes = self._state, self._nodes
        nodes.amend(ino, nlink=removed.nlink, ctime_ns=removed.ctime_ns)
        if removed.nlink:
            return
        if removed.held:
            state.held.add(ino)
            state.maybe_release(ino)
            return
        node = nodes.find(ino)
        if node is not None:
            node.gone = True
            if ino not in nodes.lookups:
                nodes.drop(ino)

    # --- renaming ---

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> Answer[None]:
        """See ports.Operations."""
        check_name(name)
        check_name(new_name)
        if flags & ~int(RenameFlags.NOREPLACE | RenameFlags.EXCHANGE | RenameFlags.WHITEOUT):
            raise InvalidArgument(f"rename flags {flags:#x}")
        nodes = self._nodes
        old, new = nodes.obtain(nodes.ino_of(parent)), nodes.obtain(nodes.ino_of(new_parent))
        return self._rename(old, name, new, new_name, flags, caller)

    async def _rename(self, old: Node, name: bytes, new: Node, new_name: bytes, flags: int, caller: Caller) -> None:
        nodes = self._nodes
        asked, parent, new_parent = nodes.now, old.ino, new.ino
        moved, target = nodes.guess(parent, name), nodes.guess(new_parent, new_name)
        replaced = 0 if flags & RenameFlags.EXCHANGE or target == moved else target
        with self._losing_a_name(replaced) as closed_ino:
            reply = await self._state.mutate(
                lambda session, sequence: Rename(
                    session,
                    sequence,
                    parent=parent,
                    name=name,
                    new_parent=new_parent,
                    new_name=new_name,
                    flags=flags,
                    closed_ino=closed_ino,
                    caller=caller,
                    expected_ino=moved,
                    expected_target=target,
                ),
                inos=tuple(ino for ino in (moved, target) if ino),
                entries=((old, name), (new, new_name)),
            )
            nodes.entries_changed(old)
            nodes.entries_changed(new)
            self._renamed(old, name, new, new_name, flags, reply, asked)
            nodes.learn_or_doubt(reply.ino, reply.inode, asked)
            nodes.learn_or_doubt(parent, reply.parent, asked)
            nodes.learn_or_doubt(new_parent, reply.new_parent, asked)
            self._lost_a_name(reply.removed)

    def _renamed(
        self, old: Node, name: bytes, new: Node, new_name: bytes, flags: int, reply: RenameDone, asked: int
    ) -> None:
        """Follow the names.  Two names of one inode both stay: then rename does nothing (POSIX rename())."""
        nodes = self._nodes
        if flags & RenameFlags.EXCHANGE:
            if not reply.exchanged_ino:
                nodes.forget_names(old)
                nodes.forget_names(new)
                return
            nodes.learn_or_doubt(reply.exchanged_ino, reply.exchanged, asked)
            nodes.learn_name(old, name, reply.exchanged_ino, asked)
            nodes.learn_name(new, new_name, reply.ino, asked)
        elif nodes.guess(new.ino, new_name) != reply.ino:
            if reply.whiteout is not None:
                note_inode(nodes, reply.whiteout_ino, reply.whiteout, asked)
            nodes.learn_name(old, name, reply.whiteout_ino, asked)
            nodes.learn_name(new, new_name, reply.ino, asked)


def note_made(
    state: MountState, directory: Node, name: bytes, ino: int, inode: Inode, parent: Inode | None, asked: int
) -> tuple[Node, float]:
    """Take note of an inode that was just made in `directory`; it, and how long the kernel may keep the name."""
    nodes = state.nodes
    nodes.entries_changed(directory)
    node = note_inode(nodes, ino, inode, asked)
    is_sure = nodes.learn_name(directory, name, ino, asked)
    nodes.learn_or_doubt(directory.ino, parent, asked)
    return node, state.name_timeout_s(directory) if is_sure else 0.0


def note_inode(nodes: NodeTable, ino: int, inode: Inode, asked: int) -> Node:
    """Take note of an inode that was just made: it has no extended attributes but inherited lists."""
    node = nodes.learn(ino, inode, asked)
    node.xattrs = {}
    node.xattrs_at = node.known_at  # UNKNOWN if something was recalled meanwhile.
    node.xattrs_complete = not inode.flags & (InodeFlags.ACCESS_ACL | InodeFlags.DEFAULT_ACL)
    return node
