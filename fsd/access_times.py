"""Access times: reads are noted at once here and told to the inode service later, together.

The kernel leaves access times to a FUSE daemon, which sees only the reads that the kernel's pages do not answer.  So a
read counts when it is seen (READ, READDIR, READLINK); and an *open* for reading counts as one if the kernel may have
pages of the file, or the file is empty, so that the read may never be seen (decision 0012).  With relatime either
happens once after each change; what is read again stays between the program and its pages.

The kernel drops its idea of the access time with each READ; for an open it has to be told.

What is noted is in `NodeTable.accessed` until the service has it: (the values from which it goes, the new time).  The
service takes a new time only if the inode's is still the one from which it goes: whoever set it meanwhile has the last
word.  A time that this mount sets goes when those under way have arrived, and takes those that wait with it.

Nothing here makes a read wait or fail: when the service cannot be reached the times wait, at most NOTED_MAX of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from fsd.core.access_times import AccessTimeMode, AccessTimeRule, time_of_access
from fsd.frontend.ports import KernelNotifier
from fsd.handles import ACCESS_MODES
from fsd.nodes import Node, NodeTable
from fsd.ports import MetadataPort
from metadata.protocol import TOUCHES_PER_MESSAGE_MAX, TouchAtimes
from wire.errors import StoreError
from wire.log import get_logger

DELAY_S = 5.0
"""How long times are gathered, as dirty bytes are; or until a message is full."""
RETRY_S = 5.0
"""Pause after a message that failed."""
NOTED_MAX = 1 << 16
"""Times that wait for the service; more are not noted: about 15 MB."""
LAST_TRY_S = 2.0
"""For what waits when another mount comes, or this one ends."""

log = get_logger("fsd.access")


class AccessTimes:
    """Those of one mount."""

    def __init__(
        self,
        rule: AccessTimeRule,
        *,
        nodes: NodeTable,
        metadata: MetadataPort,
        notifier: KernelNotifier,
        clock_ns: Callable[[], int],
    ) -> None:
        self._rule = rule
        self._is_on = rule.mode is not AccessTimeMode.NEVER
        self._nodes = nodes
        self._metadata = metadata
        self._notifier = notifier
        self._clock_ns = clock_ns
        self._waiting: dict[int, tuple[int, int]] = {}  # By inode: from which time to which.
        self._under_way: dict[int, tuple[int, int]] = {}
        self._arrived = trio.Event()  # Replaced when a message was answered.
        self._wanted = trio.Event()
        self._full = trio.Event()

    # --- noting ---

    def counts(self, flags: int) -> bool:
        """Whether reads through a handle opened with these flags count."""
        return self._is_on and flags & ACCESS_MODES != os.O_WRONLY and not flags & os.O_NOATIME

    def is_due(self, node: Node) -> bool:
        """Whether a read of it now would change its access time; its attributes are known."""
        return self._is_on and self._rule.is_due(self._nodes.attributes(node), self._clock_ns())

    def is_due_at_open(self, node: Node, flags: int) -> bool:
        """Whether an open counts, as its reads may not be seen."""
        if not self.counts(flags) or flags & os.O_TRUNC:
            return False
        if not node.may_have_pages and (self._nodes.attributes(node).size or flags & ACCESS_MODES != os.O_RDONLY):
            return False
        return self.is_due(node)

    def count_open(self, node: Node) -> None:
        """The open is a read; when this returns the kernel asks for the attributes."""
        self.count(node)
        if self._nodes.is_fresh(node):
            self._notifier.invalidate_attributes_now(self._nodes.nodeid_of(node.ino))

    def count(self, node: Node) -> None:
        """It was read now."""
        ino, noted = node.ino, self._nodes.accessed
        before = noted.get(ino)
        if before is None and len(noted) >= NOTED_MAX:
            return
        inode = self._nodes.attributes(node)
        now_ns = time_of_access(inode, self._clock_ns())
        if now_ns <= inode.atime_ns:
            return
        from_ns = inode.atime_ns
        if before is not None and ino in self._waiting:
            from_ns = self._waiting[ino][0]
        befores = (inode.atime_ns,) if before is None else tuple({*before[0], before[1], inode.atime_ns})
        noted[ino] = (befores, now_ns)
        self._waiting[ino] = (from_ns, now_ns)
        self._wanted.set()
        if len(self._waiting) >= TOUCHES_PER_MESSAGE_MAX:
            self._full.set()

    def maybe_count(self, node: Node) -> None:
        """It was read now, and the kernel drops the access time by itself."""
        if node.inode is not None and self.is_due(node):
            self.count(node)

    async def settle(self, ino: int) -> None:
        """Before somebody sets the access time: nothing that was noted until now will come after it."""
        self._waiting.pop(ino, None)
        while ino in self._under_way:
            await self._arrived.wait()
        self._waiting.pop(ino, None)
        self._nodes.accessed.pop(ino, None)

    # --- telling ---

    async def run(self) -> None:
        """Tell the service; runs until cancelled."""
        while True:
            while not self._waiting:
                self._wanted = trio.Event()
                await self._wanted.wait()
            with trio.move_on_after(DELAY_S):
                self._full = trio.Event()
                if len(self._waiting) < TOUCHES_PER_MESSAGE_MAX:
                    await self._full.wait()
            if not await self._send():
                await trio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Tell all that waits now, or give up soon: it is of no great importance."""
        with trio.move_on_after(LAST_TRY_S):
            while self._under_way:
                await self._arrived.wait()
            while self._waiting and await self._send():
                pass

    async def _send(self) -> bool:
        """One message; False: it failed, and its times wait again."""
        while self._under_way:
            await self._arrived.wait()
        batch = self._under_way
        for ino in list(self._waiting)[:TOUCHES_PER_MESSAGE_MAX]:
            batch[ino] = self._waiting.pop(ino)
        if not batch:
            return True
        touches = tuple((ino, from_ns, to_ns) for ino, (from_ns, to_ns) in batch.items())
        done = False
        try:
            await self._metadata.mutate(lambda session, sequence: TouchAtimes(session, sequence, touches=touches))
            done = True
        except StoreError as error:
            log.info("access_times_delayed", count=len(touches), error=error)
        finally:
            for ino, (from_ns, to_ns) in batch.items():
                self._told(ino, from_ns, to_ns) if done else self._wait_again(ino, from_ns, to_ns)
            batch.clear()
            self._arrived.set()
            self._arrived = trio.Event()
        return done

    def _told(self, ino: int, from_ns: int, to_ns: int) -> None:
        self._nodes.set_atime(ino, from_ns, to_ns)
        if ino not in self._waiting:
            self._nodes.accessed.pop(ino, None)

    def _wait_again(self, ino: int, from_ns: int, to_ns: int) -> None:
        """Nobody knows whether it has arrived; what was read since goes from the older time then."""
        later = self._waiting.get(ino)
        self._waiting[ino] = (from_ns, to_ns if later is None else later[1])
