"""Tells a writer in time that a quota is used up: by its write(2), and not only by the flush that is refused.

Writes are buffered, so without this a program would learn at fsync or close that what it has written since the last
flush does not fit, all of it.  When a file has grown by FIRST_ASK_BYTES, the inode service is asked in the background
what the quotas above it leave; where there are none, that is all.  Else nothing is asked as long as the file grows by
less; when it may be more, it is flushed and the room asked for again, and a write takes as many bytes as there is room
for, as on a local file system.

What others write into the same quota meanwhile is not known here: then it is the flush that is refused, with the same
errno.  So is the filling of holes, which does not make a file longer.

Tasks: writers, and one for a question in the background.  Shared state: changed only between awaits.
"""

from __future__ import annotations

from fsd.data_services import DataServices
from fsd.file_layout import FileLayout
from fsd.flush import WriteBack
from metadata.protocol import StatFs
from wire.errors import QuotaExceeded, StoreError
from wire.log import get_logger

FIRST_ASK_BYTES = 1 << 20
"""A file grows by so much before the first question: small files cost none, and little is lost by a refused flush."""
ASK_AGAIN_BYTES = 256 << 20
"""Without a quota: somebody may set one while a file is being written."""

log = get_logger("fsd.quota")


class QuotaWatch:
    """What one file may still grow by."""

    def __init__(self, services: DataServices, layout: FileLayout, writes: WriteBack) -> None:
        self._services = services
        self._layout = layout
        self._writes = writes
        self._limited = False
        self._granted = FIRST_ASK_BYTES  # What it may grow by from the last answer on, without a question.
        self._left = FIRST_ASK_BYTES  # Of that; where no quota is known it may fall below 0.
        self._asking = False

    def may_grow(self, growth: int) -> bool:
        """Take `growth` bytes of what was granted; False: it is not as much, or a flush was refused: `admit` first."""
        refused = isinstance(self._writes.failure, QuotaExceeded)
        if refused or (growth > self._left and self._limited):
            return False
        self._left -= growth
        if self._left < 0 and not self._asking:
            assert self._services.nursery is not None, "DataPath.run has not been started"
            self._asking = True
            self._services.nursery.start_soon(self._learn)
        return True

    async def _learn(self) -> None:
        """Find out whether there is a quota; nobody waits for it."""
        try:
            room = await self._room()
        except StoreError as error:  # Whoever flushes will be told; the quota is asked for again later.
            log.debug("room_not_known", ino=self._layout.ino, error=error)
            room = None
        self._asking = False
        self._grant(room, self._granted - self._left)

    def _grant(self, room: int | None, taken: int) -> None:
        self._limited = room is not None
        if room is None:
            self._granted = self._left = ASK_AGAIN_BYTES
        else:
            self._granted, self._left = room, room - taken

    async def admit(self, offset: int, size: int) -> int:
        """How many of `size` bytes to be written at `offset` there is room for; at least one.

        Raises: QuotaExceeded: for none; or what keeps bytes that were written before from being flushed.
        """
        room, taken = await self._room(), self._granted - self._left
        growth = self._growth(offset, size, max(self._layout.inode.size, self._writes.dirty.end))
        if room is not None and room < taken + growth:  # What was taken may be committed, and counted twice.
            await self._writes.settle()
            room, taken = await self._room(), 0
            growth = self._growth(offset, size, self._layout.inode.size)
        admitted = size if room is None else size - max(growth - room, 0)
        if admitted <= 0:
            raise QuotaExceeded(f"inode {self._layout.ino}: a quota leaves {room} bytes for {growth} more")
        self._grant(room, taken + growth)
        return admitted

    @staticmethod
    def _growth(offset: int, size: int, file_size: int) -> int:
        return max(offset + size - max(file_size, offset), 0)

    async def _room(self) -> int | None:
        """Bytes that quotas leave for the file; None: there are none."""
        ino = self._layout.ino
        told = await self._services.metadata.ask(lambda session: StatFs(session, ino))
        return None if told.quota_free < 0 else told.quota_free
