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

OTHER_DIRECTORY = os.environ.get("FSD_TEST_DIRECTORY")


@contextmanager
def new_place() -> Iterator[Place]:
    """An empty directory, removed afterwards."""
    assert OTHER_DIRECTORY
    directory = Path(tempfile.mkdtemp(prefix="test-", dir=OTHER_DIRECTORY))
    directory.chmod(0o755)
    try:
        yield Place(directory, remount=lambda: None)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place() -> Iterator[Place]:
    """An empty directory on the file system under test, for one test."""
    with new_place() as made:
        yield made


@pytest.fixture(scope="module")
def module_place() -> Iterator[Place]:
    """An empty directory on the file system under test, for all tests of a module."""
    with new_place() as made:
        yield made
