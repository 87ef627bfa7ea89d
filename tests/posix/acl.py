"""POSIX access control lists as the bytes of their extended attributes."""

from __future__ import annotations

import struct
from collections.abc import Iterable

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"

_TAGS = {"u": 0x01, "U": 0x02, "g": 0x04, "G": 0x08, "m": 0x10, "o": 0x20}
_VERSION = 2
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF


def pack(entries: Iterable[str]) -> bytes:
    """`u:rw-`, `U1001:r--` (a named user), `g:`, `G1002:` (a named group), `m:` (the mask), `o:`."""
    packed = struct.pack("<I", _VERSION)
    for entry in entries:
        who, _, letters = entry.partition(":")
        bits = sum(value for letter, value in zip("rwx", (4, 2, 1), strict=True) if letter in letters)
        packed += _ENTRY.pack(_TAGS[who[0]], bits, int(who[1:]) if who[1:] else _NO_ID)
    return packed


def unpack(value: bytes) -> list[str]:
    """The same, back."""
    letters = {tag: letter for letter, tag in _TAGS.items()}
    entries = []
    for tag, bits, number in _ENTRY.iter_unpack(value[4:]):
        name = "" if number == _NO_ID else str(number)
        mode = "".join(letter if bits & bit else "-" for letter, bit in zip("rwx", (4, 2, 1), strict=True))
        entries.append(f"{letters[tag]}{name}:{mode}")
    return entries
