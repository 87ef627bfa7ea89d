"""Where the mounted tests work: a directory on a real fsd mount, or, to prove a test, any directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import FRONTEND, LocalCluster


@dataclass(frozen=True)
class Place:
    """An empty directory for one test, or for one module of tests."""

    directory: Path
    remount: Callable[[], None]  # Unmount and mount again, so that no cache and no buffer of the client is left.
    cluster: LocalCluster | None = None  # None: some other directory.

    @contextmanager
    def second_mount(self) -> Iterator[Path]:
        """The same directory by another mount of the same cluster; for another directory: by the same."""
        if self.cluster is None:
            yield self.directory
            return
        mountpoint = self.cluster.directory / "mnt2"
        mountpoint.mkdir(exist_ok=True)
        self.cluster.fsd("mount", self.cluster.address, mountpoint, "--frontend", FRONTEND)
        try:
            yield mountpoint / self.directory.relative_to(self.cluster.mountpoint)
        finally:
            self.cluster.fsd("umount", mountpoint)
