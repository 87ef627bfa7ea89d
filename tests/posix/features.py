"""Which calls and features a file system must offer, and how to find out whether it does.

The one list that docs/reference/posix.md is checked against.  A probe that finds less than the list says fails the run;
so does one that finds more, for then the list is out of date.
"""

from __future__ import annotations

import errno
import os
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


def _opened(path: bytes, use: Callable[[int], object]) -> object:
    with calls.descriptor(path, os.O_RDWR | os.O_CREAT) as opened:
        return use(opened)


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


FEATURES: dict[str, Feature] = {
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
    "relatime": Feature(relatime, direct=False, pyfuse3=False),
    "rename-whiteout": Feature(whiteout, direct=False, pyfuse3=False),
    "tmpfile": Feature(tmpfile, direct=False, pyfuse3=False),
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
