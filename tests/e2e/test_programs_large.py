"""What is large: a file of 2 GiB, a directory of 100,000 files; and how little memory the FUSE daemon needs for it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.cluster import LocalCluster
from tests.support.programs import file_digest, memory_peak, run
from tests.support.twin import pattern

pytestmark = pytest.mark.mounted

MIB = 1 << 20
FILE_SIZE = 2 << 30
CREATOR_COUNT = 4


BUDGET = 512 * MIB
"""Of a mount for which nothing else was said."""
BESIDES_BUDGET = 150 * MIB
"""What a FUSE daemon may need beyond its budget: interpreter, libraries, tables."""


def assert_memory_kept(place: Place) -> None:
    """The FUSE daemon has never had more memory than its budget and what it needs besides."""
    if place.cluster:
        assert memory_peak(place.cluster.process("mount").pid) < BUDGET + BESIDES_BUDGET


def test_two_gibibytes_come_back_with_the_same_hash_after_a_remount(place: Place) -> None:
    path = place.directory / "large"
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for number in range(FILE_SIZE // MIB):
            piece = b"%016d" % number + pattern(number % 16, MIB - 16)
            digest.update(piece)
            assert file.write(piece) == MIB
    assert_memory_kept(place)
    place.remount()
    assert path.stat().st_size == FILE_SIZE
    assert file_digest(path) == digest.hexdigest()
    assert_memory_kept(place)


def create_files(directory: str, first: int, count: int) -> None:
    """One creator's share."""
    for number in range(first, count, CREATOR_COUNT):
        os.close(os.open(f"{directory}/file-{number:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def remove_files(directory: str, first: int, count: int) -> None:
    """One remover's share."""
    for number in range(first, count, CREATOR_COUNT):
        os.unlink(f"{directory}/file-{number:06d}")


def in_parallel(work: object, directory: Path, *more: int) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(str(directory), number, *more)) for number in range(CREATOR_COUNT)]  # type: ignore[arg-type]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_thousand_files_in_one_directory_are_listed_and_removed(place: Place, count: int) -> None:
    in_parallel(create_files, place.directory, count)
    expected = [f"file-{number:06d}" for number in range(count)]
    assert sorted(os.listdir(place.directory)) == expected
    place.remount()
    assert run("ls", place.directory).split() == expected
    assert (place.directory / expected[12_345]).exists()
    assert not (place.directory / f"file-{count:06d}").exists()
    in_parallel(remove_files, place.directory, count)
    assert os.listdir(place.directory) == []


def write_and_read(directory: str, number: int) -> None:
    """One busy program: a sequential write, a sequential read, random reads and writes."""
    size, rnd = 96 * MIB, random.Random(number)
    with open(f"{directory}/{number}", "w+b", buffering=0) as file:
        file.writelines(pattern(index % 16, MIB) for index in range(size // MIB))
        for _ in range(200):
            offset = rnd.randrange(size - 70_000)
            os.pwrite(file.fileno(), b"r" * 70_000, offset)
            assert os.pread(file.fileno(), 70_000, offset) == b"r" * 70_000
        os.fsync(file.fileno())
        file.seek(0)
        read = 0
        while piece := file.read(MIB):
            read += len(piece)
        assert read == size


def test_a_mount_with_a_small_budget_keeps_to_it(victim: LocalCluster) -> None:
    budget = 64 * MIB
    flags = ("--budget-mib", str(budget // MIB))
    victim.remount(*flags)
    in_parallel(write_and_read, victim.mountpoint)
    assert memory_peak(victim.process("mount").pid) < budget + BESIDES_BUDGET
    victim.remount(*flags)
    for number in range(CREATOR_COUNT):
        assert len((victim.mountpoint / str(number)).read_bytes()) == 96 * MIB
    assert memory_peak(victim.process("mount").pid) < budget + BESIDES_BUDGET
