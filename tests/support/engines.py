"""Engines that go wrong on purpose, around a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from metadata.engine.ports import Engine, EngineStatistics, ReadTxn, WriteTxn


class Twisted:
    """An engine whose commits pass through `before_commit`, which may wait, raise, or just count."""

    def __init__(self, engine: Engine, before_commit: Callable[[], None]) -> None:
        self.engine = engine
        self.before_commit = before_commit

    def read(self) -> AbstractContextManager[ReadTxn]:
        return self.engine.read()

    def write(self) -> WriteTxn:
        return _TwistedTxn(self.engine.write(), self.before_commit)

    def statistics(self) -> EngineStatistics:
        return self.engine.statistics()

    def close(self) -> None:
        self.engine.close()


class _TwistedTxn:
    def __init__(self, txn: WriteTxn, before_commit: Callable[[], None]) -> None:
        self._txn = txn
        self._before_commit = before_commit
        self.get, self.scan, self.put, self.delete = txn.get, txn.scan, txn.put, txn.delete
        self.put_often = txn.put_often
        self.savepoint, self.rollback_to, self.release = txn.savepoint, txn.rollback_to, txn.release
        self.abort = txn.abort
        self.tight = txn.tight

    def commit(self) -> None:
        try:
            self._before_commit()
        except BaseException:
            self._txn.abort()
            raise
        self._txn.commit()

    def __enter__(self) -> Self:
        self._txn.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._txn.__exit__(kind, error, trace)


class Gate:
    """A commit that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.commits = 0

    def __call__(self) -> None:
        self.commits += 1
        self.reached.set()
        assert self.opened.wait(10), "the test has forgotten to open the gate"
