"""Waiting for the device in the place of trio: whatever can make a task run ends the wait."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from fsd.frontend.direct import idle
from fsd.frontend.direct.idle import Idle, attach


@pytest.fixture
def device() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


@asynccontextmanager
async def attached(device: Pair) -> AsyncIterator[Idle]:
    found = attach(device[1].fileno())
    assert found is not None, "this trio has another inside: see fsd/frontend/direct/idle.py"
    try:
        yield found
    finally:
        found.detach()


async def test_a_request_ends_the_wait_and_leaves_no_turn_to_trio(device: Pair) -> None:
    async with attached(device) as found:
        assert await found.turn()
        device[0].send(b"x")
        assert found.wait() == (True, False)


async def test_a_request_that_comes_later_ends_the_wait(device: Pair) -> None:
    async with attached(device) as found:
        assert await found.turn()
        threading.Timer(0.05, lambda: device[0].send(b"x")).start()
        assert found.wait() == (True, False)


async def test_a_task_that_can_run_is_not_kept_waiting(device: Pair, nursery: trio.Nursery) -> None:
    async with attached(device) as found:
        nursery.start_soon(trio.lowlevel.checkpoint)
        assert found.must_give_way
        assert found.wait() == (False, True)
        device[0].send(b"x")
        assert found.wait() == (True, True)


async def test_tasks_of_the_same_turn_are_told_of_whichever_runs_first(device: Pair, nursery: trio.Nursery) -> None:
    """A task that was taken out of the queue and has not run yet must never be blocked out."""
    async with attached(device) as found:
        turns = 0

        async def busy() -> None:
            nonlocal turns
            for _ in range(50):
                turns += 1
                await trio.lowlevel.checkpoint()

        nursery.start_soon(busy)
        while turns < 50:
            assert not await found.turn()
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert await found.turn()


async def test_a_deadline_ends_the_wait(device: Pair) -> None:
    async with attached(device) as found:
        before = time.monotonic()
        with trio.move_on_after(0.05) as scope:
            while True:
                if await found.turn():
                    found.wait()
        assert scope.cancelled_caught
        assert time.monotonic() - before >= 0.05


async def test_a_deadline_that_passes_in_the_same_moment_is_somebody_s_turn(
    device: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio looks at the deadlines after it has told how many tasks can run."""
    async with attached(device) as found:
        monkeypatch.setattr(found, "_next_deadline", trio.current_time)
        assert not await found.turn()


async def test_a_socket_of_another_task_ends_the_wait(device: Pair, nursery: trio.Nursery) -> None:
    far, near = socket.socketpair()
    with far, near:
        was_read = trio.Event()

        async def read() -> None:
            await trio.lowlevel.wait_readable(near)
            was_read.set()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        async with attached(device) as found:
            assert await found.turn()
            threading.Timer(0.05, lambda: far.send(b"x")).start()
            assert found.wait() == (False, True)
            assert not await found.turn()
            await trio.lowlevel.checkpoint()
            assert was_read.is_set()


async def test_a_thread_that_calls_back_ends_the_wait(device: Pair) -> None:
    called: list[str] = []
    token = trio.lowlevel.current_trio_token()
    threading.Timer(0.05, lambda: token.run_sync_soon(called.append, "here")).start()
    async with attached(device) as found:
        while True:
            is_alone = await found.turn()
            if called:
                break
            if is_alone:
                found.wait()


async def test_a_device_that_hangs_up_ends_the_wait() -> None:
    read_end, write_end = os.pipe()
    try:
        found = attach(read_end)
        assert found is not None
        assert await found.turn()
        os.close(write_end)
        assert found.wait() == (True, False)
        found.detach()
    finally:
        os.close(read_end)


async def test_who_waits_for_all_tasks_to_be_blocked_is_not_kept_waiting(device: Pair, nursery: trio.Nursery) -> None:
    async with attached(device) as found:
        assert await found.turn()
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)
        for _ in range(3):
            assert not await found.turn()


async def test_a_clock_that_jumps_is_left_to_trio(device: Pair, autojump_clock: trio.testing.MockClock) -> None:
    assert attach(device[1].fileno()) is None


async def test_another_trio_is_left_to_itself(device: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        runner: Any = SimpleNamespace(is_guest=False, clock_autojump_threshold=math.inf)

    with monkeypatch.context() as patched:
        patched.setattr(idle.trio._core._run, "GLOBAL_RUN_CONTEXT", Empty)  # type: ignore[attr-defined]
        assert attach(device[1].fileno()) is None
