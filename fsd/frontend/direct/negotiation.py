"""INIT: what kernel and daemon agree on, each flag chosen on purpose.

CHOICES is the one table: docs/reference/fuse.md shows it (a test compares them).  A flag is agreed on if we want it and
the kernel offers it.  Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fsd.frontend.direct import replies
from fsd.frontend.direct.protocol import MAJOR, MINOR, MINOR_MIN, PAGES_MAX, WRITE_SIZE_MAX, InitFlags
from fsd.frontend.direct.requests import INIT_IN, INIT_IN_SHORT

BACKGROUND_MAX: Final = 64
"""Read-ahead and asynchronous direct requests that the kernel lets be under way (its own default is 12)."""
CONGESTION_THRESHOLD: Final = BACKGROUND_MAX * 3 // 4
"""Of these, from when on the kernel holds back read-ahead; libfuse's and the kernel's own proportion."""

CHOICES: Final[tuple[tuple[InitFlags, bool, str], ...]] = (
    (InitFlags.ASYNC_READ, True, "read-ahead sends many requests at once"),
    (InitFlags.POSIX_LOCKS, True, "fcntl locks are asked for: they exclude between mounts"),
    (InitFlags.ATOMIC_O_TRUNC, True, "open truncates in one request, and no other open sees it half done"),
    (InitFlags.EXPORT_SUPPORT, True, 'lookup answers "." and "..": file handles stay valid after the kernel forgot'),
    (InitFlags.BIG_WRITES, True, "writes of more than one page"),
    (InitFlags.DONT_MASK, True, "the umask does not count where a default access control list is inherited"),
    (InitFlags.SPLICE_WRITE, False, "replies are written from memory that is ours anyway"),
    (InitFlags.SPLICE_MOVE, False, "as above"),
    (InitFlags.SPLICE_READ, False, "a write's bytes are checksummed, so they must be read"),
    (InitFlags.FLOCK_LOCKS, True, "flock locks, too"),
    (InitFlags.HAS_IOCTL_DIR, True, "ioctl on directories is answered as on files"),
    (InitFlags.AUTO_INVAL_DATA, False, "would drop the pages of a file after each write of our own"),
    (InitFlags.DO_READDIRPLUS, True, "listings bring attributes"),
    (InitFlags.READDIRPLUS_AUTO, True, "where the program asks for them"),
    (InitFlags.ASYNC_DIO, True, "a large direct read or write is many requests at once"),
    (
        InitFlags.WRITEBACK_CACHE,
        False,
        "no gain for large writes (measured); the kernel would believe its own size and mtime over those of others",
    ),
    (InitFlags.NO_OPEN_SUPPORT, False, "opens are needed: for O_TRUNC, for the write lease, to hold what is unlinked"),
    (InitFlags.PARALLEL_DIROPS, True, "look-ups and listings of one directory at the same time"),
    (InitFlags.HANDLE_KILLPRIV, False, "the second version says more"),
    (InitFlags.POSIX_ACL, True, "the kernel asks for access control lists, keeps them, and checks them with the mode"),
    (InitFlags.ABORT_ERROR, True, "an abort (ECONNABORTED) can be told from an unmount (ENODEV)"),
    (InitFlags.MAX_PAGES, True, f"{PAGES_MAX} pages, so reads and writes of 1 MiB"),
    (InitFlags.CACHE_SYMLINKS, True, "a symlink's target never changes"),
    (InitFlags.NO_OPENDIR_SUPPORT, False, "a listing needs its place"),
    (InitFlags.EXPLICIT_INVAL_DATA, True, "pages go when we say so, and not when mtime or size look different"),
    (InitFlags.MAP_ALIGNMENT, False, "for DAX"),
    (InitFlags.SUBMOUNTS, False, "one file system, one device number"),
    (
        InitFlags.HANDLE_KILLPRIV_V2,
        True,
        "each write, truncation and open says whether suid and sgid must go: no request before a write to ask for it",
    ),
    (InitFlags.SETXATTR_EXT, True, "setxattr says whether an access control list takes sgid away"),
    (InitFlags.INIT_EXT, True, "flags from 32 on"),
    (InitFlags.SECURITY_CTX, False, "SELinux labels of new files are not kept"),
    (InitFlags.HAS_INODE_DAX, False, "no DAX"),
    (InitFlags.CREATE_SUPP_GROUP, True, "what makes a file tells if the caller is in the directory's group (sgid)"),
    (InitFlags.HAS_EXPIRE_ONLY, True, "directories' names are doubted, not forgotten: programs stand in them"),
    (InitFlags.DIRECT_IO_ALLOW_MMAP, True, "a file open with direct I/O can still be mapped"),
    (InitFlags.PASSTHROUGH, False, "later: reads of files that lie whole in a local cache"),
    (InitFlags.NO_EXPORT_SUPPORT, False, "file handles are supported"),
    (InitFlags.HAS_RESEND, False, "a daemon that died is not replaced under a live mount"),
    (InitFlags.ALLOW_IDMAP, False, "id-mapped mounts are not tested yet"),
    (InitFlags.OVER_IO_URING, False, "no gain on two cores (measured)"),
    (InitFlags.REQUEST_TIMEOUT, False, "would end the mount where a late answer is wanted; deadlines are ours"),
)
"""(flag, whether we ask for it, why)."""

WANTED: Final = sum(flag for flag, wanted, _ in CHOICES if wanted)


class VersionTooOld(Exception):
    """The kernel's protocol is too old; the message says so, for people."""


@dataclass(frozen=True)
class Agreement:
    """What INIT brought about."""

    minor: int
    flags: int  # InitFlags.
    max_readahead: int

    @property
    def extended_setxattr(self) -> bool:
        """Whether SETXATTR has its longer struct."""
        return bool(self.flags & InitFlags.SETXATTR_EXT)


def agree(body: bytes) -> Agreement | None:
    """The agreement that INIT's body leads to; None when the kernel speaks a later major version.

    To that one the answer is our own major version, upon which it sends INIT again in ours.

    Raises:
        VersionTooOld: nothing can be agreed on.
    """
    extended = len(body) >= INIT_IN.size
    major, minor, max_readahead, flags, *more = (INIT_IN if extended else INIT_IN_SHORT).unpack_from(body)
    if major > MAJOR:
        return None
    if major < MAJOR or minor < MINOR_MIN:
        raise VersionTooOld(f"the kernel speaks FUSE {major}.{minor}; fsd needs {MAJOR}.{MINOR_MIN} (Linux 5.4)")
    if more and flags & InitFlags.INIT_EXT:
        flags |= more[0] << 32
    return Agreement(min(minor, MINOR), flags & WANTED, max_readahead)


def init_reply(unique: int, agreed: Agreement | None) -> bytes:
    """The reply that says so."""
    return replies.init(
        unique,
        major=MAJOR,
        minor=agreed.minor if agreed else MINOR,
        max_readahead=agreed.max_readahead if agreed else 0,
        flags=agreed.flags if agreed else 0,
        max_background=BACKGROUND_MAX,
        congestion_threshold=CONGESTION_THRESHOLD,
        max_write=WRITE_SIZE_MAX,
        max_pages=PAGES_MAX,
    )
