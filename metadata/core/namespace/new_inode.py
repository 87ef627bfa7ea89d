"""A new inode, before it has a name: who owns it, and what it inherits of the directory it is made in."""

from __future__ import annotations

import stat

from metadata.core.namespace import acls
from metadata.core.namespace.inodes import count_inodes, store
from metadata.core.namespace.permissions import in_group
from metadata.core.schema import Inode
from metadata.engine.ports import WriteTxn
from metadata.protocol import Caller


def new_inode(
    txn: WriteTxn,
    parent: int,
    directory: Inode,
    mode: int,
    *,
    caller: Caller,
    now_ns: int,
    rdev: int = 0,
    size: int = 0,
    flags: int = 0,
    has_name: bool = True,
) -> tuple[int, Inode]:
    """Store an inode made in the directory `parent`, whose attributes are `directory`; everything has been checked.

    Args:
        mode: type and permission bits as asked for.
        flags: InodeFlags that it has besides those of the lists it inherits.
        has_name: the caller gives it one in `parent`, and has charged or charges it there; else it begins with none.

    Returns:
        Its number and attributes.

    Source: Linux inode_init_owner, mode_strip_sgid, posix_acl_create.
    """
    gid = caller.gid
    is_directory = stat.S_ISDIR(mode)
    if directory.mode & stat.S_ISGID:
        gid = directory.gid
        if is_directory:
            mode |= stat.S_ISGID
        elif mode & stat.S_ISGID and mode & stat.S_IXGRP and _may_not_keep_sgid(caller, gid):
            mode &= ~stat.S_ISGID
    mode, lists = acls.inherited(txn, parent, directory, mode, umask=caller.umask)
    inode = Inode(
        mode,
        (2 if is_directory else 1) if has_name else 0,
        caller.uid,
        gid,
        size,
        now_ns,
        now_ns,
        now_ns,
        now_ns,
        rdev,
        flags=flags | acls.flags_of(lists),
        parent=parent if has_name else 0,
        replicas=directory.replicas,
    )
    ino = count_inodes(txn, made=1, gone=0)
    store(txn, ino, inode)
    acls.put_lists(txn, ino, lists)
    return ino, inode


def _may_not_keep_sgid(caller: Caller, gid: int) -> bool:
    return caller.check and caller.uid != 0 and not in_group(caller, gid)
