"""Changes of a file that carry no bytes of their own to the service: fallocate, copies that share blocks, and appends
whose place the service decides.

They stand in line with commits and truncation: each holds the file's lock (flush.py) from the request to the entering
of its reply.  What was written before is flushed first where the order can be seen; writes that come meanwhile are, as
they may be, before or after.

Awaits that may not move: as in flush.py; the layout is brought up to date in the step that takes the reply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from blockstore.protocol import BlockId
from fsd.data_services import UPLOAD_SMALL, DataServices
from fsd.file_layout import FileLayout
from fsd.flush import MOVES_MAX, WriteBack
from fsd.ports import PutResultLike
from metadata.core.schema import INLINE_SIZE_MAX, Extent, Inode
from metadata.protocol import (
    ChangeRange,
    CommitExtents,
    CopyRange,
    DegradedBlock,
    InodeReply,
    Mutation,
    RangeDone,
    RangeOperation,
    WriteInline,
)
from wire.errors import MovedOutOfLine, Refusal, StoreError

COPY_STEPS_MAX = 16
"""Requests of one copy_file_range, which may stop short: of a file written in sequence each does 64 GiB."""

R = TypeVar("R", RangeDone, InodeReply)


class RangeChanges:
    """Ranges and appends of one file."""

    def __init__(self, services: DataServices, layout: FileLayout, writes: WriteBack) -> None:
        self._services = services
        self._layout = layout
        self._writes = writes
        self.appends_under_way = 0

    # --- ranges ---

    async def change(
        self, operation: RangeOperation, offset: int, length: int, *, keep_size: bool, keep_privileges: bool
    ) -> Inode:
        """fallocate; returns the attributes after it.

        Raises: what a flush raises, with nothing changed; what ChangeRange raises: of a long list of extents some may
        be done.
        """
        if operation is not RangeOperation.ALLOCATE:  # That one changes nothing that was written.
            await self._writes.settle()
        at, end = offset, offset + length
        while True:
            reply = await self._change_step(operation, at, end - at, keep_size, keep_privileges)
            at += reply.done
            if at >= end:
                return reply.inode

    async def _change_step(
        self, operation: RangeOperation, offset: int, length: int, keep_size: bool, keep_privileges: bool
    ) -> RangeDone:
        layout = self._layout

        def changed(reply: RangeDone) -> None:
            if operation is RangeOperation.ALLOCATE:
                layout.grown()
            else:
                layout.punch(offset, offset + reply.done)

        return await self._mutate(
            lambda session, sequence: ChangeRange(
                session, sequence, layout.ino, operation, offset, length, keep_size, keep_privileges
            ),
            changed,
        )

    async def copy_from(
        self, source: RangeChanges, source_offset: int, offset: int, length: int, *, keep_privileges: bool
    ) -> tuple[int, Inode | None]:
        """copy_file_range from `source`, which may be this file; returns how many bytes, and the attributes after it.

        Raises: what a flush of either raises, or CopyRange: then nothing was copied.
        """
        await source._writes.settle()
        await self._writes.settle()
        done, inode = 0, None
        if source is self:  # Its end, which the copy may move, is where it is now.
            if self._layout.known_inode is None:
                await self._layout.load(0)
            length = min(length, self._layout.inode.size - source_offset)
        if length <= 0:
            return done, inode
        for _ in range(COPY_STEPS_MAX):
            try:
                reply = await self._copy_step(
                    source._layout.ino, source_offset + done, offset + done, length - done, keep_privileges
                )
            except StoreError:
                if done:  # The next call is told, if it is so still.
                    break
                raise
            inode = reply.inode
            done += reply.done
            if not reply.done or done >= length:
                break
        return done, inode

    async def _copy_step(
        self, source: int, source_offset: int, offset: int, length: int, keep_privileges: bool
    ) -> RangeDone:
        layout = self._layout
        return await self._mutate(
            lambda session, sequence: CopyRange(
                session, sequence, source, source_offset, layout.ino, offset, length, keep_privileges
            ),
            lambda _: layout.forget(),
        )

    # --- appends while sharing ---

    async def append(self, data: bytes | bytearray | memoryview, *, keep_privileges: bool) -> Inode:
        """Put `data`, at most one block, at the end of the file as the service knows it, durably and in one piece.

        Returns the attributes: the bytes end where the file does.
        Raises: what kept it from that; the bytes are not in the file, unless the outcome is unknown (maybe_applied).
        """
        self.appends_under_way += 1
        try:
            await self._writes.settle()  # Else bytes written here before, beyond the end at the service, would overlap.
            if self._layout.known_inode is None:
                await self._layout.load(0)
            inode = self._layout.inode
            if self._layout.may_be_inline and inode.size + len(data) <= INLINE_SIZE_MAX:
                try:
                    return await self._append_inline(bytes(data), keep_privileges)
                except MovedOutOfLine:  # Another mount has appended, too.
                    await self._reload()
            return await self._append_block(data, keep_privileges)
        finally:
            self.appends_under_way -= 1

    async def _append_inline(self, data: bytes, keep_privileges: bool) -> Inode:
        layout, mtime_ns = self._layout, self._services.clock_ns()
        reply = await self._mutate(
            lambda session, sequence: WriteInline(
                session, sequence, layout.ino, 0, data, mtime_ns, keep_privileges, append=True
            ),
            lambda _: layout.overlay_inline(layout.inode.size, data),
            moves_max=0,
        )
        return reply.inode

    async def _append_block(self, data: bytes | bytearray | memoryview, keep_privileges: bool) -> Inode:
        services, layout = self._services, self._layout
        size, mtime_ns = len(data), services.clock_ns()
        block = BlockId(await services.metadata.allocate_slice(), 0)
        async with services.small_uploads if size <= UPLOAD_SMALL else services.large_uploads:
            result = await services.blocks.put(block, data, replicas=layout.inode.replicas)
        services.bytes_put += size
        services.put_count += 1
        try:
            reply = await self._mutate(
                lambda session, sequence: CommitExtents(
                    session,
                    sequence,
                    layout.ino,
                    extents=(Extent(0, size, block.slice_id, 0),),
                    slice_sizes=((block.slice_id, size),),
                    size_min=size,
                    mtime_ns=mtime_ns,
                    degraded=_degraded(block, result),
                    keep_privileges=keep_privileges,
                    append=True,
                ),
                lambda _: layout.overlay((Extent(layout.inode.size, size, block.slice_id, 0),)),
            )
        except Refusal:
            services.discard([block])
            raise
        return reply.inode

    # --- both ---

    async def _mutate(
        self, make: Callable[[int, int], Mutation[R]], changed: Callable[[R], None], *, moves_max: int = MOVES_MAX
    ) -> R:
        """Send a mutation, after moving inline bytes into a block if that is what it needs.

        `changed` does to the layout here what the mutation did there; it is called if the layout is that from before.
        """
        layout, writes, moves = self._layout, self._writes, 0
        async with writes.lock:
            while True:
                try:
                    reply = await self._services.metadata.mutate(make)
                    break
                except MovedOutOfLine:
                    if moves == moves_max:
                        raise
                    moves += 1
                    await self._move_out()
                except Refusal:
                    raise
                except BaseException:  # Nobody knows whether it was done.
                    layout.forget()
                    raise
            self._services.commit_count += 1
            writes.mtime_ns = max(writes.mtime_ns, reply.inode.mtime_ns)
            layout.applied(reply.inode, lambda: changed(reply))
            return reply

    async def _move_out(self) -> None:
        """The file is inline and must not be; another mount may come in between, and is seen at the next attempt."""
        await self._reload()
        try:
            await self._writes.move_out_of_line()
        except MovedOutOfLine:
            await self._reload()

    async def _reload(self) -> None:
        self._layout.forget()
        await self._layout.reload()


def _degraded(block: BlockId, result: PutResultLike) -> tuple[DegradedBlock, ...]:
    return (DegradedBlock(block, result.copies),) if result.degraded else ()
