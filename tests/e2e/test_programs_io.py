"""Kinds of input and output that programs do: maps, direct, appending, locked, sparse, and wrong."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.programs import file_digest, run
from tests.support.twin import pattern

pytestmark = pytest.mark.mounted

MIB = 1 << 20


def test_two_processes_see_each_other_through_a_shared_map(place: Place) -> None:
    path = place.directory / "map"
    path.write_bytes(bytes(MIB))
    script = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
    print(mapped[5:10].decode(), flush=True)
    mapped[500_000:500_005] = b"world"
"""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5:10] = b"hello"
        assert run(sys.executable, "-c", script, path).strip() == "hello"
        assert mapped[500_000:500_005] == b"world"
        assert os.pread(file.fileno(), 5, 500_000) == b"world"
        os.pwrite(file.fileno(), b"again", 700_000)
        assert mapped[700_000:700_005] == b"again"
    place.remount()
    data = path.read_bytes()
    assert (data[5:10], data[500_000:500_005], data[700_000:700_005]) == (b"hello", b"world", b"again")


def test_a_map_of_a_large_file_written_at_random_places_is_stored(place: Place) -> None:
    path = place.directory / "map"
    expected = bytearray(24 * MIB)
    rnd = random.Random(3)
    with path.open("w+b") as file:
        file.truncate(len(expected))
        with mmap.mmap(file.fileno(), 0) as mapped:
            for number in range(300):
                offset, size = rnd.randrange(len(expected) - 70_000), rnd.randint(1, 70_000)
                mapped[offset : offset + size] = expected[offset : offset + size] = pattern(number % 16, size)
                if number % 100 == 99:
                    mapped.flush()
    place.remount()
    with path.open("rb") as stored, mmap.mmap(stored.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == expected


def test_direct_and_cached_handles_see_each_others_bytes(place: Place) -> None:
    path = place.directory / "direct"
    buffer = mmap.mmap(-1, MIB)  # Page-aligned, as O_DIRECT wants it.
    direct = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    cached = os.open(path, os.O_RDWR)
    try:
        for turn in range(8):
            buffer[:] = pattern(turn, MIB)
            assert os.pwritev(direct, [buffer], turn * MIB) == MIB
            assert os.pread(cached, MIB, turn * MIB) == pattern(turn, MIB)
            os.pwrite(cached, b"cached", turn * MIB + 4096)
            assert os.preadv(direct, [buffer], turn * MIB) == MIB
            assert buffer[4096:4102] == b"cached"
        assert os.preadv(direct, [buffer], 8 * MIB) == 0
    finally:
        os.close(direct)
        os.close(cached)


def append_lines(path: str, name: int, count: int) -> None:
    """What a logging process does."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in range(count):
        os.write(descriptor, b"%d %06d %s\n" % (name, number, b"x" * (number * 7 % 300)))
    os.close(descriptor)


def test_lines_of_concurrent_appenders_are_whole_and_all_there(place: Place) -> None:
    path = place.directory / "log"
    appenders = [
        multiprocessing.get_context("spawn").Process(target=append_lines, args=(str(path), name, 500))
        for name in range(4)
    ]
    for appender in appenders:
        appender.start()
    for appender in appenders:
        appender.join(120)
        assert appender.exitcode == 0

    def check() -> None:
        seen: dict[int, int] = {}
        for line in path.read_bytes().splitlines():
            name, number, filler = line.split(b" ")
            assert int(number) == seen.get(int(name), 0)  # Each appender's lines are in its order.
            assert len(filler) == int(number) * 7 % 300
            seen[int(name)] = int(number) + 1
        assert seen == dict.fromkeys(range(4), 500)

    check()
    place.remount()
    check()


def test_reads_and_writes_of_many_threads_on_one_file_do_not_mix(place: Place) -> None:
    """Each thread owns every fourth region of the file, and always reads what it wrote last."""
    path = place.directory / "regions"
    path.touch()
    region, count = 40_000, 120
    failures: list[str] = []

    def work(thread: int) -> None:
        rnd = random.Random(thread)
        last: dict[int, int] = {}
        descriptor = os.open(path, os.O_RDWR)
        for turn in range(300):
            number = rnd.randrange(count) * 4 + thread
            if number in last and rnd.random() < 0.5:
                if os.pread(descriptor, region, number * region) != pattern(last[number], region):
                    failures.append(f"region {number} in turn {turn}")
            else:
                last[number] = rnd.randrange(16)
                os.pwrite(descriptor, pattern(last[number], region), number * region)
            if turn % 100 == 99:
                os.fsync(descriptor)
        os.close(descriptor)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_record_locks_and_whole_file_locks_exclude_other_processes(place: Place) -> None:
    path = place.directory / "lock"
    path.write_bytes(bytes(100))
    script = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    for attempt in (
        lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0),
        lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 50),
        lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    ):
        try:
            attempt()
            print("got")
        except BlockingIOError:
            print("refused")
"""
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
        assert run(sys.executable, "-c", script, path).split() == ["refused", "got", "got"]
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 0)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(sys.executable, "-c", script, path).split() == ["got", "got", "refused"]


def test_a_sparse_file_of_a_tebibyte_takes_only_what_was_written(place: Place) -> None:
    path = place.directory / "sparse"
    places = {0: b"first", (5 << 30) + 3: b"beyond 4 GiB", (1 << 40) - 4: b"last"}
    with path.open("w+b") as file:
        for offset, data in places.items():
            os.pwrite(file.fileno(), data, offset)
        assert os.fstat(file.fileno()).st_size == 1 << 40
    place.remount()
    status = path.stat()
    assert status.st_size == 1 << 40
    assert status.st_blocks * 512 <= 3 * 4 * MIB
    with path.open("rb") as file:
        for offset, data in places.items():
            assert os.pread(file.fileno(), len(data), offset) == data
        assert os.pread(file.fileno(), MIB, 1 << 39) == bytes(MIB)
        assert os.pread(file.fileno(), MIB, 1 << 40) == b""
    os.truncate(path, (5 << 30) + 9)
    os.truncate(path, 6 << 30)
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 12, (5 << 30) + 3) == b"beyond" + bytes(6)


def test_names_may_be_any_bytes_but_slash_and_nul(place: Place) -> None:
    directory = os.fsencode(place.directory)
    names = [bytes([byte]) * 255 for byte in range(1, 256) if byte != ord("/")]
    names = [name for name in names if len(name) == 255]
    for name in names:
        os.close(os.open(os.path.join(directory, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    place.remount()
    assert sorted(os.listdir(directory)) == sorted(names)
    for name in names:
        os.unlink(os.path.join(directory, name))
    assert os.listdir(directory) == []


class Dirent(ctypes.Structure):
    """struct dirent of Linux on 64 bits."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


class DirectoryStream:
    """opendir, readdir, telldir, seekdir: Python has only whole listings."""

    def __init__(self, path: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.opendir.restype = ctypes.c_void_p
        self.libc.readdir.restype = ctypes.POINTER(Dirent)
        self.libc.telldir.restype = ctypes.c_long
        self.stream = ctypes.c_void_p(self.libc.opendir(os.fsencode(path)))

    def read(self) -> bytes | None:
        entry = self.libc.readdir(self.stream)
        return bytes(entry.contents.d_name) if entry else None

    def tell(self) -> int:
        return int(self.libc.telldir(self.stream))

    def seek(self, position: int) -> None:
        self.libc.seekdir(self.stream, ctypes.c_long(position))

    def close(self) -> None:
        self.libc.closedir(self.stream)


def test_a_listing_under_change_gives_every_lasting_entry_once(place: Place) -> None:
    """Entries come and go while the directory is read; those that stay are listed exactly once (POSIX readdir)."""
    lasting = {b"lasting-%04d" % number for number in range(2_000)}
    for name in lasting:
        (place.directory / os.fsdecode(name)).touch()
    for number in range(1_000):
        (place.directory / f"going-{number:04d}").touch()
    stream = DirectoryStream(place.directory)
    seen: list[bytes] = []
    turn = 0
    while (entry := stream.read()) is not None:
        seen.append(entry)
        if turn < 1_000:
            (place.directory / f"going-{turn:04d}").unlink()
            (place.directory / f"coming-{turn:04d}").touch()
        turn += 1
    stream.close()
    counted = [name for name in seen if name.startswith(b"lasting")]
    assert len(counted) == len(set(counted))
    assert set(counted) == lasting
    assert len(set(seen)) == len(seen)


def test_seekdir_returns_to_where_telldir_was(place: Place) -> None:
    for number in range(500):
        (place.directory / f"{number}").touch()
    stream = DirectoryStream(place.directory)
    positions, names = [], []
    while True:
        positions.append(stream.tell())
        name = stream.read()
        if name is None:
            break
        names.append(name)
    assert sorted(names) == sorted([b".", b"..", *(b"%d" % number for number in range(500))])
    for index in (400, 3, 250, 0, 501):
        stream.seek(positions[index])
        assert stream.read() == names[index]
    stream.close()


def refused(call: Callable[[], object]) -> str:
    """The name of the errno with which the call fails; "done" if it does not."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def test_bad_input_is_refused_as_a_local_file_system_does(place: Place, tmp_path: Path) -> None:
    def answers(directory: Path) -> dict[str, object]:
        file, folder = directory / "file", directory / "folder"
        file.write_bytes(b"0123456789")
        folder.mkdir()
        (directory / "loop").symlink_to("loop")
        descriptor = os.open(file, os.O_RDWR)
        reader = os.open(file, os.O_RDONLY)
        listing = os.open(folder, os.O_RDONLY)
        try:
            return {
                "name of 256 bytes": refused(lambda: (directory / ("n" * 256)).touch()),
                "lookup of 256 bytes": refused(lambda: (directory / ("n" * 256)).stat()),
                "target of 4096 bytes": refused(lambda: (directory / "s").symlink_to("t" * 4096)),
                "loop": refused(lambda: (directory / "loop").stat()),
                "read past the end": os.pread(descriptor, 100, 10) + os.pread(descriptor, 100, 1 << 40),
                "read at a negative offset": refused(lambda: os.pread(descriptor, 1, -1)),
                "write at the largest offset": refused(lambda: os.pwrite(descriptor, b"x", (1 << 63) - 1)),
                "truncate to a negative size": refused(lambda: os.truncate(file, -1)),
                "write with a reader's handle": refused(lambda: os.write(reader, b"x")),
                "truncate with a reader's handle": refused(lambda: os.ftruncate(reader, 1)),
                "open a directory to write": refused(lambda: os.open(folder, os.O_WRONLY)),
                "read a directory": refused(lambda: os.read(listing, 10)),
                "file as a directory": refused(lambda: (file / "x").stat()),
                "unknown namespace": refused(lambda: os.setxattr(file, "strange.name", b"x")),
                "no namespace": refused(lambda: os.setxattr(file, "name", b"x")),
                "value of 64 KiB and one": refused(lambda: os.setxattr(file, "user.a", b"x" * 65_537)),
                "name of 256": refused(lambda: os.setxattr(file, "user." + "x" * 251, b"x")),
                "empty name": refused(lambda: os.setxattr(file, "user.", b"x")),
                "absent attribute": refused(lambda: os.getxattr(file, "user.absent")),
                "create what exists": refused(lambda: os.setxattr(file, "user.a", b"1", os.XATTR_REPLACE)),
                "rename into itself": refused(lambda: os.rename(folder, folder / "x")),
                "rmdir of a file": refused(lambda: file.rmdir()),
                "unlink of a directory": refused(lambda: os.unlink(folder)),
                "link to a directory": refused(lambda: os.link(folder, directory / "hard")),
                "no parent": refused(lambda: (directory / "absent" / "x").mkdir()),
            }
        finally:
            for opened in (descriptor, reader, listing):
                os.close(opened)

    assert answers(place.directory) == answers(tmp_path)


def test_a_copy_with_copy_file_range_and_sendfile_is_the_original(place: Place) -> None:
    source = place.directory / "source"
    source.write_bytes(pattern(5, 9 * MIB + 17))
    for name in ("range", "send"):
        with source.open("rb") as reader, (place.directory / name).open("wb") as writer:
            left = 9 * MIB + 17
            while left:
                if name == "range":
                    left -= os.copy_file_range(reader.fileno(), writer.fileno(), left)
                else:
                    left -= os.sendfile(writer.fileno(), reader.fileno(), None, left)
        assert file_digest(place.directory / name) == file_digest(source)
