"""Fixtures of the mounted tests.

FSD_TEST_DIRECTORY=DIR makes the tests that ask only for a `place` work below DIR instead of on a mount of fsd: a test
that passes there and fails on the mount has found a bug.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.places import Place


@pytest.fixture
def place() -> Iterator[Place]:
    """An empty directory on the file system under test."""
    other = os.environ.get("FSD_TEST_DIRECTORY")
    assert other
    directory = Path(tempfile.mkdtemp(prefix="fsd-test-", dir=other))
    directory.chmod(0o755)
    yield Place(directory, remount=lambda: None)
    shutil.rmtree(directory)
