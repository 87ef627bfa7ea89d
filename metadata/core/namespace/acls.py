"""Access control lists of inodes: setting and removing them, chmod, and what a new inode inherits.

A list is stored as the extended attribute that it is for programs; a flag of the inode says that it is there, so that
an inode without one costs nobody a look.

Invariant M17: what is stored is a valid list; an access list says more than the mode and agrees with it; a default list
is a directory's; the flags are set exactly with the attributes.

Source: Linux fs/posix_acl.c (set_posix_acl, posix_acl_update_mode, posix_acl_chmod, posix_acl_create), fs/ext4/acl.c.
"""

from __future__ import annotations

import stat

from msgspec.structs import replace

from metadata.core import posix_acl
from metadata.core.namespace import stored_xattrs
from metadata.core.namespace.inodes import load, store
from metadata.core.namespace.permissions import access_acl, in_group, owns, require_unfrozen
from metadata.core.posix_acl import ACCESS_XATTR, DEFAULT_XATTR, Acl
from metadata.core.schema import Inode, InodeFlags
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller, InodeReply
from wire.errors import AccessDenied, NoRoom, NotPermitted, NotSupported

_FLAGS = {ACCESS_XATTR: InodeFlags.ACCESS_ACL, DEFAULT_XATTR: InodeFlags.DEFAULT_ACL}


def set_acl(
    txn: WriteTxn, *, ino: int, name: bytes, value: bytes, drop_sgid: bool, caller: Caller, now_ns: int
) -> InodeReply:
    """Set the list that `name` (one of posix_acl.XATTR_NAMES) says; an empty value or list removes it.

    An access list sets the mode's permission bits, and is not kept when they say all of it.  What changes nothing
    leaves the times alone, as on ext4.

    Args:
        drop_sgid: the kernel found the caller outside the inode's group and without CAP_FSETID; with `Caller.check`
            that is found here.

    Raises:
        InvalidArgument: it is no list, or no valid one.
        NotSupported: a symlink; another version of the format.
        AccessDenied: a default list for what is no directory.
        NotPermitted: the caller does not own it; it is immutable or append-only.
        ArgumentListTooLong: above posix_acl.SIZE_MAX.
        NoRoom: the list of attributes is full.
        NoSuchEntry.
    """
    acl = posix_acl.decode(value)
    inode = load(txn, ino)
    require_unfrozen(ino, inode)
    if stat.S_ISLNK(inode.mode):
        raise NotSupported(f"symlink {ino} has no access control list")
    if name == DEFAULT_XATTR and not stat.S_ISDIR(inode.mode):
        if acl:
            raise AccessDenied(f"inode {ino} is no directory")
        return InodeReply(ino, inode)
    if not owns(inode, caller):
        raise NotPermitted(f"inode {ino}")
    mode = inode.mode
    if acl:
        posix_acl.check(acl)
        if name == ACCESS_XATTR:
            mode, is_equivalent = posix_acl.mode_of(acl, mode)
            if drop_sgid or (caller.check and caller.uid != 0 and not in_group(caller, inode.gid)):
                mode &= ~stat.S_ISGID
            if is_equivalent:
                acl = ()
    flags, is_new = _keep(txn, ino, inode, name, acl)
    if not is_new and mode == inode.mode:
        return InodeReply(ino, inode)
    inode = replace(inode, mode=mode, flags=flags, ctime_ns=now_ns, version=inode.version + 1)
    store(txn, ino, inode)
    return InodeReply(ino, inode)


def _keep(txn: WriteTxn, ino: int, inode: Inode, name: bytes, acl: Acl) -> tuple[int, bool]:
    """Store the list, or remove it if it is empty; the inode's flags then, and whether the list was another one."""
    flag = _FLAGS[name]
    was_there = bool(inode.flags & flag)
    if not acl:
        return inode.flags & ~flag, stored_xattrs.delete(txn, ino, name)
    value = posix_acl.encode(acl)
    if was_there and stored_xattrs.value(txn, ino, name) == value:
        return inode.flags, False
    if not was_there and not stored_xattrs.has_room(txn, ino, name):
        raise NoRoom(f"inode {ino} has no room for more extended attributes")
    stored_xattrs.put(txn, ino, name, value)
    return inode.flags | flag, True


def change_mode(txn: WriteTxn, ino: int, inode: Inode) -> None:
    """The inode's mode has been set to `inode.mode` by chmod: its access list, if it has one, follows."""
    if inode.flags & InodeFlags.ACCESS_ACL:
        acl = posix_acl.with_mode(access_acl(txn, ino), inode.mode)
        stored_xattrs.put(txn, ino, ACCESS_XATTR, posix_acl.encode(acl))


def inherited(txn: ReadTxn, parent: int, directory: Inode, mode: int, *, umask: int) -> tuple[int, dict[bytes, Acl]]:
    """What an inode that is made in `directory` begins with.

    Args:
        mode: type and permission bits as the caller asked for them.
        umask: the caller's, which counts only where the directory has no default list.

    Returns:
        Its mode, and its lists by the attribute's name.
    """
    if stat.S_ISLNK(mode):
        return mode, {}
    if not directory.flags & InodeFlags.DEFAULT_ACL:
        return mode & ~(umask & 0o777), {}
    default = posix_acl.decode(stored_xattrs.value(txn, parent, DEFAULT_XATTR))
    lists = {DEFAULT_XATTR: default} if stat.S_ISDIR(mode) else {}
    mode, access = posix_acl.inherited(default, mode)
    if not posix_acl.mode_of(access, mode)[1]:
        lists[ACCESS_XATTR] = access
    return mode, lists


def flags_of(lists: dict[bytes, Acl]) -> int:
    """The inode's flags for these lists."""
    return sum(int(_FLAGS[name]) for name in lists)


def put_lists(txn: WriteTxn, ino: int, lists: dict[bytes, Acl]) -> None:
    """Store the lists of a new inode."""
    for name, acl in lists.items():
        stored_xattrs.put(txn, ino, name, posix_acl.encode(acl))
