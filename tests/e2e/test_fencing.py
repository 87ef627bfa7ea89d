"""Mounts that lose their session: stopped for longer than their lease, evicted, their service killed under them.

The lease is 3 s here.  Two mounts of one cluster; the first is stopped (SIGSTOP of its daemon) while the second changes
what the first believes in.

While a daemon stands still nothing is forked here: the child would close its copies of our descriptors, and wait for
the daemon to flush them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from metadata.protocol import ListSessions
from mount.inquiry import ask
from mount.sessions import as_report
from mount.target import parse_target
from tests.support.cluster import LocalCluster, new_cluster, wait_until
from tests.support.daemon_process import daemon
from tests.support.twin import pattern

pytestmark = pytest.mark.mounted

LEASE_S = 3.0
LARGE = pattern(5, 5 << 20)


class Two:
    """A cluster with two mounts."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.first = cluster.mountpoint
        self.second = cluster.directory / "mnt2"
        self.second.mkdir()
        self.address = parse_target(cluster.address).address

    def mount_second(self) -> None:
        self.cluster.fsd("mount", self.cluster.address, self.second, "--data", self.cluster.data)

    def sessions(self) -> dict[str, Any]:
        """As `fsd sessions --json`, without another process."""
        return as_report(trio.run(partial(ask, self.address, ListSessions(), timeout_s=10.0)), self.address)

    def session_of(self, mountpoint: Path) -> int:
        """The number of its live session; 0: it has none."""
        found = [one["session"] for one in self.sessions()["sessions"] if one["mountpoint"] == str(mountpoint)]
        return int(found[0]) if found else 0

    @contextmanager
    def stopped(self, mountpoint: Path | None = None, signal_: Callable[[int], object] | None = None) -> Iterator[None]:
        """Its daemon stands still, and its session is over, while the block runs; afterwards it has a new session."""
        mountpoint = mountpoint or self.first
        tell = signal_ or (lambda number: self.cluster.process("mount").signal(signal.Signals(number)))
        before = self.session_of(mountpoint)
        assert before
        tell(signal.SIGSTOP)
        try:
            wait_until(lambda: not self.session_of(mountpoint), "its session has ended", 6 * LEASE_S)
            yield
        finally:
            tell(signal.SIGCONT)
        wait_until(lambda: self.session_of(mountpoint) not in (0, before), "it has a new session")


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    with new_cluster() as cluster:
        cluster.up("--lease-s", str(LEASE_S))
        made = Two(cluster)
        made.mount_second()
        yield made
        cluster.fsd("umount", made.second)
        cluster.down()


@contextmanager
def opened(*paths: Path, flags: int = os.O_RDWR) -> Iterator[list[int]]:
    descriptors = [os.open(path, flags) for path in paths]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)


def error_of(call: Callable[..., object], *arguments: object) -> int:
    """The errno that the call fails with; 0: it succeeds."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def put(path: Path, content: bytes, flags: int = os.O_TRUNC) -> None:
    """Write and make durable."""
    with opened(path, flags=os.O_WRONLY | os.O_CREAT | flags) as (descriptor,):
        assert os.write(descriptor, content) == len(content)
        os.fsync(descriptor)


# --- stopped for longer than the lease --------------------------------------------------------------------------------


def test_after_it_stood_still_a_mount_shows_nothing_that_is_out_of_date(two: Two) -> None:
    place, there = two.first / "stale", two.second / "stale"
    place.mkdir()
    put(place / "changed", b"before")
    put(place / "removed", b"x")
    put(place / "renamed", b"y")
    with opened(place / "changed", place / "removed", flags=os.O_RDONLY) as (changed, removed):
        for descriptor in (changed, removed):
            os.pread(descriptor, 100, 0)
        assert not (place / "new").exists()
        with two.stopped():
            put(there / "changed", b"after it was stopped")
            (there / "removed").unlink()
            (there / "renamed").rename(there / "new name")
            put(there / "new", b"")
        assert os.pread(changed, 100, 0) == b"after it was stopped"
        assert os.fstat(changed).st_size == 20
        assert (place / "changed").read_bytes() == b"after it was stopped"
        assert sorted(os.listdir(place)) == ["changed", "new", "new name"]
        assert (place / "new").exists()
        assert not (place / "renamed").exists()
        assert not (place / "removed").exists()
        assert error_of(os.pread, removed, 1, 0) == errno.ESTALE
        assert error_of(os.fstat, removed) == errno.ESTALE


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
def test_what_was_not_flushed_is_not_lost_when_nobody_changed_the_file(two: Two, content: bytes) -> None:
    path = two.first / f"kept-{len(content)}"
    put(path, b"")
    with opened(path, path) as (written, other):
        os.write(written, content)
        with two.stopped():
            put(two.second / "something else", b"z")
        assert os.pread(other, len(content), 0) == content
        assert error_of(os.fsync, written) == 0
        assert error_of(os.fsync, other) == 0
        assert error_of(os.close, written) == 0
    assert (two.second / path.name).read_bytes() == content


def lose_a_write(
    two: Two, content: bytes, mountpoint: Path, signal_: Callable[[int], object] | None = None
) -> tuple[list[int], bytes]:
    """Writes that are not flushed on one mount, which stops; the other changes the file.

    Returns: what fsync, fsync again, fsync of another descriptor and close of a third say; what the file is then.
    """
    path, there = mountpoint / f"lost-{len(content)}", two.second / f"lost-{len(content)}"
    put(path, b"before")
    with opened(path, path, path) as (first, second, third):
        os.write(first, content)
        with two.stopped(mountpoint, signal_):
            put(there, b"theirs")
        told = [
            error_of(os.fsync, first),
            error_of(os.fsync, first),
            error_of(os.fsync, second),
            error_of(os.close, third),
        ]
        assert os.pread(first, 100, 0) == path.read_bytes()
    assert path.read_bytes() == there.read_bytes()
    return told, there.read_bytes()


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
def test_what_was_not_flushed_and_changed_by_others_is_told_lost_once_for_each_descriptor(
    two: Two, content: bytes
) -> None:
    told, left = lose_a_write(two, content, two.first)
    assert told == [errno.EIO, 0, errno.EIO, errno.EIO]
    assert left == b"theirs"
    assert "writes_lost" in two.cluster.log_text("mount")


def test_a_late_commit_that_is_accepted_is_caught(two: Two) -> None:
    """Planted: the mount forgets that what it has was written in a session that is over."""
    extra = "import fsd.flush\nfsd.flush.WriteBack.session_lost = lambda self: None\n"
    with daemon(two.cluster, extra) as (process, mountpoint):
        told, left = lose_a_write(two, b"from a session that is over", mountpoint, process.send_signal)
        assert told == [0, 0, 0, 0], "nobody was told"
        assert left == b"from a session that is over"
        os.kill(process.pid, signal.SIGTERM)


APPENDER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
os.write(descriptor, b"not flushed\\n")
print("written", flush=True)
sys.stdin.readline()
for turn in range(2):
    try:
        os.fsync(descriptor)
        print(0, flush=True)
    except OSError as error:
        print(error.errno, flush=True)
os.write(descriptor, b"ours again\\n")
os.fsync(descriptor)
os.close(descriptor)
"""


def test_what_was_appended_while_alone_overwrites_nothing_that_others_appended(two: Two) -> None:
    two.cluster.fsd("umount", two.second)
    wait_until(lambda: [one["state"] for one in two.sessions()["sessions"]] == ["alone"], "the first is alone")
    path = two.first / "log"
    put(path, b"first\n")
    command = [sys.executable, "-c", APPENDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as appender:
        assert appender.stdin is not None
        assert appender.stdout is not None
        assert appender.stdout.readline() == "written\n"
        two.cluster.process("mount").signal(signal.SIGSTOP)
        try:
            two.mount_second()  # Let in when the lease of the first is over.
            put(two.second / "log", b"theirs\n", os.O_APPEND)
        finally:
            two.cluster.process("mount").signal(signal.SIGCONT)
        appender.stdin.write("go on\n")
        appender.stdin.flush()
        told, _ = appender.communicate(timeout=60)
        assert told.split() == [str(errno.EIO), "0"]
        assert appender.returncode == 0
    assert (two.second / "log").read_bytes() == b"first\ntheirs\nours again\n"
    assert path.read_bytes() == b"first\ntheirs\nours again\n"


@pytest.mark.parametrize("flock", [False, True], ids=["fcntl", "flock"])
def test_who_has_lost_a_lock_is_told_and_can_lock_again(two: Two, flock: bool) -> None:
    lock: Callable[[int, int], None] = fcntl.flock if flock else fcntl.lockf
    path = two.first / f"locked-{flock}"
    put(path, b"content")
    with opened(path) as (held,), opened(two.second / path.name) as (there,):
        lock(held, fcntl.LOCK_EX)
        with two.stopped():
            lock(there, fcntl.LOCK_EX)
        assert error_of(os.pread, held, 1, 0) == errno.EIO
        assert error_of(os.pwrite, held, b"x", 0) == errno.EIO
        assert error_of(lock, held, fcntl.LOCK_EX | fcntl.LOCK_NB) in (errno.EAGAIN, errno.EACCES)
        os.pwrite(there, b"theirs!", 0)
        lock(there, fcntl.LOCK_UN)
        lock(held, fcntl.LOCK_EX)
        assert os.pread(held, 100, 0) == b"theirs!"
        os.pwrite(held, b"ours", 0)
        lock(held, fcntl.LOCK_UN)
        assert os.pread(there, 100, 0) == b"oursrs!"


def test_a_read_that_waits_for_the_new_session_is_answered(two: Two) -> None:
    """Its pages are locked in the kernel until then, and the kernel is to drop them."""
    path = two.first / "read across"
    put(path, LARGE)
    program = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb', buffering=0).read())"
    with two.stopped():
        put(two.second / path.name, LARGE[::-1])
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as reader:
            two.cluster.process("mount").signal(signal.SIGCONT)
            began = time.monotonic()
            got, _ = reader.communicate(timeout=60)
            assert time.monotonic() - began < 15.0
    assert got == LARGE[::-1]


# --- under load -------------------------------------------------------------------------------------------------------

LOAD = """
import os, sys
place, me = sys.argv[1], sys.argv[2]
os.chdir(place)
number = 0
while not os.path.exists("stop"):
    number += 1
    name = f"{me}-{number % 7}"
    content = f"{me} {number} ".encode() * (1 + number % 5 * 2000)
    descriptor = os.open("new-" + name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    for at in range(0, len(content), 4096):
        os.write(descriptor, content[at : at + 4096])
    if number % 2:
        os.fsync(descriptor)
    os.close(descriptor)
    os.rename("new-" + name, name)
    with open(name, "rb") as file:
        assert file.read() == content, name
    assert os.stat(name).st_size == len(content)
    os.makedirs("d-" + name + "/e", exist_ok=True)
    os.rmdir("d-" + name + "/e")
    if number % 5 == 0:
        os.unlink(name)
    print(number, flush=True)
"""


@contextmanager
def load(two: Two, name: str) -> Iterator[Callable[[], None]]:
    """Programs work on both mounts while the block runs, and none may see an error; call it to wait for progress."""
    (two.first / name).mkdir()
    files = [two.cluster.directory / f"{name}-{me}.out" for me in range(2)]
    programs = []
    for me, place in enumerate((two.first, two.second)):
        with files[me].open("wb") as output:
            command = [sys.executable, "-c", LOAD, str(place / name), str(me)]
            programs.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))

    def progress() -> None:
        before = [len(file.read_bytes()) for file in files]
        alive = [one.poll() is None for one in programs]
        assert all(alive), [file.read_text()[-2000:] for file in files]
        wait_until(
            lambda: (
                all(len(file.read_bytes()) > size for file, size in zip(files, before, strict=True))
                or any(one.poll() is not None for one in programs)
            ),
            "both programs go on",
        )

    try:
        progress()
        yield progress
        progress()
        put(two.second / name / "stop", b"")
        for one in programs:
            assert one.wait(60) == 0, [file.read_text()[-2000:] for file in files]
    finally:
        for one in programs:
            one.kill()
            one.wait()


def test_evictions_under_load_are_no_error_to_programs(two: Two) -> None:
    with load(two, "evicted") as progress:
        for turn in range(6):
            mountpoint = (two.first, two.second)[turn % 2]
            session = two.session_of(mountpoint)
            told = two.cluster.fsd("evict", str(session), "--yes", "--data", two.cluster.data).stdout
            assert f"session {session} ({mountpoint}," in told
            progress()
            assert two.session_of(mountpoint) > session
    ended = {one["session"]: one["how"] for one in two.sessions()["ended"]}
    assert list(ended.values()).count("evicted") >= 6
    assert "evicted" in two.cluster.fsd("sessions", "--data", two.cluster.data).stdout
    assert "ended as they were silent, or by hand" in two.cluster.fsd("status", "--data", two.cluster.data).stdout


def test_a_service_that_is_killed_and_started_again_under_load_is_no_error_to_programs(two: Two) -> None:
    with load(two, "restarted") as progress:
        sessions = [two.session_of(mountpoint) for mountpoint in (two.first, two.second)]
        for _ in range(3):
            before = two.cluster.kill("metadata")
            two.cluster.wait_back("metadata", before)
            progress()
        assert [two.session_of(mountpoint) for mountpoint in (two.first, two.second)] == sessions


def test_a_session_that_is_not_there_is_refused_with_a_sentence(two: Two) -> None:
    done = two.cluster.fsd("evict", "99999", "--yes", "--data", two.cluster.data, status=[1])
    assert "fsd evict: no session has the number 99999; fsd sessions" in done.stderr
    done = two.cluster.fsd("evict", str(two.session_of(two.first)), "--data", two.cluster.data, status=[2])
    assert "--yes" in done.stderr
