"""The writing side of one file: from a write's bytes in memory to blocks that are durable and a layout that names them.

Tasks: writers add bytes, in no time; one task per upload sends a block (in the mount's nursery, so that it outlives
the caller that sealed it); whoever flushes seals what is dirty, waits for the uploads, and commits.

Shared state: `dirty` and `queue` are changed only between awaits, and together.  `lock` is held over everything that
changes the file at the inode service: commits, inline writes, truncation.  So these reach the service one after the
other, in the order in which they were decided.

Awaits that may not move:
- between sealing dirty pieces and putting their uploads into the queue there is none: a flush that came in between
  would take itself for done;
- a commit's extents are made from the queue after the lock was taken and directly before they are sent, and the lock is
  held until the reply has been entered: a truncation in between would be undone by extents made before it;
- truncation cuts the dirty bytes when the reply is here, not before: if the service refuses, nothing was lost;
- pieces leave `dirty` in the same step that brings their extents into the layout: a reader sees either, never neither.

After a session was lost (decision 0014) what is uncommitted was written under terms that are over.  `base` is the
content version it was based on: until all of it is committed, every commit says that version, and the service refuses
it if anybody has changed the file since.  Then the bytes are lost, which `on_lost` is told.  New writes wait for that.
A request that was sent in the old session and is sent again in the new one is made anew, and finds `base` set, since
the mount is told of the loss before there is a new session.

Invariant F11: when `settle` returns, every byte that was written before it was called is committed, or was replaced or
cut off by a later call, or was told lost with its session.
Invariant F12: a commit is sent only when every block it names is durable (BlockClient.put has returned).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import trio

from blockstore.protocol import BlockId
from fsd.core.dirty_map import PIECE_OVERHEAD, DirtyMap, Piece
from fsd.core.upload_queue import Commit, SliceAllocator, Upload, UploadQueue, UploadState
from fsd.data_services import UPLOAD_SMALL, DataServices
from fsd.file_layout import FileLayout
from metadata.core.schema import INLINE_SIZE_MAX, Extent, Inode
from metadata.protocol import (
    Caller,
    CommitExtents,
    DegradedBlock,
    GetAttr,
    GetLayout,
    InodeReply,
    SetAttr,
    SetAttrMask,
    WriteInline,
)
from wire.errors import (
    ContentChanged,
    DeadlineExceeded,
    InvalidArgument,
    MovedOutOfLine,
    NoSpace,
    NoSuchEntry,
    Refusal,
    SessionExpired,
    StaleInode,
    StoreError,
    WritesLost,
)
from wire.log import get_logger

WRITE_BACK_AGE_S = 5.0
"""Bytes older than this leave without being asked to: what a crash of the mount may cost who never calls fsync."""
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0
"""Pause after a failed flush in the background; doubles from the first to the last."""
MOVES_MAX = 3
"""How often one commit copes with a file that another mount has made inline again, before it gives up."""
WRITE_WAIT_MAX_S = 60.0
"""How long a write waits for memory: the services' own deadlines are 30 s; then the program is told."""

log = get_logger("fsd.flush")


class _Flush:
    """A flush that waits for all uploads up to a number."""

    __slots__ = ("error", "through")

    def __init__(self, through: int) -> None:
        self.through = through
        self.error: StoreError | None = None


class WriteBack:
    """Uncommitted bytes of one file, and their way out."""

    def __init__(self, services: DataServices, layout: FileLayout, on_lost: Callable[[WritesLost], None]) -> None:
        """`on_lost`: told when bytes will never be committed, as their session ended."""
        self._services = services
        self._layout = layout
        self._on_lost = on_lost
        self.unverified = False  # The session was lost: is the file still there, and as it was?
        self.base: int | None = None  # The content version that uncommitted bytes of a lost session were based on.
        self._inline_unsure = False  # The last WriteInline may have been done.
        self.dirty = DirtyMap()
        self.queue = UploadQueue()
        self.failure: StoreError | None = None  # Of the last attempt; None after a good one.
        self.failing_since = math.inf  # trio's clock.
        self.mtime_ns = 0
        self.keep_privileges = True  # No write since the last commit that takes suid and sgid away.
        self._slices = SliceAllocator()
        self.lock = trio.Lock()
        self._progress = trio.lowlevel.ParkingLot()
        self._flushes: list[_Flush] = []
        self._accounted = 0  # Bytes of the budget that are this file's.
        self._inline_refused = False
        self._dirty_since = math.inf
        self._retry_at = 0.0
        self._retry_pause_s = RETRY_FIRST_S
        self._settling = 0

    # --- writing -------------------------------------------------------------------------------------------------

    async def reserve(self, size: int) -> None:
        """Take memory for a write of `size` bytes.  Raises: the failure that keeps memory from being freed."""
        if not self.reserve_nowait(size):  # A cancel scope costs more than all else in a write.
            size += PIECE_OVERHEAD
            await self._wait_for_memory(size)
            self._accounted += size

    def reserve_nowait(self, size: int) -> bool:
        """As `reserve`, if memory is free and nobody waits for some; False: nothing was taken."""
        size += PIECE_OVERHEAD
        if not self._services.budget.acquire_dirty_nowait(size):
            return False
        self._accounted += size
        return True

    async def _wait_for_memory(self, size: int) -> None:
        if self.failure is not None:
            await self.settle()  # The disk may have space again; if not, the program is told now and not later.
        with trio.move_on_after(WRITE_WAIT_MAX_S) as scope:
            await self._services.budget.acquire_dirty(size, self)
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"no memory for {size} bytes became free within {WRITE_WAIT_MAX_S} s")

    def unreserve(self) -> None:
        """Give back what was reserved and not used."""
        self._account()

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, keep_privileges: bool) -> None:
        """Put reserved bytes into the file, and let full blocks leave."""
        if not self.dirty:
            self._dirty_since = trio.current_time()
            self.keep_privileges = True
            self._services.on_dirty()
        self.dirty.write(offset, data)
        self.mtime_ns = self._services.clock_ns()
        self.keep_privileges = self.keep_privileges and keep_privileges
        if self.failure is None:
            full = self.dirty.full_blocks(offset, offset + len(data))
            if full:
                self._seal(full)
        self._account()

    def _account(self) -> None:
        """Give back to the budget what is no longer charged."""
        excess = self._accounted - self.dirty.charged
        assert excess >= 0, "more memory in use than was reserved"
        if excess:
            self._accounted = self.dirty.charged
            self._services.budget.release_dirty(excess)

    def due_at(self) -> float:
        """When (trio's clock) the bytes are to leave without being asked to; infinity: not now."""
        if not self.dirty or self._settling:
            return math.inf
        if self.base is not None and self.failure is None:
            return 0.0  # Each moment may bring another mount's change.
        return self._retry_at if self.failure is not None else self._dirty_since + WRITE_BACK_AGE_S

    # --- uploads -------------------------------------------------------------------------------------------------

    def _seal(self, file_blocks: list[int] | None) -> None:
        """Dirty bytes, of all or of some file blocks, become uploads and set out."""
        nursery = self._services.nursery
        assert nursery is not None, "DataPath.run has not been started"
        for upload in self.dirty.seal(file_blocks, self._slices.take):
            self.queue.append(upload)
            nursery.start_soon(self._send, upload)

    async def _send(self, upload: Upload) -> None:
        """Make one block durable."""
        services = self._services
        try:
            async with services.small_uploads if upload.size <= UPLOAD_SMALL else services.large_uploads:
                if upload.state is UploadState.SENDING:
                    await services.name_slice(upload.slot.slice)
                    result = await services.blocks.put(
                        upload.block_id(), upload.payload, replicas=self._layout.inode.replicas
                    )
        except StoreError as error:
            self._upload_failed(upload, error)
            services.discard(upload.slot.slice.settled())
            return
        if upload.state is UploadState.DROPPED:
            services.discard(upload.slot.slice.settled())
        elif upload.state is UploadState.SENDING:
            self.queue.durable(upload, result.copies, degraded=result.degraded)
            services.bytes_put += upload.size
            services.put_count += 1
            if not upload.parts:
                services.discard(self.queue.drop_empty())
        self.dirty.sent(upload)
        self._account()
        self._progress.unpark_all()

    def _upload_failed(self, upload: Upload, error: StoreError) -> None:
        if upload.state is UploadState.SENDING:
            self.queue.fail(upload)
            self.dirty.take_back(upload)
            for flush in self._flushes:
                if upload.number <= flush.through:
                    flush.error = error
            self._failed(error)
        else:
            self.dirty.sent(upload)
        self._account()
        self._progress.unpark_all()

    def _failed(self, error: StoreError) -> None:
        """An attempt failed: what is dirty stays, is tried again later, and writers that need its memory are told."""
        if self.failure is None:
            self.failing_since = trio.current_time()
            self._retry_pause_s = RETRY_FIRST_S
        if type(self.failure) is not type(error):
            log.warning("flush_failed", ino=self._layout.ino, error=type(error).__name__, detail=error.detail)
        self.failure = error
        self._retry_at = trio.current_time() + self._retry_pause_s
        self._services.budget.refuse(self, error)
        self._services.on_dirty()

    # --- flushing ------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Make everything that was written before this call durable and part of the file.

        Raises: what kept it from that; the bytes are still here, and the next call tries again.
        """
        if not self.dirty:
            return
        self._settling += 1
        began = trio.current_time()
        try:
            if not await self._settle_inline():
                if self.dirty.dirty_bytes:
                    self._seal(None)
                self._slices.close()
                through = self.queue.last_number
                await self._wait_durable(through)
                async with self.lock:
                    await self._commit_through(through)
            if not self.dirty:
                self.base = None
            self.failure = None
            self.failing_since = math.inf
        except StoreError as error:
            if error is not self.failure:
                self._failed(error)
            raise
        finally:
            self._settling -= 1
            self._dirty_since = began
            if self.dirty:
                self._services.on_dirty()

    def retry_later(self) -> None:
        """The attempt in the background failed: the next one comes after a longer pause."""
        self._retry_pause_s = min(self._retry_pause_s * 2, RETRY_LAST_S)
        self._retry_at = trio.current_time() + self._retry_pause_s

    async def _wait_durable(self, through: int) -> None:
        flush = _Flush(through)
        self._flushes.append(flush)
        try:
            while flush.error is None and not self.queue.is_durable(through):
                await self._progress.park()
        finally:
            self._flushes.remove(flush)
        if flush.error is not None:
            raise flush.error

    async def _settle_inline(self) -> bool:
        """Write a small file into its inode; False if it is not one (any more)."""
        if not self._could_be_inline():
            return False
        async with self.lock:
            if not self.dirty:
                return True
            if not self._could_be_inline():
                return False
            layout = self._layout
            if layout.is_inline and layout.inline is None:
                await layout.load(0)
            pieces = self.dirty.freeze_small(INLINE_SIZE_MAX)
            if pieces is None:
                return False
            return await self._write_inline(pieces)

    def _could_be_inline(self) -> bool:
        if self._inline_refused or len(self.queue) or self.dirty.end > INLINE_SIZE_MAX:
            return False
        return self._layout.may_be_inline

    async def _write_inline(self, pieces: list[Piece]) -> bool:
        start, end = pieces[0].start, pieces[-1].end
        layout = self._layout
        data = bytearray((layout.inline or b"")[start:end].ljust(end - start, b"\0"))
        for piece in pieces:
            data[piece.start - start : piece.end - start] = piece.view(piece.start, piece.end)
        mtime_ns, keep_privileges = self._take_times()
        # Between the pieces stand bytes from here, which another mount may have replaced.
        has_gaps = any(before.end < after.start for before, after in pairwise(pieces))
        version = layout.inode.data_version if has_gaps else -1

        def request(session: int, sequence: int) -> WriteInline:
            expected = version if self.base is None else self.base
            return WriteInline(
                session, sequence, layout.ino, start, bytes(data), mtime_ns, keep_privileges, data_version=expected
            )

        try:
            inode = (await self._services.metadata.mutate(request)).inode
        except MovedOutOfLine:
            if self.base is not None:
                done = await self._inline_was_done(start, bytes(data))
                if done is None:
                    await self._judge(refused=True)
                    return not self.dirty
                inode = done
            else:
                self._inline_refused = True
                layout.forget()
                return False
        except (NoSuchEntry, StaleInode) as error:
            self._vanished(error)
            return True
        except StoreError as error:
            self._inline_unsure = error.maybe_applied or isinstance(error, SessionExpired)
            raise
        self._inline_unsure = False
        self._services.commit_count += 1
        self.dirty.drop(set(pieces))
        layout.applied(inode, lambda: layout.overlay_inline(start, bytes(data)))
        self._follow(inode)
        self._account()
        return True

    async def _inline_was_done(self, start: int, data: bytes) -> Inode | None:
        """After a lost session: whether an earlier attempt has written these bytes; the attributes since then.

        It is taken for ours if nothing else has changed since and the bytes are there.
        """
        if not self._inline_unsure:
            return None
        ino = self._layout.ino
        reply = await self._services.metadata.ask(lambda session: GetLayout(session, ino))
        assert self.base is not None
        is_next = reply.inode.data_version == self.base + 1
        return reply.inode if is_next and (reply.inline or b"")[start : start + len(data)] == data else None

    def _take_times(self) -> tuple[int, bool]:
        """The mtime to commit (0 would mean the service's clock), and whether suid and sgid stay."""
        return self.mtime_ns or 1, self.keep_privileges

    async def _commit_through(self, through: int) -> None:
        """Commit the uploads up to a number, which are durable.  The lock is held."""
        moves = 0
        while True:
            commit = self.queue.next_commit()
            if commit is None or commit.uploads[0].number > through:
                return
            try:
                if commit.extents and self._layout.is_inline:
                    await self.move_out_of_line()
                    commit = self.queue.next_commit()
                    assert commit is not None
                await self._commit(commit)
            except (MovedOutOfLine, ContentChanged):
                moves += 1
                if moves == MOVES_MAX:
                    raise
                self._layout.forget()
                if self.base is None:
                    await self._layout.reload()
                else:
                    await self._judge(refused=True)
            except (NoSuchEntry, StaleInode) as error:
                self._vanished(error)
                return

    async def _commit(self, commit: Commit) -> None:
        layout = self._layout
        reply: Inode | None = None
        repeated = self.queue.is_unsure()
        if commit.extents:
            commit.mark_named()  # Before it is sent: whatever becomes of the answer, these blocks are the service's.
            try:
                reply = (await self._send_commit(commit)).inode
            except InvalidArgument:
                if not repeated:
                    raise
                layout.forget()  # The first attempt had been done: its slices are named.
                ino = layout.ino
                inode = (await self._services.metadata.ask(lambda session: GetAttr(session, ino))).inode
                layout.saw(inode)
                self._follow(inode)
            except StoreError as error:
                if error.maybe_applied or isinstance(error, SessionExpired | NoSpace):  # Full: for a second copy.
                    self.queue.unsure(commit)
                elif isinstance(error, Refusal | ContentChanged) and not repeated:
                    commit.mark_refused()  # If these bytes are given up, their blocks are ours to delete.
                raise
        self._services.discard(self.queue.committed(commit))
        self.dirty.committed(set(commit.uploads))
        if reply is not None:
            layout.applied(reply, lambda: layout.overlay(commit.extents))
            self._follow(reply)
        self._account()

    async def _send_commit(self, commit: Commit) -> InodeReply:
        ino, inline_moved, version = self._layout.ino, self._layout.is_inline, self._layout.inode.data_version
        mtime_ns, keep_privileges = self._take_times()
        self._services.commit_count += 1

        def request(session: int, sequence: int) -> CommitExtents:
            expected = version if inline_moved else -1
            return CommitExtents(
                session,
                sequence,
                ino,
                extents=commit.extents,
                slice_sizes=commit.slice_sizes,
                size_min=commit.end,
                mtime_ns=mtime_ns,
                inline_moved=inline_moved,
                degraded=commit.degraded,
                keep_privileges=keep_privileges,
                data_version=expected if self.base is None else self.base,
            )

        return await self._services.metadata.mutate(request)

    async def move_out_of_line(self) -> None:
        """Give an inline file's bytes a block of their own, before others join them.  The lock is held."""
        layout, services = self._layout, self._services
        while layout.is_inline and layout.inline is None:
            await layout.load(0)
        data = layout.inline
        if not data:
            return
        inode = layout.inode
        slice_id = await services.metadata.allocate_slice()
        result = await services.blocks.put(BlockId(slice_id, 0), data, replicas=inode.replicas)
        degraded = (DegradedBlock(BlockId(slice_id, 0), result.copies),) if result.degraded else ()
        extents = (Extent(0, len(data), slice_id, 0),)
        reply = await services.metadata.mutate(
            lambda session, sequence: CommitExtents(
                session,
                sequence,
                layout.ino,
                extents=extents,
                slice_sizes=((slice_id, len(data)),),
                size_min=0,
                mtime_ns=inode.mtime_ns or 1,
                inline_moved=True,
                degraded=degraded,
                keep_privileges=True,
                data_version=inode.data_version,
            )
        )
        services.commit_count += 1
        layout.applied(reply.inode, lambda: layout.overlay(extents))
        self._follow(reply.inode)

    def _vanished(self, error: StoreError) -> None:
        """The inode is gone.

        Raises: `error`, unless the bytes were dropped while they were on their way, as the last close of an unlinked
        file does.  An unlinked file that is open is gone when its session was lost: that must be told.
        """
        unlinked, dropped = self._layout.inode.nlink == 0, not self.dirty
        if self.base is not None:
            self._lose("the file is gone")
            return
        self._drop_all()
        if not (unlinked and dropped):
            raise error

    # --- after a lost session ------------------------------------------------------------------------------------

    def session_lost(self) -> None:
        """Others may have changed the file since; nothing is asked for yet."""
        self.unverified = self._layout.kernel_was_told = True  # A layout may be on its way, if none is known.
        if self.dirty and self.base is None:
            self.base = self._layout.inode.data_version
        self._retry_at = 0.0
        self._services.on_dirty()

    async def verify(self) -> None:
        """Look, in the new session, whether the file is there and as it was; bytes that it is too late for are lost.

        Raises: StaleInode (it is gone), faults.
        """
        async with self.lock:
            if self.unverified:
                await self._judge()
        if self.unverified:
            raise StaleInode(f"inode {self._layout.ino} is gone since the mount lost its session")

    async def _judge(self, *, refused: bool = False) -> None:
        """Ask for the attributes, and decide by them.  The lock is held.

        A change that is seen may be that of a commit whose answer was lost, unless that, tried again, was `refused`.
        """
        ino, doubts = self._layout.ino, self._layout.doubts
        try:
            inode = (await self._services.metadata.ask(lambda session: GetAttr(session, ino))).inode
        except (NoSuchEntry, StaleInode):
            self.unverified = True
            self._lose("the file is gone")
            return
        self.unverified = False
        if self.base not in (None, inode.data_version) and (refused or not self._is_unsure):
            self._lose("others have changed the file")
        self._layout.saw(inode)
        if doubts == self._layout.doubts:
            self._layout.is_doubted = False

    def judge_by(self, inode: Inode) -> None:
        """Attributes came from the service: they may tell that it is too late for bytes of a lost session."""
        is_other = self.base is not None and inode.data_version > self.base
        if is_other and not self.lock.locked() and not self._is_unsure:  # Else it may be ours.
            self._lose("others have changed the file")

    @property
    def _is_unsure(self) -> bool:
        """Whether a commit may have been done whose answer was lost."""
        return self.queue.is_unsure() or self._inline_unsure

    def _follow(self, inode: Inode) -> None:
        """A change of ours was done: what is uncommitted is based on its result, unless others changed it as well."""
        if self.base is not None and inode.data_version == self.base + 1:
            self.base += 1

    def _lose(self, why: str) -> None:
        """What is uncommitted never will be; every open descriptor is told once."""
        size = self.dirty.total_bytes()
        self._drop_all()
        self.failure, self.failing_since = None, math.inf
        if size:
            ino, directory = self._layout.ino, self._layout.inode.parent
            log.error("writes_lost", ino=ino, directory=directory, bytes=size, why=f"the session was lost, and {why}")
            self._on_lost(WritesLost(f"{size} bytes of inode {ino}: the session was lost, and {why}"))

    async def abandon(self) -> None:
        """Forget every uncommitted byte, but first let a commit end that is under way: its reply needs the queue."""
        async with self.lock:
            self._drop_all()

    def _drop_all(self) -> None:
        for upload in self.queue.clear():
            if upload.is_sent:
                self._services.discard(upload.slot.slice.settled())
        self._slices.close()
        self.dirty.clear()
        self.base, self._inline_unsure = None, False
        self._account()
        self._progress.unpark_all()

    # --- truncation ----------------------------------------------------------------------------------------------

    async def truncate(self, size: int, caller: Caller) -> InodeReply:
        """Set the file's size, after all writes that have returned and before all that have not begun.

        Raises: what SetAttr raises; nothing was changed, unless the outcome is unknown (maybe_applied).
        """
        layout = self._layout
        if self.base is not None:
            await self.settle()
        async with self.lock:
            try:
                reply = await self._services.metadata.mutate(
                    lambda session, sequence: SetAttr(
                        session, sequence, layout.ino, mask=SetAttrMask.SIZE, size=size, caller=caller
                    )
                )
            except StoreError as error:
                if error.maybe_applied:
                    layout.forget()
                raise
            self.dirty.truncate(size)
            self.queue.truncate(size)
            self._services.discard(self.queue.drop_empty())
            layout.applied(reply.inode, lambda: layout.truncate(size))
            self.mtime_ns = max(self.mtime_ns, reply.inode.mtime_ns)
            if size == 0:
                self._inline_refused = False
            self._account()
            self._progress.unpark_all()
            return reply
