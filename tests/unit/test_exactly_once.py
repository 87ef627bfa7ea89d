"""Kept answers: a request that arrives again is answered as before and changes nothing."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.core import exactly_once, schema, sessions
from metadata.core.exactly_once import apply_once
from metadata.core.format import format_store
from metadata.core.fsck import check
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import WriteTxn
from metadata.group_commit import Newest
from metadata.protocol import SEQUENCE_WINDOW, Create, LayoutReply, MakeDirectory, Mutation, RemoveDirectory
from wire.errors import EntryExists, ServerOverloaded, StoreError, TooOldRequest
from wire.message import Message

MODE = 0o100644


class Store:
    """A formatted engine and the service's memory of newest numbers."""

    def __init__(self) -> None:
        self.engine = MemoryEngine()
        self.newest = Newest()
        with self.engine.write() as txn:
            format_store(txn, now_ns=1)
            txn.commit()

    def apply(self, *requests: Mutation[Message]) -> list[Message | StoreError]:
        """All in one batch."""
        with self.engine.write() as txn:
            answers = [
                _decoded(request, apply_once(txn, request, newest=self.newest, now_ns=2)) for request in requests
            ]
            txn.commit()
        self.newest.committed()
        return answers

    def restart(self) -> None:
        self.newest = Newest()

    def names(self) -> int:
        with self.engine.read() as txn:
            assert check(txn) == []
            return len(txn.scan(*schema.dirent_range(1), 100_000))


def _decoded(request: Mutation[Message], answer: bytes | StoreError) -> Message | StoreError:
    return msgspec.msgpack.decode(answer, type=request.REPLY) if isinstance(answer, bytes) else answer


def mkdir(sequence: int, name: bytes = b"d", session: int = 1) -> Mutation[Message]:
    return MakeDirectory(session, sequence, 1, name, 0o755)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("first_answer", ["success", "refusal"])
def test_a_retry_gets_the_first_answer(first_answer: str, restart: bool) -> None:
    store = Store()
    if first_answer == "refusal":
        store.apply(mkdir(1))
    first = store.apply(mkdir(2))[0]
    if restart:
        store.restart()
    store.apply(RemoveDirectory(1, 3, 1, b"d"))  # The retry would be answered otherwise by now.
    names = store.names()
    again = store.apply(mkdir(2))[0]
    if first_answer == "refusal":
        assert isinstance(first, EntryExists)
        assert isinstance(again, EntryExists)
    else:
        assert again == first
    assert store.names() == names


def test_two_copies_in_one_batch_are_one() -> None:
    store = Store()
    one, other, third = store.apply(mkdir(1), mkdir(1), mkdir(2, b"e"))
    assert one == other
    assert store.names() == 2
    assert isinstance(third, Message)


def test_sessions_do_not_share_numbers() -> None:
    store = Store()
    store.apply(mkdir(1, b"one", session=1), mkdir(1, b"two", session=2))
    assert store.names() == 2


def test_a_number_whose_place_was_taken_is_too_old() -> None:
    store = Store()
    store.apply(mkdir(1), mkdir(1 + SEQUENCE_WINDOW, b"newer"))
    assert isinstance(store.apply(mkdir(1))[0], TooOldRequest)
    assert store.names() == 2


def test_a_batch_that_was_aborted_is_not_remembered() -> None:
    store = Store()
    with store.engine.write() as txn:
        apply_once(txn, mkdir(1), newest=store.newest, now_ns=2)
        txn.abort()
    store.newest.aborted()
    store.apply(mkdir(1))
    assert store.names() == 1


def test_an_answer_that_asks_for_a_later_try_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()

    def overloaded(txn: WriteTxn, request: Mutation[Message], *, now_ns: int, opens: object) -> Message:
        txn.put(b"cplanted", b"")
        raise ServerOverloaded("the rest of a truncation is still being deleted")

    with monkeypatch.context() as patch:
        patch.setattr(exactly_once, "apply", overloaded)
        assert isinstance(store.apply(mkdir(1))[0], ServerOverloaded)
    assert isinstance(store.apply(mkdir(1))[0], Message)
    with store.engine.read() as txn:
        assert txn.get(b"cplanted") is None


def test_a_bug_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()

    def half_done(txn: WriteTxn, request: Mutation[Message], *, now_ns: int, opens: object) -> Message:
        txn.put(b"cplanted", b"")
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(exactly_once, "apply", half_done)
    with store.engine.write() as txn:
        with pytest.raises(ZeroDivisionError):
            apply_once(txn, mkdir(1), newest=store.newest, now_ns=2)
        assert txn.get(b"cplanted") is None


def test_a_long_answer_is_kept_without_its_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(exactly_once, "KEPT_ANSWER_SIZE_MAX", 10)
    request = Create(1, 1, 1, b"f", MODE, False)
    first = store.apply(request)[0]
    again = store.apply(request)[0]
    assert isinstance(first, LayoutReply)
    assert isinstance(again, LayoutReply)
    assert (again.ino, again.inode, again.extents, again.complete_until) == (first.ino, first.inode, (), 0)


@given(st.lists(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=8), max_size=12))
def test_whatever_is_repeated_happens_once(batches: list[list[tuple[int, bool]]]) -> None:
    """The oracle: the set of numbers sent is the set of names, and each number has one answer."""
    store, answers = Store(), dict[int, object]()
    for batch in batches:
        replies = store.apply(*[mkdir(sequence, b"%d" % sequence) for sequence, _ in batch])
        for (sequence, _), reply in zip(batch, replies, strict=True):
            assert answers.setdefault(sequence, reply) == reply
        if any(restart for _, restart in batch):
            store.restart()
    assert store.names() == len(answers)


def test_kept_answers_are_bounded_by_what_may_be_unanswered_however_many_changes_a_session_makes() -> None:
    """A number that the client has had answered gives its place to a newer one; the ring ends with its session."""
    store = Store()
    last = 5 * SEQUENCE_WINDOW // 2
    for first in range(1, last + 1, 100):
        batch: list[Mutation[Message]] = []
        for sequence in range(first, min(first + 100, last + 1)):
            name = b"d%d" % (sequence // 2)
            batch.append(mkdir(sequence, name) if sequence % 2 == 0 else RemoveDirectory(1, sequence, 1, name))
        store.apply(*batch)
        with store.engine.read() as txn:
            kept = txn.scan(*schema.answer_range(1), 1 << 20)
        assert len(kept) == min(first + 99, last, SEQUENCE_WINDOW)
    newest = [schema.decode_answer(raw).sequence for _, raw in kept]
    assert sorted(newest) == list(range(last - SEQUENCE_WINDOW + 1, last + 1))
    with store.engine.write() as txn:
        sessions.mark_ended(txn, 1)
        while not sessions.clean_step(txn, 1, now_ns=3):
            pass
        assert txn.scan(*schema.answer_range(1), 10) == []
        txn.commit()
    store.newest.forget(1)
    assert store.newest.get(1) is None
