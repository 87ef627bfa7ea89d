"""The engine seam: an ordered, transactional key-value store, as narrow as the metadata need it.

Every engine keeps these promises (tests/contract/test_engine.py runs them against each):

- Keys and values are bytes; keys sort as bytes do; a key is 1 to KEY_SIZE_MAX bytes, a value at most
  schema.VALUE_SIZE_MAX.
- A read transaction is a snapshot: it sees what was committed when it began and nothing later.  It is short: never
  held across an await, because an engine cannot reuse pages that a reader may still look at, nor grow under it.
- There is at most one write transaction at a time.  It is begun, used and ended in one thread, and it sees its own
  writes, in scans too.
- commit() returns when the changes are durable.  When it raises, none of them will ever be seen, except after
  EngineBroken, where it is not known.
- After any StoreError from a write transaction's method the transaction has been aborted: nothing more may be done
  with it, and the engine goes on.  (Refusals of the operations above do not come from here and abort nothing.)

Whoever writes must be ready for RunAgain: the same batch is to be run once more, from the start, in a new transaction.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from wire.errors import Retry, StoreError

KEY_SIZE_MAX = 511
"""Bytes in one key; LMDB's limit as it is usually built."""


class RunAgain(StoreError):
    """The transaction was aborted through no fault of its own; run the same batch again.  Never sent to a client."""

    retry = Retry.LATER


class EngineFault(StoreError):
    """The disk failed a read or a write; the transaction was aborted, nothing was changed, the engine goes on (EIO)."""


class EngineBroken(StoreError):
    """The engine cannot go on, and whether the last commit took effect is not known: close, open again, look."""

    maybe_applied = True


@dataclass(frozen=True)
class EngineStatistics:
    """Figures of an engine since it was opened, sizes in bytes."""

    used_bytes: int  # Of the file, or of keys and values in memory.
    capacity_bytes: int  # It grows by itself; 0: no such limit.
    disk_free_bytes: int  # 0: it has no disk.
    key_count: int
    read_count: int  # Transactions begun.
    commit_count: int
    abort_count: int  # Without those that were never written to: aborted by the caller or by a fault.
    growth_count: int
    tight: bool = False  # As WriteTxn.tight.


class ReadTxn(Protocol):
    """A snapshot."""

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        ...

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """The first `limit` pairs with start <= key < end, in ascending order, as they are at the moment of the call.

        The list is whole before this returns, so the caller may change what it walks over.
        """
        ...


class WriteTxn(ReadTxn, Protocol):
    """The one transaction that may write.

    As a context manager it aborts at the end of the block unless it has been committed.
    """

    tight: bool  # The disk is so full that only what frees space should be done; a reserve was kept for that.

    def put(self, key: bytes, value: bytes) -> None:
        """Set `key` to `value`."""
        ...

    def put_often(self, key: bytes, value: bytes) -> None:
        """As `put`, for a key that many operations of one transaction change: an engine may write its last value only.

        Sums and counters: nothing else of the promises changes, and whoever reads or scans sees the value at once.
        """
        ...

    def delete(self, key: bytes) -> bool:
        """Remove `key`; False if it was not there."""
        ...

    def savepoint(self) -> int:
        """Mark this state.  Savepoints nest; each is ended by release() or rollback_to(), innermost first."""
        ...

    def rollback_to(self, savepoint: int) -> None:
        """Undo everything since `savepoint` and end it: the transaction is byte for byte as it was then."""
        ...

    def release(self, savepoint: int) -> None:
        """End `savepoint` and keep what was written since."""
        ...

    def commit(self) -> None:
        """Make everything durable and end the transaction.  Raises: NoSpace, EngineFault, EngineBroken, RunAgain."""
        ...

    def abort(self) -> None:
        """Forget everything and end the transaction; harmless when it has ended."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """An open store."""

    def read(self) -> AbstractContextManager[ReadTxn]:
        """Begin a snapshot; it ends with the block.  Raises: EngineFault."""
        ...

    def write(self) -> WriteTxn:
        """Begin the write transaction.  Raises: NoSpace, EngineFault, EngineBroken."""
        ...

    def statistics(self) -> EngineStatistics:
        """Figures for people; cheap enough for once a second."""
        ...

    def close(self) -> None:
        """Let go of everything; an open write transaction is aborted.  Idempotent."""
        ...
