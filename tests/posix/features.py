"""Which calls and features a file system must offer, and how to find out whether it does.

The one list that docs/reference/posix.md is checked against.  A probe that finds less than the list says fails the run;
so does one that finds more, for then the list is out of date.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.posix import acl, calls

SYSTEMS = ("ext4", "direct", "pyfuse3")

Probe = Callable[[bytes], object]
ABSENT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EPERM}


@dataclass(frozen=True)
class Feature:
    """One line of the list."""

    probe: Probe
    ext4: bool = True
    direct: bool = True
    pyfuse3: bool = True


def tmpfile(directory: bytes) -> None:
    """Open an inode without a name."""
    with calls.descriptor(directory, os.O_TMPFILE | os.O_RDWR, 0o600):
        return


def whiteout(directory: bytes) -> None:
    """Rename and leave a whiteout."""
    os.close(os.open(directory + b"/x", os.O_CREAT | os.O_RDWR))
    calls.renameat2(directory + b"/x", directory + b"/y", calls.RENAME_WHITEOUT)


def btime(directory: bytes) -> bool:
    """statx tells when an inode was made."""
    return bool(calls.statx(directory).mask & calls.STATX_BTIME)


def relatime(directory: bytes) -> bool:
    """Reading moves an access time that is older than the last change."""
    path = directory + b"/x"
    with calls.descriptor(path, os.O_CREAT | os.O_RDWR) as opened:
        os.write(opened, b"x")
    os.utime(path, ns=(1, 2))
    with open(path, "rb") as file:
        file.read()
    return os.stat(path).st_atime_ns != 1


def fallocate(mode: int) -> Probe:
    """fallocate with this mode, on a file of 64 KiB."""

    def probe(directory: bytes) -> None:
        with calls.descriptor(directory + b"/x", os.O_CREAT | os.O_RDWR) as opened:
            os.write(opened, bytes(65536))
            calls.fallocate(opened, mode, 16384, 16384)

    return probe


def seek_hole(directory: bytes) -> bool:
    """A hole is told from data, which Linux only feigns where a file system does not."""
    with calls.descriptor(directory + b"/x", os.O_CREAT | os.O_RDWR) as opened:
        os.pwrite(opened, b"x", 8 << 20)
        os.fsync(opened)
        return os.lseek(opened, 0, os.SEEK_HOLE) == 0


def access_list(directory: bytes) -> None:
    """Give a file a list."""
    os.setxattr(directory, acl.ACCESS, acl.pack(["u:rwx", "U1:rwx", "g:rwx", "m:rwx", "o:---"]))


def inode_flags(directory: bytes) -> None:
    """Make a file append-only, and undo it."""
    with calls.descriptor(directory + b"/x", os.O_CREAT | os.O_RDWR) as opened:
        kept = calls.inode_flags(opened)
        calls.set_inode_flags(opened, kept | calls.FS_APPEND_FL)
        calls.set_inode_flags(opened, kept)


def reflink(directory: bytes) -> None:
    """FICLONE."""
    with (
        calls.descriptor(directory + b"/x", os.O_CREAT | os.O_RDWR) as source,
        calls.descriptor(directory + b"/y", os.O_CREAT | os.O_RDWR) as target,
    ):
        os.write(source, bytes(65536))
        calls.clone(source, target)


def both_flags(directory: bytes) -> bool:
    """setxattr with XATTR_CREATE and XATTR_REPLACE at once is never right."""
    try:
        os.setxattr(directory, "user.a", b"1", os.XATTR_CREATE | os.XATTR_REPLACE)
    except OSError:
        return True
    return False


def with_file(use: Callable[[int], object], flags: int = 0) -> Probe:
    """Do something with a descriptor of a file of a page, opened with these flags."""

    def probe(directory: bytes) -> object:
        with calls.descriptor(directory + b"/x", os.O_CREAT | os.O_RDWR) as opened:
            os.write(opened, bytes(4096))
        with calls.descriptor(directory + b"/x", os.O_RDWR | flags) as opened:
            return use(opened)

    return probe


def shared_mapping(opened: int) -> None:
    """Write through a mapping."""
    with mmap.mmap(opened, 4096) as mapped:
        mapped[0:1] = b"m"


def description_lock(opened: int) -> None:
    """A lock that belongs to the open file description."""
    lock = struct.pack("=hhxxxxqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(opened, fcntl.F_OFD_SETLK, lock)


def copy_range(opened: int) -> None:
    """copy_file_range within a file."""
    os.copy_file_range(opened, opened, 1024, 0, 2048)


def rename_with(flags: int) -> Probe:
    """renameat2 of a file; with EXCHANGE to another, else to a free name."""

    def probe(directory: bytes) -> None:
        os.mkdir(directory + b"/x")
        if flags == calls.RENAME_EXCHANGE:
            os.mkdir(directory + b"/y")
        calls.renameat2(directory + b"/x", directory + b"/y", flags)

    return probe


def device(directory: bytes) -> None:
    """Make a device node and open it."""
    os.mknod(directory + b"/x", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.close(os.open(directory + b"/x", os.O_RDWR))


FEATURES: dict[str, Feature] = {
    "flock": Feature(with_file(lambda opened: fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))),
    "fcntl-lock": Feature(with_file(lambda opened: fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))),
    "description-lock": Feature(with_file(description_lock)),
    "shared-mapping": Feature(with_file(shared_mapping)),
    "direct-io": Feature(with_file(lambda opened: os.preadv(opened, [mmap.mmap(-1, 4096)], 0), os.O_DIRECT)),
    "copy-file-range": Feature(with_file(copy_range)),
    "syncfs": Feature(with_file(calls.syncfs)),
    "rename-noreplace": Feature(rename_with(calls.RENAME_NOREPLACE)),
    "rename-exchange": Feature(rename_with(calls.RENAME_EXCHANGE)),
    "devices": Feature(device),
    "xattr-user": Feature(with_file(lambda opened: os.setxattr(opened, "user.a", b"1"))),
    "xattr-trusted": Feature(with_file(lambda opened: os.setxattr(opened, "trusted.a", b"1"))),
    "xattr-security": Feature(with_file(lambda opened: os.setxattr(opened, "security.a", b"1"))),
    "xattr-both-flags": Feature(both_flags, pyfuse3=False),
    "acl": Feature(access_list, pyfuse3=False),
    "inode-flags": Feature(inode_flags, pyfuse3=False),
    "reflink": Feature(reflink, ext4=False, direct=False, pyfuse3=False),
    "fallocate": Feature(fallocate(0), pyfuse3=False),
    "punch-hole": Feature(fallocate(calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE), pyfuse3=False),
    "zero-range": Feature(fallocate(calls.FALLOC_ZERO_RANGE), pyfuse3=False),
    "collapse-range": Feature(fallocate(calls.FALLOC_COLLAPSE_RANGE), direct=False, pyfuse3=False),
    "insert-range": Feature(fallocate(calls.FALLOC_INSERT_RANGE), direct=False, pyfuse3=False),
    "seek-hole": Feature(seek_hole, pyfuse3=False),
    "btime": Feature(btime, pyfuse3=False),
    "relatime": Feature(relatime),
    "rename-whiteout": Feature(whiteout),
    "tmpfile": Feature(tmpfile, pyfuse3=False),
}


class Features:
    """What a directory offers."""

    def __init__(self, directory: Path, like: str | None) -> None:
        self.missing: set[str] = set()
        self.complaints: list[str] = []
        for name, feature in FEATURES.items():
            with tempfile.TemporaryDirectory(dir=directory) as place:
                there = offers(feature, os.fsencode(place))
            if not there:
                self.missing.add(name)
            if like is not None and there != getattr(feature, like):
                self.complaints.append(f"{name} is {'there' if there else 'missing'}, unlike the table says of {like}")


def offers(feature: Feature, directory: bytes) -> bool:
    """Whether the probe succeeds in the directory."""
    try:
        found = feature.probe(directory)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return False
    return found is not False
