"""rename, exchange, and the whiteout that overlayfs wants left behind.

Source: POSIX.1-2024 rename(); renameat2(2); the order of checks is that of Linux do_renameat2, vfs_rename, ext4_rename.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace.inodes import (
    Charges,
    check_room,
    load,
    load_directory,
    put_entry,
    settle,
    store,
    store_directory,
    touched,
)
from metadata.core.namespace.new_inode import new_inode
from metadata.core.namespace.permissions import SEARCH, WRITE, check_name, require, require_removable
from metadata.core.namespace.remove import (
    drop_directory,
    drop_name,
    forget_name_in,
    move_charge,
    move_directory,
    require_expected,
)
from metadata.core.opens import Opens
from metadata.core.schema import ROOT_INO, Inode
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller, Removed, RenameDone, RenameFlags
from wire.errors import (
    Busy,
    EntryExists,
    InvalidArgument,
    IsDirectory,
    NoSuchEntry,
    NotDirectory,
    NotEmpty,
    StoreError,
)

_FLAGS = int(
    RenameFlags.NOREPLACE | RenameFlags.EXCHANGE | RenameFlags.WHITEOUT
)  # "~" of an enumeration has no others.
_NOTHING_REMOVED = Removed(0, 0, False)


@dataclass(frozen=True)
class _Place:
    """A name in a directory, and what is there."""

    parent: int
    directory: Inode
    name: bytes
    ino: int  # 0: nothing.
    inode: Inode | None

    @property
    def is_directory(self) -> bool:
        return self.inode is not None and stat.S_ISDIR(self.inode.mode)


@dataclass
class _Charges:
    """What a rename does to usage."""

    made: Charges = field(default_factory=list)
    imagined: list[Charges] = field(default_factory=list)
    """Of files with several names that stay charged to where they are: quotas must have room for them as link asks."""

    def settle(self, txn: WriteTxn) -> None:
        """Raises: QuotaExceeded."""
        for arrival in self.imagined:
            check_room(txn, self.made + arrival)
        settle(txn, self.made)


def rename(
    txn: WriteTxn,
    *,
    session: int,
    parent: int,
    name: bytes,
    new_parent: int,
    new_name: bytes,
    flags: int,
    closed_ino: int,
    expected_ino: int = 0,
    expected_target: int = 0,
    caller: Caller,
    opens: Opens,
    now_ns: int,
) -> RenameDone:
    """Move a name, replacing what has the new one; or, with EXCHANGE, swap two names.

    With WHITEOUT the old name becomes a character device 0:0, made by the caller.
    Two names of one inode stay as they are, and nothing is changed.

    Args:
        flags: RenameFlags.
        closed_ino: as in unlink, for what is replaced.
        expected_ino, expected_target: what the names are meant to be; 0: whatever has them.  That a file replaces
            another one than was meant does no harm.

    Raises:
        StaleInode: a name is another inode than was meant, or none.
        NoSuchEntry: no such source; with EXCHANGE no such target; a directory is gone.
        EntryExists: the target is there (NOREPLACE).
        NotEmpty: the target is a directory that is not empty, or one above the source.
        IsDirectory, NotDirectory: the target is a directory and the source is not; the other way round.
        InvalidArgument: into its own subtree; unknown flags, or EXCHANGE with another.
        Busy: "." or "..".
        QuotaExceeded: a quota above the new place, and not above the old one, has no room for what moves.
        AccessDenied, NotPermitted (sticky), NameTooLong.

    Source: invariants M2 to M6.
    """
    if flags & ~_FLAGS or (flags & RenameFlags.EXCHANGE and flags != RenameFlags.EXCHANGE):
        raise InvalidArgument(f"rename flags {flags}")
    source, target = _places(txn, parent, name, new_parent, new_name, flags, caller)
    exchange = bool(flags & RenameFlags.EXCHANGE)
    require_expected(source.ino, expected_ino, name, parent)
    if exchange or source.is_directory:
        require_expected(target.ino, expected_target, new_name, new_parent)
    _check_ancestors(txn, source, target, exchange=exchange)
    assert source.inode is not None
    if source.ino == target.ino:
        directory, new_directory = source.directory, target.directory
        return RenameDone(source.ino, _NOTHING_REMOVED, source.inode, parent=directory, new_parent=new_directory)
    _check_permission(txn, source, target, caller, exchange=exchange)
    if exchange:
        return _exchange(txn, source, target, now_ns=now_ns)
    if target.is_directory and target.inode is not None and target.inode.size:
        raise NotEmpty(f"{new_name!r} in directory {new_parent}")
    whiteout_by = caller if flags & RenameFlags.WHITEOUT else None
    return _replace(
        txn,
        source,
        target,
        session=session,
        closed_ino=closed_ino,
        whiteout_by=whiteout_by,
        opens=opens,
        now_ns=now_ns,
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def _places(
    txn: ReadTxn, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
) -> tuple[_Place, _Place]:
    """Walk to both names.  Raises what rename promises of directories and names."""
    directory = load_directory(txn, parent)
    require(txn, parent, directory, caller, SEARCH)
    new_directory = directory if new_parent == parent else load_directory(txn, new_parent)
    require(txn, new_parent, new_directory, caller, SEARCH)
    taken: type[StoreError] = EntryExists if flags & RenameFlags.NOREPLACE else Busy
    for one, dots in ((name, Busy), (new_name, taken)):
        if one in (b".", b".."):
            raise dots(f"rename of {one!r}")
    ino = _find(txn, parent, name)
    if not ino:
        raise NoSuchEntry(f"{name!r} in directory {parent}")
    new_ino = _find(txn, new_parent, new_name)
    if new_ino and flags & RenameFlags.NOREPLACE:
        raise EntryExists(f"{new_name!r} in directory {new_parent}")
    if not new_ino and flags & RenameFlags.EXCHANGE:
        raise NoSuchEntry(f"{new_name!r} in directory {new_parent}")
    source = _Place(parent, directory, name, ino, load(txn, ino))
    return source, _Place(new_parent, new_directory, new_name, new_ino, load(txn, new_ino) if new_ino else None)


def _find(txn: ReadTxn, parent: int, name: bytes) -> int:
    if not name:
        raise NoSuchEntry(f"an empty name in directory {parent}")
    check_name(name)
    raw = txn.get(schema.dirent_key(parent, name))
    return 0 if raw is None else schema.decode_dirent(raw)[0]


def _check_ancestors(txn: ReadTxn, source: _Place, target: _Place, *, exchange: bool) -> None:
    """No directory becomes its own ancestor (M2)."""
    if source.parent == target.parent:
        return
    if source.is_directory and _is_above(txn, source.ino, target.parent):
        raise InvalidArgument(f"inode {source.ino} into its own subtree")
    if target.is_directory and _is_above(txn, target.ino, source.parent):
        error: type[StoreError] = InvalidArgument if exchange else NotEmpty
        raise error(f"directory {target.ino} is above inode {source.ino}")


def _is_above(txn: ReadTxn, ino: int, below: int) -> bool:
    """Whether `ino` is the directory `below` or one above it."""
    while below != ino:
        if below == ROOT_INO:
            return False
        below = load(txn, below).parent
    return True


def _check_permission(txn: ReadTxn, source: _Place, target: _Place, caller: Caller, *, exchange: bool) -> None:
    assert source.inode is not None
    require_removable(txn, source.parent, source.directory, source.ino, source.inode, caller)
    if target.inode is None:
        require(txn, target.parent, target.directory, caller, WRITE | SEARCH)
    else:
        require_removable(txn, target.parent, target.directory, target.ino, target.inode, caller)
        if not exchange and source.is_directory != target.is_directory:
            error: type[StoreError] = IsDirectory if target.is_directory else NotDirectory
            raise error(f"{target.name!r} in directory {target.parent}")
    if source.parent == target.parent:
        return
    if source.is_directory:  # Its ".." changes.
        require(txn, source.ino, source.inode, caller, WRITE)
    if exchange and target.is_directory and target.inode is not None:
        require(txn, target.ino, target.inode, caller, WRITE)


# --- changes ----------------------------------------------------------------------------------------------------------


def _replace(
    txn: WriteTxn,
    source: _Place,
    target: _Place,
    *,
    session: int,
    closed_ino: int,
    whiteout_by: Caller | None,
    opens: Opens,
    now_ns: int,
) -> RenameDone:
    assert source.inode is not None
    removed = _NOTHING_REMOVED
    charges = _Charges()
    if target.inode is not None:
        if target.is_directory:
            charges.made.append((target.parent, -1, 0))
            removed = drop_directory(txn, target.ino, now_ns=now_ns)
        else:
            removed = drop_name(
                txn,
                target.ino,
                target.inode,
                target.parent,
                charges.made,
                session=session,
                closed_ino=closed_ino,
                opens=opens,
                now_ns=now_ns,
            )
    txn.delete(schema.dirent_key(source.parent, source.name))
    put_entry(txn, target.parent, target.name, source.ino, source.inode.mode)
    inode = _moved(txn, source.ino, source.inode, source.parent, target.parent, charges, now_ns=now_ns)
    whiteout_ino, whiteout = 0, None
    if whiteout_by is not None:
        charges.made.append((source.parent, 1, 0))
        whiteout_ino, whiteout = new_inode(
            txn, source.parent, source.directory, stat.S_IFCHR, caller=whiteout_by, now_ns=now_ns
        )
        put_entry(txn, source.parent, source.name, whiteout_ino, stat.S_IFCHR)
    charges.settle(txn)
    parents = _store_directories(
        txn,
        source,
        target,
        entries=(0 if whiteout else -1, 0 if target.ino else 1),
        subdirectories=(-int(source.is_directory), int(source.is_directory) - int(target.is_directory)),
        now_ns=now_ns,
    )
    return RenameDone(
        source.ino,
        removed,
        inode,
        parent=parents[0],
        new_parent=parents[1],
        whiteout_ino=whiteout_ino,
        whiteout=whiteout,
    )


def _exchange(txn: WriteTxn, source: _Place, target: _Place, *, now_ns: int) -> RenameDone:
    assert source.inode is not None
    assert target.inode is not None
    put_entry(txn, target.parent, target.name, source.ino, source.inode.mode)
    put_entry(txn, source.parent, source.name, target.ino, target.inode.mode)
    charges = _Charges()
    inode = _moved(txn, source.ino, source.inode, source.parent, target.parent, charges, now_ns=now_ns)
    exchanged = _moved(txn, target.ino, target.inode, target.parent, source.parent, charges, now_ns=now_ns)
    charges.settle(txn)
    gained = int(source.is_directory) - int(target.is_directory)
    parents = _store_directories(txn, source, target, entries=(0, 0), subdirectories=(-gained, gained), now_ns=now_ns)
    return RenameDone(source.ino, _NOTHING_REMOVED, inode, target.ino, exchanged, parents[0], parents[1])


def _moved(
    txn: WriteTxn, ino: int, inode: Inode, parent: int, new_parent: int, charges: _Charges, *, now_ns: int
) -> Inode:
    """Account for a name of an inode that went from one directory to another (or stayed); stores the inode.

    `charges` gets what changes in usage; the caller settles them.
    """
    inode = replace(inode, ctime_ns=now_ns, version=inode.version + 1)
    if parent != new_parent:
        if stat.S_ISDIR(inode.mode):
            inode = move_directory(txn, ino, inode, new_parent, charges.made)
        elif inode.nlink == 1:
            inode = move_charge(inode, new_parent, charges.made)
        else:
            key = schema.link_key(ino, new_parent)
            there = txn.get(key)
            txn.put(key, schema.encode_u32(1 if there is None else schema.decode_number(there) + 1))
            inode = forget_name_in(txn, ino, inode, parent, charges.made, heir=new_parent)
            if inode.parent != new_parent:
                charges.imagined.append([(parent, -1, -inode.allocated), (new_parent, 1, inode.allocated)])
    store(txn, ino, inode)
    return inode


def _store_directories(
    txn: WriteTxn,
    source: _Place,
    target: _Place,
    *,
    entries: tuple[int, int],
    subdirectories: tuple[int, int],
    now_ns: int,
) -> tuple[Inode, Inode]:
    """Store both directories' new attributes; they may be one."""
    if source.parent == target.parent:
        both = touched(source.directory, entries=sum(entries), subdirectories=sum(subdirectories), now_ns=now_ns)
        store_directory(txn, source.parent, both)
        return both, both
    old = touched(source.directory, entries=entries[0], subdirectories=subdirectories[0], now_ns=now_ns)
    new = touched(target.directory, entries=entries[1], subdirectories=subdirectories[1], now_ns=now_ns)
    store_directory(txn, source.parent, old)
    store_directory(txn, target.parent, new)
    return old, new
