"""Sessions that end while their mount does not know: what each end may believe and do, at a real service."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from metadata import client as metadata_client
from metadata.protocol import GetAttr
from tests.support.inode_service import running_service
from wire.clocks import boot_time_s


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Return when it is so; the test fails when that takes too long."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 (it is far away)
            await trio.sleep(0.005)


class SuspendedClock:
    """Boot time of a machine that can be suspended, which trio's clock does not see."""

    def __init__(self) -> None:
        self.suspended_s = 0.0

    def __call__(self) -> float:
        return boot_time_s() + self.suspended_s


# --- the lease, by the client's clock ---------------------------------------------------------------------------------


async def test_a_suspended_machine_stops_acting_alone_with_its_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_client, "WATCH_TICK_S", 1000.0)
    events: list[bool] = []

    async def on_sharing(alone: bool) -> None:
        events.append(alone)

    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=60.0) as service,
        service.client(on_sharing=on_sharing, clock_s=clock) as client,
    ):
        await until(lambda: client.statistics().renewals > 0)
        assert client.alone
        assert client.lease_left_s() > 0
        clock.suspended_s += 3600.0
        await client.ask(lambda session: GetAttr(session, 1))
        await until(lambda: events == [False], timeout_s=1.0)
        assert client.statistics().lease_scares == 1


async def test_an_idle_mount_notices_that_its_machine_was_suspended(tmp_path: Path) -> None:
    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=60.0) as service,
        service.client(clock_s=clock) as client,
    ):
        await until(lambda: client.statistics().renewals > 0)
        clock.suspended_s += 3600.0
        await until(lambda: client.statistics().lease_scares == 1, timeout_s=3 * metadata_client.WATCH_TICK_S)


async def test_a_lease_that_was_over_by_the_clients_clock_runs_again_with_the_next_renewal(tmp_path: Path) -> None:
    clock = SuspendedClock()
    async with (
        running_service(tmp_path / "metadata", lease_s=4.0) as service,
        service.client(clock_s=clock) as client,
    ):
        session = client.session
        await until(lambda: client.statistics().renewals > 0)
        clock.suspended_s += 100.0
        assert client.lease_left_s() <= 0
        await until(lambda: client.lease_left_s() > 0)
        assert client.session == session


async def test_no_lease_notices_that_the_wall_clock_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running_service(tmp_path / "metadata", lease_s=1.0) as service,
        service.client(b"/a") as first,
        service.client(b"/b") as second,
    ):
        real = time.time_ns
        ahead_ns = 0
        monkeypatch.setattr(time, "time_ns", lambda: real() + ahead_ns)
        monkeypatch.setattr(time, "time", lambda: (real() + ahead_ns) / 1e9)
        for hours in (5, -5, 48):
            ahead_ns = hours * 3600 * 10**9
            wanted = first.statistics().renewals + 2
            await until(lambda: first.statistics().renewals >= wanted)  # noqa: B023 (within its turn)
            await second.ask(lambda session: GetAttr(session, 1))
        for client in (first, second):
            assert client.statistics().sessions_lost == 0
            assert client.statistics().lease_scares == 0
