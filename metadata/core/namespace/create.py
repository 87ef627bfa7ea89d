"""Making inodes and names: files, also without a name, nodes, directories, symlinks, hard links."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace.data import layout
from metadata.core.namespace.held import hold, name_again
from metadata.core.namespace.inodes import (
    charge,
    check_room,
    enter,
    load,
    load_directory,
    put_entry,
    store,
    store_directory,
    touched,
)
from metadata.core.namespace.new_inode import new_inode
from metadata.core.namespace.permissions import SEARCH, WRITE, require, require_unfrozen
from metadata.core.opens import Opens
from metadata.core.schema import FILE_SIZE_MAX, LINK_COUNT_MAX, SYMLINK_SIZE_MAX, Inode, InodeFlags
from metadata.engine.ports import WriteTxn
from metadata.protocol import Caller, InodeReply, LayoutReply
from wire.errors import (
    EntryExists,
    InvalidArgument,
    IsDirectory,
    NameTooLong,
    NoSuchEntry,
    NotPermitted,
    TooManyLinks,
)

EXTENTS_OF_CREATE_MAX = 512
"""Extents in the answer to a Create of a file that exists: the answer is kept for retries, below VALUE_SIZE_MAX."""
DEVICE_MAX = (1 << 32) - 1
"""Largest device number, as Linux's dev_t."""

_TAKEN = {b"": NoSuchEntry, b".": EntryExists, b"..": EntryExists}
_TAKEN_BY_DIRECTORY = {b"": NoSuchEntry, b".": IsDirectory, b"..": IsDirectory}


def create(
    txn: WriteTxn, *, parent: int, name: bytes, mode: int, exclusive: bool, caller: Caller, now_ns: int
) -> LayoutReply:
    """Make the regular file `name` in directory `parent`, or, unless `exclusive`, answer with what is there.

    Whether the caller may open what is there is for the caller to check: it knows how it is to be opened.

    Args:
        mode: permission bits, less those of `caller.umask` unless the directory has a default access control list.

    Raises:
        EntryExists: the name is taken (`exclusive`); IsDirectory: by a directory (not `exclusive`).
        NoSuchEntry, NotDirectory: of `parent`.
        AccessDenied, NameTooLong, InvalidArgument, QuotaExceeded.

    Source: POSIX.1-2024 open(), "O_CREAT"; invariants M1 to M4.
    """
    directory, ino = enter(txn, parent, name, caller, _TAKEN if exclusive else _TAKEN_BY_DIRECTORY)
    if ino:
        if exclusive:
            raise EntryExists(f"{name!r} in directory {parent}")
        there = load(txn, ino)
        if stat.S_ISDIR(there.mode):
            raise IsDirectory(f"{name!r} in directory {parent}")
        return layout(txn, ino, there, offset=0, length=FILE_SIZE_MAX, count=EXTENTS_OF_CREATE_MAX)
    require(txn, parent, directory, caller, WRITE | SEARCH)
    reply = _make(txn, parent, directory, name, stat.S_IFREG | mode & 0o7777, caller=caller, now_ns=now_ns)
    return LayoutReply(reply.ino, reply.inode, None, (), FILE_SIZE_MAX, reply.parent)


def make_temporary(
    txn: WriteTxn, *, session: int, parent: int, mode: int, linkable: bool, caller: Caller, now_ns: int
) -> LayoutReply:
    """Make a regular file without a name, as if in directory `parent`; `session` holds it, and nobody is charged.

    Args:
        mode: as in `create`.
        linkable: `link` may give it a name (no O_EXCL).

    Raises:
        NoSuchEntry, NotDirectory: of `parent`.
        NotPermitted (an immutable directory), AccessDenied.

    Source: open(2), "O_TMPFILE"; Linux vfs_tmpfile; invariant M6.
    """
    directory = load_directory(txn, parent)
    require(txn, parent, directory, caller, WRITE | SEARCH)
    flags = int(InodeFlags.LINKABLE) if linkable else 0
    mode = stat.S_IFREG | mode & 0o7777
    ino, inode = new_inode(txn, parent, directory, mode, caller=caller, now_ns=now_ns, flags=flags, has_name=False)
    hold(txn, ino, session=session, now_ns=now_ns)
    return LayoutReply(ino, inode, None, (), FILE_SIZE_MAX)


def make_node(
    txn: WriteTxn, *, parent: int, name: bytes, mode: int, rdev: int, caller: Caller, now_ns: int
) -> InodeReply:
    """Make a regular file, fifo, socket or device.

    Args:
        mode: type and permission bits; without a type it is a regular file.
        rdev: device number, of devices only.

    Raises:
        NotPermitted: a directory, or a device for a caller that is not root.
        InvalidArgument: another type, or a device number that is none.
        EntryExists, NoSuchEntry, NotDirectory, AccessDenied, NameTooLong, QuotaExceeded.

    Source: mknod(2); Linux do_mknodat, may_mknod.
    """
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind == stat.S_IFDIR:
        raise NotPermitted("mknod makes no directory")
    if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK) or rdev > DEVICE_MAX:
        raise InvalidArgument(f"mknod with mode {mode:#o} and device {rdev}")
    directory = _vacant(txn, parent, name, caller)
    is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    if is_device and caller.check and caller.uid != 0:
        raise NotPermitted("only root makes devices")
    mode = kind | mode & 0o7777
    return _make(txn, parent, directory, name, mode, rdev=rdev if is_device else 0, caller=caller, now_ns=now_ns)


def make_directory(txn: WriteTxn, *, parent: int, name: bytes, mode: int, caller: Caller, now_ns: int) -> InodeReply:
    """Make an empty directory; it inherits the setgid bit.

    Raises:
        EntryExists, NoSuchEntry, NotDirectory, AccessDenied, NameTooLong, InvalidArgument, QuotaExceeded.
    """
    directory = _vacant(txn, parent, name, caller)
    reply = _make(txn, parent, directory, name, stat.S_IFDIR | mode & 0o1777, caller=caller, now_ns=now_ns)
    txn.put(schema.usage_key(reply.ino), schema.encode_usage(parent, 0, 0, 0))
    return reply


def make_symlink(txn: WriteTxn, *, parent: int, name: bytes, target: bytes, caller: Caller, now_ns: int) -> InodeReply:
    """Make a symlink to `target`, which need not exist.

    Raises:
        NoSuchEntry: also for an empty target.
        NameTooLong: also for a target above SYMLINK_SIZE_MAX.
        EntryExists, NotDirectory, AccessDenied, InvalidArgument (NUL in the target), QuotaExceeded.
    """
    if not target:
        raise NoSuchEntry("a symlink to nothing")
    if len(target) > SYMLINK_SIZE_MAX:
        raise NameTooLong(f"a target of {len(target)} bytes")
    if b"\0" in target:
        raise InvalidArgument("a target with NUL")
    directory = _vacant(txn, parent, name, caller)
    reply = _make(txn, parent, directory, name, stat.S_IFLNK | 0o777, size=len(target), caller=caller, now_ns=now_ns)
    txn.put(schema.symlink_key(reply.ino), target)
    return reply


def link(txn: WriteTxn, *, ino: int, parent: int, name: bytes, caller: Caller, opens: Opens, now_ns: int) -> InodeReply:
    """Give the inode `ino` one more name, or its first one if it was made without (make_temporary).

    With the first name it is charged to `parent`, and is not held any more but open in the sessions that held it.
    Otherwise it stays charged to where it is.  But quotas above `parent` must have room for it as if it came there: it
    will be charged there if its other names go, and then that cannot be refused.

    Raises:
        QuotaExceeded: they have not.
        NotPermitted: it is a directory, or immutable or append-only.
        TooManyLinks: it has LINK_COUNT_MAX names.
        NoSuchEntry: it has no name any more, or is not to get one; or `parent` is gone.
        EntryExists, NotDirectory, AccessDenied, NameTooLong, InvalidArgument.

    Source: Linux do_linkat, vfs_link; invariants M3, M5.
    """
    inode = load(txn, ino)
    directory = _vacant(txn, parent, name, caller)
    require_unfrozen(ino, inode)
    if stat.S_ISDIR(inode.mode):
        raise NotPermitted(f"inode {ino} is a directory")
    if inode.nlink == 0 and not inode.flags & InodeFlags.LINKABLE:
        raise NoSuchEntry(f"inode {ino} has no name any more")
    if inode.nlink >= LINK_COUNT_MAX:
        raise TooManyLinks(f"inode {ino}")
    if inode.nlink == 0:
        charge(txn, parent, inodes=1, allocated=inode.allocated)
        inode = replace(inode, parent=parent, flags=inode.flags & ~int(InodeFlags.LINKABLE))
        name_again(txn, ino, opens=opens)
    else:
        check_room(txn, [(inode.parent, -1, -inode.allocated), (parent, 1, inode.allocated)])
        _note_link(txn, ino, inode, parent)
    inode = replace(inode, nlink=inode.nlink + 1, ctime_ns=now_ns, version=inode.version + 1)
    store(txn, ino, inode)
    put_entry(txn, parent, name, ino, inode.mode)
    directory = touched(directory, entries=1, subdirectories=0, now_ns=now_ns)
    store_directory(txn, parent, directory)
    return InodeReply(ino, inode, directory)


def _note_link(txn: WriteTxn, ino: int, inode: Inode, parent: int) -> None:
    """Count one more name in `parent` among the back-links of an inode that has names."""
    if inode.nlink == 1:
        txn.put(schema.link_key(ino, inode.parent), schema.encode_u32(1))
    key = schema.link_key(ino, parent)
    there = txn.get(key)
    txn.put(key, schema.encode_u32(1 if there is None else schema.decode_number(there) + 1))


def _vacant(txn: WriteTxn, parent: int, name: bytes, caller: Caller) -> Inode:
    """The directory, in which `name` is free and the caller may make it."""
    directory, ino = enter(txn, parent, name, caller, _TAKEN)
    if ino:
        raise EntryExists(f"{name!r} in directory {parent}")
    require(txn, parent, directory, caller, WRITE | SEARCH)
    return directory


def _make(
    txn: WriteTxn,
    parent: int,
    directory: Inode,
    name: bytes,
    mode: int,
    *,
    caller: Caller,
    now_ns: int,
    rdev: int = 0,
    size: int = 0,
) -> InodeReply:
    """Make an inode and its first name; everything has been checked."""
    charge(txn, parent, inodes=1, allocated=0)
    ino, inode = new_inode(txn, parent, directory, mode, caller=caller, now_ns=now_ns, rdev=rdev, size=size)
    put_entry(txn, parent, name, ino, mode)
    subdirectories = 1 if stat.S_ISDIR(mode) else 0
    directory = touched(directory, entries=1, subdirectories=subdirectories, now_ns=now_ns)
    store_directory(txn, parent, directory)
    return InodeReply(ino, inode, directory)
