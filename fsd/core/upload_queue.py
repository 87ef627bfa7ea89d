"""Uploads of one file on their way from memory to the layout, and the order in which they may be committed.

An upload is one block: up to 4 MiB of the file's bytes, in one or many parts.  Uploads are numbered in the order in
which they were sealed; a slice is a run of consecutive uploads.  They are sent in parallel and arrive in any order,
but are committed in the order of their numbers: a later one may hold newer bytes of the same range, and the layout
that is committed last wins.

Invariant F5: an upload is committed only when it and all uploads with lower numbers are durable.
Invariant F6: a slice is named by one commit, which carries all of it; every block of it but the last has 4 MiB.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from itertools import groupby

from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from fsd.core.extent_map import ExtentMap
from metadata.core.schema import SLICE_SIZE_MAX, Extent
from metadata.protocol import EXTENTS_PER_MESSAGE_MAX, DegradedBlock

BLOCKS_PER_SLICE = SLICE_SIZE_MAX // BLOCK_SIZE_MAX
PARTS_PER_SLICE_MAX = EXTENTS_PER_MESSAGE_MAX // 2
"""Parts of all uploads of one slice.  One commit must carry them all, and a newer part may cut an older one in two:
n parts make less than 2 n extents."""


class Chunk:
    """One buffer, shared by the pieces and uploads that refer to parts of it."""

    __slots__ = ("charge", "data", "references")

    def __init__(self, data: bytes | bytearray, overhead: int) -> None:
        self.data = data
        self.charge = len(data) + overhead  # Bytes of the budget.
        self.references = 0


class Slice:
    """A slice being filled with blocks.  Its id is asked for when the first of them leaves."""

    __slots__ = ("closed", "named", "next_index", "part_count", "size", "slice_id", "unsettled")

    def __init__(self) -> None:
        self.slice_id: int | None = None
        self.next_index = 0
        self.part_count = 0
        self.size = 0  # Bytes up to the end of its last block.
        self.closed = False  # No more blocks come.
        self.named = False  # A commit that names it was done, or may have been.
        self.unsettled = 0  # Uploads that are neither committed nor given up.

    def settled(self) -> list[BlockId]:
        """One of its uploads is committed or given up; blocks that nobody will ever name because of it are returned."""
        self.unsettled -= 1
        if self.unsettled or self.named or self.slice_id is None:
            return []
        self.closed = True
        return [BlockId(self.slice_id, index) for index in range(self.next_index)]


class Slot:
    """The place of one block: index `index` of a slice."""

    __slots__ = ("index", "slice")

    def __init__(self, slice_: Slice, index: int) -> None:
        self.slice = slice_
        self.index = index


class SliceAllocator:
    """Decides which slice the next block belongs to.

    Blocks go into the same slice until it is full, a short one ends it, or a commit is to name it.  A file written in
    sequence so gets one extent for every 64 MiB.
    """

    def __init__(self) -> None:
        self._open = Slice()

    def take(self, size: int, part_count: int) -> Slot:
        """The place of the next block, which has `size` bytes in `part_count` parts."""
        assert 0 < size <= BLOCK_SIZE_MAX
        assert 0 < part_count <= PARTS_PER_SLICE_MAX
        if self._open.closed or self._open.part_count + part_count > PARTS_PER_SLICE_MAX:
            self.close()
        slice_ = self._open
        slot = Slot(slice_, slice_.next_index)
        slice_.next_index += 1
        slice_.unsettled += 1
        slice_.part_count += part_count
        slice_.size = slot.index * BLOCK_SIZE_MAX + size
        slice_.closed = size < BLOCK_SIZE_MAX or slice_.next_index == BLOCKS_PER_SLICE
        return slot

    def close(self) -> None:
        """The next block begins a new slice."""
        self._open.closed = True
        self._open = Slice()


class UploadState(enum.Enum):
    """Where an upload is."""

    SENDING = 1
    DURABLE = 2
    FAILED = 3  # Its bytes are dirty again.
    DROPPED = 4  # Nobody wants its bytes any more (the file is gone).


class Upload:
    """One block on its way."""

    __slots__ = (
        "chunks",
        "copies",
        "degraded",
        "is_sent",
        "number",
        "parts",
        "payload",
        "size",
        "slot",
        "state",
    )

    def __init__(self, slot: Slot, size: int) -> None:
        self.number = 0  # Given by the queue.
        self.slot = slot
        self.size = size
        self.parts: list[tuple[int, int, int]] = []  # (offset in the file, length, offset in the block), ascending.
        self.payload: list[memoryview] = []  # Its bytes, until it is durable or has failed.
        self.chunks: list[Chunk] = []  # What the payload lies in.
        self.state = UploadState.SENDING
        self.copies = 0
        self.degraded = False
        self.is_sent = False  # Its put has returned.

    def add(self, offset: int, length: int, block_offset: int, data: memoryview) -> None:
        """One more part, behind those that are there."""
        parts = self.parts
        if parts:
            before_offset, before_length, before_at = parts[-1]
            if before_offset + before_length == offset:  # One extent will name both.
                parts[-1] = (before_offset, before_length + length, before_at)
                self.payload.append(data)
                return
        parts.append((offset, length, block_offset))
        self.payload.append(data)

    def file_blocks(self) -> set[int]:
        """The file blocks that its parts lie in."""
        blocks: set[int] = set()
        for offset, length, _ in self.parts:
            blocks.update(range(offset // BLOCK_SIZE_MAX, (offset + length - 1) // BLOCK_SIZE_MAX + 1))
        return blocks

    def block_id(self) -> BlockId:
        """The block's name; its slice has its id."""
        assert self.slot.slice.slice_id is not None
        return BlockId(self.slot.slice.slice_id, self.slot.index)

    def extents(self) -> list[Extent]:
        """What a commit says of it."""
        block = self.block_id()
        base = block.index * BLOCK_SIZE_MAX
        return [Extent(offset, length, block.slice_id, base + at) for offset, length, at in self.parts]

    def truncate(self, size: int) -> None:
        """Bytes of the file at or beyond `size` are not to be committed any more."""
        self.parts = [(offset, min(length, size - offset), at) for offset, length, at in self.parts if offset < size]


class Commit:
    """What one CommitExtents says: whole slices, their extents ascending and not overlapping."""

    __slots__ = ("degraded", "extents", "slice_sizes", "uploads")

    def __init__(self, uploads: list[Upload], extents: tuple[Extent, ...]) -> None:
        named = {extent.slice_id for extent in extents}
        slices = {upload.slot.slice for upload in uploads}
        self.uploads = uploads
        self.extents = extents
        self.slice_sizes = tuple(
            sorted((slice_.slice_id, slice_.size) for slice_ in slices if slice_.slice_id in named)
        )
        self.degraded = tuple(
            DegradedBlock(upload.block_id(), upload.copies)
            for upload in uploads
            if upload.degraded and upload.slot.slice.slice_id in named
        )

    def mark_named(self) -> None:
        """The service may know these slices from now on: their blocks are its to delete."""
        named = {slice_id for slice_id, _ in self.slice_sizes}
        for upload in self.uploads:
            slice_ = upload.slot.slice
            slice_.named = slice_.named or slice_.slice_id in named

    def mark_refused(self) -> None:
        """The service has refused it, and has not been asked before: nothing names these slices."""
        for upload in self.uploads:
            upload.slot.slice.named = False

    @property
    def end(self) -> int:
        """One past the last byte of the file that it names."""
        return self.extents[-1].offset + self.extents[-1].length


class UploadQueue:
    """The uploads of one file that are not yet committed, in the order of their numbers."""

    def __init__(self) -> None:
        self._uploads: list[Upload] = []
        self.last_number = 0
        self._unsure: list[Upload] = []  # Of the commit whose outcome is unknown.

    def __len__(self) -> int:
        return len(self._uploads)

    def append(self, upload: Upload) -> None:
        """Number it and put it last."""
        self.last_number += 1
        upload.number = self.last_number
        self._uploads.append(upload)

    def durable(self, upload: Upload, copies: int, *, degraded: bool) -> None:
        """Its block is on `copies` servers."""
        upload.state = UploadState.DURABLE
        upload.is_sent = True
        upload.copies = copies
        upload.degraded = degraded

    def fail(self, upload: Upload) -> None:
        """It could not be sent: it leaves the queue, and its slice takes no more blocks."""
        upload.state = UploadState.FAILED
        upload.slot.slice.closed = True
        self._uploads.remove(upload)

    def is_durable(self, number: int) -> bool:
        """True when every upload up to this number is durable, committed or failed."""
        return all(upload.state is UploadState.DURABLE for upload in self._uploads if upload.number <= number)

    def next_commit(self) -> Commit | None:
        """What may be committed now: whole slices that are durable, with nothing older still on its way (F5, F6).

        After a commit whose outcome is unknown, the same uploads once more and no others.
        """
        if self._unsure:
            overlaid = ExtentMap()
            for upload in self._unsure:
                overlaid.overlay(upload.extents())
            return Commit(self._unsure, tuple(overlaid))
        chosen: list[Upload] = []
        overlaid = ExtentMap()
        for run in self._durable_slices():
            longer = overlaid.copy() if chosen else overlaid
            for upload in run:
                longer.overlay(upload.extents())
            if len(longer) > EXTENTS_PER_MESSAGE_MAX:
                break
            overlaid = longer
            chosen += run
        return Commit(chosen, tuple(overlaid)) if chosen else None

    def _durable_slices(self) -> Iterator[list[Upload]]:
        """The slices at the head of the queue that are closed and durable, each as the run of its uploads."""
        for slice_, uploads in groupby(self._uploads, key=lambda upload: upload.slot.slice):
            run = list(uploads)
            if not slice_.closed or any(upload.state is not UploadState.DURABLE for upload in run):
                return
            yield run

    def committed(self, commit: Commit) -> list[BlockId]:
        """It is in the layout; blocks that it does not name, because newer bytes have replaced theirs, are returned."""
        commit.mark_named()
        count = len(commit.uploads)
        assert self._uploads[:count] == commit.uploads
        del self._uploads[:count]
        self._unsure = []
        return [block for upload in commit.uploads for block in upload.slot.slice.settled()]

    def unsure(self, commit: Commit) -> None:
        """It may or may not be in the layout."""
        commit.mark_named()
        self._unsure = commit.uploads

    def is_unsure(self) -> bool:
        """True when the next commit is the repetition of one whose outcome is unknown."""
        return bool(self._unsure)

    def truncate(self, size: int) -> None:
        """The file was cut to `size`."""
        for upload in self._uploads:
            upload.truncate(size)

    def drop_empty(self) -> list[BlockId]:
        """Durable uploads of which truncation has left nothing leave; blocks that nobody will name are returned."""
        empty = [u for u in self._uploads if u.state is UploadState.DURABLE and not u.parts and u not in self._unsure]
        if not empty:
            return []
        self._uploads = [upload for upload in self._uploads if upload not in empty]
        return [block for upload in empty for block in upload.slot.slice.settled()]

    def clear(self) -> list[Upload]:
        """Forget all of them; return what was there."""
        dropped, self._uploads = self._uploads, []
        self._unsure = []
        for upload in dropped:
            upload.state = UploadState.DROPPED
        return dropped
