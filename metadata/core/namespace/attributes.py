"""chmod, chown, utimens and truncate: one operation, all of it or nothing; and chattr.

Source: Linux fs/attr.c (setattr_prepare, notify_change), fs/open.c (chown_common, do_truncate), fs/utimes.c,
fs/file_attr.c.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.namespace import acls, data
from metadata.core.namespace.inodes import load, store
from metadata.core.namespace.permissions import FROZEN, IMMUTABLE, WRITE, in_group, may, owns, require
from metadata.core.schema import FILE_SIZE_MAX, Inode, InodeFlags
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL, Caller, InodeReply, SetAttrMask
from wire.errors import AccessDenied, FileTooLarge, InvalidArgument, IsDirectory, NotPermitted, NotSupported

ID_MAX = (1 << 32) - 2
"""Largest uid and gid: the one above means "leave as it is" in chown(2)."""

_OWNERS = SetAttrMask.UID | SetAttrMask.GID
_EXPLICIT_TIMES = SetAttrMask.ATIME | SetAttrMask.MTIME | SetAttrMask.CTIME
_BOTH_NOW = SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW


def set_attributes(
    txn: WriteTxn,
    *,
    ino: int,
    mask: int,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    atime_ns: int,
    mtime_ns: int,
    ctime_ns: int,
    caller: Caller,
    now_ns: int,
) -> InodeReply:
    """Change the attributes that `mask` (SetAttrMask) names.

    A change of owner or size clears suid and sgid (of a size: unless the caller is root); chmod by somebody outside
    the group clears sgid.  ctime becomes `now_ns` unless it is named.

    Raises:
        NotPermitted: the caller does not own it; or may not give it to that owner or group; it is immutable or
            append-only.
        AccessDenied: times "now" or a size, without write permission.
        IsDirectory, InvalidArgument: a size for what is no regular file; ids that are none.
        FileTooLarge: a size above FILE_SIZE_MAX.
        NotSupported: chmod of a symlink.
        NoSuchEntry.
    """
    inode = load(txn, ino)
    _check_values(ino, inode, mask, uid, gid, size)
    if mask & SetAttrMask.SIZE:  # Before the flags: who may not write is told so (vfs_truncate).
        require(txn, ino, inode, caller, WRITE)
    if inode.flags & FROZEN:
        _check_flags(ino, inode, mask)
    _check_permission(txn, ino, inode, mask, uid, gid, caller)
    if not mask:
        return InodeReply(ino, inode)
    before = inode
    if mask & SetAttrMask.SIZE:
        inode = data.truncate(txn, ino, inode, size, now_ns=now_ns)
        inode = replace(inode, mtime_ns=now_ns, data_version=inode.data_version + (size != before.size))
    if (mask & _OWNERS and not stat.S_ISDIR(inode.mode)) or (mask & SetAttrMask.SIZE and caller.uid != 0):
        inode = data.drop_privileges(txn, ino, inode, caller)
    inode = replace(
        inode,
        mode=_new_mode(inode, mask, mode, gid, caller),
        uid=uid if mask & SetAttrMask.UID else inode.uid,
        gid=gid if mask & SetAttrMask.GID else inode.gid,
        atime_ns=_new_time(mask, SetAttrMask.ATIME, SetAttrMask.ATIME_NOW, inode.atime_ns, atime_ns, now_ns),
        mtime_ns=_new_time(mask, SetAttrMask.MTIME, SetAttrMask.MTIME_NOW, inode.mtime_ns, mtime_ns, now_ns),
        ctime_ns=ctime_ns if mask & SetAttrMask.CTIME else now_ns,
        version=inode.version + 1,
    )
    store(txn, ino, inode)
    if mask & SetAttrMask.MODE:
        acls.change_mode(txn, ino, inode)
    return InodeReply(ino, inode)


def set_flags(txn: WriteTxn, *, ino: int, flags: int, caller: Caller, now_ns: int) -> InodeReply:
    """Make a file or directory immutable or append-only, or neither.

    Args:
        flags: FS_IMMUTABLE_FL, FS_APPEND_FL, as FS_IOC_SETFLAGS takes them.

    Raises:
        NotSupported: another flag; what is neither a file nor a directory.
        NotPermitted: the caller does not own it; or these flags would change and it is not root; or it would become
            append-only, or no longer be, and stay immutable.
        NoSuchEntry.

    Source: ioctl_iflags(2); Linux vfs_fileattr_set, fileattr_set_prepare, ext4_ioctl_check_immutable.
    """
    inode = load(txn, ino)
    if flags & ~(FS_IMMUTABLE_FL | FS_APPEND_FL):
        raise NotSupported(f"inode flags {flags:#x}")
    if not (stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode)):
        raise NotSupported(f"inode {ino} is neither a file nor a directory")
    if not owns(inode, caller):
        raise NotPermitted(f"inode {ino}")
    kept = inode.flags & ~FROZEN
    if flags & FS_IMMUTABLE_FL:
        kept |= InodeFlags.IMMUTABLE
    if flags & FS_APPEND_FL:
        kept |= InodeFlags.APPEND_ONLY
    if kept != inode.flags and caller.check and caller.uid != 0:
        raise NotPermitted(f"only root changes the flags of inode {ino}")
    if inode.flags & kept & IMMUTABLE and kept != inode.flags:
        raise NotPermitted(f"inode {ino} stays immutable, so nothing else of it changes")
    inode = replace(inode, flags=int(kept), ctime_ns=now_ns, version=inode.version + 1)
    store(txn, ino, inode)
    return InodeReply(ino, inode)


def _check_flags(ino: int, inode: Inode, mask: int) -> None:
    """Raises: NotPermitted.  What is append-only may have its times set to now (may_setattr, ext4_setattr)."""
    if not mask:
        return
    if inode.flags & IMMUTABLE or mask != _BOTH_NOW:
        raise NotPermitted(f"inode {ino} is immutable or append-only")


def touch(txn: WriteTxn, *, touches: Iterable[tuple[int, int, int]]) -> None:
    """Inodes were read: (inode, the access time it had then, the one it gets); see protocol.TouchAtimes."""
    for ino, from_ns, to_ns in touches:
        raw = txn.get(schema.inode_key(ino))
        if raw is None:
            continue
        inode = schema.decode_inode(raw)
        if inode.atime_ns == from_ns:
            store(txn, ino, replace(inode, atime_ns=to_ns, version=inode.version + 1))


def _check_values(ino: int, inode: Inode, mask: int, uid: int, gid: int, size: int) -> None:
    if mask & SetAttrMask.SIZE:
        if stat.S_ISDIR(inode.mode):
            raise IsDirectory(f"inode {ino} has no size to set")
        if not stat.S_ISREG(inode.mode):
            raise InvalidArgument(f"inode {ino} has no size to set")
        if size > FILE_SIZE_MAX:
            raise FileTooLarge(f"size {size}")
    if mask & SetAttrMask.MODE and stat.S_ISLNK(inode.mode):
        raise NotSupported("a symlink has no mode of its own")
    if (mask & SetAttrMask.UID and uid > ID_MAX) or (mask & SetAttrMask.GID and gid > ID_MAX):
        raise InvalidArgument(f"owner {uid}:{gid}")


def _check_permission(txn: ReadTxn, ino: int, inode: Inode, mask: int, uid: int, gid: int, caller: Caller) -> None:
    """Who may change what; with `Caller.check` only."""
    if not caller.check or caller.uid == 0:
        return
    owner = owns(inode, caller)
    if mask & SetAttrMask.UID and not (owner and uid == inode.uid):
        raise NotPermitted(f"inode {ino}: chown to {uid}")
    if mask & SetAttrMask.GID and not (owner and (gid == inode.gid or in_group(caller, gid))):
        raise NotPermitted(f"inode {ino}: chgrp to {gid}")
    if mask & SetAttrMask.MODE and not owner:
        raise NotPermitted(f"inode {ino}: chmod")
    _check_times(txn, ino, inode, mask, caller, owner=owner)


def _check_times(txn: ReadTxn, ino: int, inode: Inode, mask: int, caller: Caller, *, owner: bool) -> None:
    """Both times "now" are for everyone who may write; anything else is the owner's (utimensat(2))."""
    if owner or not mask & (_EXPLICIT_TIMES | _BOTH_NOW):
        return
    if mask & _EXPLICIT_TIMES or (mask & _BOTH_NOW != _BOTH_NOW and not mask & SetAttrMask.SIZE):
        raise NotPermitted(f"inode {ino}: utimens")
    if not may(txn, ino, inode, caller, WRITE):
        raise AccessDenied(f"inode {ino}: utimens")


def _new_mode(inode: Inode, mask: int, mode: int, gid: int, caller: Caller) -> int:
    if not mask & SetAttrMask.MODE:
        return inode.mode
    group = gid if mask & SetAttrMask.GID else inode.gid
    if caller.check and caller.uid != 0 and not in_group(caller, group):
        mode &= ~stat.S_ISGID
    return stat.S_IFMT(inode.mode) | mode & 0o7777


def _new_time(mask: int, explicit: int, now: int, old_ns: int, given_ns: int, now_ns: int) -> int:
    if mask & explicit:
        return given_ns
    return now_ns if mask & now else old_ns
