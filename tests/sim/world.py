"""The simulated world: virtual time, the seed's order of all tasks, and processes that can be paused and killed.

Everything runs in one `trio.run`: the clock jumps to the next deadline when nothing can run, and trio's choice among
runnable tasks comes from the seed. A task belongs to the process in whose context it was started; while a process is
paused, its tasks are taken out of the scheduler's hands (SIGSTOP), with deadlines and arriving bytes waiting for it.
A killed process is one that is paused for ever, and whose sockets are closed by the kernel (kill -9: no `finally` of
it runs).
"""

from __future__ import annotations

import contextvars
import hashlib
import random
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import trio
import trio._core._run as trio_run
import trio.testing

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("simulated process", default=None)
EPOCH_NS = 1_700_000_000_000_000_000
"""The wall clock at virtual time 0."""


def current_process() -> Process:
    """Whose code is running."""
    process = PROCESS.get()
    assert process is not None, "this code runs in no simulated process"
    return process


class Process:
    """One process on one host."""

    def __init__(self, world: World, host: str, name: str) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.alive = True
        self.clock_ahead_ns = 0  # Of its wall clock.
        self.exit: BaseException | None = None  # Of a `main` that raised.
        self.ended = trio.Event()
        self._scope = trio.CancelScope()  # Of `main`.
        self._held: deque[Any] | None = None  # While paused: tasks that would run.
        self._nursery: trio.Nursery | None = None
        self._entries: deque[Callable[[], object]] = deque()
        self._entered = trio.Event()

    # --- its tasks ---

    def start(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run `main`; what it raises is the process's exit."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        context.run(self.world.nursery.start_soon, self._run, main)

    async def _run(self, main: Callable[[], Awaitable[None]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.shield = True  # Threads are not cancelled; they end with their process.
            self._nursery = nursery
            nursery.start_soon(self._enter)
            try:
                with self._scope:
                    await main()
            except Exception as error:  # The simulated process has crashed; the scenario decides what that means.
                if self.alive:
                    self.exit = error
            nursery.cancel_scope.cancel()
        self.alive = False
        self.ended.set()

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """A thread of this process."""
        assert self._nursery is not None
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        context.run(self._nursery.start_soon, function, *args)

    def run_sync_soon(self, function: Callable[..., object], *args: object) -> None:
        """As TrioToken.run_sync_soon: what a thread has its loop do."""
        self._entries.append(lambda: function(*args))
        self._entered.set()

    async def _enter(self) -> None:
        while True:
            while self._entries:
                self._entries.popleft()()
            self._entered = trio.Event()
            await self._entered.wait()

    # --- faults ---

    @property
    def is_paused(self) -> bool:
        """It gets no time."""
        return self._held is not None

    def pause(self) -> None:
        """SIGSTOP; whoever of it runs in this very turn of the loop still finishes that step."""
        if self._held is None:
            self._held = deque()
            queue = trio_run.GLOBAL_RUN_CONTEXT.runner.runq
            for task in list(queue):
                if task.context.get(PROCESS) is self:
                    queue.remove(task)
                    self._held.append(task)

    def resume(self) -> None:
        """SIGCONT."""
        held, self._held = self._held, None
        if held:
            trio_run.GLOBAL_RUN_CONTEXT.runner.runq.extend(held)

    def kill(self) -> None:
        """kill -9."""
        self.alive = False
        self.ended.set()
        self.pause()
        self.world.network.process_died(self)

    def hold(self, task: trio.lowlevel.Task) -> None:
        """The task was to run; keep it for later.  (Only while paused.)"""
        assert self._held is not None
        self._held.append(task)

    def bury(self) -> None:
        """At the end of the world: let the tasks of a process that is paused or dead end, too."""
        self.resume()
        self._scope.cancel()


class Stuck(Exception):
    """Every task waits for another: nothing will ever happen again."""


def autojump(clock: trio.testing.MockClock) -> None:
    """In the place of MockClock._autojump, which trio calls when nothing can run; it says so if nothing ever will."""
    deadline = trio_run.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline()
    if deadline == inf:
        raise Stuck("every task waits for another")
    clock.jump(max(deadline - clock.current_time(), 0.0))


class World:
    """One run of one seed."""

    def __init__(self, seed: int) -> None:
        from tests.sim.network import Network

        self.seed = seed
        self.clock = trio.testing.MockClock(rate=0.0, autojump_threshold=0.0)
        self.random = random.Random(f"world {seed}")
        self.network = Network(self, random.Random(f"network {seed}"))
        self.nursery: trio.Nursery
        self.processes: list[Process] = []
        self.lines: list[str] = []
        self.wrong: list[str] = []  # For people.
        self.over = False  # What happens now is the world's end, and nobody's fault.
        self._digest = hashlib.blake2b(digest_size=16)
        self._last_number = 0

    def process(self, host: str, name: str) -> Process:
        """A process that is to be started."""
        process = Process(self, host, name)
        self.processes.append(process)
        return process

    def number(self) -> int:
        """The next of this world, for whatever needs a name of its own."""
        self._last_number += 1
        return self._last_number

    def wall_ns(self) -> int:
        """Every host's wall clock."""
        return EPOCH_NS + round(trio.current_time() * 1e9)

    def note(self, what: str) -> None:
        """A line of the event log, which two runs of one seed have in common."""
        self.lines.append(f"{trio.current_time():12.6f} {what}")
        self.mark(self.lines[-1].encode())

    def mark(self, what: bytes) -> None:
        """As `note`, for what happens so often that only the log's digest has it."""
        self._digest.update(what)

    def digest(self) -> str:
        """Of all that was noted and marked."""
        return self._digest.hexdigest()

    async def live(self, scenario: Callable[[], Awaitable[None]]) -> None:
        """Be there while `scenario` runs, then end all processes."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self.network.run)
            try:
                await scenario()
            finally:
                self.network.end()
                for process in self.processes:
                    process.bury()
                nursery.cancel_scope.cancel()


_reschedule = trio_run.Runner.reschedule


def reschedule(runner: trio_run.Runner, task: Any, next_send: Any = trio_run._NO_SEND) -> None:  # noqa: ANN401
    """In the place of Runner.reschedule: tasks of a paused process do not run."""
    _reschedule(runner, task, next_send)
    process = task.context.get(PROCESS)
    if process is not None and process.is_paused:
        assert runner.runq.pop() is task
        process.hold(task)
