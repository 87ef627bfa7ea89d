"""Clients whose link is cut, or which stand still, for longer than their lease; a service that is killed.

Whoever is not concerned goes on within a bounded time, and nobody is shown what is no longer so.  Each machine is a
network namespace (tests/support/netns.py); A is the client that something happens to, B the other.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.history.agent import CELL
from tests.history.check import check
from tests.history.record import Call, History, Lost, numbered
from tests.history.runner import Plan, agents, new_views
from tests.support.bare_cluster import BareCluster, Part, bare_cluster
from tests.support.cluster import wait_until
from tests.support.netns import Client, Network, network

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


def started(cluster: BareCluster, net: Network, bugs: Sequence[str] = ()) -> World:
    """The service, maybe with bugs, and both mounts, each on its machine."""
    service = cluster.service(lease_s=LEASE_S, bugs=bugs)
    a, mount_a = cluster.mount("a", machine=net.clients[0].machine)
    b, mount_b = cluster.mount("b", machine=net.clients[1].machine)
    return World(cluster, service, a, b, [mount_a, mount_b], net.clients[0])


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with network(2) as net, bare_cluster(net) as cluster:
        yield started(cluster, net)


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


LATE_S = 8.0
"""Within which TCP has sent again what a link cut for a lease has swallowed; its pauses double, from 0.2 s."""


WRITER = """
import errno, json, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
sys.stdin.readline()
token = int(sys.argv[2])
for kind, do in ("write", lambda: os.pwrite(fd, b"%016d" % token, 0)), ("fsync", lambda: os.fsync(fd)):
    start, error = time.monotonic_ns(), None
    try:
        do()
    except OSError as raised:
        error = errno.errorcode[raised.errno]
    print(json.dumps([kind, start, time.monotonic_ns(), error]), flush=True)
"""
READER = """
import sys, time
start = time.monotonic_ns()
with open(sys.argv[1]) as file:
    print(int(file.read(16)), start, time.monotonic_ns())
"""


class Notes:
    """A history of programs on one file; no descriptor of it is the test's, whose children would close it once more."""

    def __init__(self) -> None:
        self.history = History([], CELL)

    def note(self, mount: str, kind: str, args: dict[str, Any], start: int, end: int) -> Call:
        made = Call(0, mount + "0", mount, kind, {"ino": 1, **args}, start, end)
        self.history.calls.append(made)
        return made

    @contextlib.contextmanager
    def writer(self, mount: str, file: Path, token: int) -> Iterator[Callable[[], None]]:
        """A program that has the file open; it writes and syncs when it is told to, and has done so at the end."""
        argv = [sys.executable, "-S", "-c", WRITER, str(file), str(token)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            assert program.stdout.readline() == "open\n"
            go = program.stdin
            try:
                yield lambda: print("go", file=go, flush=True)
                for line in program.stdout:
                    kind, start, end, error = json.loads(line)
                    args = {"cell": 0, "token": token} if kind == "write" else {}
                    self.note(mount, kind, args, start, end).error = error
            finally:
                program.kill()

    def write(self, mount: str, file: Path, token: int) -> None:
        """Open, write, fsync, close."""
        with self.writer(mount, file, token) as go:
            go()

    def read(self, mount: str, file: Path) -> int:
        """Open, read, close."""
        argv = [sys.executable, "-S", "-c", READER, str(file)]
        told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        token, start, end = map(int, told.split())
        self.note(mount, "read", {"cell": 0}, start, end).value["token"] = token
        return token


def late_write(bugs: Sequence[str]) -> History:
    """A's write is on its way when the link is cut, and arrives after A's session has ended and B has written."""
    notes = Notes()
    with network(2) as net, bare_cluster(net) as cluster:
        world = started(cluster, net, bugs)
        files = [mount / "file" for mount in world.mounts]
        files[0].touch()
        notes.write("a", files[0], 1)
        with notes.writer("a", files[0], 2) as write_late:
            world.link_a.cut(to_client=False)
            since = time.monotonic_ns()
            write_late()
            notes.history.lost.append(world.session_lost(since))
            notes.read("b", files[1])
            notes.write("b", files[1], 3)
            world.link_a.heal()
        until_ns = time.monotonic_ns() + round(LATE_S * 1e9)
        while notes.read("b", files[1]) != 2 and time.monotonic_ns() < until_ns:
            until(time.monotonic_ns() + 100_000_000)
        sys.stdout.write(cluster.logs())  # Shown if the test fails.
    notes.history.calls = numbered(notes.history.calls)
    return notes.history


@pytest.mark.slow  # Its plant was missed once in a whole run; test_fencing.py catches the same plant.
def test_a_late_write_of_an_ended_session_is_caught_where_the_service_takes_it() -> None:
    verdict = check(late_write(["ended_sessions_may_change"]))
    assert [one.title for one in verdict.violations] == ["the content of inode 1"], str(verdict)


@pytest.mark.slow
def test_a_late_write_of_an_ended_session_changes_nothing() -> None:
    verdict = check(late_write([]))
    assert verdict.good, str(verdict)
