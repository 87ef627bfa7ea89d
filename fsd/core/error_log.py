"""Which errors of writing a file have happened, and which handle has been told: once each, as Linux's errseq does.

An error of a background upload belongs to nobody's call.  It is kept here, and every handle that was open is told at
its next flush, fsync or close; a handle opened later is told too, if no other has been.
"""

from __future__ import annotations

from wire.errors import StoreError, from_code


class ErrorCursor:
    """What one handle has been told."""

    __slots__ = ("seen",)

    def __init__(self, seen: int) -> None:
        self.seen = seen


class ErrorLog:
    """The errors of one file; only the last one is kept, as a number that grows and its kind."""

    def __init__(self) -> None:
        self._count = 0
        self._told = 0  # The highest number that any handle has been told.
        self._last: StoreError | None = None
        self._failing = False

    def cursor(self) -> ErrorCursor:
        """For a handle that is being opened."""
        return ErrorCursor(self._told)

    def record(self, error: StoreError) -> None:
        """An error happened; the same one may be met by several, and again by each attempt, and counts once."""
        if not self._failing or type(error) is not type(self._last):
            self._count += 1
        self._failing = True
        self._last = error

    def over(self) -> None:
        """All bytes were written: the next error is another one."""
        self._failing = False

    def has_news(self, cursor: ErrorCursor) -> bool:
        """Whether `check` would raise."""
        return cursor.seen != self._count

    def check(self, cursor: ErrorCursor) -> None:
        """Raise the last error if this handle has not been told of it, and note that it has."""
        if cursor.seen == self._count:
            return
        self.told(cursor)
        assert self._last is not None
        raise from_code(type(self._last).code, self._last.detail)

    def told(self, cursor: ErrorCursor) -> None:
        """This handle is being told of everything up to now."""
        cursor.seen = self._told = self._count
