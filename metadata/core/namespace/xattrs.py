"""Extended attributes: user., trusted. and security., and access control lists under the names that Linux gives them.

Those of the name space "fsd." are no attributes of ours: they show and set quotas (quotas.py), and are not listed.

Source: Linux fs/xattr.c (setxattr_copy, xattr_permission), security/commoncap.c.
"""

from __future__ import annotations

import stat

from msgspec.structs import replace

from metadata.core import posix_acl
from metadata.core.namespace import acls, quotas, stored_xattrs
from metadata.core.namespace.data import CAPABILITY_XATTR
from metadata.core.namespace.inodes import load, store
from metadata.core.namespace.permissions import READ, WRITE, owns, require, require_unfrozen
from metadata.core.schema import XATTR_NAME_SIZE_MAX, XATTR_VALUE_SIZE_MAX, Inode, InodeFlags
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller, InodeReply, ListXattrDone, SetXattrMode, XattrReply
from wire.errors import (
    ArgumentListTooLong,
    EntryExists,
    InvalidArgument,
    NoRoom,
    NoSuchAttribute,
    NotPermitted,
    NotSupported,
    ResultTooLarge,
)

_UNGUARDED = (b"trusted.", b"security.", b"system.")
"""Not guarded by mode bits."""


def get_xattr(txn: ReadTxn, *, ino: int, name: bytes, caller: Caller) -> XattrReply:
    """The value of one attribute.

    Raises:
        ResultTooLarge: no name, or above XATTR_NAME_SIZE_MAX.
        NotSupported: of another name space.
        NoSuchAttribute: not there, or not for this caller to see.
        AccessDenied: a user. one, without read permission.
        NoSuchEntry, InvalidArgument.
    """
    _check_name(name)
    inode = load(txn, ino)
    if name.startswith(quotas.PREFIX):
        return XattrReply(quotas.get(txn, ino, inode, name, caller))
    if name in posix_acl.XATTR_NAMES and stat.S_ISLNK(inode.mode):
        raise NotSupported(f"symlink {ino} has no access control list")
    if name.startswith(b"user.") and not _has_user_xattrs(inode):
        raise NoSuchAttribute(f"{name!r} of inode {ino}")
    if not name.startswith(_UNGUARDED):
        require(txn, ino, inode, caller, READ)
    _check_namespace(name)
    if not stored_xattrs.is_there(txn, ino, name) or not _visible(name, caller):
        raise NoSuchAttribute(f"{name!r} of inode {ino}")
    return XattrReply(stored_xattrs.value(txn, ino, name))


def list_xattrs(txn: ReadTxn, *, ino: int, caller: Caller) -> ListXattrDone:
    """The names that this caller may see, in ascending order.  Raises: NoSuchEntry."""
    load(txn, ino)
    return ListXattrDone(tuple(name for name in stored_xattrs.names(txn, ino) if _visible(name, caller)))


def set_xattr(
    txn: WriteTxn,
    *,
    ino: int,
    name: bytes,
    value: bytes,
    how: SetXattrMode,
    drop_sgid: bool,
    caller: Caller,
    now_ns: int,
) -> InodeReply:
    """Set one attribute, all of its value or nothing; the value that it has already changes nothing (as on ext4).

    Args:
        how: does not count for access control lists, as in Linux.
        drop_sgid: see acls.set_acl.

    Raises:
        What acls.set_acl does, for an access control list.
        EntryExists, NoSuchAttribute: `how` is CREATE or NEITHER and it is there; REPLACE or NEITHER and it is not.
        ArgumentListTooLong: the value is above XATTR_VALUE_SIZE_MAX.
        NoRoom: all names together would be above XATTR_LIST_SIZE_MAX.
        ResultTooLarge, NotSupported, NotPermitted, AccessDenied, NoSuchEntry, InvalidArgument.
    """
    _check_name(name)
    if len(value) > XATTR_VALUE_SIZE_MAX:
        raise ArgumentListTooLong(f"a value of {len(value)} bytes")
    if name in posix_acl.XATTR_NAMES:
        return acls.set_acl(txn, ino=ino, name=name, value=value, drop_sgid=drop_sgid, caller=caller, now_ns=now_ns)
    inode = load(txn, ino)
    if name.startswith(quotas.PREFIX):
        quotas.set_limit(txn, ino, inode, name, value, how, caller)
        return InodeReply(ino, inode)
    _check_may_change(txn, ino, inode, name, caller)
    there = stored_xattrs.is_there(txn, ino, name)
    if there and how in (SetXattrMode.CREATE, SetXattrMode.NEITHER):
        raise EntryExists(f"{name!r} of inode {ino}")
    if not there:
        if how in (SetXattrMode.REPLACE, SetXattrMode.NEITHER):
            raise NoSuchAttribute(f"{name!r} of inode {ino}")
        if not stored_xattrs.has_room(txn, ino, name):
            raise NoRoom(f"inode {ino} has no room for more extended attributes")
    elif stored_xattrs.value(txn, ino, name) == value:
        return InodeReply(ino, inode)
    stored_xattrs.put(txn, ino, name, value)
    flags = inode.flags | InodeFlags.CAPABILITY if name == CAPABILITY_XATTR else inode.flags
    return _changed(txn, ino, inode, flags, now_ns)


def remove_xattr(txn: WriteTxn, *, ino: int, name: bytes, caller: Caller, now_ns: int) -> InodeReply:
    """Remove one attribute; an access control list may be gone already (vfs_remove_acl).

    Raises:
        NoSuchAttribute, ResultTooLarge, NotSupported, NotPermitted, AccessDenied, NoSuchEntry, InvalidArgument.
    """
    _check_name(name)
    if name in posix_acl.XATTR_NAMES:
        return acls.set_acl(txn, ino=ino, name=name, value=b"", drop_sgid=False, caller=caller, now_ns=now_ns)
    inode = load(txn, ino)
    if name.startswith(quotas.PREFIX):
        quotas.remove_limit(txn, ino, inode, name, caller)
        return InodeReply(ino, inode)
    _check_may_change(txn, ino, inode, name, caller)
    if not stored_xattrs.delete(txn, ino, name):
        raise NoSuchAttribute(f"{name!r} of inode {ino}")
    flags = inode.flags & ~InodeFlags.CAPABILITY if name == CAPABILITY_XATTR else inode.flags
    return _changed(txn, ino, inode, flags, now_ns)


def _changed(txn: WriteTxn, ino: int, inode: Inode, flags: int, now_ns: int) -> InodeReply:
    inode = replace(inode, flags=flags, ctime_ns=now_ns, version=inode.version + 1)
    store(txn, ino, inode)
    return InodeReply(ino, inode)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_name(name: bytes) -> None:
    if not 0 < len(name) <= XATTR_NAME_SIZE_MAX:
        raise ResultTooLarge(f"an attribute's name of {len(name)} bytes")
    if b"\0" in name:
        raise InvalidArgument("an attribute's name with NUL")


def _check_namespace(name: bytes) -> None:
    if name in posix_acl.XATTR_NAMES:
        return
    space, dot, rest = name.partition(b".")
    if not dot or space not in (b"user", b"trusted", b"security"):
        raise NotSupported(f"extended attributes like {name!r}")
    if not rest:
        raise InvalidArgument(f"{name!r} names no attribute")


def _has_user_xattrs(inode: Inode) -> bool:
    return stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode)


def _visible(name: bytes, caller: Caller) -> bool:
    return caller.uid == 0 or not name.startswith(b"trusted.")


def _check_may_change(txn: ReadTxn, ino: int, inode: Inode, name: bytes, caller: Caller) -> None:
    """Raises: NotSupported, InvalidArgument (name space); NotPermitted, AccessDenied."""
    require_unfrozen(ino, inode)
    if name.startswith(b"trusted.") and caller.uid != 0:
        raise NotPermitted(f"{name!r} is root's to change")
    if name.startswith(b"user."):
        if not _has_user_xattrs(inode):
            raise NotPermitted(f"inode {ino} is neither a file nor a directory")
        if stat.S_ISDIR(inode.mode) and inode.mode & stat.S_ISVTX and not owns(inode, caller):
            raise NotPermitted(f"directory {ino} is sticky")
    if not name.startswith(_UNGUARDED):
        require(txn, ino, inode, caller, WRITE)
    _check_namespace(name)
    if name.startswith(b"security.") and caller.check and caller.uid != 0:
        raise NotPermitted(f"{name!r} is root's to change")
