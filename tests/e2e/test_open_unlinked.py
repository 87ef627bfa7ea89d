"""Files that one mount removes while another has them open: they stay for it, and go with the last one that closes."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from metadata.protocol import OPENS_PER_MESSAGE_MAX
from tests.e2e.places import Place
from tests.support.cluster import LocalCluster, wait_until
from tests.support.twin import pattern

pytestmark = pytest.mark.mounted

MIB = 1 << 20
LARGE_SIZE = 48 * MIB
RESTARTED_LEASE_S = 60.0
"""For a session whose daemon was killed to expire (20 s), on a busy machine."""


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


def read_all(descriptor: int) -> bytes:
    size, got = os.fstat(descriptor).st_size, b""
    while len(got) < size:
        piece = os.pread(descriptor, MIB, len(got))
        assert piece, f"{len(got)} of {size} bytes"
        got += piece
    return got


def unlink(path: Path) -> None:
    path.unlink()


def rename_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"the other one")
    other.rename(path)
    assert path.read_bytes() == b"the other one"


REMOVALS: tuple[Callable[[Path], None], ...] = (unlink, rename_over)
CONTENTS = {"empty": b"", "inline": b"small" * 100, "large": pattern(3, 5 * MIB)}
CASES = {f"{remove.__name__} {kind}": (remove, CONTENTS[kind]) for remove in REMOVALS for kind in CONTENTS}
"""All by one second mount: to come and to go takes it longer than what is tested."""


def test_a_file_opened_beside_another_mount_outlives_its_name(place: Place) -> None:
    with place.second_mount() as second:
        for name, (remove, content) in CASES.items():
            (second / name).write_bytes(content)
            with opened(place.directory / name) as descriptor:
                remove(second / name)
                assert os.fstat(descriptor).st_nlink == 0, name
                assert read_all(descriptor) == content, name
                assert b".fuse_hidden" not in b"".join(os.listdir(os.fsencode(place.directory)))


def test_a_file_opened_before_the_other_mount_came_outlives_its_name(place: Place) -> None:
    for name, (_, content) in CASES.items():
        (place.directory / name).write_bytes(content)
    place.remount()  # Their bytes are nowhere in this client's memory.
    with ExitStack() as stack:
        descriptors = {name: stack.enter_context(opened(place.directory / name)) for name in CASES}
        second = stack.enter_context(place.second_mount())
        for name, (remove, content) in CASES.items():
            remove(second / name)
            assert os.fstat(descriptors[name]).st_nlink == 0, name
            assert read_all(descriptors[name]) == content, name


def test_a_file_that_was_created_before_the_other_mount_came_outlives_its_name(place: Place) -> None:
    with opened(place.directory / "f", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"before")
        with place.second_mount() as second:
            (second / "f").unlink()
            os.write(descriptor, b" and after")
            os.fsync(descriptor)
            assert os.pread(descriptor, 100, 0) == b"before and after"
        assert os.pread(descriptor, 100, 0) == b"before and after"  # Alone again.
        assert os.fstat(descriptor).st_nlink == 0


def test_a_removed_file_is_written_and_grows_and_is_mapped(place: Place) -> None:
    with place.second_mount() as second:
        (place.directory / "f").write_bytes(b"x" * 100)
        with opened(place.directory / "f", os.O_RDWR) as descriptor:
            (second / "f").unlink()
            os.pwrite(descriptor, pattern(5, 3 * MIB), 100)
            os.fsync(descriptor)
            os.ftruncate(descriptor, 2 * MIB)
            os.fchmod(descriptor, 0o600)
            assert (os.fstat(descriptor).st_size, os.fstat(descriptor).st_nlink) == (2 * MIB, 0)
            with mmap.mmap(descriptor, 0) as mapped:
                mapped[0:5] = b"hello"
                mapped.flush()
                assert mapped[: 2 * MIB] == b"hello" + b"x" * 95 + pattern(5, 3 * MIB)[: 2 * MIB - 100]


def test_a_file_open_in_both_mounts_goes_with_the_last(place: Place) -> None:
    with place.second_mount() as second:
        (place.directory / "f").write_bytes(b"content")
        with opened(second / "f") as there, opened(place.directory / "f") as here:
            (place.directory / "f").unlink()
            os.close(here)
            assert read_all(there) == b"content"


def test_a_removed_file_is_opened_anew_through_proc(place: Place) -> None:
    with place.second_mount() as second:
        (place.directory / "f").write_bytes(b"content")
        with opened(place.directory / "f") as descriptor:
            (second / "f").unlink()
            again = Path(f"/proc/self/fd/{descriptor}")
            assert again.read_bytes() == b"content"
            with opened(again, os.O_RDWR) as writable:
                os.close(descriptor)
                os.write(writable, b"CONT")
                assert os.pread(writable, 100, 0) == b"CONTent"


def test_more_open_files_than_one_message_holds_outlive_their_names(place: Place) -> None:
    names = [f"f{number}" for number in range(OPENS_PER_MESSAGE_MAX + 100)]
    for name in names:
        (place.directory / name).write_bytes(name.encode())
    descriptors = [os.open(place.directory / name, os.O_RDONLY) for name in names]
    try:
        with place.second_mount() as second:
            for name in names[::10]:  # Some of every message.
                (second / name).unlink()
            for name, descriptor in zip(names, descriptors, strict=True):
                assert os.pread(descriptor, 100, 0) == name.encode()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# --- when things break ----------------------------------------------------------------------------------------------


@contextmanager
def second_mount(cluster: LocalCluster) -> Iterator[Path]:
    mountpoint = cluster.directory / "mnt2"
    mountpoint.mkdir(exist_ok=True)
    cluster.fsd("mount", cluster.address, mountpoint)
    try:
        yield mountpoint
    finally:
        cluster.fsd("umount", mountpoint)


def inode_count(cluster: LocalCluster) -> int:
    count = cluster.status()["inodes"]
    assert isinstance(count, int)
    return count


def blocks(cluster: LocalCluster) -> int:
    return sum(server["block_count"] for server in cluster.status()["servers"])


def test_the_space_is_freed_when_the_last_mount_closes(victim: LocalCluster) -> None:
    """A large file, read cold while it is removed; then its blocks go."""
    with second_mount(victim) as second:
        path = victim.mountpoint / "large"
        with path.open("wb") as file:
            for number in range(LARGE_SIZE // MIB):
                file.write(pattern(number % 16, MIB))
        before, inodes = blocks(victim), inode_count(victim)
        with opened(second / "large") as descriptor:
            assert os.pread(descriptor, MIB, 0) == pattern(0, MIB)
            path.unlink()
            for number in range(1, LARGE_SIZE // MIB):
                assert os.pread(descriptor, MIB, number * MIB) == pattern(number % 16, MIB)
            assert inode_count(victim) == inodes
        wait_until(lambda: inode_count(victim) == inodes - 1, "the inode is gone")
        wait_until(lambda: blocks(victim) < before, "its blocks are gone")


def test_a_restart_of_the_service_does_not_lose_who_has_what_open(victim: LocalCluster) -> None:
    """Removed before the restart, and after it, at once."""
    with second_mount(victim) as second:
        for name in ("early", "late"):
            (victim.mountpoint / name).write_bytes(name.encode() * 10_000)
        inodes = inode_count(victim)
        with opened(second / "early") as early, opened(second / "late") as late:
            (victim.mountpoint / "early").unlink()
            killed = victim.kill("metadata")
            (victim.mountpoint / "late").unlink()  # Waits for the service, and is its first request.
            victim.wait_back("metadata", killed)
            assert read_all(early) == b"early" * 10_000
            assert read_all(late) == b"late" * 10_000
            assert (os.fstat(early).st_nlink, os.fstat(late).st_nlink) == (0, 0)
        wait_until(lambda: inode_count(victim) == inodes - 2, "both inodes are gone")


def test_what_a_killed_daemon_had_open_goes_with_its_session(victim: LocalCluster) -> None:
    mountpoint = victim.directory / "mnt3"
    mountpoint.mkdir()
    victim.fsd("mount", victim.address, mountpoint)
    (victim.mountpoint / "f").write_bytes(b"content")
    inodes = inode_count(victim)
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(f.read(), flush=True); sys.stdin.read()",
         str(mountpoint / "f")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "content\n"
        (victim.mountpoint / "f").unlink()
        assert inode_count(victim) == inodes
        daemon = next(one.process for one in victim.records() if one.mountpoint == str(mountpoint))
        assert daemon.signal(signal.SIGKILL)
        wait_until(lambda: inode_count(victim) == inodes - 1, "the session has expired", RESTARTED_LEASE_S)
        reader.kill()
    victim.fsd("umount", mountpoint, "--lazy")
