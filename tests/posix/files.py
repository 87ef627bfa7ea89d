"""Open files: flags of open, positions, appending, holes, allocation, copies, mappings, direct I/O, limits."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator

from tests.posix import calls
from tests.posix.calls import descriptor
from tests.posix.table import Row, Table, error_name, wait_for_a_tick

opening = Table("opening")
bytes_ = Table("bytes")
allocation = Table("allocation")
memory = Table("memory")

MIB = 1 << 20


def told(call: object, *arguments: object) -> object:
    """What the call returns ("ok" for nothing), or the name of its errno."""
    assert callable(call)
    try:
        result = call(*arguments)
    except OSError as error:
        return error_name(error.errno or 0)
    return "ok" if result is None else result


@opening.rows
def flags_of_open() -> Iterator[Row]:
    yield Row("O_WRONLY of a directory", "dir x", "open x w", "EISDIR")
    yield Row("O_RDWR of a directory", "dir x", "open x rw", "EISDIR")
    yield Row("O_RDONLY of a directory", "dir x", "open x r", "ok")
    yield Row("O_CREAT of a directory that is there", "dir x", "open x r,creat", "EISDIR")
    yield Row("O_TRUNC of a directory", "dir x", "open x r,trunc", "EISDIR")
    yield Row("O_CREAT|O_EXCL of a directory", "dir x", "open x w,creat,excl", "EEXIST")
    yield Row("O_DIRECTORY of a file", "file x", "open x r,dir", "ENOTDIR")
    yield Row("O_DIRECTORY|O_CREAT", "", "open x r,dir,creat", "EINVAL", "x absent")
    yield Row("O_NOFOLLOW of a symlink", "file f;symlink f x", "open x r,nofollow", "ELOOP")
    yield Row("O_NOFOLLOW of a file", "file x", "open x r,nofollow", "ok")
    yield Row("O_NOFOLLOW with a symlink on the way", "dir d;file d/f;symlink d l", "open l/f r,nofollow", "ok")
    yield Row("O_NOFOLLOW|O_PATH of a symlink", "symlink f x", "open x path,nofollow", "ok")
    yield Row("O_CREAT|O_EXCL of a symlink to nothing", "symlink f x", "open x w,creat,excl", "EEXIST", "f absent")
    yield Row(
        "O_CREAT of a symlink to nothing makes its target",
        "symlink f x",
        "open x w,creat 0600",
        "ok",
        "f file mode=0600",
    )
    yield Row(
        "O_CREAT does not change what is there", "data x 5 0640", "open x rw,creat 0777", "ok", "x mode=0640 size=5 -mc"
    )
    yield Row(
        "O_CREAT|O_TRUNC of what is there",
        "data x 5 0640",
        "open x rw,creat,trunc 0777",
        "ok",
        "x mode=0640 size=0 +mc",
    )
    yield Row("O_WRONLY|O_NONBLOCK of a fifo nobody reads", "fifo x", "open x w,nonblock", "ENXIO")
    yield Row("O_RDONLY|O_NONBLOCK of a fifo", "fifo x", "open x r,nonblock", "ok")
    yield Row("of a socket", "socket x", "open x r", "ENXIO")
    yield Row("of a device that has no driver", "mknod x block;unlink x;fifo y", "open y r,nonblock", "ok")
    yield Row("of a device", "char x", "open x rw", "ok")
    yield Row(
        "O_CREAT with a mode that forbids it", "chmod . 0777", "open x rw,creat 0000", "ok", "x mode=0000", "alice"
    )
    yield Row(
        "and once more", "chmod . 0777;file x 0000 1001 1001", "open x rw,creat 0777", "EACCES", "x mode=0000", "alice"
    )
    yield Row("O_RDWR|O_WRONLY is neither", "file x", "open x wr", frozenset(["ok", "EINVAL"]))
    yield Row("O_SYNC", "", "open x w,creat,sync", "ok")
    yield Row("O_DSYNC|O_APPEND", "", "open x w,creat,dsync,append", "ok")
    yield Row("O_DIRECT", "file x", "open x rw,direct", "ok")
    for user in ("root", "alice"):
        yield Row(
            f"O_CREAT of a file in a directory that may not be written by {user}",
            "dir d 0555 1001 1001;file d/x 0666 1001 1001",
            "open d/x rw,creat",
            "ok",
            user=user,
        )


@opening.case("writing to a descriptor for reading", setup="data x 3", expect=["EBADF", "EBADF", b"ddd"])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as reading, descriptor("x", os.O_WRONLY) as writing:
        return [told(os.write, reading, b"x"), told(os.read, writing, 1), os.read(reading, 9)]


@opening.case("an O_PATH descriptor neither reads nor changes", setup="data x 3", expect=["EBADF"] * 5 + [3])
def _() -> object:
    with descriptor("x", os.O_PATH) as opened:
        tries = [told(os.read, opened, 1), told(os.write, opened, b"x"), told(os.fchmod, opened, 0o600)]
        tries += [told(os.ftruncate, opened, 0), told(os.fsync, opened)]
        return [*tries, os.fstat(opened).st_size]


@opening.case("an O_PATH descriptor of a file that was removed", setup="data x 3 0640", expect=(0, 3, 0o100640))
def _() -> object:
    with descriptor("x", os.O_PATH) as opened:
        os.unlink("x")
        found = os.fstat(opened)
        return found.st_nlink, found.st_size, found.st_mode


@opening.case("a removed file is whole as long as it is open", setup="", expect=[b"hello", 0, 1024, b"world", b"hello"])
def _() -> object:
    with descriptor("x", os.O_RDWR | os.O_CREAT) as opened:
        os.write(opened, b"hello")
        os.unlink("x")
        answers: list[object] = [os.pread(opened, 5, 0), os.fstat(opened).st_nlink]
        os.ftruncate(opened, 1024)
        answers.append(os.fstat(opened).st_size)
        with descriptor(f"/proc/self/fd/{opened}", os.O_RDWR) as again:
            os.pwrite(again, b"world", 1019)
            os.fsync(again)
        return [*answers, os.pread(opened, 5, 1019), os.pread(opened, 5, 0)]


@opening.case("the link count of a file that was removed before its first write", expect=[0, 0, 0, 0])
def _() -> object:
    with descriptor("x", os.O_RDWR | os.O_CREAT) as opened:
        os.unlink("x")
        counts = [os.fstat(opened).st_nlink]
        os.write(opened, b"bytes")
        counts.append(os.fstat(opened).st_nlink)
        os.pread(opened, 5, 0)
        counts.append(os.fstat(opened).st_nlink)
        os.fsync(opened)
        return [*counts, os.fstat(opened).st_nlink]


@opening.case("two files of one name after another are two", setup="", expect=[b"first", b"second"])
def _() -> object:
    with descriptor("x", os.O_RDWR | os.O_CREAT) as first:
        os.write(first, b"first")
        os.unlink("x")
        with descriptor("x", os.O_RDWR | os.O_CREAT) as second:
            os.write(second, b"second")
            return [os.pread(first, 9, 0), os.pread(second, 9, 0)]


@opening.case("fchmod, fchown, futimens of a removed file", setup="file x", expect=(0o100604, 5, 6, 7))
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.unlink("x")
        os.fchmod(opened, 0o604)
        os.fchown(opened, 5, 6)
        os.utime(opened, ns=(7, 7))
        found = os.fstat(opened)
        return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns


@opening.case("no names appear for removed files that are open", setup="file x;file y", expect=[])
def _() -> object:
    with descriptor("x", os.O_RDWR), descriptor("y", os.O_RDWR):
        os.unlink("x")
        os.unlink("y")
        return os.listdir()


@opening.case("O_TMPFILE", expect=[0, [], b"bytes", 1, "ENOENT"], needs=("tmpfile",))
def _() -> object:
    with descriptor(".", os.O_TMPFILE | os.O_RDWR, 0o600) as opened:
        os.write(opened, b"bytes")
        answers: list[object] = [os.fstat(opened).st_nlink, os.listdir()]
        calls.linkat(calls.AT_FDCWD, f"/proc/self/fd/{opened}".encode(), b"x", calls.AT_SYMLINK_FOLLOW)
        with open("x", "rb") as file:
            answers += [file.read(), os.fstat(opened).st_nlink]
    with descriptor(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600) as opened:
        path = f"/proc/self/fd/{opened}".encode()
        return [*answers, told(calls.linkat, calls.AT_FDCWD, path, b"y", calls.AT_SYMLINK_FOLLOW)]


@opening.case(
    "O_TMPFILE moves no time of the directory and has its group",
    setup="dir d;chown d 0 2001;chmod d 02755",
    expect=(True, 2001),
    needs=("tmpfile",),
)
def _() -> object:
    before = os.stat("d")
    with descriptor("d", os.O_TMPFILE | os.O_WRONLY, 0o600) as opened:
        return os.stat("d").st_ctime_ns == before.st_ctime_ns, os.fstat(opened).st_gid


@opening.case("O_TMPFILE must be for writing", expect="EINVAL", needs=("tmpfile",))
def _() -> None:
    os.open(".", os.O_TMPFILE | os.O_RDONLY)


@opening.case(
    "a program that runs cannot be written, a file that is written cannot be run",
    expect=["ETXTBSY", "ETXTBSY", "ETXTBSY", 0],
)
def _() -> object:
    program = os.path.realpath("/bin/sleep")
    with open(program, "rb") as source, open("x", "wb") as target:
        target.write(source.read())
    os.chmod("x", 0o755)
    answers: list[object] = []
    with descriptor("x", os.O_WRONLY):
        answers.append(told(subprocess.run, ["./x", "0"]))
    running = subprocess.Popen(["./x", "30"])
    try:
        answers += [told(os.open, "x", os.O_WRONLY), told(os.truncate, "x", 0)]
    finally:
        running.kill()
        running.wait()
    return [*answers, subprocess.run(["./x", "0"], check=False).returncode]


@opening.case("a script runs by its interpreter", expect=7)
def _() -> object:
    with open("x", "w") as file:
        file.write("#!/bin/sh\nexit 7\n")
    os.chmod("x", 0o755)
    return subprocess.run(["./x"], check=False).returncode


@opening.case("a program with suid runs as its owner", setup="chmod . 0755", expect=b"1002\n", user="root")
def _() -> object:
    with open(os.path.realpath("/usr/bin/id"), "rb") as source, open("x", "wb") as target:
        target.write(source.read())
    os.chown("x", 1002, 1002)
    os.chmod("x", 0o4755)
    return subprocess.run(["./x", "-u"], capture_output=True, check=False).stdout


@opening.case("a fifo carries bytes between processes", setup="fifo x", expect=b"through")
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.write(opened, b"through")
        return os.read(opened, 20)


@opening.case("a socket takes connections", expect=b"hello")
def _() -> object:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("x")
        server.listen()
        client.connect("x")
        accepted, _ = server.accept()
        with accepted:
            client.send(b"hello")
            return accepted.recv(9)


@opening.case("a name once more for a socket", setup="socket x", expect="EADDRINUSE")
def _() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("x")


@opening.case("a device is that device", expect=(os.makedev(1, 5), bytes(4)))
def _() -> object:
    os.mknod("x", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    with open("x", "rb") as file:
        return os.stat("x").st_rdev, file.read(4)


@opening.case("device numbers of 12 and 20 bits", expect=[(4095, 1048575), (0, 0), (300, 70000)])
def _() -> object:
    found = []
    for major, minor in ((4095, 1048575), (0, 0), (300, 70000)):
        os.mknod("x", stat.S_IFCHR | 0o600, os.makedev(major, minor))
        device = os.stat("x").st_rdev
        found.append((os.major(device), os.minor(device)))
        os.unlink("x")
    return found


@bytes_.case("each write of an O_APPEND descriptor goes to the end", setup="file x", expect=b"onetwothree")
def _() -> object:
    with descriptor("x", os.O_RDWR | os.O_APPEND) as one, descriptor("x", os.O_WRONLY | os.O_APPEND) as other:
        os.write(one, b"one")
        os.write(other, b"two")
        os.write(one, b"three")
        return os.pread(one, 20, 0)


@bytes_.case("pwrite to an O_APPEND descriptor appends, as Linux has it", setup="data x 3", expect=(b"dddab", 5))
def _() -> object:
    with descriptor("x", os.O_RDWR | os.O_APPEND) as opened:
        os.pwrite(opened, b"ab", 0)
        return os.pread(opened, 9, 0), os.fstat(opened).st_size


@bytes_.case("O_APPEND set afterwards by fcntl", setup="data x 3", expect=b"wddw")
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.write(opened, b"w")
        fcntl.fcntl(opened, fcntl.F_SETFL, os.O_APPEND)
        os.lseek(opened, 0, os.SEEK_SET)
        os.write(opened, b"w")
        return os.pread(opened, 9, 0)


@bytes_.case("processes that append lose nothing", setup="file x", expect=[400, 400, 400])
def _() -> object:
    program = (
        "import os,sys;d=os.open('x',1|os.O_APPEND);[os.write(d,sys.argv[1].encode()*64+b'\\n') for _ in range(400)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, letter]) for letter in "abc"]
    assert [one.wait() for one in running] == [0, 0, 0]
    with open("x") as file:
        lines = file.read().splitlines()
    return [lines.count(letter * 64) for letter in "abc"]


@bytes_.case("positions", setup="data x 10", expect=[3, 8, 25, "EINVAL", "EINVAL", 25, b"", "EINVAL"])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as opened:
        found: list[object] = [os.lseek(opened, 3, os.SEEK_SET), os.lseek(opened, 5, os.SEEK_CUR)]
        found += [os.lseek(opened, 15, os.SEEK_END), told(os.lseek, opened, -1, os.SEEK_SET)]
        found += [told(os.lseek, opened, -26, os.SEEK_CUR), os.lseek(opened, 0, os.SEEK_CUR), os.read(opened, 5)]
        return [*found, told(os.lseek, opened, 0, 99)]


@bytes_.case("two descriptors of one open share the position, two opens do not", setup="data x 10", expect=[4, 0])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as one, descriptor("x", os.O_RDONLY) as other:
        copy = os.dup(one)
        os.read(copy, 4)
        os.close(copy)
        return [os.lseek(one, 0, os.SEEK_CUR), os.lseek(other, 0, os.SEEK_CUR)]


@bytes_.case("reading at and beyond the end", setup="data x 10", expect=[b"d" * 3, b"", b"", "EINVAL"])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as opened:
        found: list[object] = [os.pread(opened, 99, offset) for offset in (7, 10, 1 << 40)]
        return [*found, told(os.pread, opened, 1, -1)]


@bytes_.case("vectors", setup="file x", expect=[9, [b"abcd", b"efghi"], b"abcdefghi"])
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        written = os.pwritev(opened, [b"abc", b"", b"defgh", b"i"], 0)
        parts = [bytearray(4), bytearray(5)]
        os.preadv(opened, parts, 0)
        return [written, [bytes(part) for part in parts], os.pread(opened, 99, 0)]


@bytes_.rows
def sizes_of_writes() -> Iterator[Row]:
    """Around the sizes at which something changes inside: pages, inline files, the kernel's requests, blocks."""

    def write(offset: int, size: int) -> object:
        payload = os.urandom(size)
        with descriptor("x", os.O_RDWR | os.O_CREAT) as opened:
            assert os.pwrite(opened, payload, offset) == size
            os.fsync(opened)
            assert os.pread(opened, size + 1, offset) == payload
        with descriptor("x", os.O_RDONLY) as opened:
            return os.pread(opened, size + 1, offset) == payload and os.fstat(opened).st_size == offset + size

    for offset in (0, 1, 4095, 16383, MIB - 1, 4 * MIB - 1, 64 * MIB - 5):
        for size in (1, 4096, 16384, 16385, MIB, MIB + 1):
            yield Row(f"{size} bytes at {offset}", call=lambda o=offset, s=size: write(o, s), expect=True)  # type: ignore[misc]


@bytes_.case("a hole reads as zeros", setup="file x", expect=True)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.pwrite(opened, b"end", 3 * MIB)
        return os.pread(opened, 4 * MIB, 0) == bytes(3 * MIB) + b"end"


@bytes_.case("what is written past EOF does not show what was cut there", setup="data x 8000", expect=True)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.ftruncate(opened, 100)
        os.pwrite(opened, b"end", 9000)
        return os.pread(opened, 9999, 0) == b"d" * 100 + bytes(8900) + b"end"


@bytes_.case("fsync, fdatasync, syncfs and sync_file_range answer", setup="data x 10;dir d", expect=["ok"] * 6)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, descriptor("d", os.O_RDONLY) as directory:
        return [
            told(os.fsync, opened),
            told(os.fdatasync, opened),
            told(calls.syncfs, opened),
            told(calls.sync_file_range, opened, 0, 5, 7),
            told(os.fsync, directory),
            told(os.fdatasync, directory),
        ]


@bytes_.case("the limit of a process stops its writes", setup="file x", expect=[100, "EFBIG", "EFBIG", 100, 1])
def _() -> object:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signals: list[int] = []
    before = signal.signal(signal.SIGXFSZ, lambda number, _frame: signals.append(number))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with descriptor("x", os.O_RDWR) as opened:
            found: list[object] = [os.write(opened, b"x" * 200), told(os.write, opened, b"x")]
            found.append(told(os.ftruncate, opened, 101))
            return [*found, os.fstat(opened).st_size, int(len(signals) >= 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@bytes_.case("beyond the largest offset", setup="file x", expect=["EINVAL", True, "EINVAL"])
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        found = [told(os.pwrite, opened, b"0123456789", (1 << 63) - 2)]
        last = told(os.pwrite, opened, b"x", (1 << 63) - 2), os.fstat(opened).st_size  # The largest size there can be.
        found.append(last in (("EFBIG", 0), (1, (1 << 63) - 1)))
        return [*found, told(os.pwrite, opened, b"x", -1)]


@bytes_.case("direct and buffered I/O see each other", setup="file x", expect=[True] * 4)
def _() -> object:
    block = mmap.mmap(-1, 8192)
    with descriptor("x", os.O_RDWR) as buffered, descriptor("x", os.O_RDWR | os.O_DIRECT) as direct:
        block[:] = b"a" * 8192
        os.writev(direct, [block])
        found = [os.pread(buffered, 8192, 0) == b"a" * 8192]
        os.pwrite(buffered, b"b" * 100, 4000)
        os.preadv(direct, [block], 0)
        found.append(block[3999:4101] == b"a" + b"b" * 100 + b"a")
        block[:] = b"c" * 8192
        os.pwritev(direct, [block], 4096)
        found.append(os.pread(buffered, 99999, 4090) == b"b" * 6 + b"c" * 8192)
        return [*found, os.fstat(buffered).st_size == 4096 + 8192]


@allocation.case(
    "data and holes are told apart",
    setup="file x",
    expect=[0, 4 * MIB, True, True, "ENXIO", "ENXIO"],
    needs=("seek-hole",),
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.pwrite(opened, b"x" * MIB, 4 * MIB)
        os.ftruncate(opened, 9 * MIB)
        os.fsync(opened)
        hole_end = os.lseek(opened, 4 * MIB, os.SEEK_HOLE)
        return [
            os.lseek(opened, 0, os.SEEK_HOLE),
            os.lseek(opened, 0, os.SEEK_DATA),
            5 * MIB <= hole_end <= 5 * MIB + 65536,
            os.lseek(opened, 6 * MIB, os.SEEK_HOLE) == 6 * MIB,
            told(os.lseek, opened, 6 * MIB, os.SEEK_DATA),
            told(os.lseek, opened, 9 * MIB, os.SEEK_HOLE),
        ]


@allocation.case(
    "bytes that are not written back yet are data", setup="file x", expect=[True, 4 * MIB + 10], needs=("seek-hole",)
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.pwrite(opened, b"x" * 10, 4 * MIB)
        return [os.lseek(opened, 0, os.SEEK_DATA) > 4 * MIB - 65536, os.lseek(opened, 4 * MIB, os.SEEK_HOLE)]


@allocation.case(
    "SEEK_DATA and SEEK_HOLE of a full and of an empty file",
    setup="data x 5000;file y",
    expect=[0, 5000, 3, 5000, "ENXIO", "ENXIO"],
)
def _() -> object:
    with descriptor("x", os.O_RDONLY) as full, descriptor("y", os.O_RDONLY) as empty:
        found: list[object] = [os.lseek(full, 0, os.SEEK_DATA), os.lseek(full, 0, os.SEEK_HOLE)]
        found += [os.lseek(full, 3, os.SEEK_DATA), os.lseek(full, 3, os.SEEK_HOLE)]
        return [*found, told(os.lseek, empty, 0, os.SEEK_DATA), told(os.lseek, empty, 0, os.SEEK_HOLE)]


@allocation.case(
    "posix_fallocate extends, and keeps what is there", setup="data x 5", expect=[20000, b"ddddd\0\0", 20000, 20000]
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.posix_fallocate(opened, 0, 20000)
        found: list[object] = [os.fstat(opened).st_size, os.pread(opened, 7, 0)]
        os.posix_fallocate(opened, 0, 10000)
        found.append(os.fstat(opened).st_size)
        os.posix_fallocate(opened, 15000, 5000)
        return [*found, os.fstat(opened).st_size]


@allocation.case(
    "posix_fallocate that is refused",
    setup="file x;fifo f;dir d",
    expect=["EINVAL", "EINVAL", "EBADF", "ESPIPE", "EBADF", 0],
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, descriptor("x", os.O_RDONLY) as reading:
        found = [told(os.posix_fallocate, opened, 0, 0), told(os.posix_fallocate, opened, -1, 5)]
        found.append(told(os.posix_fallocate, reading, 0, 5))
        with descriptor("f", os.O_RDWR) as fifo, descriptor("d", os.O_RDONLY) as directory:
            found += [told(os.posix_fallocate, fifo, 0, 5), told(os.posix_fallocate, directory, 0, 5)]
        return [*found, os.fstat(opened).st_size]


@allocation.case(
    "fallocate with KEEP_SIZE takes room and no size", setup="file x", expect=[0, True, b""], needs=("fallocate",)
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        calls.fallocate(opened, calls.FALLOC_KEEP_SIZE, 0, MIB)
        found = os.fstat(opened)
        return [found.st_size, found.st_blocks * 512 >= MIB, os.pread(opened, 5, 0)]


@allocation.case(
    "fallocate counts in st_blocks and reads zeros", setup="file x", expect=[MIB, True, True], needs=("fallocate",)
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        calls.fallocate(opened, 0, 0, MIB)
        found = os.fstat(opened)
        return [found.st_size, found.st_blocks * 512 >= MIB, os.pread(opened, MIB, 0) == bytes(MIB)]


@allocation.case(
    "a hole is punched", setup="file x", expect=[True, 4 * MIB, True, 1 << 20], needs=("punch-hole", "seek-hole")
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.pwrite(opened, b"x" * 4 * MIB, 0)
        os.fsync(opened)
        before = os.fstat(opened).st_blocks
        calls.fallocate(opened, calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, MIB, 2 * MIB)
        right = os.pread(opened, 4 * MIB, 0) == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB
        found = os.fstat(opened)
        freed = (before - found.st_blocks) * 512 == 2 * MIB
        return [right, found.st_size, freed, os.lseek(opened, 0, os.SEEK_HOLE)]


@allocation.case(
    "punching within a page, over the end, and without KEEP_SIZE",
    setup="data x 5000",
    expect=[True, 5000, "EOPNOTSUPP"],
    needs=("punch-hole",),
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        punch = calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE
        calls.fallocate(opened, punch, 100, 50)
        calls.fallocate(opened, punch, 4900, 10000)
        right = os.pread(opened, 9999, 0) == b"d" * 100 + bytes(50) + b"d" * 4750 + bytes(100)
        return [right, os.fstat(opened).st_size, told(calls.fallocate, opened, calls.FALLOC_PUNCH_HOLE, 0, 10)]


@allocation.case("a range is zeroed", setup="data x 5000", expect=[True, 5000, True, 9000], needs=("zero-range",))
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        calls.fallocate(opened, calls.FALLOC_ZERO_RANGE, 1000, 3000)
        found: list[object] = [
            os.pread(opened, 5000, 0) == b"d" * 1000 + bytes(3000) + b"d" * 1000,
            os.fstat(opened).st_size,
        ]
        calls.fallocate(opened, calls.FALLOC_ZERO_RANGE | calls.FALLOC_KEEP_SIZE, 4500, 9000)
        found.append(os.fstat(opened).st_size == 5000)
        calls.fallocate(opened, calls.FALLOC_ZERO_RANGE, 4500, 4500)
        return [*found, os.fstat(opened).st_size]


@allocation.case(
    "fallocate refuses what makes no sense",
    setup="data x 5",
    expect=["EINVAL", "EINVAL", "EINVAL", "EFBIG", "EOPNOTSUPP", "EBADF", 5],
    needs=("fallocate",),
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, descriptor("x", os.O_RDONLY) as reading:
        found = [told(calls.fallocate, opened, 0, 0, 0), told(calls.fallocate, opened, 0, -1, 5)]
        found += [told(calls.fallocate, opened, 0, 0, -5), told(calls.fallocate, opened, 0, (1 << 63) - 5, 10)]
        found += [told(calls.fallocate, opened, 0x1000, 0, 5), told(calls.fallocate, reading, 0, 0, 5)]
        return [*found, os.fstat(opened).st_size]


@allocation.case(
    "fallocate clears suid as a write does",
    setup="data x 5 06777 1002 1002",
    expect="0o100777",
    user="alice",
    needs=("fallocate",),
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        calls.fallocate(opened, 0, 0, 100)
        return oct(os.fstat(opened).st_mode)


@allocation.case(
    "fallocate, punching and zeroing move mtime and ctime",
    setup="data x 5000",
    expect=[True] * 3,
    needs=("fallocate", "punch-hole", "zero-range"),
)
def _() -> object:
    moved = []
    with descriptor("x", os.O_RDWR) as opened:
        for mode in (0, calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, calls.FALLOC_ZERO_RANGE):
            before = os.fstat(opened)
            wait_for_a_tick()
            calls.fallocate(opened, mode, 100, 6000)
            after = os.fstat(opened)
            moved.append(after.st_mtime_ns > before.st_mtime_ns and after.st_ctime_ns > before.st_ctime_ns)
    return moved


@allocation.case("fallocate keeps to the limit of the process", setup="file x", expect="EFBIG", needs=("fallocate",))
def _() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with descriptor("x", os.O_RDWR) as opened:
            calls.fallocate(opened, 0, 0, 101)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@allocation.case("copy_file_range", setup="data x 10000;file y", expect=[6000, b"d" * 6000, 0, 4000, 10000])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as source, descriptor("y", os.O_RDWR) as target:
        found: list[object] = [os.copy_file_range(source, target, 6000, 0, 0), os.pread(target, 9999, 0)]
        found.append(os.copy_file_range(source, target, 100, 10000, 0))  # From the end: nothing.
        found.append(os.copy_file_range(source, target, 99999, 6000, 6000))
        return [*found, os.fstat(target).st_size]


@allocation.case("copy_file_range moves positions as read and write", setup="data x 100;file y", expect=[50, 50, 50])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as source, descriptor("y", os.O_RDWR) as target:
        copied = os.copy_file_range(source, target, 50)
        return [copied, os.lseek(source, 0, os.SEEK_CUR), os.lseek(target, 0, os.SEEK_CUR)]


@allocation.case(
    "copy_file_range that is refused",
    setup="data x 100;file y;dir d;fifo f",
    expect=["EINVAL", "EBADF", "EBADF", "EISDIR", "EINVAL", b""],
)
def _() -> object:
    copy = os.copy_file_range
    with (
        descriptor("x", os.O_RDWR) as source,
        descriptor("y", os.O_WRONLY) as target,
        descriptor("y", os.O_RDONLY) as reading,
    ):
        found = [told(copy, source, source, 50, 0, 25), told(copy, source, reading, 50, 0, 0)]
        found.append(told(copy, target, source, 50, 0, 0))
        with descriptor("d", os.O_RDONLY) as directory, descriptor("f", os.O_RDWR) as fifo:
            found += [told(copy, directory, target, 5, 0, 0), told(copy, source, fifo, 5)]
        return [*found, os.pread(reading, 5, 0)]


@allocation.case("copy_file_range within a file, and of bytes just written", setup="file x", expect=b"abcabc")
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.write(opened, b"abc")
        os.copy_file_range(opened, opened, 3, 0, 3)
        return os.pread(opened, 9, 0)


@allocation.case("a copy stays as it is when its source is changed", setup="file x;file y", expect=True)
def _() -> object:
    with descriptor("x", os.O_RDWR) as source, descriptor("y", os.O_RDWR) as target:
        os.write(source, b"s" * 2 * MIB)
        done = 0
        while done < 2 * MIB:
            done += os.copy_file_range(source, target, 2 * MIB - done, done, done)
        os.pwrite(source, b"new", 1000)
        os.ftruncate(source, 5000)
        return os.pread(target, 3 * MIB, 0) == b"s" * 2 * MIB


@allocation.case("copy_file_range to an O_APPEND descriptor", setup="data x 5;file y", expect="EBADF")
def _() -> object:
    with descriptor("x", os.O_RDWR) as source, descriptor("y", os.O_WRONLY | os.O_APPEND) as target:
        return os.copy_file_range(source, target, 5, 0, 0)


@allocation.case("sendfile and splice", setup="data x 70000;file y", expect=[70000, True])
def _() -> object:
    with descriptor("x", os.O_RDONLY) as source, descriptor("y", os.O_RDWR) as target:
        done = 0
        while done < 70000:
            done += os.sendfile(target, source, done, 70000 - done)
        return [done, os.pread(target, 99999, 0) == b"d" * 70000]


@memory.case("a shared mapping is written through to read", setup="data x 9000", expect=(b"mapped", b"mapped"))
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 9000) as mapped:
        mapped[5000:5006] = b"mapped"
        first = os.pread(opened, 6, 5000)
        mapped.flush()
    with open("x", "rb") as file:
        return first, file.read()[5000:5006]


@memory.case("write is seen by a shared mapping", setup="data x 9000", expect=b"written")
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 9000) as mapped:
        assert mapped[5000:5001] == b"d"
        os.pwrite(opened, b"written", 5000)
        return mapped[5000:5007]


@memory.case("a private mapping writes for itself alone", setup="data x 9000", expect=(b"mine", b"dddd"))
def _() -> object:
    both = mmap.PROT_READ | mmap.PROT_WRITE
    with descriptor("x", os.O_RDONLY) as opened, mmap.mmap(opened, 9000, mmap.MAP_PRIVATE, both) as mapped:
        mapped[10:14] = b"mine"
        return mapped[10:14], os.pread(opened, 4, 10)


@memory.case(
    "beyond the end of the file the last page is zeros, and does not grow the file",
    setup="data x 4096",
    expect=[True, 100, 100],
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 4096) as mapped:
        os.ftruncate(opened, 100)
        found: list[object] = [mapped[:] == b"d" * 100 + bytes(3996), os.fstat(opened).st_size]
        mapped[200:203] = b"xyz"
        mapped.flush()
        return [*found, os.fstat(opened).st_size]


@memory.case(
    "what a mapping wrote beyond the end does not appear when the file grows", setup="data x 4096", expect=True
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 4096) as mapped:
        os.ftruncate(opened, 100)
        mapped[200:203] = b"xyz"
        mapped.flush()
        os.pwrite(opened, b"end", 5000)
        return os.pread(opened, 9999, 0) == b"d" * 100 + bytes(4900) + b"end"


@memory.case(
    "after a truncation the bytes of a mapping beneath it are gone",
    setup="data x 9000",
    expect=(b"d", bytes(1), bytes(1)),
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 9000) as mapped:
        os.ftruncate(opened, 4200)
        kept, cut = mapped[4100:4101], mapped[4300:4301]
        os.ftruncate(opened, 9000)
        return kept, cut, mapped[8200:8201]


SIGBUS_PROGRAM = """
import mmap, os, sys
opened = os.open("x", os.O_RDWR)
mapped = mmap.mmap(opened, 3 * 4096)
mapped[8192]
os.ftruncate(opened, 4096)
mapped[100]
mapped[8192]
"""


@memory.case("touching a mapping beyond the end of the file is SIGBUS", setup="data x 12288", expect=-signal.SIGBUS)
def _() -> object:
    return subprocess.run([sys.executable, "-c", SIGBUS_PROGRAM], check=False, stderr=subprocess.DEVNULL).returncode


@memory.case("a mapping outlives its descriptor and its name", setup="data x 5000", expect=(b"later", b"d"))
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        mapped = mmap.mmap(opened, 5000)
    os.unlink("x")
    with mapped:
        mapped[10:15] = b"later"
        mapped.flush()
        return mapped[10:15], mapped[4999:5000]


@memory.case(
    "bytes written by a mapping are there after it was unmapped and the file opened anew", setup="file x", expect=True
)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.ftruncate(opened, 3 * MIB)
        with mmap.mmap(opened, 3 * MIB) as mapped:
            for offset in range(0, 3 * MIB, 65536):
                mapped[offset : offset + 3] = b"map"
    with open("x", "rb") as file:
        found = file.read()
    return all(found[offset : offset + 4] == b"map\0" for offset in range(0, 3 * MIB, 65536))


@memory.case("a mapping moves mtime at the latest with msync", setup="data x 5000;utimens x 1 2", expect=True)
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened, mmap.mmap(opened, 5000) as mapped:
        mapped[0:1] = b"m"
        mapped.flush()
        os.fsync(opened)
        return os.fstat(opened).st_mtime_ns > 2_000_000_000


@memory.case(
    "a mapping for writing needs a descriptor for both", setup="data x 10", expect=["EACCES", "EACCES", "ENODEV"]
)
def _() -> object:
    write = mmap.PROT_READ | mmap.PROT_WRITE
    with (
        descriptor("x", os.O_RDONLY) as reading,
        descriptor("x", os.O_WRONLY) as writing,
        descriptor(".", os.O_RDONLY) as d,
    ):
        found = [
            told(mmap.mmap, reading, 10, mmap.MAP_SHARED, write),
            told(mmap.mmap, writing, 10, mmap.MAP_SHARED, mmap.PROT_READ),
        ]
        with contextlib.suppress(ValueError):
            found.append(told(mmap.mmap, d, 10, mmap.MAP_SHARED, mmap.PROT_READ))
        return found


@memory.case("two mappings of one file are one", setup="data x 5000", expect=b"both")
def _() -> object:
    with (
        descriptor("x", os.O_RDWR) as one,
        descriptor("x", os.O_RDWR) as other,
        mmap.mmap(one, 5000) as first,
        mmap.mmap(other, 5000) as second,
    ):
        first[100:104] = b"both"
        return second[100:104]


@memory.case("a mapping and direct I/O", setup="data x 8192", expect=(b"map", b"dir"))
def _() -> object:
    block = mmap.mmap(-1, 4096)
    with (
        descriptor("x", os.O_RDWR) as opened,
        descriptor("x", os.O_RDWR | os.O_DIRECT) as direct,
        mmap.mmap(opened, 8192) as mapped,
    ):
        mapped[0:3] = b"map"
        os.preadv(direct, [block], 0)
        seen = block[0:3]
        block[0:3] = b"dir"
        os.pwritev(direct, [block], 4096)
        return seen, mapped[4096:4099]
