"""Many threads at once on few names: nothing hangs or fails strangely, and the caches tell what the service has."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.places import Place

pytestmark = pytest.mark.mounted

THREADS = 12
OPERATIONS = 250
EXPECTED = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EPERM}
BETWEEN_MOUNTS = EXPECTED | {errno.ESTALE, errno.EXDEV}
"""Two mounts may also meet inodes that the other has just removed, as on NFS."""

State = tuple[object, ...]


class Worker(threading.Thread):
    """Random operations on the same few names as everybody."""

    def __init__(self, tops: list[Path], seed: int) -> None:
        super().__init__(daemon=True)
        self.chance = random.Random(seed)
        self.tops = tops
        self.answers: Counter[int] = Counter()

    def path(self) -> str:
        chance = self.chance
        return f"{chance.choice(self.tops)}/d{chance.randrange(3)}/n{chance.randrange(10)}"

    def run(self) -> None:
        operations: list[Callable[[], object]] = [
            self.write_some,
            self.write_some,
            self.read_some,
            lambda: os.unlink(self.path()),
            lambda: os.rename(self.path(), self.path()),
            lambda: os.link(self.path(), self.path()),
            lambda: os.stat(self.path()),
            lambda: os.listdir(os.path.dirname(self.path())),
            lambda: os.truncate(self.path(), self.chance.choice([0, 100, 50_000])),
            lambda: os.mkdir(self.path()),
            lambda: os.rmdir(self.path()),
            lambda: os.chmod(self.path(), self.chance.choice([0o644, 0o755])),
            lambda: os.setxattr(self.path(), "user.a", b"x"),
            lambda: os.utime(self.path(), (1, 1)),
        ]
        for _ in range(OPERATIONS):
            try:
                self.chance.choice(operations)()
                self.answers[0] += 1
            except OSError as error:
                self.answers[error.errno or -1] += 1

    def write_some(self) -> None:
        chance = self.chance
        extra = chance.choice([0, os.O_TRUNC, os.O_APPEND, os.O_EXCL])
        descriptor = os.open(self.path(), os.O_RDWR | os.O_CREAT | extra)
        try:
            os.write(descriptor, bytes([chance.randrange(256)]) * chance.choice([10, 5000, 70_000]))
            if chance.random() < 0.2:
                os.fsync(descriptor)
            os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        finally:
            os.close(descriptor)

    def read_some(self) -> None:
        descriptor = os.open(self.path(), os.O_RDONLY)
        try:
            os.read(descriptor, 200_000)
        finally:
            os.close(descriptor)


def work(tops: list[Path]) -> set[int]:
    """All threads at work; the errnos they met."""
    for number in range(3):
        (tops[0] / f"d{number}").mkdir()
    workers = [Worker(tops, seed) for seed in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers), "some operation hangs"
    answers: Counter[int] = sum((worker.answers for worker in workers), Counter())
    assert answers[0] > THREADS * OPERATIONS // 10, answers
    return set(answers) - {0}


def state_of(top: Path, *, access_times: bool = True) -> dict[str, State]:
    """Everything that stat and read tell."""
    found: dict[str, State] = {}
    for base, directories, files in os.walk(top):
        for name in [*directories, *files, "."]:
            path = Path(base, name)
            told = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            times = (told.st_atime_ns if access_times else 0, told.st_mtime_ns, told.st_ctime_ns)
            found[str(path.relative_to(top))] = (
                *(told.st_mode, told.st_nlink, told.st_uid, told.st_gid, told.st_size, told.st_blocks, times),
                *(content, os.listxattr(path)),
            )
    return found


def test_after_much_work_at_once_the_caches_tell_what_the_service_has(place: Place) -> None:
    assert work([place.directory]) <= EXPECTED
    state_of(place.directory)  # Reads everything: under relatime nothing that follows moves an access time.
    seen = state_of(place.directory)
    place.remount()
    assert state_of(place.directory) == seen


def test_after_much_work_by_two_mounts_both_tell_the_same(place: Place) -> None:
    with place.second_mount() as second:
        assert work([place.directory, second]) <= BETWEEN_MOUNTS
        # What a mount has read it tells in the background (decision 0012).
        assert state_of(second, access_times=False) == state_of(place.directory, access_times=False)
