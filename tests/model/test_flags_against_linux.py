"""Immutable and append-only: every operation is refused or carried out as on the local file system."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata import protocol
from metadata.core.fsck import check
from metadata.core.posix_acl import ACCESS_XATTR
from metadata.core.schema import ROOT_INO
from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL, Caller, RenameFlags, SetAttrMask
from tests.support import linux
from tests.support.store import SESSION, Store
from wire.errors import StoreError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root sets flags")

WHO = Caller(0, 0, (), True)
LIST = b"\2\0\0\0" + b"".join(
    tag.to_bytes(2, "little") + b"\6\0" + number.to_bytes(4, "little")
    for tag, number in ((1, 0), (2, 1000), (4, 0), (16, 0), (32, 0))
)
NOW = SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW


class Both:
    """d with file, sub and sub/below; e with other: on both sides."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store()
        self.inos = {".": ROOT_INO}
        for name in ("d", "d/sub", "e"):
            (root / name).mkdir()
            self.inos[name] = self.store.mkdir(self.base(name), parent=self.parent(name))
        for name in ("d/file", "d/sub/below", "e/other"):
            (root / name).write_bytes(b"x" * 10)
            ino = self.inos[name] = self.store.create(self.base(name), parent=self.parent(name))
            self.store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"x" * 10, 0))

    def parent(self, name: str) -> int:
        return self.inos[name.rpartition("/")[0] or "."]

    def base(self, name: str) -> bytes:
        return name.rpartition("/")[2].encode()

    def path(self, name: str) -> bytes:
        return os.fsencode(self.root / name)

    def set_flags(self, name: str, flags: int) -> None:
        linux.set_flags(self.path(name), flags)
        self.store.change(protocol.SetFlags(SESSION, 1, self.inos[name], flags, WHO))


Operation = Callable[[Both], object]
STRANGER = Caller(1000, 1000, (), True)


def set_attributes(name: str, mask: int, **values: int) -> Operation:
    return lambda b: b.store.change(protocol.SetAttr(SESSION, 1, b.inos[name], mask, caller=WHO, **values))


def rename(old: str, new: str, flags: int = 0) -> tuple[Operation, Operation]:
    def ours(b: Both) -> None:
        request = protocol.Rename(SESSION, 1, b.parent(old), b.base(old), b.parent(new), b.base(new), flags)
        b.store.change(request)

    return ours, lambda b: linux.renameat2(0, b.path(old), 0, b.path(new), flags)


def times(name: str, mask: int, times_ns: tuple[int, int] | None) -> tuple[Operation, Operation]:
    return set_attributes(name, mask, atime_ns=5, mtime_ns=6), lambda b: linux.utimensat(b.path(name), times_ns)


def unlink(name: str) -> tuple[Operation, Operation]:
    return lambda b: b.store.unlink(b.base(name), parent=b.parent(name)), lambda b: os.unlink(b.path(name))


def create(name: str) -> tuple[Operation, Operation]:
    def theirs(b: Both) -> None:
        os.close(os.open(b.path(name), os.O_CREAT | os.O_EXCL))

    return lambda b: b.store.create(b.base(name), parent=b.parent(name)), theirs


def link(name: str, new: str) -> tuple[Operation, Operation]:
    return (
        lambda b: b.store.link(b.inos[name], b.base(new), parent=b.parent(new)),
        lambda b: os.link(b.path(name), b.path(new)),
    )


def truncate_by_a_stranger_here(b: Both) -> None:
    b.store.change(protocol.SetAttr(SESSION, 1, b.inos["d/file"], SetAttrMask.SIZE, size=5, caller=STRANGER))


def truncate_by_a_stranger_there(b: Both) -> None:
    with linux.standing_in(Path(os.fsdecode(b.path("d")))), linux.acting_as(STRANGER):
        os.truncate("file", 5)


def of_either(name: str) -> dict[str, tuple[Operation, Operation]]:
    """What can be asked of a file and of a directory."""
    return {
        f"chmod of {name}": (
            set_attributes(name, SetAttrMask.MODE, mode=0o700),
            lambda b: os.chmod(b.path(name), 0o700),
        ),
        f"chown of {name}": (
            set_attributes(name, SetAttrMask.UID | SetAttrMask.GID, uid=1, gid=2),
            lambda b: os.chown(b.path(name), 1, 2),
        ),
        f"touch of {name}": times(name, NOW, None),
        f"utimens of {name}": times(name, SetAttrMask.ATIME | SetAttrMask.MTIME, (5, 6)),
        f"utimens of mtime of {name}": times(name, SetAttrMask.MTIME, (linux.UTIME_OMIT, 6)),
        f"utimens of atime, now, of {name}": times(name, SetAttrMask.ATIME_NOW, (linux.UTIME_NOW, linux.UTIME_OMIT)),
        f"setxattr of {name}": (
            lambda b: b.store.change(protocol.SetXattr(SESSION, 1, b.inos[name], b"user.a", b"v", caller=WHO)),
            lambda b: os.setxattr(b.path(name), "user.a", b"v"),
        ),
        f"removexattr of {name}": (
            lambda b: b.store.change(protocol.RemoveXattr(SESSION, 1, b.inos[name], b"user.no", WHO)),
            lambda b: os.removexattr(b.path(name), "user.no"),
        ),
        f"setfacl of {name}": (
            lambda b: b.store.change(protocol.SetXattr(SESSION, 1, b.inos[name], ACCESS_XATTR, LIST, caller=WHO)),
            lambda b: os.setxattr(b.path(name), ACCESS_XATTR, LIST),
        ),
        f"setfacl -b of {name}": (
            lambda b: b.store.change(protocol.RemoveXattr(SESSION, 1, b.inos[name], ACCESS_XATTR, WHO)),
            lambda b: os.removexattr(b.path(name), ACCESS_XATTR),
        ),
        f"exchange of {name} with another": rename(name, "e/other", RenameFlags.EXCHANGE),
        f"exchange of another with {name}": rename("e/other", name, RenameFlags.EXCHANGE),
        f"rename of {name} elsewhere": rename(name, "e/new"),
        f"rename of {name} beside it": rename(name, f"{name}2"),
    }


OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    **of_either("d/file"),
    **of_either("d/sub"),
    "truncate": (set_attributes("d/file", SetAttrMask.SIZE, size=5), lambda b: os.truncate(b.path("d/file"), 5)),
    "truncate to the same": (
        set_attributes("d/file", SetAttrMask.SIZE, size=10),
        lambda b: os.truncate(b.path("d/file"), 10),
    ),
    "truncate by a stranger": (truncate_by_a_stranger_here, truncate_by_a_stranger_there),
    "unlink": unlink("d/file"),
    "link": link("d/file", "e/new"),
    "link beside it": link("d/file", "d/new"),
    "rename over it": rename("e/other", "d/file"),
    "rmdir": (
        lambda b: b.store.rmdir(b"sub", parent=b.inos["d"]),
        lambda b: os.rmdir(b.path("d/sub")),
    ),
    "create in it": create("d/sub/new"),
    "mkdir in it": (
        lambda b: b.store.mkdir(b"new", parent=b.inos["d/sub"]),
        lambda b: os.mkdir(b.path("d/sub/new")),
    ),
    "link into it": link("e/other", "d/sub/new"),
    "unlink in it": unlink("d/sub/below"),
    "chmod in it": (
        set_attributes("d/sub/below", SetAttrMask.MODE, mode=0o700),
        lambda b: os.chmod(b.path("d/sub/below"), 0o700),
    ),
    "rename into it": rename("e/other", "d/sub/new"),
    "rename over what is in it": rename("e/other", "d/sub/below"),
    "rename out of it": rename("d/sub/below", "e/new"),
    "rename within it": rename("d/sub/below", "d/sub/new"),
    "exchange with what is in it": rename("d/sub/below", "e/other", RenameFlags.EXCHANGE),
}


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    made = Both(tmp_path)
    if not linux.has_flags(tmp_path):
        pytest.skip("this file system has no such flags")
    yield made
    for place in (tmp_path / "d", tmp_path / "e"):
        linux.remove_tree(place)


@pytest.mark.parametrize("flags", [0, FS_IMMUTABLE_FL, FS_APPEND_FL, FS_IMMUTABLE_FL | FS_APPEND_FL])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_refused_as_linux_does_it(both: Both, name: str, flags: int) -> None:
    for path in ("d/file", "d/sub"):
        both.set_flags(path, flags)
    ours, theirs = OPERATIONS[name]
    wanted = linux.errno_of(lambda: theirs(both))
    try:
        ours(both)
        got = 0
    except StoreError as error:
        got = error.errno
    assert got == wanted, f"we say {os.strerror(got)}, Linux says {os.strerror(wanted)}"
    with both.store.engine.read() as txn:
        assert check(txn) == []


def test_flags_are_the_owners_and_roots_to_set() -> None:
    store = Store()
    alice = Caller(1000, 1000, (), True)
    ino = store.create(b"f", caller=Caller(1000, 1000))
    fifo = store.change(protocol.MakeNode(SESSION, 1, ROOT_INO, b"p", stat.S_IFIFO | 0o644, 0)).ino
    for request, number in (
        (protocol.SetFlags(SESSION, 1, ino, FS_IMMUTABLE_FL, alice), 1),
        (protocol.SetFlags(SESSION, 1, ino, 0, Caller(1001, 1000, (), True)), 1),
        (protocol.SetFlags(SESSION, 1, ino, 0x40, WHO), 95),
        (protocol.SetFlags(SESSION, 1, fifo, FS_APPEND_FL, WHO), 95),
    ):
        with pytest.raises(StoreError) as caught:
            store.change(request)
        assert caught.value.errno == number
    before = store.inode(ino).ctime_ns
    assert store.change(protocol.SetFlags(SESSION, 1, ino, 0, alice)).inode.ctime_ns > before


@pytest.mark.parametrize(
    ("flags", "operation", "is_refused"),
    [
        (FS_IMMUTABLE_FL, protocol.RangeOperation.ALLOCATE, True),
        (FS_APPEND_FL, protocol.RangeOperation.ALLOCATE, False),
        (FS_APPEND_FL, protocol.RangeOperation.PUNCH, True),
        (FS_APPEND_FL, protocol.RangeOperation.ZERO, True),
    ],
)
def test_fallocate_adds_to_an_append_only_file_and_to_an_immutable_one_nothing(
    flags: int, operation: protocol.RangeOperation, is_refused: bool
) -> None:
    """Source: Linux vfs_fallocate."""
    store = Store()
    ino = store.create(b"f")
    store.change(protocol.SetFlags(SESSION, 1, ino, flags, WHO))
    request = protocol.ChangeRange(SESSION, 1, ino, operation, 0, 100)
    if not is_refused:
        store.change(request)
        return
    with pytest.raises(StoreError) as caught:
        store.change(request)
    assert caught.value.errno == 1


def test_bytes_that_were_written_before_are_taken() -> None:
    """Their write was answered before the file became immutable; the mount refuses later ones."""
    store = Store()
    ino = store.create(b"f")
    store.change(protocol.SetFlags(SESSION, 1, ino, FS_IMMUTABLE_FL, WHO))
    assert store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"bytes", 0)).inode.size == 5
