"""Clients whose link is cut, or which stand still, for longer than their lease; a service that is killed.

Whoever is not concerned goes on within a bounded time, and nobody is shown what is no longer so.  Each machine is a
network namespace (tests/support/netns.py); A is the client that something happens to, B the other.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.history.check import check
from tests.history.record import History, Lost
from tests.history.runner import Plan, agents, new_views
from tests.support.bare_cluster import BareCluster, Part, bare_cluster
from tests.support.cluster import wait_until
from tests.support.netns import Client, network

pytestmark = pytest.mark.mounted

LEASE_S = 3.0
RECALL_S = 1.0
"""What a session gets beyond its lease before the service is sure that it is over."""
SLACK_S = 3.0
"""For a machine that is busy with other tests: processes of Python that want the same two processors."""
WAIT_MAX_S = LEASE_S + RECALL_S + SLACK_S
WITHOUT_LOCKS = {"flock": 0, "plock": 0}
"""Who lost his session has lost his locks, without being told yet (docs/explanation/locks.md)."""
NAMES_ONLY = {**WITHOUT_LOCKS, **dict.fromkeys(("read", "readall", "write", "append", "truncate", "fsync"), 0)}


@dataclass
class World:
    """A cluster on three machines."""

    cluster: BareCluster
    service: Part
    a: Part
    b: Part
    mounts: list[Path]
    link_a: Client

    def session_lost(self, since: int) -> Lost:
        """Wait until the service has ended A's session, which was well at `since` (ns)."""
        before = self.ended_count
        wait_until(lambda: self.ended_count > before, f"the session of A is over\n{self.cluster.logs()}")
        return Lost("a", since, time.monotonic_ns())

    @property
    def ended_count(self) -> int:
        """How many sessions the service has ended so far."""
        return len(re.findall(r"session-expired", self.service.log.read_text()))

    def settled(self) -> None:
        """Wait until both mounts answer, and see each other's names."""
        name = f"settled-{time.monotonic_ns()}"
        (self.mounts[0] / name).touch()
        assert (self.mounts[1] / name).exists()
        (self.mounts[1] / name).unlink()


ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
    here.bind(("10.77.0.1", 7))
    print("ready", flush=True)
    while True:
        data, sender = here.recvfrom(100)
        print(data.decode(), flush=True)
        here.sendto(data, sender)
"""
ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
    here.settimeout(0.3)
    here.sendto(sys.argv[1].encode(), ("10.77.0.1", 7))
    try:
        print(here.recv(100).decode())
    except TimeoutError:
        print("silence")
"""


def test_a_link_is_cut_in_the_directions_that_were_asked_for_and_heals() -> None:
    with network(1) as net:
        (client,) = net.clients
        argv = net.service.command(sys.executable, "-c", ECHO)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as echo:
            try:
                assert echo.stdout is not None
                assert echo.stdout.readline() == "ready\n"
                heard = []
                for word, to_service, to_client in (
                    ("well", False, False),
                    ("deaf", False, True),
                    ("dumb", True, False),
                    ("both", True, True),
                    ("healed", False, False),
                ):
                    client.heal()
                    client.cut(to_service=to_service, to_client=to_client)
                    heard.append(client.machine.run(sys.executable, "-c", ASK, word).strip())
                assert heard == ["well", "silence", "silence", "silence", "healed"]
                assert [echo.stdout.readline().strip() for _ in range(3)] == ["well", "deaf", "healed"]
            finally:
                echo.kill()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with network(2) as net, bare_cluster(net) as cluster:
        service = cluster.service(lease_s=LEASE_S)
        a, mount_a = cluster.mount("a", machine=net.clients[0].machine)
        b, mount_b = cluster.mount("b", machine=net.clients[1].machine)
        yield World(cluster, service, a, b, [mount_a, mount_b], net.clients[0])


@pytest.fixture
def healthy(world: World) -> Iterator[World]:
    """It is so before each test, and made so after it."""
    world.settled()
    yield world
    world.a.signal(signal.SIGCONT)
    world.link_a.heal()


def longest_s(history: History, mount: str) -> float:
    """The longest call on a mount; one that never returned counts as for ever."""
    calls = [call for call in history.calls if call.mount == mount]
    assert len(calls) > 50, "the programs of that mount have hardly done anything"
    return max((float("inf") if call.end is None else (call.end - call.start) / 1e9) for call in calls)


def judged(history: History, keep: Path, world: World) -> None:
    """One order explains it, and B has not waited longer than is configured."""
    history.save(keep / "history.jsonl")
    verdict = check(history)
    assert verdict.good, f"python -m tests.history check {keep / 'history.jsonl'}\n{verdict}\n{world.cluster.logs()}"
    waited_s = longest_s(history, "b")
    assert waited_s <= WAIT_MAX_S, f"B waited {waited_s:.1f} s\n{world.cluster.logs()}"


def until(condition_ns: int) -> None:
    """Wait until a time (ns)."""
    wait_until(lambda: time.monotonic_ns() >= condition_ns, "time goes on")


def cut_off(world: World, keep: Path, *, to_service: bool, to_client: bool, weights: dict[str, int]) -> None:
    """A's link is cut until its session is over, and for a second more."""
    plan = Plan(seed=1, seconds=LEASE_S + 4, weights=weights)
    with agents(new_views(world.mounts), plan) as working:
        began = time.monotonic_ns()
        until(began + 700_000_000)
        since = time.monotonic_ns()
        world.link_a.cut(to_service=to_service, to_client=to_client)
        working.lost.append(world.session_lost(since))
        until(time.monotonic_ns() + 1_000_000_000)
        world.link_a.heal()
        judged(working.finish(), keep, world)


def test_a_client_that_is_cut_off_both_ways_delays_others_for_its_lease_and_shows_nothing_stale(
    healthy: World, tmp_path: Path
) -> None:
    cut_off(healthy, tmp_path, to_service=True, to_client=True, weights=NAMES_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to_service", "to_client"])
def test_a_client_that_is_cut_off_one_way_delays_others_for_its_lease_and_shows_nothing_stale(
    direction: str, healthy: World, tmp_path: Path
) -> None:
    to_service = direction == "to_service"
    cut_off(healthy, tmp_path, to_service=to_service, to_client=not to_service, weights=NAMES_ONLY)


def stand_still(world: World, keep: Path, *, with_programs: bool, weights: dict[str, int]) -> None:
    """A's daemon, and maybe its programs, are stopped until the session is over, and for a second more."""
    plan = Plan(seed=2, seconds=LEASE_S + 4, weights=weights)
    with agents(new_views(world.mounts), plan) as working:
        programs = working.of_mount("a") if with_programs else []
        until(time.monotonic_ns() + 700_000_000)
        since = time.monotonic_ns()
        for one in programs:
            one.send_signal(signal.SIGSTOP)
        world.a.signal(signal.SIGSTOP)
        working.lost.append(world.session_lost(since))
        until(time.monotonic_ns() + 1_000_000_000)
        world.a.signal(signal.SIGCONT)
        for one in programs:
            one.send_signal(signal.SIGCONT)
        judged(working.finish(), keep, world)


def test_a_daemon_that_stands_still_delays_others_for_its_lease_and_its_kernel_shows_nothing_stale(
    healthy: World, tmp_path: Path
) -> None:
    stand_still(healthy, tmp_path, with_programs=False, weights=NAMES_ONLY)


@pytest.mark.slow
def test_a_machine_that_stands_still_delays_others_for_its_lease_and_shows_nothing_stale_when_it_goes_on(
    healthy: World, tmp_path: Path
) -> None:
    stand_still(healthy, tmp_path, with_programs=True, weights=NAMES_ONLY)


def test_a_service_that_is_killed_and_started_again_fails_no_call_and_shows_nothing_stale(
    healthy: World, tmp_path: Path
) -> None:
    with agents(new_views(healthy.mounts), Plan(seed=3, seconds=5, weights=NAMES_ONLY)) as working:
        until(time.monotonic_ns() + 1_000_000_000)
        healthy.service.signal(signal.SIGKILL)
        healthy.service.restart()
        history = working.finish()
    judged(history, tmp_path, healthy)
    assert longest_s(history, "a") <= WAIT_MAX_S
    failed = [call for call in history.calls if not call.known]
    assert not failed, f"{failed[0]}\n{healthy.cluster.logs()}"
