"""fallocate, lseek, copy_file_range, syncfs: operations on ranges of open files, and on all of them.

What the bytes are is the data path's (range_changes.py, seek.py); here the attributes that follow are learnt.
"""

from __future__ import annotations

import enum
import os

from fsd.files import Files
from fsd.frontend.ports import Answer
from fsd.mount_state import MountState
from fsd.nodes import Node
from metadata.core.schema import Inode
from metadata.protocol import RangeOperation
from wire.errors import InvalidArgument, NoSuchEntry, NotSupported, StaleInode

COPY_SIZE_MAX = 0xFFFF_F000
"""Bytes of one copy_file_range: its old reply has 32 bits for them, and the kernel asks for whole pages."""


class AllocateFlags(enum.IntFlag):
    """Mode bits of fallocate(2) that a FUSE server may be sent."""

    KEEP_SIZE = 1
    PUNCH_HOLE = 2
    ZERO_RANGE = 16


_OPERATIONS = {
    0: RangeOperation.ALLOCATE,
    AllocateFlags.PUNCH_HOLE: RangeOperation.PUNCH,
    AllocateFlags.ZERO_RANGE: RangeOperation.ZERO,
}


class Ranges:
    """Operations on ranges."""

    def __init__(self, state: MountState, files: Files) -> None:
        self._state = state
        self._files = files

    def fallocate(self, fh: int, mode: int, offset: int, length: int, *, kill_privileges: bool = False) -> Answer[None]:
        """See ports.Operations."""
        operation = _OPERATIONS.get(mode & ~AllocateFlags.KEEP_SIZE)
        if operation is None:
            raise NotSupported(f"fallocate with mode {mode:#x}")
        if offset < 0 or length <= 0:
            raise InvalidArgument(f"fallocate of {length} bytes at {offset}")
        handle = self._state.handles.file(fh)
        handle.refuse_without_locks()
        return self._fallocate(
            handle.node,
            operation,
            offset,
            length,
            keep_size=bool(mode & AllocateFlags.KEEP_SIZE),
            keep_privileges=not kill_privileges,
        )

    async def _fallocate(
        self, node: Node, operation: RangeOperation, offset: int, length: int, *, keep_size: bool, keep_privileges: bool
    ) -> None:
        file, asked = await self._files.attach(node), self._state.nodes.now
        try:
            inode = await file.change_range(
                operation, offset, length, keep_size=keep_size, keep_privileges=keep_privileges
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        except BaseException:
            self._state.nodes.doubt(node.ino)  # Of a long range some may be done.
            raise
        self._learn(node, inode, asked, privileges_went=not keep_privileges)

    def seek(self, fh: int, offset: int, whence: int) -> Answer[int]:
        """See ports.Operations."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise InvalidArgument(f"lseek with whence {whence}")
        return self._seek(self._state.handles.file(fh).node, offset, whence)

    async def _seek(self, node: Node, offset: int, whence: int) -> int:
        file = await self._files.attach(node)
        if not self._state.nodes.is_fresh(node):
            await self._state.fetch(node)  # A layout that another mount has changed is forgotten by this.
        return await (file.seek_data(offset) if whence == os.SEEK_DATA else file.seek_hole(offset))

    def copy_range(
        self,
        fh_in: int,
        offset_in: int,
        fh_out: int,
        offset_out: int,
        length: int,
        *,
        kill_privileges: bool = False,
    ) -> Answer[int]:
        """See ports.Operations."""
        source, target = self._state.handles.file(fh_in), self._state.handles.file(fh_out)
        for handle in (source, target):
            handle.refuse_without_locks()
        return self._copy_range(
            source.node,
            offset_in,
            target.node,
            offset_out,
            min(length, COPY_SIZE_MAX),
            kill_privileges,
        )

    async def _copy_range(
        self, source: Node, source_offset: int, target: Node, offset: int, length: int, kill_privileges: bool
    ) -> int:
        from_, to = await self._files.attach(source), await self._files.attach(target)
        asked = self._state.nodes.now
        try:
            done, inode = await to.copy_range(from_, source_offset, offset, length, keep_privileges=not kill_privileges)
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        if inode is not None:
            self._learn(target, inode, asked, privileges_went=kill_privileges)
        return done

    def _learn(self, node: Node, inode: Inode, asked: int, *, privileges_went: bool) -> None:
        nodes = self._state.nodes
        before = node.inode
        nodes.learn(node.ino, inode, asked)
        if privileges_went and before is not None and before.mode != inode.mode:
            self._state.notifier.invalidate_attributes_now(nodes.nodeid_of(node.ino))

    def sync(self) -> Answer[None]:
        """See ports.Operations."""
        return self._state.data.flush_all()
