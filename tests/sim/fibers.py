"""Threads of the simulated processes: each a stack of its own, on the one thread of the simulator, in an order that the
seed decides.

The product starts threads for what blocks (the group commit's transaction, notifications to the kernel). Here
`threading.Thread` and `queue.SimpleQueue` of those modules are `Fiber` and `FiberQueue`: a fiber runs until it
blocks, then a task of its process waits in its place. So the product's thread code runs as it is, with every wait in
virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import greenlet
import trio

from tests.sim.world import current_process


def in_fiber() -> bool:
    """Whether the code that asks runs in a fiber, and may block."""
    return greenlet.getcurrent().parent is not None


def block(wait: Callable[[], Awaitable[object]]) -> None:
    """In a fiber: wait for `wait()`, while the loop goes on."""
    parent = greenlet.getcurrent().parent
    assert parent is not None, "only a fiber may block"
    parent.switch(wait)


class Fiber:
    """In the place of threading.Thread."""

    def __init__(
        self, *, target: Callable[..., object], args: tuple[object, ...] = (), name: str = "", daemon: bool = False
    ) -> None:
        self.name = name
        self._target = target
        self._args = args
        self._process = current_process()
        self._stack: Any = None

    def start(self) -> None:
        """Run, from a task of its own process."""
        self._stack = greenlet.greenlet(lambda: self._target(*self._args))
        self._process.start_soon(self._drive)

    async def _drive(self) -> None:
        wait = self._stack.switch()
        while not self._stack.dead:
            await wait()
            wait = self._stack.switch()

    def join(self, timeout: float | None = None) -> None:
        """Its last act is to tell that it is over; it is, but for the return, when somebody joins it."""


class FiberQueue:
    """In the place of queue.SimpleQueue: anybody puts, one fiber gets."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._filled: trio.Event | None = None

    def put(self, item: object) -> None:
        """Never blocks."""
        self._items.append(item)
        if self._filled is not None:
            self._filled.set()

    def get(self) -> Any:  # noqa: ANN401  (as SimpleQueue)
        """Blocks until there is one."""
        while not self._items:
            self._filled = trio.Event()
            block(self._filled.wait)
        self._filled = None
        return self._items.popleft()
