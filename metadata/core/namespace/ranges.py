"""Ranges of a file that change without bytes being written: allocate, punch, zero, and copies that share blocks.

Each call does at most EXTENTS_PER_STEP extents' worth of work and tells how far it came; whoever wants more asks again.
After every call the file is sound, so a caller who dies in between leaves what a shorter call would have made.

Source: fallocate(2), copy_file_range(2); where they leave something open, what ext4 does; decision 0008.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace.data import (
    cut_out,
    extents_between,
    finish_truncation,
    load_file,
    put_extent,
    written,
)
from metadata.core.namespace.inodes import charge, release_slices
from metadata.core.namespace.permissions import FROZEN, IMMUTABLE
from metadata.core.schema import FILE_SIZE_MAX, INLINE_SIZE_MAX, SLICE_SIZE_MAX, ZEROS_SLICE, Extent, Inode, InodeFlags
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import RangeDone, RangeOperation
from wire.errors import FileTooLarge, InvalidArgument, MovedOutOfLine, NotPermitted, NotSupported

EXTENTS_PER_STEP = 1024
"""Extents that one call reads of a file, removes or makes: about 10 ms of the writer's time."""


def change_range(
    txn: WriteTxn,
    *,
    ino: int,
    operation: RangeOperation,
    offset: int,
    length: int,
    keep_size: bool,
    keep_privileges: bool,
    now_ns: int,
) -> RangeDone:
    """fallocate: the bytes [offset, offset + length) are allocated, become a hole, or become allocated zeros.

    Args:
        length: at least 1.
        keep_size: the size stays; what is allocated beyond it is there when the file grows.
        keep_privileges: suid, sgid and capabilities stay.

    Returns:
        The attributes, and how many bytes from `offset` on are done.

    Raises:
        FileTooLarge: the range ends above FILE_SIZE_MAX.
        MovedOutOfLine: the file is inline, and what is asked for cannot be.
        ServerOverloaded: dead extents of a long truncation are in the way; ask again.
        QuotaExceeded: more would be allocated than before, and a quota has no room for it.
        NotPermitted: it is immutable; or append-only, and it is not asked for space alone.
        NoSuchEntry, IsDirectory, InvalidArgument: as load_file.  In all cases nothing was changed.
    """
    inode = load_file(txn, ino)
    if inode.flags & FROZEN and (inode.flags & IMMUTABLE or operation is not RangeOperation.ALLOCATE):
        raise NotPermitted(f"inode {ino} is immutable or append-only")
    end = offset + length
    if end > FILE_SIZE_MAX:
        raise FileTooLarge(f"{offset} + {length} bytes")
    grows = not keep_size and operation is not RangeOperation.PUNCH
    size = max(inode.size, end) if grows else inode.size
    if _is_small(inode, operation, end, size):
        inode = _change_inline(txn, ino, inode, operation, offset, end)
        done = length
    else:
        inode, done = _change_extents(txn, ino, inode, operation, offset, end, now_ns)
    reached = offset + done if grows else 0
    inode = written(txn, ino, inode, reached, now_ns, keep_privileges, now_ns).inode
    return RangeDone(ino, inode, done)


def bytes_missing(txn: ReadTxn, *, ino: int, offset: int, length: int) -> int:
    """How many bytes of a range are not allocated, at least: of long lists the rest is taken to be.

    Raises: NoSuchEntry, IsDirectory, InvalidArgument, as load_file.
    """
    inode = load_file(txn, ino)
    end = offset + length
    if inode.flags & InodeFlags.INLINE:
        return max(end - max(offset, inode.allocated), 0)
    extents = extents_between(txn, ino, offset, end, count=EXTENTS_PER_STEP)
    if len(extents) == EXTENTS_PER_STEP:
        end = min(end, extents[-1].offset + extents[-1].length)
    return end - offset - sum(min(e.offset + e.length, end) - max(e.offset, offset) for e in extents)


# --- inline bytes -----------------------------------------------------------------------------------------------------


def _is_small(inode: Inode, operation: RangeOperation, end: int, size: int) -> bool:
    """Whether the inline bytes are to be changed, which end within INLINE_SIZE_MAX and the size (M11)."""
    fits = operation is RangeOperation.PUNCH or end <= min(INLINE_SIZE_MAX, size)
    if inode.flags & InodeFlags.INLINE:
        if not fits:
            raise MovedOutOfLine("inline bytes cannot be allocated so far")
        return True
    return fits and not inode.allocated and operation is not RangeOperation.PUNCH


def _change_inline(txn: WriteTxn, ino: int, inode: Inode, operation: RangeOperation, offset: int, end: int) -> Inode:
    old = txn.get(schema.inline_key(ino)) or b""
    if operation is RangeOperation.ALLOCATE:
        new = old.ljust(end, b"\0")
    elif operation is RangeOperation.ZERO:
        new = old[:offset].ljust(end, b"\0") + old[end:]
    elif end >= len(old):
        new = old[:offset]
    else:
        new = old[:offset].ljust(end, b"\0") + old[end:]
    return _put_inline(txn, ino, inode, new)


def _put_inline(txn: WriteTxn, ino: int, inode: Inode, data: bytes) -> Inode:
    """Store inline bytes, which may be none; the caller stores the attributes."""
    if data:
        txn.put(schema.inline_key(ino), data)
        flags = inode.flags | InodeFlags.INLINE
    else:
        txn.delete(schema.inline_key(ino))
        flags = inode.flags & ~InodeFlags.INLINE
    charge(txn, inode.parent, inodes=0, allocated=len(data) - inode.allocated)
    return replace(inode, flags=flags, allocated=len(data))


# --- extents ----------------------------------------------------------------------------------------------------------


def _change_extents(
    txn: WriteTxn, ino: int, inode: Inode, operation: RangeOperation, offset: int, end: int, now_ns: int
) -> tuple[Inode, int]:
    """Returns the attributes, not yet stored, and how many bytes from `offset` on are done."""
    references: dict[int, int] = {}
    dropped = 0
    if operation is not RangeOperation.PUNCH:
        dropped = finish_truncation(txn, ino, end, now_ns=now_ns)
    allocated = inode.allocated - dropped
    if operation is RangeOperation.ALLOCATE:
        gaps, until = _gaps(txn, ino, offset, end)
    else:
        until = _bounded(txn, ino, offset, end)
        if operation is RangeOperation.ZERO:
            until = min(until, offset + EXTENTS_PER_STEP * SLICE_SIZE_MAX)
        allocated -= cut_out(txn, ino, offset, until, references)
        gaps = [] if operation is RangeOperation.PUNCH else [(offset, until)]
    for zeros in _zeros(gaps):
        allocated += zeros.length
        _put_zeros(txn, ino, zeros, references)
    release_slices(txn, references, now_ns=now_ns)
    charge(txn, inode.parent, inodes=0, allocated=allocated - inode.allocated)
    return replace(inode, allocated=allocated), until - offset


def _bounded(txn: ReadTxn, ino: int, start: int, end: int) -> int:
    """Where a step over [start, end) ends, so that it meets at most EXTENTS_PER_STEP extents."""
    extents = extents_between(txn, ino, start, end, count=EXTENTS_PER_STEP)
    return end if len(extents) < EXTENTS_PER_STEP else min(end, extents[-1].offset + extents[-1].length)


def _gaps(txn: ReadTxn, ino: int, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
    """The holes of [start, end), as far as one step goes, and where it ends."""
    extents = extents_between(txn, ino, start, end, count=EXTENTS_PER_STEP)
    until = end if len(extents) < EXTENTS_PER_STEP else min(end, extents[-1].offset + extents[-1].length)
    gaps: list[tuple[int, int]] = []
    at, room = start, EXTENTS_PER_STEP * SLICE_SIZE_MAX
    for extent in (*extents, Extent(until, 1, ZEROS_SLICE, 0)):
        stop = min(extent.offset, until)
        if stop > at:
            size = min(stop - at, room)
            gaps.append((at, at + size))
            room -= size
            if room == 0:
                return gaps, at + size
        at = max(at, extent.offset + extent.length)
    return gaps, until


def _zeros(gaps: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """The gaps as extents of zeros."""
    for start, end in gaps:
        for at in range(start, end, SLICE_SIZE_MAX):
            yield Extent(at, min(SLICE_SIZE_MAX, end - at), ZEROS_SLICE, 0)


def _put_zeros(txn: WriteTxn, ino: int, zeros: Extent, references: dict[int, int]) -> None:
    """Enter an extent of zeros, as one with its neighbour before it if that is one too.

    Programs that extend a file bit by bit (databases do) would else leave a trail of short ones.
    """
    raw = txn.get(schema.extent_key(ino, zeros.offset))
    if raw is not None:
        before = schema.decode_extent(schema.extent_key(ino, zeros.offset), raw)
        if before.slice_id == ZEROS_SLICE and before.length + zeros.length <= SLICE_SIZE_MAX:
            cut_out(txn, ino, before.offset, zeros.offset, references)
            zeros = Extent(before.offset, before.length + zeros.length, ZEROS_SLICE, 0)
    put_extent(txn, ino, zeros, references)


# --- copies -----------------------------------------------------------------------------------------------------------


def copy_range(
    txn: WriteTxn,
    *,
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    length: int,
    keep_privileges: bool,
    now_ns: int,
) -> RangeDone:
    """Make `length` bytes of `target` the same as those of `source`, which may be one file, by sharing blocks.

    Holes of the source, and what is allocated there without bytes, become holes.  The slices get another reference for
    each new extent; a slice that is queued for deletion cannot be met, as no extent refers to it.

    Returns:
        The target's attributes, and how many bytes were copied: 0 at the end of the source.

    Raises:
        InvalidArgument: the ranges overlap; or as load_file.
        FileTooLarge: the target's range ends above FILE_SIZE_MAX.
        MovedOutOfLine: the target is inline, the source is not.
        NotSupported: the source is inline, and the target has extents or would become too long to be inline; or the
            files have unlike numbers of copies, by which their blocks are found.
        ServerOverloaded: dead extents of a long truncation are in the way; ask again.
        NotPermitted: the target is immutable.
        QuotaExceeded, NoSuchEntry, IsDirectory.  In all cases nothing was changed.
    """
    from_, to = load_file(txn, source), load_file(txn, target)
    if to.flags & IMMUTABLE:
        raise NotPermitted(f"inode {target} is immutable")
    if target_offset + length > FILE_SIZE_MAX:
        raise FileTooLarge(f"{target_offset} + {length} bytes")
    if source == target and abs(source_offset - target_offset) < length:
        raise InvalidArgument(f"ranges of {length} bytes at {source_offset} and {target_offset} overlap")
    if from_.replicas != to.replicas:
        raise NotSupported(f"inode {source} has {from_.replicas} copies, inode {target} {to.replicas}")
    length = min(length, from_.size - source_offset)
    if length <= 0:
        return RangeDone(target, to, 0)
    if from_.flags & InodeFlags.INLINE:
        to = _copy_inline(txn, source, source_offset, target, to, target_offset, length)
        done = length
    elif to.flags & InodeFlags.INLINE:
        raise MovedOutOfLine(f"inode {target}")
    else:
        to, done = _copy_extents(txn, source, source_offset, target, to, target_offset, length, now_ns)
    to = written(txn, target, to, target_offset + done, now_ns, keep_privileges, now_ns).inode
    return RangeDone(target, to, done)


def _copy_inline(
    txn: WriteTxn, source: int, source_offset: int, target: int, to: Inode, target_offset: int, length: int
) -> Inode:
    end = target_offset + length
    if end > INLINE_SIZE_MAX or (to.allocated and not to.flags & InodeFlags.INLINE):
        raise NotSupported(f"inode {source} is inline and inode {target} would not be")
    data = (txn.get(schema.inline_key(source)) or b"")[source_offset : source_offset + length]
    old = txn.get(schema.inline_key(target)) or b""
    new = old[:target_offset].ljust(target_offset, b"\0") + data.ljust(length, b"\0") + old[end:]
    return _put_inline(txn, target, to, new)


def _copy_extents(
    txn: WriteTxn,
    source: int,
    source_offset: int,
    target: int,
    to: Inode,
    target_offset: int,
    length: int,
    now_ns: int,
) -> tuple[Inode, int]:
    """Returns the target's attributes, not yet stored, and how many bytes were copied."""
    copies, done = _readable(txn, source, source_offset, length)
    done = _bounded(txn, target, target_offset, target_offset + done) - target_offset
    dropped = finish_truncation(txn, target, target_offset + done, now_ns=now_ns)
    references: dict[int, int] = {}
    allocated = to.allocated - dropped
    allocated -= cut_out(txn, target, target_offset, target_offset + done, references)
    shift, until = target_offset - source_offset, source_offset + done
    for extent in copies:
        if extent.offset >= until:
            break
        end = min(extent.offset + extent.length, until)
        copy = schema.part_of(extent, max(extent.offset, source_offset), end)
        put_extent(txn, target, replace(copy, offset=copy.offset + shift), references)
        allocated += copy.length
    release_slices(txn, references, now_ns=now_ns)
    charge(txn, to.parent, inodes=0, allocated=allocated - to.allocated)
    return replace(to, allocated=allocated), done


def _readable(txn: ReadTxn, ino: int, offset: int, length: int) -> tuple[list[Extent], int]:
    """The extents with bytes in a range, as far as one step goes, and how many bytes of the range that is."""
    mark = txn.get(schema.truncation_key(ino))
    end = offset + length
    live_end = end if mark is None else min(end, schema.decode_number(mark))
    extents = extents_between(txn, ino, offset, live_end, count=EXTENTS_PER_STEP)
    if len(extents) == EXTENTS_PER_STEP:
        end = min(end, extents[-1].offset + extents[-1].length)
    return [extent for extent in extents if extent.slice_id != ZEROS_SLICE], end - offset
