"""Fixtures of the mounted tests.

FSD_TEST_DIRECTORY=DIR makes the tests that ask only for a `place` work below DIR instead of on a mount of fsd: a test
that passes there and fails on the mount has found a bug.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.fsd_cluster import FsdCluster

OTHER_DIRECTORY = os.environ.get("FSD_TEST_DIRECTORY")
CLUSTER_DIRECTORY = os.environ.get("FSD_TEST_CLUSTERS", tempfile.gettempdir())
"""Where the clusters of the tests lie: a directory with some 10 GB of space."""


@contextmanager
def running_cluster(*, servers: int = 3, replicas: int = 2, options: tuple[str, ...] = ()) -> Iterator[FsdCluster]:
    """A new cluster, mounted; ended and removed afterwards."""
    base = Path(tempfile.mkdtemp(prefix="fsd-cluster-", dir=CLUSTER_DIRECTORY))
    cluster = FsdCluster(base, servers=servers, replicas=replicas, options=options)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.destroy()


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[FsdCluster | None]:
    """The one cluster of all tests that break nothing; no log of it may tell of an error."""
    if OTHER_DIRECTORY:
        yield None
        return
    with running_cluster() as cluster:
        yield cluster
        assert cluster.complaints() == []


@contextmanager
def new_place(cluster: FsdCluster | None) -> Iterator[Place]:
    """An empty directory, removed afterwards."""
    base = cluster.mountpoint if cluster else OTHER_DIRECTORY
    directory = Path(tempfile.mkdtemp(prefix="test-", dir=base))
    directory.chmod(0o755)
    try:
        yield Place(directory, remount=cluster.remount if cluster else lambda: None, cluster=cluster)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place(shared_cluster: FsdCluster | None) -> Iterator[Place]:
    """An empty directory on the file system under test, for one test."""
    with new_place(shared_cluster) as made:
        yield made


@pytest.fixture(scope="module")
def module_place(shared_cluster: FsdCluster | None) -> Iterator[Place]:
    """An empty directory on the file system under test, for all tests of a module."""
    with new_place(shared_cluster) as made:
        yield made


@pytest.fixture
def cluster() -> Iterator[FsdCluster]:
    """A cluster of the test's own, to break."""
    if OTHER_DIRECTORY:
        pytest.skip("this test breaks a cluster of fsd; it has nothing to say about another directory")
    with running_cluster() as made:
        yield made
