"""Who has which inode open: what keeps a file alive for one mount when another one removes its last name.

The table is memory of the writer's thread: operations get it as an argument, and whatever asks or changes it runs in
the order of the group commit.  So an open is either before the unlink, which then holds the inode for it, or after it,
and then finds the inode gone.

Sessions that share tell of every open and close.  One that is alone tells nothing (nobody else can unlink); it tells
all it has open before it acknowledges that it shares.  After a restart of the service the table is empty: until a
session that was there before has told again, it may have anything open (`unreclaimed`): what loses its last name then
is held by UNTOLD, a session that nobody has, until all have told or ended.

What the table says of a session may be too much (a close that is not told yet), never too little.
"""

from __future__ import annotations

from collections.abc import Iterable

from wire.errors import ServerOverloaded

OPENS_PER_SESSION_MAX = 1 << 20
"""Inodes that one session may have open: about 300 MB of memory, and more than a kernel lets one machine open."""


UNTOLD = 0
"""In the place of a session: those of `unreclaimed`, whoever they are.  Numbers of sessions begin with 1."""


class Opens:
    """The table of opens."""

    def __init__(self, unreclaimed: Iterable[int] = ()) -> None:
        """`unreclaimed`: sessions from before the service started, which have not told yet what they have open."""
        self._sessions: dict[int, tuple[int, ...]] = {}  # By inode; mostly one, so no set for each.
        self._inos: dict[int, set[int]] = {}
        self._added: list[tuple[int, int]] = []  # By the batch that is being made.
        self.unreclaimed = set(unreclaimed)

    def add(self, session: int, ino: int) -> None:
        """The session has the inode open, if the batch commits.

        Raises: ServerOverloaded (it has OPENS_PER_SESSION_MAX others); nothing was changed.
        """
        sessions = self._sessions.get(ino, ())
        if session in sessions:
            return
        inos = self._inos.setdefault(session, set())
        if len(inos) >= OPENS_PER_SESSION_MAX:
            raise ServerOverloaded(f"session {session} has {len(inos)} inodes open")
        inos.add(ino)
        self._sessions[ino] = (*sessions, session)
        self._added.append((session, ino))

    def remove(self, session: int, ino: int) -> None:
        """The session has closed it, whatever becomes of the batch."""
        sessions = self._sessions.get(ino, ())
        if session not in sessions:
            return
        if len(sessions) == 1:
            del self._sessions[ino]
        else:
            self._sessions[ino] = tuple(one for one in sessions if one != session)
        inos = self._inos[session]
        inos.remove(ino)
        if not inos:
            del self._inos[session]

    def forget(self, session: int) -> None:
        """The session has ended, and with it every open of it."""
        for ino in list(self._inos.get(session, ())):
            self.remove(session, ino)
        self.unreclaimed.discard(session)

    def reclaimed(self, session: int) -> None:
        """The session has told of everything it has open."""
        self.unreclaimed.discard(session)

    def has(self, session: int, ino: int) -> bool:
        """Whether the session has said that it has the inode open."""
        return session in self._sessions.get(ino, ())

    def of_inode(self, ino: int, *, asking: int) -> set[int]:
        """The sessions that have the inode open, UNTOLD among them if others than the `asking` one may have it."""
        sessions = set(self._sessions.get(ino, ()))
        if self.unreclaimed and self.unreclaimed != {asking}:
            sessions.add(UNTOLD)
        return sessions

    def count(self, session: int) -> int:
        """How many inodes the session has open."""
        return len(self._inos.get(session, ()))

    def __len__(self) -> int:
        """How many inodes are open."""
        return len(self._sessions)

    # --- with the batch -----------------------------------------------------------------------------------------------

    def committed(self) -> None:
        """The batch stands."""
        self._added.clear()

    def aborted(self) -> None:
        """The batch never was: the numbers of inodes that it made will be others'."""
        for session, ino in self._added:
            self.remove(session, ino)
        self._added.clear()
