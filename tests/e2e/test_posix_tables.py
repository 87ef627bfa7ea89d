"""The POSIX tables (tests/posix) on the mount and, as their oracle, on ext4: every row holds on both.

The rows say what is expected; that ext4 keeps each of them shows that the expectation is Linux's and not ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import OTHER_DIRECTORY
from tests.e2e.places import Place
from tests.posix.features import FEATURES, Features
from tests.posix.table import Row, Table, Wrong, run
from tests.posix.tables import TABLES, run_table
from tests.support.cluster import FRONTEND

pytestmark = pytest.mark.mounted

IMAGE_SIZE = 512 << 20
MOUNTED_AS = None if OTHER_DIRECTORY else FRONTEND


@pytest.fixture(scope="module")
def ext4() -> Iterator[Path]:
    """An ext4 of its own, in a file, with the options that every Linux has."""
    base = Path(tempfile.mkdtemp(prefix="fsd-ext4-"))  # Not below pytest's own, which no user of the tables can reach.
    base.chmod(0o755)
    image, mountpoint = base / "image", base / "mnt"
    with open(image, "wb") as file:
        file.truncate(IMAGE_SIZE)
    mountpoint.mkdir()
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)
        shutil.rmtree(base)


@pytest.fixture(scope="module")
def ext4_features(ext4: Path) -> Features:
    return Features(ext4, "ext4")


@pytest.fixture(scope="module")
def mount_features(module_place: Place) -> Features:
    return Features(module_place.directory, MOUNTED_AS)


def test_ext4_offers_what_the_feature_table_says(ext4_features: Features) -> None:
    assert ext4_features.complaints == []


def test_the_mount_offers_what_the_feature_table_says(mount_features: Features) -> None:
    assert mount_features.complaints == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_ext4_keeps_every_row(table: Table, ext4: Path, ext4_features: Features) -> None:
    outcome = run_table(table, ext4, ext4_features)
    assert outcome.failures == []
    assert outcome.passed


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_mount_keeps_every_row(table: Table, module_place: Place, mount_features: Features) -> None:
    outcome = run_table(table, module_place.directory, mount_features)
    assert outcome.failures == []


def test_rows_name_only_features_that_are_probed_for() -> None:
    assert {name for table in TABLES for row in table for name in row.needs} <= FEATURES.keys()


def test_names_of_rows_are_unique() -> None:
    for table in TABLES:
        names = [row.name for row in table]
        assert sorted(names) == sorted(set(names))


WRONG = (
    Row("another errno", "file x", "mkdir x", "ENOTDIR"),
    Row("success where none is", "", "mkdir x/y"),
    Row("an errno where none is", "", "mkdir x", "EEXIST"),
    Row("another value", "symlink t x", "readlink x", "u"),
    Row("another mode", "file x 0644", "chmod x 0600", "ok", "x mode=0644"),
    Row("another type", "", "mkdir x", "ok", "x file"),
    Row("a name that is there", "", "mkdir x", "ok", "x absent"),
    Row("a name that is not there", "dir x", "rmdir x", "ok", "x dir"),
    Row("a time that moved", "file x", "chmod x 0600", "ok", "x -c"),
    Row("a time that did not move", "file x", "chmod x 0600", "ok", "x +m"),
    Row("a set time", "file x", "utimens x 1 2", "ok", "x mtime=3"),
    Row("an old inode", "file x;utimens x 1 2", "stat x", "ok", "x fresh"),
    Row("another inode", "file x;file y", "stat x", "ok", "x same=y"),
    Row("a link count", "file x;link x y", "stat x", "ok", "x nlink=1"),
)


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row.name)
def test_a_wrong_row_is_found(row: Row, tmp_path: Path) -> None:
    """The net itself: each kind of promise, broken."""
    with pytest.raises(Wrong):
        run(row, tmp_path)
    assert os.listdir(tmp_path) == []
