"""Waiting for the device without a turn of trio's loop, when nothing but the device could wake anybody.

A request that finds the daemon asleep would otherwise cost a read that finds nothing, an epoll_ctl, an epoll_wait and a
task switch: as much again as its answer (docs/reference/front-end-performance.md).  Here the task that reads the device
does the waiting: it polls the device *and* trio's own epoll descriptor, until the next of trio's deadlines.  Whatever
else makes a task runnable does so through that descriptor (sockets, threads, signals) or by a deadline, so nobody waits
for longer than in trio's loop.  Two conditions, both the caller's:

  - it waits only when `turn` has told that no other task was due in the same turn of trio's loop: tasks of a turn that
    has begun are in no queue that could be looked at;
  - it gives way (the next `turn`) as soon as `wait` or `must_give_way` says so.

trio has no public name for what this reads, so `attach` checks what it finds and returns None when trio's inside has
another shape: then requests cost more, and nothing else changes.
"""

from __future__ import annotations

import math
import select
from typing import Any, Final

import trio

WAIT_MAX_S: Final = 60.0
"""Of one poll, whatever the deadlines are."""


class Idle(trio.abc.Instrument):
    """The waiting of one device loop; `detach` when it ends."""

    def __init__(self, device: int, runner: Any) -> None:  # noqa: ANN401  # Private, so without a type.
        """`runner` is trio's; AttributeError if it is not what this knows."""
        self._runnable = runner.runq
        self._watchers = runner.waiting_for_idle
        self._next_deadline = runner.deadlines.next_deadline
        self._sleep_time = runner.clock.deadline_to_sleep_time
        self._device = device
        poll = select.poll()
        poll.register(device, select.POLLIN)
        poll.register(runner.io_manager._epoll.fileno(), select.POLLIN)
        self._poll = poll.poll
        self._is_turning = False
        self._was_alone = False
        self._next = 0.0

    def detach(self) -> None:
        """No more turns are told of."""
        trio.lowlevel.remove_instrument(self)

    @property
    def must_give_way(self) -> bool:
        """Whether a task can run."""
        return len(self._runnable) > 0

    async def turn(self) -> bool:
        """Let every task run that can; whether there was none, so that `wait` may be called."""
        self._is_turning = True
        await trio.lowlevel.checkpoint()
        if self._watchers:  # Somebody waits for all tasks to be blocked (trio.testing): this one must be seen to be.
            return False
        return self._was_alone and trio.current_time() < self._next

    def after_io_wait(self, timeout: float) -> None:
        """Of trio: what this turn is going to run is known now, but for deadlines that pass in this very moment."""
        if self._is_turning:
            self._is_turning = False
            self._was_alone = len(self._runnable) == 1
            self._next = self._next_deadline()

    def wait(self) -> tuple[bool, bool]:
        """Whether the device has a request, and whether trio has something to do; blocks while neither is the case."""
        left_s = 0.0 if self._runnable else self._sleep_time(self._next_deadline())
        if left_s <= 0:
            return any(descriptor == self._device for descriptor, _ in self._poll(0)), True
        found = self._poll(min(left_s, WAIT_MAX_S) * 1000)
        if len(found) == 1:
            is_requested = found[0][0] == self._device
            return is_requested, not is_requested
        return len(found) == 2, True


def attach(device: int) -> Idle | None:
    """For the trio loop that runs this task; None if it cannot be done with this trio or this clock."""
    try:
        # trio._core is private: each name is looked up here, and a test tells when one is gone.
        runner: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        if runner.is_guest or runner.clock_autojump_threshold != math.inf:
            return None
        found = Idle(device, runner)
        found._sleep_time(found._next_deadline())
    except AttributeError:
        return None
    trio.lowlevel.add_instrument(found)
    return found
