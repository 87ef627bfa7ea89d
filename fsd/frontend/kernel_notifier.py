"""Notifications to the kernel, from a thread of their own.

The thread takes its orders from a queue and may block in the kernel for as long as a request is under way that holds
the lock which an invalidation needs; the loop goes on meanwhile and answers that request.  So nothing that handles a
request may wait for the thread, and nothing does: only `invalidate_all` waits, for the task that follows the session.
`invalidate_attributes_now` does not go through the thread: for an inode in use the kernel waits for nobody.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import Protocol

import trio

from fsd.frontend.ports import KernelName
from wire.log import get_logger

JOIN_TIMEOUT_S = 5.0

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


class ThreadNotifier:
    """See fsd.frontend.ports.KernelNotifier."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fuse-notifier", daemon=True)
        self.sent_count = 0

    def start(self) -> None:
        """Orders are carried out from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what was ordered; the mount is ending, so nothing can hold it up for long."""
        self._orders.put(None)
        self._thread.join(JOIN_TIMEOUT_S)

    def invalidate_attributes(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._orders.put(lambda: self._tell(self._channel.forget_attributes, nodeid))

    def invalidate_attributes_now(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        try:
            self._tell(self._channel.forget_attributes, nodeid)
        except OSError as error:  # The mount is being taken away.
            log.error("notification_failed", error=error)

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._orders.put(lambda: self._tell(self._channel.forget_pages, nodeid, offset, size))

    def invalidate_entries(self, entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._orders.put(lambda: self._forget_entries(entries))

    async def invalidate_all(self, nodeids: list[int], entries: list[KernelName]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def invalidate() -> None:
            try:
                self._forget_entries(entries)
                for nodeid in nodeids:
                    self._tell(self._channel.forget_pages, nodeid, 0, 0)
                # Again: who asked just before may have noted his answer, and its hour, after the doubt had come.
                self._forget_entries([entry for entry in entries if entry.is_directory])
            finally:
                token.run_sync_soon(done.set)

        self._orders.put(invalidate)
        await done.wait()

    # --- in the thread ---

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order()
            except OSError as error:
                log.error("notification_failed", error=error)

    def _tell(self, forget: Callable[..., None], *what: object) -> None:
        self.sent_count += 1
        try:
            forget(*what)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _forget_entries(self, entries: list[KernelName]) -> None:
        for parent, name, is_directory in entries:
            self._tell(self._channel.doubt_entry if is_directory else self._channel.forget_entry, parent, name)
