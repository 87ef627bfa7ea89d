"""POSIX access control lists as values: the kernel's binary format, which lists are valid, and what they say.

Nothing here knows where a list is stored.  The format is that of the attributes system.posix_acl_access and
system.posix_acl_default, all of it little-endian:

| bytes | what |
|---|---|
| u32 | version, 2 |
| u16 u16 u32, for each entry | tag, permission bits (4 read, 2 write, 1 execute), user or group id |

Source: POSIX.1e draft 17; Linux fs/posix_acl.c, include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

from metadata.protocol import Caller
from wire.errors import ArgumentListTooLong, InvalidArgument, NotSupported

ACCESS_XATTR = b"system.posix_acl_access"
DEFAULT_XATTR = b"system.posix_acl_default"
XATTR_NAMES = (ACCESS_XATTR, DEFAULT_XATTR)

SIZE_MAX = 4096
"""Bytes of one list: FUSE takes no more than a page (fs/fuse/acl.c), and with a longer one no check would pass."""

USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20

_VERSION = 2
_NO_ID = 0xFFFFFFFF
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_TAGS = (USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER)
_NAMED = (USER, GROUP)


class Entry(NamedTuple):
    """One entry; `id` counts for USER and GROUP only."""

    tag: int
    perm: int
    id: int = _NO_ID


Acl: TypeAlias = tuple[Entry, ...]


# --- format -----------------------------------------------------------------------------------------------------------


def decode(value: bytes) -> Acl:
    """The entries of an attribute's value, in their order; of an empty value, or of one without entries: none.

    Raises:
        ArgumentListTooLong: above SIZE_MAX.
        InvalidArgument: the size is none of a list's; an unknown tag; a named entry without an id.
        NotSupported: another version.
    """
    if not value:
        return ()
    if len(value) > SIZE_MAX:
        raise ArgumentListTooLong(f"an access control list of {len(value)} bytes")
    if len(value) < _HEADER.size:
        raise InvalidArgument(f"an access control list of {len(value)} bytes")
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise NotSupported(f"version {_HEADER.unpack_from(value)[0]} of an access control list")
    if (len(value) - _HEADER.size) % _ENTRY.size:
        raise InvalidArgument(f"an access control list of {len(value)} bytes")
    entries = []
    for tag, perm, number in _ENTRY.iter_unpack(value[_HEADER.size :]):
        if tag not in _TAGS or (tag in _NAMED and number == _NO_ID):
            raise InvalidArgument(f"an access control entry with tag {tag:#x} and id {number}")
        entries.append(Entry(tag, perm, number if tag in _NAMED else _NO_ID))
    return tuple(entries)


def encode(acl: Acl) -> bytes:
    """The attribute's value."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def check(acl: Acl) -> None:
    """Raises: InvalidArgument, for what is no valid list.

    Valid is: one USER_OBJ, any USER, one GROUP_OBJ, any GROUP, at most one MASK, one OTHER, in this order; a MASK is
    there if any USER or GROUP is.
    """
    tags = [entry.tag for entry in acl]
    named = sum(tag in _NAMED for tag in tags)
    in_order = tags == sorted(tags)  # The numbers of the tags ascend in the order that is asked for.
    singles = all(tags.count(tag) == 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER))
    masks = tags.count(MASK)
    if not (in_order and singles and masks <= 1 and masks >= min(named, 1)):
        raise InvalidArgument(f"no valid access control list: tags {tags}")
    if any(entry.perm & ~0o7 for entry in acl):
        raise InvalidArgument("an access control entry with unknown permission bits")


# --- lists and modes --------------------------------------------------------------------------------------------------


def mode_of(acl: Acl, mode: int) -> tuple[int, bool]:
    """`mode` with the permission bits that the (valid) list gives, and whether they say all that the list says."""
    perms = {entry.tag: entry.perm for entry in acl if entry.tag not in _NAMED}
    group = perms.get(MASK, perms[GROUP_OBJ])
    bits = perms[USER_OBJ] << 6 | group << 3 | perms[OTHER]
    return mode & ~0o777 | bits, MASK not in perms and len(acl) == len(perms)


def with_mode(acl: Acl, mode: int) -> Acl:
    """The (valid) list after a chmod to `mode`: the group's bits go to the mask if there is one."""
    bits = _bits_of(acl, mode)
    return tuple(entry._replace(perm=bits.get(entry.tag, entry.perm)) for entry in acl)


def inherited(default: Acl, mode: int) -> tuple[int, Acl]:
    """The mode and the access list of what is made with `mode` in a directory with this (valid) default list."""
    bits = _bits_of(default, mode)
    acl = tuple(entry._replace(perm=entry.perm & bits.get(entry.tag, 0o7)) for entry in default)
    return mode_of(acl, mode)[0], acl


def _bits_of(acl: Acl, mode: int) -> dict[int, int]:
    """By the tag of each entry that the bits of a mode stand for: those bits."""
    group_class = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    return {USER_OBJ: mode >> 6 & 0o7, group_class: mode >> 3 & 0o7, OTHER: mode & 0o7}


# --- access -----------------------------------------------------------------------------------------------------------


def permits(acl: Acl, *, gid: int, caller: Caller, want: int) -> bool:
    """Whether the (valid) list grants all of `want` to a caller who does not own the inode.

    Args:
        gid: the inode's group.
        want: bits 4 read, 2 write, 1 execute or search.

    Source: Linux posix_acl_permission.
    """
    mask = next((entry.perm for entry in acl if entry.tag == MASK), 0o7)
    groups = (caller.gid, *caller.groups)
    is_member = False
    for tag, perm, number in acl:
        if tag == USER and number == caller.uid:
            return perm & mask & want == want
        if (tag == GROUP_OBJ and gid in groups) or (tag == GROUP and number in groups):
            is_member = True
            if perm & want == want:
                return mask & want == want
        if tag == OTHER:
            return not is_member and perm & want == want
    return False
