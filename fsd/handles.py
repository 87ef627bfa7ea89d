"""Open files and open listings, by the number that the kernel uses for them."""

from __future__ import annotations

import os

from fsd.core.error_log import ErrorCursor
from fsd.nodes import Node
from metadata.core.locks import FileKey, Owner
from metadata.protocol import Dirent
from wire.errors import LocksLost, StoreError

FIRST_PAGE_SIZE = 256
"""Entries asked for at first; each further page is twice as large."""
PAGE_SIZE_MAX = 2048
"""About 400 KiB of reply."""
ACCESS_MODES = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


def writes(flags: int) -> bool:
    """Whether a file opened with these flags may be written."""
    return flags & ACCESS_MODES != os.O_RDONLY


class FileHandle:
    """One open(2)."""

    __slots__ = ("appends", "counts_reads", "error_cursor", "fh", "lost_locks", "node", "synchronous", "writable")

    def __init__(self, fh: int, node: Node, flags: int, *, counts_reads: bool) -> None:
        self.fh = fh
        self.node = node
        self.writable = writes(flags)
        self.counts_reads = counts_reads  # Of the access time.
        self.appends = bool(flags & os.O_APPEND)
        self.synchronous = bool(flags & (os.O_SYNC | os.O_DSYNC))
        self.error_cursor: ErrorCursor | None = None  # None: as old as node.file, or older.
        # Locks got through it that went with a lost session, which nobody has got again or let go of: locks.py.
        self.lost_locks: set[tuple[FileKey, Owner]] | None = None

    def refuse_without_locks(self) -> None:
        """Raises: LocksLost, if the program believes to hold locks that it has lost."""
        if self.lost_locks:
            raise LocksLost(
                f"locks of inode {self.node.ino} were lost with the mount's session; close it or lock again"
            )


class Page:
    """A stretch of a listing: the entries after cookie `after`, as they were at one moment."""

    __slots__ = ("after", "asked", "end", "entries")

    def __init__(self, after: int, asked: int, entries: tuple[Dirent, ...], end: bool) -> None:
        self.after = after
        self.asked = asked
        self.entries = entries
        self.end = end


class DirectoryHandle:
    """One opendir(3): the page in hand, and what the kernel cannot tell by its cookie."""

    __slots__ = (
        "counts_reads",
        "cut_cookie",
        "cut_count",
        "fh",
        "listed_names",
        "listed_until",
        "node",
        "page",
        "page_size",
    )

    def __init__(self, fh: int, node: Node, *, counts_reads: bool) -> None:
        self.fh = fh
        self.counts_reads = counts_reads  # Of the access time.
        self.node = node
        self.page: Page | None = None
        self.page_size = FIRST_PAGE_SIZE
        self.cut_cookie = 0  # The last reply ended amid entries of this one cookie,
        self.cut_count = 0  # of which the kernel has got this many.
        self.listed_names: dict[bytes, int] | None = None  # node.names when the listing began: it has all names
        self.listed_until = 0  # up to this cookie.


class HandleTable:
    """Numbers for handles; a number is not used again."""

    def __init__(self) -> None:
        self.files: dict[int, FileHandle] = {}
        self.directories: dict[int, DirectoryHandle] = {}
        self._last = 0

    def next(self) -> int:
        """A new number."""
        self._last += 1
        return self._last

    def file(self, fh: int) -> FileHandle:
        """The open file; a number the kernel was never given is EIO, as nothing else could be said."""
        handle = self.files.get(fh)
        if handle is None:
            raise StoreError(f"no open file has the number {fh}")
        return handle

    def directory(self, fh: int) -> DirectoryHandle:
        """The open listing."""
        handle = self.directories.get(fh)
        if handle is None:
            raise StoreError(f"no open listing has the number {fh}")
        return handle
