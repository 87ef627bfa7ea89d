"""System calls that Python does not offer, through libc; each raises OSError as those of `os` do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE_RANGE = 1, 2, 8
FALLOC_ZERO_RANGE, FALLOC_INSERT_RANGE, FALLOC_UNSHARE_RANGE = 16, 32, 64

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IMMUTABLE_FL, FS_APPEND_FL = 0x10, 0x20
FICLONE, FICLONERANGE = 0x40049409, 0x4020940D

STATX_BTIME = 0x800
_STATX = struct.Struct("=IIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxxIIII")
_TIMES = struct.Struct("=qqqq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.lseek.restype = ctypes.c_longlong
_libc.opendir.restype = ctypes.c_void_p
_libc.fdopendir.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.readdir.restype = ctypes.c_void_p


def _checked(result: int) -> int:
    """The result of a libc call; OSError with its errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    """Rename with flags."""
    _checked(_libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags))


def linkat(directory: int, old: bytes, new: bytes, flags: int) -> None:
    """One more name; with AT_EMPTY_PATH of the descriptor `directory` itself."""
    _checked(_libc.linkat(directory, old, AT_FDCWD, new, flags))


def unlinkat(name: bytes, flags: int) -> None:
    """Remove a name."""
    _checked(_libc.unlinkat(AT_FDCWD, name, flags))


def utimensat(path: bytes, times: tuple[tuple[int, int], tuple[int, int]] | None, flags: int = 0) -> None:
    """Set times; each is (seconds, nanoseconds), where the latter may be UTIME_NOW or UTIME_OMIT."""
    packed = None if times is None else _TIMES.pack(*times[0], *times[1])
    _checked(_libc.utimensat(AT_FDCWD, path, packed, flags))


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself, without libc's emulation."""
    _checked(_libc.fallocate(descriptor, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)))


def sync_file_range(descriptor: int, offset: int, length: int, flags: int) -> None:
    """Write part of a file back."""
    _checked(_libc.sync_file_range(descriptor, ctypes.c_longlong(offset), ctypes.c_longlong(length), flags))


def syncfs(descriptor: int) -> None:
    """Write a whole file system back."""
    _checked(_libc.syncfs(descriptor))


def inode_flags(descriptor: int) -> int:
    """What lsattr(1) shows, as FS_*_FL bits."""
    return int(struct.unpack_from("=l", fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8)))[0])


def set_inode_flags(descriptor: int, flags: int) -> None:
    """What chattr(1) does."""
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("=ll", flags, 0))


def clone(source: int, target: int) -> None:
    """FICLONE: `target` gets the bytes of `source`, shared."""
    fcntl.ioctl(target, FICLONE, source)


@dataclass(frozen=True)
class Statx:
    """What statx(2) tells beyond stat(2)."""

    mask: int
    mode: int
    size: int
    nlink: int
    btime_ns: int
    mtime_ns: int
    attributes: int


def statx(path: bytes, *, follow: bool = False, mask: int = 0xFFF) -> Statx:
    """statx(2) of a path."""
    buffer = ctypes.create_string_buffer(256)
    _checked(_libc.statx(AT_FDCWD, path, 0 if follow else AT_SYMLINK_NOFOLLOW, mask, buffer))
    got = _STATX.unpack_from(buffer.raw)
    return Statx(
        mask=got[0],
        attributes=got[2],
        nlink=got[3],
        mode=got[6],
        size=got[8],
        btime_ns=got[13] * 10**9 + got[14],
        mtime_ns=got[17] * 10**9 + got[18],
    )


@contextmanager
def descriptor(path: bytes | str, flags: int, mode: int = 0o644) -> Iterator[int]:
    """An open file, closed at the end."""
    opened = os.open(path, flags, mode)
    try:
        yield opened
    finally:
        os.close(opened)


class Listing:
    """A directory stream of libc, with its positions."""

    def __init__(self, path: bytes) -> None:
        self._stream = _libc.opendir(path)
        if not self._stream:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def read(self) -> bytes | None:
        """The next name; None at the end."""
        ctypes.set_errno(0)
        entry = _libc.readdir(self._stream)
        if not entry:
            number = ctypes.get_errno()
            if number:
                raise OSError(number, errno.errorcode.get(number))
            return None
        return ctypes.string_at(entry + 19)  # struct dirent: ino, off, reclen, type, then the name.

    def rest(self) -> list[bytes]:
        """All names from here to the end."""
        return list(iter(self.read, None))

    def tell(self) -> int:
        """The position."""
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        """Go to a position told before."""
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        """Go to the beginning, and see the directory as it is now."""
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        """Let go of it."""
        _libc.closedir(self._stream)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
