"""Notifications to the kernel, from threads of their own.

Which of them may block, and where they are made (docs/explanation/names-and-caches.md has the reasons):

| call | waits in the kernel for | made by |
|---|---|---|
| attributes of an inode in use | nothing | the loop (`invalidate_attributes_now`) |
| attributes | an inode that is being dropped, and its pages to be written, by us | threads |
| pages | reads of those pages under way, which we answer; dirty ones of mappings to be written, by us | threads |
| one name | the lock of its directory: changes and look-ups in it under way, which we answer | threads |
| all names void | nothing | the loop (`make_names_void`) |

The one thread of the queue carries out what nobody waits for, in order.  `drop` and `drop_names` are awaited by the
task that obeys recalls, and by nobody who answers a request; they use threads of trio's, at most DROPS_MAX at once, so
that one that the kernel holds up does not hold up the others.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from fsd.frontend.ports import KernelName
from wire.log import get_logger

JOIN_TIMEOUT_S = 5.0
DROPS_MAX = 16
"""Threads that drop things for recalls.  One that the kernel holds up ends when the request in its way is answered."""

log = get_logger("fsd.notifier")


class Channel(Protocol):
    """How one front end tells the kernel; each raises OSError (ENOENT: the kernel has forgotten it already)."""

    def forget_attributes(self, nodeid: int) -> None:
        """The attributes of an inode are out of date; takes no lock in the kernel."""
        ...

    def forget_pages(self, nodeid: int, offset: int, size: int) -> None:
        """As `forget_attributes`, and at least the pages of [offset, offset + size); size 0: to the end of the file."""
        ...

    def forget_entry(self, parent: int, name: bytes) -> None:
        """The name may be another inode now, or none."""
        ...

    def doubt_entry(self, parent: int, name: bytes) -> None:
        """As `forget_entry`, but the kernel keeps the name until its next use, and asks then (Linux 6.2)."""
        ...

    def forget_all_names(self) -> None:
        """Every name must be looked up again.  EINVAL: the kernel does not know how (before Linux 6.16)."""
        ...


class ThreadNotifier:
    """See fsd.frontend.ports.KernelNotifier."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fuse-notifier", daemon=True)
        self._limit = trio.CapacityLimiter(DROPS_MAX)
        self._given = 0
        self._done = 0  # By the thread.
        self.sent_count = 0

    def start(self) -> None:
        """Orders are carried out from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what was ordered; the mount is ending, so nothing can hold it up for long."""
        self._orders.put(None)
        self._thread.join(JOIN_TIMEOUT_S)

    @property
    def is_idle(self) -> bool:
        """See fsd.frontend.ports.KernelNotifier."""
        return self._done == self._given

    def invalidate_attributes(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._order(lambda: self._tell(self._channel.forget_attributes, nodeid))

    def invalidate_attributes_now(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        try:
            self._tell(self._channel.forget_attributes, nodeid)
        except OSError as error:  # The mount is being taken away.
            log.error("notification_failed", error=error)

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._order(lambda: self._tell(self._channel.forget_pages, nodeid, offset, size))

    def invalidate_entries(self, entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._order(lambda: self._forget_entries(entries))

    async def invalidate_all(self, nodeids: list[int], entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def invalidate() -> None:
            try:
                self._forget_entries(entries)
                self._drop((), nodeids)
                self._forget_entries([entry for entry in entries if entry.is_directory])  # See _drop_names.
            finally:
                token.run_sync_soon(done.set)

        self._order(invalidate)
        await done.wait()

    async def drop(self, attributes: Sequence[int], pages: Sequence[int]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        if attributes or pages:
            await self._in_thread(lambda: self._drop(attributes, pages))

    async def drop_names(self, names: Sequence[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        await self._in_thread(lambda: self._drop_names(names))

    def make_names_void(self) -> bool:
        """See fsd.frontend.ports.KernelNotifier."""
        try:
            self._tell(self._channel.forget_all_names)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            log.error("notification_failed", error=error)  # The mount is being taken away.
        return True

    async def _in_thread(self, work: Callable[[], None]) -> None:
        try:
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limit)
        except OSError as error:  # As above.
            log.error("notification_failed", error=error)

    # --- in the threads ---

    def _order(self, order: Callable[[], None]) -> None:
        self._given += 1
        self._orders.put(order)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order()
            except OSError as error:
                log.error("notification_failed", error=error)
            finally:
                self._done += 1

    def _tell(self, forget: Callable[..., None], *what: object) -> None:
        self.sent_count += 1
        try:
            forget(*what)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _drop(self, attributes: Sequence[int], pages: Sequence[int]) -> None:
        for nodeid in attributes:
            self._tell(self._channel.forget_attributes, nodeid)
        for nodeid in pages:
            self._tell(self._channel.forget_pages, nodeid, 0, 0)

    def _drop_names(self, names: Sequence[KernelName]) -> None:
        """Directories twice: who asked just before may note his answer, and its time, after the doubt has come."""
        self._forget_entries(names)
        self._forget_entries([name for name in names if name.is_directory])

    def _forget_entries(self, entries: Sequence[KernelName]) -> None:
        for parent, name, is_directory in entries:
            self._tell(self._channel.doubt_entry if is_directory else self._channel.forget_entry, parent, name)
