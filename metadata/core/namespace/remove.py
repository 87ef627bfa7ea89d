"""Taking names away: unlink, rmdir, and what becomes of an inode that has lost one."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace.held import hold
from metadata.core.namespace.inodes import (
    Charges,
    charge,
    destroy,
    enter,
    load,
    load_usage,
    settle,
    store,
    store_directory,
    touched,
)
from metadata.core.namespace.permissions import require_removable
from metadata.core.opens import Opens
from metadata.core.schema import Inode
from metadata.engine.ports import WriteTxn
from metadata.protocol import Caller, Removed
from wire.errors import InvalidArgument, IsDirectory, NoSuchEntry, NotDirectory, NotEmpty, StaleInode

_NOT_UNLINKED = {b"": NoSuchEntry, b".": IsDirectory, b"..": IsDirectory}
_NOT_A_DIRECTORY_TO_REMOVE = {b"": NoSuchEntry, b".": InvalidArgument, b"..": NotEmpty}


def unlink(
    txn: WriteTxn,
    *,
    session: int,
    parent: int,
    name: bytes,
    closed_ino: int,
    caller: Caller,
    opens: Opens,
    now_ns: int,
) -> Removed:
    """Remove the name of a file.

    If it was the last one, all sessions that have the inode open hold it, and `session` too unless it is `closed_ino`;
    without any, it goes at once.  If it has names elsewhere, and none in the directory that it is charged to, it
    becomes charged to one of those, quota or not.

    Raises:
        NoSuchEntry, NotDirectory, IsDirectory, AccessDenied, NotPermitted (sticky), NameTooLong, InvalidArgument.

    Source: POSIX.1-2024 unlink(); Linux may_delete; invariants M3 to M6.
    """
    directory, ino = enter(txn, parent, name, caller, _NOT_UNLINKED)
    if not ino:
        raise NoSuchEntry(f"{name!r} in directory {parent}")
    inode = load(txn, ino)
    require_removable(txn, parent, directory, ino, inode, caller)
    if stat.S_ISDIR(inode.mode):
        raise IsDirectory(f"{name!r} in directory {parent}")
    txn.delete(schema.dirent_key(parent, name))
    directory = touched(directory, entries=-1, subdirectories=0, now_ns=now_ns)
    store_directory(txn, parent, directory)
    charges: Charges = []
    removed = drop_name(
        txn, ino, inode, parent, charges, session=session, closed_ino=closed_ino, opens=opens, now_ns=now_ns
    )
    settle(txn, charges, forced=True)
    return replace(removed, parent=directory)


def remove_directory(
    txn: WriteTxn, *, parent: int, name: bytes, expected_ino: int = 0, caller: Caller, now_ns: int
) -> Removed:
    """Remove an empty directory.

    Args:
        expected_ino: the one that is meant; 0: whatever has the name.

    Raises:
        StaleInode: the name is not that of `expected_ino`.
        NotEmpty, NoSuchEntry, NotDirectory, AccessDenied, NotPermitted (sticky), NameTooLong, InvalidArgument (".").
    """
    directory, ino = enter(txn, parent, name, caller, _NOT_A_DIRECTORY_TO_REMOVE)
    if not ino:
        raise NoSuchEntry(f"{name!r} in directory {parent}")
    require_expected(ino, expected_ino, name, parent)
    inode = load(txn, ino)
    require_removable(txn, parent, directory, ino, inode, caller)
    if not stat.S_ISDIR(inode.mode):
        raise NotDirectory(f"{name!r} in directory {parent}")
    if inode.size:
        raise NotEmpty(f"{name!r} in directory {parent}")
    txn.delete(schema.dirent_key(parent, name))
    directory = touched(directory, entries=-1, subdirectories=-1, now_ns=now_ns)
    store_directory(txn, parent, directory)
    charge(txn, parent, inodes=-1, allocated=0)
    return replace(drop_directory(txn, ino, now_ns=now_ns), parent=directory)


def require_expected(ino: int, expected_ino: int, name: bytes, parent: int) -> None:
    """Refuse to change another inode than the client's kernel will take for changed.  Raises: StaleInode."""
    if expected_ino and ino != expected_ino:
        raise StaleInode(f"{name!r} in directory {parent} was inode {expected_ino}, and is {ino or 'gone'}")


def drop_directory(txn: WriteTxn, ino: int, *, now_ns: int) -> Removed:
    """End an empty directory whose entry is gone, and which is charged to nobody any more."""
    *_, limited = load_usage(txn, ino)
    if limited:
        txn.delete(schema.quota_key(ino))
    destroy(txn, ino, now_ns=now_ns)
    return Removed(ino, 0, False, now_ns)


def drop_name(
    txn: WriteTxn,
    ino: int,
    inode: Inode,
    parent: int,
    charges: Charges,
    *,
    session: int,
    closed_ino: int,
    opens: Opens,
    now_ns: int,
) -> Removed:
    """Account for a name of a file that has gone from `parent`; the entry itself is the caller's.

    Args:
        charges: gets what changes in usage; the caller settles it.
    """
    if inode.nlink > 1:
        inode = replace(inode, nlink=inode.nlink - 1, ctime_ns=now_ns, version=inode.version + 1)
        store(txn, ino, forget_name_in(txn, ino, inode, parent, charges))
        return Removed(ino, inode.nlink, False, now_ns)
    charges.append((inode.parent, -1, -inode.allocated))
    holders = opens.of_inode(ino, asking=session)
    if ino == closed_ino:
        holders.discard(session)
    else:
        holders.add(session)
    if not holders:
        destroy(txn, ino, now_ns=now_ns)
        return Removed(ino, 0, False, now_ns)
    inode = replace(inode, nlink=0, parent=0, ctime_ns=now_ns, version=inode.version + 1)
    store(txn, ino, inode)
    for holder in holders:
        hold(txn, ino, session=holder, now_ns=now_ns)
    return Removed(ino, 0, session in holders, now_ns)


def forget_name_in(txn: WriteTxn, ino: int, inode: Inode, parent: int, charges: Charges, *, heir: int = 0) -> Inode:
    """Take one name in `parent` out of the back-links; the inode, charged to a directory where it has a name.

    Args:
        inode: its attributes with the new nlink, at least 1; the caller stores what this returns.
        charges: gets what changes in usage; the caller settles it.
        heir: a directory where it has a name, to be charged if none is left in `parent`; 0: any.
    """
    key = schema.link_key(ino, parent)
    raw = txn.get(key)
    assert raw is not None, f"inode {ino} has several names and no back-link to {parent}"
    names = schema.decode_number(raw) - 1
    if names:
        txn.put(key, schema.encode_u32(names))
    else:
        txn.delete(key)
    if inode.nlink > 1 and (names or inode.parent != parent):
        return inode
    left = txn.scan(*schema.link_range(ino), 1)[0][0]
    if inode.nlink == 1:
        txn.delete(left)
    return move_charge(inode, heir or schema.decode_link_key(left), charges)


def move_charge(inode: Inode, directory: int, charges: Charges) -> Inode:
    """Charge a file to another directory; the caller stores what this returns, and settles `charges`."""
    if inode.parent == directory:
        return inode
    charges.append((inode.parent, -1, -inode.allocated))
    charges.append((directory, 1, inode.allocated))
    return replace(inode, parent=directory)


def move_directory(txn: WriteTxn, ino: int, inode: Inode, directory: int, charges: Charges) -> Inode:
    """Charge a directory and the tree below it to another directory; as `move_charge`."""
    parent, inodes, allocated, limited = load_usage(txn, ino)
    txn.put(schema.usage_key(ino), schema.encode_usage(directory, inodes, allocated, limited))
    charges.append((parent, -1 - inodes, -allocated))
    charges.append((directory, 1 + inodes, allocated))
    return replace(inode, parent=directory)
