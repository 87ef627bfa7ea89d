"""One file under random operations against a bytearray (tests/support/exerciser.py), on the mount.

FSD_TEST_EFFORT=N: N times as many operations, with other seeds.  By hand: `-m slow`, a million.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.posix.features import Features
from tests.support.effort import EFFORT
from tests.support.exerciser import Exerciser, Mismatch, exercise

pytestmark = pytest.mark.mounted

RUNS = (("small", 1, 40_000), ("small", 2, 35_000), ("medium", 3, 14_000), ("medium", 4, 8_000), ("large", 5, 3_000))
"""Shape, seed, operations: 100,000."""
SEEDS = range(1, EFFORT + 1)


def fresh(place: Place, name: str) -> Path:
    directory = place.directory / name
    directory.mkdir()
    return directory


@pytest.mark.parametrize(("shape", "seed", "count"), RUNS)
def test_a_file_is_what_was_written_whatever_is_done_to_it(shape: str, seed: int, count: int, place: Place) -> None:
    missing = Features(place.directory, None).missing
    for turn in SEEDS:
        exercise(fresh(place, f"turn-{turn}"), shape, seed * turn, count, missing)


@pytest.mark.parametrize("shape", ["small", "medium"])
def test_a_file_is_the_same_after_every_remount(shape: str, place: Place) -> None:
    missing = Features(place.directory, None).missing
    exercise(fresh(place, "remounted"), shape, EFFORT, 1_200, missing, interrupt=place.remount, every=300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
@pytest.mark.parametrize(("shape", "count"), [("small", 40_000), ("medium", 40_000), ("large", 20_000)])
def test_a_million_operations(shape: str, count: int, seed: int, place: Place) -> None:
    missing = Features(place.directory, None).missing
    exercise(fresh(place, "long"), shape, seed, count, missing, interrupt=place.remount, every=10_000)


@pytest.mark.parametrize("operation", ["write", "truncate", "map_write", "append", "direct_write", "copy_within"])
def test_an_operation_that_the_file_did_not_get_is_found(operation: str, tmp_path: Path) -> None:
    """The net itself: the model is changed behind the file's back, in one byte, by one kind of operation."""

    class Spoiled(Exerciser):
        def put(self, offset: int, data: bytes) -> None:
            spoiled = data[:-1] + bytes([data[-1] ^ 1]) if data and self.doing == operation else data
            super().put(offset, spoiled)

        def note(self, what: str) -> None:
            self.doing = what.split(" ")[0]
            super().note(what)

        def truncate(self) -> None:
            super().truncate()
            if operation == "truncate" and self.model:
                del self.model[-1:]

    missing = Features(tmp_path, None).missing
    exerciser = Spoiled(tmp_path, "small", 1, missing)
    with contextlib.closing(exerciser), pytest.raises(Mismatch, match="--seed 1"):
        exerciser.run(2_000)
