"""Random operations on the mount and on a local directory: every result, errno and effect must be the same.

Hypothesis draws the operations and shortens what fails; tests/support/twin.py knows what two file systems may differ
in.  Handles stay open across unlink, rename and truncation of their files.  When all examples have passed, the mount
is unmounted and mounted again, and everything the examples left behind is compared once more: names, attributes,
bytes.  FSD_TEST_EFFORT=10 runs ten times as many.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.e2e.places import Place
from tests.posix import acl, calls
from tests.support import twin
from tests.support.effort import EFFORT
from tests.support.twin import Side, Twin, make_sides, pattern

pytestmark = pytest.mark.mounted

EXAMPLES = 150 * EFFORT
STEPS = 60
# Explaining runs the failing example again and again, which a mount makes long; the operations tell enough.
PHASES = set(hypothesis.Phase) - {hypothesis.Phase.explain}
HANDLES_MAX = 6
AS_ROOT = os.geteuid() == 0
MAPPED_MAX = 1 << 17

common_names = st.sampled_from([b"a", b"b", b"c", b"d"])
odd_names = st.sampled_from([b"\xff\xfe\x80", b"n" * 255, b"n" * 256, b".", b"..", b" ", "é".encode()])
names = st.one_of(common_names, common_names, common_names, common_names, odd_names)
fresh_paths = st.one_of(
    st.lists(common_names, min_size=1, max_size=2).map(b"/".join),
    st.lists(names, min_size=1, max_size=3).map(b"/".join),
    st.lists(common_names, min_size=1, max_size=2).map(lambda parts: b"/".join(parts) + b"/"),
)


class Where(NamedTuple):
    """How to choose a path: made up, or by number among those that exist then, or a name inside one of those."""

    kind: str
    number: int
    path: bytes


def wheres(*kinds: str) -> st.SearchStrategy[Where]:
    """Paths of these kinds; the most frequent first."""
    return st.builds(Where, st.sampled_from(kinds), st.integers(0, 30), fresh_paths)


paths = wheres("existing", "existing", "existing", "existing", "inside", "fresh")  # For what needs something there.
new_paths = wheres("inside", "inside", "fresh", "existing")  # For what makes something.
targets = st.sampled_from([b"a", b"b", b"c/d", b"../a", b".", b"a/../b", b"", b"t" * 4095, b"t" * 4096, b"./c"])
users = st.sampled_from([0, 0, 0, 1000, 1001] if AS_ROOT else [0])
owners = st.sampled_from([-1, 0, 1000, 1001])
# Of a chown to (-1, -1) POSIX leaves open whether it moves the change time.
new_owners = st.tuples(owners, owners).filter(lambda owner: owner != (-1, -1))
modes = st.sampled_from([0o755, 0o644, 0o600, 0o777, 0o4755, 0o2755, 0o2777, 0o6775, 0o1777, 0o000, 0o400, 0o070])
open_flags = st.builds(
    lambda access, extra: access | sum(extra),
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT]),
    st.sets(
        st.sampled_from(
            [os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_SYNC]
        ),
        max_size=2,
    ),
)
sizes = st.one_of(
    st.sampled_from([0, 1, 511, 4096, 16_383, 16_384, 16_385, 65_536, 70_000, 131_073]),
    st.integers(0, 200_000),
    st.sampled_from([(4 << 20) + 1, 9 << 20]),
)
offsets = st.one_of(
    st.sampled_from([0, 0, 1, 4095, 4096, 16_384, 65_536, 1 << 20, (4 << 20) - 1, 4 << 20, (64 << 20) - 100, 5 << 30]),
    st.integers(0, 200_000),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 4096, 16_384, 100_000, 4 << 20, (64 << 20) - 5, 5 << 30]), st.integers(0, 1 << 18)
)
seeds = st.integers(0, 15)
times_ns = st.sampled_from([0, 1, 999_999_999, 1_234_567_890_123_456_789, 86_400 * 10**9, -1, -(10**9) - 1])
xattr_names = st.sampled_from(["user.a", "user.b", "user." + "x" * 250, "user." + "x" * 251, "trusted.t", "strange.s"])
acl_entries = st.sampled_from(
    [
        ("u:rw-", "g:r--", "o:---"),
        ("u:rwx", "U1000:rwx", "g:r-x", "m:rwx", "o:---"),
        ("u:rw-", "U1000:r--", "U1001:rw-", "g:---", "G1001:r--", "m:r--", "o:r--"),
        ("u:rwx", "g:--x", "G1000:rwx", "m:-w-", "o:rwx"),
        ("u:rw-", "U1000:rwx", "g:r--", "o:---"),  # No mask: refused.
    ]
)
FALLOCATE_MODES = (
    0,
    calls.FALLOC_KEEP_SIZE,
    calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE,
    calls.FALLOC_PUNCH_HOLE,
    calls.FALLOC_ZERO_RANGE,
    calls.FALLOC_ZERO_RANGE | calls.FALLOC_KEEP_SIZE,
)
xattr_values = st.sampled_from([b"", b"v", b"\0\xff" * 20, b"w" * 900])


class MountVersusLocal(RuleBasedStateMachine):
    """One example: a pair of empty directories and a series of operations on both."""

    ours_bases: ClassVar[tuple[bytes, ...]]  # The mounts of the file system under test.
    local_base: ClassVar[bytes]
    examples: ClassVar[list[Twin]]
    kept_max: ClassVar[int] = 100

    def __init__(self) -> None:
        super().__init__()
        number = len(self.examples)
        self.twin = Twin(*make_sides(self.ours_bases, self.local_base, b"%d" % number))
        self.examples.append(self.twin)
        self.handles: list[int] = []
        self.next_handle = 0
        self.make_first_files()

    def make_first_files(self) -> None:
        """Something to work on, so that most operations find what they need."""
        for side in (self.twin.ours, self.twin.local):
            for directory in (b"a", b"d"):
                os.mkdir(side.path(directory))
            for path, size in ((b"a/b", 20_000), (b"c", 100), (b"a/c", 300_000)):
                Path(os.fsdecode(side.path(path))).write_bytes(pattern(1, size))
            os.symlink(b"../c", side.path(b"a/d"))
        for path in (b"a/b", b"c", b"a"):
            self.keep_open(path, os.O_RDONLY if path == b"a" else os.O_RDWR, 0, user=0)

    def teardown(self) -> None:
        """Compare everything once more, with and without the open handles."""
        try:
            self.twin.compare_trees()
            for handle in list(self.handles):
                self.drop(handle)
            self.twin.compare_trees()
        finally:
            self.twin.ours.close()
            self.twin.local.close()

    def drop(self, handle: int) -> None:
        self.handles.remove(handle)
        self.twin.both(f"close {handle}", lambda side: os.close(side.files.pop(handle)))

    def pick(self, number: int) -> int:
        return self.handles[number % len(self.handles)]

    def path(self, where: Where) -> bytes:
        """The path meant, from what exists on the local side now."""
        root = self.twin.local.root
        existing = [path[len(root) + 1 :] for path in twin.walk(root)][1:]
        if where.kind == "fresh" or not existing:
            return where.path
        chosen = existing[where.number % len(existing)]
        return chosen if where.kind == "existing" else chosen + b"/" + os.path.basename(where.path.rstrip(b"/"))

    # --- names ---------------------------------------------------------------------------------------------------

    @rule(path_at=new_paths, flags=open_flags, mode=modes, user=users)
    def open(self, path_at: Where, flags: int, mode: int, user: int) -> None:
        path = self.path(path_at)
        self.keep_open(path, flags, mode, user=user)

    @rule(name=common_names, flags=st.sampled_from([0, os.O_APPEND, os.O_TRUNC, os.O_SYNC]))
    def open_to_write(self, name: bytes, flags: int) -> None:
        self.keep_open(name, os.O_RDWR | os.O_CREAT | flags, 0o644, user=0)

    def keep_open(self, path: bytes, flags: int, mode: int, *, user: int) -> None:
        """Open it on both sides; a handle that is kept is known by its number."""
        handle = self.next_handle
        self.next_handle += 1

        def go(side: Side) -> object:
            descriptor = os.open(side.path(path), flags | os.O_NONBLOCK, mode)
            side.files[handle] = descriptor
            return twin.attributes(os.fstat(descriptor))

        self.twin.both(f"open({path!r}, {flags:#o}, {mode:#o})", go, user=user, watch=[path])
        if handle in self.twin.local.files:
            self.handles.append(handle)
            # Between mounts, what is written is seen by who opens after it was closed: there handles are not kept.
            if len(self.handles) > HANDLES_MAX or len(self.ours_bases) > 1:
                self.drop(self.handles[0])

    @rule(path_at=new_paths, seed=seeds, size=sizes, mode=modes, user=users)
    def write_file(self, path_at: Where, seed: int, size: int, mode: int, user: int) -> None:
        """What a program does most: create or replace, write, close."""
        path = self.path(path_at)

        def go(side: Side) -> object:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK
            descriptor = os.open(side.path(path), flags, mode)
            try:
                return write_all(descriptor, pattern(seed, size))
            finally:
                os.close(descriptor)

        self.twin.both(f"write_file({path!r}, {size})", go, user=user, watch=[path])

    @rule(path_at=paths, user=users)
    def read_file(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)

        def go(side: Side) -> object:
            descriptor = os.open(side.path(path), os.O_RDONLY | os.O_NONBLOCK)
            try:
                return twin.read_all(descriptor, 1 << 24)
            finally:
                os.close(descriptor)

        self.twin.both(f"read_file({path!r})", go, user=user)

    @rule(path_at=new_paths, mode=modes, user=users)
    def mkdir(self, path_at: Where, mode: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"mkdir({path!r}, {mode:#o})", lambda s: os.mkdir(s.path(path), mode), user=user, watch=[path])

    @rule(path_at=paths, user=users)
    def rmdir(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"rmdir({path!r})", lambda s: os.rmdir(s.path(path)), user=user, watch=[path])

    @rule(path_at=paths, user=users)
    def unlink(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"unlink({path!r})", lambda s: os.unlink(s.path(path)), user=user, watch=[path])

    @rule(old_at=paths, new_at=new_paths, user=users)
    def link(self, old_at: Where, new_at: Where, user: int) -> None:
        old, new = self.path(old_at), self.path(new_at)

        def go(side: Side) -> None:
            os.link(side.path(old), side.path(new), follow_symlinks=False)

        self.twin.both(f"link({old!r}, {new!r})", go, user=user, watch=[old, new])

    @rule(pointing=targets, path_at=new_paths, user=users)
    def symlink(self, pointing: bytes, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"symlink({pointing[:20]!r}, {path!r})",
            lambda s: os.symlink(pointing, s.path(path)),
            user=user,
            watch=[path],
        )

    @rule(path_at=new_paths, mode=modes, kind=st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG]), user=users)
    def mknod(self, path_at: Where, mode: int, kind: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"mknod({path!r}, {kind:#o})", lambda s: os.mknod(s.path(path), mode | kind), user=user, watch=[path]
        )

    @rule(old_at=paths, new_at=new_paths, user=users)
    def rename(self, old_at: Where, new_at: Where, user: int) -> None:
        old, new = self.path(old_at), self.path(new_at)
        self.twin.both(
            f"rename({old!r}, {new!r})",
            lambda s: os.rename(s.path(old), s.path(new)),
            user=user,
            watch=[old, new],
        )

    @rule(
        old_at=paths,
        new_at=new_paths,
        flags=st.sampled_from([twin.RENAME_NOREPLACE, twin.RENAME_EXCHANGE, 3, calls.RENAME_WHITEOUT]),
        user=users,
    )
    def renameat2(self, old_at: Where, new_at: Where, flags: int, user: int) -> None:
        old, new = self.path(old_at), self.path(new_at)
        self.twin.both(
            f"renameat2({old!r}, {new!r}, {flags})",
            lambda s: twin.renameat2(s.path(old), s.path(new), flags),
            user=user,
            watch=[old, new],
        )

    @rule(path_at=paths, new_at=new_paths, mode=modes, seed=seeds, size=sizes, exclusive=st.booleans(), user=users)
    def tmpfile(
        self, path_at: Where, new_at: Where, mode: int, seed: int, size: int, exclusive: bool, user: int
    ) -> None:
        """A file without a name is written, and then gets one."""
        path, new = self.path(path_at), self.path(new_at)

        def go(side: Side) -> object:
            flags = os.O_TMPFILE | os.O_RDWR | (os.O_EXCL if exclusive else 0)
            with calls.descriptor(side.path(path), flags, mode) as opened:
                write_all(opened, pattern(seed, size))
                before = twin.attributes(os.fstat(opened))
                name = f"/proc/self/fd/{opened}".encode()
                calls.linkat(calls.AT_FDCWD, name, side.path(new), calls.AT_SYMLINK_FOLLOW)
                return before

        self.twin.both(f"tmpfile({path!r}, {mode:#o}) linked to {new!r}", go, user=user, watch=[path, new])

    @rule(path_at=new_paths, mask=st.sampled_from([0o022, 0o077, 0o777]), kind=st.booleans(), mode=modes, user=users)
    def make_with_umask(self, path_at: Where, mask: int, kind: bool, mode: int, user: int) -> None:
        path = self.path(path_at)

        def go(side: Side) -> None:
            before = os.umask(mask)
            try:
                os.mkdir(side.path(path), mode) if kind else os.mknod(side.path(path), mode)
            finally:
                os.umask(before)

        self.twin.both(f"make({path!r}, {mode:#o}) with umask {mask:#o}", go, user=user, watch=[path])

    @rule(path_at=paths, name=st.sampled_from([acl.ACCESS, acl.DEFAULT]), entries=acl_entries, user=users)
    def set_acl(self, path_at: Where, name: str, entries: tuple[str, ...], user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"set_acl({path!r}, {name[17:]}, {entries})",
            lambda s: os.setxattr(s.path(path), name, acl.pack(entries)),
            user=user,
            watch=[path],
        )

    @rule(path_at=paths, name=st.sampled_from([acl.ACCESS, acl.DEFAULT]), user=users)
    def remove_acl(self, path_at: Where, name: str, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"remove_acl({path!r}, {name[17:]})", lambda s: os.removexattr(s.path(path), name), user=user, watch=[path]
        )

    @precondition(lambda self: len(self.ours_bases) > 1)
    @rule()
    def go_on_by_another_mount(self) -> None:
        self.twin.ours.turn += 1

    @rule(path_at=paths, user=users)
    def listdir(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"listdir({path!r})", lambda s: sorted(os.listdir(s.path(path))), user=user)

    @rule(path_at=paths, user=users)
    def readlink(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"readlink({path!r})", lambda s: os.readlink(s.path(path)), user=user)

    # --- attributes ----------------------------------------------------------------------------------------------

    @rule(path_at=paths, follow=st.booleans(), user=users)
    def stat(self, path_at: Where, follow: bool, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"stat({path!r}, {follow})",
            lambda s: twin.attributes(os.stat(s.path(path), follow_symlinks=follow)),
            user=user,
        )

    @rule(path_at=paths, mode=st.sampled_from([os.R_OK, os.W_OK, os.X_OK]), user=users)
    def access(self, path_at: Where, mode: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"access({path!r}, {mode})", lambda s: os.access(s.path(path), mode, effective_ids=True), user=user
        )

    @rule(path_at=paths, mode=modes, user=users)
    def chmod(self, path_at: Where, mode: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"chmod({path!r}, {mode:#o})", lambda s: os.chmod(s.path(path), mode), user=user, watch=[path])

    @rule(path_at=paths, owner=new_owners, user=users)
    def chown(self, path_at: Where, owner: tuple[int, int], user: int) -> None:
        uid, gid = owner
        path = self.path(path_at)
        self.twin.both(
            f"lchown({path!r}, {uid}, {gid})",
            lambda s: os.chown(s.path(path), uid, gid, follow_symlinks=False),
            user=user,
            watch=[path],
        )

    @rule(path_at=paths, size=lengths, user=users)
    def truncate(self, path_at: Where, size: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"truncate({path!r}, {size})", lambda s: os.truncate(s.path(path), size), user=user, watch=[path]
        )

    @rule(path_at=paths, times=st.tuples(times_ns, times_ns), follow=st.booleans(), user=users)
    def utimens(self, path_at: Where, times: tuple[int, int], follow: bool, user: int) -> None:
        path = self.path(path_at)

        def go(side: Side) -> object:
            os.utime(side.path(path), ns=times, follow_symlinks=follow)
            status = os.stat(side.path(path), follow_symlinks=follow)
            return status.st_atime_ns, status.st_mtime_ns

        self.twin.both(f"utimens({path!r}, {times}, {follow})", go, user=user, watch=[path])

    @rule(path_at=paths, user=users)
    def touch(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(f"utime({path!r}, now)", lambda s: os.utime(s.path(path)), user=user, watch=[path])

    @rule(path_at=paths, name=xattr_names, value=xattr_values, flags=st.sampled_from([0, 0, 1, 2]), user=users)
    def setxattr(self, path_at: Where, name: str, value: bytes, flags: int, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"setxattr({path!r}, {name[:12]}, {len(value)} bytes, {flags})",
            lambda s: os.setxattr(s.path(path), name, value, flags, follow_symlinks=False),
            user=user,
            watch=[path],
        )

    @rule(path_at=paths, name=xattr_names, user=users)
    def getxattr(self, path_at: Where, name: str, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"getxattr({path!r}, {name[:12]})",
            lambda s: os.getxattr(s.path(path), name, follow_symlinks=False),
            user=user,
        )

    @rule(path_at=paths, name=xattr_names, user=users)
    def removexattr(self, path_at: Where, name: str, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"removexattr({path!r}, {name[:12]})",
            lambda s: os.removexattr(s.path(path), name, follow_symlinks=False),
            user=user,
            watch=[path],
        )

    @rule(path_at=paths, user=users)
    def listxattr(self, path_at: Where, user: int) -> None:
        path = self.path(path_at)
        self.twin.both(
            f"listxattr({path!r})",
            lambda s: sorted(os.listxattr(s.path(path), follow_symlinks=False)),
            user=user,
        )

    # --- handles -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), offset=offsets, seed=seeds, size=sizes)
    def pwrite(self, number: int, offset: int, seed: int, size: int) -> None:
        handle = self.pick(number)
        self.twin.both(
            f"pwrite({handle}, {size} bytes, {offset})",
            lambda s: os.pwrite(s.files[handle], pattern(seed, size), offset),
        )
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), offset=offsets, size=sizes)
    def pread(self, number: int, offset: int, size: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"pread({handle}, {size}, {offset})", lambda s: os.pread(s.files[handle], size, offset))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), seed=seeds, size=sizes)
    def write(self, number: int, seed: int, size: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"write({handle}, {size} bytes)", lambda s: os.write(s.files[handle], pattern(seed, size)))
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), size=sizes)
    def read(self, number: int, size: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"read({handle}, {size})", lambda s: os.read(s.files[handle], size))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), offset=offsets, whence=st.sampled_from([os.SEEK_SET, os.SEEK_END]))
    def seek(self, number: int, offset: int, whence: int) -> None:
        handle = self.pick(number)

        def go(side: Side) -> object:
            if stat.S_ISDIR(os.fstat(side.files[handle]).st_mode):
                return None  # Positions in directories are each file system's own.
            return os.lseek(side.files[handle], offset, whence)

        self.twin.both(f"lseek({handle}, {offset}, {whence})", go)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), size=lengths, user=users)
    def ftruncate(self, number: int, size: int, user: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"ftruncate({handle}, {size})", lambda s: os.ftruncate(s.files[handle], size), user=user)
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), data_only=st.booleans())
    def fsync(self, number: int, data_only: bool) -> None:
        handle = self.pick(number)
        call = os.fdatasync if data_only else os.fsync
        self.twin.both(f"{call.__name__}({handle})", lambda s: call(s.files[handle]))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), mode=modes, user=users)
    def fchmod(self, number: int, mode: int, user: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"fchmod({handle}, {mode:#o})", lambda s: os.fchmod(s.files[handle], mode), user=user)
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), times=st.tuples(times_ns, times_ns))
    def futimens(self, number: int, times: tuple[int, int]) -> None:
        handle = self.pick(number)
        self.twin.both(f"futimens({handle}, {times})", lambda s: os.utime(s.files[handle], ns=times))
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), name=common_names, mode=modes, user=users)
    def mkdirat(self, number: int, name: bytes, mode: int, user: int) -> None:
        """Through a directory that may have been removed, or through a file."""
        handle = self.pick(number)
        self.twin.both(
            f"mkdirat({handle}, {name!r})",
            lambda s: os.mkdir(name, mode, dir_fd=s.files[handle]),
            user=user,
        )

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX))
    def flistdir(self, number: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"listdir({handle})", lambda s: sorted(os.listdir(s.files[handle])))

    @precondition(lambda self: self.handles)
    @rule(source=st.integers(0, HANDLES_MAX), number=st.integers(0, HANDLES_MAX), size=sizes, at=offsets, to=offsets)
    def copy_file_range(self, source: int, number: int, size: int, at: int, to: int) -> None:
        one, other = self.pick(source), self.pick(number)
        self.twin.both(
            f"copy_file_range({one} at {at}, {other} at {to}, {size})",
            lambda s: os.copy_file_range(s.files[one], s.files[other], size, at, to),
        )
        self.fstat(other)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), mode=st.sampled_from(FALLOCATE_MODES), at=offsets, size=sizes, user=users)
    def fallocate(self, number: int, mode: int, at: int, size: int, user: int) -> None:
        handle = self.pick(number)
        self.twin.both(
            f"fallocate({handle}, {mode}, {at}, {size})",
            lambda s: calls.fallocate(s.files[handle], mode, at, size),
            user=user,
        )
        self.fstat(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), at=st.integers(0, 100_000), size=st.integers(1, 70_000), seed=seeds)
    def mapped_write(self, number: int, at: int, size: int, seed: int) -> None:
        """Through a shared mapping, seen by read(2) at once and by every other handle."""
        handle = self.pick(number)

        def go(side: Side) -> object:
            descriptor = side.files[handle]
            with shared_mapping(descriptor) as mapped:
                end = min(at + size, len(mapped))
                if at < end:
                    mapped[at:end] = pattern(seed, end - at)
                return os.pread(descriptor, size, at)

        self.twin.both(f"mapped_write({handle}, {at}, {size})", go)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX))
    def mapped_read(self, number: int) -> None:
        handle = self.pick(number)

        def go(side: Side) -> object:
            with shared_mapping(side.files[handle], mmap.PROT_READ) as mapped:
                return bytes(mapped)

        self.twin.both(f"mapped_read({handle})", go)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX), how=st.sampled_from([fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN]))
    def flock(self, number: int, how: int) -> None:
        handle = self.pick(number)
        self.twin.both(f"flock({handle}, {how})", lambda s: fcntl.flock(s.files[handle], how | fcntl.LOCK_NB))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, HANDLES_MAX))
    def close(self, number: int) -> None:
        self.drop(self.pick(number))

    def fstat(self, handle: int) -> None:
        self.twin.both(f"fstat({handle})", lambda s: twin.attributes(os.fstat(s.files[handle])))

    @invariant()
    def handles_agree(self) -> None:
        assert self.twin.ours.files.keys() == self.twin.local.files.keys() == set(self.handles)

    @rule()
    def compare(self) -> None:
        """All names, attributes and bytes."""
        self.twin.compare_trees()


def shared_mapping(descriptor: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """The file's first bytes, at most MAPPED_MAX of them; OSError for an empty file, as mmap(2) has it."""
    size = os.fstat(descriptor).st_size
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or size == 0:
        raise OSError(22, "nothing to map")
    return mmap.mmap(descriptor, min(size, MAPPED_MAX), prot=protection)


def write_all(descriptor: int, data: bytes) -> int:
    """Write it all, however many calls that takes."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, memoryview(data)[done:])
    return done


@pytest.fixture
def local_directory() -> Iterator[Path]:
    """A directory on the machine's own file system that every user may search."""
    directory = Path(tempfile.mkdtemp(prefix="fsd-twin-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def run_machine(ours: tuple[Path, ...], local: Path, *, examples: int) -> list[Twin]:
    """Run so many examples; returns what they have left behind."""

    class Machine(MountVersusLocal):
        ours_bases = tuple(os.fsencode(path) for path in ours)
        local_base = os.fsencode(local)
        examples: ClassVar[list[Twin]] = []

    run_state_machine_as_test(
        Machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=True,
            phases=PHASES,
        ),
    )
    return Machine.examples


def test_the_mount_and_a_local_directory_answer_alike(place: Place, local_directory: Path) -> None:
    left = run_machine((place.directory,), local_directory, examples=EXAMPLES)
    place.remount()
    for example in left:
        example.compare_trees()


def test_two_mounts_taking_turns_answer_as_one_local_directory(place: Place, local_directory: Path) -> None:
    """Whatever was done and closed by one mount is seen by the next call by the other."""
    with place.second_mount() as second:
        left = run_machine((place.directory, second), local_directory, examples=EXAMPLES // 8)
        for example in left:
            example.compare_trees()


def test_the_comparison_notices_each_kind_of_difference(local_directory: Path) -> None:
    """The safety net itself: one side is changed behind the comparison's back, in each way it is to notice."""

    def spoiled(spoil: str) -> Twin:
        ours, local = make_sides([os.fsencode(local_directory)], os.fsencode(local_directory / "l"), spoil.encode())
        pair = Twin(ours, local)
        pair.both("write", lambda s: Path(os.fsdecode(s.path(b"f"))).write_bytes(b"12345"), watch=[b"f"])
        pair.both("link", lambda s: os.link(s.path(b"f"), s.path(b"g")), watch=[b"f", b"g"])
        pair.compare_trees()
        return pair

    def damage(path: bytes, spoil: str) -> None:
        match spoil:
            case "byte":
                Path(os.fsdecode(path)).write_bytes(b"12346")
            case "mode":
                os.chmod(path, 0o600)
            case "time":
                os.utime(path, ns=(5, 5))
            case "xattr":
                os.setxattr(path, "user.a", b"1")
            case "name":
                os.rename(path, path + b"2")
            case "another inode":
                os.unlink(path)
                Path(os.fsdecode(path)).write_bytes(b"12345")
            case _:
                raise AssertionError(spoil)

    for spoil in ("byte", "mode", "time", "xattr", "name", "another inode"):
        pair = spoiled(spoil)
        damage(pair.ours.path(b"f"), spoil)
        with pytest.raises(twin.Different):
            pair.compare_trees()

    pair = spoiled("errno")
    with pytest.raises(twin.Different, match="EEXIST"):
        pair.both("mkdir", lambda s: os.mkdir(s.path(b"new" if s is pair.ours else b"f")))
    pair = spoiled("silent change")
    with pytest.raises(twin.Different):
        pair.both("chmod", lambda s: os.chmod(s.path(b"f"), 0o604 if s is pair.ours else 0o644), watch=[b"f"])
    pair = spoiled("time not moved")
    with pytest.raises(twin.Different):
        pair.both("chmod", lambda s: os.chmod(s.path(b"f"), 0o644) if s is pair.ours else None, watch=[b"f"])
