"""Who may do what: mode bits, access control lists, the sticky bit, flags, and which names are names.

With `Caller.check` False the kernel has made these checks (default_permissions) and only names and flags are looked at
here: the kernel does not know which inodes are immutable or append-only.

Source: Linux fs/namei.c (acl_permission_check, inode_permission, may_delete), path_resolution(7), ioctl_iflags(2).
"""

from __future__ import annotations

import stat

from metadata.core import posix_acl
from metadata.core.namespace import stored_xattrs
from metadata.core.schema import NAME_SIZE_MAX, Inode, InodeFlags
from metadata.engine.ports import ReadTxn
from metadata.protocol import Caller
from wire.errors import AccessDenied, InvalidArgument, NameTooLong, NotPermitted

READ = 4
WRITE = 2
SEARCH = 1

IMMUTABLE = int(InodeFlags.IMMUTABLE)
FROZEN = int(InodeFlags.IMMUTABLE | InodeFlags.APPEND_ONLY)  # A plain integer: every change tests it.
"""What keeps an inode's names, attributes and extended attributes as they are."""


def in_group(caller: Caller, gid: int) -> bool:
    """Whether `gid` is the caller's own or a supplementary group."""
    return gid == caller.gid or gid in caller.groups


def owns(inode: Inode, caller: Caller) -> bool:
    """Whether the caller may do what only the owner may."""
    return not caller.check or caller.uid in (0, inode.uid)


def may(txn: ReadTxn, ino: int, inode: Inode, caller: Caller, want: int) -> bool:
    """Whether mode bits and access control list grant all of `want` (READ, WRITE, SEARCH)."""
    if not caller.check:
        return True
    if caller.uid == 0:
        return stat.S_ISDIR(inode.mode) or not want & SEARCH or bool(inode.mode & 0o111)
    if caller.uid == inode.uid:
        granted = inode.mode >> 6
    elif inode.flags & InodeFlags.ACCESS_ACL and inode.mode & stat.S_IRWXG:
        return posix_acl.permits(access_acl(txn, ino), gid=inode.gid, caller=caller, want=want)
    elif in_group(caller, inode.gid):
        granted = inode.mode >> 3
    else:
        granted = inode.mode
    return granted & want == want


def access_acl(txn: ReadTxn, ino: int) -> posix_acl.Acl:
    """The access control list of an inode that has one."""
    return posix_acl.decode(stored_xattrs.value(txn, ino, posix_acl.ACCESS_XATTR))


def require(txn: ReadTxn, ino: int, inode: Inode, caller: Caller, want: int) -> None:
    """Raises: NotPermitted (to write what is immutable), AccessDenied."""
    if want & WRITE and inode.flags & IMMUTABLE:
        raise NotPermitted(f"inode {ino} is immutable")
    if not may(txn, ino, inode, caller, want):
        raise AccessDenied(f"inode {ino}")


def require_unfrozen(ino: int, inode: Inode) -> None:
    """Raises: NotPermitted, for what is immutable or append-only."""
    if inode.flags & FROZEN:
        raise NotPermitted(f"inode {ino} is immutable or append-only")


def require_removable(txn: ReadTxn, parent: int, directory: Inode, ino: int, inode: Inode, caller: Caller) -> None:
    """Check that the caller may take the name of `inode` out of `directory`.

    Raises:
        AccessDenied: it may not write or search the directory.
        NotPermitted: the directory is sticky, and neither it nor the inode is the caller's; one of them is immutable or
            append-only.
    """
    require(txn, parent, directory, caller, WRITE | SEARCH)
    require_unfrozen(parent, directory)
    require_unfrozen(ino, inode)
    if directory.mode & stat.S_ISVTX and not owns(inode, caller) and not owns(directory, caller):
        raise NotPermitted(f"inode {ino} in the sticky directory {parent}")


def check_name(name: bytes) -> None:
    """Check one path component that is neither "", "." nor "..".

    Raises:
        NameTooLong: above NAME_SIZE_MAX bytes.
        InvalidArgument: it has a "/" or a NUL.
    """
    if len(name) > NAME_SIZE_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes")
    if b"/" in name or b"\0" in name:
        raise InvalidArgument(f"{name!r} is no name")
