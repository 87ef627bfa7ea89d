"""Extended attributes as they are stored; whether they may be read or changed is decided elsewhere.

A name and its value's size are one key, the value's parts are others, so that listing reads no value.
"""

from __future__ import annotations

from metadata.core import schema
from metadata.core.schema import XATTR_LIST_SIZE_MAX, XATTR_PART_SIZE, XATTR_VALUE_SIZE_MAX
from metadata.engine.ports import ReadTxn, WriteTxn

NAMES_MAX = XATTR_LIST_SIZE_MAX // 2
"""More names than this do not fit into the list: each has a byte and its NUL."""
_PARTS_MAX = XATTR_VALUE_SIZE_MAX // XATTR_PART_SIZE


def names(txn: ReadTxn, ino: int) -> list[bytes]:
    """All names of one inode, in ascending order."""
    return [schema.decode_xattr_key(key) for key, _ in txn.scan(*schema.xattr_range(ino), NAMES_MAX)]


def has_room(txn: ReadTxn, ino: int, name: bytes) -> bool:
    """Whether one more name keeps the list of all within XATTR_LIST_SIZE_MAX."""
    return sum(len(other) + 1 for other in names(txn, ino)) + len(name) + 1 <= XATTR_LIST_SIZE_MAX


def is_there(txn: ReadTxn, ino: int, name: bytes) -> bool:
    """Whether the inode has an attribute of that name."""
    return txn.get(schema.xattr_key(ino, name)) is not None


def value(txn: ReadTxn, ino: int, name: bytes) -> bytes:
    """The value of an attribute that is there."""
    return b"".join(part for _, part in txn.scan(*schema.xattr_part_range(ino, name), _PARTS_MAX))


def put(txn: WriteTxn, ino: int, name: bytes, new: bytes) -> None:
    """Write an attribute, in the place of its old value if it has one."""
    _delete_parts(txn, ino, name)
    txn.put(schema.xattr_key(ino, name), schema.encode_u32(len(new)))
    for part, start in enumerate(range(0, len(new), XATTR_PART_SIZE)):
        txn.put(schema.xattr_part_key(ino, name, part), new[start : start + XATTR_PART_SIZE])


def delete(txn: WriteTxn, ino: int, name: bytes) -> bool:
    """Take an attribute away; False if there is none of that name."""
    if not txn.delete(schema.xattr_key(ino, name)):
        return False
    _delete_parts(txn, ino, name)
    return True


def _delete_parts(txn: WriteTxn, ino: int, name: bytes) -> None:
    for key, _ in txn.scan(*schema.xattr_part_range(ino, name), _PARTS_MAX):
        txn.delete(key)
