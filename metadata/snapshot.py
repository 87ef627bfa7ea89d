"""The loop's read snapshot: begun by the first read of a batch of frames, dropped at the batch's end.

Between beginning and dropping nothing waits, so no snapshot is held across an await: an old snapshot keeps the engine
from reusing pages.  A read that arrives after an acknowledgement was sent begins its batch after that commit, so it
sees the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from metadata.engine.ports import Engine, ReadTxn


class Snapshot:
    """At most one snapshot, of the loop's thread."""

    __slots__ = ("_context", "_engine", "_txn")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._txn: ReadTxn | None = None
        self._context: AbstractContextManager[ReadTxn] | None = None

    def txn(self) -> ReadTxn:
        """The snapshot of this batch; drop() must follow before the next await."""
        if self._txn is None:
            context = self._engine.read()
            self._txn = context.__enter__()
            self._context = context
        return self._txn

    def drop(self) -> None:
        """The batch is over."""
        context = self._context
        if context is not None:
            self._txn = self._context = None
            context.__exit__(None, None, None)

    @contextmanager
    def fresh(self) -> Iterator[ReadTxn]:
        """A snapshot of this moment, for code outside of a batch; no await in the block."""
        self.drop()
        try:
            yield self.txn()
        finally:
            self.drop()
