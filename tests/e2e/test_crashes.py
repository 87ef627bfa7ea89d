"""Processes are killed, stopped and fed garbage, disks lie: nothing acknowledged is lost, nothing wrong is read."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount.processes import ProcessId
from tests.support.cluster import LocalCluster, wait_until
from tests.support.programs import assert_same_tree, file_digest, run, source_tree, tree_digest
from tests.support.twin import pattern

pytestmark = pytest.mark.mounted

MIB = 1 << 20
LARGE_SIZE = 192 * MIB
CALL_DEADLINE_S = 45.0
"""A call on the mount gives up after 30 s (its timeout); the rest is for a busy machine."""

WRITER = """
import os, sys
sys.path.insert(0, sys.argv[3])
from tests.support.twin import pattern
with open(sys.argv[1], "wb", buffering=0) as file:
    for number in range(int(sys.argv[2]) >> 20):
        file.write(pattern(number % 16, 1 << 20))
        print(number, flush=True)
    os.fsync(file.fileno())
"""

READER = """
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as file:
    number = 0
    while piece := file.read(1 << 20):
        digest.update(piece)
        print(number, flush=True)
        number += 1
print(digest.hexdigest(), flush=True)
"""

ROOT = Path(__file__).resolve().parents[2]


def large_digest() -> str:
    digest = hashlib.sha256()
    for number in range(LARGE_SIZE // MIB):
        digest.update(pattern(number % 16, MIB))
    return digest.hexdigest()


def write_large(path: Path) -> None:
    run(sys.executable, "-c", WRITER, path, str(LARGE_SIZE), ROOT)


def run_and_disturb(command: list[str], at: int, disturb: Callable[[], object]) -> list[str]:
    """Run a program that prints its progress; at line `at` do `disturb`; it must end well; returns its lines."""
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            lines.append(line.strip())
            if len(lines) == at:
                disturb()
    assert len(lines) > at
    assert program.returncode == 0
    return lines


def test_a_block_server_killed_during_a_write_loses_nothing(victim: LocalCluster) -> None:
    path = victim.mountpoint / "large"
    killed: list[ProcessId] = []
    command = [sys.executable, "-c", WRITER, str(path), str(LARGE_SIZE), str(ROOT)]
    run_and_disturb(command, LARGE_SIZE // MIB // 3, lambda: killed.append(victim.kill("block-1")))
    assert file_digest(path) == large_digest()
    victim.wait_back("block-1", killed[0])
    victim.remount()
    assert file_digest(path) == large_digest()
    # Every copy that was acknowledged counts: any one of the other servers may go now.
    victim.kill("block-2")
    assert file_digest(path) == large_digest()


def test_a_block_server_killed_during_a_read_is_not_noticed(victim: LocalCluster) -> None:
    path = victim.mountpoint / "large"
    write_large(path)
    victim.remount()
    command = [sys.executable, "-c", READER, str(path)]
    lines = run_and_disturb(command, LARGE_SIZE // MIB // 3, lambda: victim.kill("block-2"))
    assert lines[-1] == large_digest()


def test_a_stalled_block_server_delays_reads_and_writes_but_does_not_stop_them(victim: LocalCluster) -> None:
    """It accepts connections and answers nothing: worse than a dead one."""
    path = victim.mountpoint / "large"
    path.write_bytes(pattern(1, 40 * MIB))
    victim.remount()
    victim.kill("block-3", signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert path.read_bytes() == pattern(1, 40 * MIB)
        other = victim.mountpoint / "other"
        with other.open("wb") as file:
            file.write(pattern(2, 20 * MIB))
            file.flush()
            os.fsync(file.fileno())
        assert time.monotonic() - started < 2 * CALL_DEADLINE_S
    finally:
        victim.kill("block-3", signal.SIGCONT)
    victim.remount()
    assert path.read_bytes() == pattern(1, 40 * MIB)
    assert other.read_bytes() == pattern(2, 20 * MIB)


def test_tar_survives_the_inode_service_being_killed_again_and_again(victim: LocalCluster, tmp_path: Path) -> None:
    archive = source_tree(tmp_path, file_count=1_500)
    (tmp_path / "expected").mkdir()
    options = ("--delay-directory-restore", "-xf", archive, "-C")
    run("tar", *options, tmp_path / "expected")
    target = victim.mountpoint / "tree"
    target.mkdir()
    with subprocess.Popen(
        ["tar", "--checkpoint=100", "--checkpoint-action=echo=%u", *map(str, options), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as tar:
        assert tar.stdout is not None
        told = []
        for line in tar.stdout:
            told.append(line)
            if len(told) in (2, 5, 9):
                killed = victim.kill("metadata")
                victim.wait_back("metadata", killed)
    assert len(told) > 9
    assert tar.returncode == 0, "".join(told[-20:])
    assert_same_tree(tree_digest(target), tree_digest(tmp_path / "expected"))
    victim.remount()
    assert_same_tree(tree_digest(target), tree_digest(tmp_path / "expected"))


class Acknowledged:
    """Threads that make, replace, rename and remove small files; what each call's return has promised is kept."""

    def __init__(self, directory: Path, *, sync: bool) -> None:
        self.directory = directory
        self.sync = sync
        self.present: dict[str, bytes] = {}
        self.absent: set[str] = set()
        self.unsure: set[str] = set()
        self.errors: list[OSError] = []
        self.slowest_s = 0.0
        self.stop = threading.Event()
        self.lock = threading.Lock()

    def work(self, name: str) -> None:
        """One thread: every step is one acknowledged change of names this thread alone uses."""
        rnd = random.Random(name)
        number = 0
        while not self.stop.is_set():
            number += 1
            path = self.directory / f"{name}-{number}"
            started = time.monotonic()
            try:
                self.step(path, rnd)
            except OSError as error:
                with self.lock:
                    self.errors.append(error)
                    self.unsure |= {path.name, f"{path.name}.renamed"}
                if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                    return  # The FUSE daemon is gone.
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def step(self, path: Path, rnd: random.Random) -> None:
        data = rnd.randbytes(rnd.choice([0, 10, 5_000, 16_384, 16_385, 40_000, 300_000]))
        with path.open("wb", buffering=0) as file:
            file.write(data)
            if self.sync:
                os.fsync(file.fileno())
        kind = rnd.randrange(4)
        if kind == 0:
            path.unlink()
            with self.lock:
                self.absent.add(path.name)
        elif kind == 1:
            new = path.with_name(f"{path.name}.renamed")
            path.rename(new)
            with self.lock:
                self.present[new.name] = data
                self.absent.add(path.name)
        else:
            with self.lock:
                self.present[path.name] = data

    def check(self) -> None:
        """All that was promised holds."""
        names = set(os.listdir(self.directory))
        assert not (self.absent - self.unsure) & names
        for name, data in self.present.items():
            if name not in self.unsure:
                assert (self.directory / name).read_bytes() == data, name
        assert names <= self.present.keys() | self.unsure


@contextmanager
def working(directory: Path, *, sync: bool, threads: int = 3) -> Iterator[Acknowledged]:
    """Threads at work in `directory` until the block ends."""
    directory.mkdir(exist_ok=True)
    work = Acknowledged(directory, sync=sync)
    workers = [threading.Thread(target=work.work, args=(f"t{number}",)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield work
    finally:
        work.stop.set()
        for worker in workers:
            worker.join()


def test_what_the_inode_service_acknowledged_outlives_its_death(victim: LocalCluster) -> None:
    with working(victim.mountpoint / "work", sync=False) as work:
        for turn in range(3):
            wait_until(lambda turn=turn: len(work.present) > (turn + 1) * 40, "some work")  # type: ignore[misc]
            killed = victim.kill("metadata")
            victim.wait_back("metadata", killed)
        wait_until(lambda: len(work.present) > 200, "work to go on by itself")
    assert work.errors == []  # It was back within the deadline of every call.
    assert work.slowest_s < CALL_DEADLINE_S
    work.check()
    victim.remount()
    work.check()


def test_a_stopped_inode_service_gives_an_errno_in_time_and_then_goes_on(victim: LocalCluster) -> None:
    victim.remount("--timeout-s", "5")
    (victim.mountpoint / "before").write_bytes(b"before")
    victim.kill("metadata", signal.SIGSTOP)
    started = time.monotonic()
    try:
        with pytest.raises(OSError) as caught:
            (victim.mountpoint / "during").touch()
        assert caught.value.errno in (errno.ETIMEDOUT, errno.EIO)
        assert time.monotonic() - started < 20
    finally:
        victim.kill("metadata", signal.SIGCONT)
    (victim.mountpoint / "after").write_bytes(b"after")
    assert (victim.mountpoint / "before").read_bytes() == b"before"
    assert (victim.mountpoint / "after").read_bytes() == b"after"


def test_a_killed_fuse_daemon_is_mounted_again_with_all_that_was_synced(victim: LocalCluster) -> None:
    with working(victim.mountpoint / "work", sync=True) as work:
        wait_until(lambda: len(work.present) > 60, "some work")
        victim.kill("mount")
    assert {error.errno for error in work.errors} <= {errno.ENOTCONN, errno.ECONNABORTED}
    victim.up()
    work.check()
    (victim.mountpoint / "work" / "after").write_bytes(b"after")


def test_the_whole_cluster_killed_at_once_comes_back_with_all_that_was_synced(victim: LocalCluster) -> None:
    with working(victim.mountpoint / "work", sync=True) as work:
        wait_until(lambda: len(work.present) > 60, "some work")
        parts = ("supervisor", "metadata", "block-1", "block-2", "block-3", "mount")
        for process in [victim.process(part) for part in parts]:
            process.signal(signal.SIGKILL)
    victim.up()
    work.check()
    (victim.mountpoint / "work" / "after").write_bytes(b"after")


def damage(cluster: LocalCluster, server: str, marker: bytes) -> int:
    """Flip a byte after every `marker` in the server's files; returns how many there were."""
    count = 0
    for path in (cluster.data / server).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            at = data.find(marker)
            with path.open("r+b") as file:
                while at >= 0:
                    os.pwrite(file.fileno(), bytes([data[at + len(marker)] ^ 1]), at + len(marker))
                    count += 1
                    at = data.find(marker, at + len(marker))
    return count


def marked(size: int, marker: bytes) -> bytes:
    """Bytes with the marker at the start of every 64 KiB."""
    step = 64 << 10
    return b"".join(marker + pattern(number % 16, step - len(marker)) for number in range(size // step))


def test_a_damaged_copy_is_not_read_and_is_shown_and_when_all_are_damaged_it_is_eio(victim: LocalCluster) -> None:
    marker = b"only in this file: " + os.urandom(16)
    expected = marked(40 * MIB, marker)
    path, sound = victim.mountpoint / "file", victim.mountpoint / "sound"
    path.write_bytes(expected)
    sound.write_bytes(pattern(9, 10 * MIB))
    victim.remount()
    assert damage(victim, "block-1", marker) > 0
    assert path.read_bytes() == expected

    def shown() -> bool:
        return any(bad["reason"] == "corrupt" for bad in victim.status()["bad_blocks"])

    wait_until(shown, "fsd status to show the damaged copy")

    assert damage(victim, "block-2", marker) > 0
    assert damage(victim, "block-3", marker) > 0
    victim.remount()
    wrong = 0
    with path.open("rb", buffering=0) as file:
        for offset in range(0, len(expected), MIB):
            try:
                piece = os.pread(file.fileno(), MIB, offset)
            except OSError as error:
                wrong += error.errno == errno.EIO
            else:
                assert piece == expected[offset : offset + len(piece)]
    assert wrong > 0
    assert sound.read_bytes() == pattern(9, 10 * MIB)


def test_garbage_on_every_port_harms_nothing(victim: LocalCluster) -> None:
    path = victim.mountpoint / "file"
    path.write_bytes(pattern(3, 5 * MIB))
    services = victim.state().children
    rnd = random.Random(7)
    garbage = [
        b"",
        b"\0" * 4096,
        b"\xff" * 65536,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rnd.randbytes(500),
        *(rnd.randbytes(rnd.choice([1, 7, 64, 5000, 300_000])) for _ in range(30)),
    ]
    idle = []
    for service in services:
        address = (service.host, service.port)
        for data in garbage:
            with socket.create_connection(address, timeout=10) as connection:
                try:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                except OSError:
                    pass  # The service has ended the connection, as it should.
        idle += [socket.create_connection(address, timeout=10) for _ in range(50)]  # Connected, and silent.
    victim.remount()
    assert path.read_bytes() == pattern(3, 5 * MIB)
    (victim.mountpoint / "other").write_bytes(pattern(4, 5 * MIB))
    assert (victim.mountpoint / "other").read_bytes() == pattern(4, 5 * MIB)
    for connection in idle:
        connection.close()
    assert [child.process for child in victim.state().children] == [child.process for child in services]
