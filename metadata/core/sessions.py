"""Sessions: who has mounted, until when, and who may believe to be alone.

The table is plain memory, decided upon by the service's loop; `now_s` is the loop's monotonic clock.  What must survive
a restart is one SessionRecord per session, written by the functions at the end of this module inside the service's
write transactions.

A session is *live* from its admission until it is closed, replaced or expired; then it never becomes live again, and is
*ending* until that, too, is durable.
`unreclaimed` are the sessions from before a restart of the service that have not told it yet what they hold: until that
is empty, nobody can know whether a lock is free.
`may_act_alone` is what the service has to assume of its client: True from the moment the service says "alone" until a
renewal that answers this very message says otherwise (decision 0003).

Invariant: at the moment an opening is admitted, no other live session may act alone.
Invariant: at most one live session may act alone, unless the sessions come from before a restart.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from metadata.core import schema
from metadata.core.namespace.lookup import lookup
from metadata.core.reclaim import end_session
from metadata.core.schema import SessionRecord
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller, OpenSession, RenewSession
from wire.errors import InvalidArgument, NoSuchEntry, NotDirectory, OutcomeUnknown, SessionExpired

SESSION_COUNT_MAX = 10_000
"""Live sessions; at 5 s per long poll about 2,000 renewals a second, a tenth of one core."""


@dataclass(slots=True)
class Session:
    """One live session."""

    number: int
    record: SessionRecord
    lease_until_s: float
    may_act_alone: bool
    turn: int | None  # How often it was told that it is alone; None: not heard from since the service started.
    connection: int = 0  # The newest connection over which it has asked for a change.

    @property
    def place(self) -> tuple[str, bytes]:
        """What makes a later session its successor: same boot of the same host, same mount point."""
        return self.record.host_boot_id, self.record.mountpoint


@dataclass(eq=False, slots=True)
class Opening:
    """An OpenSession that waits for the others."""

    request: OpenSession
    superseded: bool = False  # A newer opening of the same place has come: this one's client has given up.

    def takes_over(self, host_boot_id: str, mountpoint: bytes, opening: str) -> bool:
        """Whether it puts an end to a session or an opening of that place, made by that `opening`.

        A daemon that lost its session must not end that of another daemon: if a new mount has replaced it (after a lazy
        unmount, say), each would end the other's for ever.
        """
        request = self.request
        if request.anew:
            return bool(opening) and opening == request.opening
        return (host_boot_id, mountpoint) == (request.host_boot_id, request.mountpoint)


@dataclass(slots=True)
class SessionTable:
    """All live sessions and all openings.

    Every method returns at once and either does all it says or raises with nothing changed.
    """

    lease_s: float
    live: dict[int, Session] = field(default_factory=dict)
    ending: set[int] = field(default_factory=set)
    openings: list[Opening] = field(default_factory=list)
    unreclaimed: set[int] = field(default_factory=set)

    def restore(self, records: Iterable[tuple[int, SessionRecord]], *, now_s: float) -> None:
        """Take up the sessions of an earlier life of the service, each with a fresh lease.

        What they were told last is not known, so any of them may act alone until it renews.
        """
        for number, record in records:
            if not record.ended:
                self.live[number] = Session(number, record, now_s + self.lease_s, may_act_alone=True, turn=None)
                self.unreclaimed.add(number)

    def find(self, session: int) -> Session:
        """The live session of that number, or SessionExpired."""
        found = self.live.get(session)
        if found is None:
            raise SessionExpired(f"session {session}")
        return found

    def speaking(self, session: int, connection: int) -> Session:
        """The live session that wants a change made, over its newest connection.

        Raises: SessionExpired; OutcomeUnknown (the connection was given up by its client, who has another one).
        """
        found = self.reporting(session, connection)
        found.connection = connection
        return found

    def reporting(self, session: int, connection: int) -> Session:
        """As `speaking`, of a session that only tells what it has: an older connection of it may still speak then."""
        found = self.find(session)
        if connection < found.connection:
            raise OutcomeUnknown("this connection was given up by its client, who has another one")
        return found

    # --- openings ---------------------------------------------------------------------------------------------------

    def begin_opening(self, request: OpenSession) -> Opening:
        """From now on no other session is alone; older openings that it takes over are superseded."""
        opening = Opening(request)
        for other in self.openings:
            before = other.request
            other.superseded |= opening.takes_over(before.host_boot_id, before.mountpoint, before.opening)
        self.openings.append(opening)
        return opening

    def abandon(self, opening: Opening) -> None:
        """The opening ends, admitted or not."""
        self.openings.remove(opening)

    def earlier_result(self, request: OpenSession) -> Session | None:
        """The live session which this very opening has made before, if its answer was lost."""
        if request.opening:
            for session in self.live.values():
                if session.record.opening == request.opening:
                    return session
        return None

    def replaced(self, opening: Opening) -> list[int]:
        """Live sessions that the opening puts an end to."""
        return [number for number, session in self.live.items() if self._ends(opening, session)]

    def waits_for(self, opening: Opening) -> list[int]:
        """Live sessions that have not yet said that they share, without those that will be replaced."""
        return [n for n, session in self.live.items() if session.may_act_alone and not self._ends(opening, session)]

    @staticmethod
    def _ends(opening: Opening, session: Session) -> bool:
        record = session.record
        return opening.takes_over(record.host_boot_id, record.mountpoint, record.opening)

    def admit(self, opening: Opening, number: int, record: SessionRecord, *, now_s: float) -> Session:
        """The opening's session, durable by now, becomes live; those it replaces have ended, durably too."""
        assert opening in self.openings
        assert not opening.superseded
        assert not self.waits_for(opening), "admitted while another session may act alone"
        for old in self.replaced(opening):
            del self.live[old]
            self.unreclaimed.discard(old)
        session = Session(number, record, now_s + self.lease_s, may_act_alone=False, turn=0)
        self.live[number] = session
        return session

    # --- life -------------------------------------------------------------------------------------------------------

    def is_alone(self, session: Session) -> bool:
        """Whether this live session is the only one, with no other on its way.

        One whose end is not durable counts: a restart of the service would bring it back to life.
        """
        return len(self.live) == 1 and not self.ending and not self.openings

    def renew(self, request: RenewSession, *, now_s: float) -> Session:
        """The lease runs anew; note what the client says of being alone.

        Only a request that knows the session's turn counts: older ones are delayed copies.  So are those of this turn
        that say "alone" after one has said otherwise: the client acts alone again only in a later turn.
        Raises: SessionExpired.
        """
        session = self.find(request.session)
        session.lease_until_s = max(session.lease_until_s, now_s + self.lease_s)
        if session.turn is None:
            session.turn = request.turn
        if request.turn == session.turn and not request.alone:
            session.may_act_alone = False
        return session

    def has_news(self, session: Session, request: RenewSession) -> bool:
        """Whether what the client acts on is no longer so, or it has missed an answer."""
        return self.is_alone(session) != request.alone or session.turn != request.turn

    def tell(self, session: Session, *, now_s: float) -> tuple[bool, int]:
        """What to answer the session now, (alone, turn); its lease runs anew from this answer on."""
        alone = self.is_alone(session)
        session.lease_until_s = max(session.lease_until_s, now_s + self.lease_s)
        if session.turn is None:
            session.turn = 0
        if alone and not session.may_act_alone:
            session.turn += 1
            session.may_act_alone = True
        return alone, session.turn

    def end(self, session: int) -> Session | None:
        """The session is ending; None if it was not live."""
        ended = self.live.pop(session, None)
        if ended is not None:
            self.ending.add(session)
        return ended

    def ended(self, session: int) -> None:
        """Its end is durable: it will never claim anything again, not even of a later life of the service."""
        self.ending.discard(session)
        self.unreclaimed.discard(session)

    def expire(self, *, now_s: float) -> list[Session]:
        """End the sessions whose lease has run out and return them."""
        over = [session for session in self.live.values() if session.lease_until_s <= now_s]
        for session in over:
            self.end(session.number)
        return over

    def next_end_s(self) -> float:
        """When the next lease runs out; infinity without sessions."""
        return min((session.lease_until_s for session in self.live.values()), default=float("inf"))


def resolve_directory(txn: ReadTxn, path: bytes) -> int:
    """The directory at `path`, from the root of the file system; "." and empty components are skipped.

    Raises: NoSuchEntry, NotDirectory (a symlink is none), InvalidArgument (".."); the detail names the path.
    """
    ino = schema.ROOT_INO
    for name in path.split(b"/"):
        if name in (b"", b"."):
            continue
        if name == b"..":
            raise InvalidArgument(f"subdirectory {path!r}: no '..' here")
        try:
            found = lookup(txn, parent=ino, name=name, caller=Caller())
        except NoSuchEntry as error:
            raise NoSuchEntry(f"no directory {path!r} in the file system") from error
        if not stat.S_ISDIR(found.inode.mode):
            raise NotDirectory(f"{path!r} is not a directory of the file system")
        ino = found.ino
    return ino


# --- what is durable --------------------------------------------------------------------------------------------------

CLEAN_COUNT_MAX = 256
"""Kept answers that one step of cleaning up deletes: a few milliseconds of the writer's time."""


def load(txn: ReadTxn) -> list[tuple[int, SessionRecord]]:
    """All session records with their numbers, those of ended ones too, which are still to be cleaned up."""
    start, end = schema.SESSION_RANGE
    return [(schema.decode_session_key(key), schema.decode_session(raw)) for key, raw in txn.scan(start, end, 1 << 30)]


def create(txn: WriteTxn, record: SessionRecord, *, ended: Iterable[int]) -> int:
    """Store a new session, mark those that have ended, and return its number, which is never used again.

    Args:
        ended: those it replaces, and those whose end is not durable yet: else a crash could leave both alive, of which
            one was let in because the other had ended.
    """
    for old in ended:
        mark_ended(txn, old)
    raw = txn.get(schema.SESSIONS_COUNTER)
    number = schema.decode_number(raw) if raw else 1
    txn.put(schema.SESSIONS_COUNTER, schema.encode_u64(number + 1))
    txn.put(schema.session_key(number), schema.encode_record(record))
    return number


def mark_ended(txn: WriteTxn, session: int) -> None:
    """The session will not come back after a restart; nothing if its record is gone already."""
    raw = txn.get(schema.session_key(session))
    if raw is not None:
        record = msgspec.structs.replace(schema.decode_session(raw), ended=True)
        txn.put(schema.session_key(session), schema.encode_record(record))


def clean_step(txn: WriteTxn, session: int, *, now_ns: int) -> bool:
    """Take away a bounded part of what an ended session has left; True: nothing is left, its record went last."""
    if not end_session(txn, session, now_ns=now_ns):
        return False
    answers = txn.scan(*schema.answer_range(session), CLEAN_COUNT_MAX + 1)
    for key, _ in answers[:CLEAN_COUNT_MAX]:
        txn.delete(key)
    if len(answers) > CLEAN_COUNT_MAX:
        return False
    txn.delete(schema.session_key(session))
    return True
