"""Quotas of directory trees, how they are set and seen: as extended attributes that are not listed.

| attribute of a directory | value |
|---|---|
| fsd.usage.bytes, fsd.usage.inodes | of the tree below it, itself not counted; not to be set |
| fsd.quota.bytes, fsd.quota.inodes | limit of that usage; root may set it, "0" or removing it takes it away |

Values are decimal numbers; a limit that is set may end in K, M, G, T, P or E (powers of 1024).
What a quota refuses is decided in inodes.py.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass

from metadata.core import schema
from metadata.core.namespace.inodes import load_quota, load_usage
from metadata.core.namespace.permissions import READ, require
from metadata.core.schema import ROOT_INO, Inode
from metadata.engine.ports import ReadTxn, WriteTxn
from metadata.protocol import Caller, ListQuotasDone, QuotaStatus, SetXattrMode
from wire.errors import EntryExists, InvalidArgument, NoSuchAttribute, NotDirectory, NotPermitted, NotSupported

PREFIX = b"fsd."
USAGE = (b"fsd.usage.bytes", b"fsd.usage.inodes")
QUOTA = (b"fsd.quota.bytes", b"fsd.quota.inodes")
LIMIT_MAX = (1 << 63) - 1
PATH_SIZE_MAX = 4096
"""Bytes of a path that is shown (Linux PATH_MAX)."""
NAMES_MAX = 20_000
"""Entries looked at for all the names on one page of quotas: about 20 ms of the service's loop."""

_LIMIT = re.compile(rb"(\d{1,19})([KMGTPE]?)\s*\Z", re.IGNORECASE | re.ASCII)
_SUFFIXES = b"KMGTPE"


def parse_limit(text: bytes) -> int:
    """A limit as it is written: digits, and K, M, G, T, P or E for a power of 1024; 0: no limit.

    Raises: InvalidArgument.
    """
    match = _LIMIT.match(text)
    if match is None:
        shown = text.decode("utf-8", "backslashreplace")
        raise InvalidArgument(f"{shown!r} is no limit: digits, then nothing or one of K, M, G, T, P, E")
    digits, suffix = match.groups()
    limit = int(digits) << (10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 0)
    if limit > LIMIT_MAX:
        raise InvalidArgument(f"a limit of {limit} is above {LIMIT_MAX}")
    return limit


# --- attributes -------------------------------------------------------------------------------------------------------


def get(txn: ReadTxn, ino: int, inode: Inode, name: bytes, caller: Caller) -> bytes:
    """The value of one of the attributes.

    Raises:
        NoSuchAttribute: there is no such limit, or it is no directory.
        NotSupported: another name with this prefix.
        AccessDenied: the directory may not be read.
    """
    _check_name(name)
    require(txn, ino, inode, caller, READ)
    if stat.S_ISDIR(inode.mode):
        _, inodes, allocated, limited = load_usage(txn, ino)
        if name in USAGE:
            return b"%d" % (allocated, inodes)[USAGE.index(name)]
        limit = load_quota(txn, ino)[QUOTA.index(name)] if limited else 0
        if limit:
            return b"%d" % limit
    raise NoSuchAttribute(f"{name!r} of inode {ino}")


def set_limit(
    txn: WriteTxn, ino: int, inode: Inode, name: bytes, limit: bytes, how: SetXattrMode, caller: Caller
) -> None:
    """Set or take away ("0") one limit of a directory, whatever it uses already.

    Raises:
        NotPermitted: the caller is not root; or the attribute is not to be set.
        InvalidArgument: the value is none.
        EntryExists, NoSuchAttribute: `how` is CREATE and there is a limit; REPLACE and there is none.
        NotSupported, NotDirectory.
    """
    before = _quota_to_change(txn, ino, inode, name, caller)
    at = QUOTA.index(name)
    number = parse_limit(limit)
    if how is SetXattrMode.CREATE and before[at]:
        raise EntryExists(f"{name!r} of inode {ino}")
    if how is SetXattrMode.REPLACE and not before[at]:
        raise NoSuchAttribute(f"{name!r} of inode {ino}")
    _store(txn, ino, (number, before[1]) if at == 0 else (before[0], number))


def remove_limit(txn: WriteTxn, ino: int, inode: Inode, name: bytes, caller: Caller) -> None:
    """Take away one limit of a directory.

    Raises:
        NoSuchAttribute: there is none.
        NotPermitted, NotSupported, NotDirectory.
    """
    before = _quota_to_change(txn, ino, inode, name, caller)
    at = QUOTA.index(name)
    if not before[at]:
        raise NoSuchAttribute(f"{name!r} of inode {ino}")
    _store(txn, ino, (0, before[1]) if at == 0 else (before[0], 0))


def _check_name(name: bytes) -> None:
    if name not in USAGE and name not in QUOTA:
        raise NotSupported(f"{name!r} is none of {', '.join(one.decode() for one in USAGE + QUOTA)}")


def _quota_to_change(txn: ReadTxn, ino: int, inode: Inode, name: bytes, caller: Caller) -> tuple[int, int]:
    """The quota of a directory, (0, 0) if it has none, when the caller may change it."""
    _check_name(name)
    if name in USAGE:
        raise NotPermitted(f"{name!r} is counted, not set")
    if caller.uid != 0:
        raise NotPermitted("quotas are root's to change")
    if not stat.S_ISDIR(inode.mode):
        raise NotDirectory(f"inode {ino}")
    *_, limited = load_usage(txn, ino)
    return load_quota(txn, ino) if limited else (0, 0)


def _store(txn: WriteTxn, ino: int, quota: tuple[int, int]) -> None:
    parent, inodes, allocated, _ = load_usage(txn, ino)
    limited = quota != (0, 0)
    if limited:
        txn.put(schema.quota_key(ino), schema.encode_pair(*quota))
    else:
        txn.delete(schema.quota_key(ino))
    txn.put(schema.usage_key(ino), schema.encode_usage(parent, inodes, allocated, int(limited)))


# --- what is left -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What the quotas at and above a directory leave; None: no quota says anything.

    The total is that of the nearest quota; what is free is what the tightest one leaves, 0 if it is exceeded.
    """

    bytes_total: int | None = None
    bytes_free: int | None = None
    inodes_total: int | None = None
    inodes_free: int | None = None


def room(txn: ReadTxn, ino: int, inode: Inode) -> Room:
    """The room for a directory's tree, or for another inode."""
    directory = ino if stat.S_ISDIR(inode.mode) else inode.parent
    totals: list[int | None] = [None, None]
    free: list[int | None] = [None, None]
    while directory:
        parent, inodes, allocated, limited = load_usage(txn, directory)
        if limited:
            for at, limit, used in zip((0, 1), load_quota(txn, directory), (allocated, inodes), strict=True):
                if limit:
                    totals[at] = totals[at] or limit
                    left, before = max(limit - used, 0), free[at]
                    free[at] = left if before is None else min(left, before)
        directory = parent
    return Room(totals[0], free[0], totals[1], free[1])


# --- all of them ------------------------------------------------------------------------------------------------------


def list_quotas(txn: ReadTxn, *, after: int, count: int) -> ListQuotasDone:
    """A page of quotas, of directories with numbers above `after`.

    A path is None where it is too long, or finding a name would take too long: in a directory of very many entries.
    """
    pairs = txn.scan(schema.quota_key(after + 1), schema.QUOTA_RANGE[1], count + 1)
    quotas = []
    names = _Names(txn)
    for key, value in pairs[:count]:
        ino = schema.decode_ino(key)
        bytes_max, inodes_max = schema.decode_pair(value)
        _, inodes, allocated, _ = load_usage(txn, ino)
        quotas.append(QuotaStatus(ino, names.path(ino), bytes_max, inodes_max, allocated, inodes))
    return ListQuotasDone(tuple(quotas), len(pairs) <= count)


class _Names:
    """Finds paths; the entries it may look at are bounded."""

    def __init__(self, txn: ReadTxn) -> None:
        self._txn = txn
        self._left = NAMES_MAX
        self._known: dict[int, bytes] = {}

    def path(self, ino: int) -> bytes | None:
        path = b""
        while ino != ROOT_INO:
            parent = load_usage(self._txn, ino)[0]
            name = self._known.get(ino) or self._search(parent, ino)
            if name is None or len(path) + len(name) >= PATH_SIZE_MAX:
                return None
            self._known[ino] = name
            path = b"/" + name + path
            ino = parent
        return path or b"/"

    def _search(self, parent: int, ino: int) -> bytes | None:
        cookie = 0
        while self._left > 0:
            pairs = self._txn.scan(*schema.dirent_range(parent, after_cookie=cookie), min(self._left, 256))
            self._left -= len(pairs)
            for key, value in pairs:
                if schema.decode_dirent(value)[0] == ino:
                    return schema.decode_dirent_key(key)[1]
            if not pairs:
                return None
            cookie = schema.decode_dirent_key(pairs[-1][0])[0]
        return None
