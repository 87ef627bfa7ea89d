"""Locks of this mount's programs: granted here while the mount is alone, by the inode service while it shares.

`table` is what this mount holds, in both modes (K3): a local grant changes nothing else; one by the service is noted
when its answer comes, and an unlock is noted before it is sent.  So what the service is told to have been held here
(MetadataClient.reclaim) is at least what programs believe to hold, and never what they have let go of.  While the mount
is alone the service's own record of it is old; sharing begins with a Reclaim that replaces it.

Modes and their order (decision 0007):
- ALONE: the table decides, at once.
- LEAVING: from the moment the service says that others come (`stop_granting`, before anything else is done about it) to
  the answer of the Reclaim (`push`).  Nothing is granted; the session has not acknowledged yet.
- SHARING: the service decides.
- JOINING: the service says that the others have gone; what is under way at the service is awaited, then ALONE.
Who wants a lock in LEAVING or JOINING waits.  With every change all waiters wake up, and ask where it is decided now.

Requests of one owner for one file are sent one after another (`_turns`), so the service takes them in the order in
which their answers are noted here.  A request whose outcome is not known leaves a *doubt*: in the background the
service is told what this mount believes to hold of that range, until it has answered.

Cancelling a request that waits (a signal) takes the waiter away; a SetLock that has been sent is awaited all the same,
and if it was granted, the caller gets the lock rather than EINTR: a lock is never held by nobody.

A lost session has lost its locks, and programs go on believing in them.  `_lost` has these, and FileHandle.lost_locks
says through which descriptors they were got: what is read or written through them fails (LocksLost) until the lock is
got again or let go of, or the descriptor is closed (decision 0014).

What locks protect is fresh, as with NFS: while sharing, an unlock of what was locked for writing first makes the file's
bytes durable, and a lock that is got drops what the kernel and this mount have of a content that others have changed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import trio

from fsd.frontend.ports import Answer, FileLock
from fsd.handles import FileHandle
from fsd.mount_state import MountState
from fsd.nodes import Node
from metadata.client import Holdings
from metadata.core.locks import (
    LAST_BYTE,
    SESSION_WAITERS_MAX,
    FileKey,
    Held,
    LockKind,
    LockSpace,
    LockTable,
    Owner,
    Segment,
    Waiter,
    Wanted,
)
from metadata.core.schema import Inode
from metadata.protocol import GetLock, Lock, SetLock, WaitLock
from wire.errors import GracePeriod, NoLocks, Refusal, SessionExpired, StoreError, Unreachable, WouldBlock
from wire.log import get_logger

TRY_TIMEOUT_S = 30.0
"""For a request that does not wait, when the service cannot decide yet (its grace period, a session opened anew)."""
RETRY_PAUSE_S = 0.1
"""Before asking again after a fault or within a grace period."""
RECHECK_S = 10.0
"""A waiter asks again after so long, whatever it was told: should the news get lost, this bounds the harm."""

log = get_logger("fsd.locks")


class Mode(enum.Enum):
    """Who decides; see the module's docstring."""

    ALONE = "alone"
    LEAVING = "leaving"
    SHARING = "sharing"
    JOINING = "joining"


class _Result(enum.Enum):
    DONE = "done"
    REFUSED = "refused"
    ELSEWHERE = "elsewhere"  # The mode has changed meanwhile: ask where it is decided now.


class _Doubt(NamedTuple):
    """A range of which it is not known what the service has."""

    file: FileKey
    owner: Owner
    start: int
    end: int


class Locks:
    """See fsd.frontend.ports.Operations for get_lock and set_lock; flush and release end locks too."""

    def __init__(self, state: MountState) -> None:
        self.table = LockTable()
        self._state = state
        self._mode = Mode.ALONE if state.metadata.alone else Mode.SHARING
        self._settled = trio.Event()
        self._settled.set()
        self._generation = 0  # Raised when the session, and all locks with it, is lost.
        self._in_flight = 0  # Requests at the service.
        self._landed = trio.Event()
        self._turns: dict[tuple[FileKey, Owner], trio.Lock] = {}
        self._last_number = 0
        self._waiting: dict[int, Wanted] = {}
        self._events: dict[int, trio.Event] = {}
        self._known_there: set[int] = set()  # Waiters that the service knows, or may know.
        self._through: dict[int, dict[Owner, set[int]]] = {}  # By ino: POSIX owners, and handles they have used.
        self._flocks: dict[tuple[int, Owner], int] = {}  # By ino and owner: the handle of a flock.
        self._lost = LockTable()  # What programs believe to hold, and lost with a session.
        self._releasing: dict[int, int] = {}  # By ino: releases whose unlocks are under way.
        self._released = trio.Event()
        self._doubts: dict[_Doubt, None] = {}
        self._withdrawals: dict[int, Wanted] = {}
        self._chores = trio.Event()

    # --- operations ---------------------------------------------------------------------------------------------------

    def get_lock(self, fh: int, owner: int, lock: FileLock) -> Answer[FileLock | None]:
        """See ports.Operations."""
        wanted = _wanted(self._state.handles.file(fh).node, owner, lock, LockSpace.POSIX)
        if self._mode is Mode.ALONE:
            held = self.table.conflict(wanted)
            return None if held is None else _file_lock(held.segment)
        return self._get(wanted)

    async def _get(self, wanted: Wanted) -> FileLock | None:
        deadline = trio.current_time() + TRY_TIMEOUT_S
        while True:
            await self._until_settled(deadline)
            try:
                reply = await self._state.metadata.tell(lambda session: GetLock(session, _message(wanted)))
            except (GracePeriod, SessionExpired):
                await _pause(deadline)
                continue
            found = reply.lock
            return None if found is None else FileLock(found.kind, found.start, found.end, found.pid)

    def set_lock(self, fh: int, owner: int, lock: FileLock, *, flock: bool, wait: bool) -> Answer[None]:
        """See ports.Operations."""
        handle = self._state.handles.file(fh)
        wanted = _wanted(handle.node, owner, lock, LockSpace.FLOCK if flock else LockSpace.POSIX)
        number = 0
        if wait and wanted.kind is not LockKind.UNLOCK:
            self._last_number = number = self._last_number + 1
        if self._mode is Mode.ALONE:
            if self._set_here(wanted, number):
                self._note_done(handle, wanted)
                return None
            if not number:
                raise WouldBlock(f"inode {handle.node.ino}")
        return self._set_from(handle, wanted, number)

    async def _set_from(self, handle: FileHandle, wanted: Wanted, number: int) -> None:
        await self._set(handle.node, wanted, number)
        self._note_done(handle, wanted)

    def closing(self, node: Node, lock_owner: int) -> Answer[None]:
        """A process closes a descriptor of the file (flush): its POSIX locks on it are gone when this is answered."""
        owner = (0, lock_owner)
        through = self._through.get(node.ino)
        if through is not None and through.pop(owner, None) is not None and not through:
            del self._through[node.ino]
        self._forget_lost((node.ino, LockSpace.POSIX), owner)
        return self._drop(node, [((node.ino, LockSpace.POSIX), owner)])

    def released(self, handle: FileHandle, lock_owner: int, *, flock: bool) -> Answer[None]:
        """The last descriptor of an open file is gone, and the locks that end with it.

        That is the flock of `lock_owner`, and POSIX locks set through this handle and no other that is open: those of
        its open file description (F_OFD_SETLK), which no flush has ended.
        The kernel waits for nobody here; so who wants a lock on the file waits until this is done.
        """
        node = handle.node
        ending: list[tuple[FileKey, Owner]] = []
        if flock:
            ending.append(((node.ino, LockSpace.FLOCK), (0, lock_owner)))
            self._flocks.pop((node.ino, (0, lock_owner)), None)
        lost, handle.lost_locks = handle.lost_locks or set(), None
        for file, owner in lost:
            if not any((file, owner) in (other.lost_locks or ()) for other in self._handles_of(node.ino)):
                self._lost.drop_owner(file, owner)
        through = self._through.get(node.ino)
        if through is not None:
            for owner, handles in list(through.items()):
                handles.discard(handle.fh)
                if not handles:
                    del through[owner]
                    ending.append(((node.ino, LockSpace.POSIX), owner))
            if not through:
                del self._through[node.ino]
        rest = self._drop(node, ending)
        if rest is None:
            return None
        self._releasing[node.ino] = self._releasing.get(node.ino, 0) + 1
        return self._finish_release(node.ino, rest)

    async def _finish_release(self, ino: int, rest: Answer[None]) -> None:
        assert rest is not None
        try:
            await rest
        finally:
            self._releasing[ino] -= 1
            if not self._releasing[ino]:
                del self._releasing[ino]
            self._released.set()
            self._released = trio.Event()

    # --- the session's news -------------------------------------------------------------------------------------------

    def holdings(self) -> Holdings:
        """All locks and waiters, for Reclaim.

        While sharing that is asked for when the service has been started again; it has forgotten its waiters, too.
        """
        if self._mode is Mode.SHARING:
            self.ready(tuple(self._events))
        held = tuple(_message(Wanted(*one)) for one in self.table.held(0))
        waiting = islice(self._waiting.values(), SESSION_WAITERS_MAX)
        return Holdings(locks=held, waiting=tuple(map(_message, waiting)))

    def ready(self, numbers: tuple[int, ...]) -> None:
        """The service says that these waiters may try."""
        for number in numbers:
            event = self._events.get(number)
            if event is not None:
                event.set()

    def stop_granting(self) -> None:
        """Others come: from now on nothing is granted here."""
        if self._mode is Mode.ALONE:
            self._change(Mode.LEAVING)

    async def push(self) -> None:
        """After `stop_granting`: when this returns, the service has every lock that is held here and decides.

        Raises: Unreachable, DeadlineExceeded; it is to be tried again.
        """
        if self._mode is not Mode.LEAVING:
            return
        try:
            await self._state.metadata.reclaim()
        except SessionExpired:
            log.info("locks_not_pushed", reason="the session is lost")  # And they with it: session_lost follows.
        self._change(Mode.SHARING)

    async def begin_alone(self) -> None:
        """The others have gone: when this returns, locks are granted here."""
        if self._mode is not Mode.SHARING:
            return
        self._change(Mode.JOINING)
        while self._in_flight:
            await self._landed.wait()
        self._doubts.clear()  # The next Reclaim replaces all that the service believes.
        self._withdrawals.clear()
        self._known_there.clear()
        self._change(Mode.ALONE)

    def session_lost(self) -> None:
        """All locks are gone: others may have got them since the lease ran out."""
        lost = list(self.table.held())
        if lost:
            log.warning("locks_lost", count=len(lost), files=len({held.file for held in lost}))
        for held in lost:
            self._note_lost(held)
        self._generation += 1
        self.table = LockTable()
        for leftover in (self._through, self._flocks, self._doubts, self._withdrawals, self._known_there):
            leftover.clear()
        self._change(Mode.SHARING)

    def _note_lost(self, held: Held) -> None:
        (ino, space), owner = held.file, held.owner
        if space is LockSpace.FLOCK:
            numbers = {self._flocks.get((ino, owner), 0)}
        else:
            numbers = self._through.get(ino, {}).get(owner, set())
        handles = [handle for number in numbers if (handle := self._state.handles.files.get(number)) is not None]
        if not handles:
            return
        try:
            self._lost.put(Wanted(*held))
        except NoLocks as error:  # With those of earlier losses there are too many: these descriptors go on.
            log.error("lost_locks_not_told", ino=ino, error=error)
            return
        for handle in handles:
            handle.lost_locks = (handle.lost_locks or set()) | {(held.file, owner)}

    def _forget_lost(self, file: FileKey, owner: Owner) -> None:
        """The owner believes in none of these locks any more, or has them again."""
        if self._lost.drop_owner(file, owner):
            self._unmark(file, owner)

    def _unmark(self, file: FileKey, owner: Owner) -> None:
        for handle in self._handles_of(file[0]):
            if handle.lost_locks is not None:
                handle.lost_locks.discard((file, owner))

    def _handles_of(self, ino: int) -> Iterator[FileHandle]:
        """Those that are open of a file; all are looked at, as this is rare."""
        return (handle for handle in self._state.handles.files.values() if handle.node.ino == ino)

    def _change(self, mode: Mode) -> None:
        self._mode = mode
        if mode in (Mode.LEAVING, Mode.JOINING):
            self._settled = trio.Event()
        else:
            self._settled.set()
        for number, event in self._events.items():
            self.table.withdraw((0, number))
            event.set()

    # --- setting ------------------------------------------------------------------------------------------------------

    async def _set(self, node: Node, wanted: Wanted, number: int) -> None:
        """Lock or unlock; with a `number`, wait for it as long as it takes.

        Raises: WouldBlock, Deadlock, NoLocks; faults, after which a doubt is left.
        """
        deadline = math.inf if number else trio.current_time() + TRY_TIMEOUT_S
        try:
            while True:
                try:
                    await self._until_settled(deadline)
                except Unreachable:
                    if wanted.kind is LockKind.UNLOCK:  # Not in the Reclaim that is to come, or undone after it.
                        self.table.put(wanted)
                        self._leave_doubt(wanted)
                    raise
                result = await self._try(node, wanted, number, deadline)
                if result is _Result.DONE:
                    self._known_there.discard(number)
                    return
                if result is _Result.REFUSED:
                    if not number:
                        raise WouldBlock(f"inode {node.ino}")
                    await self._wait(wanted, number)
        finally:
            if number:
                self._stop_waiting(number)

    async def _until_settled(self, deadline: float) -> None:
        """Wait until it is known who decides.  Raises: Unreachable at the deadline."""
        if math.isinf(deadline):
            await self._settled.wait()
            return
        with trio.move_on_at(deadline):
            await self._settled.wait()
            return
        raise Unreachable("the inode service does not answer, and other mounts may have come")

    async def _try(self, node: Node, wanted: Wanted, number: int, deadline: float) -> _Result:
        """Once, where it is decided now; what passes by itself is waited for."""
        try:
            return await self._set_once(node, wanted, number)
        except (GracePeriod, SessionExpired):
            if wanted.kind is LockKind.UNLOCK:
                return _Result.DONE  # It went with the session.
            if number:
                return _Result.REFUSED
            await _pause(deadline)
        except Refusal:
            raise
        except StoreError as error:
            if not number:
                raise
            log.debug("lock_delayed", ino=node.ino, error=error)
            await trio.sleep(RETRY_PAUSE_S)
        return _Result.ELSEWHERE

    async def _set_once(self, node: Node, wanted: Wanted, number: int) -> _Result:
        if self._mode is Mode.ALONE:
            return _Result.DONE if self._set_here(wanted, number) else _Result.REFUSED
        if wanted.kind is not LockKind.UNLOCK:
            while node.ino in self._releasing:
                await self._released.wait()
        result = _Result.ELSEWHERE
        async with self._turn(wanted.file, wanted.owner):
            if self._mode is Mode.SHARING:
                with trio.CancelScope(shield=True), self._flying():  # Bounded by the client's timeout.
                    result = await self._set_there(node, wanted, number)
        return result

    def _set_here(self, wanted: Wanted, number: int) -> bool:
        """While alone: lock or unlock at once; False: refused.  Raises: NoLocks."""
        key = 0, number
        try:
            done = self.table.set(wanted, would_wait=number > 0)
            if done or self.table.is_promised(key):
                self.table.withdraw(key)
        finally:
            self._promise_here(wanted.file)
        return done

    async def _set_there(self, node: Node, wanted: Wanted, number: int) -> _Result:
        """While sharing, within the owner's turn.  Raises: what the service says, and faults, which leave a doubt."""
        await self._prepare(node, wanted)
        generation, asked = self._generation, self._state.nodes.now

        def make(session: int) -> SetLock:
            nonlocal generation
            generation = self._generation
            return SetLock(session, _message(wanted), number)

        try:
            reply = await self._state.metadata.tell(make)
        except WouldBlock:
            return _Result.REFUSED
        except (Refusal, GracePeriod, SessionExpired):
            raise
        except StoreError:
            self._leave_doubt(wanted)
            raise
        if generation != self._generation:
            raise SessionExpired("the session was lost, and the lock with it")
        if wanted.kind is not LockKind.UNLOCK:
            self._note_granted(wanted)
            await self._refresh(node, reply.inode, asked)
        return _Result.DONE

    async def _prepare(self, node: Node, wanted: Wanted) -> None:
        """Before the service is asked: note what goes whatever it answers, and flush what an unlock shows to others."""
        before = self.table.segments(wanted.file, wanted.owner)
        writes = any(segment.kind is LockKind.WRITE for segment in before)
        if wanted.kind is not LockKind.WRITE and writes and node.file is not None and node.file.unflushed:
            await node.file.settle()
        if wanted.kind is LockKind.UNLOCK:
            self.table.put(wanted)
        elif wanted.file[1] is LockSpace.FLOCK and before and before[0].kind is not wanted.kind:
            self.table.drop_owner(wanted.file, wanted.owner)  # Gone, whatever the answer is.

    def _note_granted(self, wanted: Wanted) -> None:
        try:
            self.table.put(wanted)
        except NoLocks:
            self._leave_doubt(wanted)
            raise

    async def _refresh(self, node: Node, inode: Inode | None, asked: int) -> None:
        """A lock was got: what the kernel and this mount have of a content that others have changed is dropped."""
        if inode is None:
            return
        nodes = self._state.nodes
        nodes.learn(node.ino, inode, asked)
        file = node.file
        content = (None, inode.data_version) if file is None else (file, file.foreign_changes)
        if node.locked_content != content:
            node.locked_content = content
            await self._state.notifier.invalidate_all([nodes.nodeid_of(node.ino)], [])

    def _note_done(self, handle: FileHandle, wanted: Wanted) -> None:
        """A range was locked or unlocked through a handle."""
        file, owner, segment = wanted
        if self._lost.is_locked(file):  # What was lost of that range is got again, or not believed in any more.
            self._lost.put(Wanted(file, owner, segment._replace(kind=LockKind.UNLOCK)))
            if not self._lost.segments(file, owner):
                self._unmark(file, owner)
        if handle.fh not in self._state.handles.files or wanted.kind is LockKind.UNLOCK:
            return
        if file[1] is LockSpace.POSIX:
            self._through.setdefault(handle.node.ino, {}).setdefault(owner, set()).add(handle.fh)
        else:
            self._flocks[handle.node.ino, owner] = handle.fh

    def _drop(self, node: Node, ending: list[tuple[FileKey, Owner]]) -> Answer[None]:
        """End all that these owners hold."""
        ending = [key for key in ending if self.table.segments(*key) or key in self._turns]
        if not ending:
            return None
        if self._mode is Mode.ALONE:
            for file, owner in ending:
                self._set_here(Wanted(file, owner, Segment(0, LAST_BYTE, LockKind.UNLOCK, 0)), 0)
            return None
        return self._drop_there(node, ending)

    async def _drop_there(self, node: Node, ending: list[tuple[FileKey, Owner]]) -> None:
        for file, owner in ending:
            try:
                await self._set(node, Wanted(file, owner, Segment(0, LAST_BYTE, LockKind.UNLOCK, 0)), 0)
            except StoreError as error:  # There is nobody to be told; the doubt that is left unlocks it.
                log.warning("unlock_delayed", ino=node.ino, error=error)

    @asynccontextmanager
    async def _turn(self, file: FileKey, owner: Owner) -> AsyncIterator[None]:
        """The right to ask the service for this owner and file."""
        key = file, owner
        turn = self._turns.setdefault(key, trio.Lock())
        try:
            async with turn:
                yield
        finally:
            if not turn.locked() and self._turns.get(key) is turn:
                del self._turns[key]

    @contextmanager
    def _flying(self) -> Iterator[None]:
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._landed.set()
                self._landed = trio.Event()

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def _wait(self, wanted: Wanted, number: int) -> None:
        """Return when it may be worth trying again.  Raises: Deadlock, NoLocks."""
        event = self._events[number] = trio.Event()
        self._waiting[number] = wanted
        if self._mode is Mode.ALONE:
            self.table.wait(Waiter((0, number), wanted))
            self._promise_here(wanted.file)
            await event.wait()
        elif self._mode is Mode.SHARING:
            self._known_there.add(number)
            try:
                reply = await self._state.metadata.tell(
                    lambda session: WaitLock(session, number, _message(wanted)),
                )
            except Refusal:
                raise
            except StoreError as error:
                log.debug("lock_delayed", ino=wanted.file[0], error=error)
                await trio.sleep(RETRY_PAUSE_S)
                return
            if not reply.ready:
                with trio.move_on_after(RECHECK_S):
                    await event.wait()

    def _promise_here(self, file: FileKey) -> None:
        for waiter in self.table.promise(file):
            self._events[waiter.key[1]].set()

    def _stop_waiting(self, number: int) -> None:
        """It has the lock, or wants it no more."""
        wanted = self._waiting.pop(number, None)
        self._events.pop(number, None)
        file = self.table.withdraw((0, number))
        if file is not None:
            self._promise_here(file)
        if number in self._known_there and wanted is not None:
            self._known_there.discard(number)
            self._withdrawals[number] = wanted
            self._chores.set()

    # --- in the background --------------------------------------------------------------------------------------------

    def _leave_doubt(self, wanted: Wanted) -> None:
        self._doubts[_Doubt(wanted.file, wanted.owner, wanted.segment.start, wanted.segment.end)] = None
        self._chores.set()

    async def run(self) -> None:
        """Tell the service of waiters that wait no more and of ranges in doubt; runs until cancelled."""
        while True:
            await self._settled.wait()
            try:
                if self._withdrawals:
                    number, wanted = next(iter(self._withdrawals.items()))
                    await self._state.metadata.tell(
                        partial(WaitLock, number=number, lock=_message(wanted), withdraw=True)
                    )
                    self._withdrawals.pop(number, None)
                elif self._doubts:
                    await self._resolve(next(iter(self._doubts)))
                else:
                    self._chores = trio.Event()
                    await self._chores.wait()
            except StoreError as error:  # With a lost session everything is forgotten before the next one is there.
                log.debug("lock_chore_delayed", error=error)
                await trio.sleep(RETRY_PAUSE_S)

    async def _resolve(self, doubt: _Doubt) -> None:
        """Tell the service what this mount believes to hold of a range.

        It takes away what was granted to nobody, or makes a lock no stronger than the service has it: always possible.
        """
        async with self._turn(doubt.file, doubt.owner):
            if self._mode is not Mode.SHARING or doubt not in self._doubts:
                return
            for segment in _pieces(self.table.segments(doubt.file, doubt.owner), doubt.start, doubt.end):
                try:
                    with self._flying():
                        await self._state.metadata.tell(
                            partial(SetLock, lock=_message(Wanted(doubt.file, doubt.owner, segment)))
                        )
                except Refusal as error:
                    log.error("lock_in_doubt_refused", ino=doubt.file[0], error=error)
            self._doubts.pop(doubt, None)


def _wanted(node: Node, owner: int, lock: FileLock, space: LockSpace) -> Wanted:
    if space is LockSpace.FLOCK:
        segment = Segment(0, LAST_BYTE, lock.kind, lock.pid)
    else:
        segment = Segment(lock.start, lock.end, lock.kind, lock.pid)
    return Wanted((node.ino, space), (0, owner), segment)


def _file_lock(segment: Segment) -> FileLock:
    return FileLock(segment.kind, segment.start, segment.end, segment.pid)


def _message(wanted: Wanted) -> Lock:
    (ino, space), (_, owner), segment = wanted
    return Lock(ino, space, owner, segment.kind, segment.start, segment.end, segment.pid)


def _pieces(segments: list[Segment], start: int, end: int) -> Iterator[Segment]:
    """The range [start, end], cut into what is held of it and what is not (UNLOCK)."""
    for segment in segments:
        low, high = max(segment.start, start), min(segment.end, end)
        if low <= high:
            if start < low:
                yield Segment(start, low - 1, LockKind.UNLOCK, 0)
            yield segment._replace(start=low, end=high)
            start = high + 1
    if start <= end:
        yield Segment(start, end, LockKind.UNLOCK, 0)


async def _pause(deadline: float) -> None:
    """Before asking again; raises GracePeriod when there is no more time for it."""
    if trio.current_time() + RETRY_PAUSE_S > deadline:
        raise GracePeriod("the inode service has not come to know all locks in time")
    await trio.sleep(RETRY_PAUSE_S)
