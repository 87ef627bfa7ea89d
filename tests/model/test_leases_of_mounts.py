"""Two mounts under leases, with models of the service and of the kernels: nobody is shown anything stale, whatever the
order of answers and recalls; and each planted bug is found.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import trio
import trio._core._run as trio_run
import trio.testing

from fsd.file_layout import FileLayout
from tests.support.lease_world import LeaseWorld, Stale, plant_belief_in_older_answers

SEEDS = range(40)
STEPS = 40


def run_world(seed: int, prepare: Callable[[LeaseWorld], None] = lambda world: None) -> None:
    """Raises Stale, if somebody was shown something stale."""

    async def run() -> None:
        world = LeaseWorld(seed)
        async with world.running():
            prepare(world)
            with trio.fail_after(120):  # Of the mock clock: nobody hangs.
                await world.run(STEPS)

    # The seed is to decide everything: also the order in which trio runs tasks (tests/sim/seams.py has the canary).
    with mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        trio_run._r.seed(seed)
        trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_is_shown_is_older_than_what_has_returned(seed: int) -> None:
    run_world(seed)


def is_found(prepare: Callable[[LeaseWorld], None]) -> bool:
    """Whether some seed shows something stale."""
    for seed in SEEDS:
        try:
            run_world(seed, prepare)
        except BaseExceptionGroup as group:
            if group.subgroup(Stale) is None:
                raise
            return True
    return False


def only_modes(world: LeaseWorld) -> None:
    """Programs look at attributes, and change them, all the time."""
    world.changed = world.seen = ("mode",)


@pytest.mark.parametrize("kind", ["drops_pages", "drops_names", "drops_attributes"])
def test_a_skipped_invalidation_is_found(kind: str) -> None:
    def skip(world: LeaseWorld) -> None:
        for kernel in world.kernels:
            setattr(kernel, kind, False)

    assert is_found(skip)


def test_an_acknowledgement_before_the_kernel_has_dropped_is_found() -> None:
    def hurry(world: LeaseWorld) -> None:
        world.service.waits_for_kernels = False

    assert is_found(hurry)


def test_a_fact_believed_that_was_asked_for_before_the_recall_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_belief_in_older_answers(monkeypatch)
    assert is_found(only_modes)


def test_a_layout_believed_that_was_asked_for_before_the_recall_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_only(self: FileLayout) -> None:
        self.forget()

    monkeypatch.setattr(FileLayout, "doubt", forget_only)
    assert is_found(lambda world: None)
