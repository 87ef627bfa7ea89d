"""The first state of a store, and the check that one can be read; migrate.py leads from older states to this one's."""

from __future__ import annotations

import stat

from metadata.core import schema
from metadata.core.schema import FIRST_INO, ROOT_INO, SCHEMA_VERSION, Inode
from metadata.engine.ports import ReadTxn, WriteTxn
from wire.errors import WrongVersion


def is_formatted(txn: ReadTxn) -> bool:
    """Whether there is a file system in this store, of this program's schema or an earlier one.

    Raises:
        WrongVersion: there is one, of a later schema.
    """
    raw = txn.get(schema.VERSION_KEY)
    if raw is None:
        return False
    version = schema.decode_number(raw)
    if version > SCHEMA_VERSION:
        raise WrongVersion(
            f"the store has schema {version}, this program knows schemas up to {SCHEMA_VERSION}: "
            "a later version of fsd has written it; start that one"
        )
    return True


def format_store(txn: WriteTxn, *, now_ns: int, replicas: int = 2, uid: int = 0, gid: int = 0) -> None:
    """Make an empty file system: a root directory that everybody may read, owned by `uid` and `gid`.

    Args:
        replicas: copies of the blocks of files in it, until a directory says otherwise.
    """
    assert txn.get(schema.VERSION_KEY) is None, "there is a file system already"
    root = Inode(
        mode=stat.S_IFDIR | 0o755,
        nlink=2,
        uid=uid,
        gid=gid,
        size=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        parent=ROOT_INO,
        replicas=replicas,
    )
    txn.put(schema.VERSION_KEY, schema.encode_u32(SCHEMA_VERSION))
    txn.put(schema.inode_key(ROOT_INO), schema.encode_record(root))
    txn.put(schema.usage_key(ROOT_INO), schema.encode_usage(0, 0, 0, 0))
    txn.put(schema.INODES_COUNTER, schema.encode_pair(FIRST_INO, 1))
    txn.put(schema.SLICES_COUNTER, schema.encode_u64(1))
    txn.put(schema.SESSIONS_COUNTER, schema.encode_u64(1))
    txn.put(schema.QUEUE_COUNTER, schema.encode_u64(0))
    txn.put(schema.BAD_BLOCKS_COUNTER, schema.encode_u64(0))
