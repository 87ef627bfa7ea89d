"""Waiting for memory: the budget of core/budget.py, with those who wait for their share of it.

Tasks: those of writers and readers, who wait here.  Shared state: the counts and two queues.  Writers are served in
the order they came, so that a stream of small writes is not passed over for ever by large ones, nor the other way.
Nothing here awaits between taking bytes and telling the caller that they are his.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from fsd.core.budget import Budget
from wire.errors import StoreError


class _Waiter:
    """One writer that waits for `size` bytes."""

    __slots__ = ("error", "event", "granted", "owner", "size")

    def __init__(self, size: int, owner: object) -> None:
        self.size = size
        self.owner = owner
        self.event = trio.Event()
        self.granted = False
        self.error: StoreError | None = None


class MountBudget:
    """The memory of one mount."""

    def __init__(self, limit: int, evict: Callable[[int], int], on_pressure: Callable[[], None]) -> None:
        self.core = Budget(limit, evict)
        self._on_pressure = on_pressure
        self._writers: deque[_Waiter] = deque()
        self._fetchers = trio.lowlevel.ParkingLot()

    @property
    def waiting_writers(self) -> int:
        """How many writers wait."""
        return len(self._writers)

    def acquire_dirty_nowait(self, size: int) -> bool:
        """Take `size` bytes for dirty data if there are as many and nobody waits for some; False: nothing was taken."""
        return not self._writers and self.core.try_dirty(size)

    async def acquire_dirty(self, size: int, owner: object) -> None:
        """Take `size` bytes for dirty data, after those who came before.

        Raises: what `refuse` was told for this owner meanwhile; nothing was taken then.
        """
        if self.acquire_dirty_nowait(size):
            return
        waiter = _Waiter(size, owner)
        self._writers.append(waiter)
        self._on_pressure()
        try:
            await waiter.event.wait()
        except trio.Cancelled:
            if waiter.granted:
                self.release_dirty(size)
            raise
        finally:
            if waiter in self._writers:
                self._writers.remove(waiter)
                self._serve_writers()
        if waiter.error is not None:
            raise waiter.error

    def release_dirty(self, size: int) -> None:
        """Give back dirty bytes."""
        self.core.release_dirty(size)
        self._serve_writers()

    def refuse(self, owner: object, error: StoreError) -> None:
        """The bytes of `owner` cannot be written: its writers wait no longer."""
        for waiter in [waiter for waiter in self._writers if waiter.owner is owner]:
            waiter.error = error
            self._writers.remove(waiter)
            waiter.event.set()
        self._serve_writers()

    def _serve_writers(self) -> None:
        while self._writers and self.core.try_dirty(self._writers[0].size):
            waiter = self._writers.popleft()
            waiter.granted = True
            waiter.event.set()
        if self._writers:
            self._on_pressure()

    def try_fetch(self, size: int, *, ahead: bool) -> bool:
        """Take `size` bytes for a fetch, if there are as many."""
        return self.core.try_fetch(size, ahead=ahead)

    async def wait_fetch_done(self) -> None:
        """Until some fetch has given back its bytes; then try again."""
        await self._fetchers.park()

    def fetched(self, size: int) -> None:
        """A fetch is done, its bytes are cached."""
        self.core.fetched(size)
        self._fetchers.unpark_all()

    def release_fetch(self, size: int) -> None:
        """A fetch has failed."""
        self.core.release_fetch(size)
        self._fetchers.unpark_all()
