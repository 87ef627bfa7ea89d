"""Slice ids: each is given out once, to one session."""

from __future__ import annotations

from metadata.core import schema
from metadata.core.namespace.inodes import count
from metadata.engine.ports import WriteTxn
from metadata.protocol import AllocateSlicesDone


def allocate_slices(txn: WriteTxn, *, session: int, slice_count: int) -> AllocateSlicesDone:
    """Reserve ids for a session.

    The reservation is kept until the session ends: a block whose slice is neither recorded nor reserved is garbage.
    """
    first = count(txn, schema.SLICES_COUNTER, slice_count)
    txn.put(schema.reservation_key(session, first), schema.encode_u32(slice_count))
    return AllocateSlicesDone(first, slice_count)
