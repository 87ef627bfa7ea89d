"""LMDB on a disk that fills up, or that fails: nothing acknowledged is lost, and the engine goes on.

Each test mounts a small file system of its own; that takes root, not FUSE.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from metadata import protocol
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import Engine, EngineBroken, EngineFault
from tests.support.store import SESSION, Store
from wire.errors import NoRoom, NoSpace, StoreError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    yield place
    run("umount", str(place))


@pytest.fixture
def lying_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 256 MiB on an image for which only 24 MiB are there: write(2) succeeds, the flush fails.

    The journal then makes the file system read-only, as on a disk that fails.
    """
    below, place = tmp_path / "below", tmp_path / "ext4"
    below.mkdir()
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(below))
    image = below / "image"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    run("mkfs.ext4", "-q", str(image))
    run("mount", "-o", "loop", str(image), str(place))
    yield place
    run("umount", str(place))
    run("umount", str(below))


def write(engine: Engine, number: int) -> None:
    with engine.write() as txn:
        for part in range(16):
            txn.put(b"%06d/%02d" % (number, part), b"%d" % number * 2000)
        txn.commit()


def numbers(engine: Engine) -> list[int]:
    with engine.read() as txn:
        return numbers_in(txn.scan(b"\0", b"\xff", 1 << 30))


def fill(path: Path) -> None:
    """Write into a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def create_until_refused(store: Store, names: list[bytes]) -> None:
    while True:
        name = b"%d" % len(names)
        store.create(name)
        names.append(name)


def numbers_in(pairs: list[tuple[bytes, bytes]]) -> list[int]:
    """The whole batches that are there; every value must be what was written."""
    for key, value in pairs:
        assert value == b"%d" % int(key[:6]) * 2000
    found = [int(key[:6]) for key, _ in pairs[::16]]
    assert len(pairs) == 16 * len(found)
    return found


def write_until_it_fails(engine: Engine) -> tuple[int, StoreError]:
    for number in range(10_000):
        try:
            write(engine, number)
        except StoreError as error:
            return number, error
    raise AssertionError("the disk never failed")


def test_a_full_disk_refuses_the_batch_and_the_engine_goes_on(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    with closing(LmdbEngine(small_disk / "engine")) as engine:
        count, error = write_until_it_fails(engine)
        assert isinstance(error, NoSpace)
        assert numbers(engine) == list(range(count))
        with pytest.raises(NoSpace):
            write(engine, count)
        ballast.unlink()
        write(engine, count)
        assert numbers(engine) == list(range(count + 1))
    with closing(LmdbEngine(small_disk / "engine")) as again:
        assert numbers(again) == list(range(count + 1))


def test_on_a_full_disk_files_can_be_removed_and_then_made_again(small_disk: Path) -> None:
    """Another program takes every last byte; the reserve must serve removals, one transaction each."""
    with closing(LmdbEngine(small_disk / "engine")) as engine:
        store = Store(engine)
        names = [b"%d" % number for number in range(150)]
        for name in names:
            store.change(protocol.WriteInline(SESSION, 1, store.create(name), 0, bytes(9000), 0))
        fill(small_disk / "ballast")
        with pytest.raises(NoRoom):
            create_until_refused(store, names)
        fill(small_disk / "more-ballast")
        for name in names:
            store.unlink(name, closed_ino=store.lookup(name))
        assert engine.statistics().tight
        assert store.names() == set()
        (small_disk / "ballast").unlink()
        assert store.create(b"again")
        assert not engine.statistics().tight


def test_a_disk_whose_flush_fails_takes_nothing_that_was_acknowledged(lying_disk: Path) -> None:
    with closing(LmdbEngine(lying_disk / "engine")) as engine:
        count, error = write_until_it_fails(engine)
        assert isinstance(error, NoSpace | EngineFault | EngineBroken)
        assert count > 10
        assert numbers(engine) == list(range(count))
    with (lying_disk / "engine" / "data.mdb").open("rb") as file:  # What counts is what the disk has.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with lmdb.open(str(lying_disk / "engine"), readonly=True, lock=False) as left, left.begin() as txn:
        assert numbers_in(list(txn.cursor())) == list(range(count))
