"""Locks in action: who asks for one, who is told that one may be had, and what is known of them after a restart.

Tasks: `_clock`, which takes back promises that nobody has come for; one per ListLocks.

Shared state: the table (core/locks.py), in memory only and changed between awaits; `_ready`, the waiters that were
promised something, each with the connection over which its session was told.  Renewals carry the news (session_keeper).

After a restart the table is empty, and `SessionTable.unreclaimed` has the sessions that may hold locks: until each has
told its own (Reclaim), or has ended for good, nothing new is granted (GracePeriod).  A session's locks are free only
when its end is durable: else a restart would bring it back, and it would claim what others have got meanwhile.

What the table says of a session that may act alone is what it told last; nobody else is there to be refused because of
it, and before anybody else is let in, it tells all again (decision 0007).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import trio

from metadata.core.locks import FileKey, LockKind, LockSpace, LockTable, Segment, Waiter, WaiterKey, Wanted
from metadata.core.namespace.lookup import get_attributes
from metadata.core.sessions import SessionTable
from metadata.protocol import (
    LISTED_LOCKS_MAX,
    GetLock,
    GetLockDone,
    ListedLock,
    ListLocks,
    ListLocksDone,
    Lock,
    LockHolder,
    Reclaim,
    ReclaimDone,
    SetLock,
    SetLockDone,
    WaitLock,
    WaitLockDone,
)
from metadata.snapshot import Snapshot
from wire.errors import GracePeriod, NoSuchEntry, WouldBlock
from wire.log import get_logger
from wire.message import Message
from wire.rpc.server import Call

log = get_logger("metadata.locks")

PROMISE_S = 1.0
"""For a waiter that was told to come and try; a round trip takes a thousandth of it, so it is hung or gone then."""
LIST_WAIT_S = 2.0
"""For sessions that are alone to tell their locks to somebody who wants a list."""


class LockKeeper:
    """All locks of all sessions."""

    def __init__(self, *, snapshot: Snapshot, life: str) -> None:
        self.life = life
        self.table = LockTable()
        self._snapshot = snapshot
        self._sessions: SessionTable
        self._tell_news: Callable[[int], None]
        self._ready: dict[int, dict[int, int]] = {}  # Session -> number -> connection over which it was told; 0: none.
        self._promises: deque[tuple[float, WaiterKey]] = deque()
        self._promised_until: dict[WaiterKey, float] = {}
        self._promised = trio.Event()
        self._asked: dict[int, trio.Event] = {}  # Sessions that are alone and are to tell their locks.
        self._wanted: set[int] = set()  # Those of them that were not told so yet.
        self._reported_waiting: dict[int, tuple[Lock, ...]] = {}
        self._nursery: trio.Nursery | None = None

    def attach(self, sessions: SessionTable, tell_news: Callable[[int], None]) -> None:
        """Before anything else: the sessions, and whom to call when there is news for one of them."""
        self._sessions = sessions
        self._tell_news = tell_news

    def handlers(self) -> dict[type[Message], Callable[[Call, Any], None]]:
        """For the service's table."""
        return {
            SetLock: self.set_lock,
            GetLock: self.get_lock,
            WaitLock: self.wait_lock,
            Reclaim: self.reclaim,
            ListLocks: self.list_locks,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._clock)
            task_status.started()
            await trio.sleep_forever()

    # --- handlers -----------------------------------------------------------------------------------------------------

    def set_lock(self, call: Call, request: SetLock) -> None:
        """SetLock."""
        self._sessions.speaking(request.session, call.connection_number)
        wanted = wanted_of(request.session, request.lock)
        if wanted.kind is not LockKind.UNLOCK:
            self._refuse_in_grace()
        key = request.session, request.number
        try:
            done = self.table.set(wanted, would_wait=request.number > 0)
            if done or self.table.is_promised(key):
                self._withdraw(key)
        finally:
            self._promise(wanted.file)
        if not done:
            raise WouldBlock(f"inode {request.lock.ino}")
        call.reply(SetLockDone(None if wanted.kind is LockKind.UNLOCK else self._inode(request.lock.ino)))

    def get_lock(self, call: Call, request: GetLock) -> None:
        """GetLock."""
        session = self._sessions.find(request.session)
        self._refuse_in_grace()
        held = self.table.conflict(wanted_of(request.session, request.lock))
        if held is None:
            call.reply(GetLockDone(None))
            return
        holder = self._sessions.live.get(held.owner[0])
        is_near = holder is not None and holder.record.host_boot_id == session.record.host_boot_id
        call.reply(GetLockDone(lock_of(held.file, held.owner[1], held.segment, with_pid=is_near), held.owner[0]))

    def wait_lock(self, call: Call, request: WaitLock) -> None:
        """WaitLock."""
        self._sessions.speaking(request.session, call.connection_number)
        key = request.session, request.number
        if request.withdraw:
            file = self._withdraw(key)
            if file is not None:
                self._promise(file)
            call.reply(WaitLockDone(False))
            return
        wanted = wanted_of(request.session, request.lock)
        self._withdraw_promised(key)
        self.table.wait(Waiter(key, wanted))
        self._promise(wanted.file, asking=key)
        call.reply(WaitLockDone(self.table.is_promised(key)))

    def reclaim(self, call: Call, request: Reclaim) -> None:
        """Reclaim."""
        session = self._sessions.speaking(request.session, call.connection_number)
        number = request.session
        if request.life != self.life:
            call.reply(ReclaimDone(self.life))
            return
        if number in self._sessions.unreclaimed or session.may_act_alone:
            files = self.table.drop_locks(number)
            for lock in request.locks:
                wanted = wanted_of(number, lock)
                other = self.table.conflict(wanted)
                if other is not None:  # Both believe that they hold it: neither is helped by taking it away unheard.
                    log.error("locks-in-conflict", ino=lock.ino, session=number, other=other.owner[0])
                self.table.put(wanted)
            self._reported_waiting[number] = request.waiting
            for file in files:
                self._promise(file)
        if number in self._sessions.unreclaimed:
            log.info("locks-reclaimed", session=number, locks=len(request.locks))
            self._sessions.unreclaimed.discard(number)
            self.grace_may_be_over()
        asked = self._asked.pop(number, None)
        if asked is not None:
            asked.set()
        call.reply(ReclaimDone(self.life))

    def list_locks(self, call: Call, request: ListLocks) -> None:
        """ListLocks: answered by a task of its own if a session must be asked."""
        assert self._nursery is not None
        alone = [number for number, session in self._sessions.live.items() if session.may_act_alone]
        if not alone:
            call.reply(self._listed(request.ino, silent=set()))
            return
        self._nursery.start_soon(self._list, call, request, alone)

    # --- for the sessions' keeper -------------------------------------------------------------------------------------

    def session_ended(self, session: int) -> None:
        """Its end is durable: what it held and waited for is free."""
        files = self.table.drop_session(session)
        self._ready.pop(session, None)
        self._reported_waiting.pop(session, None)
        self._wanted.discard(session)
        asked = self._asked.pop(session, None)
        if asked is not None:
            asked.set()
        for file in files:
            self._promise(file)
        self.grace_may_be_over()

    def grace_may_be_over(self) -> None:
        """Nobody is waited for any more: whoever waits for a lock may try."""
        if not self._sessions.unreclaimed:
            for file in self.table.files_with_waiters():
                self._promise(file)

    def has_news(self, session: int, connection: int) -> bool:
        """Whether a renewal that came over that connection has something to tell of locks."""
        ready = self._ready.get(session)
        return session in self._wanted or (ready is not None and any(told != connection for told in ready.values()))

    def take_news(self, session: int, connection: int) -> tuple[tuple[int, ...], bool]:
        """What to tell it now: waiters that may try, and whether to tell its locks."""
        ready = self._ready.get(session, {})
        numbers = tuple(number for number, told in ready.items() if told != connection)
        for number in numbers:
            ready[number] = connection
        wants = session in self._wanted
        self._wanted.discard(session)
        return numbers, wants

    # --- promises -----------------------------------------------------------------------------------------------------

    def _promise(self, file: FileKey, *, asking: WaiterKey | None = None) -> None:
        """Tell those who can have what they wait for; not `asking`, whose answer says it."""
        if self._sessions.unreclaimed:
            return
        for waiter in self.table.promise(file):
            key = session, number = waiter.key
            until_s = trio.current_time() + PROMISE_S
            self._promised_until[key] = until_s
            self._promises.append((until_s, key))
            self._promised.set()
            if key != asking:
                self._ready.setdefault(session, {})[number] = 0
                self._tell_news(session)

    def _withdraw(self, key: WaiterKey) -> FileKey | None:
        self._forget_promise(key)
        return self.table.withdraw(key)

    def _withdraw_promised(self, key: WaiterKey) -> None:
        """It asks to wait although it was told that it may try: it has tried in vain, or was told over a dead line."""
        if self.table.unpromise(key) is not None:
            self._forget_promise(key)

    def _forget_promise(self, key: WaiterKey) -> None:
        self._promised_until.pop(key, None)
        ready = self._ready.get(key[0])
        if ready is not None:
            ready.pop(key[1], None)

    async def _clock(self) -> None:
        while True:
            while not self._promises:
                self._promised = trio.Event()
                await self._promised.wait()
            until_s, key = self._promises[0]
            await trio.sleep_until(until_s)
            self._promises.popleft()
            if self._promised_until.get(key) == until_s:
                self._forget_promise(key)
                file = self.table.unpromise(key)
                if file is not None:
                    self._promise(file)

    # --- lists --------------------------------------------------------------------------------------------------------

    async def _list(self, call: Call, request: ListLocks, alone: list[int]) -> None:
        events = {}
        for number in alone:
            events[number] = self._asked.setdefault(number, trio.Event())
            self._wanted.add(number)
            self._tell_news(number)
        with trio.move_on_at(min(trio.current_time() + LIST_WAIT_S, call.deadline - LIST_WAIT_S / 4)):
            for event in events.values():
                await event.wait()
        call.reply(self._listed(request.ino, silent={n for n, event in events.items() if not event.is_set()}))

    def _listed(self, ino: int, *, silent: set[int]) -> ListLocksDone:
        sessions = self._sessions.live
        every = [
            ListedLock(held.owner[0], lock_of(held.file, held.owner[1], held.segment)) for held in self.table.held()
        ]
        every += [
            ListedLock(waiter.key[0], lock_of(waiter.wanted.file, waiter.wanted.owner[1], waiter.wanted.segment), True)
            for waiter in self.table.waiters()
        ]
        for number, locks in self._reported_waiting.items():
            if number in sessions and sessions[number].may_act_alone:
                every += [ListedLock(number, lock, True) for lock in locks]
        listed = [one for one in every if ino in (0, one.lock.ino)]
        shown = tuple(listed[:LISTED_LOCKS_MAX])
        numbers = {one.session for one in shown} | silent
        holders = tuple(
            LockHolder(number, session.record.client, session.record.mountpoint, number not in silent)
            for number, session in sessions.items()
            if number in numbers
        )
        return ListLocksDone(holders, shown, len(listed), bool(self._sessions.unreclaimed))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _refuse_in_grace(self) -> None:
        if self._sessions.unreclaimed:
            raise GracePeriod(f"{len(self._sessions.unreclaimed)} sessions have not told their locks yet")

    def _inode(self, ino: int) -> Any:  # noqa: ANN401  (Inode | None)
        try:
            return get_attributes(self._snapshot.txn(), ino=ino).inode
        except NoSuchEntry:  # Unlinked, and open in the caller's mount.
            return None


def wanted_of(session: int, lock: Lock) -> Wanted:
    """A message's lock as the table has it."""
    segment = Segment(lock.start, lock.end, lock.kind, lock.pid)
    return Wanted((lock.ino, lock.space), (session, lock.owner), segment)


def lock_of(file: tuple[int, LockSpace], owner: int, segment: Segment, *, with_pid: bool = True) -> Lock:
    """The table's as a message."""
    pid = segment.pid if with_pid else 0
    return Lock(file[0], file[1], owner, segment.kind, segment.start, segment.end, pid)
