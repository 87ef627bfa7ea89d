"""Reading the namespace: lookup, attributes, symlinks, listings, usage."""

from __future__ import annotations

import stat

from metadata.core import schema
from metadata.core.namespace.inodes import load, load_directory, load_usage
from metadata.core.namespace.permissions import READ, SEARCH, check_name, may, require
from metadata.core.schema import NAME_SIZE_MAX
from metadata.engine.ports import ReadTxn
from metadata.protocol import Caller, Dirent, GetUsageDone, InodeReply, ReadDirDone, ReadLinkDone
from wire.errors import InvalidArgument, NoSuchEntry

EQUAL_COOKIES_MAX = 64
"""Entries of one directory whose hashes are equal: 2 among 2**32 entries are likely, more are an attack."""


def lookup(txn: ReadTxn, *, parent: int, name: bytes, caller: Caller) -> InodeReply:
    """The inode that `name` leads to; "." and ".." lead where they should.

    Raises:
        NoSuchEntry, NotDirectory, AccessDenied, NameTooLong, InvalidArgument.
    """
    if not caller.check and 0 < len(name) <= NAME_SIZE_MAX:
        raw = txn.get(schema.dirent_key(parent, name))
        if raw is not None:
            ino, _ = schema.decode_dirent(raw)
            return InodeReply(ino, load(txn, ino))
    directory = load_directory(txn, parent)
    require(txn, parent, directory, caller, SEARCH)
    if name == b".":
        return InodeReply(parent, directory)
    if name == b"..":
        return InodeReply(directory.parent, load(txn, directory.parent))
    check_name(name)
    raw = txn.get(schema.dirent_key(parent, name)) if name else None
    if raw is None:
        raise NoSuchEntry(f"{name!r} in directory {parent}")
    ino, _ = schema.decode_dirent(raw)
    return InodeReply(ino, load(txn, ino))


def get_attributes(txn: ReadTxn, *, ino: int) -> InodeReply:
    """Raises: NoSuchEntry."""
    return InodeReply(ino, load(txn, ino))


def read_link(txn: ReadTxn, *, ino: int) -> ReadLinkDone:
    """Raises: NoSuchEntry, InvalidArgument (not a symlink)."""
    if not stat.S_ISLNK(load(txn, ino).mode):
        raise InvalidArgument(f"inode {ino} is no symlink")
    target = txn.get(schema.symlink_key(ino))
    assert target is not None, f"symlink {ino} has no target"
    return ReadLinkDone(target)


def read_directory(txn: ReadTxn, *, ino: int, after: int, count: int, plus: bool, caller: Caller) -> ReadDirDone:
    """A page of entries with a cookie above `after`; see protocol.ReadDir.

    The page has about `count` entries: fewer only at the end, more only so that equal cookies stay together.

    Raises:
        NoSuchEntry, NotDirectory, AccessDenied (may not be read; where it may not be searched there is no `plus`).
    """
    directory = load_directory(txn, ino)
    require(txn, ino, directory, caller, READ)
    plus = plus and may(txn, ino, directory, caller, SEARCH)
    pairs = txn.scan(*schema.dirent_range(ino, after_cookie=after), count + 1)
    end = len(pairs) <= count
    if not end:
        pairs, end = _whole_cookies(txn, ino, pairs, count)
    entries = []
    for key, value in pairs:
        cookie, name = schema.decode_dirent_key(key)
        entry_ino, file_type = schema.decode_dirent(value)
        entries.append(Dirent(name, entry_ino, file_type, cookie, load(txn, entry_ino) if plus else None))
    return ReadDirDone(tuple(entries), end)


def _whole_cookies(
    txn: ReadTxn, ino: int, pairs: list[tuple[bytes, bytes]], count: int
) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Make a page of `pairs` (more than `count`) end between two cookies; the page, and whether nothing follows."""
    cookie_of = schema.decode_dirent_key
    last = cookie_of(pairs[count - 1][0])[0]
    if cookie_of(pairs[count][0])[0] != last:
        return pairs[:count], False
    page = [pair for pair in pairs if cookie_of(pair[0])[0] < last]
    page += txn.scan(*schema.dirent_range_of_cookie(ino, last), EQUAL_COOKIES_MAX)
    return page, not txn.scan(*schema.dirent_range(ino, after_cookie=last), 1)


def get_usage(txn: ReadTxn, *, ino: int) -> GetUsageDone:
    """Raises: NoSuchEntry, NotDirectory."""
    load_directory(txn, ino)
    _, inodes, allocated, _ = load_usage(txn, ino)
    return GetUsageDone(inodes, allocated)
