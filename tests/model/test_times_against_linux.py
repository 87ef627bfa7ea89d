"""Every operation changes mtime and ctime of the same inodes as it does on the local file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metadata import protocol
from metadata.core.schema import ROOT_INO
from metadata.protocol import Caller, RenameFlags, SetAttrMask, SetXattrMode
from tests.support import linux
from tests.support.store import SESSION, Store
from wire.errors import NoSuchEntry

WHO = Caller(0, 0, (), True)
NAMES = ("", "d1", "d1/f", "d1/h2", "d1/e", "d1/s", "d1/s/x", "d2", "d2/g", "d2/l")


class Both:
    """The same small tree on both sides."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store()
        self.inos = {"": ROOT_INO}
        for name in ("d1", "d2", "d1/e", "d1/s"):
            self.add(name, self.store.mkdir(self.base(name), parent=self.parent(name)))
            (root / name).mkdir()
        for name in ("d1/f", "d1/h2", "d1/s/x", "d2/g"):
            self.add(name, self.store.create(self.base(name), parent=self.parent(name)))
            (root / name).touch()
            os.setxattr(root / name, "user.old", b"v")
            self.store.change(protocol.SetXattr(SESSION, 1, self.inos[name], b"user.old", b"v"))
        self.store.link(self.inos["d1/f"], b"l", parent=self.inos["d2"])
        os.link(root / "d1/f", root / "d2/l")

    def add(self, name: str, ino: int) -> None:
        self.inos[name] = ino

    def parent(self, name: str) -> int:
        return self.inos[name.rpartition("/")[0]]

    def base(self, name: str) -> bytes:
        return name.rpartition("/")[2].encode()

    def ours(self) -> dict[int, tuple[int, int]]:
        times = {}
        for ino in set(self.inos.values()):
            try:
                inode = self.store.inode(ino)
            except NoSuchEntry:
                continue
            times[ino] = (inode.mtime_ns, inode.ctime_ns)
        return times

    def theirs(self) -> dict[int, tuple[int, int]]:
        """By inode number of the local file system, of whatever is below the root now."""
        found = {}
        for place, directories, files in os.walk(self.root):
            for name in (".", *directories, *files):
                told = os.lstat(Path(place) / name)
                found[told.st_ino] = (told.st_mtime_ns, told.st_ctime_ns)
        return found

    def wait_for_the_clock(self) -> None:
        """Until the local file system gives times that are later than all it has given."""
        latest = max(max(pair) for pair in self.theirs().values())
        probe = self.root.parent / "probe"
        probe.touch()
        while probe.stat().st_ctime_ns <= latest:
            os.utime(probe)


Operation = Callable[[Both], object]


def mutation(make: Callable[[Both], protocol.Mutation[protocol.InodeReply]]) -> Operation:
    return lambda both: both.store.change(make(both))


def set_attributes(name: str, mask: int, **values: int) -> Operation:
    return lambda both: both.store.change(protocol.SetAttr(SESSION, 1, both.inos[name], mask, caller=WHO, **values))


def rename(old: str, new: str, flags: int = 0) -> tuple[Operation, Operation]:
    def ours(both: Both) -> None:
        both.store.rename(
            both.base(old), both.base(new), parent=both.parent(old), new_parent=both.parent(new), flags=flags
        )

    def theirs(both: Both) -> None:
        linux.renameat2(0, os.fsencode(both.root / old), 0, os.fsencode(both.root / new), flags)

    return ours, theirs


def write(both: Both) -> None:
    with (both.root / "d1/f").open("r+b") as file:
        file.write(b"data")


OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    "create": (
        lambda both: both.store.create(b"new", parent=both.inos["d1"]),
        lambda both: (both.root / "d1/new").touch(),
    ),
    "open what is there": (
        lambda both: both.store.change(protocol.Create(SESSION, 1, both.inos["d1"], b"f", 0o644, False, WHO)),
        lambda both: os.close(os.open(both.root / "d1/f", os.O_CREAT)),
    ),
    "mkdir": (
        lambda both: both.store.mkdir(b"new", parent=both.inos["d1"]),
        lambda both: (both.root / "d1/new").mkdir(),
    ),
    "symlink": (
        lambda both: both.store.change(protocol.MakeSymlink(SESSION, 1, both.inos["d1"], b"new", b"to", WHO)),
        lambda both: (both.root / "d1/new").symlink_to("to"),
    ),
    "link": (
        lambda both: both.store.link(both.inos["d1/f"], b"new", parent=both.inos["d2"]),
        lambda both: os.link(both.root / "d1/f", both.root / "d2/new"),
    ),
    "unlink one of two names": (
        lambda both: both.store.unlink(b"f", parent=both.inos["d1"]),
        lambda both: (both.root / "d1/f").unlink(),
    ),
    "unlink": (
        lambda both: both.store.unlink(b"g", parent=both.inos["d2"], closed_ino=both.inos["d2/g"]),
        lambda both: (both.root / "d2/g").unlink(),
    ),
    "rmdir": (
        lambda both: both.store.rmdir(b"e", parent=both.inos["d1"]),
        lambda both: (both.root / "d1/e").rmdir(),
    ),
    "rename in place": rename("d1/f", "d1/new"),
    "rename a directory away": rename("d1/s", "d2/new"),
    "rename onto a hard link of the same inode": rename("d1/f", "d2/l"),
    "rename onto one of two names": rename("d2/g", "d2/l"),
    "rename a directory onto an empty one": rename("d1/s", "d1/e"),
    "exchange": rename("d1/f", "d2/g", RenameFlags.EXCHANGE),
    "exchange a directory and a file": rename("d1/s", "d2/g", RenameFlags.EXCHANGE),
    "chmod": (
        set_attributes("d1/f", SetAttrMask.MODE, mode=0o600),
        lambda both: (both.root / "d1/f").chmod(0o600),
    ),
    "chown": (
        set_attributes("d1/f", SetAttrMask.UID | SetAttrMask.GID, uid=1, gid=1),
        lambda both: os.chown(both.root / "d1/f", 1, 1),
    ),
    "truncate to the same size": (
        set_attributes("d1/f", SetAttrMask.SIZE, size=0),
        lambda both: os.truncate(both.root / "d1/f", 0),
    ),
    "truncate to a larger size": (
        set_attributes("d1/f", SetAttrMask.SIZE, size=9),
        lambda both: os.truncate(both.root / "d1/f", 9),
    ),
    "utimens": (
        set_attributes("d1/f", SetAttrMask.ATIME | SetAttrMask.MTIME, atime_ns=1, mtime_ns=1),
        lambda both: os.utime(both.root / "d1/f", ns=(1, 1)),
    ),
    "utimens now": (
        set_attributes("d1/f", SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW),
        lambda both: os.utime(both.root / "d1/f"),
    ),
    "setxattr": (
        mutation(lambda both: protocol.SetXattr(SESSION, 1, both.inos["d1/f"], b"user.a", b"v", SetXattrMode.EITHER)),
        lambda both: os.setxattr(both.root / "d1/f", "user.a", b"v"),
    ),
    "removexattr": (
        mutation(lambda both: protocol.RemoveXattr(SESSION, 1, both.inos["d1/f"], b"user.old")),
        lambda both: os.removexattr(both.root / "d1/f", "user.old"),
    ),
    "write": (
        mutation(lambda both: protocol.WriteInline(SESSION, 1, both.inos["d1/f"], 0, b"data", 0)),
        write,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_times_change(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    both = Both(root)
    ours, theirs = OPERATIONS[name]
    names = {os.lstat(root / name).st_ino: both.inos.get(name, both.inos["d1/f"]) for name in NAMES}
    our_old, their_old = both.ours(), both.theirs()
    both.wait_for_the_clock()
    ours(both)
    theirs(both)
    our_new, their_new = both.ours(), both.theirs()
    wanted = {
        names[ino]: (their_new[ino][0] != old[0], their_new[ino][1] != old[1])
        for ino, old in their_old.items()
        if ino in their_new
    }
    got = {
        ino: (our_new[ino][0] != old[0], our_new[ino][1] != old[1]) for ino, old in our_old.items() if ino in our_new
    }
    assert got == wanted
