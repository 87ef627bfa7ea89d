"""The bytes of open files: reads and writes as they come from the front end, between memory and the two services.

`DataPath` is one per mount; `FileData` is one per inode with open handles.  A front end

- opens: `data = path.file(ino, layout)` with the layout that open or create brought (or None), and, for each handle,
  `cursor = data.error_cursor()`;
- reads and writes: `await data.read(...)`, `write`, `append`;
- at flush (close(2)) and fsync: `await data.flush(cursor)`; with O_SYNC, after each write;
- before SetAttr of the mode, the owner or the times: `await data.settle()`, as a commit that came later would undo what
  it sets; and after each reply with attributes: `data.update_inode(inode)`;
- at release: `await data.close()`.

Tasks: readers and writers run in the front end's tasks and may be many at once on one file.  `DataPath.run` owns a task
that flushes what is old or what others need memory for, and a nursery for uploads, fetches and those flushes.
Shared state: see flush.py (writing), file_layout.py and read_path.py (reading).

Awaits that may not move: a read first loads the layout it needs, then *plans* in one step from where each byte comes (a
piece in memory, an upload's block, a committed block, nothing), and only then waits for blocks.  Blocks are immutable,
so what it gets is the file as it was at the moment of the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import trio

from blockstore.protocol import BLOCK_SIZE_MAX
from fsd.core.block_cache import Key
from fsd.core.dirty_map import Piece
from fsd.core.error_log import ErrorCursor, ErrorLog
from fsd.core.read_ahead import ReadAhead
from fsd.data_services import DataServices
from fsd.file_layout import FileLayout
from fsd.flush import WriteBack
from fsd.memory import keep_freed_buffers
from fsd.ports import BlockPort, MetadataPort
from fsd.quota_watch import QuotaWatch
from fsd.range_changes import RangeChanges
from fsd.read_path import Span, merge_spans
from fsd.seek import find_data, find_hole
from metadata.core.schema import FILE_SIZE_MAX, Extent, Inode
from metadata.protocol import Caller, InodeReply, LayoutReply, RangeOperation
from wire.errors import DataLost, DeadlineExceeded, FileTooLarge, NoSuchData, QuotaExceeded, StoreError, WritesLost
from wire.log import get_logger

WRITE_STEP = 1 << 20
"""A write larger than this takes its memory in steps; FUSE sends no more at once."""
READ_STEP = 4 << 20
"""A read larger than this is served in steps, so that it needs no more than a share of the budget."""
PLANS_MAX = 64
"""Pages of layout that one read loads, before it gives up: 64 of 4,096 extents are more than READ_STEP can have."""
REPLANS_MAX = 3
"""How often a read begins again because the blocks of its plan have been deleted meanwhile."""
SETTLES_MAX = 16
"""Flushes in the background at a time."""
GIVE_UP_S = 120.0
"""Bytes of a file that nobody has open any more are tried again for this long after the first failure."""
ZEROS = memoryview(bytes(1 << 20))

log = get_logger("fsd.data")


class _Part(NamedTuple):
    """Where `size` bytes of a read come from: `data`, or else bytes of a block from `start` on, or else a hole."""

    size: int
    data: memoryview | bytes | None
    key: Key | None = None
    start: int = 0
    limit: int = 0  # The block has bytes at least up to here.


class FileData:
    """The bytes of one inode, with all its open handles."""

    def __init__(self, services: DataServices, ino: int, forget: Callable[[FileData], None]) -> None:
        self.ino = ino
        self.references = 0
        self._services = services
        self._layout = FileLayout(services, ino)
        self._writes = WriteBack(services, self._layout, self._lost)
        self._quota = QuotaWatch(services, self._layout, self._writes)
        self._ranges = RangeChanges(services, self._layout, self._writes)
        self._errors = ErrorLog()
        self._own_cursor = self._errors.cursor()
        self._streams = ReadAhead()
        self._forget = forget

    # --- attributes ----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The file's size, with what is not yet committed."""
        return max(self._layout.inode.size, self._writes.dirty.end)

    @property
    def unflushed(self) -> bool:
        """True while the inode service does not know everything that was written."""
        return bool(self._writes.dirty)

    @property
    def foreign_changes(self) -> int:
        """How often the content was seen to have been changed by others; at least once for each of their changes."""
        return self._layout.foreign_changes

    def inode(self) -> Inode:
        """Attributes with the effect of unflushed writes: size, mtime, ctime, allocated (nearly)."""
        inode = self._layout.inode
        writes = self._writes
        if not writes.dirty:
            return inode
        return msgspec.structs.replace(
            inode,
            size=self.size,
            mtime_ns=writes.mtime_ns,
            ctime_ns=max(inode.ctime_ns, writes.mtime_ns),
            allocated=max(inode.allocated, min(inode.allocated + writes.dirty.total_bytes(), self.size)),
        )

    def update_inode(self, inode: Inode, *, mtime_set: bool = False, is_sure: bool = True) -> None:
        """Attributes came from the service; not `is_sure`: they may be old already.

        A content version that is not explained by this mount's own commits drops what is cached of the layout.
        `mtime_set`: the request has set the mtime, which then is not that of the unflushed writes any more.
        """
        before = self._layout.known_inode
        if before is not None and inode.version >= before.version:
            self._writes.judge_by(inode)
        if is_sure:
            self._layout.is_doubted = False
        elif before is None:
            self._layout.doubt()
        if not self._layout.saw(inode) or before is None:
            return
        if inode.data_version != before.data_version:
            self._streams.reset()
        elif mtime_set or inode.mtime_ns != before.mtime_ns:
            self._writes.mtime_ns = inode.mtime_ns
        if inode.mode != before.mode:
            self._writes.keep_privileges = True

    def lost_name(self, *, nlink: int, ctime_ns: int) -> None:
        """A name of it was removed: its link count and ctime are these."""
        known = self._layout.known_inode
        if known is not None:
            ctime_ns = max(ctime_ns, known.ctime_ns)
            self._layout.known_inode = msgspec.structs.replace(known, nlink=nlink, ctime_ns=ctime_ns)

    def accessed(self, from_ns: int, to_ns: int) -> None:
        """The service has set its access time to `to_ns`, if it was `from_ns`."""
        known = self._layout.known_inode
        if known is not None and known.atime_ns == from_ns:
            self._layout.known_inode = msgspec.structs.replace(known, atime_ns=to_ns)

    def needs_flush(self, cursor: ErrorCursor) -> bool:
        """Whether `flush` has bytes to write, or an error to tell this handle."""
        return self.unflushed or self._errors.has_news(cursor)

    def error_cursor(self) -> ErrorCursor:
        """For a handle that is being opened; `flush` tells each handle of each error once."""
        return self._errors.cursor()

    # --- after a lost session ------------------------------------------------------------------------------------

    def session_lost(self) -> None:
        """The session is over: nothing is believed of the file before the service was asked in a new one."""
        self._writes.session_lost()

    def _lost(self, error: WritesLost) -> None:
        self._errors.record(error)
        self._errors.over()  # They are not tried again: the next error is another one.

    async def _trusted(self, *, to_write: bool) -> None:
        """Return when what is here of the file may be believed, and `to_write`, be changed.

        New bytes wait until those of a lost session are committed or lost: these go only into the content they knew.
        Raises: StaleInode (the file is gone), and what keeps it from being known.
        """
        if self._writes.unverified:
            await self._writes.verify()
        if to_write and self._writes.base is not None:
            await self._writes.settle()

    # --- reading -------------------------------------------------------------------------------------------------

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """The bytes [offset, offset + size), fewer only at the end of the file.

        The result will not change under the caller and may be a view of a larger buffer.
        Raises: DataLost when no copy of a block is good, and other faults of the services.
        """
        if self._writes.unverified:
            await self._trusted(to_write=False)
        if size > READ_STEP:
            if self._layout.must_load:
                await self._layout.load(offset)
            end = min(offset + size, self.size)
            return b"".join([await self.read(at, min(READ_STEP, end - at)) for at in range(offset, end, READ_STEP)])
        for _ in range(REPLANS_MAX):
            known = self._layout.known_inode
            try:
                return await self._read(offset, size)
            except DataLost:
                # The bytes may have been replaced since the plan, and their blocks been deleted.
                await self._layout.reload()
                if known is not None and self._layout.inode.data_version == known.data_version:
                    raise
        return await self._read(offset, size)

    def read_nowait(self, offset: int, size: int) -> bytes | memoryview | None:
        """As `read`, if memory has all of it in one piece; None, and nothing was done: await `read`."""
        if size > READ_STEP or self._layout.must_load or self._writes.unverified:
            return None
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        planned = self._plan_known(offset, end)
        if isinstance(planned, int) or len(planned) != 1:
            return None
        return self._at_hand(offset, planned[0])

    def _at_hand(self, offset: int, part: _Part) -> bytes | memoryview | None:
        """The bytes of a read that is all one part, if they are in memory; then what follows is read ahead."""
        if part.data is not None:
            return part.data
        if part.key is None:
            return _zeros(part.size)
        view = self._services.reads.cached(part.key, part.start, part.start + part.size)
        if view is not None:
            self._read_ahead(offset, part.size)
        return view

    async def _read(self, offset: int, size: int) -> bytes | memoryview:
        parts = await self._plan_when_known(offset, size)
        if not parts:
            return b""
        if len(parts) == 1:
            part = parts[0]
            found = self._at_hand(offset, part)
            if found is not None:
                return found
            self._read_ahead(offset, part.size)
            got = await self._services.reads.read(_span(part), self._layout.inode.replicas)
            return got[0] if len(got) == 1 else b"".join(got)
        self._read_ahead(offset, sum(part.size for part in parts))
        return await self._gather(parts)

    async def _plan_when_known(self, offset: int, size: int) -> list[_Part]:
        layout = self._layout
        for _ in range(PLANS_MAX):
            if layout.must_load:
                await layout.load(offset)
                continue
            end = min(offset + size, self.size)
            if end <= offset:
                return []
            planned = self._plan_known(offset, end)
            if not isinstance(planned, int):
                return planned
            await layout.load(planned)
        raise DeadlineExceeded(f"the layout of inode {self.ino} changes faster than it can be read")

    def _plan_known(self, offset: int, end: int) -> list[_Part] | int:
        """Where [offset, end) comes from, or the lowest offset whose layout must be loaded first."""
        pieces = self._writes.dirty.lookup(offset, end) if self._writes.dirty else []
        if len(pieces) == 1 and pieces[0].start <= offset and end <= pieces[0].end:
            return [_piece_part(pieces[0], offset, end)]
        unknown = self._layout.first_unknown(offset, end)
        return self._plan(pieces, offset, end) if unknown is None else unknown

    def _plan(self, pieces: list[Piece], offset: int, end: int) -> list[_Part]:
        parts: list[_Part] = []
        for piece in pieces:
            low, high = max(piece.start, offset), min(piece.end, end)
            if low > offset:
                self._plan_committed(parts, offset, low)
            parts.append(_piece_part(piece, low, high))
            offset = high
        if offset < end:
            self._plan_committed(parts, offset, end)
        return parts

    def _plan_committed(self, parts: list[_Part], offset: int, end: int) -> None:
        layout = self._layout
        stop = min(end, layout.inode.size)
        if layout.is_inline:
            data = memoryview(layout.inline or b"")[offset:stop]
            if data:
                parts.append(_Part(len(data), data))
                offset += len(data)
        elif offset < stop:
            for extent in layout.extents.lookup(offset, stop):
                if extent.offset > offset:
                    parts.append(_Part(extent.offset - offset, None))
                    offset = extent.offset
                high = min(extent.offset + extent.length, stop)
                _plan_extent(parts, extent, offset, high)
                offset = high
        if offset < end:
            parts.append(_Part(end - offset, None))

    async def _gather(self, parts: list[_Part]) -> bytes:
        """Fetch what of the parts is in blocks, all at once, and put them together."""
        reads = self._services.reads
        replicas = self._layout.inode.replicas
        spans = merge_spans(_span(part) for part in parts if part.key is not None)
        reads.prefetch(spans[1:], replicas)
        fetched: dict[Key, list[tuple[Span, list[memoryview]]]] = {}
        for span in spans:
            fetched.setdefault(span.key, []).append((span, await reads.read(span, replicas)))
        pieces: list[bytes | memoryview] = []
        for part in parts:
            if part.data is not None:
                pieces.append(part.data)
            elif part.key is None:
                pieces.append(_zeros(part.size))
            else:
                pieces += _cut(fetched[part.key], part)
        return b"".join(pieces)

    def _read_ahead(self, offset: int, size: int) -> None:
        ahead = self._streams.observe(offset, size)
        if ahead is None:
            return
        layout = self._layout
        start, end = ahead[0], min(ahead[1], layout.inode.size)
        if start >= end or layout.is_inline or layout.first_unknown(start, end) is not None:
            return
        parts: list[_Part] = []
        self._plan_committed(parts, start, end)
        spans = merge_spans(_span(part) for part in parts if part.key is not None)
        self._services.reads.prefetch(spans, layout.inode.replicas)

    # --- writing -------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, keep_privileges: bool = False) -> int:
        """Write `data` at `offset` into memory, waiting for memory if there is none; return how many bytes.

        A `bytes` object of some size is kept as it is, everything else is copied: the caller may use it again.
        `keep_privileges`: the writer may keep suid and sgid (CAP_FSETID).
        Fewer bytes than there are: a quota has room for no more.
        Raises: FileTooLarge; QuotaExceeded; the failure that keeps memory from being freed (of what was written before,
        some bytes may have been taken); DeadlineExceeded.
        """
        size = len(data)
        if offset + size > FILE_SIZE_MAX:
            raise FileTooLarge(f"{offset} + {size} bytes")
        await self._trusted(to_write=True)
        if self._layout.known_inode is None:
            await self._layout.load(0)
        if not self._quota.may_grow(max(offset + size - max(self.size, offset), 0)):
            size, data = await self._admit(offset, data)
        if size <= WRITE_STEP:
            await self._writes.reserve(size)
            self._put(offset, data, keep_privileges)
            return size
        view = memoryview(data)
        for at in range(0, size, WRITE_STEP):
            step = view[at : at + WRITE_STEP]
            await self._writes.reserve(len(step))
            self._put(offset + at, step, keep_privileges)
        return size

    def write_nowait(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """As `write` that keeps privileges, if memory is free and no service need be asked.

        False: nothing was done; await `write`.
        """
        size = len(data)
        writes = self._writes
        if size > WRITE_STEP or offset + size > FILE_SIZE_MAX or self._layout.known_inode is None:
            return False
        if writes.unverified or writes.base is not None:
            return False
        if not writes.reserve_nowait(size):
            return False
        if not self._quota.may_grow(max(offset + size - max(self.size, offset), 0)):
            writes.unreserve()
            return False
        self._put(offset, data, True)
        return True

    def append_nowait(self, data: bytes | bytearray | memoryview) -> bool:
        """As `append`, on the terms of `write_nowait`."""
        if self._layout.known_inode is None or self._services.sharing or self._ranges.appends_under_way:
            return False
        return self.write_nowait(self.size, data)

    async def append(self, data: bytes | bytearray | memoryview, *, keep_privileges: bool = False) -> int:
        """Write `data`, at most WRITE_STEP bytes, at the end of the file as it is at that moment; return how many.

        Raises: as `write`; nothing was written then.
        """
        size = len(data)
        await self._trusted(to_write=True)
        if self._layout.known_inode is None:
            await self._layout.load(0)
        assert size <= WRITE_STEP
        if not self._quota.may_grow(size):
            size, data = await self._admit(self.size, data)
        await self._writes.reserve(size)
        if self._services.sharing or self._ranges.appends_under_way:  # By now, or still: the end is not known here.
            self._writes.unreserve()
            await self.append_sharing(data, keep_privileges=keep_privileges)
            return size
        offset = self.size
        if offset + size > FILE_SIZE_MAX:
            self._writes.unreserve()
            raise FileTooLarge(f"{offset} + {size} bytes")
        self._put(offset, data, keep_privileges)
        return size

    async def _admit(
        self, offset: int, data: bytes | bytearray | memoryview
    ) -> tuple[int, bytes | bytearray | memoryview]:
        """As much of `data` as a quota has room for, and how many bytes that is.  Raises: QuotaExceeded: none."""
        size = await self._quota.admit(offset, len(data))
        return size, data if size == len(data) else memoryview(data)[:size]

    async def append_sharing(self, data: bytes | bytearray | memoryview, *, keep_privileges: bool = False) -> Inode:
        """As `append`, where the file ends for all mounts; the bytes are durable, and end where the file now does.

        Raises: what kept them from being written; they are not kept here.
        """
        await self._trusted(to_write=True)
        if not len(data):
            if self._layout.known_inode is None:
                await self._layout.load(0)
            return self._layout.inode
        try:
            return await self._ranges.append(data, keep_privileges=keep_privileges)
        finally:
            self._streams.reset()

    def _put(self, offset: int, data: bytes | bytearray | memoryview, keep_privileges: bool) -> None:
        if len(data):
            self._writes.write(offset, data, keep_privileges=keep_privileges)
        else:
            self._writes.unreserve()

    async def truncate(self, size: int, caller: Caller) -> InodeReply:
        """Set the file's size, in order with the writes before and after.

        Raises: what SetAttr raises; nothing was changed, unless the outcome is unknown (maybe_applied).
        """
        await self._trusted(to_write=True)
        reply = await self._writes.truncate(size, caller)
        self._streams.reset()
        return reply

    # --- ranges --------------------------------------------------------------------------------------------------

    async def change_range(
        self, operation: RangeOperation, offset: int, length: int, *, keep_size: bool, keep_privileges: bool
    ) -> Inode:
        """fallocate(2), in order with the writes before; returns the attributes after it.

        Raises: FileTooLarge, NoRoom, and what a flush raises; of a long list of extents some may have been changed.
        """
        try:
            return await self._ranges.change(
                operation, offset, length, keep_size=keep_size, keep_privileges=keep_privileges
            )
        finally:
            self._streams.reset()

    async def copy_range(
        self, source: FileData, source_offset: int, offset: int, length: int, *, keep_privileges: bool
    ) -> tuple[int, Inode | None]:
        """copy_file_range(2) from `source`, which may be this file, without copying a byte.

        Returns how many bytes, 0 at the end of the source, and the attributes after it.
        Raises: NotSupported (bytes that no blocks have, such as inline ones: copy them by reading and writing);
        InvalidArgument (the ranges overlap); FileTooLarge; what a flush raises.  Nothing was copied.
        """
        try:
            return await self._ranges.copy_from(
                source._ranges, source_offset, offset, length, keep_privileges=keep_privileges
            )
        finally:
            self._streams.reset()

    async def seek_data(self, offset: int) -> int:
        """The first offset from `offset` on that has data.  Raises: NoSuchData."""
        found = await find_data(self._layout, self._writes.dirty, offset) if offset < FILE_SIZE_MAX else None
        if found is None:
            raise NoSuchData(f"no data from {offset} on")
        return found

    async def seek_hole(self, offset: int) -> int:
        """The first offset from `offset` on that has none, the end of the file at last.  Raises: NoSuchData."""
        found = await find_hole(self._layout, self._writes.dirty, offset) if offset < FILE_SIZE_MAX else None
        if found is None:
            raise NoSuchData(f"the file ends at or before {offset}")
        return found

    # --- flushing ------------------------------------------------------------------------------------------------

    async def flush(self, cursor: ErrorCursor | None = None) -> None:
        """Make durable what was written before this call, as fsync(2) does.

        Raises: the first error that this handle has not been told of; the bytes stay in memory and are tried again.
        """
        cursor = self._own_cursor if cursor is None else cursor
        try:
            await self._writes.settle()
        except StoreError as error:
            self._errors.record(error)
            self._errors.told(cursor)  # A call whose own attempt failed fails, whatever the handle has been told.
            raise
        else:
            self._errors.over()
        finally:
            self._forget_if_done()
        self._errors.check(cursor)

    async def settle(self) -> None:
        """As `flush`, before an operation that must come after the writes; errors are kept for the next flush."""
        try:
            await self._writes.settle()
        except StoreError as error:
            self._errors.record(error)
        finally:
            self._forget_if_done()

    async def close(self) -> None:
        """The handle that `DataPath.file` stands for is closed; the last one flushes, and the file is forgotten.

        Raises: what kept bytes from being written; they are tried again in the background for GIVE_UP_S.
        """
        self.references -= 1
        assert self.references >= 0
        if self.references:
            return
        if self._layout.known_inode is not None and self._layout.inode.nlink == 0:
            await self._writes.abandon()
        try:
            await self._writes.settle()
        except StoreError as error:
            self._errors.record(error)
            raise
        finally:
            self._forget_if_done()

    async def flush_in_background(self) -> None:
        """One attempt, because bytes are old or memory is needed; a failure is logged, and tried again later."""
        writes = self._writes
        try:
            await writes.settle()
        except StoreError as error:
            writes.retry_later()
            if not self.references and trio.current_time() - writes.failing_since > GIVE_UP_S:
                tell = log.warning if isinstance(error, QuotaExceeded) else log.error
                tell("bytes_given_up", ino=self.ino, error=type(error).__name__, detail=error.detail)
                await writes.abandon()
        self._forget_if_done()

    def _forget_if_done(self) -> None:
        if not self.references and not self._writes.dirty:
            self._layout.forget()
            self._forget(self)

    # --- for DataPath --------------------------------------------------------------------------------------------

    def learn(self, layout: LayoutReply) -> None:
        """An open brought attributes and the beginning of the layout."""
        self._layout.learn(layout, 0)

    def doubt(self) -> None:
        """Another mount may have changed the file: ask again before the next read."""
        self._layout.doubt()
        self._streams.reset()

    def due_at(self) -> float:
        """When the file is to be flushed in the background (trio's clock; infinity: not now)."""
        return self._writes.due_at()

    def bytes_unsent(self) -> int:
        """Dirty bytes that no upload carries yet."""
        return self._writes.dirty.dirty_bytes


def _piece_part(piece: Piece, start: int, end: int) -> _Part:
    if piece.chunk is not None:
        return _Part(end - start, piece.view(start, end))
    upload = piece.upload
    assert upload is not None
    block = upload.block_id()
    at = piece.upload_offset - piece.start
    return _Part(end - start, None, (block.slice_id, block.index), at + start, at + piece.end)


def _plan_extent(parts: list[_Part], extent: Extent, offset: int, end: int) -> None:
    """Bytes [offset, end) of the file, all inside the extent, cut at the ends of blocks."""
    to_slice = extent.slice_offset - extent.offset
    slice_end = extent.slice_offset + extent.length
    while offset < end:
        index, start = divmod(offset + to_slice, BLOCK_SIZE_MAX)
        limit = min(BLOCK_SIZE_MAX, slice_end - index * BLOCK_SIZE_MAX)
        size = min(end - offset, limit - start)
        parts.append(_Part(size, None, (extent.slice_id, index), start, limit))
        offset += size


def _span(part: _Part) -> Span:
    assert part.key is not None
    return Span(part.key, part.start, part.start + part.size, part.limit)


def _cut(fetched: list[tuple[Span, list[memoryview]]], part: _Part) -> list[memoryview]:
    """The part's bytes, out of the span that has them."""
    low, high = part.start, part.start + part.size
    span, views = next(entry for entry in fetched if entry[0].start <= low and high <= entry[0].end)
    found = []
    at = span.start
    for view in views:
        if at < high and low < at + len(view):
            found.append(view[max(low - at, 0) : high - at])
        at += len(view)
    return found


def _zeros(size: int) -> memoryview | bytes:
    return ZEROS[:size] if size <= len(ZEROS) else bytes(size)


@dataclass(frozen=True)
class DataStatistics:
    """Figures of one mount's data path, sizes in bytes."""

    budget: int
    used: int
    peak: int
    dirty: int
    fetching: int
    clean: int
    waiting_writers: int
    files: int
    bytes_put: int
    put_count: int
    bytes_fetched: int
    get_count: int
    commit_count: int


class _FlushOfOne:
    """One of the flushes of `flush_all`."""

    def __init__(self, file: FileData) -> None:
        self._file = file
        self.done = trio.Event()
        self.error: StoreError | None = None

    async def run(self, limit: trio.CapacityLimiter) -> None:
        try:
            async with limit:
                await self._file.flush()
        except StoreError as error:
            self.error = error
        finally:
            self.done.set()


class DataPath:
    """The bytes of all open files of one mount."""

    def __init__(
        self,
        *,
        metadata: MetadataPort,
        blocks: BlockPort,
        budget_bytes: int = 512 << 20,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._files: dict[int, FileData] = {}
        self.clock_ns = clock_ns
        self._kick = trio.Event()
        self._flushing: set[FileData] = set()
        self._services = DataServices(
            metadata=metadata,
            blocks=blocks,
            budget_bytes=budget_bytes,
            on_pressure=self._wake,
            on_dirty=self._wake,
            clock_ns=clock_ns,
        )

    def on_foreign_change(self, call: Callable[[int], None]) -> None:
        """`call(ino)` from now on whenever the content of an open file turns out to have been changed elsewhere."""
        self._services.on_foreign_change = call

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `drain` first, or bytes that were not flushed are lost."""
        keep_freed_buffers()
        async with trio.open_nursery() as nursery:
            self._services.start(nursery)
            task_status.started()
            while True:
                with trio.move_on_at(self._next_flush_at()):
                    await self._kick.wait()
                self._kick = trio.Event()
                self._start_flushes(nursery)

    def file(self, ino: int, layout: LayoutReply | None) -> FileData:
        """The file's bytes, for one more handle: the same object as long as any is open.

        Without a layout the attributes are not known before the first read or write, or `update_inode`.
        """
        data = self._files.get(ino)
        if data is None:
            data = self._files[ino] = FileData(self._services, ino, self._forget)
        data.references += 1
        if layout is not None:
            data.learn(layout)
        return data

    def holds(self, ino: int) -> bool:
        """Whether there are bytes of it here, though nobody may have it open (a last flush has failed)."""
        return ino in self._files

    @property
    def sharing(self) -> bool:
        """Whether other mounts may append to the same files: then the service says where appends go."""
        return self._services.sharing

    @sharing.setter
    def sharing(self, sharing: bool) -> None:
        self._services.sharing = sharing

    async def flush_all(self) -> None:
        """Flush every file of the mount, in tasks of the mount: they go on if the caller does not wait.

        Raises: the first error; its bytes are kept, and tried again.
        """
        nursery = self._services.nursery
        assert nursery is not None, "DataPath.run has not been started"
        flushes = [_FlushOfOne(file) for file in self._files.values() if file.unflushed]
        limit = trio.CapacityLimiter(SETTLES_MAX)
        for flush in flushes:
            nursery.start_soon(flush.run, limit)
        for flush in flushes:
            await flush.done.wait()
        errors = [flush.error for flush in flushes if flush.error is not None]
        if errors:
            raise errors[0]

    async def drain(self, timeout_s: float) -> None:
        """Flush all files, for at most `timeout_s` seconds, before the mount ends."""
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for file in list(self._files.values()):
                    nursery.start_soon(file.settle)
        left = sum(file.unflushed for file in self._files.values())
        if left:
            log.error("files_not_flushed", files=left)

    def doubt_layouts(self) -> None:
        """Another mount may change files from now on: ask for each layout before the next read."""
        for file in self._files.values():
            file.doubt()

    def find(self, ino: int) -> FileData | None:
        """The file's bytes, if there are any here."""
        return self._files.get(ino)

    def session_lost(self) -> None:
        """The session is over; what is not flushed may be too late (decision 0014), and is seen to at once."""
        for file in self._files.values():
            file.session_lost()
        self.doubt_layouts()
        self._wake()

    def statistics(self) -> DataStatistics:
        """What the data path has done and holds."""
        services, budget = self._services, self._services.budget
        core = budget.core
        return DataStatistics(
            budget=core.limit,
            used=core.used,
            peak=core.peak,
            dirty=core.dirty,
            fetching=core.fetching,
            clean=core.clean,
            waiting_writers=budget.waiting_writers,
            files=len(self._files),
            bytes_put=services.bytes_put,
            put_count=services.put_count,
            bytes_fetched=services.reads.bytes_fetched,
            get_count=services.reads.get_count,
            commit_count=services.commit_count,
        )

    def _forget(self, file: FileData) -> None:
        if self._files.get(file.ino) is file:
            del self._files[file.ino]

    def _wake(self) -> None:
        self._kick.set()

    def _next_flush_at(self) -> float:
        if len(self._flushing) >= SETTLES_MAX:
            return math.inf
        return min((file.due_at() for file in self._files.values() if file not in self._flushing), default=math.inf)

    def _start_flushes(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        for file in [file for file in self._files.values() if file.due_at() <= now]:
            self._start_flush(nursery, file)
        budget = self._services.budget
        if not budget.waiting_writers:
            return
        # Memory is short.  What is on its way frees some soon; only if that is little, the largest heap is sent.
        waiting = [file for file in self._files.values() if file.bytes_unsent() and file.due_at() < math.inf]
        unsent = sum(file.bytes_unsent() for file in self._files.values())
        if waiting and budget.core.dirty - unsent < budget.core.dirty_max // 4:
            self._start_flush(nursery, max(waiting, key=FileData.bytes_unsent))

    def _start_flush(self, nursery: trio.Nursery, file: FileData) -> None:
        if len(self._flushing) < SETTLES_MAX and file not in self._flushing:
            self._flushing.add(file)
            nursery.start_soon(self._flush, file)

    async def _flush(self, file: FileData) -> None:
        try:
            await file.flush_in_background()
        finally:
            self._flushing.remove(file)
            self._wake()
