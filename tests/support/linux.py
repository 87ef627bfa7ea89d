"""The local file system as an oracle: the same operations as tests/support/store.py's, through the kernel.

Needs root: operations are made as other users, by changing the effective ids of this process for one call.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL, Caller

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


UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2


def utimensat(name: bytes, times_ns: tuple[int, int] | None) -> None:
    """Of a name in the working directory, a symlink's own; nanoseconds below a second, UTIME_NOW or UTIME_OMIT."""
    times = None if times_ns is None else struct.pack("=qqqq", 0, times_ns[0], 0, times_ns[1])
    at_cwd, no_follow = -100, 0x100
    if _libc.utimensat(at_cwd, name, times, no_follow) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FLAGS_MASK = FS_IMMUTABLE_FL | FS_APPEND_FL


def get_flags(path: bytes | Path) -> int:
    """FS_IMMUTABLE_FL and FS_APPEND_FL of a file or directory."""
    return _all_flags(path) & FLAGS_MASK


def set_flags(path: bytes | Path, flags: int) -> None:
    """Have exactly these of the two flags; others stay."""
    wanted = struct.pack("=i", _all_flags(path) & ~FLAGS_MASK | flags)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, wanted)
    finally:
        os.close(descriptor)


def _all_flags(path: bytes | Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(4)), "little")
    finally:
        os.close(descriptor)


def has_flags(path: Path) -> bool:
    """Whether the file system knows them."""
    return errno_of(lambda: get_flags(path)) == 0


def remove_tree(root: Path) -> None:
    """Remove a tree in which some things may be immutable or append-only."""
    if has_flags(root):
        for place, directories, files in os.walk(root):
            for path in (Path(place, name) for name in (".", *directories, *files)):
                if stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR) and get_flags(path):
                    set_flags(path, 0)
    shutil.rmtree(root)


@contextmanager
def public_directory() -> Iterator[Path]:
    """An empty directory of the machine's own file system that every user can reach; removed afterwards.

    Not below pytest's own: every start of a pytest, of another worker or of somebody else, shuts users out of those.
    """
    made = Path(tempfile.mkdtemp(prefix="fsd-public-"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        remove_tree(made)


Row = tuple[object, ...]


def picture(root: Path) -> dict[bytes, Row]:
    """All of a tree but its times: path to what is there; hard links name the path that comes first."""
    rows: dict[bytes, Row] = {}
    first: dict[int, bytes] = {}
    with_flags = has_flags(root)

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
        is_plain = is_directory or stat.S_ISREG(told.st_mode)
        flags = get_flags(full) if is_plain and with_flags else 0
        rows[path] = (
            flags,
            told.st_mode,
            told.st_nlink,
            told.st_uid,
            told.st_gid,
            size,
            target,
            leader,
            frozenset(xattrs),
        )
        if is_directory:
            for name in sorted(os.listdir(full)):
                visit(path + b"/" + name)

    visit(b"")
    return rows
