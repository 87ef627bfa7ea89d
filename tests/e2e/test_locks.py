"""Locks of programs on two mounts of one cluster: they exclude, wait, are freed, and survive what breaks.

Each program is a process of its own (`Program`), which takes orders by its standard input, one line each, and answers
each with a line.  Front end: direct; libfuse's high-level interface keeps locks in the kernel of one mount.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mount.processes import ProcessId
from tests.support.cluster import LocalCluster, new_cluster, wait_until
from tests.support.programs import need

pytestmark = pytest.mark.mounted

DIRECT = ("--frontend", "direct")
LEASE_S = 20.0

AGENT = """
import errno, fcntl, os, signal, sys

class Signalled(Exception): pass

def on_alarm(*_):
    raise Signalled

signal.signal(signal.SIGALRM, on_alarm)
KINDS = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}
opened = {}

def order(verb, path, *rest):
    if verb == "open":
        opened[path] = os.open(path, os.O_RDWR | os.O_CREAT)
    elif verb == "close":
        os.close(opened.pop(path))
    elif verb == "read":
        return repr(os.pread(opened[path], 100, 0))
    elif verb == "write":
        os.pwrite(opened[path], rest[0].encode(), 0)
    else:  # fcntl, flock: without waiting; fcntl+, flock+: waiting; with "!" interrupted by a signal after a second.
        how = KINDS[rest[0]] | (0 if "+" in verb or rest[0] == "u" else fcntl.LOCK_NB)
        if "!" in verb:
            signal.alarm(1)
        if verb.startswith("fcntl"):
            fcntl.lockf(opened[path], how, int(rest[1]), int(rest[2]))
        else:
            fcntl.flock(opened[path], how)
    return "ok"

for line in sys.stdin:
    try:
        answer = order(*line.split())
    except OSError as error:
        answer = errno.errorcode[error.errno]
    except Signalled:
        answer = "signalled"
    print(answer, flush=True)
"""


class Program:
    """A process that locks what it is told to."""

    def __init__(self, *paths: Path) -> None:
        """With these files open."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for path in paths:
            assert self.do("open", path) == "ok"

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, *words: object) -> None:
        """Give an order without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """Wait for the answer."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def do(self, *words: object) -> str:
        """Give an order; its answer."""
        self.begin(*words)
        return self.answer()

    def can(self, call: str, path: Path, kind: str = "w", length: int = 0, start: int = 0) -> bool:
        """Whether it gets the lock."""
        told = self.do(call, path, kind, length, start) if call == "fcntl" else self.do(call, path, kind)
        assert told in ("ok", "EAGAIN"), told
        return told == "ok"

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """By a signal; idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def programs(*files: Path) -> Iterator[list[Program]]:
    """One program for each file, which it has open."""
    made: list[Program] = []
    try:
        for file in files:
            made.append(Program(file))  # noqa: PERF401  (those made before one fails are ended)
        yield made
    finally:
        for one in made:
            one.end()


class Two:
    """Two mounts of one cluster."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.a = cluster.mountpoint
        self.b = cluster.directory / "mnt2"
        self.b.mkdir()

    def mount_b(self) -> None:
        self.cluster.fsd("mount", self.cluster.address, self.b, "--data", self.cluster.data, *DIRECT)

    def umount_b(self) -> None:
        self.cluster.fsd("umount", self.b)

    def daemon_of_b(self) -> ProcessId:
        return next(one.process for one in self.cluster.records() if one.mountpoint == str(self.b))

    def listed(self) -> list[dict[str, Any]]:
        """`fsd locks --json`."""
        done = self.cluster.fsd("locks", "--data", self.cluster.data, "--json", status=(0, 3))
        found: list[dict[str, Any]] = json.loads(done.stdout)["locks"]
        return found

    def wait_for_waiter(self) -> None:
        """The service knows that somebody waits."""
        wait_until(lambda: any(one["state"] == "waits" for one in self.listed()), "somebody waits for a lock")


@pytest.fixture(scope="module")
def both() -> Iterator[Two]:
    """Two mounts, for the tests that break nothing."""
    with new_cluster() as cluster:
        cluster.up(*DIRECT)
        two = Two(cluster)
        two.mount_b()
        yield two
        two.umount_b()
        cluster.down()


@pytest.fixture
def file(both: Two, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A file of the test's own, by both mounts."""
    name = request.node.name.replace("/", "-")
    (both.a / name).touch()
    return both.a / name, both.b / name


@pytest.fixture
def two(own_cluster: LocalCluster) -> Two:
    """Two mounts of the test's own, of which B is not mounted yet."""
    own_cluster.up(*DIRECT)
    return Two(own_cluster)


@pytest.mark.parametrize("call", ["fcntl", "flock"])
def test_a_lock_excludes_the_other_mount_until_it_is_let_go(file: tuple[Path, Path], call: str) -> None:
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        for first, first_file, second, second_file in ((a, in_a, b, in_b), (b, in_b, a, in_a)):
            assert first.can(call, first_file)
            assert not second.can(call, second_file)
            assert not second.can(call, second_file, "r")
            assert first.can(call, first_file, "r")
            assert second.can(call, second_file, "r")
            assert not first.can(call, first_file, "w")
            assert first.do("close", first_file) == "ok"
            assert second.can(call, second_file)
            assert second.can(call, second_file, "u")
            assert first.do("open", first_file) == "ok"


def test_ranges_that_do_not_meet_do_not_exclude(file: tuple[Path, Path]) -> None:
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        assert a.can("fcntl", in_a, "w", 10, 0)
        assert b.can("fcntl", in_b, "w", 10, 10)
        assert not b.can("fcntl", in_b, "w", 10, 9)
        assert a.can("fcntl", in_a, "u", 1, 9)
        assert b.can("fcntl", in_b, "w", 11, 9)


@pytest.mark.parametrize("call", ["fcntl", "flock"])
def test_who_waits_is_handed_the_lock(both: Two, file: tuple[Path, Path], call: str) -> None:
    in_a, in_b = file
    words = ("w", 0, 0) if call == "fcntl" else ("w",)
    with programs(in_a, in_b) as (a, b):
        for _ in range(3):
            assert a.can(call, in_a)
            b.begin(f"{call}+", in_b, *words)
            both.wait_for_waiter()
            assert a.can(call, in_a, "u")
            assert b.answer() == "ok"
            assert not a.can(call, in_a)
            assert b.can(call, in_b, "u")


def test_waiters_and_holders_are_listed(both: Two, file: tuple[Path, Path]) -> None:
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        assert a.can("flock", in_a)
        b.begin("flock+", in_b, "w")
        both.wait_for_waiter()
        inode = in_a.stat().st_ino
        found = {(one["state"], one["pid"], one["mountpoint"]) for one in both.listed() if one["inode"] == inode}
        assert found == {("held", a.pid, str(both.a)), ("waits", b.pid, str(both.b))}
        told = both.cluster.fsd("locks", in_b).stdout
        assert str(a.pid) in told
        assert str(b.pid) in told


def test_a_killed_holder_frees_its_locks(both: Two, file: tuple[Path, Path]) -> None:
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        assert a.can("flock", in_a)
        assert a.can("fcntl", in_a)
        b.begin("flock+", in_b, "w")
        both.wait_for_waiter()
        a.end(signal.SIGKILL)
        assert b.answer() == "ok"
        assert b.can("fcntl", in_b)


def test_a_killed_waiter_waits_no_more(both: Two, file: tuple[Path, Path]) -> None:
    in_a, in_b = file
    with programs(in_a, in_b, in_b) as (a, b, c):
        assert a.can("fcntl", in_a)
        b.begin("fcntl+", in_b, "w", 0, 0)
        both.wait_for_waiter()
        b.end(signal.SIGKILL)
        wait_until(lambda: not any(one["state"] == "waits" for one in both.listed()), "nobody waits")
        assert a.can("fcntl", in_a, "u")
        assert c.can("fcntl", in_b)


def test_a_circle_over_both_mounts_is_edeadlk(both: Two, file: tuple[Path, Path]) -> None:
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        assert a.can("fcntl", in_a, "w", 1, 0)
        assert b.can("fcntl", in_b, "w", 1, 1)
        a.begin("fcntl+", in_a, "w", 1, 1)
        both.wait_for_waiter()
        assert b.do("fcntl+", in_b, "w", 1, 0) == errno.errorcode[errno.EDEADLK]
        assert b.can("fcntl", in_b, "u", 1, 1)
        assert a.answer() == "ok"


@pytest.mark.parametrize("call", ["fcntl", "flock"])
def test_a_signal_ends_a_wait(both: Two, file: tuple[Path, Path], call: str) -> None:
    in_a, in_b = file
    words = ("w", 0, 0) if call == "fcntl" else ("w",)
    with programs(in_a, in_b) as (a, b):
        assert a.can(call, in_a)
        assert b.do(f"{call}+!", in_b, *words) == "signalled"
        assert a.can(call, in_a, "u")
        assert a.can(call, in_a), "nobody has got it"
        assert a.can(call, in_a, "u")
        assert b.can(call, in_b), "and it can be had later"


def test_who_gets_the_lock_reads_what_was_written_under_it(file: tuple[Path, Path]) -> None:
    """With the file open on both sides all the time, and its pages in both kernels."""
    in_a, in_b = file
    with programs(in_a, in_b) as (a, b):
        for turn in range(5):
            for one, path, other, other_path in ((a, in_a, b, in_b), (b, in_b, a, in_a)):
                text = f"{one.pid:020}-{turn}"
                assert one.can("fcntl", path)
                assert one.do("write", path, text) == "ok"
                assert one.can("fcntl", path, "u")
                assert other.can("fcntl", other_path, "r")
                assert other.do("read", other_path) == repr(text.encode())
                assert other.can("fcntl", other_path, "u")


# --- programs that others wrote ---------------------------------------------------------------------------------------

COUNT = """
import subprocess, sys
for _ in range(int(sys.argv[2])):
    subprocess.run(
        [sys.argv[3], sys.argv[1] + ".lock", "sh", "-c", 'n=$(cat "$0"); echo $((n + 1)) > "$0"', sys.argv[1]],
        check=True,
    )
"""

COUNT_WITH_FILELOCK = """
import sys, filelock
for _ in range(int(sys.argv[2])):
    with filelock.FileLock(sys.argv[1] + ".lock"):
        with open(sys.argv[1]) as file:
            count = int(file.read())
        with open(sys.argv[1], "w") as file:
            file.write(f"{count + 1}")
"""


@pytest.mark.parametrize(("script", "count"), [(COUNT, 15), (COUNT_WITH_FILELOCK, 60)], ids=["flock(1)", "filelock"])
def test_a_counter_loses_nothing(file: tuple[Path, Path], script: str, count: int) -> None:
    """Two programs on each mount read, add and write under flock(1) or the Python package filelock."""
    file[0].write_text("0\n")
    commands = [[sys.executable, "-c", script, str(path), str(count), need("flock")] for path in (*file, *file)]
    running = [subprocess.Popen(command) for command in commands]
    assert [one.wait(120) for one in running] == [0] * len(running)
    assert int(file[1].read_text()) == len(running) * count


SQLITE_WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("pragma synchronous=" + sys.argv[3])
for number in range(int(sys.argv[2])):
    connection.execute("begin immediate")
    (count,) = connection.execute("select count(*) from rows").fetchone()
    connection.execute("insert into rows values (?, ?)", (count, "x" * (number * 37 % 3000)))
    connection.execute("update sums set total = total + ?", (count,))
    connection.execute("commit")
"""


@pytest.mark.parametrize("synchronous", ["full", "off"])
def test_sqlite_written_from_both_mounts_is_sound(file: tuple[Path, Path], synchronous: str) -> None:
    """In rollback mode; each transaction builds on what all before it have left."""
    count = 25
    with closing(sqlite3.connect(file[0])) as connection:
        connection.execute("create table rows (number integer primary key, text text)")
        connection.execute("create table sums (total integer)")
        connection.execute("insert into sums values (0)")
        connection.commit()
    running = [
        subprocess.Popen([sys.executable, "-c", SQLITE_WRITER, str(path), str(count), synchronous])
        for path in (*file, *file)
    ]
    assert [one.wait(240) for one in running] == [0] * len(running)
    rows = len(running) * count
    for path in file:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert connection.execute("select count(*), max(number) from rows").fetchone() == (rows, rows - 1)
            assert connection.execute("select total from sums").fetchone() == (rows * (rows - 1) // 2,)


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_locks_of_a_lone_mount_hold_when_another_comes_and_after_it_has_gone(two: Two) -> None:
    in_a, in_b = two.a / "file", two.b / "file"
    with programs(in_a, in_a) as (a, a2):
        assert a.can("fcntl", in_a, "w", 10, 0)
        assert a.can("flock", in_a)
        a2.begin("flock+", in_a, "w")
        two.mount_b()
        with programs(in_b) as (b,):
            assert not b.can("fcntl", in_b)
            assert not b.can("flock", in_b, "r")
            assert b.can("fcntl", in_b, "w", 10, 10)
            two.wait_for_waiter()
            assert a.can("flock", in_a, "u")
            assert a2.answer() == "ok"
            assert not b.can("flock", in_b, "r")
        two.umount_b()
        assert a2.can("flock", in_a, "u")
        assert a.can("flock", in_a)
        two.mount_b()
        with programs(in_b) as (b,):
            assert not b.can("fcntl", in_b, "w", 10, 0)
            assert not b.can("flock", in_b)
        two.umount_b()


def test_a_restart_of_the_service_gives_nobody_what_others_hold(two: Two) -> None:
    two.mount_b()
    in_a, in_b = two.a / "file", two.b / "file"
    with programs(in_a, in_b, in_b) as (a, b, waiting):
        assert a.can("fcntl", in_a, "w", 10, 0)
        assert b.can("fcntl", in_b, "w", 10, 10)
        waiting.begin("fcntl+", in_b, "w", 5, 0)
        two.wait_for_waiter()
        killed = two.cluster.kill("metadata")
        two.cluster.wait_back("metadata", killed)
        assert not b.can("fcntl", in_b, "w", 10, 0)
        assert not a.can("fcntl", in_a, "r", 10, 10)
        assert {(one["mountpoint"], one["start"]) for one in two.listed() if one["state"] == "held"} == {
            (str(two.a), 0),
            (str(two.b), 10),
        }
        assert a.can("fcntl", in_a, "u")
        assert waiting.answer() == "ok"
    two.umount_b()


def test_a_killed_daemon_frees_its_locks_when_it_is_mounted_again(two: Two) -> None:
    two.mount_b()
    in_a, in_b = two.a / "file", two.b / "file"
    with programs(in_a, in_b) as (a, b):
        assert b.can("flock", in_b)
        a.begin("flock+", in_a, "w")
        two.wait_for_waiter()
        daemon = two.daemon_of_b()
        assert daemon.signal(signal.SIGKILL)
        assert daemon.wait_end(30)
        b.end()
        subprocess.run(["umount", "-l", str(two.b)], check=True)
        two.mount_b()
        assert a.answer() == "ok"
    two.umount_b()


def test_a_killed_daemon_frees_its_locks_after_its_lease(two: Two) -> None:
    two.mount_b()
    in_a, in_b = two.a / "file", two.b / "file"
    with programs(in_a, in_b) as (a, b):
        assert b.can("fcntl", in_b)
        daemon = two.daemon_of_b()
        assert daemon.signal(signal.SIGKILL)
        assert daemon.wait_end(30)
        assert not a.can("fcntl", in_a)
        waited_s = wait_until(lambda: a.can("fcntl", in_a), "the lock is free", LEASE_S + 10)
        assert waited_s > 1
        b.end()
    subprocess.run(["umount", "-l", str(two.b)], check=True)


def test_what_a_mount_held_it_holds_after_it_stood_still_for_less_than_its_lease(two: Two) -> None:
    two.mount_b()
    in_a, in_b = two.a / "file", two.b / "file"
    with programs(in_a, in_b) as (a, b):
        assert b.can("flock", in_b)
        daemon = two.daemon_of_b()
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            assert not a.can("flock", in_a)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert not a.can("flock", in_a)
        assert b.can("flock", in_b, "u")
        assert a.can("flock", in_a)
    two.umount_b()


def test_the_locks_of_one_program_do_not_end_with_those_of_another(both: Two, file: tuple[Path, Path]) -> None:
    """Two processes of one mount are two owners, though the service knows one session."""
    in_a, in_b = file
    with programs(in_a, in_a, in_b) as (first, second, b):
        assert first.can("fcntl", in_a, "w", 10, 0)
        assert second.can("fcntl", in_a, "w", 10, 10)
        assert not second.can("fcntl", in_a, "r", 1, 0)
        second.end()
        assert not b.can("fcntl", in_b, "r", 1, 0)
        assert b.can("fcntl", in_b, "w", 10, 10)
