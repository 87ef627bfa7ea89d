"""Ranges of files on a mount, as programs ask for them: fallocate, lseek, copy_file_range, and appends of two mounts.

The tests that ask only for a `place` hold for ext4 too (FSD_TEST_DIRECTORY), sharing blocks aside.  pyfuse3 carries
none of these calls but appends: with it the tests of the others are skipped.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.e2e.test_mount_posix import as_nobody
from tests.support.cluster import FRONTEND, LocalCluster, wait_until

pytestmark = pytest.mark.mounted

MIB = 1 << 20
PAGE = 4096

carried = pytest.mark.skipif(
    FRONTEND == "pyfuse3" and "FSD_TEST_DIRECTORY" not in os.environ, reason="pyfuse3 does not carry these calls"
)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What the command prints; the test fails if it does."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks(path: Path) -> int:
    """Bytes that st_blocks tells."""
    return path.stat().st_blocks * 512


def allocated_is(place: Place, path: Path, size: int) -> bool:
    """Whether st_blocks tells so many bytes; ext4 counts the blocks in which it keeps its extents, too."""
    return size <= blocks(path) <= size + (0 if place.cluster else 2 * PAGE)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Every range that is data."""
    found: list[tuple[int, int]] = []
    at = 0
    with path.open("rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))


# --- fallocate --------------------------------------------------------------------------------------------------------


@carried
def test_fallocate_as_the_command_does_it(place: Place) -> None:
    """Sizes, st_blocks and bytes after each step, here and after the mount came again."""
    path = place.directory / "f"
    run("fallocate", "-l", str(4 * MIB), path)
    steps: list[tuple[list[str], int, int]] = [
        ([], 4 * MIB, 4 * MIB),
        (["-p", "-o", str(MIB), "-l", str(2 * MIB)], 4 * MIB, 2 * MIB),
        (["-z", "-o", str(2 * MIB), "-l", str(MIB)], 4 * MIB, 3 * MIB),
        (["-n", "-o", str(4 * MIB), "-l", str(MIB)], 4 * MIB, 4 * MIB),
        (["-o", str(6 * MIB), "-l", str(MIB)], 7 * MIB, 5 * MIB),
    ]
    for arguments, size, allocated in steps:
        if arguments:
            run("fallocate", *arguments, path)
        assert path.stat().st_size == size
        assert allocated_is(place, path, allocated), arguments
    place.remount()
    assert path.stat().st_size == 7 * MIB
    assert allocated_is(place, path, 5 * MIB)
    assert data_ranges(path) == []  # ext4 calls pages data that somebody has read.
    assert path.read_bytes() == bytes(7 * MIB)


@carried
@pytest.mark.parametrize("is_flushed", [False, True])
def test_holes_are_punched_and_ranges_zeroed_amid_bytes(place: Place, is_flushed: bool) -> None:
    path, expected = place.directory / "f", bytearray(content(8 * MIB))
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, expected)
    if is_flushed:
        os.fsync(fd)
    with mmap.mmap(fd, len(expected)) as mapped:
        assert mapped[MIB] == expected[MIB]
        for option, offset, length in (("-p", MIB, 3 * MIB), ("-z", 5 * MIB, MIB), ("-p", 7 * MIB + 100, 1000)):
            run("fallocate", option, "-o", str(offset), "-l", str(length), path)
            expected[offset : offset + length] = bytes(length)
            assert mapped[offset : offset + length] == bytes(length), "pages that are mapped"
        assert mapped[:] == expected
    os.close(fd)
    # The last hole is no whole block: ours gives back one sector of it, ext4 none.
    assert allocated_is(place, path, 5 * MIB - (512 if place.cluster else 0))
    assert path.read_bytes() == expected
    place.remount()
    assert path.read_bytes() == expected
    if place.cluster:
        holes = [(MIB, 4 * MIB), (5 * MIB, 6 * MIB), (7 * MIB + 100, 7 * MIB + 1100)]
        ends = [0, *(end for hole in holes for end in hole), 8 * MIB]
        assert data_ranges(path) == list(zip(ends[::2], ends[1::2], strict=True))


@carried
def test_a_small_file_is_allocated_and_punched_too(place: Place) -> None:
    path = place.directory / "f"
    path.write_bytes(b"x" * 9000)
    run("fallocate", "-p", "-o", "4096", "-l", "4096", path)
    assert path.read_bytes() == b"x" * 4096 + bytes(4096) + b"x" * 808
    run("fallocate", "-l", "12000", path)
    assert path.read_bytes() == b"x" * 4096 + bytes(4096) + b"x" * 808 + bytes(3000)
    run("fallocate", "-l", "100000", path)
    place.remount()
    assert path.read_bytes() == b"x" * 4096 + bytes(4096) + b"x" * 808 + bytes(91_000)


@carried
def test_what_there_is_no_room_for_is_not_allocated(place: Place) -> None:
    path = place.directory / "f"
    path.write_bytes(b"kept")
    room = os.statvfs(path)
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(OSError, match="No space left") as raised:
        os.posix_fallocate(fd, 0, room.f_bavail * room.f_frsize * 2)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="File too large"):
        os.posix_fallocate(fd, 1 << 62, 1 << 62)
    os.close(fd)
    if place.cluster:  # ext4 has taken what there was before it gave up.
        assert path.read_bytes() == b"kept"


@carried
def test_what_is_allocated_is_not_free_any_more(place: Place) -> None:
    before = os.statvfs(place.directory)
    run("fallocate", "-l", "2G", place.directory / "f")
    after = os.statvfs(place.directory)
    taken = before.f_bavail * before.f_frsize - after.f_bavail * after.f_frsize
    assert taken > 1 << 30, "others use the disk meanwhile, but hardly so much"


CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 10, 0, 0, 0)


CHANGES: dict[str, Callable[[Path, int, int], object]] = {
    "write": lambda path, fd, source: os.write(fd, b"y"),
    "truncate": lambda path, fd, source: os.truncate(path, 5),
    "fallocate": lambda path, fd, source: os.posix_fallocate(fd, 0, 10),
    "copy": lambda path, fd, source: os.copy_file_range(source, fd, 100_000),
    "open": lambda path, fd, source: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
}


@carried
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("is_root", [False, True])
def test_a_change_takes_suid_sgid_and_capabilities_at_once(place: Place, kind: str, is_root: bool) -> None:
    """stat and getxattr tell it before the file is closed; root keeps suid and sgid, nobody keeps capabilities."""
    path = place.directory / "f"
    place.directory.chmod(0o777)
    (place.directory / "source").write_bytes(b"s" * 100_000)
    path.write_bytes(b"x" * 100)
    path.chmod(0o6777)
    os.setxattr(path, "security.capability", CAPABILITY)

    def change() -> tuple[int, list[str]]:
        with path.open("r+b", buffering=0) as file, (place.directory / "source").open("rb") as source:
            CHANGES[kind](path, file.fileno(), source.fileno())
            return stat.S_IMODE(path.stat().st_mode), os.listxattr(path)

    wanted: tuple[int, list[str]] = (0o6777 if is_root else 0o777, [])
    told = repr(change()).encode() if is_root else as_nobody(change)
    assert told == repr(wanted).encode()
    assert (stat.S_IMODE(path.stat().st_mode), os.listxattr(path)) == wanted


# --- lseek ------------------------------------------------------------------------------------------------------------


@carried
def test_data_and_holes_before_and_after_a_flush(place: Place) -> None:
    path = place.directory / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    wanted = [(n * 64 * PAGE, (n * 64 + n + 1) * PAGE) for n in range(1, 30)]
    for start, end in wanted:
        os.pwrite(fd, b"x" * (end - start), start)
    os.ftruncate(fd, 1 << 30)
    if place.cluster:
        assert data_ranges(path) == wanted
    os.fsync(fd)
    assert data_ranges(path) == wanted
    assert os.lseek(fd, (1 << 30) - 1, os.SEEK_HOLE) == (1 << 30) - 1
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, 1 << 30, whence)
    os.close(fd)
    place.remount()
    assert data_ranges(path) == wanted


@carried
def test_programs_that_know_sparse_files_keep_them_sparse(place: Place) -> None:
    top = place.directory
    path = top / "sparse"
    with path.open("wb") as file:
        for n in range(8):
            file.seek(n * 100 * MIB)
            file.write(content(64 * 1024, n))
        file.truncate(1 << 30)
    assert allocated_is(place, path, 8 * 65_536)
    run("tar", "-S", "-cf", top / "t.tar", "sparse", cwd=top)
    assert (top / "t.tar").stat().st_size < MIB
    for name, command in {
        "extracted": "mkdir x && tar -xf t.tar -C x && mv x/sparse extracted",
        "always": "cp --sparse=always sparse always",
        "auto": "cp sparse auto",
        "rsynced": "rsync -S sparse rsynced",
    }.items():
        run("sh", "-c", command, cwd=top)
        run("cmp", path, top / name)
        assert blocks(top / name) <= 9 * 65_536, name
    assert int(run("du", "-k", path).split()[0]) in (512, 516)


# --- copy_file_range --------------------------------------------------------------------------------------------------


def used(cluster: LocalCluster) -> int:
    """Bytes of blocks on all servers."""
    return sum(int(server["block_bytes"]) for server in cluster.status()["servers"])


@carried
def test_clones_are_made_at_once_and_live_on_their_own(victim: LocalCluster) -> None:
    """Either side may be overwritten and removed; blocks go when the last file that has them has gone."""
    top = victim.mountpoint
    source, clone, other = top / "source", top / "clone", top / "other"
    expected = bytearray(content(96 * MIB))
    source.write_bytes(expected)
    run("cp", "--reflink=auto", source, clone)
    began = time.monotonic()
    run("cp", source, other)
    took_s = time.monotonic() - began
    assert took_s < 0.5, "milliseconds on a quiet machine; 96 MiB read and written take longer"
    run("cmp", source, clone)
    with source.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"source" * MIB)
    with clone.open("r+b") as file:
        file.seek(70 * MIB + 5)
        file.write(b"clone" * MIB)
    expected[70 * MIB + 5 : 75 * MIB + 5] = b"clone" * MIB
    victim.remount()
    assert clone.read_bytes() == expected
    source.unlink()
    other.unlink()
    wait_until(lambda: victim.status()["deletion_queue"] == 0, "the source's own blocks to go", 60)
    victim.remount()
    assert clone.read_bytes() == expected
    run("cp", clone, source)
    clone.unlink()
    assert source.read_bytes() == expected
    assert used(victim) > 2 * 96 * MIB
    source.unlink()
    wait_until(lambda: used(victim) == 0, "all blocks to go", 60)


@carried
def test_a_clone_of_ten_gib_takes_no_time(place: Place) -> None:
    """A sparse one here, so that the test is small; extents are what counts, and there are 160 of them."""
    source, clone = place.directory / "source", place.directory / "clone"
    with source.open("wb") as file:
        for n in range(160):
            file.seek(n * 64 * MIB)
            file.write(content(20_000, n))
        file.truncate(10 << 30)
    if not place.cluster:
        pytest.skip("ext4 copies")
    began = time.monotonic()
    fd, to = os.open(source, os.O_RDONLY), os.open(clone, os.O_WRONLY | os.O_CREAT)
    at = 0
    while done := os.copy_file_range(fd, to, 1 << 40):
        at += done
    os.close(fd)
    os.close(to)
    assert at == 10 << 30
    assert time.monotonic() - began < 1
    assert (clone.stat().st_size, blocks(clone)) == (10 << 30, blocks(source))
    assert data_ranges(clone) == data_ranges(source)


@carried
def test_copies_of_any_range_between_files_and_within_one(place: Place) -> None:
    """Whether blocks can be shared or the kernel has to copy: the bytes are right."""
    chance = random.Random(5)
    paths = [place.directory / name for name in "abc"]
    expected = {path: bytearray(content(size, size)) for path, size in zip(paths, (3 * MIB, 5_000, 0), strict=True)}
    fds = {}
    for path in paths:
        path.write_bytes(expected[path])
        fds[path] = os.open(path, os.O_RDWR)
    for _ in range(150):
        source, target = chance.choice(paths), chance.choice(paths)
        start, to = chance.randrange(3 * MIB), chance.randrange(3 * MIB)
        length = chance.choice([1, 100, 5_000, 100_000, MIB])
        if chance.random() < 0.3:
            start, to = start % 6_000, to % 6_000
        if source == target and abs(start - to) < length:
            continue
        done = os.copy_file_range(fds[source], fds[target], length, start, to)
        piece = expected[source][start : start + length]
        assert done == len(piece)
        if piece:
            bytes_ = expected[target]
            bytes_.extend(bytes(max(0, to + done - len(bytes_))))
            bytes_[to : to + done] = piece
        if chance.random() < 0.2:
            at = chance.randrange(2 * MIB)
            os.pwrite(fds[target], b"written", at)
            expected[target].extend(bytes(max(0, at + 7 - len(expected[target]))))
            expected[target][at : at + 7] = b"written"
    for path in paths:
        assert path.read_bytes() == expected[path]
        os.close(fds[path])
    place.remount()
    for path in paths:
        assert path.read_bytes() == expected[path]


# --- appends from two mounts ------------------------------------------------------------------------------------------

APPEND = """
import os, sys
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for n in range(count):
    record = f"{name} {n} {'.' * (n % 97)}\\n".encode()
    assert os.write(fd, record) == len(record)
os.close(fd)
"""


def append_by_programs(paths: dict[str, Path], count: int) -> None:
    """One program for each name, all at once."""
    programs = [
        subprocess.Popen([sys.executable, "-c", APPEND, path, name, str(count)]) for name, path in paths.items()
    ]
    assert [program.wait(1200) for program in programs] == [0] * len(programs)


def check_records(text: str, names: str, count: int) -> None:
    """All records of every name are there, whole and in its order, and nothing else is."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for line in text.splitlines(keepends=True):
        found[line[0]].append(line)
    for name, lines in found.items():
        assert lines == [f"{name} {n} {'.' * (n % 97)}\n" for n in range(count)]


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_two_mounts_append_without_loss_or_overlap(place: Place, count: int) -> None:
    with place.second_mount() as second:
        log, other = place.directory / "log", second / "log"
        append_by_programs({"a": log, "b": other, "c": other}, count)
        for path in (log, other):
            check_records(path.read_text(), "abc", count)


def test_an_append_handle_goes_on_while_other_mounts_come_and_go(place: Place) -> None:
    """What was written alone, while sharing, and alone again; by handles from before, and of the other mount."""
    log, expected = place.directory / "log", b""
    fd = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT)

    def append(to: int, record: bytes) -> None:
        nonlocal expected
        assert os.write(to, record) == len(record)
        expected += record

    append(fd, b"alone" * 5000)
    for turn in range(2):
        with place.second_mount() as second:
            other = os.open(second / "log", os.O_RDWR | os.O_APPEND)
            assert os.pread(other, 1 << 20, 0) == expected, "what was not flushed is flushed for the one that comes"
            for n in range(5):
                append(other, b"other %d %d," % (turn, n) * 100)
                append(fd, b"first %d %d," % (turn, n))
            assert os.pread(other, 1 << 20, 0) == expected
            os.close(other)
        append(
            fd, b"alone again %d" % turn * 1000
        )  # Whole pages, of which the kernel believes that they are elsewhere.
        append(fd, b"and again %d" % turn * 1000)
        wait_until(lambda: log.read_bytes() == expected, "the kernel to have dropped them", 5)
    os.close(fd)
    assert log.read_bytes() == expected
    place.remount()
    assert log.read_bytes() == expected


@carried
def test_pages_of_an_append_handle_stay_where_they_are_while_sharing(place: Place) -> None:
    path = place.directory / "f"
    path.write_bytes(b"x" * 3 * PAGE)
    with place.second_mount():
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
        with mmap.mmap(fd, 3 * PAGE) as mapped:
            mapped[PAGE : PAGE + 5] = b"pages"
            mapped.flush()
        os.write(fd, b"end")
        os.close(fd)
        assert path.read_bytes() == b"x" * PAGE + b"pages" + b"x" * (2 * PAGE - 5) + b"end"


# --- st_blocks --------------------------------------------------------------------------------------------------------


def test_bytes_that_are_not_flushed_count(place: Place) -> None:
    path = place.directory / "f"
    with path.open("wb", buffering=0) as file:
        file.seek(100 * MIB)
        for n in range(20):
            file.write(content(MIB, n))
        if place.cluster:
            assert blocks(path) == 20 * MIB, "some of it has left, some is in memory"
        os.fsync(file.fileno())
        assert blocks(path) == 20 * MIB
    assert path.stat().st_size == 120 * MIB
