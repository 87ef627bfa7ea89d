"""The session table, step by step, on a virtual clock."""

from __future__ import annotations

import pytest

from metadata.core.schema import SessionRecord
from metadata.core.sessions import Session, SessionTable
from metadata.protocol import OpenSession, RenewSession
from wire.errors import SessionExpired


def record(place: bytes = b"/mnt", opening: str = "") -> SessionRecord:
    return SessionRecord("client", "boot", place, opening, 1, 0)


def opened(table: SessionTable, number: int, place: bytes = b"/mnt", opening: str = "", now_s: float = 0.0) -> Session:
    pending = table.begin_opening(OpenSession("client", "boot", place, b"/", opening))
    session = table.admit(pending, number, record(place, opening), now_s=now_s)
    table.abandon(pending)
    return session


def renewal(session: int, alone: bool, turn: int) -> RenewSession:
    return RenewSession(session, 0, alone, 0, turn)


def test_the_only_session_is_told_that_it_is_alone() -> None:
    table = SessionTable(20)
    assert table.tell(opened(table, 1), now_s=0) == (True, 1)


def test_an_opening_waits_until_the_lone_session_says_that_it_shares() -> None:
    table = SessionTable(20)
    first = opened(table, 1)
    table.tell(first, now_s=0)
    opening = table.begin_opening(OpenSession("client", "boot", b"/other"))
    assert table.waits_for(opening) == [1]
    assert table.has_news(first, renewal(1, True, 1))
    table.renew(renewal(1, True, 1), now_s=1)
    assert table.waits_for(opening) == [1]
    table.renew(renewal(1, False, 1), now_s=2)
    assert table.waits_for(opening) == []


def test_a_delayed_copy_of_an_older_renewal_acknowledges_nothing() -> None:
    table = SessionTable(20)
    first = opened(table, 1)
    table.tell(first, now_s=0)
    table.renew(renewal(1, False, 1), now_s=1)  # It shared for a while ...
    assert table.tell(first, now_s=1) == (True, 2)  # ... and is alone again.
    opening = table.begin_opening(OpenSession("client", "boot", b"/other"))
    table.renew(renewal(1, False, 1), now_s=2)
    assert table.waits_for(opening) == [1]


def test_a_delayed_copy_that_says_alone_takes_nothing_back() -> None:
    table = SessionTable(20)
    first = opened(table, 1)
    table.tell(first, now_s=0)
    opening = table.begin_opening(OpenSession("client", "boot", b"/other"))
    table.renew(renewal(1, False, 1), now_s=1)
    table.renew(renewal(1, True, 1), now_s=2)
    assert table.waits_for(opening) == [], "else the opening would fail at its admission"
    table.admit(opening, 2, record(b"/other"), now_s=2)


def test_a_session_whose_lease_ran_out_is_unknown_and_holds_up_nobody() -> None:
    table = SessionTable(20)
    table.tell(opened(table, 1), now_s=0)
    opening = table.begin_opening(OpenSession("client", "boot", b"/other"))
    assert table.expire(now_s=19.9) == []
    assert [session.number for session in table.expire(now_s=20)] == [1]
    assert table.waits_for(opening) == []
    with pytest.raises(SessionExpired):
        table.renew(renewal(1, True, 1), now_s=20)


def test_a_session_is_not_alone_before_the_end_of_the_other_is_durable() -> None:
    table = SessionTable(20)
    first = opened(table, 1)
    table.renew(renewal(1, False, 0), now_s=0)
    opened(table, 2, b"/other")
    table.end(2)
    assert not table.is_alone(first)
    table.ended(2)
    assert table.is_alone(first)


def test_the_same_place_is_taken_over_without_waiting() -> None:
    table = SessionTable(20)
    table.tell(opened(table, 1), now_s=0)
    opening = table.begin_opening(OpenSession("client", "boot", b"/mnt"))
    assert table.waits_for(opening) == []
    assert table.replaced(opening) == [1]
    table.admit(opening, 2, record(), now_s=0)
    assert list(table.live) == [2]


def test_a_newer_opening_of_the_same_place_supersedes_the_older() -> None:
    table = SessionTable(20)
    older = table.begin_opening(OpenSession("client", "boot", b"/mnt"))
    elsewhere = table.begin_opening(OpenSession("client", "boot", b"/other"))
    newer = table.begin_opening(OpenSession("client", "boot", b"/mnt"))
    assert (older.superseded, elsewhere.superseded, newer.superseded) == (True, False, False)


def test_a_repeated_opening_finds_its_session() -> None:
    table = SessionTable(20)
    session = opened(table, 1, opening="abc")
    assert table.earlier_result(OpenSession("client", "boot", b"/mnt", b"/", "abc")) is session
    assert table.earlier_result(OpenSession("client", "boot", b"/mnt", b"/", "")) is None
    assert table.earlier_result(OpenSession("client", "boot", b"/mnt", b"/", "abd")) is None


def test_restored_sessions_have_a_fresh_lease_and_may_act_alone() -> None:
    table = SessionTable(20)
    ended = SessionRecord("client", "boot", b"/gone", "", 1, 0, ended=True)
    table.restore([(7, record()), (8, ended)], now_s=100)
    assert list(table.live) == [7]
    assert table.next_end_s() == 120
    opening = table.begin_opening(OpenSession("client", "boot", b"/other"))
    assert table.waits_for(opening) == [7]
    table.renew(renewal(7, False, 5), now_s=101)
    assert table.waits_for(opening) == []


def test_two_openings_at_once_are_both_told_that_they_share() -> None:
    table = SessionTable(20)
    one = table.begin_opening(OpenSession("client", "boot", b"/one"))
    two = table.begin_opening(OpenSession("client", "boot", b"/two"))
    first = table.admit(one, 1, record(b"/one"), now_s=0)
    table.abandon(one)
    assert table.tell(first, now_s=0) == (False, 0)
    assert table.waits_for(two) == []
    second = table.admit(two, 2, record(b"/two"), now_s=0)
    table.abandon(two)
    assert table.tell(second, now_s=0) == (False, 0)
