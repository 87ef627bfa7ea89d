"""After work on a mount, kills of the service included, the store itself keeps every invariant of fsck."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from metadata.core.fsck import check
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import ReadTxn
from metadata.server import ENGINE_DIRECTORY
from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.mounted
STEPS = 900
KINDS = ("write", "overwrite", "truncate", "mkdir", "unlink", "rmdir", "rename", "link", "symlink", "xattr", "quota")
SIZES = (0, 1, 5_000, 20_000, 300_000, 5 << 20)


class Worker:
    """Random calls on a mount; what POSIX refuses is fine, what has no sense for one program is not."""

    EXPECTED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        for name in ("a", "b", "a/a", "a/b"):
            (root / name).mkdir()

    def path(self) -> Path:
        place = self.root
        for _ in range(self.chance.randint(1, 3)):
            place /= self.chance.choice("abcd")
        return place

    def step(self) -> None:
        kind = self.chance.choice(
            [
                "write",
                "write",
                "overwrite",
                "truncate",
                "mkdir",
                "unlink",
                "rmdir",
                "rename",
                "link",
                "symlink",
                "xattr",
                "quota",
            ]
        )
        try:
            getattr(self, kind)(self.path())
            self.done[kind] += 1
        except self.EXPECTED:
            self.done["refused"] += 1
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EINVAL, errno.EPERM, errno.EDQUOT):
                raise
            self.done["over quota" if error.errno == errno.EDQUOT else "refused"] += 1

    def write(self, path: Path) -> None:
        path.write_bytes(os.urandom(self.chance.choice(SIZES)))

    def overwrite(self, path: Path) -> None:
        with path.open("r+b") as file:
            for _ in range(5):
                file.seek(self.chance.randrange(6 << 20))
                file.write(os.urandom(self.chance.randint(1, 9000)))
            os.fsync(file.fileno())

    def truncate(self, path: Path) -> None:
        os.truncate(path, self.chance.choice(SIZES) // 2)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def rename(self, path: Path) -> None:
        path.rename(self.path())

    def link(self, path: Path) -> None:
        os.link(path, self.path(), follow_symlinks=False)

    def symlink(self, path: Path) -> None:
        path.symlink_to("nowhere")

    def xattr(self, path: Path) -> None:
        os.setxattr(path, "user.x", os.urandom(self.chance.choice((10, 40_000))))

    def quota(self, path: Path) -> None:
        """Limits of what is there and a little more, or none again."""
        for name, more in (("bytes", 10_000), ("inodes", 1)):
            used = int(os.getxattr(path, f"fsd.usage.{name}")) if path.is_dir() else 0
            limit = used + self.chance.randint(1, more) if self.chance.random() < 0.7 else 0
            os.setxattr(path, f"fsd.quota.{name}", b"%d" % limit)


@contextmanager
def store_of(cluster: LocalCluster) -> Iterator[ReadTxn]:
    """A snapshot of the inode service's store, taken by this process; the service may run meanwhile."""
    with closing(LmdbEngine(cluster.data / "metadata" / ENGINE_DIRECTORY)) as engine, engine.read() as txn:
        yield txn


def test_the_store_keeps_its_invariants_over_work_kills_and_a_new_mount(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    worker = Worker(own_cluster.mountpoint, seed=1)
    for step in range(STEPS):
        worker.step()
        if step % (STEPS // 3) == STEPS // 6:
            own_cluster.wait_back("metadata", own_cluster.kill("metadata"))
    with store_of(own_cluster) as txn:
        assert [str(violation) for violation in check(txn)] == []
    assert min(worker.done[kind] for kind in (*KINDS, "over quota")) > 0, worker.done
    own_cluster.remount()
    own_cluster.down()
    with store_of(own_cluster) as txn:
        assert [str(violation) for violation in check(txn)] == []
        assert txn.scan(b"h", b"i", 10) == [], "no session is left to hold anything"
