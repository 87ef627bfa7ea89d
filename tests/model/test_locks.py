"""The lock table beside two oracles: a dict with one entry per locked byte, and Linux itself on a local file.

Linux's owners are open file descriptions (F_OFD_SETLK): they split, merge and conflict by the same code as those of
processes, and one process can have many.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.core import locks
from metadata.core.locks import LAST_BYTE, Held, LockKind, LockSpace, LockTable, Owner, Segment, Waiter, Wanted
from wire.errors import Deadlock, NoLocks

READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
FILE, OTHER_FILE = (7, LockSpace.POSIX), (8, LockSpace.POSIX)
FLOCKED = (7, LockSpace.FLOCK)
SIZE = 12
OWNERS: list[Owner] = [(1, 1), (1, 2), (2, 1)]


def want(owner: Owner, kind: LockKind, start: int = 0, end: int = LAST_BYTE, *, file: locks.FileKey = FILE) -> Wanted:
    return Wanted(file, owner, Segment(start, end, kind, owner[1]))


class Step(NamedTuple):
    owner: Owner
    kind: LockKind
    start: int
    end: int


steps = st.builds(
    lambda owner, kind, ends: Step(owner, kind, min(ends), max(ends)),
    st.sampled_from(OWNERS),
    st.sampled_from(list(LockKind)),
    st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)),
)


class Bytes:
    """The oracle: who has locked each byte, and how."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[int, Owner], LockKind] = {}

    def can(self, step: Step) -> bool:
        return step.kind is UNLOCK or not any(
            owner != step.owner and step.start <= byte <= step.end and WRITE in (kind, step.kind)
            for (byte, owner), kind in self.kinds.items()
        )

    def set(self, step: Step) -> None:
        for byte in range(step.start, step.end + 1):
            self.kinds.pop((byte, step.owner), None)
            if step.kind is not UNLOCK:
                self.kinds[byte, step.owner] = step.kind


def by_byte(table: LockTable) -> dict[tuple[int, Owner], LockKind]:
    return {
        (byte, held.owner): held.segment.kind
        for held in table.held()
        for byte in range(held.segment.start, held.segment.end + 1)
    }


def check(table: LockTable) -> None:
    """K1, K2, and the counts that bounds rely on."""
    every = list(table.held())
    for one in every:
        for other in every:
            if one.file == other.file and one.owner != other.owner:
                assert not locks._conflict(one.segment, other.segment)  # K1
    for owner in {held.owner for held in every}:
        found = table.segments(FILE, owner)
        for left, right in itertools.pairwise(found):
            assert left.end < right.start  # K2
            assert left.end + 1 < right.start or left.kind is not right.kind
    for session in (1, 2):
        assert table._segment_counts.get(session, 0) == len(list(table.held(session)))
    for key, file in table._files.items():
        segments = [segment for owned in file.owners.values() for segment in owned]
        assert file.segment_count == len(segments), key
        assert file.write_count == sum(segment.kind is WRITE for segment in segments)
        assert not file.is_empty, "a file without locks and waiters is forgotten"


@given(st.lists(steps, max_size=40))
def test_ranges_are_those_of_one_entry_per_byte(done: list[Step]) -> None:
    table, oracle = LockTable(), Bytes()
    for step in done:
        wanted = want(step.owner, step.kind, step.start, step.end)
        could = oracle.can(step)
        conflict = table.conflict(wanted)
        assert (conflict is None) is could
        assert table.set(wanted) is could
        if could:
            oracle.set(step)
        else:
            assert conflict is not None
            assert conflict.owner != step.owner
            assert oracle.kinds[max(conflict.segment.start, step.start), conflict.owner] is conflict.segment.kind
        assert by_byte(table) == oracle.kinds
        check(table)


class MergesOwners(LockTable):
    """The planted bug: a session's processes are one owner, which corrupts what they protect from each other."""

    def set(self, wanted: Wanted, *, would_wait: bool = False) -> bool:
        return super().set(wanted._replace(owner=(wanted.owner[0], 0)), would_wait=would_wait)


def test_the_oracle_catches_merged_owners() -> None:
    table, oracle = MergesOwners(), Bytes()
    first, second = Step((1, 1), WRITE, 0, 3), Step((1, 2), WRITE, 0, 3)
    assert oracle.can(first)
    assert table.set(want(first.owner, WRITE, 0, 3))
    oracle.set(first)
    assert table.set(want(second.owner, WRITE, 0, 3)) is not oracle.can(second)


# --- Linux ------------------------------------------------------------------------------------------------------------

KINDS = {READ: fcntl.F_RDLCK, WRITE: fcntl.F_WRLCK, UNLOCK: fcntl.F_UNLCK}
FLOCK_OPERATIONS = {READ: fcntl.LOCK_SH, WRITE: fcntl.LOCK_EX, UNLOCK: fcntl.LOCK_UN}
FLOCK = struct.Struct("hhqqi4x")  # struct flock of x86-64.


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[list[int]]:
    """One open file description of one local file for each owner."""
    path = tmp_path / "file"
    path.touch()
    opened = [os.open(path, os.O_RDWR) for _ in OWNERS]
    yield opened
    for descriptor in opened:
        os.close(descriptor)


def linux_range(descriptor: int, command: int, step: Step) -> tuple[int, int, int] | None:
    """Set or test; None: refused.  Else what the kernel wrote back."""
    length = 0 if step.end == LAST_BYTE else step.end - step.start + 1
    try:
        told = fcntl.fcntl(descriptor, command, FLOCK.pack(KINDS[step.kind], os.SEEK_SET, step.start, length, 0))
    except BlockingIOError:
        return None
    kind, _, start, length, _ = FLOCK.unpack(told)
    return kind, start, length


def as_linux(held: Held | None) -> tuple[int, int, int] | None:
    if held is None:
        return None
    segment = held.segment
    return KINDS[segment.kind], segment.start, 0 if segment.end == LAST_BYTE else segment.end - segment.start + 1


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_those_of_linux(seed: int, descriptors: list[int]) -> None:
    """Every answer, and the first conflicting lock that F_GETLK names."""
    table, chance = LockTable(), random.Random(seed)
    for _ in range(500):
        owner = chance.choice(OWNERS)
        start, end = sorted((chance.randrange(SIZE), chance.randrange(SIZE)))
        step = Step(owner, chance.choice(list(LockKind)), start, chance.choice((end, end, end, LAST_BYTE)))
        descriptor = descriptors[OWNERS.index(owner)]
        wanted = want(owner, step.kind, step.start, step.end)
        if step.kind is not UNLOCK:
            told = linux_range(descriptor, fcntl.F_OFD_GETLK, step)
            assert told is not None
            expected = None if told[0] == fcntl.F_UNLCK else told
            assert as_linux(table.conflict(wanted)) == expected, (seed, step)
        assert table.set(wanted) is (linux_range(descriptor, fcntl.F_OFD_SETLK, step) is not None), (seed, step)


@pytest.mark.parametrize("seed", range(10))
def test_flocks_are_those_of_linux(seed: int, descriptors: list[int]) -> None:
    """Conversions too, which drop the old lock even when the new one is refused."""
    table, chance = LockTable(), random.Random(seed)
    for _ in range(300):
        owner, kind = chance.choice(OWNERS), chance.choice(list(LockKind))
        try:
            fcntl.flock(descriptors[OWNERS.index(owner)], FLOCK_OPERATIONS[kind] | fcntl.LOCK_NB)
            expected = True
        except BlockingIOError:
            expected = False
        assert table.set(want(owner, kind, file=FLOCKED)) is expected, (seed, owner, kind)


def test_a_flock_refused_in_converting_has_lost_the_old_one() -> None:
    table = LockTable()
    assert table.set(want((1, 1), READ, file=FLOCKED))
    assert table.set(want((2, 1), READ, file=FLOCKED))
    assert not table.set(want((1, 1), WRITE, file=FLOCKED))
    assert table.segments(FLOCKED, (1, 1)) == []
    assert table.set(want((2, 1), WRITE, file=FLOCKED))


def test_flock_and_ranges_know_nothing_of_each_other() -> None:
    table = LockTable()
    assert table.set(want((1, 1), WRITE))
    assert table.set(want((2, 1), WRITE, file=FLOCKED))


# --- waiting ----------------------------------------------------------------------------------------------------------


def waiter(number: int, wanted: Wanted) -> Waiter:
    return Waiter((wanted.owner[0], number), wanted)


def test_waiters_are_promised_in_their_order_and_those_that_go_together_at_once() -> None:
    table = LockTable()
    a, b, c, d = (1, 1), (1, 2), (2, 1), (2, 2)
    assert table.set(want(a, WRITE))
    queue = [waiter(1, want(b, READ)), waiter(2, want(c, READ)), waiter(3, want(d, WRITE))]
    for one in queue:
        table.wait(one)
    assert table.promise(FILE) == []
    table.drop_owner(FILE, a)
    assert table.promise(FILE) == queue[:2]
    assert table.promise(FILE) == []
    for one in queue[:2]:
        assert table.set(one.wanted, would_wait=True)
        assert table.withdraw(one.key) == FILE
    assert table.promise(FILE) == []
    table.drop_owner(FILE, b)
    table.drop_owner(FILE, c)
    assert table.promise(FILE) == queue[2:]


def test_a_promise_is_kept_against_those_who_would_wait_and_not_against_those_who_only_try() -> None:
    table = LockTable()
    waits = waiter(1, want((1, 1), WRITE))
    table.wait(waits)
    assert table.promise(FILE) == [waits]
    assert not table.set(want((2, 1), WRITE), would_wait=True)
    assert table.set(want((2, 2), WRITE))
    assert not table.set(waits.wanted, would_wait=True)


def test_a_broken_promise_goes_to_the_end_of_the_queue() -> None:
    table = LockTable()
    first, second = waiter(1, want((1, 1), WRITE)), waiter(2, want((1, 2), WRITE))
    table.wait(first)
    table.wait(second)
    assert table.promise(FILE) == [first]
    assert table.unpromise(first.key) == FILE
    assert table.promise(FILE) == [second]
    assert table.unpromise(first.key) is None


def test_a_circle_of_waiters_is_refused_over_files_and_sessions() -> None:
    table = LockTable()
    a, b, c = (1, 1), (2, 1), (3, 1)
    for owner, file in ((a, (1, LockSpace.POSIX)), (b, (2, LockSpace.POSIX)), (c, (3, LockSpace.POSIX))):
        assert table.set(want(owner, WRITE, file=file))
    table.wait(waiter(1, want(a, WRITE, file=(2, LockSpace.POSIX))))
    table.wait(waiter(1, want(b, READ, file=(3, LockSpace.POSIX))))
    closing = waiter(1, want(c, READ, file=(1, LockSpace.POSIX)))
    with pytest.raises(Deadlock):
        table.wait(closing)
    assert closing not in list(table.waiters())
    table.withdraw((2, 1))
    table.wait(closing)


def test_a_circle_through_any_of_several_holders_is_found() -> None:
    table = LockTable()
    reader, second, writer = (1, 1), (2, 1), (3, 1)
    assert table.set(want(reader, READ))
    assert table.set(want(second, READ))
    assert table.set(want(writer, WRITE, file=OTHER_FILE))
    table.wait(waiter(1, want(writer, WRITE)))
    with pytest.raises(Deadlock):
        table.wait(waiter(1, want(second, READ, file=OTHER_FILE)))


def test_flocks_are_not_searched_for_circles() -> None:
    """Nor does Linux: an open file may be shared by several processes."""
    table = LockTable()
    first, second = (1, LockSpace.FLOCK), (2, LockSpace.FLOCK)
    assert table.set(want((1, 1), WRITE, file=first))
    assert table.set(want((2, 1), WRITE, file=second))
    table.wait(waiter(1, want((1, 1), WRITE, file=second)))
    table.wait(waiter(1, want((2, 1), WRITE, file=first)))


def test_a_session_that_goes_leaves_neither_locks_nor_waiters() -> None:
    table = LockTable()
    assert table.set(want((1, 1), WRITE))
    assert table.set(want((1, 2), READ, file=FLOCKED))
    other = waiter(1, want((2, 1), READ))
    table.wait(other)
    table.wait(waiter(5, want((1, 1), WRITE, file=OTHER_FILE)))
    assert set(table.drop_session(1)) == {FILE, FLOCKED, OTHER_FILE}
    assert list(table.held()) == []
    assert list(table.waiters()) == [other]
    assert table.promise(FILE) == [other]


def test_bounds_are_kept_and_a_refusal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SESSION_SEGMENTS_MAX", 3)
    monkeypatch.setattr(locks, "SESSION_WAITERS_MAX", 2)
    table = LockTable()
    owner = (1, 1)
    for start in (0, 10, 20):
        assert table.set(want(owner, READ, start, start + 4))
    before = list(table.held())
    for refused in (want(owner, READ, 30, 31), want(owner, UNLOCK, 2, 2), want((1, 2), READ, file=OTHER_FILE)):
        with pytest.raises(NoLocks):
            table.set(refused)
        assert list(table.held()) == before
        check(table)
    assert table.set(want(owner, READ, 5, 9)), "two ranges become one"
    assert table.set(want((2, 1), READ, 30, 31)), "another session's bound is its own"
    for number in (1, 2):
        table.wait(waiter(number, want(owner, WRITE)))
    with pytest.raises(NoLocks):
        table.wait(waiter(3, want(owner, WRITE)))
    table.wait(waiter(2, want(owner, WRITE)))
