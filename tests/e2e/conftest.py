"""Fixtures of the mounted tests.

FSD_TEST_DIRECTORY=DIR makes the tests that ask only for a `place` work below DIR instead of on a mount of fsd: a test
that passes there and fails on the mount has found a bug.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount.config import FRONTENDS
from tests.e2e.places import Place
from tests.support.cluster import FRONTEND, LocalCluster, cluster, directory, own_cluster

__all__ = ["cluster", "directory", "each_frontend", "module_place", "own_cluster", "place", "shared_cluster", "victim"]

OTHER_DIRECTORY = os.environ.get("FSD_TEST_DIRECTORY")
LONGEST_FIRST = (
    "test_file_exerciser.py",
    "test_local_cluster.py",
    "test_mount_ranges.py",
    "test_crashes.py",
    "test_locks.py",
    "test_posix_tables.py",
    "test_mount_posix.py",
    "test_open_unlinked.py",
    "test_programs_databases.py",
    "test_programs_large.py",
    "test_state_machine.py",
    "test_two_mounts.py",
    "test_quotas.py",
)
"""Modules of a minute or more begin first: of several processes none then has a long one left when the others end."""
COMPLAINT = re.compile(r"\bERROR\b|\bCRITICAL\b|Traceback|AssertionError")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first; within a module, and among the others, the order stays."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster | None]:
    """The one cluster of all tests that break nothing; no log of it may tell of an error."""
    if OTHER_DIRECTORY:
        yield None
        return
    shared: LocalCluster = request.getfixturevalue("cluster")
    yield shared
    logs = (shared.data / "log").glob("*")
    complaints = [
        line for log in logs for line in log.read_text(errors="replace").splitlines() if COMPLAINT.search(line)
    ]
    assert complaints == []


@pytest.fixture(scope="module", params=FRONTENDS)
def each_frontend(request: pytest.FixtureRequest, shared_cluster: LocalCluster | None) -> Iterator[str]:
    """For tests that are to hold on both front ends: the shared cluster is mounted with each in turn, by modules."""
    name: str = request.param
    if shared_cluster is None and name != FRONTEND:
        pytest.skip("another directory has no front end")
    if shared_cluster is None or name == FRONTEND:
        yield name
        return
    shared_cluster.remount("--frontend", name)
    yield name
    shared_cluster.remount()


@contextmanager
def new_place(shared: LocalCluster | None) -> Iterator[Place]:
    """An empty directory, removed afterwards."""
    base = shared.mountpoint if shared else OTHER_DIRECTORY
    made = Path(tempfile.mkdtemp(prefix="place-", dir=base))
    made.chmod(0o755)
    try:
        yield Place(made, remount=shared.remount if shared else lambda: None, cluster=shared)
    finally:
        left_open = [path for path in open_files() if path.startswith(f"{made}/")]
        shutil.rmtree(made)
    assert left_open == []  # They would keep the mount busy for every test that comes after.


def open_files() -> Iterator[str]:
    """Paths that this process has open."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            yield os.readlink(link)
        except FileNotFoundError:
            continue  # The descriptor with which the directory was read.


@pytest.fixture
def place(shared_cluster: LocalCluster | None) -> Iterator[Place]:
    """An empty directory on the file system under test, for one test."""
    with new_place(shared_cluster) as made:
        yield made


@pytest.fixture(scope="module")
def module_place(shared_cluster: LocalCluster | None) -> Iterator[Place]:
    """An empty directory on the file system under test, for all tests of a module."""
    with new_place(shared_cluster) as made:
        yield made


@pytest.fixture
def victim(request: pytest.FixtureRequest) -> LocalCluster:
    """A mounted cluster of the test's own, to break."""
    if OTHER_DIRECTORY:
        pytest.skip("this test breaks a cluster of fsd; it has nothing to say about another directory")
    own: LocalCluster = request.getfixturevalue("own_cluster")
    own.up()
    return own
