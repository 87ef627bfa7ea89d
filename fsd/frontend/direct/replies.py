"""Replies and notifications to the kernel, put together: pure functions that give bytes.

The layouts are drawn in protocol.py.  Each function for a reply takes `unique`, the request's number, and gives the
whole message, header and all, in one pack: that is most of what an answer from memory costs.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from fsd.frontend.direct.protocol import (
    EXPIRE_ONLY,
    FOPEN_CACHE_DIR,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FOPEN_PARALLEL_DIRECT_WRITES,
    STATX_BASIC_STATS,
    STATX_BTIME,
    Notification,
)
from fsd.frontend.ports import BLOCK_SIZE, PREFERRED_IO_SIZE, Entry, FileLock, Opened
from metadata.core.locks import LockKind
from metadata.core.schema import NAME_SIZE_MAX
from metadata.protocol import StatFsDone

NS_PER_S: Final = 1_000_000_000

_HEADER = "IiQ"
_ATTR = "QQQqqqIIIIIIIIII"
_ENTRY = "QQQQII" + _ATTR
_OPENED = "QIi"

OUT_HEADER: Final = Struct("=" + _HEADER)
HEADER_SIZE: Final = OUT_HEADER.size
ENTRY_SIZE: Final = Struct("=" + _ENTRY).size
DIRENT: Final = Struct("=QQII")
_DIRENT_PLUS: Final = Struct("=" + _ENTRY + "QQII")
_PAD = tuple(bytes(-length % 8) for length in range(8))

_ENTRY_REPLY: Final = Struct("=" + _HEADER + _ENTRY)
_CREATED_REPLY: Final = Struct("=" + _HEADER + _ENTRY + _OPENED)
_ATTRIBUTES_REPLY: Final = Struct("=" + _HEADER + "QI4x" + _ATTR)
_OPENED_REPLY: Final = Struct("=" + _HEADER + _OPENED)
_STATFS_REPLY: Final = Struct("=" + _HEADER + "QQQQQIII28x")
_U32_REPLY: Final = Struct("=" + _HEADER + "I4x")
_U64_REPLY: Final = Struct("=" + _HEADER + "Q")
_LOCK_REPLY: Final = Struct("=" + _HEADER + "QQII")
_IOCTL_REPLY: Final = Struct("=" + _HEADER + "iIII")
_INIT_REPLY: Final = Struct("=" + _HEADER + "IIIIHHIIHHIIH22x")
_SX_TIME = "qI4x"
_STATX_REPLY: Final = Struct("=" + _HEADER + "QII16x" + "IIQIIIH2xQQQQ" + 4 * _SX_TIME + "IIII112x")
_INVAL_INODE: Final = Struct("=" + _HEADER + "Qqq")
_INVAL_ENTRY: Final = Struct("=" + _HEADER + "QII")
_DELETE: Final = Struct("=" + _HEADER + "QQI4x")


_VALID: Final = {float(seconds): (seconds, 0) for seconds in range(601)}
"""Whole seconds, at hand: what is left of a lease is told so."""


def _valid(timeout_s: float) -> tuple[int, int]:
    """Seconds and nanoseconds."""
    seconds = int(timeout_s)
    return seconds, int((timeout_s - seconds) * 1e9)


# --- replies ----------------------------------------------------------------------------------------------------


def error(unique: int, errno: int) -> bytes:
    """It failed; `errno` is positive."""
    return OUT_HEADER.pack(HEADER_SIZE, -errno, unique)


def done(unique: int, answer: object = None) -> bytes:
    """It succeeded and there is nothing to tell."""
    return OUT_HEADER.pack(HEADER_SIZE, 0, unique)


def data(unique: int, content: bytes | memoryview) -> list[bytes | memoryview]:
    """Bytes, not copied: header and content."""
    return [OUT_HEADER.pack(HEADER_SIZE + len(content), 0, unique), content]


def entry(unique: int, found: Entry) -> bytes:
    """A name's inode; nodeid 0 says that there is none."""
    inode, nodeid = found.inode, found.nodeid
    entry_s, entry_ns = _VALID.get(found.entry_timeout_s) or _valid(found.entry_timeout_s)
    attr_s, attr_ns = _VALID.get(found.attr_timeout_s) or _valid(found.attr_timeout_s)
    atime, atime_ns = divmod(inode.atime_ns, NS_PER_S)
    mtime, mtime_ns = divmod(inode.mtime_ns, NS_PER_S)
    ctime, ctime_ns = divmod(inode.ctime_ns, NS_PER_S)
    return _ENTRY_REPLY.pack(
        _ENTRY_REPLY.size, 0, unique,
        nodeid, 0, entry_s, attr_s, entry_ns, attr_ns,
        nodeid, inode.size, (inode.allocated + 511) >> 9,
        atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, PREFERRED_IO_SIZE, 0,
    )  # fmt: skip


def attributes(unique: int, found: Entry) -> bytes:
    """An inode's attributes (GETATTR, SETATTR)."""
    inode = found.inode
    attr_s, attr_ns = _VALID.get(found.attr_timeout_s) or _valid(found.attr_timeout_s)
    atime, atime_ns = divmod(inode.atime_ns, NS_PER_S)
    mtime, mtime_ns = divmod(inode.mtime_ns, NS_PER_S)
    ctime, ctime_ns = divmod(inode.ctime_ns, NS_PER_S)
    return _ATTRIBUTES_REPLY.pack(
        _ATTRIBUTES_REPLY.size, 0, unique,
        attr_s, attr_ns,
        found.nodeid, inode.size, (inode.allocated + 511) >> 9,
        atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, PREFERRED_IO_SIZE, 0,
    )  # fmt: skip


def statx(unique: int, found: Entry) -> bytes:
    """An inode's attributes with the time of its birth."""
    inode = found.inode
    attr_s, attr_ns = _VALID.get(found.attr_timeout_s) or _valid(found.attr_timeout_s)
    rdev = inode.rdev
    times: list[int] = []
    for time_ns in (inode.atime_ns, inode.btime_ns, inode.ctime_ns, inode.mtime_ns):
        times += divmod(time_ns, NS_PER_S)
    return _STATX_REPLY.pack(
        _STATX_REPLY.size, 0, unique,
        attr_s, attr_ns, 0,
        STATX_BASIC_STATS | STATX_BTIME, PREFERRED_IO_SIZE, 0,
        inode.nlink, inode.uid, inode.gid, inode.mode,
        found.nodeid, inode.size, (inode.allocated + 511) >> 9, 0,
        *times,
        rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00, 0, 0,
    )  # fmt: skip


def open_flags(opened: Opened) -> int:
    """FOPEN flags of a file."""
    flags = 0
    if opened.keep_cache:
        flags = FOPEN_KEEP_CACHE
    if opened.direct_io:
        flags |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES
    return flags


def opened_file(unique: int, opened: Opened) -> bytes:
    """A handle (OPEN)."""
    return _OPENED_REPLY.pack(_OPENED_REPLY.size, 0, unique, opened.fh, open_flags(opened), 0)


def opened_directory(unique: int, opened: Opened) -> bytes:
    """A handle for listing (OPENDIR)."""
    flags = FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE if opened.keep_cache else 0
    return _OPENED_REPLY.pack(_OPENED_REPLY.size, 0, unique, opened.fh, flags, 0)


def created(unique: int, made: tuple[Opened, Entry]) -> bytes:
    """A new file and a handle of it (CREATE, TMPFILE)."""
    opened, found = made
    inode, nodeid = found.inode, found.nodeid
    entry_s, entry_ns = _VALID.get(found.entry_timeout_s) or _valid(found.entry_timeout_s)
    attr_s, attr_ns = _VALID.get(found.attr_timeout_s) or _valid(found.attr_timeout_s)
    atime, atime_ns = divmod(inode.atime_ns, NS_PER_S)
    mtime, mtime_ns = divmod(inode.mtime_ns, NS_PER_S)
    ctime, ctime_ns = divmod(inode.ctime_ns, NS_PER_S)
    return _CREATED_REPLY.pack(
        _CREATED_REPLY.size, 0, unique,
        nodeid, 0, entry_s, attr_s, entry_ns, attr_ns,
        nodeid, inode.size, (inode.allocated + 511) >> 9,
        atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, PREFERRED_IO_SIZE, 0,
        opened.fh, open_flags(opened), 0,
    )  # fmt: skip


def written(unique: int, size: int) -> bytes:
    """How many bytes (WRITE, COPY_FILE_RANGE; of GETXATTR and LISTXATTR: how many there would be)."""
    return _U32_REPLY.pack(_U32_REPLY.size, 0, unique, size)


def number(unique: int, value: int) -> bytes:
    """A large number (LSEEK, COPY_FILE_RANGE_64, BMAP)."""
    return _U64_REPLY.pack(_U64_REPLY.size, 0, unique, value)


def statfs(unique: int, figures: StatFsDone) -> bytes:
    """Space and inodes."""
    free = figures.space_free // BLOCK_SIZE
    return _STATFS_REPLY.pack(
        _STATFS_REPLY.size, 0, unique,
        figures.space_total // BLOCK_SIZE, free, free, figures.inodes_total, figures.inodes_free,
        BLOCK_SIZE, NAME_SIZE_MAX, BLOCK_SIZE,
    )  # fmt: skip


def lock(unique: int, found: FileLock | None) -> bytes:
    """The lock that is in the way, or F_UNLCK (GETLK)."""
    if found is None:
        return _LOCK_REPLY.pack(_LOCK_REPLY.size, 0, unique, 0, 0, LockKind.UNLOCK, 0)
    return _LOCK_REPLY.pack(_LOCK_REPLY.size, 0, unique, found.start, found.end, found.kind, found.pid)


def ioctl(unique: int, content: bytes = b"") -> bytes:
    """An ioctl succeeded, with the bytes for the caller's buffer."""
    return _IOCTL_REPLY.pack(_IOCTL_REPLY.size + len(content), 0, unique, 0, 0, 0, 0) + content


def init(
    unique: int,
    *,
    major: int,
    minor: int,
    max_readahead: int,
    flags: int,
    max_background: int,
    congestion_threshold: int,
    max_write: int,
    max_pages: int,
) -> bytes:
    """What was agreed; times are true to the nanosecond."""
    return _INIT_REPLY.pack(
        _INIT_REPLY.size, 0, unique,
        major, minor, max_readahead, flags & 0xFFFFFFFF, max_background, congestion_threshold, max_write, 1,
        max_pages, 0, flags >> 32, 0, 0,
    )  # fmt: skip


# --- listings ---------------------------------------------------------------------------------------------------


class Listing:
    """The reply to READDIR or READDIRPLUS, as it fills; `add` is an AddEntry of the operations."""

    __slots__ = ("_size_max", "content")

    def __init__(self, size_max: int) -> None:
        self.content = bytearray()
        self._size_max = size_max

    def add(self, name: bytes, listed: Entry, cookie: int) -> bool:
        """Take one entry; False: it does not fit and was not taken."""
        content, length = self.content, len(name)
        if len(content) + DIRENT.size + (length + 7 & ~7) > self._size_max:
            return False
        content += DIRENT.pack(listed.nodeid, cookie, length, listed.inode.mode >> 12)
        content += name
        content += _PAD[length & 7]
        return True


class ListingPlus(Listing):
    """The reply to READDIRPLUS."""

    __slots__ = ()

    def add(self, name: bytes, listed: Entry, cookie: int) -> bool:
        """As Listing.add; "." and ".." come without attributes, as the kernel does nothing with them."""
        content, length = self.content, len(name)
        if len(content) + _DIRENT_PLUS.size + (length + 7 & ~7) > self._size_max:
            return False
        inode, nodeid = listed.inode, listed.nodeid
        entry_s, entry_ns = _VALID.get(listed.entry_timeout_s) or _valid(listed.entry_timeout_s)
        attr_s, attr_ns = _VALID.get(listed.attr_timeout_s) or _valid(listed.attr_timeout_s)
        atime, atime_ns = divmod(inode.atime_ns, NS_PER_S)
        mtime, mtime_ns = divmod(inode.mtime_ns, NS_PER_S)
        ctime, ctime_ns = divmod(inode.ctime_ns, NS_PER_S)
        content += _DIRENT_PLUS.pack(
            0 if name in (b".", b"..") else nodeid, 0, entry_s, attr_s, entry_ns, attr_ns,
            nodeid, inode.size, (inode.allocated + 511) >> 9,
            atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
            inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, PREFERRED_IO_SIZE, 0,
            nodeid, cookie, length, inode.mode >> 12,
        )  # fmt: skip
        content += name
        content += _PAD[length & 7]
        return True

    def counted(self) -> list[int]:
        """The nodeids that count as looked up, if the kernel takes the reply."""
        content, found, at = memoryview(self.content), [], 0
        while at < len(content):
            nodeid = int.from_bytes(content[at : at + 8], "little")
            _, _, length, _ = DIRENT.unpack_from(content, at + ENTRY_SIZE)
            if nodeid:
                found.append(nodeid)
            at += _DIRENT_PLUS.size + (length + 7 & ~7)
        return found


def listing(unique: int, filled: Listing) -> list[bytes | memoryview]:
    """A stretch of a directory; an empty one is its end."""
    return data(unique, memoryview(filled.content))


# --- notifications ----------------------------------------------------------------------------------------------


def forget_attributes(nodeid: int) -> bytes:
    """The kernel's attributes of the inode are out of date."""
    return _INVAL_INODE.pack(_INVAL_INODE.size, Notification.INVAL_INODE, 0, nodeid, -1, 0)


def forget_pages(nodeid: int, offset: int, size: int) -> bytes:
    """As `forget_attributes`, and the pages of [offset, offset + size); size 0: to the end."""
    return _INVAL_INODE.pack(_INVAL_INODE.size, Notification.INVAL_INODE, 0, nodeid, offset, size)


def forget_entry(parent: int, name: bytes) -> bytes:
    """The name may be another inode now, or none."""
    size = _INVAL_ENTRY.size + len(name) + 1
    return _INVAL_ENTRY.pack(size, Notification.INVAL_ENTRY, 0, parent, len(name), 0) + name + b"\0"


def doubt_entry(parent: int, name: bytes) -> bytes:
    """As `forget_entry`, but the kernel keeps the name and asks whether it is still so at its next use (Linux 6.2)."""
    size = _INVAL_ENTRY.size + len(name) + 1
    return _INVAL_ENTRY.pack(size, Notification.INVAL_ENTRY, 0, parent, len(name), EXPIRE_ONLY) + name + b"\0"


def entry_deleted(parent: int, child: int, name: bytes) -> bytes:
    """The name was that inode and is gone: whoever watches it is told."""
    size = _DELETE.size + len(name) + 1
    return _DELETE.pack(size, Notification.DELETE, 0, parent, child, len(name)) + name + b"\0"


def forget_all_names() -> bytes:
    """Every name must be looked up again (Linux 6.16)."""
    return OUT_HEADER.pack(HEADER_SIZE, Notification.INC_EPOCH, 0)
