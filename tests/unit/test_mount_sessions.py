"""`fsd sessions` and `fsd evict`: the report that programs read, what people see and are asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from metadata.protocol import EndedSession, ListedSession, ListSessionsDone, SessionEnd
from mount.outcome import CommandError, Exit
from mount.sessions import _agreed, as_report, chosen, show
from mount.target import Address

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
LIVE = ListedSession(
    session=5,
    client="host pid 3",
    mountpoint=b"/mnt/\xff",
    opened_ns=1_700_000_000 * 10**9,
    lease_left_ms=18_000,
    alone=False,
    reclaimed=True,
    open_inodes=7,
    nameless_inodes=1,
    locks=2,
    waiting_locks=1,
    leases=4711,
    recalls=3,
    recall_age_ms=4_200,
)
ENDED = EndedSession(4, "other pid 4", b"/mnt", SessionEnd.EXPIRED, 60_000, cleaned=True)


def report(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    listed = {"sessions": (LIVE,), "total": 1, "ended": (ENDED,), "fenced_count": 1, "lease_ms": 20_000}
    return as_report(ListSessionsDone(**{**listed, **changes}), Address("meta1", 7400))


def test_a_session_is_told_with_all_that_it_holds() -> None:
    assert report()["sessions"] == [
        {
            "session": 5,
            "mountpoint": "/mnt/\\xff",
            "client": "host pid 3",
            "since": "2023-11-14T22:13:20+00:00",
            "lease_left_ms": 18_000,
            "state": "shares",
            "reclaimed": True,
            "open_inodes": 7,
            "nameless_inodes": 1,
            "locks": 2,
            "waiting_locks": 1,
            "leases": 4711,
            "recalls": 3,
            "recall_age_ms": 4_200,
        }
    ]
    assert report()["ended"][0]["how"] == "expired"


def test_people_see_what_is_waited_for_and_who_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(total=2))
    told = capsys.readouterr()
    assert any("/mnt/\\xff" in line and "4711" in line and "4.2 s" in line for line in told.out.splitlines())
    assert any("other pid 4" in line and "expired" in line and "60 s" in line for line in told.out.splitlines())
    assert "the first 1 of 2" in told.err


def test_an_empty_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(sessions=(), total=0, ended=()))
    assert capsys.readouterr().out == "no sessions\n"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (4, "session 4 (/mnt, other pid 4) has ended already, 60 s ago: expired"),
        (99, "no session has the number 99; fsd sessions meta1:7400 lists them"),
    ],
)
def test_what_is_no_session_is_refused_with_a_sentence(number: int, sentence: str) -> None:
    with pytest.raises(CommandError) as caught:
        chosen(report(), number)
    assert caught.value.sentence == sentence


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("Yes\n", True), ("\n", False), ("", False)])
def test_a_person_is_asked_and_told_what_will_be(
    answer: str, agreed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert _agreed(chosen(report(), 5)) is agreed
    told = capsys.readouterr().err
    assert "session 5, /mnt/\\xff, host pid 3" in told
    assert "its locks are free" in told


def test_without_a_terminal_nothing_is_done_unless_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(CommandError) as caught:
        _agreed(chosen(report(), 5))
    assert caught.value.code is Exit.USAGE


def test_the_reference_tells_every_field() -> None:
    text = REFERENCE.read_text()
    made = report()
    fields = [*made, *made["sessions"][0], *made["ended"][0]]
    assert not [field for field in fields if f"`{field}`" not in text]
