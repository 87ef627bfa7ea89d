"""Seeds of the simulation: nothing may be wrong with any; and what makes a failing one worth something: the replay is
exact.
"""

from __future__ import annotations

import gc

import pytest

from tests.sim.__main__ import command
from tests.sim.scenario import DEFAULT, FAULTS, Shape, run_seed
from tests.support.effort import EFFORT

SEEDS_PER_TEST = 20
SEEDS = 100 * EFFORT
"""Of the default run: some seconds on a quiet machine; `scripts/sim --seconds 100` goes through thousands."""


def run_seeds(first: int, count: int, shape: Shape = DEFAULT) -> None:
    for seed in range(first, first + count):
        result = run_seed(seed, shape)
        assert not result.wrong, "\n".join(
            [f"seed {seed}: {'; '.join(result.faults)}", *result.wrong, f"again: {command(seed, shape)}"]
        )
    gc.collect()


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_every_call_is_explained_and_everything_goes_on_after_the_faults(first: int) -> None:
    run_seeds(first, SEEDS_PER_TEST)


@pytest.mark.slow
def test_thousands_of_seeds() -> None:
    run_seeds(10_000, 2_000 * EFFORT)


@pytest.mark.slow
def test_long_scenarios() -> None:
    run_seeds(20_000, 50 * EFFORT, Shape(mounts=3, programs=2, calls=30, faults=5))


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_does_the_same_each_time(seed: int) -> None:
    once, again = run_seed(seed), run_seed(seed)
    assert once.lines == again.lines
    assert once.digest == again.digest


def test_seeds_differ() -> None:
    assert len({run_seed(seed).digest for seed in range(4)}) == 4


def test_the_faults_of_a_hundred_seeds_are_of_every_kind() -> None:
    names = {fault.__name__ for fault in FAULTS}
    seen: set[str] = set()
    for seed in range(100):
        seen |= {fault.split()[0] for fault in run_seed(seed, Shape(mounts=1, programs=1, calls=0)).faults}
        if seen == names:
            return
    raise AssertionError(f"never: {names - seen}")
