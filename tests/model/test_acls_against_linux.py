"""Access control lists as the kernel has them: who may do what, what chmod makes of them, what is inherited.

One list at a time, on a file of the local file system and on an inode in a store; the random operations of
test_namespace_against_linux.py rarely have somebody try what only a list allows or forbids.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metadata import protocol
from metadata.core import posix_acl
from metadata.core.namespace.permissions import READ, SEARCH, WRITE, may
from metadata.core.posix_acl import ACCESS_XATTR, DEFAULT_XATTR, Acl, Entry
from metadata.core.schema import ROOT_INO, Inode
from metadata.protocol import Caller, SetAttrMask
from tests.support import linux
from tests.support.effort import EFFORT
from tests.support.store import SESSION, Store
from wire.errors import StoreError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users")

OWNER, GROUP, OTHER_GROUP = 1000, 2000, 2001
CALLERS = (
    Caller(0, 0, (), True),
    Caller(OWNER, OWNER, (), True),
    Caller(1001, GROUP, (), True),
    Caller(1001, 1001, (GROUP,), True),
    Caller(1001, OTHER_GROUP, (GROUP,), True),
    Caller(1002, OTHER_GROUP, (), True),
    Caller(1002, 1002, (), True),
)
PERMS = st.integers(0, 7)
MODES = st.integers(0, 0o777)
EXAMPLES = settings(max_examples=80 * EFFORT, deadline=None)


@st.composite
def valid(draw: st.DrawFn) -> Acl:
    """Any valid list."""
    users = draw(st.lists(st.sampled_from([0, OWNER, 1001, 1002]), max_size=2))
    groups = draw(st.lists(st.sampled_from([GROUP, OTHER_GROUP, 1001]), max_size=2))
    entries: Acl = tuple(Entry(posix_acl.USER, draw(PERMS), uid) for uid in users)
    entries += tuple(Entry(posix_acl.GROUP, draw(PERMS), gid) for gid in groups)
    tags = [posix_acl.USER_OBJ, posix_acl.GROUP_OBJ, posix_acl.OTHER]
    if draw(st.booleans()) or entries:
        tags.append(posix_acl.MASK)
    entries += tuple(Entry(tag, draw(PERMS)) for tag in tags)
    return tuple(sorted(entries, key=lambda entry: entry.tag))


class Both:
    """A file and a directory on both sides, owned by OWNER:GROUP."""

    def __init__(self, root: Path) -> None:
        self.store = Store()
        self.file, self.directory = root / "file", root / "directory"
        self.file.touch()
        self.directory.mkdir()
        self.inos = {self.file: self.store.create(b"file"), self.directory: self.store.mkdir(b"directory")}
        for path, ino in self.inos.items():
            os.chown(path, OWNER, GROUP)
            mask = SetAttrMask.UID | SetAttrMask.GID
            self.store.change(protocol.SetAttr(SESSION, 1, ino, mask, uid=OWNER, gid=GROUP))

    def set(self, path: Path, name: bytes, acl: Acl) -> None:
        value = posix_acl.encode(acl)
        os.setxattr(path, name, value)
        self.store.change(protocol.SetXattr(SESSION, 1, self.inos[path], name, value))

    def chmod(self, path: Path, mode: int) -> None:
        path.chmod(mode)
        self.store.change(protocol.SetAttr(SESSION, 1, self.inos[path], SetAttrMask.MODE, mode=mode))

    def ours(self, ino: int) -> tuple[int, dict[bytes, bytes]]:
        names = self.store.ask(protocol.ListXattr(SESSION, ino)).names
        values = {name: self.store.ask(protocol.GetXattr(SESSION, ino, name)).value for name in names}
        return self.inode(ino).mode, values

    def inode(self, ino: int) -> Inode:
        return self.store.inode(ino)


def theirs(path: Path) -> tuple[int, dict[bytes, bytes]]:
    names = os.listxattr(path)
    return path.stat().st_mode, {os.fsencode(name): os.getxattr(path, name) for name in names}


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    with linux.public_directory() as root:
        yield Both(root)


@given(acl=valid(), mode=MODES)
@example(acl=tuple(Entry(tag, 7, 1001) for tag in (1, 2, 4, 16, 32)), mode=0o707)
@EXAMPLES
def test_who_may_do_what_is_as_the_kernel_says(both: Both, acl: Acl, mode: int) -> None:
    """With the list as it was set, and after a chmod, by asking the kernel with faccessat2(AT_EACCESS)."""
    for path in (both.file, both.directory):
        both.set(path, ACCESS_XATTR, acl)
        for is_changed in (False, True):
            if is_changed:
                both.chmod(path, mode)
            ino = both.inos[path]
            assert both.ours(ino) == theirs(path)
            for caller in CALLERS:
                for want in (READ, WRITE, SEARCH, READ | WRITE, READ | SEARCH):
                    with linux.acting_as(caller):
                        wanted = os.access(path, want, effective_ids=True)
                    with both.store.engine.read() as txn:
                        got = may(txn, ino, both.inode(ino), caller, want)
                    assert got == wanted, f"{caller} wants {want} of {path.name}"


@given(acl=valid(), mode=MODES, umask=MODES, is_directory=st.booleans())
@EXAMPLES
def test_what_is_made_below_inherits_as_the_kernel_does_it(
    both: Both, acl: Acl, mode: int, umask: int, is_directory: bool
) -> None:
    """The mode, the access list and, of a directory, the default list; without a list the umask counts."""
    both.set(both.directory, DEFAULT_XATTR, acl)
    for name in (DEFAULT_XATTR, None):
        path = both.directory / "new"
        caller = Caller(0, 0, (), True, umask)
        parent = both.inos[both.directory]
        with linux.acting_as(caller):
            if is_directory:
                path.mkdir(mode)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode))
        if is_directory:
            ino = both.store.mkdir(b"new", parent=parent, mode=mode, caller=caller)
        else:
            ino = both.store.create(b"new", parent=parent, mode=mode, caller=caller)
        assert both.ours(ino) == theirs(path)
        if is_directory:
            path.rmdir()
            both.store.rmdir(b"new", parent=parent)
        else:
            path.unlink()
            both.store.unlink(b"new", parent=parent, closed_ino=ino)
        if name is not None:
            os.removexattr(both.directory, name)
            both.store.change(protocol.RemoveXattr(SESSION, 1, parent, name))


@given(st.binary(max_size=44) | valid().map(posix_acl.encode).flatmap(lambda v: st.permutations(v).map(bytes)))
@EXAMPLES
def test_any_bytes_are_taken_or_refused_as_the_kernel_does(both: Both, value: bytes) -> None:
    """Set on the directory as its default list; the errno must be the same."""
    version = b"\2\0\0\0"
    for bytes_ in (value, version + value, version + value[: len(value) // 8 * 8]):
        theirs_errno = linux.errno_of(partial(os.setxattr, both.directory, DEFAULT_XATTR, bytes_))
        request = protocol.SetXattr(SESSION, 1, both.inos[both.directory], DEFAULT_XATTR, bytes_)
        assert errno_of(partial(both.store.change, request)) == theirs_errno


def errno_of(operation: Callable[[], object]) -> int:
    """0, or what our side refuses with."""
    try:
        operation()
    except StoreError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("name", ["fifo", "link"])
@pytest.mark.parametrize("attribute", posix_acl.XATTR_NAMES)
def test_a_fifo_may_have_a_list_and_a_symlink_may_not(tmp_path: Path, name: str, attribute: bytes) -> None:
    """Set, get and remove; access and default."""
    acl = posix_acl.encode((Entry(1, 6), Entry(2, 6, 1000), Entry(4, 4), Entry(16, 6), Entry(32, 0)))
    store, path = Store(), tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
        ino = store.change(protocol.MakeNode(SESSION, 1, ROOT_INO, b"fifo", stat.S_IFIFO | 0o644, 0)).ino
    else:
        path.symlink_to("to")
        ino = store.change(protocol.MakeSymlink(SESSION, 1, ROOT_INO, b"link", b"to")).ino
    wanted = (
        linux.errno_of(lambda: os.setxattr(path, attribute, acl, follow_symlinks=False)),
        linux.errno_of(lambda: os.getxattr(path, attribute, follow_symlinks=False)),
        linux.errno_of(lambda: os.removexattr(path, attribute, follow_symlinks=False)),
    )
    got = (
        errno_of(lambda: store.change(protocol.SetXattr(SESSION, 1, ino, attribute, acl))),
        errno_of(lambda: store.ask(protocol.GetXattr(SESSION, ino, attribute))),
        errno_of(lambda: store.change(protocol.RemoveXattr(SESSION, 1, ino, attribute))),
    )
    assert got == wanted
