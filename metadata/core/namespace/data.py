"""What a file's bytes are: inline data, extents on slices, holes, and truncation.

A file is INLINE (its first bytes are one value), or has extents, or has no bytes; what is neither inline nor in an
extent, up to the size, reads as zeros.  Extents do not overlap (invariant M8).  An extent of ZEROS_SLICE is allocated
and reads as zeros, as unwritten extents of other file systems do: it counts in `allocated`, may lie beyond the size,
and is not told to clients, for whom it is a hole.  ranges.py makes such extents.

A truncation that drops more than KEYS_PER_STEP extents leaves a mark, "dead from offset T on": extents that begin at
or beyond T do not count any more, though they are still charged.  Reads do not see them, the deletion queue takes them
away in steps, and a commit that would put live extents beyond T finishes the work first, or asks to be sent again.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from itertools import pairwise

from msgspec.structs import replace

from blockstore.protocol import BLOCK_SIZE_MAX
from metadata.core import schema
from metadata.core.namespace import stored_xattrs
from metadata.core.namespace.inodes import (
    KEYS_PER_STEP,
    charge,
    count,
    counter,
    dequeue,
    enqueue,
    load,
    refer,
    release_slices,
    store,
    without_privileges,
)
from metadata.core.schema import (
    FILE_SIZE_MAX,
    INLINE_SIZE_MAX,
    SLICE_SIZE_MAX,
    BadBlockRecord,
    Extent,
    Inode,
    InodeFlags,
)
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import EXTENTS_PER_MESSAGE_MAX, Caller, DegradedBlock, InodeReply, LayoutReply
from wire.errors import ContentChanged, FileTooLarge, InvalidArgument, IsDirectory, MovedOutOfLine, ServerOverloaded

CAPABILITY_XATTR = b"security.capability"
"""Dropped with suid and sgid, as Linux does."""


def get_layout(txn: ReadTxn, *, ino: int, offset: int, length: int) -> LayoutReply:
    """Attributes and layout of [offset, offset + length) in one snapshot.  Raises: NoSuchEntry."""
    return layout(txn, ino, load(txn, ino), offset=offset, length=length, count=EXTENTS_PER_MESSAGE_MAX)


def layout(txn: ReadTxn, ino: int, inode: Inode, *, offset: int, length: int, count: int) -> LayoutReply:
    """As get_layout, with at most `count` extents."""
    start, end = min(offset, FILE_SIZE_MAX), min(offset + length, FILE_SIZE_MAX)
    if inode.flags & InodeFlags.INLINE:
        return LayoutReply(ino, inode, txn.get(schema.inline_key(ino)), (), end)
    if not inode.allocated:
        return LayoutReply(ino, inode, None, (), end)
    dead_from = txn.get(schema.truncation_key(ino))
    live_end = end if dead_from is None else min(end, schema.decode_number(dead_from))
    extents = extents_between(txn, ino, start, live_end, count=count)
    return LayoutReply(
        ino,
        inode,
        None,
        tuple(extent for extent in extents if extent.slice_id != schema.ZEROS_SLICE),
        extents[-1].offset + extents[-1].length if len(extents) == count else end,
    )


def extents_between(txn: ReadTxn, ino: int, start: int, end: int, *, count: int) -> list[Extent]:
    """The first `count` extents that share a byte with [start, end), in ascending order."""
    if end <= start:
        return []
    first, _ = schema.extent_range(ino, from_offset=start)
    beyond, last = schema.extent_range(ino, from_offset=end)
    extents = [schema.decode_extent(key, value) for key, value in txn.scan(first, beyond, count)]
    if len(extents) < count:
        for key, value in txn.scan(beyond, last, 1):  # The one that goes on beyond `end`, if it begins before.
            extent = schema.decode_extent(key, value)
            if extent.offset < end:
                extents.append(extent)
    return extents


# --- writing ----------------------------------------------------------------------------------------------------------


def load_file(txn: ReadTxn, ino: int) -> Inode:
    """Raises: NoSuchEntry, IsDirectory, InvalidArgument (neither a file nor a directory)."""
    inode = load(txn, ino)
    if stat.S_ISDIR(inode.mode):
        raise IsDirectory(f"inode {ino}")
    if not stat.S_ISREG(inode.mode):
        raise InvalidArgument(f"inode {ino} is no regular file")
    return inode


def write_inline(
    txn: WriteTxn,
    *,
    ino: int,
    offset: int,
    data: bytes,
    mtime_ns: int,
    keep_privileges: bool,
    now_ns: int,
    data_version: int = -1,
    append: bool = False,
) -> InodeReply:
    """Write `data` at `offset` of a file that is inline or has no bytes yet.

    Args:
        append: `offset` counts from the end of the file.
        mtime_ns: 0: `now_ns`.
        data_version: of the content that `data` repeats between its new bytes; -1: it repeats nothing.

    Raises:
        MovedOutOfLine: it has extents, or the write ends above INLINE_SIZE_MAX, or its content has changed.
        NoSuchEntry, IsDirectory, InvalidArgument, QuotaExceeded.
    """
    inode = load_file(txn, ino)
    is_inline = inode.flags & InodeFlags.INLINE
    if append:
        offset += inode.size
    end = offset + len(data)
    if end > INLINE_SIZE_MAX or (inode.allocated and not is_inline):
        raise MovedOutOfLine(f"inode {ino}")
    if data_version not in (-1, inode.data_version):
        raise MovedOutOfLine(f"inode {ino} has content {inode.data_version}, not {data_version}")
    if not data:
        return InodeReply(ino, inode)
    key = schema.inline_key(ino)
    old = (txn.get(key) or b"") if is_inline else b""
    new = old[:offset].ljust(offset, b"\0") + data + old[end:]
    charge(txn, inode.parent, inodes=0, allocated=len(new) - inode.allocated)
    txn.put(key, new)
    inode = replace(inode, flags=inode.flags | InodeFlags.INLINE, allocated=len(new))
    return written(txn, ino, inode, end, mtime_ns or now_ns, keep_privileges, now_ns)


def commit_extents(
    txn: WriteTxn,
    *,
    ino: int,
    extents: Sequence[Extent],
    slice_sizes: Sequence[tuple[int, int]],
    size_min: int,
    mtime_ns: int,
    inline_moved: bool,
    degraded: Sequence[DegradedBlock],
    keep_privileges: bool,
    now_ns: int,
    data_version: int = -1,
    append: bool = False,
) -> InodeReply:
    """Make durable slices part of a file: each extent replaces what it covers, all of them or none.

    Args:
        extents: ascending, not overlapping.
        append: the offsets of the extents, and `size_min`, count from the end of the file.
        slice_sizes: (slice id, bytes) of every slice that the extents name; none of them was committed before.
        size_min: the size becomes at least this, and at least the end of the last extent.
        mtime_ns: 0: `now_ns`.
        inline_moved: the bytes of an inline file are in the extents; the inline ones are dropped.
        data_version: of the content that is to be changed; with `inline_moved`, of the inline one that the extents
            have; -1: of any.
        degraded: blocks that are short of copies; they are queued for repair.

    Raises:
        MovedOutOfLine: the file is inline and `inline_moved` is False, or it is not the inline one of `data_version`.
        FileTooLarge: an offset above FILE_SIZE_MAX.
        InvalidArgument: the extents, slices or blocks do not fit together, or a slice was committed before.
        ContentChanged: the content is not that of `data_version`.
        ServerOverloaded: dead extents of a long truncation are in the way; ask again.
        QuotaExceeded: the file would cover more than before, and a quota has no room for it.
        NoSuchEntry, IsDirectory.

    Source: decision 0001; invariants M7 to M9.
    """
    inode = load_file(txn, ino)
    is_inline = bool(inode.flags & InodeFlags.INLINE)
    if is_inline and not inline_moved:
        raise MovedOutOfLine(f"inode {ino}")
    if inline_moved and data_version != -1 and not (is_inline and data_version == inode.data_version):
        raise MovedOutOfLine(f"inode {ino} has content {inode.data_version}, not the inline one of {data_version}")
    if append:
        extents = [replace(extent, offset=inode.size + extent.offset) for extent in extents]
        size_min += inode.size
    _check_extents(extents, size_min)
    _check_slices(txn, extents, dict(slice_sizes), len(slice_sizes), degraded)
    if data_version not in (-1, inode.data_version):  # After the slices: a repetition learns that the first was done.
        raise ContentChanged(f"inode {ino} has content {inode.data_version}, not {data_version}")
    end = extents[-1].offset + extents[-1].length if extents else 0
    dropped = finish_truncation(txn, ino, end, now_ns=now_ns)
    allocated = inode.allocated - dropped
    if is_inline:
        txn.delete(schema.inline_key(ino))
        allocated = 0
    references: dict[int, int] = {}
    made: dict[int, int] = {}
    for extent in _merged(extents):
        end_of_extent = extent.offset + extent.length
        allocated += extent.length - cut_out(txn, ino, extent.offset, end_of_extent, references)
        txn.put(schema.extent_key(ino, end_of_extent), schema.encode_extent(extent))
        made[extent.slice_id] = made.get(extent.slice_id, 0) + 1
    for slice_id, size in slice_sizes:
        txn.put(schema.slice_key(slice_id), schema.encode_pair(made[slice_id], size))
    release_slices(txn, references, now_ns=now_ns)
    _queue_for_repair(txn, degraded, now_ns)
    charge(txn, inode.parent, inodes=0, allocated=allocated - inode.allocated)
    inode = replace(inode, flags=inode.flags & ~InodeFlags.INLINE, allocated=allocated)
    return written(txn, ino, inode, max(end, size_min), mtime_ns or now_ns, keep_privileges, now_ns)


def written(
    txn: WriteTxn, ino: int, inode: Inode, end: int, mtime_ns: int, keep_privileges: bool, now_ns: int
) -> InodeReply:
    """Store the attributes of a file whose content was changed up to `end`.

    ctime is the time of the write, as mtime is, and not that of the commit: what a program saw of the file before it
    was flushed stays true.  It never goes back, and never ahead of the clock here.
    """
    if not keep_privileges:
        inode = drop_privileges(txn, ino, inode, Caller())
    inode = replace(
        inode,
        size=max(inode.size, end),
        mtime_ns=mtime_ns,
        ctime_ns=max(inode.ctime_ns, min(mtime_ns, now_ns)),
        version=inode.version + 1,
        data_version=inode.data_version + 1,
    )
    store(txn, ino, inode)
    return InodeReply(ino, inode)


def drop_privileges(txn: WriteTxn, ino: int, inode: Inode, caller: Caller) -> Inode:
    """Without suid, sgid and file capabilities; the caller stores what this returns."""
    if inode.flags & InodeFlags.CAPABILITY:
        stored_xattrs.delete(txn, ino, CAPABILITY_XATTR)
        inode = replace(inode, flags=inode.flags & ~InodeFlags.CAPABILITY)
    mode = without_privileges(inode, caller)
    return inode if mode == inode.mode else replace(inode, mode=mode)


def _check_extents(extents: Sequence[Extent], size_min: int) -> None:
    if size_min > FILE_SIZE_MAX or (extents and extents[-1].offset + extents[-1].length > FILE_SIZE_MAX):
        raise FileTooLarge(f"size {size_min}")
    for before, extent in pairwise(extents):
        if before.offset + before.length > extent.offset:
            raise InvalidArgument(f"extents overlap or do not ascend at offset {extent.offset}")


def _check_slices(
    txn: ReadTxn,
    extents: Sequence[Extent],
    sizes: dict[int, int],
    size_count: int,
    degraded: Sequence[DegradedBlock],
) -> None:
    if size_count != len(sizes) or sizes.keys() != {extent.slice_id for extent in extents}:
        raise InvalidArgument("the sizes are not those of the slices that the extents name")
    for extent in extents:
        if extent.slice_offset + extent.length > sizes[extent.slice_id]:
            raise InvalidArgument(f"an extent goes beyond the end of slice {extent.slice_id}")
    for block in degraded:
        if block.block.index * BLOCK_SIZE_MAX >= sizes.get(block.block.slice_id, 0):
            raise InvalidArgument(f"degraded block {block.block} is none of these slices'")
    next_slice = counter(txn, schema.SLICES_COUNTER)
    for slice_id, size in sizes.items():
        if not 0 < slice_id < next_slice or not 0 < size <= SLICE_SIZE_MAX:
            raise InvalidArgument(f"slice {slice_id} of {size} bytes was never given out")
        if txn.get(schema.slice_key(slice_id)) or txn.get(schema.queued_slice_key(slice_id)):
            raise InvalidArgument(f"slice {slice_id} was committed before")


def _merged(extents: Sequence[Extent]) -> list[Extent]:
    """The same bytes in the fewest extents: neighbours that are neighbours in their slice too become one."""
    merged: list[Extent] = []
    for extent in extents:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.slice_id == extent.slice_id
            and last.offset + last.length == extent.offset
            and last.slice_offset + last.length == extent.slice_offset
        ):
            merged[-1] = replace(last, length=last.length + extent.length)
        else:
            merged.append(extent)
    return merged


def cut_out(txn: WriteTxn, ino: int, start: int, end: int, references: dict[int, int]) -> int:
    """Remove what the file has in [start, end); returns how many bytes that was, and counts references."""
    covered = 0
    for old in extents_between(txn, ino, start, end, count=1 << 62):
        old_end = old.offset + old.length
        txn.delete(schema.extent_key(ino, old_end))
        refer(references, old, -1)
        if old.offset < start:
            put_extent(txn, ino, schema.part_of(old, old.offset, start), references)
        if old_end > end:
            put_extent(txn, ino, schema.part_of(old, end, old_end), references)
        covered += min(old_end, end) - max(old.offset, start)
    return covered


def put_extent(txn: WriteTxn, ino: int, extent: Extent, references: dict[int, int]) -> None:
    """Enter an extent where the file has none, and count its reference."""
    txn.put(schema.extent_key(ino, extent.offset + extent.length), schema.encode_extent(extent))
    refer(references, extent, 1)


def _queue_for_repair(txn: WriteTxn, degraded: Sequence[DegradedBlock], now_ns: int) -> None:
    for block in degraded:
        key = schema.bad_block_key(block.block.slice_id, block.block.index, 0)
        if txn.get(key) is None:
            count(txn, schema.BAD_BLOCKS_COUNTER, 1)
        txn.put(key, schema.encode_record(BadBlockRecord("degraded", now_ns, block.copies)))


# --- truncation -------------------------------------------------------------------------------------------------------


def truncate(txn: WriteTxn, ino: int, inode: Inode, size: int, *, now_ns: int) -> Inode:
    """Make a file's bytes end at `size`; the caller sets times and versions, and stores what this returns.

    Extents and inline bytes beyond `size` are dropped, and never seen again when the file grows.  What is allocated
    beyond the old size stays if the file grows, and goes if it does not (as on ext4).
    """
    if inode.flags & InodeFlags.INLINE:
        return _truncate_inline(txn, ino, inode, size)
    if inode.allocated == 0 or size > inode.size:
        return replace(inode, size=size)
    mark = txn.get(schema.truncation_key(ino))
    if mark is not None and schema.decode_number(mark) <= size:
        return replace(inode, size=size)
    dropped = _trim(txn, ino, size, now_ns=now_ns)
    more, done = drop_extents(txn, ino, size, limit=KEYS_PER_STEP, now_ns=now_ns)
    _mark_truncation(txn, ino, None if done else size, now_ns)
    charge(txn, inode.parent, inodes=0, allocated=-dropped - more)
    return replace(inode, size=size, allocated=inode.allocated - dropped - more)


def _truncate_inline(txn: WriteTxn, ino: int, inode: Inode, size: int) -> Inode:
    key = schema.inline_key(ino)
    data = txn.get(key)
    assert data is not None, f"inode {ino} is INLINE and has no inline data"
    if size >= len(data):
        return replace(inode, size=size)
    flags = inode.flags
    if size:
        txn.put(key, data[:size])
    else:
        txn.delete(key)
        flags &= ~InodeFlags.INLINE
    charge(txn, inode.parent, inodes=0, allocated=size - len(data))
    return replace(inode, size=size, allocated=size, flags=flags)


def _trim(txn: WriteTxn, ino: int, size: int, *, now_ns: int) -> int:
    """Shorten the extent that has bytes on both sides of `size`; returns how many it lost."""
    for key, value in txn.scan(*schema.extent_range(ino, from_offset=size), 1):
        extent = schema.decode_extent(key, value)
        if extent.offset < size:
            references: dict[int, int] = {}
            lost = cut_out(txn, ino, size, extent.offset + extent.length, references)
            release_slices(txn, references, now_ns=now_ns)
            return lost
    return 0


def drop_extents(txn: WriteTxn, ino: int, offset: int, *, limit: int, now_ns: int) -> tuple[int, bool]:
    """Delete up to `limit` extents that begin at or beyond `offset`, which no extent straddles.

    Returns:
        Their bytes, and whether none is left.  The caller takes the bytes off `allocated` and the usage.
    """
    pairs = txn.scan(*schema.extent_range(ino, from_offset=offset), limit + 1)
    dropped = 0
    references: dict[int, int] = {}
    for key, value in pairs[:limit]:
        extent = schema.decode_extent(key, value)
        assert extent.offset >= offset, f"inode {ino}: an extent straddles {offset}"
        txn.delete(key)
        dropped += extent.length
        refer(references, extent, -1)
    release_slices(txn, references, now_ns=now_ns)
    return dropped, len(pairs) <= limit


def _mark_truncation(txn: WriteTxn, ino: int, dead_from: int | None, now_ns: int) -> None:
    """Set the mark, and queue the work; None: it is done."""
    if dead_from is None:
        if txn.delete(schema.truncation_key(ino)):
            dequeue(txn, schema.queued_truncation_key(ino))
    else:
        txn.put(schema.truncation_key(ino), schema.encode_u64(dead_from))
        enqueue(txn, schema.queued_truncation_key(ino), schema.encode_time(now_ns))


def finish_truncation(txn: WriteTxn, ino: int, end: int, *, now_ns: int) -> int:
    """Before extents up to `end` become live: delete the dead ones if some are below; returns their bytes.

    Raises:
        ServerOverloaded: there are more than one transaction should delete; the deletion queue is at it.
    """
    mark = txn.get(schema.truncation_key(ino))
    if mark is None or end <= schema.decode_number(mark):
        return 0
    dead_from = schema.decode_number(mark)
    if len(txn.scan(*schema.extent_range(ino, from_offset=dead_from), KEYS_PER_STEP + 1)) > KEYS_PER_STEP:
        raise ServerOverloaded(f"a long truncation of inode {ino} is still being carried out")
    dropped, _ = drop_extents(txn, ino, dead_from, limit=KEYS_PER_STEP, now_ns=now_ns)
    _mark_truncation(txn, ino, None, now_ns)
    return dropped


def continue_truncation(txn: WriteTxn, ino: int, *, now_ns: int) -> None:
    """One step of the deletion queue on a file with dead extents."""
    mark = txn.get(schema.truncation_key(ino))
    assert mark is not None, f"inode {ino} is queued for truncation without a mark"
    inode = load(txn, ino)
    dropped, done = drop_extents(txn, ino, schema.decode_number(mark), limit=KEYS_PER_STEP, now_ns=now_ns)
    if done:
        _mark_truncation(txn, ino, None, now_ns)
    charge(txn, inode.parent, inodes=0, allocated=-dropped)
    store(txn, ino, replace(inode, allocated=inode.allocated - dropped, version=inode.version + 1))
