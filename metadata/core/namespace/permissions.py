"""Who may do what: mode bits, the sticky bit, and which names are names.

With `Caller.check` False the kernel has made these checks (default_permissions) and only names are looked at here.

Source: Linux fs/namei.c (generic_permission, may_delete), path_resolution(7).
"""

from __future__ import annotations

import stat

from metadata.core.schema import NAME_SIZE_MAX, Inode
from metadata.protocol import Caller
from wire.errors import AccessDenied, InvalidArgument, NameTooLong, NotPermitted

READ = 4
WRITE = 2
SEARCH = 1


def in_group(caller: Caller, gid: int) -> bool:
    """Whether `gid` is the caller's own or a supplementary group."""
    return gid == caller.gid or gid in caller.groups


def owns(inode: Inode, caller: Caller) -> bool:
    """Whether the caller may do what only the owner may."""
    return not caller.check or caller.uid in (0, inode.uid)


def may(inode: Inode, caller: Caller, want: int) -> bool:
    """Whether the mode bits grant all of `want` (READ, WRITE, SEARCH)."""
    if not caller.check:
        return True
    if caller.uid == 0:
        return stat.S_ISDIR(inode.mode) or not want & SEARCH or bool(inode.mode & 0o111)
    if caller.uid == inode.uid:
        granted = inode.mode >> 6
    elif in_group(caller, inode.gid):
        granted = inode.mode >> 3
    else:
        granted = inode.mode
    return granted & want == want


def require(ino: int, inode: Inode, caller: Caller, want: int) -> None:
    """Raises: AccessDenied."""
    if not may(inode, caller, want):
        raise AccessDenied(f"inode {ino}")


def require_removable(parent: int, directory: Inode, ino: int, inode: Inode, caller: Caller) -> None:
    """Check that the caller may take the name of `inode` out of `directory`.

    Raises:
        AccessDenied: it may not write or search the directory.
        NotPermitted: the directory is sticky, and neither it nor the inode is the caller's.
    """
    require(parent, directory, caller, WRITE | SEARCH)
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
