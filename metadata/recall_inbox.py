"""Recalls at the mount's end (decision 0013): obeyed one after another, and acknowledged by number.

Tasks: `obey`, which lets the mount drop what was recalled; `acknowledge`, which tells the service how far it has come,
so that while an acknowledgement is under way further recalls are obeyed and the next one speaks for all of them.

A recall that is sent again, over another connection, while it waits or is under way here is passed over; one that has
been obeyed is acknowledged again, as that may have been lost.  Numbers begin anew with the session and with the life of
the service.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio
from msgspec.structs import replace

from metadata.protocol import AckRecalls, Recall, RecallItem, RecallKind

RECALLS_WAITING_MAX = 64
"""Recalls that wait here; the service leaves a few without acknowledgement.  Beyond that everything is dropped."""


class RecallInbox:
    """What the service recalls from one session."""

    def __init__(
        self,
        obey: Callable[[Sequence[RecallItem]], Awaitable[None]],
        tell: Callable[[AckRecalls], Awaitable[bool]],
    ) -> None:
        """Nothing happens before its two tasks run.

        Args:
            obey: drop these; must not raise.
            tell: send this acknowledgement; False: it could not be, try again (it has waited).
        """
        self._obey = obey
        self._tell = tell
        self._session = 0
        self._life = ""
        self._waiting: deque[Recall] = deque()  # In the order of their numbers; the first one is under way.
        self._newest = 0  # Highest number that has come,
        self._obeyed = 0  # and highest that was obeyed; both of that session and life.
        self._wanted = trio.Event()
        self._acknowledge_wanted = trio.Event()
        self.obeyed_count = 0

    def begin(self, session: int) -> None:
        """Another session: what waits belonged to the one that is gone, whose caches went with it."""
        self._session = session
        self._begin_life("")

    def _begin_life(self, life: str) -> None:
        self._waiting.clear()
        self._life = life
        self._newest = self._obeyed = 0

    def receive(self, recall: Recall) -> None:
        """A recall has come; called by the channel's reader."""
        if recall.session != self._session:
            return
        if recall.life != self._life:
            self._begin_life(recall.life)
        if recall.number <= self._newest:
            self._acknowledge_wanted.set()
            return
        self._newest = recall.number
        if len(self._waiting) >= RECALLS_WAITING_MAX:
            under_way = self._waiting[0]
            self._waiting.clear()
            self._waiting.append(under_way)
            recall = replace(recall, items=(RecallItem(0, RecallKind.EVERYTHING),))
        self._waiting.append(recall)
        self._wanted.set()

    async def obey(self) -> None:
        """Until cancelled."""
        while True:
            while not self._waiting:
                self._wanted = trio.Event()
                await self._wanted.wait()
            recall = self._waiting[0]
            await self._obey(recall.items)
            self.obeyed_count += 1
            if self._waiting and self._waiting[0] is recall:  # Else the numbers have begun anew meanwhile.
                self._waiting.popleft()
                self._obeyed = recall.number
                self._acknowledge_wanted.set()

    async def acknowledge(self) -> None:
        """Until cancelled."""
        while True:
            await self._acknowledge_wanted.wait()
            self._acknowledge_wanted = trio.Event()
            if self._obeyed and not await self._tell(AckRecalls(self._session, self._life, self._obeyed)):
                self._acknowledge_wanted.set()
