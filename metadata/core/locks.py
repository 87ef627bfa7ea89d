"""Advisory locks as Linux has them (fs/locks.c): ranges for fcntl(2), whole files for flock(2), and who waits for whom.

One table serves the inode service, where the owners are those of all mounts, and a mount that is alone.  Plain memory:
no clock, no waiting, no I/O; every method does all it says or raises with nothing changed.

Each file has two spaces that know nothing of each other: POSIX (ranges; locks of one owner replace, split and merge
each other) and FLOCK (the whole file; for another kind the old lock is dropped first, which may then be lost).  An
owner is (session, the kernel's number): a process, an open file, or with OFD locks an open file description; the kernel
tells them apart.  `pid` is told by F_GETLK and decides nothing.

A waiter does not get a lock, it gets a *promise*: it is told that it may try, and until it has tried (or let go), what
it was promised is refused to others who would wait as well, so that who unlocks and locks again in a loop cannot starve
it.  Who would not wait (F_SETLK, LOCK_NB) is refused only because of locks that are held, as in Linux.  So nobody ever
holds a lock without knowing it.

Invariant K1: locks of two owners in one space of one file never conflict, those told to `put` aside.
Invariant K2: the segments of an owner are in ascending order, do not overlap, and neighbours that touch differ in kind.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from wire.errors import Deadlock, NoLocks

LAST_BYTE = (1 << 63) - 1
"""The end of a range that has none (OFFSET_MAX)."""
FILE_SEGMENTS_MAX = 65_536
"""Ranges locked in one file by all owners; 100 bytes each."""
SESSION_SEGMENTS_MAX = 16_384
"""Ranges locked by one session, in all files: what one Reclaim carries (45 bytes each, 740 KB)."""
SESSION_WAITERS_MAX = 4096
"""Requests of one session that wait: each is a thread that does nothing else."""
DEADLOCK_OWNERS_MAX = 10_000
"""Owners that one search for a circle looks at; then it gives up and lets wait, as Linux does (after 10)."""


class LockKind(enum.IntEnum):
    """F_RDLCK, F_WRLCK, F_UNLCK; LOCK_SH, LOCK_EX, LOCK_UN."""

    READ = 0
    WRITE = 1
    UNLOCK = 2


class LockSpace(enum.IntEnum):
    """Which of the two system calls it belongs to."""

    POSIX = 0
    FLOCK = 1


READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
POSIX, FLOCK = LockSpace.POSIX, LockSpace.FLOCK

Owner: TypeAlias = tuple[int, int]  # (session, the kernel's number)
FileKey: TypeAlias = tuple[int, LockSpace]  # (ino, space)
WaiterKey: TypeAlias = tuple[int, int]  # (session, a number that the session uses once)


class Segment(NamedTuple):
    """A locked range of one owner; `end` is its last byte."""

    start: int
    end: int
    kind: LockKind
    pid: int


class Held(NamedTuple):
    """A segment with all that belongs to it."""

    file: FileKey
    owner: Owner
    segment: Segment


class Wanted(NamedTuple):
    """A request for a lock; kind UNLOCK takes away."""

    file: FileKey
    owner: Owner
    segment: Segment

    @property
    def kind(self) -> LockKind:
        """What is wanted."""
        return self.segment.kind


class Waiter(NamedTuple):
    """A request that waits."""

    key: WaiterKey
    wanted: Wanted


@dataclass(slots=True)
class _File:
    """One space of one file."""

    owners: dict[Owner, list[Segment]] = field(default_factory=dict)  # In the order of their first locks.
    segment_count: int = 0
    write_count: int = 0
    queue: dict[WaiterKey, Waiter] = field(default_factory=dict)  # First come, first told.
    promised: dict[WaiterKey, Waiter] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self.owners or self.queue or self.promised)


_START, _END = attrgetter("start"), attrgetter("end")


@dataclass(slots=True)
class LockTable:
    """All locks and all waiters."""

    _files: dict[FileKey, _File] = field(default_factory=dict)
    _of_session: dict[int, dict[tuple[FileKey, Owner], None]] = field(default_factory=dict)
    _segment_counts: dict[int, int] = field(default_factory=dict)  # By session.
    _waiters: dict[WaiterKey, Waiter] = field(default_factory=dict)  # Queued and promised.
    _waiters_of: dict[int, dict[WaiterKey, None]] = field(default_factory=dict)  # By session.
    _waits_of: dict[Owner, dict[WaiterKey, None]] = field(default_factory=dict)

    # --- asking -------------------------------------------------------------------------------------------------------

    def conflict(self, wanted: Wanted) -> Held | None:
        """The first lock, in Linux's order, because of which `wanted` cannot be had now; None: it can."""
        file = self._files.get(wanted.file)
        if file is None or wanted.kind is UNLOCK or (wanted.kind is READ and not file.write_count):
            return None
        for owner, segments in file.owners.items():
            if owner != wanted.owner:
                found = _first_conflict(segments, wanted.segment)
                if found is not None:
                    return Held(wanted.file, owner, found)
        return None

    def segments(self, file: FileKey, owner: Owner) -> list[Segment]:
        """What the owner holds in that space of a file, in ascending order."""
        known = self._files.get(file)
        return [] if known is None else list(known.owners.get(owner, ()))

    def is_locked(self, file: FileKey) -> bool:
        """Whether anybody holds a lock there."""
        known = self._files.get(file)
        return known is not None and bool(known.owners)

    def held(self, session: int | None = None) -> Iterator[Held]:
        """Every lock, or those of one session."""
        pairs = (
            ((file, owner) for file, known in self._files.items() for owner in known.owners)
            if session is None
            else iter(self._of_session.get(session, ()))
        )
        for file, owner in pairs:
            for segment in self._files[file].owners[owner]:
                yield Held(file, owner, segment)

    def waiters(self) -> Iterator[Waiter]:
        """Everybody who waits or was promised."""
        return iter(self._waiters.values())

    def files_with_waiters(self) -> list[FileKey]:
        """Where somebody waits and was not promised."""
        return [key for key, file in self._files.items() if file.queue]

    # --- changing -----------------------------------------------------------------------------------------------------

    def set(self, wanted: Wanted, *, would_wait: bool = False) -> bool:
        """Lock or unlock; False: it cannot be had now.

        Nothing has changed then, except that a flock of another kind is gone, as in Linux: converting is not atomic.
        `would_wait`: it gives way to what others were promised.
        Raises: NoLocks (a bound is reached).
        """
        file_key, owner, segment = wanted
        if file_key[1] is FLOCK:
            held = self.segments(file_key, owner)
            if held and held[0].kind is segment.kind:
                return True
            if held:
                self.drop_owner(file_key, owner)
        if self.conflict(wanted) is not None or (would_wait and self._is_promised(wanted)):
            return False
        self.put(wanted)
        return True

    def put(self, wanted: Wanted) -> None:
        """As `set`, whatever others hold: for what is known to be held.  Raises: NoLocks."""
        file_key, owner, segment = wanted
        file = self._files.get(file_key)
        if file is None:
            if segment.kind is UNLOCK:
                return
            file = self._files[file_key] = _File()
        segments = file.owners.get(owner, [])
        low, high, new = _replacement(segments, segment)
        growth = len(new) - (high - low)
        session = owner[0]
        count = self._segment_counts.get(session, 0) + growth
        if growth > 0 and (count > SESSION_SEGMENTS_MAX or file.segment_count + growth > FILE_SEGMENTS_MAX):
            self._maybe_forget(file_key, file)
            raise NoLocks(f"{count - growth} ranges are locked by the session, {file.segment_count} in the file")
        file.write_count += _writes(new) - _writes(segments[low:high])
        file.segment_count += growth
        self._segment_counts[session] = count
        segments[low:high] = new
        if segments and owner not in file.owners:
            file.owners[owner] = segments
            self._of_session.setdefault(session, {})[file_key, owner] = None
        elif not segments:
            self._forget_owner(file_key, file, owner)

    def drop_owner(self, file: FileKey, owner: Owner) -> bool:
        """Take away all that the owner holds there; False: that was nothing."""
        known = self._files.get(file)
        if known is None or owner not in known.owners:
            return False
        self.put(Wanted(file, owner, Segment(0, LAST_BYTE, UNLOCK, 0)))
        return True

    def drop_locks(self, session: int) -> list[FileKey]:
        """Take away all locks of a session; returns where they were."""
        pairs = list(self._of_session.get(session, ()))
        for file, owner in pairs:
            self.drop_owner(file, owner)
        return list({file: None for file, _ in pairs})

    def drop_session(self, session: int) -> list[FileKey]:
        """Take away all locks and waiters of a session; returns where they were."""
        files = self.drop_locks(session)
        files += [file for key in list(self._waiters_of.get(session, ())) if (file := self.withdraw(key)) is not None]
        self._segment_counts.pop(session, None)
        return list(dict.fromkeys(files))

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, waiter: Waiter) -> None:
        """Take up a waiter; `promise` tells when it may try.  One that waits already keeps its place.

        Raises: Deadlock (POSIX only: somebody it would have to wait for waits, in turns, for its owner); NoLocks.
        """
        key, wanted = waiter
        if key not in self._waiters and len(self._waiters_of.get(key[0], ())) >= SESSION_WAITERS_MAX:
            raise NoLocks(f"{SESSION_WAITERS_MAX} requests of the session wait for locks")
        if wanted.file[1] is POSIX and self._closes_circle(waiter):
            raise Deadlock(f"inode {wanted.file[0]}: who holds it waits for this process")
        if self._waiters.get(key) == waiter and key in self._files[wanted.file].queue:
            return
        self.withdraw(key)
        self._files.setdefault(wanted.file, _File()).queue[key] = waiter
        self._waiters[key] = waiter
        self._waiters_of.setdefault(key[0], {})[key] = None
        self._waits_of.setdefault(wanted.owner, {})[key] = None

    def withdraw(self, key: WaiterKey) -> FileKey | None:
        """A waiter, promised or not, is none any more; returns where it waited.  Others may be promised then."""
        waiter = self._waiters.pop(key, None)
        if waiter is None:
            return None
        file_key = waiter.wanted.file
        file = self._files[file_key]
        if file.queue.pop(key, None) is None:
            del file.promised[key]
        _remove(self._waiters_of, key[0], key)
        _remove(self._waits_of, waiter.wanted.owner, key)
        self._maybe_forget(file_key, file)
        return file_key

    def promise(self, file_key: FileKey) -> list[Waiter]:
        """Promise to those who can have what they wait for, in their order; returns them, to be told."""
        file = self._files.get(file_key)
        if file is None or not file.queue:
            return []
        told = []
        for key, waiter in list(file.queue.items()):
            if self.conflict(waiter.wanted) is None and not self._is_promised(waiter.wanted):
                del file.queue[key]
                file.promised[key] = waiter
                told.append(waiter)
        return told

    def is_promised(self, key: WaiterKey) -> bool:
        """Whether it has been told and has not tried yet."""
        waiter = self._waiters.get(key)
        return waiter is not None and key in self._files[waiter.wanted.file].promised

    def unpromise(self, key: WaiterKey) -> FileKey | None:
        """It did not try in time: it waits again, behind the others; None: it was not promised (any more)."""
        waiter = self._waiters.get(key)
        if waiter is None:
            return None
        file = self._files[waiter.wanted.file]
        if file.promised.pop(key, None) is None:
            return None
        file.queue[key] = waiter
        return waiter.wanted.file

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_promised(self, wanted: Wanted) -> bool:
        """Whether what is wanted conflicts with what another owner was promised."""
        file = self._files.get(wanted.file)
        if file is None or wanted.kind is UNLOCK:
            return False
        return any(
            waiter.wanted.owner != wanted.owner and _conflict(waiter.wanted.segment, wanted.segment)
            for waiter in file.promised.values()
        )

    def _closes_circle(self, waiter: Waiter) -> bool:
        seen: set[Owner] = set()
        todo = [waiter.wanted]
        while todo:
            for owner in self._holders(todo.pop()):
                if owner == waiter.wanted.owner:
                    return True
                if owner in seen:
                    continue
                seen.add(owner)
                if len(seen) > DEADLOCK_OWNERS_MAX:
                    return False
                waits = (self._waiters[key] for key in self._waits_of.get(owner, ()))
                todo += [one.wanted for one in waits if one.wanted.file[1] is POSIX]
        return False

    def _holders(self, wanted: Wanted) -> Iterator[Owner]:
        """Every owner because of whom `wanted` cannot be had."""
        file = self._files.get(wanted.file)
        if file is None or (wanted.kind is READ and not file.write_count):
            return
        for owner, segments in file.owners.items():
            if owner != wanted.owner and _first_conflict(segments, wanted.segment) is not None:
                yield owner

    def _forget_owner(self, file_key: FileKey, file: _File, owner: Owner) -> None:
        if file.owners.pop(owner, None) is not None:
            _remove(self._of_session, owner[0], (file_key, owner))
        self._maybe_forget(file_key, file)

    def _maybe_forget(self, file_key: FileKey, file: _File) -> None:
        if file.is_empty:
            self._files.pop(file_key, None)


def _conflict(one: Segment, other: Segment) -> bool:
    return one.start <= other.end and other.start <= one.end and (one.kind is WRITE or other.kind is WRITE)


def _first_conflict(segments: list[Segment], wanted: Segment) -> Segment | None:
    for index in range(bisect_left(segments, wanted.start, key=_END), len(segments)):
        segment = segments[index]
        if segment.start > wanted.end:
            return None
        if wanted.kind is WRITE or segment.kind is WRITE:
            return segment
    return None


def _replacement(segments: list[Segment], new: Segment) -> tuple[int, int, list[Segment]]:
    """What takes the place of `segments[low:high]` when `new` comes: (low, high, replacement)."""
    low = bisect_left(segments, new.start - 1, key=_END)
    high = bisect_right(segments, new.end + 1, key=_START)
    left: list[Segment] = []
    right: list[Segment] = []
    start, end, pid = new.start, new.end, None
    for old in segments[low:high]:
        if old.kind is new.kind:
            start, end = min(start, old.start), max(end, old.end)
            pid = old.pid if pid is None else pid  # Linux makes the older lock larger.
            continue
        if old.start < new.start:
            left.append(Segment(old.start, min(old.end, new.start - 1), old.kind, old.pid))
        if old.end > new.end:
            right.append(Segment(max(old.start, new.end + 1), old.end, old.kind, old.pid))
    middle = [] if new.kind is UNLOCK else [Segment(start, end, new.kind, new.pid if pid is None else pid)]
    return low, high, left + middle + right


def _writes(segments: list[Segment]) -> int:
    return sum(segment.kind is WRITE for segment in segments)


def _remove(index: dict, name: object, entry: object) -> None:  # type: ignore[type-arg]
    """Take an entry out of an index of dicts; an empty one goes."""
    entries = index.get(name)
    if entries is not None:
        entries.pop(entry, None)
        if not entries:
            del index[name]
