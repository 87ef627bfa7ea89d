"""The local file system as an oracle: the same operations as tests/support/store.py's, through the kernel.

Needs root: operations are made as other users, by changing the effective ids of this process for one call.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.protocol import Caller

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Have the effective ids and the umask of `caller`."""
    groups, umask = os.getgroups(), os.umask(caller.umask)
    try:
        os.setgroups(caller.groups)
        os.setegid(caller.gid)
        os.seteuid(caller.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(umask)


@contextmanager
def standing_in(directory: Path) -> Iterator[int]:
    """Have `directory` as working directory, whatever its mode; yields a descriptor of it."""
    here = os.open(".", os.O_PATH)
    there = os.open(directory, os.O_PATH)
    try:
        os.fchdir(there)
        yield there
    finally:
        os.fchdir(here)
        os.close(there)
        os.close(here)


def errno_of(action: Callable[[], object]) -> int:
    """0, or the errno that the action failed with."""
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def create(name: bytes, mode: int, *, exclusive: bool) -> None:
    flags = os.O_CREAT | (os.O_EXCL if exclusive else 0)
    os.close(os.open(name, flags | os.O_RDONLY | os.O_NONBLOCK, mode))


Row = tuple[object, ...]


def picture(root: Path) -> dict[bytes, Row]:
    """All of a tree but its times: path to what is there; hard links name the path that comes first."""
    rows: dict[bytes, Row] = {}
    first: dict[int, bytes] = {}

    def visit(path: bytes) -> None:
        full = os.fsencode(root) + b"/" + path if path else os.fsencode(root)
        told = os.lstat(full)
        is_directory = stat.S_ISDIR(told.st_mode)
        leader = path if is_directory else first.setdefault(told.st_ino, path)
        target = os.readlink(full) if stat.S_ISLNK(told.st_mode) else b""
        size = 0 if is_directory else told.st_size
        xattrs = tuple(
            (os.fsencode(name), os.getxattr(full, name, follow_symlinks=False))
            for name in os.listxattr(full, follow_symlinks=False)
        )
        rows[path] = (told.st_mode, told.st_nlink, told.st_uid, told.st_gid, size, target, leader, frozenset(xattrs))
        if is_directory:
            for name in sorted(os.listdir(full)):
                visit(path + b"/" + name)

    visit(b"")
    return rows
