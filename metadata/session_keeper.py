"""Sessions in action: openings, long polls, leases that run out, and the cleaning up after sessions that ended.

Tasks: one per opening (openings are rare and wait for others); `_clock`, which answers polls whose time is over and
expires leases; `_clean`, which takes apart what ended sessions have left, in bounded steps through the group commit.

Shared state: the table (core/sessions.py) and `_polls`, at most one waiting RenewSession per session; both change only
between awaits.  After every change of the table `_changed_now` answers the polls that have news and wakes the openings.

Awaits that may not move: between the last look at `waits_for` and `create` there is none, and none between the end of
`create` and `admit`.  While an opening exists, no session is told that it is alone, so nobody who shared when the
creation began acts alone when it is done.

The end of a session is two things: from `SessionTable.end` on it can do nothing, and when its record is marked it will
not come back after a restart of the service either.  What depends on the second waits for it: its locks become free,
CloseSession is answered, another session is told that it is alone, only in `end_is_durable`.  The mark is queued in the
moment of the end, and the queue is first in, first out; and whoever is admitted meanwhile brings the mark along in the
transaction that makes its own session.  So a session that comes back was missed by nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import trio

from blockstore.core.cluster_map import ClusterMap
from metadata.core import sessions
from metadata.core.exactly_once import ENGINE_ERRORS
from metadata.core.namespace.lookup import get_attributes
from metadata.core.opens import UNTOLD
from metadata.core.schema import SessionRecord
from metadata.core.sessions import Opening, Session, SessionTable
from metadata.engine.ports import EngineBroken, WriteTxn
from metadata.group_commit import Batch, GroupCommit
from metadata.lock_keeper import LockKeeper
from metadata.protocol import (
    CloseSession,
    Done,
    EndedSession,
    EvictSession,
    OpenSession,
    OpenSessionDone,
    RenewSession,
    RenewSessionDone,
    SessionEnd,
)
from metadata.snapshot import Snapshot
from wire.errors import DeadlineExceeded, NoSuchEntry, OutcomeUnknown, ServerOverloaded, SessionExpired, StoreError
from wire.log import get_logger
from wire.rpc.server import Call

log = get_logger("metadata.sessions")

GRACE_S = 0.25
"""Before a lease is called over, what has arrived meanwhile is handled for so long: if this process stood still (a
debugger, a suspended machine, an overloaded one), renewals lie in its sockets."""
ENDED_KEPT = 100
"""Ended sessions that a list shows: those of a bad night."""
CLEAN_RETRY_S = 1.0
"""After a full disk or an overload, before the next try."""


@dataclass
class _Poll:
    """A RenewSession that waits for news."""

    call: Call
    request: RenewSession
    until_s: float


@dataclass(frozen=True)
class _Ended:
    """A session that is no more, for lists."""

    number: int
    record: SessionRecord
    how: SessionEnd
    at_s: float


class SessionKeeper:
    """All that concerns sessions, but for their durable records' format."""

    def __init__(
        self,
        *,
        commits: GroupCommit,
        snapshot: Snapshot,
        current_map: Callable[[], ClusterMap],
        lease_s: float,
        locks: LockKeeper,
        unreclaimed: Collection[int] = (),
    ) -> None:
        """`unreclaimed`: sessions that are to tell what they have open, should they not be alone; only looked at."""
        self._unreclaimed = unreclaimed
        self._holds_for_untold = True  # Maybe, from now or from an earlier life: opens.UNTOLD.
        self.table = SessionTable(lease_s)
        self.locks = locks
        locks.attach(self.table, self._news_for)
        self._commits = commits
        self._snapshot = snapshot
        self._current_map = current_map
        self._polls: dict[int, _Poll] = {}
        self._changed = trio.Event()
        self._clock_scope = trio.CancelScope()
        self.fenced_count = 0  # Ended since the start because they were silent, or by hand.
        self._ended: deque[_Ended] = deque(maxlen=ENDED_KEPT)
        self._to_clean: set[int] = set()
        self._clean_wanted = trio.Event()
        self._nursery: trio.Nursery | None = None

    def restore(self, records: list[tuple[int, SessionRecord]]) -> None:
        """Before `run`: take up what an earlier life of the service has left."""
        self.table.restore(records, now_s=trio.current_time())
        self._to_clean.update(number for number, record in records if record.ended)
        self.opens_told()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._clock)
            nursery.start_soon(self._clean)
            task_status.started()
            await trio.sleep_forever()

    # --- handlers (for frames that arrived; they answer now or later) ---------------------------------------

    def open(self, call: Call, request: OpenSession) -> None:
        """OpenSession: answered by a task of its own."""
        assert self._nursery is not None
        if len(self.table.live) + len(self.table.openings) >= sessions.SESSION_COUNT_MAX:
            raise ServerOverloaded(f"{sessions.SESSION_COUNT_MAX} sessions are open")
        self._nursery.start_soon(self._open, call, request)

    def renew(self, call: Call, request: RenewSession) -> None:
        """RenewSession: answered at once if there is news, else when there is or the time is over."""
        now_s = trio.current_time()
        session = self.table.find(request.session)
        before = session.may_act_alone
        self.table.renew(request, now_s=now_s)
        older = self._polls.pop(session.number, None)
        if older is not None:
            self._answer(older.call, older.request)
        wait_s = min(request.wait_ms / 1000, self.table.lease_s / 2, (call.deadline - now_s) / 2)
        if wait_s <= 0 or self._has_news(session, call, request):
            self._answer(call, request)
        else:
            self._polls[session.number] = _Poll(call, request, now_s + wait_s)
            self._wake_clock_at(now_s + wait_s)
        if session.may_act_alone != before:
            self._changed_now()

    def close(self, call: Call, request: CloseSession) -> None:
        """CloseSession: answered when the end is durable."""
        session = self.table.end(request.session)
        if session is not None:
            log.info("session-closed", session=session.number, client=session.record.client)
            self._over(session, SessionEnd.CLOSED)
            self._changed_now()
        self._end_durably(request.session, call)

    def evict(self, call: Call, request: EvictSession) -> None:
        """EvictSession: answered when the end is durable."""
        session = self.table.end(request.session)
        if session is None:
            raise NoSuchEntry(f"no session has the number {request.session}")
        log.warning("session-evicted", session=session.number, client=session.record.client)
        self._over(session, SessionEnd.EVICTED)
        self._changed_now()
        self._end_durably(request.session, call)

    def ended(self, *, now_s: float) -> tuple[EndedSession, ...]:
        """Sessions that have ended since the start, the newest first."""
        return tuple(
            EndedSession(
                session=one.number,
                client=one.record.client,
                mountpoint=one.record.mountpoint,
                how=one.how,
                ended_ms_ago=round((now_s - one.at_s) * 1000),
                cleaned=one.number not in self._to_clean and one.number not in self.table.ending,
            )
            for one in reversed(self._ended)
        )

    # --- openings -----------------------------------------------------------------------------------------------------

    async def _open(self, call: Call, request: OpenSession) -> None:
        try:
            with trio.fail_at(call.deadline):
                reply = await self._opened(request)
        except trio.TooSlowError:
            call.fail(DeadlineExceeded(f"waited for {len(self.table.live)} other sessions to share"))
        except StoreError as error:
            call.fail(error)
        except Exception as error:  # A bug in one opening must not end the service.
            log.exception("opening-failed", client=request.client, error=error)
            call.fail(StoreError("internal error, see the inode service's log"))
        else:
            call.reply(reply)

    async def _opened(self, request: OpenSession) -> OpenSessionDone:
        earlier = self.table.earlier_result(request)
        if earlier is not None:
            self.table.unreclaimed.discard(earlier.number)  # It is only now being opened, so it holds nothing.
            self.locks.grace_may_be_over()
            return self._terms(earlier)
        with self._snapshot.fresh() as txn:
            root_ino = sessions.resolve_directory(txn, request.subdirectory)
        opening = self.table.begin_opening(request)
        try:
            self._changed_now()
            session = await self._admitted(opening, root_ino)
        finally:
            self.table.abandon(opening)
            self._changed_now()
        log.info("session-opened", session=session.number, client=request.client, mountpoint=request.mountpoint)
        return self._terms(session)

    async def _admitted(self, opening: Opening, root_ino: int) -> Session:
        request = opening.request
        while not opening.superseded and (waiting := self.table.waits_for(opening)):
            log.debug("opening-waits", client=request.client, sessions=waiting)
            await self._changed.wait()
        if opening.superseded:
            raise OutcomeUnknown("a newer mount of the same place has taken over")
        replaced = {number: self.table.live[number] for number in self.table.replaced(opening)}
        ended = [*replaced, *self.table.ending]

        def create(txn: WriteTxn, batch: Batch) -> tuple[int, SessionRecord]:
            record = SessionRecord(
                client=request.client,
                host_boot_id=request.host_boot_id,
                mountpoint=request.mountpoint,
                opening=request.opening,
                root_ino=root_ino,
                opened_ns=batch.now_ns,
            )
            return sessions.create(txn, record, ended=ended), record

        number, record = await self._created(create)
        try:
            if opening.superseded:
                raise OutcomeUnknown("a newer mount of the same place has taken over")
            session = self.table.admit(opening, number, record, now_s=trio.current_time())
        except BaseException:
            self.clean_soon(number)  # It is durable, and nobody's.
            raise
        for old, before in replaced.items():
            log.info("session-replaced", session=old, by=number)
            self._over(before, SessionEnd.REPLACED)
            self.clean_soon(old)
            self.locks.session_ended(old)
        self._wake_clock_at(session.lease_until_s)
        return session

    async def _created(
        self, create: Callable[[WriteTxn, Batch], tuple[int, SessionRecord]]
    ) -> tuple[int, SessionRecord]:
        """Create it; if nobody waits for it any more, it is cleaned up when it is there."""
        with trio.CancelScope(shield=True):  # Bounded: one commit.  A session nobody knows of must not stay.
            result = await self._commits.change(create)
        assert isinstance(result, tuple)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            self.clean_soon(result[0])
            raise
        return result

    def _terms(self, session: Session) -> OpenSessionDone:
        with self._snapshot.fresh() as txn:
            root = get_attributes(txn, ino=session.record.root_ino)
        alone, turn = self.table.tell(session, now_s=trio.current_time())
        return OpenSessionDone(
            session=session.number,
            lease_ms=round(self.table.lease_s * 1000),
            root_ino=session.record.root_ino,
            root=root.inode,
            alone=alone,
            map=self._current_map(),
            turn=turn,
            life=self.locks.life,
        )

    # --- news ---------------------------------------------------------------------------------------------------------

    def map_changed(self) -> None:
        """A newer cluster map is there: tell the sessions that wait."""
        self._changed_now()

    def _news_for(self, session: int) -> None:
        """There is something to tell one session: do so, if it waits for news."""
        poll = self._polls.get(session)
        if poll is not None and self._has_news(self.table.find(session), poll.call, poll.request):
            del self._polls[session]
            self._answer(poll.call, poll.request)

    def _has_news(self, session: Session, call: Call, request: RenewSession) -> bool:
        return (
            request.epoch < self._current_map().epoch
            or self.table.has_news(session, request)
            or request.life not in ("", self.locks.life)
            or self.locks.has_news(session.number, call.connection_number)
            or (session.number in self._unreclaimed and not self.table.is_alone(session))
        )

    def _changed_now(self) -> None:
        """Tell the polls that have news, and let the openings look again."""
        for number, poll in list(self._polls.items()):
            if self._has_news(self.table.find(number), poll.call, poll.request):
                del self._polls[number]
                self._answer(poll.call, poll.request)
        self._changed.set()
        self._changed = trio.Event()

    def _answer(self, call: Call, request: RenewSession) -> None:
        session = self.table.find(request.session)
        alone, turn = self.table.tell(session, now_s=trio.current_time())
        map = self._current_map()
        ready, wants = self.locks.take_news(session.number, call.connection_number)
        newer = map if map.epoch > request.epoch else None
        register = not alone and session.number in self._unreclaimed
        call.reply(RenewSessionDone(alone, newer, turn, self.locks.life, ready, wants, register))

    def _over(self, session: Session, how: SessionEnd) -> None:
        """The session is none any more: who waits for its news is told, and lists show it among those that were."""
        self._ended.append(_Ended(session.number, session.record, how, trio.current_time()))
        self.fenced_count += how in (SessionEnd.EXPIRED, SessionEnd.EVICTED)
        poll = self._polls.pop(session.number, None)
        if poll is not None:
            poll.call.fail(SessionExpired(f"session {session.number} has ended"))

    # --- time ---------------------------------------------------------------------------------------------------------

    def _wake_clock_at(self, at_s: float) -> None:
        if at_s < self._clock_scope.deadline:
            self._clock_scope.deadline = at_s

    async def _clock(self) -> None:
        while True:
            next_poll_s = min((poll.until_s for poll in self._polls.values()), default=float("inf"))
            with trio.CancelScope(deadline=min(next_poll_s, self.table.next_end_s())) as self._clock_scope:
                await trio.sleep_forever()
            now_s = trio.current_time()
            for number, poll in list(self._polls.items()):
                if poll.until_s <= now_s:
                    del self._polls[number]
                    self._answer(poll.call, poll.request)
            if self.table.next_end_s() <= now_s:
                await trio.sleep(GRACE_S)
                self._expire(now_s)

    def _expire(self, now_s: float) -> None:
        over = self.table.expire(now_s=now_s)
        for session in over:
            log.warning("session-expired", session=session.number, client=session.record.client)
            self._over(session, SessionEnd.EXPIRED)
            self._end_durably(session.number)
        if over:
            self._changed_now()

    # --- cleaning up --------------------------------------------------------------------------------------------------

    def _end_durably(self, session: int, call: Call | None = None) -> None:
        """Mark an ended session's record, before anything that is asked for from now on; then answer `call`.

        If it cannot be queued (`call` is refused then) or the disk is full, it is tried again until it is done.
        """
        try:
            self._commits.submit(_End(self, session, call))
        except ServerOverloaded:
            self.clean_soon(session)
            if call is not None:
                raise
        self._commits.kick()

    def end_is_durable(self, session: int) -> None:
        """Its record is marked or gone."""
        self.table.ended(session)
        self.locks.session_ended(session)
        self._changed_now()

    def clean_soon(self, session: int) -> None:
        """An ended session has left things to clean up."""
        self._to_clean.add(session)
        self._clean_wanted.set()

    def opens_told(self) -> None:
        """A session has told what it has open, or has ended; after the last of them nothing is held for UNTOLD."""
        if self._holds_for_untold and not self._unreclaimed:
            self._holds_for_untold = False
            self.clean_soon(UNTOLD)

    async def _clean(self) -> None:
        while True:
            while not self._to_clean:
                await self._clean_wanted.wait()
                self._clean_wanted = trio.Event()
            for session in sorted(self._to_clean):
                try:
                    await self._clean_one(session)
                except (*ENGINE_ERRORS, ServerOverloaded) as error:
                    log.warning("session-cleaning-delayed", session=session, error=error)
                    await trio.sleep(CLEAN_RETRY_S)
                except StoreError as error:  # A bug, told by the writer's log: the others must not wait for this one.
                    log.error("session-cleaning-failed", session=session, error=error)
                    self._to_clean.discard(session)

    async def _clean_one(self, session: int) -> None:
        await self._commits.change(partial(_mark_ended, session))
        self.opens_told()
        self.end_is_durable(session)
        step = partial(_clean_step, session)
        while not await self._commits.change(step):
            pass  # Each step takes something away.
        self._to_clean.discard(session)


def _mark_ended(session: int, txn: WriteTxn, batch: Batch) -> None:
    batch.opens.forget(session)
    sessions.mark_ended(txn, session)


def _clean_step(session: int, txn: WriteTxn, batch: Batch) -> bool:
    batch.newest.forget(session)
    return sessions.clean_step(txn, session, now_ns=batch.now_ns)


class _End:
    """Makes a session's end durable and answers who has asked for it."""

    __slots__ = ("_call", "_keeper", "_session")

    def __init__(self, keeper: SessionKeeper, session: int, call: Call | None) -> None:
        self._keeper = keeper
        self._call = call
        self._session = session

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        _mark_ended(self._session, txn, batch)
        return Done()

    def finish(self, result: object) -> None:
        self._keeper.clean_soon(self._session)
        if isinstance(result, EngineBroken):
            return  # Nobody knows; the service is about to end, which tells the caller just that.
        if isinstance(result, StoreError):
            if self._call is not None:
                self._call.fail(result)
            return
        self._keeper.end_is_durable(self._session)
        if self._call is not None:
            self._call.reply(Done())
