"""What the inode service stores: types, limits, and the one table of keys.

All integers in keys are big-endian, so that keys sort as their numbers do and one range scan brings all of one inode.
The first byte of a key is its space.  `u64`, `u32`, `u16` and `u8` are unsigned integers, `packed` is a MessagePack
array of the type named (fields are only appended, with defaults), `bytes` is as it came.

| key | value | what |
|---|---|---|
| "i" ino:u64 "A" | packed Inode | attributes; the inode exists exactly while this key does |
| "i" ino:u64 "B" parent:u64 | count:u32 | names in `parent`; only of inodes with nlink > 1 that are no directories |
| "i" ino:u64 "D" hash:u64 name | ino:u64 type:u8 | directory entry; hash is its cookie, type is st_mode >> 12 |
| "i" ino:u64 "E" end:u64 | length:u32 slice:u64 slice_offset:u32 | extent, by where it ends; slice 0: zeros |
| "i" ino:u64 "I" | bytes | inline data; exactly when the INLINE flag is set |
| "i" ino:u64 "L" | bytes | target of a symlink |
| "i" ino:u64 "N" name | size:u32 | extended attribute: its name, and its value's size |
| "i" ino:u64 "O" session:u64 | since_ns:i64 | inode without a name: a session that keeps it open ("h", by inode) |
| "i" ino:u64 "R" | parent:u64 inodes:u64 allocated:u64 limited:u8 | of a directory: usage of the tree below it |
| "i" ino:u64 "T" | offset:u64 | extents that begin at or beyond `offset` are dead and wait to be deleted |
| "i" ino:u64 "V" name 0:u8 part:u8 | bytes | part of an extended attribute's value, XATTR_PART_SIZE but for the last |
| "s" slice:u64 | count:u64 size:u64 | a slice, and how many extents refer to it |
| "q" "I" ino:u64 | since_ns:i64 | keys of this inode are to be deleted; its attributes are gone already |
| "q" "S" slice:u64 | size:u64 since_ns:u64 | blocks of this slice are to be deleted |
| "q" "T" ino:u64 | since_ns:i64 | the dead extents of this inode are to be deleted |
| "h" session:u64 ino:u64 | since_ns:i64 | inode without a name that this session keeps open; 0: any session may |
| "r" session:u64 first:u64 | count:u32 | slice ids given to this session |
| "n" session:u64 | packed SessionRecord | a session |
| "a" session:u64 slot:u16 | packed AnswerRecord | answer to a mutation; slot is sequence % SEQUENCE_WINDOW |
| "m" "C" | packed ClusterRecord | the cluster's identity, the map's epoch |
| "m" "S" server:u32 | packed ServerRecord | a block server |
| "b" slice:u64 index:u32 server:u32 | packed BadBlockRecord | a block to repair; server 0: short of copies |
| "u" ino:u64 | bytes:u64 inodes:u64 | quota of the tree below a directory, "limited" in its "R"; 0: no limit |
| "c" "inodes" | next_ino:u64 count:u64 | next inode number; inodes in existence |
| "c" "slices" | next_slice:u64 | next slice id |
| "c" "sessions" | next_session:u64 | next session number |
| "c" "queue" | count:u64 | entries of the deletion queue ("q") |
| "c" "bad" | count:u64 | records of "b" |
| "c" "zeros" | bytes:u64 | bytes in extents of slice 0, of all inodes; absent: none |
| "v" | version:u32 | SCHEMA_VERSION of what is stored |
| "v" "m" | packed MigrationRecord | how far the migration to this version has come; while it is under way |
"""

from __future__ import annotations

import enum
import hashlib
import struct
from functools import lru_cache
from typing import Annotated

import msgspec

from blockstore.core.cluster_map import Server
from wire.message import Message

SCHEMA_VERSION = 2

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
XATTR_PART_SIZE = 32 << 10
"""Bytes of an extended attribute's value in one key: two parts at most, each well below VALUE_SIZE_MAX."""
XATTR_LIST_SIZE_MAX = 64 << 10
"""Bytes of all names of one inode together, each with its NUL (Linux XATTR_LIST_MAX)."""
SLICE_SIZE_MAX = 64 << 20
"""Bytes in one slice: 16 blocks; what one delete or one upload deals with at a time."""

ZEROS_SLICE = 0
"""The slice_id of extents that are allocated and have no bytes: they read as zeros; there is no such slice."""

FIRST_INO = 2
"""The first inode made after the root."""
COOKIE_FIRST = 16
"""Cookies below this one are the front end's, for "." and "..": metadata.protocol.FIRST_COOKIE."""

Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class InodeFlags(enum.IntFlag):
    """Bits of Inode.flags."""

    INLINE = 1  # The bytes are in the inline-data key; there are no extents.
    IMMUTABLE = 2  # chattr +i
    APPEND_ONLY = 4  # chattr +a
    CAPABILITY = 8  # It has the attribute security.capability, which a write or chown must drop.
    ACCESS_ACL = 16  # It has the attribute system.posix_acl_access.
    DEFAULT_ACL = 32  # It has the attribute system.posix_acl_default: what is made in it inherits a list.
    LINKABLE = 64  # It was made without a name (O_TMPFILE), and may get one.


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
    """`length` bytes of a file from `offset` on are the bytes of a slice from `slice_offset` on.

    Of slice ZEROS_SLICE they are zeros, and `slice_offset` is 0.
    """

    offset: Unsigned
    length: Annotated[int, msgspec.Meta(ge=1, le=SLICE_SIZE_MAX)]
    slice_id: Unsigned
    slice_offset: Annotated[int, msgspec.Meta(ge=0, lt=SLICE_SIZE_MAX)]


class SessionRecord(Message, frozen=True, array_like=True):
    """A mount's session, as stored."""

    client: str
    host_boot_id: str
    mountpoint: bytes
    opening: str  # The random identity of its OpenSession, so that a retry is answered with the same session.
    root_ino: int
    opened_ns: int
    ended: bool = False  # Closed, replaced or expired: what it has left is being cleaned up.


class AnswerRecord(Message, frozen=True, array_like=True):
    """The answer to one mutation, kept for retries."""

    sequence: int
    code: int  # 0: success; else the error's number.
    body: bytes  # The encoded reply, or the error's detail.


class ClusterRecord(Message, frozen=True, array_like=True):
    """The cluster map without its servers."""

    cluster_id: str
    epoch: int
    group_count: int
    next_server_id: int = 1


class ServerRecord(Message, frozen=True, array_like=True):
    """A block server, as stored."""

    uuid: str
    server: Server
    joined_ns: int = 0


class MigrationRecord(Message, frozen=True, array_like=True):
    """How far a migration has come; see migrate.py."""

    from_version: int
    step: int  # Index of the step that is next or under way.
    cursor: int = 0  # Of that step's own; 0: at its beginning.


class BadBlockRecord(Message, frozen=True, array_like=True):
    """A block that waits for repair."""

    reason: str  # "corrupt", "missing" or "degraded"
    since_ns: int
    copies: int = 0  # For "degraded": how many there are.


def part_of(extent: Extent, start: int, end: int) -> Extent:
    """What of an extent lies in [start, end) of the file, which is inside it."""
    if extent.slice_id == ZEROS_SLICE:
        return Extent(start, end - start, ZEROS_SLICE, 0)
    return Extent(start, end - start, extent.slice_id, extent.slice_offset + start - extent.offset)


# --- keys of one inode ------------------------------------------------------------------------------------------------

_INO = struct.Struct(">cQc")
_INO_U64 = struct.Struct(">cQcQ")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_I64 = struct.Struct(">q")
_TWO_U64 = struct.Struct(">QQ")
_TAG_U64 = struct.Struct(">ccQ")
_ONE_U64 = struct.Struct(">cQ")
_PAIR_U64 = struct.Struct(">cQQ")
_DIRENT = struct.Struct(">QB")
_USAGE = struct.Struct(">QQQB")
_EXTENT = struct.Struct(">IQI")
_ANSWER = struct.Struct(">cQH")
_SERVER = struct.Struct(">ccI")
_BAD_BLOCK = struct.Struct(">cQII")

DIRENT_KEYS_KEPT = 4096
"""Keys of names seen lately: a name is looked up, then made or removed, then looked up again; each time hashed."""
OFFSET_MAX = (1 << 64) - 1
"""Largest offset a key can hold."""


def inode_key(ino: int) -> bytes:
    """Attributes."""
    return _INO.pack(b"i", ino, b"A")


def inode_range(ino: int) -> tuple[bytes, bytes]:
    """Everything of one inode."""
    return _ONE_U64.pack(b"i", ino), _INO.pack(b"i", ino, b"\xff")


def decode_ino(key: bytes) -> int:
    """The inode of any of its keys, or of its quota."""
    return int.from_bytes(key[1:9], "big")


def link_key(ino: int, parent: int) -> bytes:
    """How many names it has in one directory."""
    return _INO_U64.pack(b"i", ino, b"B", parent)


def link_range(ino: int) -> tuple[bytes, bytes]:
    """All its directories."""
    return _INO.pack(b"i", ino, b"B"), _INO.pack(b"i", ino, b"C")


def decode_link_key(key: bytes) -> int:
    """The directory of a back-link."""
    return int.from_bytes(key[10:18], "big")


@lru_cache(maxsize=4096)  # An operation asks up to three times for the same name: 0.8 µs each.
def name_hash(name: bytes) -> int:
    """The cookie of a directory entry: COOKIE_FIRST to 2**63 - 1."""
    return max(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1, COOKIE_FIRST)


@lru_cache(maxsize=DIRENT_KEYS_KEPT)
def dirent_key(parent: int, name: bytes) -> bytes:
    """One directory entry."""
    return _INO_U64.pack(b"i", parent, b"D", name_hash(name)) + name


def dirent_range(parent: int, *, after_cookie: int = 0) -> tuple[bytes, bytes]:
    """Entries whose cookie is above `after_cookie`."""
    return _INO_U64.pack(b"i", parent, b"D", min(after_cookie + 1, OFFSET_MAX)), _INO.pack(b"i", parent, b"E")


def dirent_range_of_cookie(parent: int, cookie: int) -> tuple[bytes, bytes]:
    """Entries with exactly this cookie."""
    return _INO_U64.pack(b"i", parent, b"D", cookie), _INO_U64.pack(b"i", parent, b"D", cookie + 1)


def decode_dirent_key(key: bytes) -> tuple[int, bytes]:
    """Cookie and name."""
    return int.from_bytes(key[10:18], "big"), key[18:]


def extent_key(ino: int, end: int) -> bytes:
    """The extent that ends at offset `end` of the file."""
    return _INO_U64.pack(b"i", ino, b"E", end)


def extent_range(ino: int, *, from_offset: int = 0) -> tuple[bytes, bytes]:
    """Extents that end above `from_offset`: the first of them is the one that covers it, if there is one."""
    return _INO_U64.pack(b"i", ino, b"E", min(from_offset + 1, OFFSET_MAX)), _INO.pack(b"i", ino, b"F")


def decode_extent(key: bytes, value: bytes) -> Extent:
    """The extent of a pair."""
    length, slice_id, slice_offset = _EXTENT.unpack(value)
    return Extent(int.from_bytes(key[10:18], "big") - length, length, slice_id, slice_offset)


def encode_extent(extent: Extent) -> bytes:
    """The value of an extent."""
    return _EXTENT.pack(extent.length, extent.slice_id, extent.slice_offset)


def inline_key(ino: int) -> bytes:
    """Inline data."""
    return _INO.pack(b"i", ino, b"I")


def symlink_key(ino: int) -> bytes:
    """Target of a symlink."""
    return _INO.pack(b"i", ino, b"L")


def xattr_key(ino: int, name: bytes) -> bytes:
    """Name and size of an extended attribute."""
    return _INO.pack(b"i", ino, b"N") + name


def xattr_range(ino: int) -> tuple[bytes, bytes]:
    """All extended attributes' names."""
    return _INO.pack(b"i", ino, b"N"), _INO.pack(b"i", ino, b"O")


def decode_xattr_key(key: bytes) -> bytes:
    """The name of an extended attribute."""
    return key[10:]


def xattr_part_key(ino: int, name: bytes, part: int) -> bytes:
    """One part of an extended attribute's value."""
    return _INO.pack(b"i", ino, b"V") + name + bytes([0, part])


def xattr_part_range(ino: int, name: bytes) -> tuple[bytes, bytes]:
    """All parts of an extended attribute's value."""
    start = _INO.pack(b"i", ino, b"V") + name
    return start + b"\0", start + b"\1"


def holder_key(ino: int, session: int) -> bytes:
    """A session that keeps an inode without a name."""
    return _INO_U64.pack(b"i", ino, b"O", session)


def holder_range(ino: int) -> tuple[bytes, bytes]:
    """All sessions that keep it."""
    return _INO.pack(b"i", ino, b"O"), _INO.pack(b"i", ino, b"P")


def decode_holder_key(key: bytes) -> tuple[int, int]:
    """Inode and session."""
    return int.from_bytes(key[1:9], "big"), int.from_bytes(key[10:18], "big")


def truncation_key(ino: int) -> bytes:
    """From where on extents are dead."""
    return _INO.pack(b"i", ino, b"T")


def usage_key(ino: int) -> bytes:
    """Usage of the tree below a directory."""
    return _INO.pack(b"i", ino, b"R")


def usage_key_1(ino: int) -> bytes:
    """Usage of a directory without its subdirectories: in stores of schema 1 only."""
    return _INO.pack(b"i", ino, b"U")


# --- other keys -------------------------------------------------------------------------------------------------------

INODES_COUNTER = b"cinodes"
SLICES_COUNTER = b"cslices"
SESSIONS_COUNTER = b"csessions"
QUEUE_COUNTER = b"cqueue"
BAD_BLOCKS_COUNTER = b"cbad"
ZEROS_COUNTER = b"czeros"
VERSION_KEY = b"v"
MIGRATION_KEY = b"vm"
INODES_END = b"j"
CLUSTER_KEY = b"mC"
SERVER_RANGE = (b"mS", b"mT")
SESSION_RANGE = (b"n", b"o")
HELD_RANGE = (b"h", b"i")
QUEUE_RANGE = (b"q", b"r")
QUEUE_INODE_RANGE = (b"qI", b"qJ")
QUEUE_SLICE_RANGE = (b"qS", b"qT")
QUEUE_TRUNCATION_RANGE = (b"qT", b"qU")
BAD_BLOCK_RANGE = (b"b", b"c")
QUOTA_RANGE = (b"u", b"v")


def quota_key(directory: int) -> bytes:
    """The quota of a directory."""
    return _ONE_U64.pack(b"u", directory)


def slice_key(slice_id: int) -> bytes:
    """A slice."""
    return _ONE_U64.pack(b"s", slice_id)


def queued_inode_key(ino: int) -> bytes:
    """Deletion queue: the keys of an inode."""
    return _TAG_U64.pack(b"q", b"I", ino)


def queued_slice_key(slice_id: int) -> bytes:
    """Deletion queue: the blocks of a slice."""
    return _TAG_U64.pack(b"q", b"S", slice_id)


def queued_truncation_key(ino: int) -> bytes:
    """Deletion queue: the dead extents of an inode."""
    return _TAG_U64.pack(b"q", b"T", ino)


def decode_queue_key(key: bytes) -> tuple[bytes, int]:
    """Kind (b"I", b"S" or b"T") and number."""
    return key[1:2], int.from_bytes(key[2:10], "big")


def held_key(session: int, ino: int) -> bytes:
    """An inode without a name that a session keeps."""
    return _PAIR_U64.pack(b"h", session, ino)


def held_range(session: int) -> tuple[bytes, bytes]:
    """All that a session keeps."""
    return _ONE_U64.pack(b"h", session), _PAIR_U64.pack(b"h", session, OFFSET_MAX)


def decode_held_key(key: bytes) -> tuple[int, int]:
    """Session and inode."""
    return int.from_bytes(key[1:9], "big"), int.from_bytes(key[9:17], "big")


def reservation_key(session: int, first: int) -> bytes:
    """Slice ids given to a session."""
    return _PAIR_U64.pack(b"r", session, first)


def reservation_range(session: int) -> tuple[bytes, bytes]:
    """All slice ids given to a session."""
    return _ONE_U64.pack(b"r", session), _PAIR_U64.pack(b"r", session, OFFSET_MAX)


def session_key(session: int) -> bytes:
    """A session."""
    return _ONE_U64.pack(b"n", session)


def decode_session_key(key: bytes) -> int:
    """The session's number."""
    return int.from_bytes(key[1:9], "big")


def answer_key(session: int, slot: int) -> bytes:
    """The answer in one slot of a session's ring: slot = sequence % SEQUENCE_WINDOW."""
    return _ANSWER.pack(b"a", session, slot)


def answer_range(session: int) -> tuple[bytes, bytes]:
    """The whole ring of a session."""
    return _ONE_U64.pack(b"a", session), _ANSWER.pack(b"a", session, 0xFFFF)


def server_key(server_id: int) -> bytes:
    """A block server."""
    return _SERVER.pack(b"m", b"S", server_id)


def bad_block_key(slice_id: int, index: int, server_id: int) -> bytes:
    """A block to repair; server_id 0: it is short of copies."""
    return _BAD_BLOCK.pack(b"b", slice_id, index, server_id)


def bad_block_range(slice_id: int) -> tuple[bytes, bytes]:
    """All blocks of a slice that wait for repair."""
    return _ONE_U64.pack(b"b", slice_id), _BAD_BLOCK.pack(b"b", slice_id, 0xFFFFFFFF, 0xFFFFFFFF)


def decode_bad_block_key(key: bytes) -> tuple[int, int, int]:
    """Slice, index, server."""
    _, slice_id, index, server_id = _BAD_BLOCK.unpack(key)
    return slice_id, index, server_id


# --- values -----------------------------------------------------------------------------------------------------------

_ENCODER = msgspec.msgpack.Encoder()
encode_record = _ENCODER.encode
"""Bytes of a packed record: Inode, SessionRecord, AnswerRecord, ClusterRecord, ServerRecord, BadBlockRecord, ..."""
decode_inode = msgspec.msgpack.Decoder(Inode).decode
decode_session = msgspec.msgpack.Decoder(SessionRecord).decode
decode_answer = msgspec.msgpack.Decoder(AnswerRecord).decode
decode_cluster = msgspec.msgpack.Decoder(ClusterRecord).decode
decode_server = msgspec.msgpack.Decoder(ServerRecord).decode
decode_bad_block = msgspec.msgpack.Decoder(BadBlockRecord).decode
decode_migration = msgspec.msgpack.Decoder(MigrationRecord).decode

encode_usage = _USAGE.pack
"""Usage of a tree: (parent, inodes, allocated, limited).

`parent` is the directory's Inode.parent, 0 of the root: beside the sums, so that the way up costs one read for each
directory on it.  `inodes` and `allocated` are sums over all inodes that are charged (Inode.parent) to the directory or
to one below it, itself not counted.  `limited` is 1 if the directory has a quota, else 0.
"""
decode_usage = _USAGE.unpack


def encode_dirent(ino: int, mode: int) -> bytes:
    """The value of a directory entry."""
    return _DIRENT.pack(ino, mode >> 12)


def decode_dirent(value: bytes) -> tuple[int, int]:
    """Inode number and the S_IFMT bits of its mode."""
    ino, kind = _DIRENT.unpack(value)
    return ino, kind << 12


def encode_u32(number: int) -> bytes:
    """A 32-bit counter or size."""
    return _U32.pack(number)


def encode_u64(number: int) -> bytes:
    """A 64-bit counter, size or offset."""
    return _U64.pack(number)


def decode_number(value: bytes) -> int:
    """Of encode_u32 or encode_u64."""
    return int.from_bytes(value, "big")


def encode_time(time_ns: int) -> bytes:
    """Nanoseconds since 1970."""
    return _I64.pack(time_ns)


def decode_time(value: bytes) -> int:
    """Of encode_time."""
    return int.from_bytes(value, "big", signed=True)


def encode_pair(first: int, second: int) -> bytes:
    """Slice (count, size), inode counter (next, count), queued slice (size, since_ns), quota (bytes,
    inodes); usage in schema 1.
    """
    return _TWO_U64.pack(first, second)


def decode_pair(value: bytes) -> tuple[int, int]:
    """Of encode_pair."""
    first, second = _TWO_U64.unpack(value)
    return first, second
