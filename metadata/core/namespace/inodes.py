"""What all operations share: attributes, directory entries, usage, counters, and the end of an inode."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import TypeAlias

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace.permissions import SEARCH, check_name, in_group, require
from metadata.core.schema import Extent, Inode
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller
from wire.errors import NoSuchEntry, NotDirectory, QuotaExceeded, StoreError

KEYS_PER_STEP = 1024
"""Keys of a dying inode, or dead extents, that one transaction deletes: about 10 ms of work."""

_EXTENT_TAG = ord("E")
_TAG_AT = 9  # Where in a key of an inode its tag is.


# --- attributes -------------------------------------------------------------------------------------------------------


def load(txn: ReadTxn, ino: int) -> Inode:
    """Raises: NoSuchEntry."""
    raw = txn.get(schema.inode_key(ino))
    if raw is None:
        raise NoSuchEntry(f"inode {ino}")
    return schema.decode_inode(raw)


def load_directory(txn: ReadTxn, ino: int) -> Inode:
    """Raises: NoSuchEntry, NotDirectory."""
    inode = load(txn, ino)
    if not stat.S_ISDIR(inode.mode):
        raise NotDirectory(f"inode {ino}")
    return inode


def store(txn: WriteTxn, ino: int, inode: Inode) -> None:
    """Write attributes; the caller has raised the version."""
    txn.put(schema.inode_key(ino), schema.encode_record(inode))


def store_directory(txn: WriteTxn, ino: int, directory: Inode) -> None:
    """As `store`, after a change of entries: many operations of one transaction may change those of one directory."""
    txn.put_often(schema.inode_key(ino), schema.encode_record(directory))


def touched(directory: Inode, *, entries: int, subdirectories: int, now_ns: int) -> Inode:
    """A directory after its entries changed in number by `entries`, of which directories by `subdirectories`."""
    return replace(
        directory,
        size=directory.size + entries,
        nlink=directory.nlink + subdirectories,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        version=directory.version + 1,
        data_version=directory.data_version + 1,
    )


def without_privileges(inode: Inode, caller: Caller) -> int:
    """The mode after a change by somebody without privileges.

    suid goes, and sgid if the group may execute it, or if `caller` is outside the group (Linux
    setattr_should_drop_sgid).
    """
    mode = inode.mode & ~stat.S_ISUID
    stranger = caller.check and caller.uid != 0 and not in_group(caller, inode.gid)
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP or stranger else mode


# --- directory entries ------------------------------------------------------------------------------------------------


def enter(
    txn: ReadTxn, parent: int, name: bytes, caller: Caller, special: Mapping[bytes, type[StoreError]]
) -> tuple[Inode, int]:
    """Walk into `parent` and look for `name`.

    Args:
        special: what "", "." and ".." are refused with here.

    Returns:
        The directory's attributes, and the inode number of the entry, 0 if there is none.

    Raises:
        NoSuchEntry, NotDirectory: of `parent`.
        AccessDenied: `parent` may not be searched.
        NameTooLong, InvalidArgument, or one of `special`.
    """
    directory = load_directory(txn, parent)
    require(txn, parent, directory, caller, SEARCH)
    if name in special:
        raise special[name](f"{name!r} in directory {parent}")
    check_name(name)
    raw = txn.get(schema.dirent_key(parent, name))
    return directory, 0 if raw is None else schema.decode_dirent(raw)[0]


def put_entry(txn: WriteTxn, parent: int, name: bytes, ino: int, mode: int) -> None:
    """Write a directory entry; the caller writes the directory's attributes."""
    txn.put(schema.dirent_key(parent, name), schema.encode_dirent(ino, mode))


# --- usage and counters -----------------------------------------------------------------------------------------------


Charges: TypeAlias = list[tuple[int, int, int]]
"""Changes of usage that belong together: (directory, inodes, allocated) each, as for `charge`."""


def charge(txn: WriteTxn, directory: int, *, inodes: int, allocated: int) -> None:
    """Add to the usage of a directory and of all above it; 0 is nobody (an inode without a name).

    Every change of usage goes through here or through `settle`.

    Raises:
        QuotaExceeded: this is growth, and a quota of one of these directories has no room for it; nothing was written
            here, but the caller may have written before: see the package.

    Source: decision 0010; invariant M10.
    """
    if inodes == 0 and allocated == 0:
        return
    sums = []
    while directory:
        key = schema.usage_key(directory)
        raw = txn.get(key)
        assert raw is not None, f"directory {directory} has no usage"
        parent, old_inodes, old_allocated, limited = schema.decode_usage(raw)
        if limited:
            _require_room(txn, directory, old_inodes, old_allocated, inodes, allocated)
        sums.append((key, schema.encode_usage(parent, old_inodes + inodes, old_allocated + allocated, limited)))
        directory = parent
    for key, value in sums:
        txn.put_often(key, value)


def settle(txn: WriteTxn, charges: Charges, *, forced: bool = False) -> None:
    """Make several charges as one: only what they do together to a directory counts, for its quota too.

    Args:
        forced: the quotas are not asked, because what is done must not fail.

    Raises:
        QuotaExceeded: as `charge`.
    """
    if len(charges) == 1 and (not forced or charges[0][1] < 0):
        directory, inodes, allocated = charges[0]
        charge(txn, directory, inodes=inodes, allocated=allocated)
        return
    changes = _net(txn, charges) if forced else check_room(txn, charges)
    for directory, (inodes, allocated) in changes.items():
        key = schema.usage_key(directory)
        parent, old_inodes, old_allocated, limited = load_usage(txn, directory)
        txn.put_often(key, schema.encode_usage(parent, old_inodes + inodes, old_allocated + allocated, limited))


def check_room(txn: ReadTxn, charges: Charges) -> dict[int, tuple[int, int]]:
    """Check that the quotas have room for charges; returns what they do to each directory.  Raises: QuotaExceeded."""
    changes = _net(txn, charges)
    for directory, (inodes, allocated) in changes.items():
        _, old_inodes, old_allocated, limited = load_usage(txn, directory)
        if limited:
            _require_room(txn, directory, old_inodes, old_allocated, inodes, allocated)
    return changes


def _require_room(txn: ReadTxn, directory: int, used_inodes: int, used_bytes: int, inodes: int, allocated: int) -> None:
    """Check growth against the quota of one directory; what shrinks or stays is never refused."""
    bytes_max, inodes_max = load_quota(txn, directory)
    if 0 < inodes_max < used_inodes + inodes and inodes > 0:
        raise QuotaExceeded(f"directory {directory} may have {inodes_max} inodes below it, and has {used_inodes}")
    if 0 < bytes_max < used_bytes + allocated and allocated > 0:
        raise QuotaExceeded(f"directory {directory} may have {bytes_max} bytes below it, and has {used_bytes}")


def load_quota(txn: ReadTxn, directory: int) -> tuple[int, int]:
    """The quota of a directory that is limited: (bytes, inodes), 0 for no limit."""
    raw = txn.get(schema.quota_key(directory))
    assert raw is not None, f"directory {directory} is limited and has no quota"
    return schema.decode_pair(raw)


def _net(txn: ReadTxn, charges: Charges) -> dict[int, tuple[int, int]]:
    """What charges do to each directory: (inodes, allocated) by directory, without those to which they do nothing."""
    sums: dict[int, tuple[int, int]] = {}
    parents: dict[int, int] = {}
    for start, inodes, allocated in charges:
        directory = start
        while directory:
            if directory not in parents:
                parents[directory] = load_usage(txn, directory)[0]
                sums[directory] = (0, 0)
            before = sums[directory]
            sums[directory] = (before[0] + inodes, before[1] + allocated)
            directory = parents[directory]
    return {directory: both for directory, both in sums.items() if both != (0, 0)}


def load_usage(txn: ReadTxn, directory: int) -> tuple[int, int, int, int]:
    """Usage of the tree below a directory: (parent, inodes, allocated, limited); see schema.encode_usage."""
    raw = txn.get(schema.usage_key(directory))
    assert raw is not None, f"directory {directory} has no usage"
    return schema.decode_usage(raw)


def counter(txn: ReadTxn, key: bytes) -> int:
    """The value of a counter."""
    raw = txn.get(key)
    assert raw is not None, f"counter {key!r} is missing: the store was not formatted"
    return schema.decode_number(raw)


def count(txn: WriteTxn, key: bytes, delta: int) -> int:
    """Add to a counter; returns its old value."""
    old = counter(txn, key)
    txn.put_often(key, schema.encode_u64(old + delta))
    return old


def count_inodes(txn: WriteTxn, *, made: int, gone: int) -> int:
    """Take `made` inode numbers and let go of `gone` inodes; returns the first number taken."""
    raw = txn.get(schema.INODES_COUNTER)
    assert raw is not None, "the store was not formatted"
    first, existing = schema.decode_pair(raw)
    txn.put_often(schema.INODES_COUNTER, schema.encode_pair(first + made, existing + made - gone))
    return first


def enqueue(txn: WriteTxn, key: bytes, value: bytes) -> None:
    """Put an entry into the deletion queue, or replace it."""
    if txn.get(key) is None:
        count(txn, schema.QUEUE_COUNTER, 1)
    txn.put(key, value)


def dequeue(txn: WriteTxn, key: bytes) -> None:
    """Take an entry out of the deletion queue, if it is there."""
    if txn.delete(key):
        count(txn, schema.QUEUE_COUNTER, -1)


# --- slices -----------------------------------------------------------------------------------------------------------


def refer(references: dict[int, int], extent: Extent, change: int) -> None:
    """Note for `release_slices` that there is one extent more (1) or less (-1) of this slice.

    What is in two extents instead of one is noted as two more and one less.  Of ZEROS_SLICE the bytes are counted.
    """
    if extent.slice_id == schema.ZEROS_SLICE:
        change *= extent.length
    references[extent.slice_id] = references.get(extent.slice_id, 0) + change


def release_slices(txn: WriteTxn, references: Mapping[int, int], *, now_ns: int) -> None:
    """Add to the reference counts of slices; one that falls to 0 goes to the deletion queue.

    Args:
        references: slice id to change of its count, as `refer` has noted them.
    """
    for slice_id, delta in references.items():
        if delta == 0:
            continue
        if slice_id == schema.ZEROS_SLICE:
            txn.put(schema.ZEROS_COUNTER, schema.encode_u64(zeros_allocated(txn) + delta))
            continue
        key = schema.slice_key(slice_id)
        raw = txn.get(key)
        assert raw is not None, f"slice {slice_id} is referred to and has no record"
        references_now, size = schema.decode_pair(raw)
        assert references_now + delta >= 0, f"slice {slice_id} is referred to {references_now} times"
        if references_now + delta > 0:
            txn.put(key, schema.encode_pair(references_now + delta, size))
        else:
            txn.delete(key)
            enqueue(txn, schema.queued_slice_key(slice_id), schema.encode_pair(size, now_ns))


def zeros_allocated(txn: ReadTxn) -> int:
    """Bytes that are allocated and not written, of all files."""
    return schema.decode_number(txn.get(schema.ZEROS_COUNTER) or b"")


# --- the end of an inode ----------------------------------------------------------------------------------------------


def destroy(txn: WriteTxn, ino: int, *, now_ns: int) -> None:
    """End an inode that has no name, and is charged to nobody: at once if it is small, else by the deletion queue."""
    txn.delete(schema.inode_key(ino))
    count_inodes(txn, made=0, gone=1)
    if not delete_keys(txn, ino, limit=KEYS_PER_STEP, now_ns=now_ns):
        enqueue(txn, schema.queued_inode_key(ino), schema.encode_time(now_ns))
    dequeue(txn, schema.queued_truncation_key(ino))


def delete_keys(txn: WriteTxn, ino: int, *, limit: int, now_ns: int) -> bool:
    """Delete up to `limit` keys of an inode that has ended; True when none is left."""
    pairs = txn.scan(*schema.inode_range(ino), limit + 1)
    references: dict[int, int] = {}
    for key, value in pairs[:limit]:
        txn.delete(key)
        if key[_TAG_AT] == _EXTENT_TAG:
            refer(references, schema.decode_extent(key, value), -1)
    release_slices(txn, references, now_ns=now_ns)
    return len(pairs) <= limit
