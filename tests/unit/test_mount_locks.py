"""`fsd locks`: the report that programs read, what people see, and that the reference tells both."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadata.core.locks import LAST_BYTE, LockKind, LockSpace
from metadata.protocol import ListedLock, ListLocksDone, Lock, LockHolder
from mount.locks import as_report, show
from mount.target import Address

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
ADDRESS = Address("meta1", 7400)
HELD = ListedLock(5, Lock(42, LockSpace.POSIX, 1 << 63, LockKind.WRITE, 10, 19, 77))
WAITS = ListedLock(6, Lock(42, LockSpace.FLOCK, 9, LockKind.READ, 0, LAST_BYTE, 78), waiting=True)
HOLDERS = (LockHolder(5, "host pid 3", b"/mnt/\xff"), LockHolder(6, "other pid 4", b"/mnt"))


def test_a_lock_is_told_with_its_holder() -> None:
    report = as_report(ListLocksDone(HOLDERS, (HELD, WAITS), 2), ADDRESS)
    assert report["complete"]
    assert report["locks"] == [
        {
            "inode": 42,
            "call": "fcntl",
            "kind": "write",
            "start": 10,
            "end": 19,
            "pid": 77,
            "owner": "8000000000000000",
            "state": "held",
            "session": 5,
            "client": "host pid 3",
            "mountpoint": "/mnt/\\xff",
        },
        {
            "inode": 42,
            "call": "flock",
            "kind": "read",
            "start": 0,
            "end": None,
            "pid": 78,
            "owner": "0000000000000009",
            "state": "waits",
            "session": 6,
            "client": "other pid 4",
            "mountpoint": "/mnt",
        },
    ]


@pytest.mark.parametrize(
    "listed",
    [
        ListLocksDone((LockHolder(5, "host pid 3", b"/mnt", answered=False),), (), 0),
        ListLocksDone(HOLDERS, (HELD,), 2),
        ListLocksDone(HOLDERS, (HELD,), 1, grace=True),
    ],
)
def test_a_list_that_is_not_whole_says_so(listed: ListLocksDone, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_report(listed, ADDRESS)
    assert not report["complete"]
    show(report)
    assert capsys.readouterr().err


def test_people_see_one_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    show(as_report(ListLocksDone(HOLDERS, (HELD, WAITS), 2), ADDRESS))
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert any("42" in line and "fcntl" in line and "10-19" in line and "held" in line for line in lines)
    assert any("flock" in line and "all" in line and "waits" in line and "other pid 4" in line for line in lines)
    show(as_report(ListLocksDone((), (), 0), ADDRESS))
    assert capsys.readouterr().out == "no locks\n"


def test_the_reference_tells_every_field() -> None:
    text = REFERENCE.read_text()
    report = as_report(ListLocksDone(HOLDERS, (HELD, WAITS), 2), ADDRESS)
    assert not [field for field in [*report, *report["locks"][0]] if f"`{field}`" not in text]
