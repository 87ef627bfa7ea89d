"""Requests of the kernel, taken apart: one struct for each kind, and what surrounds names.

Pure functions of bytes.  The layouts are drawn in protocol.py; a struct here has the fields of the table, in its order,
the gaps aside.  `unpack_from` raises struct.error for a body that is too short; everything else that a body can have
wrong raises Malformed.  Whoever answers the kernel turns both into EINVAL.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from fsd.frontend.direct.protocol import EXTENSION_GROUPS

IN_HEADER: Final = Struct("=IIQQIIIHxx")
"""len, opcode, unique, nodeid, uid, gid, pid, extensions in units of 8 bytes."""
HEADER_SIZE: Final = IN_HEADER.size

FORGET_IN: Final = Struct("=Q")
GETATTR_IN: Final = Struct("=I4xQ")
SETATTR_IN: Final = Struct("=I4xQQQqqqIIII4xII4x")
MKNOD_IN: Final = Struct("=III4x")
MKDIR_IN: Final = Struct("=II")
RENAME_IN: Final = Struct("=Q")
LINK_IN: Final = Struct("=Q")
OPEN_IN: Final = Struct("=II")
READ_IN: Final = Struct("=QQIIQI4x")
WRITE_IN: Final = READ_IN
RELEASE_IN: Final = Struct("=QIIQ")
FSYNC_IN: Final = Struct("=QI4x")
SETXATTR_IN: Final = Struct("=III4x")
SETXATTR_IN_SHORT: Final = Struct("=II")
"""Without SETXATTR_EXT."""
GETXATTR_IN: Final = Struct("=I4x")
FLUSH_IN: Final = Struct("=Q8xQ")
INIT_IN: Final = Struct("=IIIII")
INIT_IN_SHORT: Final = Struct("=IIII")
"""Of a kernel without INIT_EXT."""
LOCK_IN: Final = Struct("=QQQQIII4x")
ACCESS_IN: Final = Struct("=I4x")
CREATE_IN: Final = Struct("=IIII")
INTERRUPT_IN: Final = Struct("=Q")
BMAP_IN: Final = Struct("=QI4x")
IOCTL_IN: Final = Struct("=QIIQII")
FLAGS: Final = Struct("=I")
"""Of FS_IOC_GETFLAGS and FS_IOC_SETFLAGS."""
FSXATTR: Final = Struct("=IIIII8x")
"""xflags, extsize, nextents, projid, cowextsize; of FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR."""
POLL_IN: Final = Struct("=QQII")
BATCH_FORGET_IN: Final = Struct("=I4x")
FORGET_ONE: Final = Struct("=QQ")
FALLOCATE_IN: Final = Struct("=QQQI4x")
RENAME2_IN: Final = Struct("=QI4x")
LSEEK_IN: Final = Struct("=QQI4x")
COPY_FILE_RANGE_IN: Final = Struct("=QQQQQQQ")
SYNCFS_IN: Final = Struct("=8x")
STATX_IN: Final = Struct("=I4xQII")

EXTENSION_HEADER: Final = Struct("=II")


class Malformed(Exception):
    """A request that does not follow the protocol; the message says how."""


def name_at(body: bytes, offset: int) -> bytes:
    """The one name that follows the struct of `offset` bytes."""
    end = len(body) - 1
    if end <= offset or body.find(b"\0", offset) != end:
        raise Malformed(f"no name in {body[offset : offset + 64]!r}")
    return body[offset:end]


def names_at(body: bytes, offset: int) -> tuple[bytes, bytes]:
    """The two names that follow the struct of `offset` bytes."""
    parts = body[offset:].split(b"\0")
    if len(parts) != 3 or parts[2] or not (parts[0] and parts[1]):
        raise Malformed(f"not two names in {body[offset : offset + 64]!r}")
    return parts[0], parts[1]


def name_and_value(body: bytes, offset: int, size: int) -> tuple[bytes, bytes]:
    """The name, and the value of `size` bytes after it (SETXATTR)."""
    end = body.find(b"\0", offset)
    if end <= offset or len(body) - end - 1 != size:
        raise Malformed(f"no name and {size} bytes in {len(body) - offset} bytes")
    return body[offset:end], body[end + 1 :]


def forgotten(body: bytes) -> list[tuple[int, int]]:
    """(nodeid, count) of BATCH_FORGET."""
    (count,) = BATCH_FORGET_IN.unpack_from(body)
    if len(body) != BATCH_FORGET_IN.size + count * FORGET_ONE.size:
        raise Malformed(f"{count} inodes in {len(body)} bytes")
    return list(FORGET_ONE.iter_unpack(memoryview(body)[BATCH_FORGET_IN.size :]))


def cut_extensions(body: bytes, units: int) -> tuple[bytes, tuple[int, ...]]:
    """The body without its extensions of `units` * 8 bytes, and the groups that they name."""
    at = len(body) - units * 8
    if at < 0:
        raise Malformed(f"{units * 8} bytes of extensions in {len(body)} bytes")
    groups: tuple[int, ...] = ()
    rest = body[at:]
    while rest:
        size, kind = EXTENSION_HEADER.unpack_from(rest)
        if not EXTENSION_HEADER.size <= size <= len(rest):
            raise Malformed(f"an extension of {size} bytes in {len(rest)}")
        if kind == EXTENSION_GROUPS:
            groups += _groups(rest[EXTENSION_HEADER.size : size])
        rest = rest[(size + 7) & ~7 :]
    return body[:at], groups


def _groups(data: bytes) -> tuple[int, ...]:
    count = int.from_bytes(data[:4], "little")
    if len(data) < 4 + count * 4:
        raise Malformed(f"{count} groups in {len(data)} bytes")
    return tuple(memoryview(data)[4 : 4 + count * 4].cast("I"))
