"""The embedded engine: one LMDB environment, default sync, one unnamed database.

Shared state and threads: reads may be made by any thread, the write transaction by one thread at a time (the
service's writer), which also makes the map larger.  Changing the map's size moves the mapping, so it waits until no
snapshot is open and holds new ones back meanwhile; `_gate` guards `_readers` and `_growing` for that.  Therefore
write() is never called inside a read() block of the same thread, and snapshots are short.

An environment is opened once per process and never carried over a fork.  Every lmdb.Error is translated here and
nowhere else.

LMDB copies the pages that it changes: a deletion needs free pages too.  So that a full disk can be emptied again, the
file is kept allocated for RESERVE_BYTES beyond what is used.  When the disk has no more for that, transactions are
`tight`, and what would grow the store is refused while the reserve serves what frees space.

LMDB writes new pages first, flushes, then writes the meta page: a full or failing disk before that
leaves the old state whole.  A failing meta page makes LMDB refuse everything further (MDB_PANIC): EngineBroken.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import lmdb

from metadata.core.schema import VALUE_SIZE_MAX
from metadata.engine.ports import EngineBroken, EngineFault, EngineStatistics, RunAgain
from wire.errors import NoSpace, StoreError

MAP_SIZE_FIRST = 1 << 30
"""Bytes of address space at the start: some 3 million small files; only what is used takes disk."""
HEADROOM_BYTES = 64 << 20
"""Grown when less than this is left: many times what one batch writes, so that a batch rarely has to run again."""
RESERVE_BYTES = 16 << 20
"""Kept allocated beyond the used part of the file: hundreds of deletions, until their pages can be used again."""
RESERVE_SHARE = 50
"""The reserve is at most one in this many bytes of the disk."""
READERS_MAX = 256
"""Slots for snapshots of all processes that look at the environment."""

ALMOST_FULL_BYTES = 1 << 20
"""With less space than this left on the disk, LMDB's EIO of a commit means that a write came out short, as it does on
the last free blocks (mdb_page_flush writes 256 KiB at a time and calls a short write EIO)."""

HEAD_SIZE = 9
"""Bytes of a key that tell what it is about, for most ranges that are scanned: a tag and an inode's number."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (
    lmdb.PanicError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.ProblemError,
    lmdb.MapResizedError,  # Another process writes to our environment.
)


def _translated(error: lmdb.Error) -> StoreError:
    """What the world did, in the port's words."""
    detail = f"LMDB: {error}"
    if error.code in _FULL or isinstance(error, lmdb.DiskError):
        return NoSpace(detail)
    if isinstance(error, lmdb.MapFullError):
        return RunAgain(detail)
    if isinstance(error, _BROKEN):
        return EngineBroken(detail)
    return EngineFault(detail)


def _scan(txn: lmdb.Transaction[bytes], start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
    pairs: list[tuple[bytes, bytes]] = []
    with txn.cursor() as cursor:
        if limit <= 0 or not cursor.set_range(start):
            return pairs
        for key, value in cursor.iternext():
            if key >= end:
                break
            pairs.append((key, value))
            if len(pairs) == limit:
                break
    return pairs


class LmdbReadTxn:
    """A snapshot; see ports.ReadTxn."""

    __slots__ = ("_engine", "_txn")

    def __init__(self, engine: LmdbEngine) -> None:
        self._engine = engine

    def __enter__(self) -> Self:
        self._txn = self._engine._begin_read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._txn.abort()
        self._engine._end_read()

    def get(self, key: bytes) -> bytes | None:
        """See ports.ReadTxn."""
        try:
            return self._txn.get(key)
        except lmdb.Error as error:
            raise _translated(error) from error

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """See ports.ReadTxn."""
        try:
            return _scan(self._txn, start, end, limit)
        except lmdb.Error as error:
            raise _translated(error) from error


class LmdbWriteTxn:
    """The write transaction; see ports.WriteTxn.

    While a savepoint is open, writes go through replace() and pop(), which tell the old value: that is the undo log.

    What was put often is in `_often` and not in LMDB, until the commit or a scan that may meet it.  The value before
    goes into the undo log all the same; where it is put back is where the key is then.
    """

    __slots__ = ("_depth", "_ended", "_engine", "_heads", "_often", "_txn", "_undo", "tight")

    def __init__(self, engine: LmdbEngine, txn: lmdb.Transaction[bytes], *, tight: bool) -> None:
        self.tight = tight
        self._engine = engine
        self._txn = txn
        self._undo: list[tuple[bytes, bytes | None]] = []  # (key, value before; None: was not there).
        self._often: dict[bytes, bytes] = {}
        self._heads: set[bytes] = set()  # The first HEAD_SIZE bytes of the keys in _often, and maybe more.
        self._depth = 0
        self._ended = False

    def get(self, key: bytes) -> bytes | None:
        """See ports.ReadTxn."""
        if key in self._often:
            return self._often[key]
        try:
            return self._txn.get(key)
        except lmdb.Error as error:
            self._fail(error)

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """See ports.ReadTxn."""
        try:
            if self._often and self._may_meet(start, end):
                self._write_often()
            return _scan(self._txn, start, end, limit)
        except lmdb.Error as error:
            self._fail(error)

    def put(self, key: bytes, value: bytes) -> None:
        """See ports.WriteTxn."""
        assert len(value) <= VALUE_SIZE_MAX, f"value of {len(value)} bytes"
        if key in self._often:
            self.put_often(key, value)
            return
        try:
            if self._depth:
                self._undo.append((key, self._txn.replace(key, value)))
            else:
                self._txn.put(key, value)
        except lmdb.Error as error:
            self._fail(error)

    def put_often(self, key: bytes, value: bytes) -> None:
        """See ports.WriteTxn."""
        assert len(value) <= VALUE_SIZE_MAX, f"value of {len(value)} bytes"
        before = self._often.get(key)
        if before is None:
            self._heads.add(key[:HEAD_SIZE])
            if self._depth:
                before = self.get(key)
        if self._depth:
            self._undo.append((key, before))
        self._often[key] = value

    def _may_meet(self, start: bytes, end: bytes) -> bool:
        """Whether something in _often may lie in a range; most ranges are of one inode, and are told by its head."""
        head = start[:HEAD_SIZE]
        if head == end[:HEAD_SIZE]:
            return head in self._heads
        return any(start <= key < end for key in self._often)

    def _write_often(self) -> None:
        """Everything in _often goes to LMDB.  Raises: lmdb.Error."""
        for key, value in self._often.items():
            self._txn.put(key, value)
        self._often.clear()
        self._heads.clear()

    def delete(self, key: bytes) -> bool:
        """See ports.WriteTxn."""
        try:
            if key in self._often:
                self._txn.put(key, self._often.pop(key))  # What follows finds it there.
            if not self._depth:
                return self._txn.delete(key)
            before = self._txn.pop(key)
            if before is None:
                return False
            self._undo.append((key, before))
            return True
        except lmdb.Error as error:
            self._fail(error)

    def savepoint(self) -> int:
        """See ports.WriteTxn."""
        assert not self._ended, "the transaction has ended"
        self._depth += 1
        return len(self._undo)

    def rollback_to(self, savepoint: int) -> None:
        """See ports.WriteTxn."""
        assert self._depth > 0, "no such savepoint"
        try:
            while len(self._undo) > savepoint:
                key, before = self._undo.pop()
                if before is None:
                    self._often.pop(key, None)
                    self._txn.delete(key)
                elif key in self._often:
                    self._often[key] = before
                else:
                    self._txn.put(key, before)
        except lmdb.Error as error:
            self._fail(error)
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
        try:
            self._write_often()
        except lmdb.Error as error:
            self._fail(error)
        self._ended = True
        try:
            self._txn.commit()
        except lmdb.Error as error:
            self._engine._commit_failed(error)
        self._engine._write_ended(committed=True)

    def abort(self) -> None:
        """See ports.WriteTxn."""
        if not self._ended:
            self._ended = True
            self._txn.abort()
            self._engine._write_ended(committed=False)

    def _fail(self, error: lmdb.Error) -> NoReturn:
        assert not isinstance(error, lmdb.BadValsizeError | lmdb.BadTxnError), f"wrong use of the engine: {error}"
        self.abort()
        self._engine._raise_after_abort(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class LmdbEngine:
    """See ports.Engine."""

    def __init__(
        self, directory: Path, *, map_size: int = MAP_SIZE_FIRST, headroom_bytes: int = HEADROOM_BYTES
    ) -> None:
        """Open the environment in `directory`, or make it there, durably.

        Args:
            directory: made with mode 0700 if it is not there; its parent must be.
            map_size: first size of the map in bytes; a larger one that the file knows wins.
            headroom_bytes: the map is doubled before a transaction when less than this is left.

        Raises:
            NoSpace, EngineFault: it cannot be made or opened; also when this process has it open already.
        """
        self._headroom_bytes = headroom_bytes
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._env = lmdb.open(
                str(directory), map_size=map_size, mode=0o600, max_readers=READERS_MAX, max_spare_txns=4
            )
            total = os.statvfs(directory)
            self._reserve_bytes = min(RESERVE_BYTES, total.f_blocks * total.f_frsize // RESERVE_SHARE)
            self._fd = os.open(directory / "data.mdb", os.O_RDWR | os.O_CLOEXEC)
            for made_in in (directory, directory.parent):  # The files' own names must survive a power cut too.
                _flush_directory(made_in)
        except lmdb.Error as error:
            raise _translated(error) from error
        except OSError as error:
            raise (NoSpace if error.errno in _FULL else EngineFault)(f"{directory}: {error}") from error
        self._map_size = self._env.info()["map_size"]
        self._page_size = self._env.stat()["psize"]
        self._allocated_bytes = 0  # Up to here the file has its blocks; 0: not known yet.
        self._tight = False
        self._gate = threading.Condition()
        self._readers = 0
        self._growing = False
        self._writing = False
        self._closed = False
        self._read_count = self._commit_count = self._abort_count = self._growth_count = 0

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> LmdbReadTxn:
        """See ports.Engine."""
        return LmdbReadTxn(self)

    def _begin_read(self) -> lmdb.Transaction[bytes]:
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._readers += 1
            self._read_count += 1
        try:
            return self._env.begin(buffers=False)
        except lmdb.Error as error:
            self._end_read()
            raise _translated(error) from error

    def _end_read(self) -> None:
        with self._gate:
            self._readers -= 1
            if self._growing and self._readers == 0:
                self._gate.notify_all()

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self) -> LmdbWriteTxn:
        """See ports.Engine.  Makes the map larger first when it is nearly full."""
        assert not self._writing, "there is a write transaction already"
        used = (self._env.info()["last_pgno"] + 1) * self._page_size
        if used + self._headroom_bytes > self._map_size:
            self._grow()
        if used + self._reserve_bytes // 2 > self._allocated_bytes:
            self._keep_reserve(used)
        try:
            txn = self._env.begin(write=True, buffers=False)
        except lmdb.Error as error:
            raise _translated(error) from error
        self._writing = True
        return LmdbWriteTxn(self, txn, tight=self._tight)

    def _keep_reserve(self, used: int) -> None:
        """Have the file allocated for the reserve beyond `used`."""
        try:
            os.posix_fallocate(self._fd, used, self._reserve_bytes)
            self._allocated_bytes = used + self._reserve_bytes
            self._tight = False
        except OSError as error:
            if error.errno not in _FULL:
                raise EngineFault(f"{self._directory}: {error}") from error
            self._tight = True

    def _grow(self) -> None:
        """Double the map.  Called by the writing thread, between its transactions."""
        with self._gate:
            self._growing = True
            while self._readers:
                self._gate.wait()
            try:
                self._env.set_mapsize(self._map_size * 2)
                self._map_size = self._env.info()["map_size"]
                self._growth_count += 1
            except lmdb.Error as error:
                raise _translated(error) from error
            finally:
                self._growing = False
                self._gate.notify_all()

    def _write_ended(self, *, committed: bool) -> None:
        self._writing = False
        if committed:
            self._commit_count += 1
        else:
            self._abort_count += 1

    def _commit_failed(self, error: lmdb.Error) -> NoReturn:
        """LMDB has aborted the transaction already; find out whether the environment lives, and tell."""
        self._write_ended(committed=False)
        if not isinstance(error, lmdb.MapFullError):
            try:
                self._env.begin(write=True).abort()
            except lmdb.Error as second:
                raise EngineBroken(f"LMDB: {error}, then {second}") from error
        if error.code == errno.EIO and self._disk_free_bytes() < ALMOST_FULL_BYTES:
            raise NoSpace(f"LMDB: {error}, on a full disk") from error
        self._raise_after_abort(error)

    def _raise_after_abort(self, error: lmdb.Error) -> NoReturn:
        if isinstance(error, lmdb.MapFullError):
            self._grow()
        raise _translated(error) from error

    # --- figures and end ---------------------------------------------------------------------------------------------

    def statistics(self) -> EngineStatistics:
        """See ports.Engine."""
        info, stat = self._env.info(), self._env.stat()
        return EngineStatistics(
            used_bytes=(info["last_pgno"] + 1) * self._page_size,
            capacity_bytes=info["map_size"],
            disk_free_bytes=self._disk_free_bytes(),
            key_count=stat["entries"],
            read_count=self._read_count,
            commit_count=self._commit_count,
            abort_count=self._abort_count,
            growth_count=self._growth_count,
            tight=self._tight,
        )

    def _disk_free_bytes(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def close(self) -> None:
        """See ports.Engine.  No snapshot may be open."""
        if not self._closed:
            assert self._readers == 0, "a snapshot is open"
            self._closed = True
            self._env.close()
            os.close(self._fd)


def _flush_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
