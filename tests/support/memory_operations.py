"""A trivial file system in memory behind fsd.frontend.ports.Operations: what a front end costs by itself.

One directory; every file reads as the same 64 MiB; the kernel may keep nothing.  scripts/bench_fuse compares front ends
on it with a C program that does the same (scripts/bench_fuse_libfuse.c).

`python -m tests.support.memory_operations direct|pyfuse3 MOUNTPOINT` mounts it until it is unmounted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import cast

import trio

from fsd.frontend.direct.direct_frontend import DirectMount
from fsd.frontend.ports import AddEntry, Entry, Opened, Operations
from fsd.memory import keep_freed_buffers
from metadata.core.schema import Inode
from metadata.protocol import Caller, StatFsDone
from wire.errors import NoSuchEntry, NotSupported

SIZE = 64 << 20
OPTIONS = ["default_permissions", "allow_other", "fsname=bench", "subtype=bench"]


def inode(mode: int, size: int) -> Inode:
    """Attributes of a file that just came to be."""
    return Inode(mode=mode, nlink=1, uid=0, gid=0, size=size, atime_ns=1, mtime_ns=1, ctime_ns=1, btime_ns=1)


class MemoryOperations:
    """As much of Operations as the benchmark needs; every answer is there at once."""

    def __init__(self) -> None:
        self._inodes = {1: inode(0o40777, 0), 2: inode(0o100666, SIZE)}
        self._names = {b"big": 2}
        self._last = 2
        self._content = memoryview(b"x" * SIZE)
        self._missing = Entry(0, self._inodes[1], 0.0, 0.0)

    def woken(self) -> None:
        """See fsd.frontend.ports.Operations."""

    def lookup(self, parent: int, name: bytes) -> Entry:
        nodeid = self._names.get(name)
        if nodeid is None:
            raise NoSuchEntry("lookup")
        return Entry(nodeid, self._inodes[nodeid], 0.0, 0.0)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        return None

    def getattr(self, nodeid: int) -> Entry:
        return Entry(nodeid, self._inodes[nodeid], 0.0, 0.0)

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Opened, Entry]:
        nodeid = self._names.get(name)
        if nodeid is None:
            self._last = nodeid = self._last + 1
            self._names[name] = nodeid
            self._inodes[nodeid] = inode(0o100666, 0)
        return Opened(0, False), Entry(nodeid, self._inodes[nodeid], 0.0, 0.0)

    def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        if self._names.pop(name, None) is None:
            raise NoSuchEntry("unlink")

    def open(self, nodeid: int, flags: int, caller: Caller, *, kill_privileges: bool = False) -> Opened:
        return Opened(0, False)

    def read(self, fh: int, offset: int, size: int) -> memoryview:
        return self._content[offset : offset + size]

    def write(self, fh: int, offset: int, data: bytes, **more: bool) -> int:
        return len(data)

    def flush(self, fh: int, lock_owner: int = 0) -> None:
        return None

    def release(self, fh: int, *, lock_owner: int = 0, flock: bool = False) -> None:
        return None

    def getxattr(self, nodeid: int, name: bytes, caller: Caller) -> bytes:
        raise NotSupported("getxattr")

    def statfs(self) -> StatFsDone:
        return StatFsDone(SIZE, SIZE, 2, 2, 2)

    def opendir(self, nodeid: int) -> Opened:
        return Opened(0, False)

    def readdir(self, fh: int, cookie: int, plus: bool, add: AddEntry) -> None:
        return None

    def releasedir(self, fh: int) -> None:
        return None


async def serve(front_end: str, mountpoint: str) -> None:
    """Mount, and serve until unmounted."""
    keep_freed_buffers()
    operations = cast(Operations, MemoryOperations())
    if front_end == "pyfuse3":
        from fsd.frontend.pyfuse3_frontend import Pyfuse3Mount

        made = Pyfuse3Mount(mountpoint, OPTIONS)
        await made.serve(operations)
        made.close()
    else:
        mount = await trio.to_thread.run_sync(DirectMount, mountpoint, OPTIONS)
        await mount.serve(operations)
        await trio.to_thread.run_sync(mount.close)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], sys.argv[2])
