"""The same system calls on two directories, and a comparison of everything a program could tell them apart by.

One directory is on the file system under test, the other on the machine's own (ext4), which is the oracle.  What two
file systems may differ in is left out here, and only here: device and inode numbers (but not which names share an
inode), st_blocks, sizes of directories, times that nobody set (but not whether they moved), access times after reads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

SET_TIME_MAX_NS = 1_500_000_000 * 10**9
"""Times below (2017) were set by a test; times above are the clock's."""

READ_WHOLE_MAX = 32 << 20
"""Files up to this many bytes are compared whole, larger (sparse) ones at the offsets in PROBE_OFFSETS."""

PROBE_SIZE = 1 << 18
PROBE_OFFSETS = (0, 1 << 14, 1 << 20, (4 << 20) - 4096, (64 << 20) - 4096, 5 << 30)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)


class Different(AssertionError):
    """The two directories answered differently."""


@dataclass
class Side:
    """One of the two directories, with the handles that are open there.

    It may be reached by several ways (mounts): operations go by one, and the next look is taken by the next.
    """

    name: str
    tops: tuple[bytes, ...]  # By each way; watched too, as a symlink to ".." may lead there.
    turn: int = 0
    files: dict[int, int] = field(default_factory=dict)  # Handle number -> descriptor.

    @property
    def top(self) -> bytes:
        """The parent of `root`."""
        return self.tops[self.turn % len(self.tops)]

    @property
    def root(self) -> bytes:
        """The operations' paths are relative to here."""
        return self.top + b"/root"

    def path(self, relative: bytes) -> bytes:
        """The absolute path of `relative`."""
        return self.root + b"/" + relative

    def close(self) -> None:
        """Close every handle."""
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()


Operation = Callable[[Side], object]


def make_sides(ours: Sequence[bytes], local: bytes, name: bytes) -> tuple[Side, Side]:
    """Two empty directories called `name`, in which every user may work; `ours` are the ways to one of them."""
    sides = []
    for label, bases in (("under test", tuple(ours)), ("local", (local,))):
        side = Side(label, tuple(os.path.join(base, name) for base in bases))
        os.makedirs(side.root)
        os.chmod(side.top, 0o777)
        os.chmod(side.root, 0o777)
        sides.append(side)
    return sides[0], sides[1]


class Twin:
    """Runs operations on both sides and raises Different where they do not agree."""

    def __init__(self, ours: Side, local: Side) -> None:
        self.ours = ours
        self.local = local
        self.history: list[str] = []

    def both(self, what: str, operation: Operation, *, user: int = 0, watch: Sequence[bytes] = ()) -> object:
        """Run `operation` on both sides as `user` and compare: result or errno, and what became of `watch`.

        Args:
            what: the call, for the message.
            watch: paths whose attributes, and those of their parents, are compared before and after: in effect, and
                in whether their times moved.

        Returns:
            The result; for an error its errno's name.
        """
        self.history.append(f"{what} as uid {user}")
        expected = outcome(self.local, operation, user, watch)
        found = outcome(self.ours, operation, user, watch)
        if expected != found:
            raise Different(
                f"{self.told()}\n  local:      {shorten(expected)}\n  under test: {shorten(found)}"
                f"{first_difference(expected[0], found[0])}"
            )
        self.history[-1] += f" = {shorten(expected[0])}"
        return expected[0]

    def told(self) -> str:
        """What has been done so far, and with what result."""
        return "after these operations:\n    " + "\n    ".join(self.history)

    def compare_trees(self) -> int:
        """Compare all names, attributes and bytes; returns how many entries there are."""
        expected, found = snapshot(self.local.top), snapshot(self.ours.top)
        for path in sorted(expected.keys() | found.keys()):
            if expected.get(path) != found.get(path):
                raise Different(
                    f"{self.told()}\n{path!r} differs\n  local:      {shorten(expected.get(path))}\n"
                    f"  under test: {shorten(found.get(path))}"
                )
        return len(expected)


def outcome(side: Side, operation: Operation, user: int, watch: Sequence[bytes]) -> tuple[object, object]:
    """What the operation returned, or its errno, and the effect on the watched paths."""
    paths = watched_paths(watch)
    before = [look_at(side.path(path)) for path in paths]
    try:
        with acting_as(user):
            result: object = operation(side)
    except OSError as error:
        if error.errno is None:
            raise
        result = errno.errorcode.get(error.errno, str(error.errno))
    side.turn += 1
    after = [look_at(side.path(path)) for path in paths]
    effect = []
    for path, old, new in zip(paths, before, after, strict=True):
        moved = None
        if old and new and old.ino == new.ino:
            moved = (old.mtime_ns != new.mtime_ns, old.ctime_ns != new.ctime_ns)
        effect.append((path, moved, new and new.attributes))
    return result, effect


def watched_paths(watch: Sequence[bytes]) -> list[bytes]:
    """The watched paths and their parents."""
    return sorted({parent for path in watch for parent in (path, os.path.dirname(path.rstrip(b"/")))})


class Seen(NamedTuple):
    """One name at one moment."""

    ino: int
    mtime_ns: int
    ctime_ns: int
    attributes: tuple[object, ...]


def look_at(path: bytes) -> Seen | None:
    """What the name leads to; None if there is no such name."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return Seen(status.st_ino, status.st_mtime_ns, status.st_ctime_ns, attributes(status))


def attributes(status: os.stat_result) -> tuple[object, ...]:
    """What must be equal on both sides."""
    return (
        stat.filemode(status.st_mode),
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        None if stat.S_ISDIR(status.st_mode) else status.st_size,
        status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else None,
        set_time(status.st_mtime_ns),
    )


def set_time(time_ns: int) -> int | str:
    """The time if a test set it, else only that the clock did."""
    return time_ns if time_ns < SET_TIME_MAX_NS else "now"


def snapshot(top: bytes) -> dict[bytes, tuple[object, ...]]:
    """Every name below `top` with attributes, extended attributes, content, and the first name of the same inode."""
    found: dict[bytes, tuple[object, ...]] = {}
    first_name: dict[int, bytes] = {}
    for path in walk(top):
        status = os.lstat(path)
        relative = path[len(top) :]
        same = first_name.setdefault(status.st_ino, relative)
        found[relative] = (*attributes(status), same, content(path, status), extended_attributes(path))
    return found


def walk(path: bytes) -> Iterator[bytes]:
    """`path` and all below it, each directory's entries in the order of their names."""
    yield path
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in sorted(os.listdir(path)):
            yield from walk(os.path.join(path, name))


def content(path: bytes, status: os.stat_result) -> object:
    """The bytes of a file (of a large one: samples), the target of a symlink, the entries of a directory."""
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if stat.S_ISDIR(status.st_mode):
        with os.scandir(path) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries)
    if not stat.S_ISREG(status.st_mode):
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if status.st_size <= READ_WHOLE_MAX:
            return read_all(descriptor, status.st_size + 1)
        ends = (status.st_size - PROBE_SIZE,)
        return [os.pread(descriptor, PROBE_SIZE, offset) for offset in (*PROBE_OFFSETS, *ends)]
    finally:
        os.close(descriptor)


def read_all(descriptor: int, size: int) -> bytes:
    """Up to `size` bytes from the start of the file."""
    pieces = []
    offset = 0
    while offset < size and (piece := os.pread(descriptor, size - offset, offset)):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def extended_attributes(path: bytes) -> list[tuple[str, bytes]]:
    """Names and values, in the order of the names."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """System calls are made by `user`, whose only group has the same number; 0: by whoever runs the tests."""
    if user == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([user])
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@lru_cache(maxsize=64)
def pattern(seed: int, size: int) -> bytes:
    """`size` bytes that depend on the seed."""
    return random.Random(seed).randbytes(size)


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    at_cwd = -100
    if _libc.renameat2(at_cwd, old, at_cwd, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def shorten(value: object) -> str:
    """The value for people: long byte strings by their length and ends."""
    if isinstance(value, bytes | memoryview) and len(value) > 80:
        return f"<{len(value)} bytes {bytes(value[:12])!r}..{bytes(value[-12:])!r}>"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(shorten(item) for item in value) + ")"
    return repr(value)


def first_difference(expected: object, found: object) -> str:
    """Where two byte strings of a failed comparison begin to differ."""
    if not isinstance(expected, bytes) or not isinstance(found, bytes):
        return ""
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((index for index, (one, other) in pairs if one != other), min(len(expected), len(found)))
    return f"\n  first difference at byte {at} ({len(expected)} and {len(found)} bytes)"
