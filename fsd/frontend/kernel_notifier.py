"""Notifications to the kernel through pyfuse3, from a thread of their own.

The thread takes its orders from a queue and may block in the kernel for as long as a request is under way that holds
the lock which an invalidation needs; the loop goes on meanwhile and answers that request.  So nothing that handles a
request may wait for the thread, and nothing does: only `invalidate_all` waits, for the task that follows the session.
"""

from __future__ import annotations

import errno
import os
import queue
import struct
import threading
from collections.abc import Callable

import pyfuse3
import trio

from wire.log import get_logger

FUSE_NOTIFY_INC_EPOCH = 8
"""include/uapi/linux/fuse.h; since Linux 6.16 (protocol 7.44)."""
_OUT_HEADER = struct.Struct("=IiQ")  # len, error (of a notification: its code), unique (0: a notification).
JOIN_TIMEOUT_S = 5.0

log = get_logger("fsd.notifier")


class Pyfuse3Notifier:
    """See fsd.frontend.ports.KernelNotifier."""

    def __init__(self, device: int | None) -> None:
        """`device`: descriptor of the mount's /dev/fuse, for what libfuse has no function for; None: do without."""
        self._device = device
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fuse-notifier", daemon=True)
        self._drops_all_names = device is not None and self._drop_all_names()
        self.sent_count = 0

    def start(self) -> None:
        """Orders are carried out from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what was ordered; the mount is ending, so nothing can hold it up for long."""
        self._orders.put(None)
        self._thread.join(JOIN_TIMEOUT_S)

    @property
    def drops_all_names(self) -> bool:
        """See fsd.frontend.ports.KernelNotifier."""
        return self._drops_all_names

    def invalidate_attributes(self, nodeid: int) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._orders.put(lambda: self._invalidate_inode(nodeid, attributes_only=True))

    def invalidate_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See fsd.frontend.ports.KernelNotifier; pyfuse3 can only say: all of them."""
        self._orders.put(lambda: self._invalidate_inode(nodeid, attributes_only=False))

    def invalidate_entries(self, entries: list[tuple[int, bytes]]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        self._orders.put(lambda: self._invalidate_entries(entries))

    async def invalidate_all(self, nodeids: list[int], entries: list[tuple[int, bytes]]) -> None:
        """See fsd.frontend.ports.KernelNotifier."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def invalidate() -> None:
            try:
                if self._drops_all_names:
                    self._drop_all_names()
                else:
                    self._invalidate_entries(entries)
                for nodeid in nodeids:
                    self._invalidate_inode(nodeid, attributes_only=False)
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

    def _invalidate_inode(self, nodeid: int, *, attributes_only: bool) -> None:
        self.sent_count += 1
        try:
            pyfuse3.invalidate_inode(nodeid, attr_only=attributes_only)
        except OSError as error:
            if error.errno != errno.ENOENT:  # The kernel has forgotten it already.
                raise

    def _invalidate_entries(self, entries: list[tuple[int, bytes]]) -> None:
        for parent, name in entries:
            self.sent_count += 1
            try:
                pyfuse3.invalidate_entry(parent, name)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _drop_all_names(self) -> bool:
        """Raise the epoch of the kernel's names; False when the kernel does not know how."""
        assert self._device is not None
        try:
            os.write(self._device, _OUT_HEADER.pack(_OUT_HEADER.size, FUSE_NOTIFY_INC_EPOCH, 0))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True
