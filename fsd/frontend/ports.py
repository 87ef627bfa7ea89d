"""The narrow interface between a front end (which speaks FUSE) and the file-system object (which knows the services).

A front end translates the kernel's requests into calls of `Operations` and the results into replies.  Every operation
is an ordinary function: it *returns the answer at once* when a cache has it, and *returns a coroutine that ends in the
answer* when it needs the network.  A front end that wants to spend no task on a cached answer tests which it got:

    answer = operations.getattr(nodeid)
    if isinstance(answer, Coroutine):
        answer = await answer              # or: start a task that awaits it and replies
    reply(answer)

Either way a refusal or fault is a StoreError, whose errno goes to the kernel.  Between the moment an answer is there
and the moment its reply is written to the kernel there must be no await: the validity times in it hold for the state
of that moment.

`nodeid` is the kernel's name of an inode: the service's inode number, except that the root of the mount is ROOT_NODEID
whichever directory was mounted.  Every Entry that an operation returns (and every one that `readdir` with `plus` has
added, "." and ".." aside) counts as one look-up, which the kernel gives back with `forget`.

In the other direction, `KernelNotifier` is what the file-system object asks of a front end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from metadata.core.locks import LockKind
from metadata.core.schema import Inode
from metadata.protocol import Caller, StatFsDone

ROOT_NODEID = 1
"""FUSE_ROOT_ID."""
BLOCK_SIZE = 4096
"""Unit of statvfs."""
PREFERRED_IO_SIZE = 64 << 10
"""st_blksize: what stdio and Python buffer; larger makes small random reads through them costly."""

T = TypeVar("T")
Answer: TypeAlias = T | Coroutine[Any, Any, T]
"""The answer, or a coroutine that ends in it."""


class Entry:
    """An inode as the kernel is to see it; `nodeid` 0 says that the name does not exist (and for how long)."""

    __slots__ = ("attr_timeout_s", "entry_timeout_s", "inode", "nodeid")

    def __init__(self, nodeid: int, inode: Inode, entry_timeout_s: float, attr_timeout_s: float) -> None:
        self.nodeid = nodeid
        self.inode = inode
        self.entry_timeout_s = entry_timeout_s
        self.attr_timeout_s = attr_timeout_s


class Opened:
    """A new handle.

    `keep_cache`: the pages that the kernel holds of this file (of a directory: its listing) are good; of a directory
    also: it may keep those of this handle.  `direct_io`: reads and writes of this handle pass by the kernel's pages.
    A front end that cannot say one of these to the kernel leaves it out: none is needed for correctness but
    `direct_io`, and that one every front end can say.
    """

    __slots__ = ("direct_io", "fh", "keep_cache")

    def __init__(self, fh: int, keep_cache: bool, *, direct_io: bool = False) -> None:
        self.fh = fh
        self.keep_cache = keep_cache
        self.direct_io = direct_io


class Changes:
    """What a setattr asks for; None: leave it.  Nothing at all asks to clear suid and sgid, as a write does.

    `atime_now`, `mtime_now`: the service's clock, instead of a time that is given.

    `kill_privileges`, with `size`: the caller lacks CAP_FSETID, so suid and sgid go.
    """

    __slots__ = (
        "atime_now",
        "atime_ns",
        "ctime_ns",
        "gid",
        "kill_privileges",
        "mode",
        "mtime_now",
        "mtime_ns",
        "size",
        "uid",
    )

    def __init__(
        self,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        atime_now: bool = False,
        mtime_now: bool = False,
        kill_privileges: bool = False,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size
        self.atime_ns = atime_ns
        self.mtime_ns = mtime_ns
        self.ctime_ns = ctime_ns
        self.atime_now = atime_now
        self.mtime_now = mtime_now
        self.kill_privileges = kill_privileges


class FileLock:
    """A range of a file that is locked or to be locked; `end` is the last byte, `pid` the process that asked."""

    __slots__ = ("end", "kind", "pid", "start")

    def __init__(self, kind: LockKind, start: int, end: int, pid: int) -> None:
        self.kind = kind
        self.start = start
        self.end = end
        self.pid = pid


AddEntry: TypeAlias = Callable[[bytes, Entry, int], bool]
"""Takes (name, entry, cookie after it) into the reply; False: it did not fit and was not taken."""


class Operations(Protocol):
    """What the file-system object offers; every errno is in the StoreError that is raised."""

    def woken(self) -> None:
        """To be called before requests are answered, whenever the front end may have slept.

        The lease may have ended meanwhile: then nothing is answered from memory any more.
        """
        ...

    def lookup(self, parent: int, name: bytes) -> Answer[Entry]:
        """The entry of that name; nodeid 0 when there is none.  "." and ".." are answered too (file handles)."""
        ...

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel gives back (nodeid, look-up count)."""
        ...

    def getattr(self, nodeid: int) -> Answer[Entry]:
        """Attributes, with the effect of writes that have not left this mount.  Counts no look-up."""
        ...

    def setattr(self, nodeid: int, changes: Changes, caller: Caller) -> Answer[Entry]:
        """chmod, chown, truncate, utimens; answers with the attributes after it.  Counts no look-up."""
        ...

    def get_flags(self, nodeid: int) -> Answer[int]:
        """FS_IMMUTABLE_FL and FS_APPEND_FL (chattr), as FS_IOC_GETFLAGS tells them."""
        ...

    def set_flags(self, nodeid: int, flags: int, caller: Caller) -> Answer[None]:
        """Have exactly these flags; the kernel has checked that the caller may."""
        ...

    def statfs(self) -> Answer[StatFsDone]:
        """Space and inodes, of the cluster or as far as quotas let this mount use them; every field counts."""
        ...

    def readlink(self, nodeid: int) -> Answer[bytes]:
        """A symlink's target."""
        ...

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Answer[Entry]:
        """Make a file, fifo, socket or device."""
        ...

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Answer[Entry]:
        """Make a directory."""
        ...

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Answer[Entry]:
        """Make a symlink."""
        ...

    def link(self, nodeid: int, parent: int, name: bytes, caller: Caller) -> Answer[Entry]:
        """One more name."""
        ...

    def unlink(self, parent: int, name: bytes, caller: Caller) -> Answer[None]:
        """Remove a name of anything but a directory."""
        ...

    def rmdir(self, parent: int, name: bytes, caller: Caller) -> Answer[None]:
        """Remove an empty directory."""
        ...

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> Answer[None]:
        """renameat2."""
        ...

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> Answer[tuple[Opened, Entry]]:
        """Make a regular file and open it.  ESTALE when another mount made the name first: the kernel looks again."""
        ...

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> Answer[tuple[Opened, Entry]]:
        """Make a regular file without a name and open it; with O_EXCL in `flags` it never gets one."""
        ...

    def open(self, nodeid: int, flags: int, caller: Caller, *, kill_privileges: bool = False) -> Answer[Opened]:
        """Open a regular file; O_TRUNC in `flags` truncates it, and with `kill_privileges` takes suid and sgid away."""
        ...

    def read(self, fh: int, offset: int, size: int) -> Answer[bytes | memoryview]:
        """`size` bytes, fewer only at the end of the file."""
        ...

    def write(
        self,
        fh: int,
        offset: int,
        data: bytes,
        *,
        kill_privileges: bool = False,
        caller: Caller | None = None,
        from_pages: bool | None = None,
    ) -> Answer[int]:
        """Write; `data` may be kept.

        `kill_privileges`: `caller` lacks CAP_FSETID: suid goes, and sgid if the group may execute the file or is not
        the caller's.
        `from_pages`: pages of a mapping that the kernel writes back, through any handle that may write: they stay at
        their offset whatever the handle's flags say.  None: the front end cannot tell.
        """
        ...

    def flush(self, fh: int, lock_owner: int = 0) -> Answer[None]:
        """close(2) of one descriptor: the bytes are durable when it is answered.

        `lock_owner`: the kernel's number of the process whose POSIX locks on the file end with it; 0: not told.
        """
        ...

    def fsync(self, fh: int, datasync: bool) -> Answer[None]:
        """The bytes are durable when it is answered."""
        ...

    def release(self, fh: int, *, lock_owner: int = 0, flock: bool = False) -> Answer[None]:
        """The last descriptor of the handle is gone; with `flock`, the flock(2) lock of `lock_owner` ends with it."""
        ...

    def get_lock(self, fh: int, owner: int, lock: FileLock) -> Answer[FileLock | None]:
        """F_GETLK: the first POSIX lock of another owner that is in the way of `lock`; None: it could be had.

        Its `pid` is 0 if it belongs to a process of another machine.
        """
        ...

    def set_lock(self, fh: int, owner: int, lock: FileLock, *, flock: bool, wait: bool) -> Answer[None]:
        """Lock or unlock for `owner` (the kernel's number of a process or an open file); `flock`: the whole file.

        EAGAIN if another owner is in the way and it is not to `wait`.  A waiting one may be cancelled at any time; when
        it then ends without Cancelled, the lock is held all the same.  EDEADLK (never with `flock`), ENOLCK.
        """
        ...

    def fallocate(self, fh: int, mode: int, offset: int, length: int, *, kill_privileges: bool = False) -> Answer[None]:
        """fallocate(2): mode bits KEEP_SIZE 1, PUNCH_HOLE 2, ZERO_RANGE 16; others are EOPNOTSUPP.

        What was allocated has its room on the disks: ENOSPC comes here and not later.  `kill_privileges`: as in write.
        """
        ...

    def seek(self, fh: int, offset: int, whence: int) -> Answer[int]:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; ENXIO at or beyond the end of the file, or with no data behind."""
        ...

    def copy_range(
        self,
        fh_in: int,
        offset_in: int,
        fh_out: int,
        offset_out: int,
        length: int,
        *,
        kill_privileges: bool = False,
    ) -> Answer[int]:
        """copy_file_range(2) by sharing blocks; how many bytes, maybe fewer than asked for, 0 at the end of the source.

        EOPNOTSUPP for what no blocks can be shared of: the kernel then copies by itself.
        """
        ...

    def sync(self) -> Answer[None]:
        """syncfs(2): every byte of the mount that was written before is durable when it is answered."""
        ...

    def opendir(self, nodeid: int, flags: int = os.O_RDONLY) -> Answer[Opened]:
        """A handle for listing."""
        ...

    def readdir(self, fh: int, cookie: int, plus: bool, add: AddEntry) -> Answer[None]:
        """Add entries that come after `cookie` (0: from the beginning) until `add` refuses one or there are no more."""
        ...

    def releasedir(self, fh: int) -> None:
        """The listing is closed."""
        ...

    def fsyncdir(self, fh: int) -> None:
        """Nothing to do: acknowledged names are durable."""
        ...

    def getxattr(self, nodeid: int, name: bytes, caller: Caller) -> Answer[bytes]:
        """An extended attribute's value."""
        ...

    def listxattr(self, nodeid: int, caller: Caller) -> Answer[tuple[bytes, ...]]:
        """Their names."""
        ...

    def setxattr(
        self, nodeid: int, name: bytes, value: bytes, how: int, caller: Caller, *, drop_sgid: bool = False
    ) -> Answer[None]:
        """Set one; `how` as the flags of setxattr(2).

        `drop_sgid`, with an access control list: the caller lacks CAP_FSETID and is not of the inode's group
        (FUSE_SETXATTR_ACL_KILL_SGID), so the setgid bit goes.
        """
        ...

    def removexattr(self, nodeid: int, name: bytes, caller: Caller) -> Answer[None]:
        """Remove one."""
        ...


class KernelName(NamedTuple):
    """A name that the kernel may hold."""

    parent: int  # nodeid
    name: bytes
    is_directory: bool = False
    """Then it is doubted, not forgotten: a program that stands in it would not know where it is (getcwd: ENOENT)."""


class KernelNotifier(Protocol):
    """What the file-system object asks of a front end.  Nothing here is awaited by an operation.

    Notifications leave from a thread of their own: the kernel may hold the thread until a request that is under way
    has been answered (an entry's directory is locked, a page is being read), so the loop must go on meanwhile.
    """

    def invalidate_attributes(self, nodeid: int) -> None:
        """Queue: forget the attributes; takes no lock in the kernel."""
        ...

    def invalidate_attributes_now(self, nodeid: int) -> None:
        """Forget them before this returns: for a handler whose answer says nothing of a change that it made.

        Only of an inode that the request under way holds (by an open file, say): the kernel waits for one that it is
        about to drop, and for the pages of that to be written, by us.  Otherwise it waits for nothing.
        """
        ...

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        """Queue: forget the attributes, and the pages of [offset, offset + size); size 0: to the end of the file."""
        ...

    def invalidate_entries(self, entries: list[KernelName]) -> None:
        """Queue: forget these names."""
        ...

    async def invalidate_all(self, nodeids: list[int], entries: list[KernelName]) -> None:
        """Forget these names, and the attributes and pages of `nodeids`; return when the kernel has done so."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether all that was queued is done."""
        ...

    async def drop(self, attributes: Sequence[int], pages: Sequence[int]) -> None:
        """Forget the attributes of the one, attributes and pages of the other; return when the kernel has done so.

        Of what is queued it does not wait for anything.  May wait in the kernel for reads and writes of those pages.
        """
        ...

    async def drop_names(self, names: Sequence[KernelName]) -> None:
        """As `drop`, for names, directories' too; may wait for whatever is under way in their directories.

        When cancelled, the kernel may do it later.
        """
        ...

    def make_names_void(self) -> bool:
        """Make the kernel look up every name again, before this returns; False: it cannot (before Linux 6.16).

        It waits for nothing.  But a program that stands in a directory does not know where it is (getcwd: ENOENT)
        between the next use of the directory's name and its answer.
        """
        ...
