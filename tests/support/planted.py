"""`fsd` with a bug: `python -m tests.support.planted BUG[,BUG] ARGUMENTS OF FSD`.

Each bug replaces one function of the program before its usual main runs, so the program itself needs no place for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import trio

from mount.cli import main

LATE_S = 10.0
"""How much later something is done that ought to have come first: longer than another mount takes to be made."""


def no_name_dropped() -> None:
    """A daemon that never tells the kernel to forget a name."""
    from fsd.frontend.kernel_notifier import ThreadNotifier

    def ignore(self: ThreadNotifier, entries: object) -> None: ...

    ThreadNotifier._forget_entries = ignore  # type: ignore[method-assign]


def shares_before_the_drop() -> None:
    """A daemon that acknowledges that it shares, and only then drops what it and the kernel believe."""
    from fsd.filesystem import FileSystem

    drop = FileSystem.set_alone

    async def later(self: FileSystem, alone: bool) -> None:
        await trio.sleep(LATE_S)
        await drop(self, alone)

    async def acknowledge_first(self: FileSystem, alone: bool) -> None:
        trio.lowlevel.spawn_system_task(later, self, alone)

    FileSystem.set_alone = acknowledge_first  # type: ignore[method-assign]


def ended_sessions_may_change() -> None:
    """A service that takes changes from sessions whose lease has run out."""
    from metadata.core.sessions import Session, SessionTable
    from wire.errors import SessionExpired

    speaking = SessionTable.speaking
    known: dict[int, Session] = {}

    def forgiving(self: SessionTable, session: int, connection: int) -> Session:
        try:
            known[session] = speaking(self, session, connection)
        except SessionExpired:
            if session not in known:
                raise
        return known[session]

    SessionTable.speaking = forgiving  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "no_name_dropped": no_name_dropped,
    "shares_before_the_drop": shares_before_the_drop,
    "ended_sessions_may_change": ended_sessions_may_change,
}

if __name__ == "__main__":
    for bug in sys.argv[1].split(","):
        BUGS[bug]()
    sys.exit(main(sys.argv[2:]))
