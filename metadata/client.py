"""A mount's end of the conversation with the inode service: one session, kept alive, opened again when it was lost.

Tasks, all in the nursery of `open_session`: the channel's; `_upkeep`, which renews the lease by long polls, tells the
mount of changes, and opens a new session when the old one is gone; `_watch_lease`, which makes the mount share when
the lease may be over although nobody said so; two for what the service recalls (recall_inbox.py); `_send_reports`; a
short one per prefetch of slice ids.

The lease is judged by boot time (wire/clocks.py), which goes on while the machine is suspended; trio's clock, by which
tasks sleep, does not.  So every call looks at it and wakes the watch, which also looks by itself every WATCH_TICK_S.

Shared state: `session` and all else of MetadataClient, changed only between awaits.  `_sharing_lock` keeps calls of
`on_sharing` and `on_session_lost` one after another.

Awaits that may not move: `_become(False)` is awaited before `_acts_alone` is False, and only a renewal with that value
acknowledges; a lost session is told (`on_session_lost`) before a new one is asked for, since the new one's first
answers must not meet old caches.  What the mount has open is registered before a renewal acknowledges that it
shares, while another task keeps the lease; a mount that was frightened (`_watch_lease`) or lost its session drops its
caches at once and registers when it can talk to the service again.

A service that was started again (another `life`) has forgotten what lives in its memory only, such as locks.  The
renewal that brings the news is followed by a Reclaim of all that the mount holds (`holdings`), before anything else is
made of that renewal's answer; until every session has done so, the service grants nothing new.  It does not know what
it has told a session that shares either, so that drops everything before it says that it knows of the new life.

Exactly once: a mutation keeps its sequence number over all retries on one session.  If the session is lost while a
mutation may have been sent more than once, nobody can tell whether it took effect: OutcomeUnknown.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio
from msgspec.structs import replace

from blockstore.core.cluster_map import ClusterMap
from blockstore.protocol import BlockId
from metadata.causes import single_cause
from metadata.core.schema import Inode
from metadata.protocol import (
    METADATA_NOTICES,
    OPENS_PER_MESSAGE_MAX,
    SEQUENCE_WINDOW,
    AckRecalls,
    AllocateSlices,
    CloseSession,
    GetMap,
    Lock,
    Mutation,
    OpenSession,
    OpenSessionDone,
    Recall,
    RecallItem,
    RecallKind,
    Reclaim,
    RegisterOpens,
    RenewSession,
    RenewSessionDone,
    ReportBadCopy,
)
from metadata.recall_inbox import RecallInbox
from wire.clocks import boot_time_s
from wire.errors import (
    DeadlineExceeded,
    OutcomeUnknown,
    ServerOverloaded,
    SessionExpired,
    StoreError,
    Unreachable,
)
from wire.log import get_logger
from wire.message import Message, Notice, Request
from wire.rpc.client import Channel

log = get_logger("metadata.client")

R = TypeVar("R", bound=Message)

SERVICE = "metadata"
WATCH_FRACTION = 0.75
"""Of the lease: without an answered renewal for so long, the mount stops acting as if it were alone.  The rest is the
time it has for dropping its caches before the service may let others change things."""
WATCH_TICK_S = 1.0
"""Between looks at the lease: after a suspended machine's wake-up, which no timer of trio's notices, an idle mount goes
on acting alone for so long at most.  A busy one notices with its first request."""
POLL_FRACTION = 0.25
"""Of the lease: how long a renewal waits at the service for news."""
RETRY_PAUSE_S = 0.25
"""Between renewals that fail; the channel itself backs off when it cannot connect."""
SLICE_RANGE = 256
"""Slice ids reserved at a time: 16 GiB of large files, or 256 flushes of small ones, for one round trip."""
SLICE_LOW_WATER = 64
"""Ids left when the next range is asked for: enough for a round trip while many files are being flushed."""
REPORTS_MAX = 256
"""Bad copies that wait to be told to the service; more are dropped: their readers will find them again."""
CLOSE_TIMEOUT_S = 5.0
"""For telling the service that the session ends; it finds out by itself otherwise."""

SERVICE_RECALLS = False
"""Of the inode service of this version."""
_EVERYTHING = (RecallItem(0, RecallKind.EVERYTHING),)


@dataclass(frozen=True)
class Holdings:
    """What a mount holds of what the service keeps in memory only: the content of a Reclaim."""

    locks: tuple[Lock, ...] = ()
    waiting: tuple[Lock, ...] = ()


@dataclass(frozen=True)
class ClientStatistics:
    """Since the start, and what is so now."""

    session: int
    alone: bool
    mutations: int
    mutations_in_flight: int
    renewals: int
    sessions_lost: int
    lease_scares: int  # Times it stopped acting alone because no renewal was answered.
    reports_dropped: int
    recalls: int  # Obeyed.


class MetadataClient:
    """One session with the inode service; made by `open_session`."""

    def __init__(
        self,
        host: str,
        port: int,
        opening: OpenSession,
        *,
        timeout_s: float,
        on_sharing: Callable[[bool], Awaitable[None]],
        on_session_lost: Callable[[], Awaitable[None]],
        holdings: Callable[[], Holdings],
        on_locks_ready: Callable[[tuple[int, ...]], None],
        open_inodes: Callable[[], Awaitable[Sequence[int]]],
        clock_s: Callable[[], float],
        on_recall: Callable[[Sequence[RecallItem]], Awaitable[None]],
    ) -> None:
        self._clock_s = clock_s
        self._channel = Channel(host, port, service=SERVICE, notices=METADATA_NOTICES, on_notice=self._noticed)
        self._opening = opening
        self._timeout_s = timeout_s
        self._on_sharing = on_sharing
        self._on_session_lost = on_session_lost
        self._holdings = holdings
        self._on_locks_ready = on_locks_ready
        self._open_inodes = open_inodes
        self._on_recall = on_recall
        self._recalls = RecallInbox(lambda items: self._until_done(partial(on_recall, items)), self._acknowledge)
        self._nursery: trio.Nursery | None = None
        self.session = 0
        self.root_ino = 0
        self.root: Inode
        self.map: ClusterMap
        self._map_changed = trio.Event()  # Replaced by each newer map.
        self._lease_s = 0.0
        self._lease_from_s = 0.0  # When the last answered renewal was sent, by boot time.
        self._watch_wanted = trio.Event()  # The lease is over, or nearly: the watch is to look now.
        self._acts_alone = False
        self._unregistered = False  # It shares, and the service does not know yet what is open here.
        self._turn = 0
        self._life = ""  # Of the service that knows what this session holds.
        self._lost: trio.Event | None = None  # Set while there is no session; fires when there is one again.
        self._expired = trio.Event()  # Somebody was told SessionExpired.
        self._closed = False
        self._sharing_lock = trio.Lock()
        self._renewal_scope = trio.CancelScope()
        self._next_sequence = 1  # Goes on over a change of session, so that a number names one mutation.
        self._in_flight: dict[int, None] = {}  # Sequence numbers in ascending order.
        self._window = trio.lowlevel.ParkingLot()
        self._slices = range(0)
        self._slices_next: range | None = None  # Prefetched.
        self._slices_lock = trio.Lock()
        self._prefetching = False
        self._reports: dict[ReportBadCopy, None] = {}
        self._reports_wanted = trio.Event()
        self._mutations = self._renewals = self._sessions_lost = self._lease_scares = self._reports_dropped = 0

    @property
    def alone(self) -> bool:
        """No other session is open: everything may be cached."""
        return self._acts_alone

    @property
    def recalls(self) -> bool:
        """Whether the service recalls what it has told, so that it may be believed while sharing."""
        return SERVICE_RECALLS

    def lease_left_s(self) -> float:
        """For how long the session is surely not over; 0 or less: others may have changed anything meanwhile.

        That goes on to be so until a renewal is answered: then the service has kept the session all the time.
        """
        left_s = self._lease_from_s + self._lease_s - self._clock_s()
        if left_s <= self._lease_s * (1 - WATCH_FRACTION):
            self._watch_wanted.set()
        return left_s if self._lost is None else min(left_s, 0.0)

    def statistics(self) -> ClientStatistics:
        """Figures for people."""
        return ClientStatistics(
            session=self.session,
            alone=self._acts_alone,
            mutations=self._mutations,
            mutations_in_flight=len(self._in_flight),
            renewals=self._renewals,
            sessions_lost=self._sessions_lost,
            lease_scares=self._lease_scares,
            reports_dropped=self._reports_dropped,
            recalls=self._recalls.obeyed_count,
        )

    # --- calls --------------------------------------------------------------------------------------------------------

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        """Ask a question; `make(session)` builds it, again if the session had to be opened again.

        Raises: what the service answers; Unreachable or DeadlineExceeded after the client's timeout.
        """
        deadline = trio.current_time() + self._timeout_s
        while True:
            session = await self._current_session(deadline)
            try:
                return await self._channel.call(make(session), timeout_s=_left(deadline))
            except SessionExpired:
                self._session_expired(session)

    async def tell(self, make: Callable[[int], Request[R]]) -> R:
        """As `ask`, but of the one session that there is when it is sent: what it is about goes with that session.

        Raises: as `ask`; SessionExpired when that session is lost before the answer.
        """
        deadline = trio.current_time() + self._timeout_s
        session = await self._current_session(deadline)
        try:
            return await self._channel.call(make(session), timeout_s=_left(deadline))
        except SessionExpired:
            self._session_expired(session)
            raise

    async def reclaim(self) -> None:
        """Tell the service all that the mount holds, whichever life of the service is there.

        Raises: SessionExpired at once if the session is lost; Unreachable or DeadlineExceeded after the timeout.
        """
        life = self._life
        while True:
            if self._lost is not None or self._closed:
                raise SessionExpired("the session was lost")
            session, holdings = self.session, self._holdings()
            request = Reclaim(session, life, holdings.locks, holdings.waiting)
            try:
                reply = await self._channel.call(request, timeout_s=self._timeout_s)
            except SessionExpired:
                self._session_expired(session)
                raise
            if reply.life == life:
                if life != self._life and not self._acts_alone:
                    await self._until_done(partial(self._on_recall, _EVERYTHING))
                self._life = life
                return
            life = reply.life

    async def mutate(self, make: Callable[[int, int], Mutation[R]]) -> R:
        """Change something, exactly once; `make(session, sequence)` builds the request.

        Raises: what the service answers (a refusal has changed nothing); Unreachable (never sent) or DeadlineExceeded
        (may have taken effect) after the client's timeout; OutcomeUnknown when the session was lost and the change may
        have been made before that.
        """
        deadline = trio.current_time() + self._timeout_s
        while True:
            session = await self._current_session(deadline)
            if self._in_flight and self._next_sequence - next(iter(self._in_flight)) >= SEQUENCE_WINDOW:
                await self._wait_for_window(deadline)
                continue
            sequence = self._next_sequence
            self._next_sequence = sequence + 1
            self._in_flight[sequence] = None
            self._mutations += 1
            channel = self._channel
            connections = channel.connection_count + (not channel.is_connected)
            try:
                return await self._channel.call(make(session, sequence), timeout_s=_left(deadline))
            except SessionExpired as error:
                self._session_expired(session)
                if channel.connection_count > connections:  # It may have been sent over more than one.
                    raise OutcomeUnknown(f"the session was lost while a change was under way: {error}") from error
            finally:
                del self._in_flight[sequence]
                if self._window:
                    self._window.unpark_all()

    async def _wait_for_window(self, deadline: float) -> None:
        with trio.move_on_at(deadline):
            await self._window.park()
            return
        raise Unreachable(f"{SEQUENCE_WINDOW} changes are under way and none was answered in time")

    async def allocate_slice(self) -> int:
        """A slice id that nobody else has or will have; rarely a round trip."""
        while not self._slices:
            if self._slices_next is not None:
                self._slices, self._slices_next = self._slices_next, None
                break
            async with self._slices_lock:
                if not self._slices and self._slices_next is None:
                    self._slices = await self._reserve_slices()
        slice_id = self._slices[0]
        self._slices = self._slices[1:]
        if len(self._slices) < SLICE_LOW_WATER and self._slices_next is None and not self._prefetching:
            assert self._nursery is not None
            self._prefetching = True
            self._nursery.start_soon(self._prefetch_slices)
        return slice_id

    async def _reserve_slices(self) -> range:
        reply = await self.mutate(lambda session, sequence: AllocateSlices(session, sequence, count=SLICE_RANGE))
        return range(reply.first, reply.first + reply.count)

    async def _prefetch_slices(self) -> None:
        try:
            async with self._slices_lock:
                if self._slices_next is None:
                    self._slices_next = await self._reserve_slices()
        except StoreError as error:
            log.debug("prefetch-failed", error=error)  # Whoever needs one will ask and be told.
        finally:
            self._prefetching = False

    async def refresh_map(self) -> ClusterMap:
        """Ask for the newest cluster map and keep it."""
        reply = await self._channel.call(GetMap(), timeout_s=self._timeout_s)
        self._take_map(reply.map)
        return self.map

    def _take_map(self, map: ClusterMap | None) -> None:
        if map is not None and map.epoch > self.map.epoch:
            self.map = map
            self._map_changed.set()
            self._map_changed = trio.Event()

    async def wait_map_changed(self) -> None:
        """Returns when a newer map has come; renewals bring it within a round trip."""
        await self._map_changed.wait()

    def report_bad_copy(self, block: BlockId, server_id: int, corrupt: bool) -> None:
        """Tell the service, in the background, that a copy is damaged (`corrupt`) or missing."""
        report = ReportBadCopy(block, server_id, corrupt)
        if report not in self._reports and len(self._reports) >= REPORTS_MAX:
            self._reports_dropped += 1
            return
        self._reports[report] = None
        self._reports_wanted.set()

    async def close_session(self) -> None:
        """End the session; afterwards every call fails with SessionExpired.  Idempotent.

        Does not raise when the service cannot be reached: the lease then ends the session.
        """
        if self._closed:
            return
        self._closed = True
        self._renewal_scope.cancel()
        try:
            await self._channel.call(CloseSession(self.session), timeout_s=min(CLOSE_TIMEOUT_S, self._timeout_s))
        except StoreError as error:
            log.warning("close-session-failed", session=self.session, error=error)

    # --- the session's life -------------------------------------------------------------------------------------------

    async def _current_session(self, deadline: float) -> int:
        """The session's number, at once unless it is being opened again."""
        self.lease_left_s()  # It wakes the watch, should this machine have been suspended.
        if self._closed:
            raise SessionExpired("the session was closed")
        while self._lost is not None:
            with trio.move_on_at(deadline) as scope:
                await self._lost.wait()
            if scope.cancelled_caught:
                raise Unreachable("the session was lost and could not be opened again in time")
        return self.session

    def _session_expired(self, session: int) -> None:
        """The service does not know `session` any more: calls wait from now on until there is a new one."""
        if session == self.session and self._lost is None and not self._closed:
            self._lost = trio.Event()
            self._renewal_scope.cancel()

    async def _open(self, *, timeout_s: float) -> None:
        """Open a session and take over its terms."""
        began_s = self._clock_s()
        terms = await self._channel.call(self._opening, timeout_s=timeout_s)
        self._take_terms(terms, began_s)

    def _take_terms(self, terms: OpenSessionDone, began_s: float) -> None:
        if self.session and terms.map.cluster_id == self.map.cluster_id:
            self._take_map(terms.map)
        else:
            self.map = terms.map
            self._channel.expect(terms.map.cluster_id)  # What listens there tomorrow may be another cluster's.
        self.session = terms.session
        self._recalls.begin(terms.session)
        self.root_ino, self.root = terms.root_ino, terms.root
        self._lease_s = terms.lease_ms / 1000
        # The service may have waited for other sessions before it began the lease; a renewal follows at once.
        self._lease_from_s = began_s
        self._acts_alone, self._turn, self._life = terms.alone, terms.turn, terms.life
        self._slices, self._slices_next = range(0), None
        log.info("session-opened", session=terms.session, alone=terms.alone, epoch=terms.map.epoch)

    async def _upkeep(self) -> None:
        """Renew, again and again; open a new session when there is none."""
        wait_ms = 0
        while not self._closed:
            if self._lost is not None:
                await self._reopen()
                wait_ms = 0
                continue
            session = self.session
            with trio.CancelScope() as self._renewal_scope:
                try:
                    await self._renew(wait_ms=wait_ms)
                    wait_ms = round(self._lease_s * POLL_FRACTION * 1000)
                except SessionExpired:
                    self._session_expired(session)
                except StoreError as error:
                    log.debug("renewal-failed", session=session, error=error)
                    wait_ms = 0
                    await trio.sleep(RETRY_PAUSE_S)

    async def _renew(self, *, wait_ms: int) -> None:
        """One renewal, and what follows from its answer."""
        if self._unregistered:
            await self._while_renewing(self._register, alone=True)  # Nothing is acknowledged before it is done.
        began_s, said_alone = self._clock_s(), self._acts_alone
        request = RenewSession(self.session, self.map.epoch, said_alone, wait_ms, self._turn, self._life)
        reply = await self._channel.call(request, timeout_s=self._lease_s)
        self._renewals += 1
        self._lease_from_s = began_s
        self._turn = reply.turn
        self._take_map(reply.map)
        self._unregistered |= reply.register and not self._acts_alone
        if reply.ready_locks:
            self._on_locks_ready(reply.ready_locks)
        if reply.life != self._life or reply.wants_locks or reply.alone != self._acts_alone:
            # Alone is said meanwhile by who was, as it has dropped nothing yet, and by who is about to be: this
            # turn's first "no" would count for good.
            await self._while_renewing(partial(self._follow, reply), alone=said_alone or reply.alone)

    async def _while_renewing(self, work: Callable[[], Awaitable[None]], *, alone: bool) -> None:
        """Do what may take longer than the lease; `alone` is what the renewals meanwhile say."""
        failure: StoreError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew_meanwhile, alone)
            try:
                await work()
            except StoreError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _register(self) -> None:
        """Tell the service what is open here, all of it."""
        inos = await self._open_inodes()
        for at in range(0, max(len(inos), 1), OPENS_PER_MESSAGE_MAX):
            page = tuple(inos[at : at + OPENS_PER_MESSAGE_MAX])
            complete = at + OPENS_PER_MESSAGE_MAX >= len(inos)
            await self._channel.call(RegisterOpens(self.session, page, complete), timeout_s=self._timeout_s)
        self._unregistered = False
        log.info("opens-registered", session=self.session, count=len(inos))

    async def _follow(self, reply: RenewSessionDone) -> None:
        """Do what a renewal's answer asks for."""
        if reply.life != self._life:
            log.info("service-restarted", session=self.session)
            await self.reclaim()
        if reply.alone != self._acts_alone:
            await self._become(reply.alone)
        if reply.wants_locks and self._acts_alone:
            await self.reclaim()

    async def _renew_meanwhile(self, alone: bool) -> None:
        while True:
            await trio.sleep(self._lease_s * POLL_FRACTION)
            began_s = self._clock_s()
            try:
                request = RenewSession(self.session, self.map.epoch, alone, 0, self._turn, self._life)
                await self._channel.call(request, timeout_s=self._lease_s)
                self._lease_from_s = began_s
            except StoreError as error:
                log.debug("renewal-failed", session=self.session, error=error)

    async def _become(self, alone: bool) -> None:
        """Tell the mount; when this returns the client acts so, or has failed to become alone and shares."""
        async with self._sharing_lock:
            if self._acts_alone == alone:
                return
            log.info("alone" if alone else "sharing", session=self.session)
            if not alone:
                await self._until_done(partial(self._on_sharing, False))
                self._acts_alone = False
                self._unregistered = True
                return
            self._acts_alone = True  # For the watch: from now on there may be something to drop.
            try:
                await self._on_sharing(True)
            except StoreError as error:  # It could not ask what it needs to know for caching.
                log.warning("becoming-alone-failed", session=self.session, error=error)
                await self._until_done(partial(self._on_sharing, False))
                self._acts_alone = False
                self._unregistered = True
                await trio.sleep(RETRY_PAUSE_S)  # The next renewal tells again that it is alone.

    async def _until_done(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Caches have to go, whatever it takes: nothing is acknowledged before."""
        while True:
            try:
                await tell()
                return
            except StoreError as error:
                log.error("dropping-caches-failed", session=self.session, error=error)
                await trio.sleep(RETRY_PAUSE_S)

    def _noticed(self, notice: Notice) -> None:
        if isinstance(notice, Recall):
            self._recalls.receive(notice)

    async def _acknowledge(self, request: AckRecalls) -> bool:
        """Send an acknowledgement of recalls; False: it is to be tried again."""
        if self._lost is not None or self._closed:
            return True
        try:
            await self._channel.call(request, timeout_s=self._timeout_s)
        except SessionExpired:
            self._session_expired(request.session)
        except StoreError as error:
            log.warning("recalls-not-acknowledged", session=request.session, error=error)
            await trio.sleep(RETRY_PAUSE_S)
            return False
        return True

    async def _watch_lease(self) -> None:
        """No renewal was answered for most of the lease: others may soon change things, so stop acting alone."""
        while True:
            self._watch_wanted = trio.Event()
            until_s = self._lease_from_s + self._lease_s * WATCH_FRACTION - self._clock_s()
            if until_s <= 0 and self._acts_alone:
                self._lease_scares += 1
                log.warning("lease-in-danger", session=self.session)
                await self._become(False)
            elif until_s > 0:
                with trio.move_on_after(min(until_s, WATCH_TICK_S)):
                    await self._watch_wanted.wait()
            else:  # It shares: nothing is to be done before it is alone again.
                await trio.sleep(min(self._lease_s * (1 - WATCH_FRACTION), WATCH_TICK_S))

    async def _reopen(self) -> None:
        """The session is gone: let the mount drop everything, then open another one, however long it takes."""
        lost = self._lost
        assert lost is not None
        self._sessions_lost += 1
        log.warning("session-lost", session=self.session)
        async with self._sharing_lock:
            self._acts_alone = False
            await self._until_done(self._on_session_lost)
        self._opening = replace(self._opening, opening=uuid.uuid4().hex, anew=True)
        while not self._closed:
            try:
                await self._open(timeout_s=self._timeout_s)
                break
            except StoreError as error:
                log.warning("reopening-failed", error=error)
                await trio.sleep(RETRY_PAUSE_S)
        # It shares for now: the next renewal says so, and if it is alone, its answer tells the mount as always.
        self._acts_alone = False
        self._unregistered = True
        self._lost = None
        lost.set()

    async def _send_reports(self) -> None:
        while True:
            while not self._reports:
                await self._reports_wanted.wait()
                self._reports_wanted = trio.Event()
            report = next(iter(self._reports))
            try:
                await self._channel.call(report, timeout_s=self._timeout_s)
            except (Unreachable, DeadlineExceeded, ServerOverloaded) as error:
                log.warning("report-delayed", error=error)
                await trio.sleep(RETRY_PAUSE_S)
                continue
            except StoreError as error:  # The service does not want it; telling it again would not help.
                log.warning("report-refused", block=report.block, server=report.server_id, error=error)
            del self._reports[report]


@asynccontextmanager
async def open_session(
    host: str,
    port: int,
    *,
    client: str,
    host_boot_id: str,
    mountpoint: bytes,
    subdirectory: bytes = b"/",
    timeout_s: float = 30.0,
    on_sharing: Callable[[bool], Awaitable[None]],
    on_session_lost: Callable[[], Awaitable[None]],
    holdings: Callable[[], Holdings] = Holdings,
    on_locks_ready: Callable[[tuple[int, ...]], None] = lambda numbers: None,
    open_inodes: Callable[[], Awaitable[Sequence[int]]] | None = None,
    clock_s: Callable[[], float] = boot_time_s,
    on_recall: Callable[[Sequence[RecallItem]], Awaitable[None]] | None = None,
) -> AsyncIterator[MetadataClient]:
    """Open a session and keep it while the block runs; at its end the session is closed.

    Args:
        client: for people: host, pid, version.
        timeout_s: bound of every call.
        on_sharing: told of every change of `alone` after the opening; awaited before the client acknowledges False.
        on_session_lost: awaited before a new session is opened in place of one that is gone: drop all caches.
        holdings: what the mount holds, asked for when the service wants to be told.
        on_locks_ready: waiters (WaitLock.number) that may try now.
        open_inodes: what is open or held here; asked, after `on_sharing(False)`, for what the service does not know.
            From then on whatever is opened must be told with the request that opens it.  None: nothing, ever.
        clock_s: judges the lease; must go on while the machine is suspended.
        on_recall: told of what it must stop believing, one call after another; acknowledged when it returns (after a
            StoreError it is called again).  When the session is lost meanwhile it is not called off, and
            `on_session_lost` may run beside it.  None: nothing is believed, all is acknowledged.

    Raises:
        Unreachable: the service does not answer within `timeout_s`.
        NoSuchEntry, NotDirectory, InvalidArgument: the subdirectory.
        WrongCluster, WrongVersion: what answers there is something else.
    """
    opening = OpenSession(client, host_boot_id, mountpoint, subdirectory, uuid.uuid4().hex)
    metadata = MetadataClient(
        host,
        port,
        opening,
        timeout_s=timeout_s,
        on_sharing=on_sharing,
        on_session_lost=on_session_lost,
        holdings=holdings,
        on_locks_ready=on_locks_ready,
        open_inodes=open_inodes or _nothing,
        clock_s=clock_s,
        on_recall=on_recall or _believes_nothing,
    )
    try:
        async with trio.open_nursery() as nursery:
            metadata._nursery = nursery
            await nursery.start(metadata._channel.run)
            try:
                await metadata._open(timeout_s=timeout_s)
                nursery.start_soon(metadata._upkeep)
                nursery.start_soon(metadata._watch_lease)
                nursery.start_soon(metadata._recalls.obey)
                nursery.start_soon(metadata._recalls.acknowledge)
                nursery.start_soon(metadata._send_reports)
                yield metadata
            finally:
                if metadata.session:
                    with trio.CancelScope(shield=True):  # Bounded by CLOSE_TIMEOUT_S.
                        await metadata.close_session()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise single_cause(group) from None


async def _nothing() -> Sequence[int]:
    await trio.lowlevel.checkpoint()
    return ()


async def _believes_nothing(items: Sequence[RecallItem]) -> None:
    await trio.lowlevel.checkpoint()


def _left(deadline: float) -> float:
    return max(deadline - trio.current_time(), 0.001)
