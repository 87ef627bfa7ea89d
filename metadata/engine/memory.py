"""An engine in memory: what the model tests and the simulator run on.  Passes the same contract suite as LMDB.

Nothing here is durable, and nothing ever fails.  The committed state is one dictionary with its keys sorted beside it;
a write transaction keeps its changes in an overlay that the commit merges in.  A commit while snapshots are open
copies the state first, so that they stay as they are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from metadata.core.schema import VALUE_SIZE_MAX
from metadata.engine.ports import KEY_SIZE_MAX, EngineStatistics


class _State:
    """Pairs and their keys in order."""

    def __init__(self, values: dict[bytes, bytes], keys: list[bytes]) -> None:
        self.values = values
        self.keys = keys

    def copy(self) -> _State:
        return _State(dict(self.values), list(self.keys))

    def keys_between(self, start: bytes, end: bytes) -> Iterator[bytes]:
        at = bisect_left(self.keys, start)
        while at < len(self.keys) and self.keys[at] < end:
            yield self.keys[at]
            at += 1


class MemoryReadTxn:
    """A snapshot of a MemoryEngine."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def get(self, key: bytes) -> bytes | None:
        """See ports.ReadTxn."""
        return self._state.values.get(key)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """See ports.ReadTxn."""
        pairs: list[tuple[bytes, bytes]] = []
        for key in self._state.keys_between(start, end):
            if len(pairs) >= limit:
                break
            pairs.append((key, self._state.values[key]))
        return pairs


class MemoryWriteTxn:
    """The write transaction of a MemoryEngine."""

    tight = False

    def __init__(self, engine: MemoryEngine) -> None:
        self._engine = engine
        self._state = engine._state
        self._changes: dict[bytes, bytes | None] = {}  # None: deleted.
        self._changed_keys: list[bytes] = []  # Sorted; the keys of _changes.
        self._undo: list[tuple[bytes, bytes | None]] = []  # (key, value before, None: was not there).
        self._depth = 0
        self._ended = False

    def get(self, key: bytes) -> bytes | None:
        """See ports.ReadTxn."""
        assert not self._ended, "the transaction has ended"
        if key in self._changes:
            return self._changes[key]
        return self._state.values.get(key)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """See ports.ReadTxn."""
        assert not self._ended, "the transaction has ended"
        first, last = bisect_left(self._changed_keys, start), bisect_left(self._changed_keys, end)
        changed = self._changed_keys[first:last]
        pairs: list[tuple[bytes, bytes]] = []
        at = 0
        for key in self._state.keys_between(start, end):
            while at < len(changed) and changed[at] <= key:
                self._add_change(pairs, changed[at])
                at += 1
            if len(pairs) >= limit:
                return pairs[:limit]
            if key not in self._changes:
                pairs.append((key, self._state.values[key]))
        for key in changed[at:]:
            if len(pairs) >= limit:
                break
            self._add_change(pairs, key)
        return pairs[:limit]

    def _add_change(self, pairs: list[tuple[bytes, bytes]], key: bytes) -> None:
        value = self._changes[key]
        if value is not None:
            pairs.append((key, value))

    def put(self, key: bytes, value: bytes) -> None:
        """See ports.WriteTxn."""
        assert 1 <= len(key) <= KEY_SIZE_MAX, f"key of {len(key)} bytes"
        assert len(value) <= VALUE_SIZE_MAX, f"value of {len(value)} bytes"
        self._set(key, bytes(value))

    put_often = put

    def delete(self, key: bytes) -> bool:
        """See ports.WriteTxn."""
        if self.get(key) is None:
            return False
        self._set(key, None)
        return True

    def _set(self, key: bytes, value: bytes | None) -> None:
        before = self.get(key)
        if self._depth:
            self._undo.append((key, before))
        if key not in self._changes:
            insort(self._changed_keys, key)
        self._changes[key] = value

    def savepoint(self) -> int:
        """See ports.WriteTxn."""
        assert not self._ended, "the transaction has ended"
        self._depth += 1
        return len(self._undo)

    def rollback_to(self, savepoint: int) -> None:
        """See ports.WriteTxn."""
        assert self._depth > 0, "no such savepoint"
        while len(self._undo) > savepoint:
            key, before = self._undo.pop()
            self._changes[key] = before
        self._depth -= 1

    def release(self, savepoint: int) -> None:
        """See ports.WriteTxn."""
        assert self._depth > 0, "no such savepoint"
        assert savepoint <= len(self._undo), "an outer savepoint was ended before an inner one"
        self._depth -= 1
        if self._depth == 0:
            self._undo.clear()

    def commit(self) -> None:
        """See ports.WriteTxn."""
        assert not self._ended, "the transaction has ended"
        assert self._depth == 0, "a savepoint is still open"
        self._ended = True
        self._engine._merge(self._changes)

    def abort(self) -> None:
        """See ports.WriteTxn."""
        if not self._ended:
            self._ended = True
            self._engine._aborted()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class MemoryEngine:
    """See ports.Engine."""

    def __init__(self) -> None:
        self._state = _State({}, [])
        self._readers = 0  # Snapshots of the present state that are open.
        self._writer: MemoryWriteTxn | None = None
        self._read_count = self._commit_count = self._abort_count = 0

    @contextmanager
    def read(self) -> Iterator[MemoryReadTxn]:
        """See ports.Engine."""
        state = self._state
        self._readers += 1
        self._read_count += 1
        try:
            yield MemoryReadTxn(state)
        finally:
            if state is self._state:
                self._readers -= 1

    def write(self) -> MemoryWriteTxn:
        """See ports.Engine."""
        assert self._writer is None, "there is a write transaction already"
        self._writer = MemoryWriteTxn(self)
        return self._writer

    def _merge(self, changes: dict[bytes, bytes | None]) -> None:
        self._writer = None
        self._commit_count += 1
        if self._readers:
            self._state, self._readers = self._state.copy(), 0
        state = self._state
        for key, value in changes.items():
            if value is not None:
                if key not in state.values:
                    insort(state.keys, key)
                state.values[key] = value
            elif state.values.pop(key, None) is not None:
                del state.keys[bisect_left(state.keys, key)]

    def _aborted(self) -> None:
        self._writer = None
        self._abort_count += 1

    def statistics(self) -> EngineStatistics:
        """See ports.Engine."""
        return EngineStatistics(
            used_bytes=sum(len(key) + len(value) for key, value in self._state.values.items()),
            capacity_bytes=0,
            disk_free_bytes=0,
            key_count=len(self._state.values),
            read_count=self._read_count,
            commit_count=self._commit_count,
            abort_count=self._abort_count,
            growth_count=0,
        )

    def close(self) -> None:
        """See ports.Engine."""
        if self._writer is not None:
            self._writer.abort()
