"""Migrations: a store of an earlier schema becomes one of this program's, in bounded steps that a crash may interrupt.

Nothing is served meanwhile.  Each step is one transaction, and notes in it how far it has come (MIGRATION_KEY), so
whoever opens the store next goes on from there.  The version in the store is the new one from the first transaction
on: a program of the old version must not touch what is half migrated.

To add a migration: raise SCHEMA_VERSION, add what leads from the version before to STEPS, and a golden store of that
version to the tests.  Steps of released versions are never changed, and only appended to before a release.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from metadata.core import schema
from metadata.core.schema import ROOT_INO, SCHEMA_VERSION, Inode, MigrationRecord
from metadata.engine.ports import ReadTxn, WriteTxn

INODES_PER_STEP = 1024
"""Inodes that one transaction looks at: a few milliseconds of work, some hundred pages written."""


@dataclass(frozen=True)
class Step:
    """One part of a migration."""

    name: str
    run: Callable[[WriteTxn, int], int | None]
    """Do a bounded part of it, from a cursor on (0: the beginning); returns the next cursor, None: it is over."""


@dataclass(frozen=True)
class Progress:
    """How far a migration has come."""

    from_version: int
    step: str
    cursor: int  # Of the step; those that go through the inodes: the last one that is done.
    inodes_until: int  # Inode numbers are below this one.


def begin(txn: WriteTxn) -> bool:
    """Begin to migrate a store of an earlier version, or find that this was begun; False: it is of this version."""
    raw = txn.get(schema.VERSION_KEY)
    assert raw is not None, "there is no file system"
    version = schema.decode_number(raw)
    assert version <= SCHEMA_VERSION, "format.is_formatted has not been asked"
    if txn.get(schema.MIGRATION_KEY) is None:
        if version == SCHEMA_VERSION:
            return False
        _note(txn, MigrationRecord(version, 0))
    txn.put(schema.VERSION_KEY, schema.encode_u32(SCHEMA_VERSION))
    return True


def advance(txn: WriteTxn) -> Progress | None:
    """Do one bounded step of the migration that was begun; None: it is over, and the store can be used."""
    raw = txn.get(schema.MIGRATION_KEY)
    assert raw is not None, "no migration was begun"
    record = schema.decode_migration(raw)
    steps = [step for version in range(record.from_version, SCHEMA_VERSION) for step in STEPS[version]]
    step = steps[record.step]
    cursor = step.run(txn, record.cursor)
    record = replace(record, step=record.step + 1, cursor=0) if cursor is None else replace(record, cursor=cursor)
    if record.step == len(steps):
        txn.delete(schema.MIGRATION_KEY)
        return None
    _note(txn, record)
    return Progress(record.from_version, steps[record.step].name, record.cursor, _inodes_until(txn))


def _note(txn: WriteTxn, record: MigrationRecord) -> None:
    txn.put(schema.MIGRATION_KEY, schema.encode_record(record))


def _inodes_until(txn: ReadTxn) -> int:
    return schema.decode_pair(txn.get(schema.INODES_COUNTER) or bytes(16))[0]


def next_inode(txn: ReadTxn, after: int) -> tuple[int, Inode | None] | None:
    """The next inode that has any key; without attributes if it is dying.  None: there is no more."""
    for key, value in txn.scan(schema.inode_key(after + 1), schema.INODES_END, 1):
        ino = schema.decode_ino(key)
        return ino, schema.decode_inode(value) if key == schema.inode_key(ino) else None
    return None


# --- from 1 to 2 ------------------------------------------------------------------------------------------------------


def sum_up_trees(txn: WriteTxn, after: int) -> int | None:
    """Usage of directories becomes usage of the trees below them (decision 0010)."""
    ino = after
    for _ in range(INODES_PER_STEP):
        found = next_inode(txn, ino)
        if found is None:
            return None
        ino, inode = found
        if inode is not None and stat.S_ISDIR(inode.mode):
            raw = txn.get(schema.usage_key_1(ino))
            assert raw is not None, f"directory {ino} has no usage"
            txn.delete(schema.usage_key_1(ino))
            _add_to_trees(txn, ino, *schema.decode_pair(raw))
    return ino


def _add_to_trees(txn: WriteTxn, directory: int, inodes: int, allocated: int) -> None:
    """Add to a directory and all above it; those that nothing was added to before begin at nothing."""
    while directory:
        key = schema.usage_key(directory)
        raw = txn.get(key)
        if raw is None:
            parent = 0 if directory == ROOT_INO else _parent(txn, directory)
            txn.put(key, schema.encode_usage(parent, inodes, allocated, 0))
        else:
            parent, old_inodes, old_allocated, limited = schema.decode_usage(raw)
            txn.put(key, schema.encode_usage(parent, old_inodes + inodes, old_allocated + allocated, limited))
        directory = parent


def _parent(txn: ReadTxn, directory: int) -> int:
    raw = txn.get(schema.inode_key(directory))
    assert raw is not None, f"directory {directory} does not exist"
    return schema.decode_inode(raw).parent


def note_holders(txn: WriteTxn, done: int) -> int | None:
    """Of inodes without a name it is told, by inode too, which sessions hold them."""
    pairs = txn.scan(*schema.HELD_RANGE, done + INODES_PER_STEP)[done:]
    for key, value in pairs:
        session, ino = schema.decode_held_key(key)
        txn.put(schema.holder_key(ino, session), value)
    return done + len(pairs) if len(pairs) == INODES_PER_STEP else None


STEPS: dict[int, tuple[Step, ...]] = {
    1: (Step("usage of trees", sum_up_trees), Step("holders of inodes", note_holders)),
}
"""What leads from each version to the next."""
