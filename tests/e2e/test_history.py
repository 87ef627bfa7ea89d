"""Random programs on two mounts of one cluster: one order explains all that they were answered.

`tests/history` tells how; a failing test prints the calls that nothing explains, and where the history is kept.  That
the net holds is proved with bugs, planted into a daemon or the service (tests/support/planted.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.history.check import Verdict, check
from tests.history.record import UNKNOWN, History
from tests.history.runner import Plan, agents, new_views, run
from tests.support.bare_cluster import BareCluster, bare_cluster

pytestmark = pytest.mark.mounted

LEASE_S = 5.0
NO_CONTENT = dict.fromkeys(("read", "readall", "write", "append", "truncate", "fsync", "flock", "plock"), 0)
"""Weights of a plan that is about names."""
NAMES = ("n0", "n1", "n2", "n3")


def explained(history: History, keep: Path) -> Verdict:
    """Fail, with the calls in question, unless one order explains the history and no call has failed."""
    history.save(keep / "history.jsonl")
    verdict = check(history)
    told = f"seed {history.seed}: python -m tests.history check {keep / 'history.jsonl'}\n{verdict}"
    assert verdict.good, told
    failed = [call for call in history.calls if call.error in UNKNOWN or call.end is None]
    assert not failed, f"{failed[0]}\n{told}"
    return verdict


@pytest.fixture(scope="module")
def cluster() -> Iterator[BareCluster]:
    with bare_cluster() as made:
        made.service(lease_s=LEASE_S)
        yield made


@pytest.fixture(scope="module")
def two(cluster: BareCluster) -> list[Path]:
    return [cluster.mount("a")[1], cluster.mount("b")[1]]


def test_names_on_two_mounts_have_one_explanation(two: Sequence[Path], tmp_path: Path) -> None:
    history = run(new_views(two), Plan(seed=1, seconds=3, weights=NO_CONTENT))
    explained(history, tmp_path)
    assert len(history.calls) > 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_names_on_two_mounts_have_one_explanation_for_longer(seed: int, two: Sequence[Path], tmp_path: Path) -> None:
    explained(run(new_views(two), Plan(seed=seed, seconds=20, clients=3, weights=NO_CONTENT)), tmp_path)


@pytest.mark.parametrize("bug", ["no_name_dropped", "shares_before_the_drop"])
def test_a_mount_that_still_believes_what_it_knew_alone_is_caught(bug: str) -> None:
    """Mount A knows, for an hour, that names are not there; then B comes and makes them."""
    with bare_cluster() as made:
        made.service(lease_s=LEASE_S, with_blocks=False)
        a = made.mount("a", bugs=[bug])[1]
        views = new_views([a, a.parent / "mnt-b"])
        # A looks more often than it makes: who makes a name himself believes nothing old of it any more.
        plan = Plan(seed=1, seconds=2, clients=1, weights={**NO_CONTENT, "stat": 80, "rename": 0, "mkdir": 0})

        def learn() -> None:
            for directory in ("d0", "d1"):
                assert not any((views[0] / directory / name).exists() for name in NAMES)
            made.mount("b")

        with agents(views, plan, before=learn) as working:
            verdict = check(working.finish())
    assert [one.title for one in verdict.violations] == ["the tree of names"], str(verdict)
