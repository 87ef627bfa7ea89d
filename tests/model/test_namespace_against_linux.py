"""Random operations, as root and as others, on the metadata and on the local file system must agree.

Results are compared by errno, the two trees after every step by everything but times, and every invariant of fsck
holds after every step.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fsd.attributes import file_flags
from metadata import protocol
from metadata.core import posix_acl
from metadata.core.fsck import check
from metadata.core.schema import NAME_SIZE_MAX, ROOT_INO, XATTR_VALUE_SIZE_MAX
from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL, Caller, SetAttrMask, SetXattrMode
from tests.support import linux
from tests.support.effort import EFFORT
from tests.support.store import SESSION, Store
from wire import errors
from wire.errors import StoreError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users")

ROOT = Caller(0, 0, (), True)
CALLERS = st.sampled_from(
    [
        ROOT,
        Caller(0, 0, (), True, 0o022),
        Caller(1000, 1000, (2000,), True, 0o002),
        Caller(1001, 2000, (), True),
        Caller(1001, 2000, (), True, 0o077),
    ]
)
NAMES = st.sampled_from([b"a", b"b", b"c", b"a", b"b", b"c", b".", b"..", b"n" * NAME_SIZE_MAX, b"n" * 256, b"x\xff y"])
INODES = st.sampled_from([b"a", b"b", b"c", b"."])  # Never "..": what is above the test's root is not the test's.
MODES = st.one_of(st.sampled_from([0o777, 0o755, 0o1777, 0o2775, 0o6755, 0o640, 0o2766]), st.integers(0, 0o7777))
IDS = st.sampled_from([0, 1000, 1001, 2000])
PICK = st.integers(0, 1 << 16)
ACL_NAMES = st.sampled_from(posix_acl.XATTR_NAMES)
XATTRS = st.one_of(
    st.sampled_from([b"user.one", b"user.two", b"trusted.t", b"security.s", b"user.", b"odd.x", b"plain"]), ACL_NAMES
)
TIMES: dict[str, tuple[int, tuple[int, int] | None]] = {
    "both now": (SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW, None),
    "both": (SetAttrMask.ATIME | SetAttrMask.MTIME, (5, 6)),
    "atime alone": (SetAttrMask.ATIME, (5, linux.UTIME_OMIT)),
    "mtime alone": (SetAttrMask.MTIME, (linux.UTIME_OMIT, 6)),
    "mtime alone, now": (SetAttrMask.MTIME_NOW, (linux.UTIME_OMIT, linux.UTIME_NOW)),
    "atime alone, now": (SetAttrMask.ATIME_NOW, (linux.UTIME_NOW, linux.UTIME_OMIT)),
    "atime, and mtime now": (SetAttrMask.ATIME | SetAttrMask.MTIME_NOW, (5, linux.UTIME_NOW)),
}
"""Mask, and nanoseconds for utimensat(2); None: a null pointer."""
PERMS = st.integers(0, 7)


@st.composite
def lists(draw: st.DrawFn) -> bytes:
    """An access control list that is valid, or nearly so."""
    named = [
        posix_acl.Entry(tag, draw(PERMS), number)
        for tag in (posix_acl.USER, posix_acl.GROUP)
        for number in draw(st.lists(IDS, max_size=2))
    ]
    singles = [posix_acl.USER_OBJ, posix_acl.GROUP_OBJ, posix_acl.OTHER]
    if draw(st.booleans()) or (named and draw(PERMS)):
        singles.append(posix_acl.MASK)
    entries = [*named, *(posix_acl.Entry(tag, draw(PERMS), draw(st.sampled_from([0, 0xFFFFFFFF]))) for tag in singles)]
    entries.sort(key=lambda entry: entry.tag)
    match draw(st.integers(0, 20)):
        case 0:
            entries.reverse()
        case 1:
            del entries[draw(PERMS) % len(entries)]
        case 2:
            entries.append(entries[draw(PERMS) % len(entries)])
        case 3:
            at = draw(PERMS) % len(entries)
            entries[at] = entries[at]._replace(**draw(st.sampled_from([{"perm": 8}, {"tag": 3}, {"id": 0xFFFFFFFF}])))
        case 4:
            entries.clear()
    value = posix_acl.encode(tuple(entries))
    return draw(st.sampled_from([value] * 20 + [b"", value[:-1], value[:3], b"\1" + value[1:]]))


class Namespaces(RuleBasedStateMachine):
    """The store and a directory of the local file system, kept alike."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.root = Path(tempfile.mkdtemp(prefix="metacore-"))
        self.root.chmod(0o755)

    def teardown(self) -> None:
        linux.remove_tree(self.root)

    # --- places ------------------------------------------------------------------------------------------------------

    def directories(self) -> list[tuple[int, Path]]:
        """Inode number and path of every directory."""
        found = [(ROOT_INO, self.root)]
        for ino, path in found:
            page = self.store.ask(protocol.ReadDir(SESSION, ino, 0, 4096))
            found += [
                (entry.ino, path / os.fsdecode(entry.name))
                for entry in sorted(page.entries, key=lambda entry: entry.name)
                if stat.S_ISDIR(entry.file_type)
            ]
        return found

    def pick(self, pick: int) -> tuple[int, Path]:
        places = self.directories()
        return places[pick % len(places)]

    def entry(self, pick: int, name: bytes) -> tuple[int, Path, bytes]:
        """A directory, and the name of something in it, or now and then `name` instead, which may not be there."""
        parent, path = self.pick(pick)
        names = sorted(os.listdir(os.fsencode(path)))
        if names and pick >> 8 & 3:
            name = names[(pick >> 10) % len(names)]
        return parent, path, name

    # --- both sides --------------------------------------------------------------------------------------------------

    def agree(self, ours: Callable[[], object], theirs: Callable[[], object], path: Path, caller: Caller) -> None:
        """Carry out an operation on both sides, theirs standing in `path`."""

        def act() -> None:
            with linux.standing_in(path), linux.acting_as(caller):
                theirs()

        wanted = linux.errno_of(act)
        try:
            ours()
            got = 0
        except StoreError as error:
            got = error.errno
        assert got == wanted, f"we say {os.strerror(got)}, Linux says {os.strerror(wanted)}"

    def ino(self, parent: int, name: bytes, caller: Caller) -> int:
        return self.store.ask(protocol.Lookup(SESSION, parent, name, caller)).ino

    def kind(self, path: Path, name: bytes) -> int:
        """The type of what is there now, 0 for nothing."""
        try:
            return stat.S_IFMT(os.lstat(os.fsencode(path) + b"/" + name).st_mode)
        except OSError:
            return 0

    # --- names -------------------------------------------------------------------------------------------------------

    @rule(pick=PICK, name=NAMES, mode=MODES, caller=CALLERS)
    def create(self, pick: int, name: bytes, mode: int, caller: Caller) -> None:
        parent, path = self.pick(pick)
        self.agree(
            lambda: self.store.change(protocol.Create(SESSION, 1, parent, name, mode, True, caller)),
            lambda: linux.create(name, mode, exclusive=True),
            path,
            caller,
        )

    @rule(pick=PICK, name=NAMES)
    def open_or_create(self, pick: int, name: bytes) -> None:
        parent, path, name = self.entry(pick, name)
        if self.kind(path, name) in (0, stat.S_IFREG, stat.S_IFDIR):
            self.agree(
                lambda: self.store.change(protocol.Create(SESSION, 1, parent, name, 0o600, False, ROOT)),
                lambda: linux.create(name, 0o600, exclusive=False),
                path,
                ROOT,
            )

    @rule(pick=PICK, name=NAMES, mode=MODES, caller=CALLERS)
    def mkdir(self, pick: int, name: bytes, mode: int, caller: Caller) -> None:
        parent, path = self.pick(pick)
        self.agree(
            lambda: self.store.change(protocol.MakeDirectory(SESSION, 1, parent, name, mode, caller)),
            lambda: os.mkdir(name, mode),
            path,
            caller,
        )

    @rule(
        pick=PICK,
        name=NAMES,
        kind=st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0]),
        caller=CALLERS,
    )
    def mknod(self, pick: int, name: bytes, kind: int, caller: Caller) -> None:
        parent, path = self.pick(pick)
        self.agree(
            lambda: self.store.change(protocol.MakeNode(SESSION, 1, parent, name, kind | 0o644, 0x103, caller)),
            lambda: os.mknod(name, kind | 0o644, 0x103),
            path,
            caller,
        )

    @rule(pick=PICK, name=NAMES, to=st.sampled_from([b"nowhere", b"a", b"t" * 300, b""]), caller=CALLERS)
    def symlink(self, pick: int, name: bytes, to: bytes, caller: Caller) -> None:
        parent, path = self.pick(pick)
        self.agree(
            lambda: self.store.change(protocol.MakeSymlink(SESSION, 1, parent, name, to, caller)),
            lambda: os.symlink(to, name),
            path,
            caller,
        )

    @rule(pick=PICK, name=NAMES, new_pick=PICK, new_name=NAMES)
    def link(self, pick: int, name: bytes, new_pick: int, new_name: bytes) -> None:
        """As root: the kernel's protected_hardlinks is not the file system's business."""
        parent, path, name = self.entry(pick, name)
        new_parent, new_path = self.pick(new_pick)

        def ours() -> None:
            ino = self.ino(parent, name, ROOT)
            self.store.change(protocol.Link(SESSION, 1, ino, new_parent, new_name, ROOT))

        def theirs() -> None:
            with linux.standing_in(new_path) as new_fd:
                os.link(os.fsencode(path) + b"/" + name, new_name, dst_dir_fd=new_fd, follow_symlinks=False)

        self.agree(ours, theirs, path, ROOT)

    @rule(pick=PICK, name=NAMES, caller=CALLERS, closed=st.booleans())
    def unlink(self, pick: int, name: bytes, caller: Caller, closed: bool) -> None:
        parent, path, name = self.entry(pick, name)

        def ours() -> None:
            closed_ino = self.ino(parent, name, caller) if closed else 0
            removed = self.store.change(protocol.Unlink(SESSION, 1, parent, name, closed_ino, caller))
            assert removed.held == (removed.nlink == 0 and not closed)
            if removed.held:
                assert self.store.inode(removed.ino).nlink == 0
                self.store.change(protocol.ReleaseInode(SESSION, 1, (removed.ino,)))

        self.agree(ours, lambda: os.unlink(name), path, caller)

    @rule(pick=PICK, name=NAMES, caller=CALLERS)
    def rmdir(self, pick: int, name: bytes, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        self.agree(
            lambda: self.store.change(protocol.RemoveDirectory(SESSION, 1, parent, name, caller)),
            lambda: os.rmdir(name),
            path,
            caller,
        )

    @rule(
        pick=PICK,
        name=NAMES,
        new_pick=PICK,
        new_name=NAMES,
        flags=st.sampled_from([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 8]),
        caller=CALLERS,
    )
    def rename(self, pick: int, name: bytes, new_pick: int, new_name: bytes, flags: int, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        new_parent, new_path, new_name = self.entry(new_pick, new_name)
        request = protocol.Rename(SESSION, 1, parent, name, new_parent, new_name, flags, 0, caller)

        def act() -> None:
            with linux.standing_in(path) as old_fd, linux.standing_in(new_path) as new_fd, linux.acting_as(caller):
                linux.renameat2(old_fd, name, new_fd, new_name, flags)

        self.agree(lambda: self.store.change(request), act, self.root, ROOT)

    # --- attributes --------------------------------------------------------------------------------------------------

    def set_attributes(self, parent: int, name: bytes, caller: Caller, mask: int, **values: int) -> None:
        ino = self.ino(parent, name, caller)
        self.store.change(protocol.SetAttr(SESSION, 1, ino, mask, caller=caller, **values))

    @rule(pick=PICK, name=INODES, mode=MODES, caller=CALLERS)
    def chmod(self, pick: int, name: bytes, mode: int, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        if self.kind(path, name) != stat.S_IFLNK:
            self.agree(
                lambda: self.set_attributes(parent, name, caller, SetAttrMask.MODE, mode=mode),
                lambda: os.chmod(name, mode),
                path,
                caller,
            )

    @rule(pick=PICK, name=INODES, uid=IDS, gid=IDS, which=st.sampled_from([2, 4, 6]), caller=CALLERS)
    def chown(self, pick: int, name: bytes, uid: int, gid: int, which: int, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        self.agree(
            lambda: self.set_attributes(parent, name, caller, which, uid=uid, gid=gid),
            lambda: os.chown(name, uid if which & 2 else -1, gid if which & 4 else -1, follow_symlinks=False),
            path,
            caller,
        )

    @rule(pick=PICK, name=INODES, size=st.sampled_from([0, 1, 4096, 20_000]), caller=CALLERS)
    def truncate(self, pick: int, name: bytes, size: int, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        if self.kind(path, name) != stat.S_IFLNK:
            self.agree(
                lambda: self.set_attributes(parent, name, caller, SetAttrMask.SIZE, size=size),
                lambda: os.truncate(name, size),
                path,
                caller,
            )

    @rule(pick=PICK, name=INODES, which=st.sampled_from(sorted(TIMES)), caller=CALLERS)
    def utimens(self, pick: int, name: bytes, which: str, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        mask, times_ns = TIMES[which]
        self.agree(
            lambda: self.set_attributes(parent, name, caller, mask, atime_ns=5, mtime_ns=6),
            lambda: linux.utimensat(name, times_ns),
            path,
            caller,
        )

    @rule(
        pick=PICK,
        name=INODES,
        flags=st.sampled_from([0, 0, FS_IMMUTABLE_FL, FS_APPEND_FL, FS_APPEND_FL | FS_IMMUTABLE_FL]),
    )
    def set_flags(self, pick: int, name: bytes, flags: int) -> None:
        """As root: others would need to open it first."""
        parent, path, name = self.entry(pick, name)
        if linux.has_flags(self.root) and self.kind(path, name) in (stat.S_IFREG, stat.S_IFDIR):
            self.agree(
                lambda: self.store.change(protocol.SetFlags(SESSION, 1, self.ino(parent, name, ROOT), flags, ROOT)),
                lambda: linux.set_flags(name, flags),
                path,
                ROOT,
            )

    # --- extended attributes -----------------------------------------------------------------------------------------

    def setxattr(self, pick: int, name: bytes, xattr: bytes, value: bytes, how: SetXattrMode, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)

        def ours() -> None:
            ino = self.ino(parent, name, caller)
            self.store.change(protocol.SetXattr(SESSION, 1, ino, xattr, value, how, caller))

        self.agree(ours, lambda: os.setxattr(name, xattr, value, how, follow_symlinks=False), path, caller)

    @rule(
        pick=PICK,
        name=INODES,
        xattr=XATTRS,
        value=st.sampled_from([b"", b"v", b"w" * 900]),
        how=st.sampled_from(list(SetXattrMode)),
        caller=CALLERS,
    )
    def set_any_xattr(
        self, pick: int, name: bytes, xattr: bytes, value: bytes, how: SetXattrMode, caller: Caller
    ) -> None:
        self.setxattr(pick, name, xattr, value, how, caller)

    @rule(
        pick=PICK, name=INODES, xattr=ACL_NAMES, value=lists(), how=st.sampled_from(list(SetXattrMode)), caller=CALLERS
    )
    def set_acl(self, pick: int, name: bytes, xattr: bytes, value: bytes, how: SetXattrMode, caller: Caller) -> None:
        self.setxattr(pick, name, xattr, value, how, caller)

    @rule(pick=PICK, name=INODES, xattr=XATTRS, caller=CALLERS)
    def getxattr(self, pick: int, name: bytes, xattr: bytes, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)
        ours: list[bytes] = []
        theirs: list[bytes] = []

        def read() -> None:
            ino = self.ino(parent, name, caller)
            ours.append(self.store.ask(protocol.GetXattr(SESSION, ino, xattr, caller)).value)

        self.agree(read, lambda: theirs.append(os.getxattr(name, xattr, follow_symlinks=False)), path, caller)
        assert ours == theirs

    @rule(pick=PICK, name=INODES, xattr=XATTRS, caller=CALLERS)
    def removexattr(self, pick: int, name: bytes, xattr: bytes, caller: Caller) -> None:
        parent, path, name = self.entry(pick, name)

        def ours() -> None:
            ino = self.ino(parent, name, caller)
            self.store.change(protocol.RemoveXattr(SESSION, 1, ino, xattr, caller))

        self.agree(ours, lambda: os.removexattr(name, xattr, follow_symlinks=False), path, caller)

    # --- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def the_trees_are_alike(self) -> None:
        assert self.picture() == linux.picture(self.root)

    @invariant()
    def every_invariant_holds(self) -> None:
        with self.store.engine.read() as txn:
            assert [str(violation) for violation in check(txn)] == []

    def picture(self) -> dict[bytes, linux.Row]:
        rows: dict[bytes, linux.Row] = {}
        first: dict[int, bytes] = {}

        def visit(path: bytes, ino: int) -> None:
            inode = self.store.inode(ino)
            is_directory = stat.S_ISDIR(inode.mode)
            leader = path if is_directory else first.setdefault(ino, path)
            is_link = stat.S_ISLNK(inode.mode)
            target = self.store.ask(protocol.ReadLink(SESSION, ino)).target if is_link else b""
            size = 0 if is_directory else inode.size
            xattrs = frozenset(
                (name, self.store.ask(protocol.GetXattr(SESSION, ino, name)).value)
                for name in self.store.ask(protocol.ListXattr(SESSION, ino)).names
            )
            flags = file_flags(inode) if is_directory or stat.S_ISREG(inode.mode) else 0
            rows[path] = (flags, inode.mode, inode.nlink, inode.uid, inode.gid, size, target, leader, xattrs)
            if is_directory:
                for name in sorted(self.store.names(ino)):
                    visit(path + b"/" + name, self.store.lookup(name, parent=ino))

        visit(b"", ROOT_INO)
        return rows


TestNamespaces = Namespaces.TestCase
TestNamespaces.settings = settings(
    max_examples=100 * EFFORT, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_limits_that_ext4_does_not_share() -> None:
    store = Store()
    ino = store.create(b"file")
    value = bytes(range(256)) * (XATTR_VALUE_SIZE_MAX // 256)
    store.change(protocol.SetXattr(SESSION, 1, ino, b"user.big", value))
    assert store.ask(protocol.GetXattr(SESSION, ino, b"user.big")).value == value
    with pytest.raises(errors.ResultTooLarge):
        store.change(protocol.SetXattr(SESSION, 1, ino, b"user." + b"u" * 251, b"v"))
    with pytest.raises(errors.ArgumentListTooLong):
        store.change(protocol.SetXattr(SESSION, 1, ino, b"user.big", value + b"v"))
    entries = [(posix_acl.USER_OBJ, 7), (posix_acl.GROUP_OBJ, 7), (posix_acl.MASK, 7), (posix_acl.OTHER, 7)]
    many = [posix_acl.Entry(posix_acl.USER, 7, number) for number in range(509)]
    acl = sorted([*(posix_acl.Entry(*entry) for entry in entries), *many], key=lambda entry: entry.tag)
    with pytest.raises(errors.ArgumentListTooLong):
        store.change(protocol.SetXattr(SESSION, 1, ino, posix_acl.ACCESS_XATTR, posix_acl.encode(tuple(acl))))
    del acl[1:3]
    value = posix_acl.encode(tuple(acl))
    store.change(protocol.SetXattr(SESSION, 1, ino, posix_acl.ACCESS_XATTR, value))
    assert store.ask(protocol.GetXattr(SESSION, ino, posix_acl.ACCESS_XATTR)).value == value
