"""Blocks that wait for repair, as clients report them (metadata/core/namespace/data.py adds those that commits name).

A record goes with its slice (reclaim.py).  Nothing repairs yet: the reconcile loop will work on these records.
"""

from __future__ import annotations

from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from metadata.core import schema
from metadata.core.namespace.inodes import count
from metadata.core.schema import BadBlockRecord
from metadata.engine.ports import WriteTxn


def record(txn: WriteTxn, block: BlockId, *, server_id: int, reason: str, now_ns: int) -> bool:
    """Note that a server's copy is "corrupt" or "missing"; the latest report of a copy counts.

    Returns:
        False: there is no such block (any more), so there is nothing to repair, and nothing was written.
    """
    raw = txn.get(schema.slice_key(block.slice_id))
    if raw is None or block.index * BLOCK_SIZE_MAX >= schema.decode_pair(raw)[1]:
        return False
    key = schema.bad_block_key(block.slice_id, block.index, server_id)
    if txn.get(key) is None:
        count(txn, schema.BAD_BLOCKS_COUNTER, 1)
    txn.put(key, schema.encode_record(BadBlockRecord(reason, now_ns)))
    return True
