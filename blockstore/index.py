"""The index of the block store in LMDB; the format of its rows is blockstore/core/index_rows.py.

Reads come from any thread, each in a read transaction of its own that ends before the call returns.  `commit` is
called by one thread at a time.  LMDB's default syncing is on: a commit that has returned survives a power cut.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from blockstore.core.index_rows import (
    INDEX_VERSION,
    META_FORMAT,
    META_NEXT,
    NEXT_VALUE,
    PUNCH_KEY,
    PUNCH_VALUE,
    SEGMENT_KEY,
    VERSION_VALUE,
    DamagedRow,
    Entry,
    SegmentRow,
    decode_entry,
    decode_segment_row,
    encode_entry,
    encode_segment_row,
    seal,
    unseal,
)
from wire.errors import StoreError, WrongVersion

MAP_SIZE = 1 << 38
"""Address space set aside for the index, 256 GiB: more than 10**9 blocks; the file grows only with its content."""
READERS_MAX = 126
NO_SPACE_SENTENCE = os.strerror(errno.ENOSPC)
DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
    lmdb.InvalidError,
    lmdb.PanicError,
)
"""What LMDB says of pages that do not fit together."""


class IndexDamaged(StoreError):
    """The index cannot be read; it has to be made again from the segments, which the next start does."""


@dataclass
class Changes:
    """What one commit writes, all or nothing."""

    blocks: dict[bytes, Entry | None] = field(default_factory=dict)  # None: remove the row.
    segments: dict[int, SegmentRow | None] = field(default_factory=dict)
    punches: list[tuple[int, int, int]] = field(default_factory=list)  # Segment, start, end.
    punched: list[tuple[int, int]] = field(default_factory=list)  # Segment, start: rows to remove.
    next_number: int = 0


def _entry_or_none(key: bytes, raw: bytes) -> Entry | None:
    try:
        return decode_entry(key, raw)
    except DamagedRow:
        return None


class Index:
    """An open index."""

    def __init__(self, directory: Path) -> None:
        """Open it, or make an empty one in a directory that exists.

        Raises:
            IndexDamaged: LMDB cannot open what is there.
            WrongVersion: it was written by a newer version of fsd.
        """
        self._mark = directory / "damaged"
        if self._mark.exists():
            raise IndexDamaged("it was found to be damaged before")
        try:
            self._env = lmdb.open(
                str(directory), map_size=MAP_SIZE, max_dbs=4, max_readers=READERS_MAX, max_spare_txns=8, mode=0o600
            )
        except lmdb.Error as error:
            raise IndexDamaged(str(error)) from error
        try:
            self._check_size(directory / "data.mdb")  # Before any page is touched.
            self._blocks = self._env.open_db(b"blocks")
            self._segments = self._env.open_db(b"segments")
            self._punches = self._env.open_db(b"punches")
            self._meta = self._env.open_db(b"meta")
            self._env.reader_check()  # Slots of a process that was killed.
            self._check_version()
        except lmdb.Error as error:
            self._env.close()
            raise IndexDamaged(str(error)) from error
        except StoreError:
            self._env.close()
            raise

    def _check_size(self, path: Path) -> None:
        """A file that was cut short would end this process with SIGBUS at some later read."""
        pages = self._env.info()["last_pgno"] + 1
        if path.stat().st_size < pages * self._env.stat()["psize"]:
            raise IndexDamaged(f"{path} is shorter than its {pages} pages")

    def _check_version(self) -> None:
        with self._env.begin(write=True) as txn:
            raw = txn.get(META_FORMAT, db=self._meta)
            if raw is None:
                txn.put(META_FORMAT, seal(META_FORMAT, VERSION_VALUE.pack(INDEX_VERSION)), db=self._meta)
                return
        try:
            (version,) = VERSION_VALUE.unpack(unseal(META_FORMAT, raw))
        except DamagedRow as error:
            raise IndexDamaged("its version is damaged") from error
        if version != INDEX_VERSION:
            raise WrongVersion(f"the index has format {version}; this version of fsd reads format {INDEX_VERSION}")

    def _damaged(self, error: lmdb.Error) -> IndexDamaged:
        """Leave a mark, so that the next start makes the index again; the error to raise."""
        if isinstance(error, DAMAGE):
            self._mark.touch()
        return IndexDamaged(str(error))

    def get(self, key: bytes) -> Entry | None:
        """The row of a block.

        Raises:
            DamagedRow: there is one, and it does not match its checksum.
        """
        try:
            with self._env.begin(db=self._blocks) as txn:
                raw = txn.get(key)
        except lmdb.Error as error:
            raise DamagedRow(f"row {key.hex()}: {error}") from self._damaged(error)
        return None if raw is None else decode_entry(key, raw)

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, Entry | None]:
        """The rows of those blocks that have one, in one transaction; None: the row is damaged.

        A transaction lets go of the interpreter lock when it ends, and getting that back costs more than the lookup.
        """
        found: dict[bytes, Entry | None] = {}
        try:
            with self._env.begin(db=self._blocks) as txn:
                for key in keys:
                    raw = txn.get(key)
                    if raw is not None:
                        found[key] = _entry_or_none(key, raw)
        except lmdb.Error as error:
            raise self._damaged(error) from error
        return found

    def page(self, after: bytes | None, count: int) -> list[tuple[bytes, int]]:
        """Up to `count` blocks whose key is above `after`, ascending: key and size.  Damaged rows have size 0.

        Raises:
            IndexDamaged: its pages do not fit together.
        """
        try:
            return self._page(after, count)
        except lmdb.Error as error:
            raise self._damaged(error) from error

    def _page(self, after: bytes | None, count: int) -> list[tuple[bytes, int]]:
        rows: list[tuple[bytes, int]] = []
        with self._env.begin(db=self._blocks) as txn, txn.cursor() as cursor:
            more = cursor.first() if after is None else cursor.set_range(after)
            if more and after is not None and cursor.key() == after:
                more = cursor.next()
            while more and len(rows) < count:
                key = bytes(cursor.key())
                try:
                    rows.append((key, decode_entry(key, cursor.value()).size))
                except DamagedRow:
                    rows.append((key, 0))
                more = cursor.next()
        return rows

    def segments(self) -> dict[int, SegmentRow]:
        """The checkpoint of every segment.

        Raises:
            IndexDamaged: a row does not match its checksum.
        """
        found: dict[int, SegmentRow] = {}
        for key, raw in self._rows(self._segments):
            try:
                found[SEGMENT_KEY.unpack(key)[0]] = decode_segment_row(key, raw)
            except DamagedRow as error:
                raise IndexDamaged(f"the checkpoint of a segment: {error}") from error
        return found

    def punches(self) -> list[tuple[int, int, int]]:
        """The ranges whose space is still to be given back: segment, start, end.  Damaged rows are left out."""
        found: list[tuple[int, int, int]] = []
        for key, raw in self._rows(self._punches):
            try:
                found.append((*PUNCH_KEY.unpack(key), *PUNCH_VALUE.unpack(unseal(key, raw))))
            except DamagedRow:
                continue  # The space comes back with its segment.
        return found

    def _rows(self, table: lmdb._Database) -> Iterator[tuple[bytes, bytes]]:
        try:
            with self._env.begin(db=table) as txn, txn.cursor() as cursor:
                for key, raw in cursor:
                    yield bytes(key), bytes(raw)
        except lmdb.Error as error:
            raise self._damaged(error) from error

    def next_number(self) -> int:
        """A number above that of every segment made before the checkpoint; 1 in a new index.

        Raises:
            IndexDamaged: the row does not match its checksum.
        """
        with self._env.begin(db=self._meta) as txn:
            raw = txn.get(META_NEXT)
        if raw is None:
            return 1
        try:
            number: int = NEXT_VALUE.unpack(unseal(META_NEXT, raw))[0]
        except DamagedRow as error:
            raise IndexDamaged(f"the number of the next segment: {error}") from error
        return number

    def commit(self, changes: Changes) -> None:
        """Write all the changes, durably.

        Raises:
            OSError: ENOSPC or EIO; nothing was changed.
            IndexDamaged: its pages do not fit together; nothing was changed, and the next start makes a new one.
        """
        try:
            with self._env.begin(write=True) as txn:
                self._apply(txn, changes)
        except DAMAGE as error:
            raise self._damaged(error) from error
        except lmdb.Error as error:
            code = errno.ENOSPC if NO_SPACE_SENTENCE in str(error) else errno.EIO
            raise OSError(code, f"index: {error}") from error

    def _apply(self, txn: lmdb.Transaction[bytes], changes: Changes) -> None:
        for key, entry in changes.blocks.items():
            if entry is None:
                txn.delete(key, db=self._blocks)
            else:
                txn.put(key, encode_entry(key, entry), db=self._blocks)
        for number, row in changes.segments.items():
            key = SEGMENT_KEY.pack(number)
            if row is None:
                txn.delete(key, db=self._segments)
                self._forget_punches(txn, number)
            else:
                txn.put(key, encode_segment_row(key, row), db=self._segments)
        for segment, start, end in changes.punches:
            key = PUNCH_KEY.pack(segment, start)
            txn.put(key, seal(key, PUNCH_VALUE.pack(end)), db=self._punches)
        for segment, start in changes.punched:
            txn.delete(PUNCH_KEY.pack(segment, start), db=self._punches)
        txn.put(META_NEXT, seal(META_NEXT, NEXT_VALUE.pack(changes.next_number)), db=self._meta)

    def _forget_punches(self, txn: lmdb.Transaction[bytes], segment: int) -> None:
        with txn.cursor(db=self._punches) as cursor:
            more = cursor.set_range(PUNCH_KEY.pack(segment, 0))
            while more and PUNCH_KEY.unpack(cursor.key())[0] == segment:
                cursor.delete()
                more = bool(cursor.key())

    def close(self) -> None:
        """Close it; no call may be under way."""
        self._env.close()
