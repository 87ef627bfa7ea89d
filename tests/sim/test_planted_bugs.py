"""The net is proven: bugs planted in the product, each found by several of the hundred seeds of the default run.

Which seeds find one changes with the product, as everything that happens in them does; so that no innocent change
fails a test here by bad luck, three times as many are tried before it is said that the net has a hole.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest

import metadata.core.exactly_once
from fsd.frontend.kernel_notifier import ThreadNotifier
from metadata.core.schema import SessionRecord
from metadata.core.sessions import Session, SessionTable
from metadata.lock_keeper import LockKeeper
from tests.sim.scenario import run_seed
from tests.sim.test_simulation import SEEDS, SEEDS_PER_TEST
from wire.errors import SessionExpired

Planted = Callable[[], AbstractContextManager[object]]


def no_invalidation() -> AbstractContextManager[object]:
    """Sharing begins, and the kernel keeps what it believes."""

    async def nothing(notifier: ThreadNotifier, nodeids: object, entries: object) -> None:
        """Tell the kernel nothing."""

    return mock.patch.object(ThreadNotifier, "invalidate_all", nothing)


def early_acknowledgement() -> AbstractContextManager[object]:
    """Somebody is let in before the others have dropped what they believe."""
    return mock.patch.object(SessionTable, "waits_for", return_value=[])


def no_fence() -> AbstractContextManager[object]:
    """What an ended session has sent is still done when it arrives."""
    speaking = SessionTable.speaking

    def all_may_speak(table: SessionTable, session: int, connection: int) -> Session:
        try:
            return speaking(table, session, connection)
        except SessionExpired:
            return Session(session, SessionRecord("", "", b"", "", 0, 0), 0.0, False, None)

    return mock.patch.object(SessionTable, "speaking", all_may_speak)


def twice() -> AbstractContextManager[object]:
    """A retry is carried out again."""
    return mock.patch.object(metadata.core.exactly_once, "_kept", return_value=None)


def no_grace() -> AbstractContextManager[object]:
    """After a restart locks are granted at once, and those who held them reclaim them afterwards."""
    return mock.patch.object(LockKeeper, "_refuse_in_grace", return_value=None)


@pytest.mark.parametrize("plant", [no_invalidation, early_acknowledgement, no_fence, twice, no_grace])
def test_a_planted_bug_is_found(plant: Planted) -> None:
    with plant():
        for seed in range(3 * SEEDS):
            if run_seed(seed).wrong:
                return
            if seed % SEEDS_PER_TEST == 0:
                gc.collect()
    raise AssertionError(f"{3 * SEEDS} seeds have not found it")
