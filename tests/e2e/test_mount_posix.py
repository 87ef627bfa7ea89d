"""POSIX behaviours one by one: the same function on the mount and on a local directory (ext4) gives the same answer.

Each function gets an empty directory and returns what it saw; an errno is part of what is seen.  What no two file
systems have in common (inode numbers, the clock) is taken out by the function itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.places import Place

pytestmark = [pytest.mark.mounted, pytest.mark.usefixtures("each_frontend")]

Seen = object
Behaviour = Callable[[bytes], Seen]
BEHAVIOURS: list[Behaviour] = []

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
CLOCK_REALTIME_COARSE = 5
NOBODY = 65534
MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def behaviour(function: Behaviour) -> Behaviour:
    """Put it into the table."""
    BEHAVIOURS.append(function)
    return function


@pytest.fixture
def local() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory(prefix="fsd-local-") as directory:
        os.chmod(directory, 0o755)
        yield os.fsencode(directory)


@pytest.mark.parametrize("behave", BEHAVIOURS, ids=lambda behave: behave.__name__)
def test_the_mount_behaves_as_a_local_directory(behave: Behaviour, place: Place, local: bytes) -> None:
    ours = os.fsencode(place.directory / "ours")
    os.mkdir(ours, 0o755)
    expected = behave(local)
    assert behave(ours) == expected


# --- help -------------------------------------------------------------------------------------------------------------


def told(call: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What the call returns, or the name of its errno."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def done(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    """ "ok" or the name of the errno; a descriptor that was opened is closed again."""
    found = told(call, *args, **kwargs)
    if isinstance(found, int) and call is os.open:
        os.close(found)
    return found if isinstance(found, str) and found in errno.errorcode.values() else "ok"


def write(path: bytes, data: bytes = b"", mode: int = 0o644) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.write(descriptor, data)
    os.close(descriptor)


def read(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(path: bytes, flags: int, mode: int = 0o644) -> Iterator[int]:
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def form(path: bytes | int) -> tuple[str, int, int, int, int]:
    found = os.stat(path) if isinstance(path, int) else os.lstat(path)
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return stat.filemode(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Clock:
    """Which of an inode's times a call has moved."""

    def __init__(self, *paths: bytes | int) -> None:
        self.paths = paths

    def __call__(self, call: Callable[..., object], *args: object) -> list[str]:
        before = [self.times(path) for path in self.paths]
        # Coarse clocks tick every 4 ms: wait until the next stamp must differ.
        deadline = time.clock_gettime_ns(CLOCK_REALTIME_COARSE) + 8_000_000
        while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) < deadline:
            time.sleep(0.001)
        call(*args)
        moved = []
        for index, (path, old) in enumerate(zip(self.paths, before, strict=True)):
            new = self.times(path)
            moved += [f"{index}.{name}" for name, a, b in zip(("mtime", "ctime"), old, new, strict=True) if a != b]
        return moved

    @staticmethod
    def times(path: bytes | int) -> tuple[int, int]:
        found = os.stat(path) if isinstance(path, int) else os.lstat(path)
        return found.st_mtime_ns, found.st_ctime_ns


def as_nobody(function: Callable[[], object]) -> object:
    """What the function returns when somebody else calls it (in a process of its own)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writer, repr(function()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


# --- names ------------------------------------------------------------------------------------------------------------


@behaviour
def names_of_any_bytes(top: bytes) -> Seen:
    names = [bytes([value]) for value in range(1, 256) if value not in b"./"]
    names += [b"\xff\xfe\xfd", b"..x", b"...", " grüße\n🎉".encode(), b"x" * 255]
    for name in names:
        write(top + b"/" + name, name)
    assert sorted(os.listdir(top)) == sorted(names)
    return [read(top + b"/" + name) for name in names]


@behaviour
def names_too_long(top: bytes) -> Seen:
    long = top + b"/" + b"n" * 256
    write(top + b"/f")
    calls: list[tuple[Any, ...]] = [
        (os.stat, long),
        (os.open, long, os.O_RDWR | os.O_CREAT),
        (os.mkdir, long),
        (os.symlink, b"t", long),
        (os.link, top + b"/f", long),
        (os.rename, top + b"/f", long),
        (os.rename, long, top + b"/g"),
        (os.unlink, long),
        (os.rmdir, long),
        (os.mkfifo, long),
        (os.readlink, long),
        (os.listxattr, long),
    ]
    return [done(*call) for call in calls]


@behaviour
def symlink_targets(top: bytes) -> Seen:
    link = top + b"/l"
    seen: list[object] = []
    for size in (1, 255, 4000, 4095, 4096):
        seen.append(done(os.symlink, b"t" * size, link))
        if os.path.lexists(link):
            seen += [len(os.readlink(link)), form(link)]
            os.unlink(link)
    os.symlink(b"l", link)
    seen += [done(os.stat, link), done(os.open, link, os.O_RDONLY), done(os.open, link, os.O_NOFOLLOW)]
    return seen


# --- open flags -------------------------------------------------------------------------------------------------------


@behaviour
def open_flags_matrix(top: bytes) -> Seen:
    seen: list[object] = []
    kinds: dict[bytes, Callable[[bytes], object]] = {
        b"none": lambda path: None,
        b"file": lambda path: write(path, b"content"),
        b"directory": os.mkdir,
        b"link": lambda path: os.symlink(b"file-behind", path),
        b"dangling": lambda path: os.symlink(b"nothing", path),
    }
    write(top + b"/file-behind", b"behind")
    flags = [
        access | creat | excl | trunc | other
        for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
        for creat in (0, os.O_CREAT)
        for excl in (0, os.O_EXCL)
        for trunc in (0, os.O_TRUNC)
        for other in (0, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_PATH)
        if not (excl and not creat)
        if not (creat and other == os.O_DIRECTORY)
    ]
    for kind, make in kinds.items():
        for number, flag in enumerate(flags):
            path = top + b"/%s-%d" % (kind, number)
            make(path)
            found = told(os.open, path, flag, 0o640)
            if isinstance(found, int):
                seen.append((kind, oct(flag), form(found), done(os.read, found, 10), done(os.write, found, b"new")))
                os.close(found)
            else:
                seen.append((kind, oct(flag), found))
            seen.append(form(path) if os.path.lexists(path) else None)
    return seen


@behaviour
def append_moves_every_write_to_the_end(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"0123456789")
    with opened(path, os.O_RDWR | os.O_APPEND) as descriptor:
        os.lseek(descriptor, 2, os.SEEK_SET)
        os.write(descriptor, b"abc")
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.pwrite(descriptor, b"XYZ", 1)
        os.ftruncate(descriptor, 4)
        os.write(descriptor, b"end")
        return at, os.pread(descriptor, 100, 0), form(descriptor)


@behaviour
def two_processes_append(top: bytes) -> Seen:
    path = top + b"/f"
    code = (
        "import os, sys\n"
        "d = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "for i in range(300): os.write(d, (sys.argv[2] * 9 + '\\n').encode())\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, os.fsdecode(path), mark]) for mark in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = read(path).split()
    return len(lines), sorted(set(lines)), lines.count(b"a" * 9)


@behaviour
def direct_reads_and_writes(top: bytes) -> Seen:
    path = top + b"/f"
    buffer = mmap.mmap(-1, 8192)
    buffer.write(b"d" * 8192)
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT) as descriptor:
        wrote = os.writev(descriptor, [buffer])
        os.pwrite(descriptor, buffer, 16384)
        got = mmap.mmap(-1, 32768)
        size = os.preadv(descriptor, [got], 0)
        holes = got[8192:16384] == bytes(8192)
        with opened(path, os.O_RDWR) as cached:
            os.pwrite(cached, b"CACHED", 0)
            first = os.read(cached, 6)
            os.preadv(descriptor, [got], 0)
            return wrote, size, holes, first, got[:7], os.fstat(descriptor).st_size


@behaviour
def synchronous_writes(top: bytes) -> Seen:
    seen: list[object] = []
    for flag in (os.O_SYNC, os.O_DSYNC):
        with opened(top + b"/f", os.O_RDWR | os.O_CREAT | flag) as descriptor:
            seen += [os.write(descriptor, b"a" * 5000), os.pwrite(descriptor, b"b" * 10, 100_000)]
        seen.append(read(top + b"/f"))
    return seen


# --- data -------------------------------------------------------------------------------------------------------------


@behaviour
def reads_at_and_past_the_end(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x" * 10_000)
    with opened(path, os.O_RDWR) as descriptor:
        return [
            os.pread(descriptor, 100, 9_950),
            os.pread(descriptor, 100, 10_000),
            os.pread(descriptor, 100, 1 << 40),
            os.lseek(descriptor, 0, os.SEEK_END),
            os.read(descriptor, 10),
            done(os.lseek, descriptor, -1, os.SEEK_SET),
            done(os.pread, descriptor, 10, -1),
        ]


@behaviour
def offsets_beyond_four_gib(top: bytes) -> Seen:
    path = top + b"/f"
    seen: list[object] = []
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        for offset in ((1 << 32) - 3, (1 << 32) + 5, 5 << 30, (1 << 40) + 1):
            seen += [os.pwrite(descriptor, b"mark%d" % offset, offset), os.pread(descriptor, 40, offset - 10)]
        seen += [os.fstat(descriptor).st_size, os.pread(descriptor, 16, 1 << 30)]
        os.ftruncate(descriptor, 1 << 40)
        seen += [os.fstat(descriptor).st_size, os.pread(descriptor, 20, (5 << 30) - 5)]
    seen.append(os.stat(path).st_blocks < 1000)
    return seen


@behaviour
def writes_beyond_the_largest_size(top: bytes) -> Seen:
    """A process's own limit gives EFBIG on every file system alike; past 2**63 - 1 the kernel refuses."""
    code = (
        "import os, resource, signal, sys, errno\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "print(os.pwrite(d, b'x' * 6000, 0))\n"
        "for call in (lambda: os.pwrite(d, b'y', 5000), lambda: os.ftruncate(d, 5001)):\n"
        "    try: print(call())\n"
        "    except OSError as e: print(errno.errorcode[e.errno])\n"
        "print(os.fstat(d).st_size)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, top + b"/f"], capture_output=True, text=True, check=True)
    with opened(top + b"/g", os.O_RDWR | os.O_CREAT) as descriptor:
        return run.stdout, done(os.pwrite, descriptor, b"xy", (1 << 63) - 1), done(os.ftruncate, descriptor, -1)


@behaviour
def overwrites_and_holes(top: bytes) -> Seen:
    path = top + b"/f"
    chance = random.Random(7)
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        for _ in range(200):
            size = chance.choice([1, 100, 4096, 5000, 40_000])
            os.pwrite(descriptor, chance.randbytes(size), chance.randrange(300_000))
            if chance.random() < 0.1:
                os.ftruncate(descriptor, chance.randrange(300_000))
            if chance.random() < 0.1:
                os.fsync(descriptor)
    return read(path)


@behaviour
def truncate_up_and_down(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"0123456789" * 10_000)
    seen: list[object] = []
    for size in (50_000, 50_001, 3, 0, 7, 20_000):
        os.truncate(path, size)
        seen.append(read(path))
    os.mkdir(top + b"/d")
    return [*seen, done(os.truncate, top + b"/d", 0), done(os.truncate, path, -1), done(os.truncate, top + b"/no", 0)]


@behaviour
def fallocate_and_seek_hole_do_not_lie(top: bytes) -> Seen:
    """Optional calls may be refused, but what they do must be right; compared is only what a reader sees."""
    path = top + b"/f"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"data", 1 << 20)
        with contextlib.suppress(OSError):
            os.posix_fallocate(descriptor, 0, 100)
        data = os.lseek(descriptor, 1 << 20, os.SEEK_DATA)
        return data, os.lseek(descriptor, (1 << 20) + 1, os.SEEK_HOLE), os.pread(descriptor, 4, 1 << 20)


@behaviour
def shared_mapping_reaches_the_file(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"." * 100_000)
    with opened(path, os.O_RDWR) as descriptor:
        mapped = mmap.mmap(descriptor, 100_000)
        mapped[10:20] = b"0123456789"
        mapped[70_000:70_003] = b"abc"
        mapped.flush()
        with opened(path, os.O_RDONLY) as other:
            seen = [os.pread(other, 30, 0), os.pread(other, 5, 69_999)]
        os.pwrite(descriptor, b"WRITTEN", 50_000)
        seen.append(mapped[49_999:50_010])
        mapped[99_999] = ord("!")
        mapped.close()
    return [*seen, read(path)]


@behaviour
def mapping_through_an_append_handle_stays_in_place(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"." * 10_000)
    with opened(path, os.O_RDWR | os.O_APPEND) as descriptor:
        mapped = mmap.mmap(descriptor, 10_000)
        mapped[5000:5004] = b"here"
        mapped.flush()
        os.write(descriptor, b"appended")
        mapped.close()
    return read(path)


@behaviour
def truncate_below_a_mapping(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x" * 20_000)
    with opened(path, os.O_RDWR) as descriptor:
        mapped = mmap.mmap(descriptor, 20_000)
        mapped[0:4] = b"head"
        mapped[5000:5004] = b"tail"
        os.ftruncate(descriptor, 4100)
        os.ftruncate(descriptor, 20_000)
        seen = mapped[:6], mapped[4090:4110], mapped[5000:5004], mapped[8192:8196]
        mapped.close()
    return seen, read(path)


@behaviour
def private_mapping_leaves_the_file(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x" * 5000)
    with opened(path, os.O_RDONLY) as descriptor:
        mapped = mmap.mmap(descriptor, 5000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        mapped[:3] = b"own"
        seen = mapped[:5]
        mapped.close()
    return seen, read(path)


@behaviour
def writes_of_closed_mapping_survive(top: bytes) -> Seen:
    """Pages dirtied after close(2) are written when the mapping goes."""
    path = top + b"/f"
    write(path, b"x" * 5000)
    with opened(path, os.O_RDWR) as descriptor:
        mapped = mmap.mmap(descriptor, 5000)
    mapped[4000:4004] = b"late"
    mapped.close()
    return read(path)[3998:4006]


@behaviour
def copy_within_the_file_system(top: bytes) -> Seen:
    chance = random.Random(3)
    data = chance.randbytes(3 * MIB + 17)
    write(top + b"/a", data)
    with opened(top + b"/a", os.O_RDONLY) as source, opened(top + b"/b", os.O_RDWR | os.O_CREAT) as target:
        left = len(data)
        while left:
            left -= os.copy_file_range(source, target, left)
        os.lseek(source, 0, os.SEEK_SET)
        sent = os.sendfile(target, source, 0, MIB)
    copied = read(top + b"/b")
    return sent, copied[: len(data)] == data, copied[len(data) :] == data[:sent]


# --- unlink and rename ------------------------------------------------------------------------------------------------


@behaviour
def open_file_outlives_its_name(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"first" * 5000)
    with opened(path, os.O_RDWR) as descriptor:
        os.unlink(path)
        seen: list[object] = [form(descriptor), done(os.stat, path), os.pread(descriptor, 5, 5)]
        os.pwrite(descriptor, b"more" * 10_000, 20_000)
        os.fsync(descriptor)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, 50_000)
        seen += [form(descriptor), os.pread(descriptor, 8, 20_000), os.pread(descriptor, 8, 49_990)]
        write(path, b"second")
        seen += [form(descriptor), form(path), os.listdir(top)]
        with opened(b"/proc/self/fd/%d" % descriptor, os.O_RDONLY) as again:
            seen.append(os.pread(again, 5, 0))
    return [*seen, read(path)]


@behaviour
def open_file_outlives_being_replaced(top: bytes) -> Seen:
    write(top + b"/old", b"old")
    write(top + b"/new", b"new")
    with opened(top + b"/old", os.O_RDWR) as descriptor:
        os.rename(top + b"/new", top + b"/old")
        os.write(descriptor, b"OLD+")
        return form(descriptor), os.pread(descriptor, 10, 0), read(top + b"/old"), os.listdir(top)


@behaviour
def path_descriptor_outlives_the_name(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x" * 100)
    with opened(path, os.O_PATH) as descriptor:
        os.unlink(path)
        return form(descriptor), done(os.stat, path)


@behaviour
def directory_outlives_its_name(top: bytes) -> Seen:
    path = top + b"/d"
    os.mkdir(path)
    with opened(path, os.O_RDONLY) as descriptor:
        os.rmdir(path)
        return (
            os.fstat(descriptor).st_nlink,
            done(os.open, b"inside", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor),
            done(os.mkdir, b"inside", dir_fd=descriptor),
            told(os.listdir, descriptor),
        )


@behaviour
def rename_matrix(top: bytes) -> Seen:
    def full(path: bytes) -> None:
        os.mkdir(path)
        write(path + b"/inside")

    kinds: dict[bytes, Callable[[bytes], object]] = {
        b"none": lambda path: None,
        b"file": lambda path: write(path, path[-6:]),
        b"link": lambda path: os.symlink(b"target", path),
        b"fifo": os.mkfifo,
        b"empty": os.mkdir,
        b"full": full,
    }
    seen = []
    for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_NOREPLACE | RENAME_EXCHANGE, 8):
        for old, make_old in kinds.items():
            for new, make_new in kinds.items():
                base = top + b"/%d-%s-%s" % (flags, old, new)
                os.mkdir(base)
                make_old(base + b"/old")
                make_new(base + b"/new")
                answer = done(renameat2, base + b"/old", base + b"/new", flags)
                seen.append((base[len(top) :], answer, form(base)[1], tree(base)))
    return seen


def tree(top: bytes) -> list[object]:
    return [(name, form(top + b"/" + name)) for name in sorted(os.listdir(top))]


@behaviour
def rename_special_cases(top: bytes) -> Seen:
    os.makedirs(top + b"/a/b/c")
    os.mkdir(top + b"/e")
    write(top + b"/f", b"f")
    os.link(top + b"/f", top + b"/g")
    return [
        done(os.rename, top + b"/a", top + b"/a/b/c/d"),
        done(os.rename, top + b"/a", top + b"/a"),
        done(os.rename, top + b"/a/.", top + b"/z"),
        done(os.rename, top + b"/a/b", top + b"/a"),
        done(os.rename, top + b"/f", top + b"/g"),
        sorted(os.listdir(top)),
        done(renameat2, top + b"/a", top + b"/a/b", RENAME_EXCHANGE),
        done(os.rename, top + b"/a/b", top + b"/e/b"),
        [form(top + name)[1] for name in (b"/a", b"/e", b"/e/b", b"")],
        done(os.rename, top + b"/f/x", top + b"/y"),
        done(os.rename, top + b"/f", b"/proc/x"),
        done(os.rename, top + b"/f/", top + b"/h"),
        done(os.rename, top + b"/e", top + b"/h/"),
        sorted(os.listdir(top)),
    ]


@behaviour
def errors_of_kinds(top: bytes) -> Seen:
    os.makedirs(top + b"/d/full")
    write(top + b"/f")
    os.symlink(b"d", top + b"/l")
    os.symlink(b"f", top + b"/lf")
    calls: list[tuple[Any, ...]] = [
        (os.open, top + b"/d", os.O_WRONLY),
        (os.open, top + b"/d", os.O_RDWR | os.O_CREAT),
        (os.open, top + b"/f/x", os.O_RDONLY),
        (os.open, top + b"/f", os.O_RDONLY | os.O_DIRECTORY),
        (os.open, top + b"/f/", os.O_RDONLY),
        (os.rmdir, top + b"/f"),
        (os.rmdir, top + b"/d"),
        (os.rmdir, top + b"/l"),
        (os.rmdir, top + b"/d/."),
        (os.rmdir, top + b"/d/full/.."),
        (os.unlink, top + b"/d"),
        (os.unlink, top + b"/no"),
        (os.mkdir, top + b"/d"),
        (os.mkdir, top + b"/no/d"),
        (os.mkdir, top + b"/f/d"),
        (os.link, top + b"/d", top + b"/hard"),
        (os.link, top + b"/f", top + b"/d"),
        (os.link, top + b"/f", b"/proc/hard"),
        (os.symlink, b"x", top + b"/f"),
        (os.readlink, top + b"/f"),
        (os.readlink, top + b"/d"),
        (os.listdir, top + b"/f"),
        (os.listdir, top + b"/no"),
        (os.mkfifo, top + b"/f"),
    ]
    with opened(top + b"/d", os.O_RDONLY) as descriptor:
        calls.append((os.read, descriptor, 10))
        return [done(*call) for call in calls]


# --- attributes -------------------------------------------------------------------------------------------------------


@behaviour
def link_counts(top: bytes) -> Seen:
    a, b = top + b"/a", top + b"/b"
    write(a, b"x")
    seen = [form(a)]
    os.link(a, b)
    seen += [form(a), form(b)]
    os.link(b, top + b"/c")
    seen += [form(a)]
    os.unlink(a)
    seen += [form(b)]
    write(top + b"/other")
    os.rename(top + b"/other", top + b"/c")
    seen += [form(b)]
    os.mkdir(top + b"/d")
    os.mkdir(top + b"/d/e")
    seen += [form(top), form(top + b"/d")]
    os.rmdir(top + b"/d/e")
    seen += [form(top + b"/d")]
    os.rmdir(top + b"/d")
    return [*seen, form(top)]


@behaviour
def links_to_symlinks_and_special_files(top: bytes) -> Seen:
    os.symlink(b"t", top + b"/l")
    os.mkfifo(top + b"/p")
    os.link(top + b"/l", top + b"/l2", follow_symlinks=False)
    os.link(top + b"/p", top + b"/p2")
    return [form(top + b"/" + name) for name in (b"l", b"l2", b"p", b"p2")], os.readlink(top + b"/l2")


@behaviour
def which_calls_move_which_times(top: bytes) -> Seen:
    """Each answer is stat's directly after the call: nothing that the kernel keeps may be stale."""
    f, g, d, e = (top + b"/" + name for name in (b"f", b"g", b"d", b"e"))
    write(f, b"x" * 100)
    os.mkdir(d)
    os.mkdir(e)
    descriptor = os.open(f, os.O_RDWR)
    moved = Clock(f, top, d, e)
    seen = [
        ("write", moved(os.write, descriptor, b"y")),
        ("write of nothing", moved(os.write, descriptor, b"")),
        ("fsync", moved(os.fsync, descriptor)),
        ("ftruncate", moved(os.ftruncate, descriptor, 10)),
        ("truncate longer", moved(os.truncate, f, 1000)),
        ("open", moved(os.close, os.open(f, os.O_RDWR))),
        ("open truncating", moved(lambda: os.close(os.open(f, os.O_RDWR | os.O_TRUNC)))),
        ("chmod", moved(os.chmod, f, 0o600)),
        ("chown", moved(os.chown, f, 1, 1)),
        ("utime", moved(os.utime, f, (5, 5))),
        ("link", moved(os.link, f, g)),
        ("unlink of the other name", moved(os.unlink, g)),
        ("rename", Clock(descriptor, top)(os.rename, f, g)),
    ]
    moved = Clock(descriptor, top, d, e)
    seen += [
        ("rename into a directory", moved(os.rename, g, d + b"/f")),
    ]
    moved = Clock(d + b"/f", top, d, e)
    seen += [
        ("create", moved(write, d + b"/new")),
        ("link elsewhere", moved(os.link, d + b"/f", e + b"/f")),
        ("unlink there", moved(os.unlink, e + b"/f")),
        ("link again", moved(os.link, d + b"/f", e + b"/f")),
        ("rename over the other name", moved(os.rename, d + b"/new", e + b"/f")),
        ("mkdir", moved(os.mkdir, d + b"/sub")),
        ("move a directory", moved(os.rename, d + b"/sub", e + b"/sub")),
        ("exchange", moved(renameat2, d + b"/f", e + b"/f", RENAME_EXCHANGE)),
        ("rmdir", moved(os.rmdir, e + b"/sub")),
        ("symlink", moved(os.symlink, b"x", d + b"/link")),
        ("mkfifo", moved(os.mkfifo, d + b"/fifo")),
        ("setxattr", moved(os.setxattr, d + b"/f", b"user.a", b"1")),
        ("setxattr of the same value", moved(os.setxattr, d + b"/f", b"user.a", b"1")),
        ("setxattr of another value", moved(os.setxattr, d + b"/f", b"user.a", b"2")),
        ("removexattr", moved(os.removexattr, d + b"/f", b"user.a")),
        ("listing", moved(os.listdir, d)),
        ("refused", moved(done, os.mkdir, d + b"/f")),
    ]
    os.close(descriptor)
    return seen


@behaviour
def moved_directory_times_and_parents(top: bytes) -> Seen:
    a, b = top + b"/a", top + b"/b"
    os.makedirs(a + b"/sub/deep")
    os.mkdir(b)
    moved = Clock(a, b, a + b"/sub/deep")
    with opened(a + b"/sub", os.O_RDONLY) as descriptor:
        before = os.stat(b"..", dir_fd=descriptor).st_ino == os.stat(a).st_ino
        times = Clock(a, b, descriptor)(os.rename, a + b"/sub", b + b"/sub")
        after = os.stat(b"..", dir_fd=descriptor).st_ino == os.stat(b).st_ino
    del moved
    return before, times, after, [form(path)[1] for path in (a, b, b + b"/sub")]


@behaviour
def times_set_by_hand(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x")
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    seen: list[object] = [(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns)]
    os.utime(path, ns=(-5_000_000_001, 4_000_000_000_123_456_789))
    seen.append((os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))

    class Timespec(ctypes.Structure):
        _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    def utimensat(access: tuple[int, int], change: tuple[int, int]) -> None:
        pair = (Timespec * 2)(Timespec(*access), Timespec(*change))
        if _libc.utimensat(AT_FDCWD, path, pair, 0):
            raise OSError(ctypes.get_errno(), "")

    utimensat((0, UTIME_OMIT), (7, 8))
    seen.append((os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))
    utimensat((9, 10), (0, UTIME_OMIT))
    seen.append((os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))
    now = time.time()
    utimensat((0, UTIME_NOW), (0, UTIME_OMIT))
    seen.append((abs(os.stat(path).st_atime - now) < 5, os.stat(path).st_mtime_ns))
    utimensat((0, UTIME_NOW), (0, UTIME_NOW))
    seen.append((abs(os.stat(path).st_atime - now) < 5, abs(os.stat(path).st_mtime - now) < 5))
    seen.append(done(utimensat, (0, 1 << 40), (0, 0)))
    return seen


@behaviour
def mtime_set_on_an_open_file_stands(top: bytes) -> Seen:
    """As tar and cp -p do: write, set the time through the descriptor, close."""
    path = top + b"/f"
    seen = []
    for size in (10, 100_000):
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
            os.write(descriptor, b"x" * size)
            os.utime(descriptor, ns=(10**18, 10**18 + 1))
            seen.append(os.fstat(descriptor).st_mtime_ns)
        seen.append(os.stat(path).st_mtime_ns)
    return seen


@behaviour
def size_and_time_of_unflushed_writes(top: bytes) -> Seen:
    path = top + b"/f"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.utime(descriptor, (5, 5))
        os.write(descriptor, b"x" * 70_000)
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns > 10**18, os.path.getsize(path), len(read(path))


@behaviour
def stat_before_and_after_close_agree(top: bytes) -> Seen:
    """What a program notes before it closes the file (as git does) is still so afterwards."""
    path = top + b"/f"
    seen = []
    for size in (10, 100_000):
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
            os.write(descriptor, b"x" * size)
            before = os.fstat(descriptor)
        after = os.stat(path)
        seen.append([name for name in ("st_size", "st_mtime_ns", "st_ctime_ns") if differ(name, before, after)])
    return seen


def differ(name: str, before: os.stat_result, after: os.stat_result) -> bool:
    return bool(getattr(before, name) != getattr(after, name))


@behaviour
def modes_and_owners(top: bytes) -> Seen:
    path = top + b"/f"
    seen = []
    for umask in (0, 0o022, 0o077):
        old = os.umask(umask)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o6777))
        seen.append(form(path))
        os.mkdir(top + b"/d%o" % umask, 0o7777)
        seen.append(form(top + b"/d%o" % umask))
        os.umask(old)
    for mode in (0, 0o4755, 0o2755, 0o2745, 0o1777, 0o7777):
        os.chmod(path, mode)
        seen.append(form(path))
    os.chown(path, 12, 34)
    seen.append(form(path))
    os.chown(path, -1, 56)
    seen.append(form(path))
    os.symlink(b"f", top + b"/l")
    os.lchown(top + b"/l", 7, 8)
    seen.append(form(top + b"/l"))
    return seen


@behaviour
def group_of_a_setgid_directory(top: bytes) -> Seen:
    os.mkdir(top + b"/d")
    os.chown(top + b"/d", 0, 77)
    os.chmod(top + b"/d", 0o2775)
    write(top + b"/d/f")
    os.mkdir(top + b"/d/e")
    os.symlink(b"x", top + b"/d/l")
    return tree(top + b"/d")


@behaviour
def privileges_go_when_somebody_writes(top: bytes) -> Seen:
    os.chmod(top, 0o777)

    def write_one(path: bytes) -> object:
        with opened(path, os.O_WRONLY) as descriptor:
            os.write(descriptor, b"x")
            return form(descriptor)

    def open_and_truncate(path: bytes) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

    def only_read(path: bytes) -> None:
        os.close(os.open(path, os.O_RDONLY))

    calls: list[Callable[[bytes], object]] = [
        write_one,
        open_and_truncate,
        only_read,
        lambda path: os.truncate(path, 1),
        lambda path: done(os.chmod, path, 0o4777),
    ]
    seen = []
    for mode in (0o4777, 0o2777, 0o2767, 0o6777):
        for number, call in enumerate(calls):
            path = top + b"/%d-%o" % (number, mode)
            write(path, b"content")
            os.chmod(path, mode)
            before = form(path)
            seen.append((number, before, as_nobody(functools.partial(call, path)), form(path)))
    return seen


@behaviour
def privileges_stay_when_root_writes(top: bytes) -> Seen:
    path = top + b"/f"
    seen = []
    for size in (5, 100_000):
        write(path, b"content")
        os.chmod(path, 0o6755)
        with opened(path, os.O_WRONLY) as descriptor:
            os.write(descriptor, b"x" * size)
            seen.append(form(descriptor))
            os.fsync(descriptor)
        seen.append(form(path))
        os.truncate(path, 3)
        seen.append(form(path))
        with opened(path, os.O_WRONLY | os.O_TRUNC) as descriptor:
            os.write(descriptor, b"x" * size)
            os.fchmod(descriptor, 0o4711)
        seen.append(form(path))
        os.chown(path, 3, 4)
        seen.append(form(path))
    return seen


@behaviour
def permissions_of_others(top: bytes) -> Seen:
    os.chmod(top, 0o755)
    write(top + b"/secret", b"x", 0o600)
    write(top + b"/open", b"x", 0o644)
    os.mkdir(top + b"/closed", 0o700)
    write(top + b"/closed/f")
    os.mkdir(top + b"/sticky")
    os.chmod(top + b"/sticky", 0o1777)
    write(top + b"/sticky/mine")

    def tell() -> object:
        os.umask(0o022)
        calls: list[tuple[Any, ...]] = [
            (os.open, top + b"/secret", os.O_RDONLY),
            (os.open, top + b"/open", os.O_RDONLY),
            (os.open, top + b"/open", os.O_WRONLY),
            (os.stat, top + b"/closed/f"),
            (os.listdir, top + b"/closed"),
            (os.mkdir, top + b"/new"),
            (os.unlink, top + b"/open"),
            (os.unlink, top + b"/sticky/mine"),
            (os.rename, top + b"/sticky/mine", top + b"/sticky/yours"),
            (os.mkdir, top + b"/sticky/own"),
            (os.chmod, top + b"/open", 0o777),
            (os.chown, top + b"/sticky/own", 0, 0),
            (os.utime, top + b"/open"),
            (os.utime, top + b"/open", (1, 1)),
            (os.truncate, top + b"/open", 0),
            (os.setxattr, top + b"/open", b"user.x", b"1"),
            (os.getxattr, top + b"/secret", b"user.x"),
            (os.setxattr, top + b"/sticky/own", b"trusted.x", b"1"),
        ]
        access = [(b"/secret", os.R_OK), (b"/open", os.R_OK), (b"/closed", os.X_OK), (b"/sticky", os.W_OK)]
        return [done(*call) for call in calls], [os.access(top + path, mode) for path, mode in access]

    return as_nobody(tell), form(top + b"/sticky/own")


# --- extended attributes ----------------------------------------------------------------------------------------------


@behaviour
def extended_attributes(top: bytes) -> Seen:
    path = top + b"/f"
    write(path)
    os.symlink(b"f", top + b"/l")
    os.mkfifo(top + b"/p")
    os.mkdir(top + b"/d")
    seen: list[object] = [told(os.listxattr, path), done(os.getxattr, path, b"user.no")]
    names = (b"user.a", b"trusted.b", b"user.\xff\xfe", b"user." + b"n" * 250, b"user." + b"n" * 251, b"user.")
    seen += [done(os.setxattr, path, name, b"v") for name in names]
    for name in (b"strange.a", b"plain", b"system.no", b""):
        seen += [done(os.setxattr, path, name, b"v"), done(os.getxattr, path, name)]
    seen += [
        done(os.setxattr, path, b"user.a", b"2", os.XATTR_CREATE),
        done(os.setxattr, path, b"user.new", b"2", os.XATTR_REPLACE),
        done(os.setxattr, path, b"user.a", b"3", os.XATTR_REPLACE),
        done(os.setxattr, path, b"user.c", b"", os.XATTR_CREATE),
        told(os.getxattr, path, b"user.a"),
        told(os.getxattr, path, b"user.c"),
        done(os.removexattr, path, b"user.no"),
        done(os.removexattr, path, b"user.c"),
        done(os.getxattr, path, b"user.c"),
        sorted(map(str, os.listxattr(path))),
        done(os.setxattr, top + b"/l", b"user.x", b"1", 0, follow_symlinks=False),
        done(os.setxattr, top + b"/l", b"trusted.x", b"1", 0, follow_symlinks=False),
        done(os.setxattr, top + b"/p", b"user.x", b"1"),
        done(os.setxattr, top + b"/d", b"user.x", b"1"),
        done(os.setxattr, path, b"user.big", b"x" * 3000),
        len(os.getxattr(path, b"user.big")),
        done(os.setxattr, path, b"user.huge", b"x" * (65536 + 1)),
    ]
    buffer = ctypes.create_string_buffer(10)
    seen += [
        _libc.getxattr(path, b"user.big", None, 0),
        _libc.getxattr(path, b"user.big", buffer, 10),
        errno.errorcode[ctypes.get_errno()],
        _libc.listxattr(path, buffer, 5),
        errno.errorcode[ctypes.get_errno()],
    ]
    return seen


@behaviour
def extended_attributes_follow_the_inode(top: bytes) -> Seen:
    path, other = top + b"/f", top + b"/g"
    write(path)
    os.setxattr(path, b"user.a", b"1")
    os.link(path, other)
    os.setxattr(other, b"user.b", b"2")
    seen = [sorted(os.listxattr(path)), os.getxattr(path, b"user.b")]
    os.rename(path, top + b"/h")
    write(path)
    return [*seen, os.listxattr(path), sorted(os.listxattr(top + b"/h"))]


# --- special files and the file system --------------------------------------------------------------------------------


@behaviour
def special_files(top: bytes) -> Seen:
    os.mkfifo(top + b"/p", 0o640)
    os.mknod(top + b"/c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(top + b"/b", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    os.mknod(top + b"/f", stat.S_IFREG | 0o604)
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(top)
    listener.bind("s")
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("s")
    os.chdir(here)
    client.close()
    listener.close()
    with opened(top + b"/c", os.O_RDWR) as null:
        nothing = os.read(null, 10)
    reader = os.open(top + b"/p", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(top + b"/p", os.O_WRONLY)
    os.write(writer, b"through")
    piped = os.read(reader, 100)
    os.close(reader)
    os.close(writer)
    numbers = [os.stat(top + name).st_rdev for name in (b"/c", b"/b")]
    write(top + b"/f", b"regular")
    return tree(top), nothing, piped, numbers


@behaviour
def figures_of_the_file_system(top: bytes) -> Seen:
    found = os.statvfs(top)
    sane = 0 < found.f_bfree <= found.f_blocks and 0 < found.f_bavail <= found.f_bfree and found.f_ffree > 0
    return found.f_namemax, found.f_bsize, found.f_frsize, sane


@behaviour
def locks_between_processes_of_one_mount(top: bytes) -> Seen:
    path = top + b"/f"
    write(path, b"x" * 100)
    code = (
        "import fcntl, os, sys\n"
        "d = os.open(sys.argv[1], os.O_RDWR)\n"
        "for lock in (fcntl.flock, fcntl.lockf):\n"
        "    try: lock(d, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\n"
        "    except BlockingIOError: print('taken')\n"
    )
    seen = []
    with opened(path, os.O_RDWR) as descriptor:
        for lock in (fcntl.flock, fcntl.lockf):
            lock(descriptor, fcntl.LOCK_EX)
            run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
            seen.append(run.stdout)
            lock(descriptor, fcntl.LOCK_UN)
    return seen


# --- directories ------------------------------------------------------------------------------------------------------


class Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_ulong),
        ("offset", ctypes.c_long),
        ("size", ctypes.c_ushort),
        ("type", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.restype = ctypes.POINTER(Dirent)
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]


class Listing:
    """opendir(3) and its family."""

    def __init__(self, path: bytes) -> None:
        self.stream = _libc.opendir(path)
        assert self.stream

    def next(self) -> bytes | None:
        entry = _libc.readdir(self.stream)
        return bytes(entry.contents.name) if entry else None

    def rest(self) -> list[bytes]:
        return list(iter(self.next, None))

    def tell(self) -> int:
        return int(_libc.telldir(self.stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self.stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self.stream)

    def close(self) -> None:
        _libc.closedir(self.stream)


@behaviour
def every_position_of_a_listing(top: bytes) -> Seen:
    names = {b"n%03d" % number for number in range(500)}
    for name in names:
        write(top + b"/" + name)
    listing = Listing(top)
    order, positions = [], [listing.tell()]
    for name in iter(listing.next, None):
        order.append(name)
        positions.append(listing.tell())
    wrong = []
    for index in [*range(0, 502, 7), 501, 502, 3, 2, 1, 0]:
        listing.seek(positions[index])
        if listing.next() != (order[index] if index < 502 else None):
            wrong.append(index)
    listing.close()
    return len(order), set(order) == names | {b".", b".."}, wrong


@behaviour
def deleting_while_listing(top: bytes) -> Seen:
    for number in range(1000):
        write(top + b"/n%04d" % number)
    listing = Listing(top)
    removed = []
    for name in iter(listing.next, None):
        if name not in (b".", b".."):
            os.unlink(top + b"/" + name)
            removed.append(name)
    listing.rewind()
    left = listing.rest()
    listing.close()
    return len(removed), len(set(removed)), sorted(left), os.listdir(top)


@behaviour
def names_stay_while_others_come_and_go(top: bytes) -> Seen:
    """An entry that is there all the time is listed exactly once, whatever is made and removed meanwhile."""
    stable = {b"stable%04d" % number for number in range(300)}
    for name in stable:
        write(top + b"/" + name)
    listing = Listing(top)
    seen: list[bytes] = []
    number = 0
    for name in iter(listing.next, None):
        seen.append(name)
        if len(seen) % 10 == 0 and number < 300:
            number += 1
            write(top + b"/passing%04d" % number)
            if number > 5:
                os.unlink(top + b"/passing%04d" % (number - 5))
    listing.close()
    return sorted(name for name in seen if name in stable) == sorted(stable)


@behaviour
def replaced_names_are_found_after_a_listing_began(top: bytes) -> Seen:
    """A listing in hand must not bring back what a name was before it was replaced."""
    for number in range(300):
        write(top + b"/n%04d" % number, b"old")
    listing = Listing(top)
    for _ in range(10):
        listing.next()
    for number in range(300):
        os.unlink(top + b"/n%04d" % number)
        write(top + b"/n%04d" % number, b"new!")
    listing.rest()
    listing.close()
    return [(os.stat(top + b"/n%04d" % number).st_size, read(top + b"/n%04d" % number)) for number in range(300)]


@behaviour
def three_thousand_entries(top: bytes) -> Seen:
    for number in range(3_000):
        os.mknod(top + b"/e%05d" % number)
    listed = os.listdir(top)
    kinds = sum(entry.is_file(follow_symlinks=False) for entry in os.scandir(top))
    for number in range(0, 3_000, 2):
        os.unlink(top + b"/e%05d" % number)
    left = os.listdir(top)
    return len(listed), len(set(listed)), kinds, len(left), len(set(left)), done(os.rmdir, top)


@behaviour
def dots_of_a_listing(top: bytes) -> Seen:
    os.makedirs(top + b"/d/e")
    listing = Listing(top + b"/d")
    names = listing.rest()
    listing.close()
    here, above = os.stat(top + b"/d/e/."), os.stat(top + b"/d/e/..")
    return sorted(names), here.st_ino == os.stat(top + b"/d/e").st_ino, above.st_ino == os.stat(top + b"/d").st_ino
