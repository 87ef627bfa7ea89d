"""What the inode service stores: types, limits, and the one table of keys.

All integers in keys are big-endian, so that keys sort as their numbers do and one range scan brings all of one inode.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from wire.message import Message

SCHEMA_VERSION = 1

ROOT_INO = 1
NAME_SIZE_MAX = 255
"""Bytes in one path component (POSIX NAME_MAX on Linux)."""
SYMLINK_SIZE_MAX = 4095
"""Bytes in a symlink's target (PATH_MAX less its NUL)."""
INLINE_SIZE_MAX = 16 << 10
"""Files up to this many bytes live in the metadata (shared design: measured best below 16 KiB)."""
FILE_SIZE_MAX = (1 << 63) - 1
"""Largest file, bytes (loff_t)."""
LINK_COUNT_MAX = 65_000
"""Names of one inode, as ext4."""
XATTR_NAME_SIZE_MAX = 255
XATTR_VALUE_SIZE_MAX = 64 << 10
"""Bytes in one extended attribute (Linux XATTR_SIZE_MAX); stored in parts, as values of the engine are smaller."""
VALUE_SIZE_MAX = 48 << 10
"""Bytes in one value of the engine: a distributed engine takes no more than 64 KiB."""
XATTR_LIST_SIZE_MAX = 64 << 10
"""Bytes of all names of one inode together, each with its NUL (Linux XATTR_LIST_MAX)."""
SLICE_SIZE_MAX = 64 << 20
"""Bytes in one slice: 16 blocks; what one delete or one upload deals with at a time."""

Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class InodeFlags(enum.IntFlag):
    """Bits of Inode.flags."""

    INLINE = 1  # The bytes are in the inline-data key; there are no extents.
    IMMUTABLE = 2  # Reserved: chattr +i.
    APPEND_ONLY = 4  # Reserved: chattr +a.


class Inode(Message, frozen=True, array_like=True):
    """Attributes of one inode, as stored and as sent.  Times are nanoseconds since 1970, may be negative."""

    mode: int  # Type and permission bits, as st_mode.
    nlink: int
    uid: int
    gid: int
    size: int  # Bytes; of a directory: its number of entries without "." and "..".
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int = 0
    flags: int = 0
    allocated: int = 0  # Bytes that extents or inline data cover: st_blocks * 512, rounded up.
    version: int = 0  # Raised with every change of attributes or content.
    data_version: int = 0  # Raised with every change of content: a cached page is good while this stands.
    parent: int = 0  # Of a directory: where ".." leads.  Of others: the directory its usage is charged to.
    replicas: int = 2  # Copies of its blocks; inherited from the directory it was created in.


class Extent(Message, frozen=True, array_like=True):
    """`length` bytes of a file from `offset` on are the bytes of a slice from `slice_offset` on."""

    offset: Unsigned
    length: Annotated[int, msgspec.Meta(ge=1, le=SLICE_SIZE_MAX)]
    slice_id: Unsigned
    slice_offset: Annotated[int, msgspec.Meta(ge=0, lt=SLICE_SIZE_MAX)]
