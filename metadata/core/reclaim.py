"""The deletion queue: big files, long truncations, dead sessions' files and dead slices, in bounded steps.

The service's loop, each line its own transaction:

1. `next_step` until it says that there is nothing left: takes inodes and truncations apart.
2. `slices_to_delete` tells slices whose blocks nobody refers to; the blocks are deleted on their servers.
3. `slices_deleted` forgets the slices whose blocks are gone everywhere.

A crash between any two of them loses nothing: blocks are deleted again (idempotent).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from metadata.core import schema
from metadata.core.namespace.data import continue_truncation
from metadata.core.namespace.held import let_go
from metadata.core.namespace.inodes import KEYS_PER_STEP, count, delete_keys, dequeue
from metadata.engine.ports import ReadTxn, WriteTxn

INODES_PER_STEP = 64
"""Held inodes of a dead session that one transaction lets go of."""


@dataclass(frozen=True)
class DeadSlice:
    """A slice that no extent refers to; its blocks are 0 to (size - 1) // BLOCK_SIZE_MAX."""

    slice_id: int
    size: int
    since_ns: int


def next_item(txn: ReadTxn, *, skip: Collection[bytes] = ()) -> bytes | None:
    """The key of the first dying inode or truncated file in the queue that is not in `skip`; None: there is none."""
    for start, end in (schema.QUEUE_INODE_RANGE, schema.QUEUE_TRUNCATION_RANGE):
        for key, _ in txn.scan(start, end, len(skip) + 1):
            if key not in skip:
                return key
    return None


def next_step(txn: WriteTxn, *, now_ns: int, skip: Collection[bytes] = ()) -> bool:
    """Delete up to KEYS_PER_STEP keys of dying inodes or truncated files; False when there was nothing to do.

    Args:
        skip: keys of the queue that are left alone.
    """
    key = next_item(txn, skip=skip)
    if key is None:
        return False
    kind, ino = schema.decode_queue_key(key)
    if kind == b"T":
        continue_truncation(txn, ino, now_ns=now_ns)
    elif delete_keys(txn, ino, limit=KEYS_PER_STEP, now_ns=now_ns):
        dequeue(txn, key)
    return True


def slices_to_delete(txn: ReadTxn, *, after: int = 0, count: int = 256) -> list[DeadSlice]:
    """Up to `count` dead slices with an id above `after`, in ascending order: work for the block servers.

    `since_ns` tells how long a slice has been dead: a reader may hold a layout that is a little older.
    """
    start, end = schema.queued_slice_key(after + 1), schema.QUEUE_SLICE_RANGE[1]
    dead = []
    for key, value in txn.scan(start, end, count):
        size, since_ns = schema.decode_pair(value)
        dead.append(DeadSlice(schema.decode_queue_key(key)[1], size, since_ns))
    return dead


def slices_deleted(txn: WriteTxn, slice_ids: Iterable[int]) -> None:
    """The blocks of these slices are gone from every server: forget the slices, and repairs they waited for."""
    for slice_id in slice_ids:
        assert txn.get(schema.slice_key(slice_id)) is None, f"slice {slice_id} is alive"
        dequeue(txn, schema.queued_slice_key(slice_id))
        forget_bad_blocks(txn, slice_id)


def forget_bad_blocks(txn: WriteTxn, slice_id: int) -> None:
    """Nothing of this slice needs repair any more."""
    pairs = txn.scan(*schema.bad_block_range(slice_id), 1 << 20)  # 16 blocks, a few servers each.
    for key, _ in pairs:
        txn.delete(key)
    if pairs:
        count(txn, schema.BAD_BLOCKS_COUNTER, -len(pairs))


def end_session(txn: WriteTxn, session: int, *, now_ns: int) -> bool:
    """Let go of up to INODES_PER_STEP of the inodes that a dead session holds, then its reservations.

    Returns:
        True when nothing of the session is left but what sessions.py keeps (its record, its answers).
    """
    pairs = txn.scan(*schema.held_range(session), INODES_PER_STEP + 1)
    for key, _ in pairs[:INODES_PER_STEP]:
        let_go(txn, schema.decode_held_key(key)[1], session=session, now_ns=now_ns)
    if len(pairs) > INODES_PER_STEP:
        return False
    reservations = txn.scan(*schema.reservation_range(session), KEYS_PER_STEP + 1)
    for key, _ in reservations[:KEYS_PER_STEP]:
        txn.delete(key)
    return len(reservations) <= KEYS_PER_STEP


def held_count(txn: ReadTxn, session: int, *, limit: int = 10_000) -> int:
    """How many inodes a session holds, counted up to `limit`."""
    return len(txn.scan(*schema.held_range(session), limit))
