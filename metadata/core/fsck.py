"""The invariants of a store, numbered, and the check of all of them.

| number | invariant |
|---|---|
| M1 | A directory entry leads to an inode that exists and has the entry's type; its key has the hash of its name. |
| M2 | Directories are a tree: each but the root has one entry, in its Inode.parent, and is below the root. |
| M3 | nlink is the number of names; of a directory, 2 and the number of its subdirectories. |
| M4 | The size of a directory is the number of its entries; of a symlink, the length of its target. |
| M5 | Of files, back-links count the names in each directory exactly when nlink > 1; Inode.parent has a name. |
| M6 | An inode without a name is held, by one session or more ("h" and "O" agree), charged to nobody; nothing else. |
| M7 | A slice's count is that of the extents that refer to it, above 0, within its size; none of these is queued. |
| M8 | Extents of an inode do not overlap; they end within its size, but for slice 0 and beyond a truncation mark. |
| M9 | `allocated` is the bytes of inline data or of extents; only regular files have either, none has both. |
| M10 | The usage of a directory is the sum over the inodes charged to it or below; its parent stands beside it. |
| M11 | Inline data is there exactly with the INLINE flag, not empty, within INLINE_SIZE_MAX and the size. |
| M12 | Counters: inodes, queue, bad blocks, bytes of slice 0 are counted; numbers given out are below the next. |
| M13 | A truncation mark is there exactly while its inode is queued for it. |
| M14 | An extended attribute's value is as long as its name's key says; CAPABILITY is set exactly with its attribute. |
| M15 | Keys of an inode without attributes are queued for deletion; no key is of an unknown kind; values are bounded. |
| M16 | A directory has a quota, with a limit of bytes or inodes or both, exactly when its usage says "limited". |
| M17 | Access control lists are valid; an access list says more than its mode and agrees with it; flags tell of both. |
"""

from __future__ import annotations

import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from metadata.core import posix_acl, schema
from metadata.core.namespace.data import CAPABILITY_XATTR
from metadata.core.schema import INLINE_SIZE_MAX, ROOT_INO, VALUE_SIZE_MAX, Extent, Inode, InodeFlags
from metadata.engine.ports import ReadTxn
from wire.errors import StoreError

_PAGE = 4096


@dataclass(frozen=True)
class Violation:
    """One thing that is not as it should be."""

    number: int  # Of the invariant.
    what: str

    def __str__(self) -> str:
        return f"M{self.number}: {self.what}"


@dataclass
class _Entry:
    parent: int
    name: bytes
    ino: int
    file_type: int


@dataclass
class _Found:
    """Everything in the store, by kind."""

    violations: list[Violation] = field(default_factory=list)
    inodes: dict[int, Inode] = field(default_factory=dict)
    entries: list[_Entry] = field(default_factory=list)
    links: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    extents: dict[int, list[Extent]] = field(default_factory=lambda: defaultdict(list))
    inline: dict[int, int] = field(default_factory=dict)
    symlinks: dict[int, int] = field(default_factory=dict)
    xattrs: dict[int, dict[bytes, int]] = field(default_factory=lambda: defaultdict(dict))
    acls: dict[int, dict[bytes, bytes]] = field(default_factory=lambda: defaultdict(dict))
    xattr_parts: dict[int, Counter[bytes]] = field(default_factory=lambda: defaultdict(Counter))
    marks: dict[int, int] = field(default_factory=dict)
    usage: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    quotas: dict[int, tuple[int, int]] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)  # Inodes with any key.
    slices: dict[int, tuple[int, int]] = field(default_factory=dict)
    queue: set[tuple[bytes, int]] = field(default_factory=set)
    held: set[tuple[int, int]] = field(default_factory=set)
    holders: set[tuple[int, int]] = field(default_factory=set)
    bad_blocks: int = 0
    zeros: int = 0  # Bytes in extents of slice 0.
    counters: dict[bytes, bytes] = field(default_factory=dict)

    def wrong(self, number: int, what: str) -> None:
        self.violations.append(Violation(number, what))


def check(txn: ReadTxn) -> list[Violation]:
    """Check every invariant.  Reads the whole store, and holds its inodes, entries and extents in memory."""
    found = _Found()
    for key, value in _pairs(txn):
        if len(value) > VALUE_SIZE_MAX:
            found.wrong(15, f"value of {key!r} has {len(value)} bytes")
        _take(found, key, value)
    _check_entries(found)
    _check_tree(found)
    _check_names(found)
    _check_data(found)
    _check_slices(found)
    _check_usage(found)
    _check_quotas(found)
    _check_attributes(found)
    _check_acls(found)
    _check_queue(found)
    _check_counters(found)
    return found.violations


def _pairs(txn: ReadTxn) -> Iterator[tuple[bytes, bytes]]:
    start = b"\0"
    while page := txn.scan(start, b"\xff" * 9, _PAGE):
        yield from page
        start = page[-1][0] + b"\0"


# --- reading ----------------------------------------------------------------------------------------------------------


def _take(found: _Found, key: bytes, value: bytes) -> None:
    space = key[:1]
    if space == b"i":
        ino = int.from_bytes(key[1:9], "big")
        found.owners.add(ino)
        _take_of_inode(found, ino, key[9:10], key, value)
    elif space == b"s":
        found.slices[int.from_bytes(key[1:9], "big")] = schema.decode_pair(value)
    elif space == b"q":
        found.queue.add(schema.decode_queue_key(key))
    elif space == b"h":
        found.held.add(schema.decode_held_key(key))
    elif space == b"b":
        found.bad_blocks += 1
        schema.decode_bad_block(value)
    elif space == b"u":
        found.quotas[schema.decode_ino(key)] = schema.decode_pair(value)
    elif space == b"c":
        found.counters[key] = value
    elif space not in (b"r", b"n", b"a", b"m", b"v"):
        found.wrong(15, f"unknown key {key!r}")


def _take_of_inode(found: _Found, ino: int, tag: bytes, key: bytes, value: bytes) -> None:
    if tag == b"A":
        found.inodes[ino] = schema.decode_inode(value)
    elif tag == b"D":
        cookie, name = schema.decode_dirent_key(key)
        if cookie != schema.name_hash(name):
            found.wrong(1, f"entry {name!r} of directory {ino} has cookie {cookie}")
        found.entries.append(_Entry(ino, name, *schema.decode_dirent(value)))
    elif tag == b"E":
        found.extents[ino].append(schema.decode_extent(key, value))
    elif not _take_small(found, ino, tag, key, value):
        found.wrong(15, f"unknown key {key!r}")


def _take_small(found: _Found, ino: int, tag: bytes, key: bytes, value: bytes) -> bool:
    match tag:
        case b"B":
            found.links[ino][schema.decode_link_key(key)] = schema.decode_number(value)
        case b"I":
            found.inline[ino] = len(value)
        case b"L":
            found.symlinks[ino] = len(value)
        case b"N":
            found.xattrs[ino][schema.decode_xattr_key(key)] = schema.decode_number(value)
        case b"O":
            _, session = schema.decode_holder_key(key)
            found.holders.add((session, ino))
        case b"T":
            found.marks[ino] = schema.decode_number(value)
        case b"R":
            found.usage[ino] = schema.decode_usage(value)
        case b"V":
            found.xattr_parts[ino][key[10:-2]] += len(value)
            if key[10:-2] in posix_acl.XATTR_NAMES:  # One part each.
                found.acls[ino][key[10:-2]] = value
        case _:
            return False
    return True


# --- names ------------------------------------------------------------------------------------------------------------


def _check_entries(found: _Found) -> None:
    """M1, and the sizes of M4."""
    sizes: Counter[int] = Counter()
    for entry in found.entries:
        sizes[entry.parent] += 1
        inode = found.inodes.get(entry.ino)
        where = f"entry {entry.name!r} of directory {entry.parent}"
        if inode is None:
            found.wrong(1, f"{where} leads to inode {entry.ino}, which does not exist")
        elif stat.S_IFMT(inode.mode) != entry.file_type:
            found.wrong(1, f"{where} has type {entry.file_type:#o}, inode {entry.ino} has mode {inode.mode:#o}")
        if not entry.name or entry.name in (b".", b"..") or b"/" in entry.name or b"\0" in entry.name:
            found.wrong(1, f"{where} has no proper name")
    for ino, inode in found.inodes.items():
        if stat.S_ISDIR(inode.mode) and inode.size != sizes[ino]:
            found.wrong(4, f"directory {ino} has {sizes[ino]} entries and size {inode.size}")
        if stat.S_ISLNK(inode.mode) and inode.size != found.symlinks.get(ino):
            found.wrong(4, f"symlink {ino} has size {inode.size} and a target of {found.symlinks.get(ino)} bytes")
    for parent in sizes:
        if not stat.S_ISDIR(found.inodes[parent].mode if parent in found.inodes else 0):
            found.wrong(1, f"inode {parent} has entries and is no directory")


def _check_tree(found: _Found) -> None:
    """M2."""
    places: dict[int, list[int]] = defaultdict(list)
    for entry in found.entries:
        if entry.file_type == stat.S_IFDIR:
            places[entry.ino].append(entry.parent)
    safe = {ROOT_INO}
    for ino, inode in found.inodes.items():
        if not stat.S_ISDIR(inode.mode):
            continue
        wanted = [] if ino == ROOT_INO else [inode.parent]
        if places[ino] != wanted:
            found.wrong(2, f"directory {ino} has entries in {places[ino]}, its parent is {inode.parent}")
        walk: list[int] = []
        while ino not in safe and ino not in walk:
            walk.append(ino)
            above = found.inodes.get(ino)
            ino = above.parent if above is not None else ROOT_INO
        if ino in walk:
            found.wrong(2, f"directory {ino} is below itself")
        safe.update(walk)


def _check_names(found: _Found) -> None:
    """M3, M5, M6."""
    names: dict[int, Counter[int]] = defaultdict(Counter)
    subdirectories: Counter[int] = Counter()
    for entry in found.entries:
        names[entry.ino][entry.parent] += 1
        subdirectories[entry.parent] += entry.file_type == stat.S_IFDIR
    holders = Counter(ino for _, ino in found.held)
    for ino, inode in found.inodes.items():
        if not stat.S_ISDIR(inode.mode):
            _check_links(found, ino, inode, names[ino], holders[ino])
        elif inode.nlink != 2 + subdirectories[ino]:
            found.wrong(3, f"directory {ino} has nlink {inode.nlink} and {subdirectories[ino]} subdirectories")
    for session, ino in found.held ^ found.holders:
        found.wrong(6, f"that session {session} holds inode {ino} is told one way only")
    for session, ino in found.held:
        if ino not in found.inodes or found.inodes[ino].nlink:
            found.wrong(6, f"session {session} holds inode {ino}, which has names or does not exist")


def _check_links(found: _Found, ino: int, inode: Inode, names: Counter[int], holders: int) -> None:
    count = names.total()
    links = found.links.get(ino, {})
    if inode.nlink != count:
        found.wrong(3, f"inode {ino} has nlink {inode.nlink} and {count} names")
    if links != (names if count > 1 else {}):
        found.wrong(5, f"inode {ino} has back-links {links} and names in {dict(names)}")
    if count and inode.parent not in names:
        found.wrong(5, f"inode {ino} is charged to {inode.parent} and has names in {dict(names)}")
    if count == 0 and (holders == 0 or inode.parent != 0):
        found.wrong(6, f"inode {ino} has no name, {holders} holders, and is charged to {inode.parent}")
    if inode.flags & InodeFlags.LINKABLE and count:
        found.wrong(6, f"inode {ino} is waiting for its first name and has {count}")


# --- data -------------------------------------------------------------------------------------------------------------


def _check_data(found: _Found) -> None:
    """M8, M9, M11, M13."""
    for ino, inode in found.inodes.items():
        extents = found.extents.get(ino, [])
        inline = found.inline.get(ino)
        if (inline is not None or extents) and not stat.S_ISREG(inode.mode):
            found.wrong(9, f"inode {ino} of mode {inode.mode:#o} has bytes")
        if inode.allocated != (inline or 0) + sum(extent.length for extent in extents) or (inline and extents):
            found.wrong(9, f"inode {ino} has allocated {inode.allocated}, {inline} inline and extents {extents}")
        if bool(inode.flags & InodeFlags.INLINE) != (inline is not None):
            found.wrong(11, f"inode {ino} has flags {inode.flags} and {inline} inline bytes")
        if inline is not None and not 0 < inline <= min(INLINE_SIZE_MAX, inode.size):
            found.wrong(11, f"inode {ino} of size {inode.size} has {inline} inline bytes")
        _check_extents(found, ino, inode, extents)


def _check_extents(found: _Found, ino: int, inode: Inode, extents: list[Extent]) -> None:
    mark = found.marks.get(ino)
    if (mark is not None) != ((b"T", ino) in found.queue):
        found.wrong(13, f"inode {ino} has truncation mark {mark} and its queue entry does not fit")
    covered = 0
    for extent in extents:
        end = extent.offset + extent.length
        if extent.offset < covered:
            found.wrong(8, f"inode {ino}: {extent} overlaps what ends at {covered}")
        covered = end
        limit = schema.OFFSET_MAX if extent.slice_id == schema.ZEROS_SLICE else inode.size
        if end > (limit if mark is None else min(mark, limit)) and (mark is None or extent.offset < mark):
            found.wrong(8, f"inode {ino} of size {inode.size}, mark {mark}: {extent} ends beyond")


def _check_slices(found: _Found) -> None:
    """M7."""
    references: Counter[int] = Counter()
    for ino, extents in found.extents.items():
        for extent in extents:
            if extent.slice_id == schema.ZEROS_SLICE:
                found.zeros += extent.length
                if extent.slice_offset:
                    found.wrong(7, f"inode {ino}: {extent} has a place in slice 0, which has none")
                continue
            references[extent.slice_id] += 1
            _, size = found.slices.get(extent.slice_id, (0, 0))
            if extent.slice_offset + extent.length > size:
                found.wrong(7, f"inode {ino}: {extent} goes beyond slice {extent.slice_id} of {size} bytes")
    for slice_id in references.keys() | found.slices.keys():
        count, _ = found.slices.get(slice_id, (0, 0))
        if count != references[slice_id] or count == 0:
            found.wrong(7, f"slice {slice_id} has count {count} and {references[slice_id]} references")
        if (b"S", slice_id) in found.queue:
            found.wrong(7, f"slice {slice_id} is alive and queued for deletion")


def _check_usage(found: _Found) -> None:
    """M10."""
    inodes: Counter[int] = Counter()
    allocated: Counter[int] = Counter()
    for ino, inode in found.inodes.items():
        for directory in _charged(found, ino):
            inodes[directory] += 1
            allocated[directory] += inode.allocated
    for ino, inode in found.inodes.items():
        usage = found.usage.get(ino)
        wanted = (0 if ino == ROOT_INO else inode.parent, inodes[ino], allocated[ino])
        if (usage and usage[:3]) != (wanted if stat.S_ISDIR(inode.mode) else None):
            found.wrong(10, f"inode {ino} has usage {usage}, should have {wanted}")


def _check_quotas(found: _Found) -> None:
    """M16."""
    limited = {ino for ino, usage in found.usage.items() if usage[3] and ino in found.inodes}
    for ino in limited ^ found.quotas.keys():
        found.wrong(16, f"inode {ino} has usage {found.usage.get(ino)} and quota {found.quotas.get(ino)}")
    for ino, quota in found.quotas.items():
        if quota == (0, 0):
            found.wrong(16, f"inode {ino} has a quota without a limit")


def _charged(found: _Found, ino: int) -> Iterator[int]:
    """The directories above an inode, as far as they exist, each once."""
    seen = {ino}
    while ino != ROOT_INO and ino in found.inodes:
        ino = found.inodes[ino].parent
        if ino in seen:
            return
        seen.add(ino)
        yield ino


# --- the rest ---------------------------------------------------------------------------------------------------------


def _check_attributes(found: _Found) -> None:
    """M14."""
    for ino in found.xattrs.keys() | found.xattr_parts.keys():
        sizes, parts = found.xattrs.get(ino, {}), found.xattr_parts.get(ino, Counter())
        for name in sizes.keys() | parts.keys():
            if sizes.get(name, -1) != parts[name]:
                found.wrong(14, f"inode {ino}: {name!r} of {sizes.get(name)} bytes has parts of {parts[name]}")
    for ino, inode in found.inodes.items():
        if bool(inode.flags & InodeFlags.CAPABILITY) != (CAPABILITY_XATTR in found.xattrs.get(ino, {})):
            found.wrong(14, f"inode {ino} has flags {inode.flags}, which do not fit {CAPABILITY_XATTR!r}")


def _check_acls(found: _Found) -> None:
    """M17."""
    for ino, inode in found.inodes.items():
        lists = found.acls.get(ino, {})
        flags = {posix_acl.ACCESS_XATTR: InodeFlags.ACCESS_ACL, posix_acl.DEFAULT_XATTR: InodeFlags.DEFAULT_ACL}
        for name, flag in flags.items():
            if bool(inode.flags & flag) != (name in lists):
                found.wrong(17, f"inode {ino} has flags {inode.flags}, which do not fit {name!r}")
        for name, value in lists.items():
            _check_acl(found, ino, inode, name, value)


def _check_acl(found: _Found, ino: int, inode: Inode, name: bytes, value: bytes) -> None:
    try:
        acl = posix_acl.decode(value)
        posix_acl.check(acl)
    except StoreError as error:
        found.wrong(17, f"inode {ino}: {name!r}: {error}")
        return
    mode, is_equivalent = posix_acl.mode_of(acl, inode.mode)
    if name == posix_acl.ACCESS_XATTR and (is_equivalent or mode != inode.mode):
        found.wrong(17, f"inode {ino} has mode {inode.mode:#o} and the list {acl}")
    if name == posix_acl.DEFAULT_XATTR and not stat.S_ISDIR(inode.mode):
        found.wrong(17, f"inode {ino} has mode {inode.mode:#o} and a default list")


def _check_queue(found: _Found) -> None:
    """M15."""
    for ino in found.owners - found.inodes.keys():
        if (b"I", ino) not in found.queue:
            found.wrong(15, f"inode {ino} has keys, no attributes, and is not queued for deletion")
    for kind, number in found.queue:
        if kind == b"I" and number in found.inodes:
            found.wrong(15, f"inode {number} exists and is queued for deletion")
        if kind == b"T" and number not in found.marks:
            found.wrong(13, f"inode {number} is queued for truncation and has no mark")


def _check_counters(found: _Found) -> None:
    """M12."""
    next_ino, inode_count = schema.decode_pair(found.counters.get(schema.INODES_COUNTER, bytes(16)))
    if inode_count != len(found.inodes):
        found.wrong(12, f"{inode_count} inodes are counted, {len(found.inodes)} exist")
    if next_ino <= max(found.owners, default=0):
        found.wrong(12, f"the next inode is {next_ino}, the last is {max(found.owners)}")
    last_slice = max([*found.slices, *(number for kind, number in found.queue if kind == b"S")], default=0)
    wanted = {
        schema.QUEUE_COUNTER: len(found.queue),
        schema.BAD_BLOCKS_COUNTER: found.bad_blocks,
        schema.ZEROS_COUNTER: found.zeros,
    }
    for key, count in wanted.items():
        told = schema.decode_number(found.counters.get(key, b""))
        if told != count:
            found.wrong(12, f"counter {key!r} is {told}, should be {count}")
    if schema.decode_number(found.counters.get(schema.SLICES_COUNTER, b"")) <= last_slice:
        found.wrong(12, f"the next slice is not above {last_slice}")
