"""The writing half of the block store: puts and deletes in two stages, for two threads that take turns.

`write` (one thread at a time) appends the records of a group to a segment: they are in the page cache then.  `commit`
(one thread at a time, groups in the order in which they were written) syncs the segments, and only then are the
group's outcomes true.  While one thread commits a group, another writes the next one.

Order of what must survive a power cut (docs/decisions/0002-segments-and-a-lazy-index.md):

1. a put: data synced -> acknowledged -> some time later the index row (a checkpoint).  What the index lacks after a
   crash is found by scanning each segment from its checkpoint on.
2. a delete: index commit, which takes along every row that was still missing (so that no later scan meets the deleted
   record), moves the checkpoint, and lists the ranges to punch -> acknowledged -> punched -> that synced -> taken off
   the list with a later checkpoint.

Invariant B1: what `commit` gave as stored is found after any crash, until deleted.
Invariant B2: what `commit` gave as deleted is never found again.
Invariant B3: every row of the index names bytes that were synced before it was committed.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from blockstore.catalogue import Catalogue, Segment
from blockstore.core.index_rows import Entry, encode_block_key, kept_checksums
from blockstore.core.segment import (
    KIND_BLOCK,
    KIND_DELETED,
    LARGE_SIZE_MIN,
    NONCE_SIZE,
    PAGE_SIZE,
    RecordHeader,
    SegmentHeader,
    checksum_count,
    decode_record_header,
    encode_record_header,
    encode_segment_header,
    layout,
    next_page,
    record_size_max,
    record_start,
    whole_pages,
)
from blockstore.core.segment import RECORD_HEADER_SIZE as HEADER_SIZE
from blockstore.files import SegmentFile
from blockstore.index import Changes, IndexDamaged
from blockstore.protocol import CHECKSUM_UNIT, BlockId
from blockstore.reader import Reader
from wire.checksum import Buffer, crc32c, first_bad_unit
from wire.errors import BlockCorrupt, BlockExists, NoSpace, ServerOverloaded, StoreError
from wire.log import get_logger

SEGMENT_SIZE_MAX = 256 << 20
"""A segment is left for the next one at this size: 64 large blocks, and one unlink gives it all back."""
FRESH_COUNT_MAX = 4096
FRESH_BYTES_MAX = 256 << 20
"""Blocks and bytes that may miss in the index: what a start after a crash reads and verifies (half a second)."""
FRESH_COUNT_LIMIT = 65536
"""When the index cannot be committed for so long, puts are refused."""
GATHER_BYTES = 1 << 20
GATHER_BUFFERS = 900
"""Bytes and buffers of one write(2); above a MiB the call itself no longer matters."""
DEAD_RUNS_MAX = 65536
"""Runs of reclaimed ranges remembered, some MiB; forgotten ones cost a page each until their segment goes."""

log = get_logger("blockstore")
ZEROS = bytes(4096)


class Put:
    """One block to store."""

    __slots__ = ("block", "checksums", "data", "done", "entry", "key", "leader", "outcome", "replaces", "size")

    def __init__(
        self, block: BlockId, checksums: bytes, data: Buffer, done: Callable[[Put], None] | None = None
    ) -> None:
        self.block = block
        self.key = encode_block_key(block)
        self.checksums = checksums
        self.data = data
        self.size = len(data)
        self.done = done
        self.outcome: StoreError | None = None  # True after `commit`: None means durable.
        self.entry: Entry | None = None  # Where the write stage put it; None: it wrote nothing.
        self.replaces: Entry | None = None  # A damaged copy that was here.
        self.leader: Put | None = None  # An equal put in flight, whose outcome is also this one's.


class Delete:
    """Blocks to forget."""

    __slots__ = ("blocks", "deleted_count", "done", "outcome", "size")

    def __init__(self, blocks: Sequence[BlockId], done: Callable[[Delete], None] | None = None) -> None:
        self.blocks = blocks
        self.size = 64 * len(blocks)
        self.done = done
        self.deleted_count = 0
        self.outcome: StoreError | None = None  # True after `commit`: None means gone, durably.


@dataclass
class Group:
    """Operations that share one sync."""

    operations: list[Put | Delete] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)  # Segment -> its end after this group.


@dataclass
class _Gather:
    """Records that go into one write."""

    segment: Segment
    end_before: int  # Of the segment.
    start: int
    buffers: list[Buffer] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)
    size: int = 0


class Writer:
    """The two stages.  `write` and `commit` may run at the same time, each in one thread at a time."""

    def __init__(
        self,
        catalogue: Catalogue,
        reader: Reader,
        *,
        next_number: int,
        active: Segment | None,
        to_punch: Sequence[tuple[int, int, int]] = (),
        reserve_bytes: int = 0,
        segment_size_max: int = SEGMENT_SIZE_MAX,
        release_reserve: Callable[[], bool] = lambda: False,
        make_nonce: Callable[[], bytes] = lambda: os.urandom(NONCE_SIZE),
    ) -> None:
        self._catalogue = catalogue
        self._reader = reader
        self._next_number = next_number  # Write stage.
        self._active = active  # Write stage.
        self._room = 0  # Write stage: bytes that may be written before free space is asked for again.
        self._reserve_bytes = reserve_bytes
        self._segment_size_max = segment_size_max
        self._release_reserve = release_reserve
        self._make_nonce = make_nonce
        self._rows: dict[bytes, Entry | None] = {}  # Write stage: of the puts being written, when ...
        self._rows_at = 0  # ... the catalogue had counted so many commits.
        self._in_flight: dict[bytes, Put] = {}  # Added by the write stage, removed by the commit stage.
        self._deleting: Counter[bytes] = Counter()  # Deletes that passed the write stage and are not committed.
        self._deleting_lock = threading.Lock()  # Both stages change it.
        self._dead: list[tuple[int, int, int]] = []  # Commit stage: ranges to list with the next commit.
        self._to_punch = deque(to_punch)  # Listed in the index, not yet punched.
        self._run_starts: dict[
            tuple[int, int], int
        ] = {}  # Of unbroken runs of reclaimed ranges: (segment, end) -> start
        self._run_ends: dict[tuple[int, int], int] = {}  # (segment, start) -> end
        self._to_remove: deque[int] = deque()  # Segments that the index has forgotten.
        self._punched: deque[tuple[int, int]] = deque()  # Punched, perhaps not yet synced.

    # --- the write stage --------------------------------------------------------------------------------------------

    def write(self, operations: Sequence[Put | Delete], group: Group) -> None:
        """Append the puts to a segment and the operations to `group`; nothing is durable before `commit`."""
        self._room = self._catalogue.files.free_bytes() - self._reserve_bytes
        self._rows_at = self._catalogue.commit_count
        self._rows = self._rows_of([put.key for put in operations if isinstance(put, Put)])
        gather: _Gather | None = None
        for operation in operations:
            group.operations.append(operation)
            if isinstance(operation, Delete):
                self._note_deleting(operation)
            elif self._is_new(operation):
                gather = self._place(operation, gather, group)
        if gather is not None:
            self._flush(gather, group)

    def _is_new(self, put: Put) -> bool:
        """Whether its bytes are to be written; if not, its outcome is set, or will be its leader's."""
        if len(put.checksums) != 4 * checksum_count(put.size) or put.size == 0:
            put.outcome = BlockCorrupt(f"{put.size} bytes came with {len(put.checksums)} bytes of checksums")
            return False
        bad_unit = first_bad_unit(put.data, put.checksums, CHECKSUM_UNIT)
        if bad_unit is not None:
            put.outcome = BlockCorrupt(f"unit {bad_unit} of what was sent does not match its checksum")
            return False
        if put.key in self._deleting:
            put.outcome = ServerOverloaded("the block is being deleted")
            return False
        leader = self._in_flight.get(put.key)
        if leader is not None:
            if leader.size == put.size and leader.checksums == put.checksums:
                put.leader = leader
            else:
                put.outcome = self._exists(put)
            return False
        entry = self._catalogue.fresh.get(put.key)
        if entry is None and self._catalogue.commit_count == self._rows_at:
            entry = self._rows.get(put.key)
        elif entry is None:  # A commit meanwhile may have moved it out of `fresh`.
            entry = self._rows_of([put.key]).get(put.key)
        # A damaged row counts as none, and will be overwritten.
        return entry is None or self._is_unlike(put, entry)

    def _rows_of(self, keys: Sequence[bytes]) -> dict[bytes, Entry | None]:
        try:
            return self._catalogue.index.get_many(keys)
        except IndexDamaged:
            return {}  # The blocks are written as new ones, which does no harm; the next commit stops this process.

    def _is_unlike(self, put: Put, entry: Entry) -> bool:
        """Whether an undamaged copy of another content, or a damaged one of the same, is here; see `_is_new`."""
        kept = self._reader.checksums(put.key, entry)
        if kept is not None and (entry.size != put.size or kept != put.checksums):
            put.outcome = self._exists(put)
            return False
        if self._reader.damage(put.block, entry) is None:
            return False
        put.replaces = entry
        return True

    def _exists(self, put: Put) -> BlockExists:
        return BlockExists(f"another content is stored as block {put.block.slice_id}.{put.block.index}")

    def _place(self, put: Put, gather: _Gather | None, group: Group) -> _Gather | None:
        """Give the put a place and add it to what is gathered; what is gathered after that."""
        room = record_size_max(put.size)
        if room > self._room or len(self._catalogue.fresh) > FRESH_COUNT_LIMIT:
            put.outcome = NoSpace("the disk of this server is full")
            return gather
        large = put.size >= LARGE_SIZE_MIN
        if gather is not None and (large or gather.size >= GATHER_BYTES or len(gather.buffers) >= GATHER_BUFFERS):
            self._flush(gather, group)
            gather = None
        if gather is None or gather.segment.end + room > self._segment_size_max:
            if gather is not None:
                self._flush(gather, group)
            try:
                segment = self._writable(room)
            except OSError as error:
                put.outcome = _write_error(error)
                return None
            gather = _Gather(segment, segment.end, record_start(segment.end, put.size))
        self._append(put, gather)
        if not large:
            return gather
        self._flush(gather, group, past_cache=True)
        return None

    def _append(self, put: Put, gather: _Gather) -> None:
        segment = gather.segment
        start = record_start(segment.end, put.size)
        where = layout(start, put.size)
        table_crc = crc32c(put.checksums)
        header = RecordHeader(KIND_BLOCK, put.block, start, put.size, table_crc)
        gather.buffers += (encode_record_header(header, segment.seed), put.checksums)
        before, after = where.data - where.table - len(put.checksums), where.end - where.data - put.size
        if before:
            gather.buffers.append(ZEROS[:before])
        gather.buffers.append(put.data)
        if after:
            gather.buffers.append(ZEROS[:after])
        put.entry = Entry(segment.number, start, put.size, table_crc, kept_checksums(put.checksums))
        segment.end = where.end
        gather.puts.append(put)
        gather.size += where.end - start
        self._room -= where.end - start
        self._in_flight[put.key] = put

    def _writable(self, room: int) -> Segment:
        """The segment to append `room` bytes to: the active one, or a new one when that is full or has failed."""
        active = self._active
        if active is not None and not active.poisoned and active.end + room <= self._segment_size_max:
            return active
        if active is not None:
            active.sealed = True
        self._active = None
        self._active = self._make_segment()
        return self._active

    def _make_segment(self) -> Segment:
        """A new segment, durable in its directory before the first record goes into it."""
        files = self._catalogue.files
        number = self._next_number
        header = SegmentHeader(number, self._make_nonce())
        try:
            file = files.create(number)
            file.write([encode_segment_header(header)], 0)
            file.sync()
            files.sync_directory()
        except OSError:
            self._next_number = number + 1  # What is left of it is removed at the next start.
            raise
        segment = Segment(number, header.seed)
        self._catalogue.keep_open(number, file)
        self._catalogue.segments[number] = segment
        # Last: a commit at the same time that takes this number along must find the segment to take along, or a start
        # would hold its file for that of a removed one.
        self._next_number = number + 1
        return segment

    def _flush(self, gather: _Gather, group: Group, *, past_cache: bool = False) -> None:
        """Write what is gathered; if that fails, cut it off again and refuse its puts."""
        segment = gather.segment
        try:
            file = self._catalogue.file(segment.number)
        except OSError as error:
            self._refuse(gather, error)
            return
        try:
            if past_cache:
                file.write_past_cache(gather.buffers, gather.start)
            else:
                file.write(gather.buffers, gather.start)
        except OSError as error:
            self._refuse(gather, error)
            self._cut(segment, file)
            return
        group.written[segment.number] = segment.end

    def _refuse(self, gather: _Gather, error: OSError) -> None:
        log.warning("write_failed", segment=gather.segment.number, offset=gather.start, error=error.strerror)
        gather.segment.end = gather.end_before
        self._room = 0 if error.errno in (errno.ENOSPC, errno.EDQUOT) else self._room
        for put in gather.puts:
            put.outcome = _write_error(error)
            put.entry = None
            del self._in_flight[put.key]

    def _cut(self, segment: Segment, file: SegmentFile) -> None:
        try:
            file.truncate(segment.end)
        except OSError as error:
            # Whatever is left there belongs to no put that was acknowledged; nothing more goes into this segment.
            log.warning("cut_failed", segment=segment.number, offset=segment.end, error=error.strerror)
            segment.poisoned = True

    # --- the commit stage -------------------------------------------------------------------------------------------

    def commit(self, group: Group, *, checkpoint: bool = False) -> None:
        """Make the group durable; then its operations' outcomes are true.

        Args:
            checkpoint: also bring the index up to date, so that a start has nothing to scan.
        """
        self._sync(group)
        deletes: list[Delete] = []
        doomed: dict[bytes, Entry | None] = {}
        for operation in group.operations:
            if isinstance(operation, Put):
                self._settle(operation)
            else:
                deletes.append(operation)
                self._doom(operation, doomed)
        for number, end in group.written.items():
            self._catalogue.segments[number].durable = end
        if deletes or checkpoint or self._checkpoint_is_due:
            error = self._commit_index(doomed)
            for delete in deletes:
                delete.outcome = delete.outcome or error
                self._forget_deleting(delete)

    def _sync(self, group: Group) -> None:
        """Sync the segments of the group; the puts in one that fails are refused and it is never written again."""
        failed: dict[int, OSError] = {}
        for number in group.written:
            segment = self._catalogue.segments[number]
            try:
                if segment.poisoned:
                    # After a failed sync the kernel reports the pages of later writes as clean, lost or not.
                    raise OSError(errno.EIO, "an earlier sync of the segment failed")
                self._catalogue.file(number).sync()
            except OSError as error:
                log.error("sync_failed", segment=number, error=error.strerror)
                segment.poisoned = True
                failed[number] = error
        for operation in group.operations if failed else ():
            if isinstance(operation, Put) and operation.entry is not None and operation.entry.segment in failed:
                operation.outcome = _write_error(failed[operation.entry.segment])

    def _settle(self, put: Put) -> None:
        """One put after the sync: into `fresh`, or its range is dead."""
        catalogue = self._catalogue
        if put.leader is not None:
            put.outcome = put.leader.outcome
            return
        entry = put.entry
        if entry is None:
            return
        segment = catalogue.segments[entry.segment]
        if put.outcome is None:
            segment.live_count += 1
            segment.live_bytes += entry.size
            catalogue.keep_table(put.key, entry, put.checksums)
            if put.replaces is not None:
                self._bury(put.replaces)
                catalogue.corrupt.discard(put.key)
            catalogue.fresh[put.key] = entry
            catalogue.fresh_bytes += entry.size
        else:
            self._dead.append((entry.segment, entry.offset, entry.layout.end))
        del self._in_flight[put.key]

    def _bury(self, entry: Entry) -> None:
        """The record is no longer live."""
        segment = self._catalogue.segments.get(entry.segment)
        if segment is not None:
            segment.live_count -= 1
            segment.live_bytes -= entry.size
            self._dead.append((entry.segment, entry.offset, entry.layout.end))

    def _doom(self, delete: Delete, doomed: dict[bytes, Entry | None]) -> None:
        """Find the blocks to delete and count those that are here."""
        keys = {encode_block_key(block) for block in delete.blocks} - doomed.keys()
        try:
            found = self._catalogue.index.get_many(
                keys
            )  # None: a damaged row; its space is lost until the segment goes.
        except IndexDamaged as error:
            delete.outcome = error
            return
        found.update((key, self._catalogue.fresh[key]) for key in keys & self._catalogue.fresh.keys())
        doomed.update(found)
        delete.deleted_count += len(found)

    def _note_deleting(self, delete: Delete) -> None:
        with self._deleting_lock:
            self._deleting.update(map(encode_block_key, delete.blocks))

    def _forget_deleting(self, delete: Delete) -> None:
        with self._deleting_lock:
            for block in delete.blocks:
                key = encode_block_key(block)
                self._deleting[key] -= 1
                if not self._deleting[key]:
                    del self._deleting[key]

    @property
    def _checkpoint_is_due(self) -> bool:
        return len(self._catalogue.fresh) >= FRESH_COUNT_MAX or self._catalogue.fresh_bytes >= FRESH_BYTES_MAX

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint would change anything, for when there is nothing else to do."""
        return bool(self._catalogue.fresh or self._punched or self._dead)

    def _commit_index(self, doomed: dict[bytes, Entry | None]) -> StoreError | None:
        """Bring the index up to date without the doomed blocks; None, or why nothing was changed."""
        catalogue = self._catalogue
        before = len(self._dead)
        saved = {s.number: (s.live_count, s.live_bytes) for s in catalogue.segments.values()} if doomed else {}
        for entry in doomed.values():
            if entry is not None:
                self._bury(entry)
        changes, removed = self._changes(doomed)
        error = self._commit_with_reserve(changes)
        if error is not None:
            del self._dead[before:]
            self._punched += changes.punched
            for number, figures in saved.items():
                catalogue.segments[number].live_count, catalogue.segments[number].live_bytes = figures
            return error
        catalogue.commit_count += 1
        catalogue.fresh = {}
        catalogue.fresh_bytes = 0
        if doomed or changes.punches:
            catalogue.generation += 1  # The blocks can no longer be found, and nothing is punched yet: see Catalogue.
        for number, row in changes.segments.items():
            catalogue.segments[number].committed = row
        for key in doomed:
            catalogue.forget_table(key)
            catalogue.corrupt.discard(key)
        self._dead.clear()
        self._to_punch += [dead for dead in changes.punches if dead[0] not in removed]
        for number in removed:
            catalogue.segments.pop(number, None)
            catalogue.close_file(number)
        self._to_remove += removed
        return None

    def _changes(self, doomed: dict[bytes, Entry | None]) -> tuple[Changes, list[int]]:
        """What to commit, and the segments that are empty then."""
        catalogue = self._catalogue
        changes = Changes(next_number=self._next_number)  # Before the segments are looked at: see _make_segment.
        changes.blocks = {key: entry for key, entry in catalogue.fresh.items() if key not in doomed}
        changes.blocks.update(dict.fromkeys(doomed))
        changes.punches = [*_merged(self._dead)]
        changes.punched = self._synced_punches()
        removed: list[int] = []
        for segment in list(catalogue.segments.values()):
            row = segment.row
            if row.sealed and row.live_count == 0:
                changes.segments[segment.number] = None
                removed.append(segment.number)
            elif row != segment.committed:
                changes.segments[segment.number] = row
        return changes, removed

    def _synced_punches(self) -> list[tuple[int, int]]:
        """Take the punched ranges that could be made durable: they can leave the list in the index."""
        punched = [self._punched.popleft() for _ in range(len(self._punched))]
        good: set[int] = set()
        for number in {number for number, _ in punched} & self._catalogue.segments.keys():
            try:
                self._catalogue.file(number).sync()
                good.add(number)
            except OSError as error:  # They stay on the list; the next start punches them again.
                log.error("sync_failed", segment=number, error=error.strerror)
        return [punch for punch in punched if punch[0] in good]

    def _commit_with_reserve(self, changes: Changes) -> StoreError | None:
        """Commit; on a full disk once more with the reserve given back, so that deletes can make room."""
        for attempt in (1, 2):
            try:
                self._catalogue.index.commit(changes)
            except OSError as error:
                log.warning("index_commit_failed", error=str(error), attempt=attempt)
                if attempt == 2 or error.errno != errno.ENOSPC or not self._release_reserve():
                    return _write_error(error)
            else:
                return None
        raise AssertionError("unreachable")

    # --- giving back space ------------------------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Punch out what the index lists as dead, and remove empty segments; for any thread, after a commit."""
        while self._to_remove:
            try:
                number = self._to_remove.popleft()
            except IndexError:  # Another thread was faster.
                break
            try:
                self._catalogue.files.remove(number)
            except OSError as error:  # The next start tries again.
                log.warning("remove_failed", segment=number, error=error.strerror)
        for _ in range(len(self._to_punch)):
            try:
                number, start, end = self._to_punch.popleft()
            except IndexError:  # Another thread was faster.
                return
            segment = self._catalogue.segments.get(number)
            if segment is None:
                continue
            try:
                file = self._catalogue.file(number)
                _mark_deleted(file, segment, start, end)
                pages = whole_pages(*self._joined(number, start, end))
                if pages is not None:
                    file.punch(*pages)
            except FileNotFoundError:  # The segment was removed meanwhile.
                continue
            except OSError as error:
                log.warning("punch_failed", segment=number, offset=start, error=error.strerror)
                continue  # It stays on the list; the next start tries again.
            self._punched.append((number, start))

    def _joined(self, number: int, start: int, end: int) -> tuple[int, int]:
        """The range with what is dead beside it in the pages that it shares, so that these can go as well."""
        if len(self._run_starts) > DEAD_RUNS_MAX:
            self._run_starts.clear()
            self._run_ends.clear()
        lower = self._run_starts.pop((number, start), start)  # Of the run that ends where the range begins.
        upper = self._run_ends.pop((number, end), end)
        self._run_starts[number, upper] = lower
        self._run_ends[number, lower] = upper
        return max(lower, start // PAGE_SIZE * PAGE_SIZE), min(upper, next_page(end))


def _write_error(error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("the disk of this server is full")
    return StoreError(f"writing to the disk of this server failed: {error.strerror}")


def _merged(ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The ranges with neighbours joined, so that pages shared by two dead records are whole."""
    current: tuple[int, int, int] | None = None
    for number, start, end in sorted(ranges):
        if current is not None and current[0] == number and start <= current[2]:
            current = (number, current[1], max(current[2], end))
            continue
        if current is not None:
            yield current
        current = (number, start, end)
    if current is not None:
        yield current


def _mark_deleted(file: SegmentFile, segment: Segment, start: int, end: int) -> None:
    """Turn the headers in [start, end) into those of deleted records, for an index that is made again some day.

    Not synced: a mark that is lost with a power cut is made again, as the range is still on the list.
    """
    raw = bytearray(HEADER_SIZE)
    while start + HEADER_SIZE <= end and file.read_into(raw, start) == len(raw):
        header = decode_record_header(raw, offset=start, seed=segment.seed)
        if header is None:
            return
        if header.kind != KIND_DELETED:
            gone = RecordHeader(KIND_DELETED, header.block, header.offset, header.size, header.table_crc)
            file.write([encode_record_header(gone, segment.seed)], start)
        start = layout(start, header.size).end
