"""Listing directories: completeness, positions, changes meanwhile; and what statvfs and inotify tell."""

from __future__ import annotations

import ctypes
import os
import select
import stat
import struct

from tests.posix.calls import Listing, descriptor
from tests.posix.table import Table

directories = Table("directories")

COUNT = 150
"""Names that do not fit into one answer of the kernel."""


def fill(count: int = COUNT) -> set[bytes]:
    """Make so many files in d."""
    names = {b"%03d-" % number + b"n" * 240 for number in range(count)}
    os.mkdir("d")
    for name in names:
        os.close(os.open(b"d/" + name, os.O_CREAT | os.O_WRONLY))
    return names


@directories.case("every name is listed once", expect=True)
def _() -> bool:
    names = fill()
    with Listing(b"d") as listing:
        found = listing.rest()
    return len(found) == COUNT + 2 and set(found) == names | {b".", b".."}


@directories.case("types and inode numbers of entries are those of stat", expect=True)
def _() -> bool:
    os.mkdir("d")
    os.mkfifo("f")
    os.symlink("t", "l")
    os.close(os.open("r", os.O_CREAT))
    os.mknod("c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with os.scandir(".") as entries:
        for entry in entries:
            found = os.lstat(entry.name)
            assert entry.inode() == found.st_ino
            assert entry.is_symlink() == stat.S_ISLNK(found.st_mode)
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(found.st_mode)
    return True


@directories.case("a position leads back to the name that came after it", expect=True)
def _() -> bool:
    fill()
    with Listing(b"d") as listing:
        places = []
        while True:
            position = listing.tell()
            name = listing.read()
            if name is None:
                break
            places.append((position, name))
        for position, name in places[::-7]:
            listing.seek(position)
            assert listing.read() == name
        listing.seek(places[10][0])
        return listing.rest() == [name for _position, name in places[10:]]


@directories.case("names that stay are listed once while others go", expect=True)
def _() -> bool:
    names = fill()
    with Listing(b"d") as listing:
        found = [listing.read() for _ in range(20)]
        gone = {name for number, name in enumerate(sorted(names)) if number % 3 == 0}
        for name in gone:
            os.unlink(b"d/" + name)
        found += listing.rest()
    stayed = names - gone
    return len(found) == len(set(found)) and stayed <= set(found)


@directories.case("names that stay are listed once while others come", expect=True)
def _() -> bool:
    names = fill()
    with Listing(b"d") as listing:
        found = [listing.read() for _ in range(20)]
        for number in range(200):
            os.close(os.open(f"d/later-{number}", os.O_CREAT))
        found += listing.rest()
    return len(found) == len(set(found)) and names <= set(found)


@directories.case("a directory is emptied while it is listed", expect=[])
def _() -> object:
    fill()
    with Listing(b"d") as listing:
        while (name := listing.read()) is not None:
            if name not in (b".", b".."):
                os.unlink(b"d/" + name)
    return os.listdir("d")


@directories.case("a position from before names went is still one", expect=True)
def _() -> bool:
    fill()
    with Listing(b"d") as listing:
        for _ in range(COUNT // 2):
            listing.read()
        position = listing.tell()
        rest = set(listing.rest())
        for name in list(rest)[:50]:
            os.unlink(b"d/" + name)
        left = rest - set(list(rest)[:50])
        listing.seek(position)
        return left <= set(listing.rest()) <= rest


@directories.case("rewinddir shows names that came", expect=[False, True])
def _() -> object:
    os.mkdir("d")
    with Listing(b"d") as listing:
        before = listing.rest()
        os.mkdir("d/new")
        listing.rewind()
        return [b"new" in before, b"new" in listing.rest()]


@directories.case("two streams of one directory have each their position", expect=True)
def _() -> bool:
    fill(50)
    with Listing(b"d") as one, Listing(b"d") as other:
        first = {one.read() for _ in range(10)}
        assert {other.read() for _ in range(10)} == first
        return first.union(one.rest()) == first.union(other.rest())


@directories.case("a descriptor of a directory is rewound by lseek", setup="dir d;file d/x", expect=[["x"], ["x"]])
def _() -> object:
    with descriptor("d", os.O_RDONLY) as opened:
        first = os.listdir(opened)
        return [first, os.listdir(opened)]


@directories.case("reading a directory as a file", setup="dir d", expect="EISDIR")
def _() -> object:
    with descriptor("d", os.O_RDONLY) as opened:
        return os.read(opened, 10)


@directories.case("statvfs tells what there is", expect=True)
def _() -> bool:
    found = os.statvfs(".")
    assert found.f_namemax == 255
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert found.f_blocks >= found.f_bfree >= found.f_bavail > 0
    return found.f_files >= found.f_ffree > 0


@directories.case("pathconf", expect=[255, 4096])
def _() -> object:
    return [os.pathconf(".", "PC_NAME_MAX"), os.pathconf(".", "PC_PATH_MAX")]


IN_MODIFY, IN_CREATE, IN_DELETE, IN_MOVED_FROM, IN_MOVED_TO, IN_ATTRIB = 0x2, 0x100, 0x200, 0x40, 0x80, 0x4


@directories.case(
    "inotify tells of changes made here",
    setup="dir d",
    expect=[(0x100, b"x"), (0x2, b"x"), (0x4, b"x"), (0x40, b"x"), (0x80, b"y"), (0x200, b"y")],
)
def _() -> object:
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    try:
        libc.inotify_add_watch(
            watcher, b"d", IN_CREATE | IN_MODIFY | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB
        )
        with descriptor("d/x", os.O_CREAT | os.O_WRONLY) as opened:
            os.write(opened, b"x")
        os.chmod("d/x", 0o600)
        os.rename("d/x", "d/y")
        os.unlink("d/y")
        assert select.select([watcher], [], [], 5.0)[0]
        told, at, found = os.read(watcher, 4096), 0, []
        while at < len(told):
            _watch, mask, _cookie, size = struct.unpack_from("=iIII", told, at)
            found.append((mask, told[at + 16 : at + 16 + size].rstrip(b"\0")))
            at += 16 + size
        return found
    finally:
        os.close(watcher)
