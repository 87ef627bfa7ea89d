"""fsck finds each kind of damage: one planted violation per case, of a store that had none."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from metadata import protocol
from metadata.core import posix_acl, schema
from metadata.core.fsck import check
from metadata.core.posix_acl import ACCESS_XATTR, DEFAULT_XATTR
from metadata.core.schema import ROOT_INO, Extent, Inode, InodeFlags
from metadata.engine.ports import WriteTxn
from tests.support.store import SESSION, Store


class World:
    """A store with one of everything."""

    def __init__(self) -> None:
        store = self.store = Store()
        self.d = store.mkdir(b"d")
        self.sub = store.mkdir(b"sub", parent=self.d)
        self.file = store.create(b"file", parent=self.d)
        self.inline = store.create(b"inline")
        self.linked = store.create(b"one")
        self.held = store.create(b"held")
        self.symlink = store.change(protocol.MakeSymlink(SESSION, 1, ROOT_INO, b"l", b"target")).ino
        self.limited = store.mkdir(b"limited")
        store.change(protocol.SetXattr(SESSION, 1, self.limited, b"fsd.quota.bytes", b"1K"))
        store.link(self.linked, b"two", parent=self.d)
        store.unlink(b"held")
        store.change(protocol.WriteInline(SESSION, 1, self.inline, 0, b"bytes", 0))
        store.change(protocol.SetXattr(SESSION, 1, self.inline, b"user.a", b"value"))
        acl = posix_acl.encode(tuple(map(posix_acl.Entry, (1, 2, 4, 16, 32), (7, 7, 5, 5, 0), (0, 1000, 0, 0, 0))))
        for name in posix_acl.XATTR_NAMES:
            store.change(protocol.SetXattr(SESSION, 1, self.d, name, acl))
        self.slice = store.change(protocol.AllocateSlices(SESSION, 1, 4)).first
        self.commit(Extent(0, 10, self.slice, 0), Extent(20, 10, self.slice, 20))

    def commit(self, *extents: Extent) -> None:
        sizes = ((self.slice, 30),)
        self.store.change(protocol.CommitExtents(SESSION, 1, self.file, extents, sizes, 0, 0))


def put_list(txn: WriteTxn, ino: int, entries: tuple[tuple[int, int], ...]) -> None:
    value = posix_acl.encode(tuple(posix_acl.Entry(*entry) for entry in entries))
    txn.put(schema.xattr_part_key(ino, ACCESS_XATTR, 0), value)


Damage = Callable[[World, WriteTxn], object]


def change(txn: WriteTxn, ino: int, **fields: int) -> None:
    raw = txn.get(schema.inode_key(ino))
    assert raw is not None
    inode: Inode = replace(schema.decode_inode(raw), **fields)
    txn.put(schema.inode_key(ino), schema.encode_record(inode))


def loop(w: World, txn: WriteTxn) -> None:
    """The directory d into its own subdirectory, with every count right."""
    txn.delete(schema.dirent_key(ROOT_INO, b"d"))
    txn.put(schema.dirent_key(w.sub, b"d"), schema.encode_dirent(w.d, 0o040000))
    change(txn, w.d, parent=w.sub)


DAMAGES: dict[str, tuple[int, Damage]] = {
    "an entry to nowhere": (
        1,
        lambda w, t: t.put(schema.dirent_key(ROOT_INO, b"x"), schema.encode_dirent(999, 0o100000)),
    ),
    "an entry of the wrong type": (
        1,
        lambda w, t: t.put(schema.dirent_key(w.d, b"file"), schema.encode_dirent(w.file, 0o120000)),
    ),
    "an entry under the wrong hash": (
        1,
        lambda w, t: t.put(schema.dirent_key(ROOT_INO, b"y")[:-1] + b"z", schema.encode_dirent(w.file, 0o100000)),
    ),
    "an entry without a proper name": (
        1,
        lambda w, t: t.put(schema.dirent_key(ROOT_INO, b"a/b"), schema.encode_dirent(w.file, 0o100000)),
    ),
    "entries of a file": (
        1,
        lambda w, t: t.put(schema.dirent_key(w.file, b"x"), schema.encode_dirent(w.inline, 0o100000)),
    ),
    "a directory below itself": (2, loop),
    "a directory with two entries": (
        2,
        lambda w, t: t.put(schema.dirent_key(ROOT_INO, b"again"), schema.encode_dirent(w.sub, 0o040000)),
    ),
    "a link count too high": (3, lambda w, t: change(t, w.file, nlink=2)),
    "a directory's link count too low": (3, lambda w, t: change(t, w.d, nlink=2)),
    "a directory's size": (4, lambda w, t: change(t, w.d, size=7)),
    "a symlink without a target": (4, lambda w, t: t.delete(schema.symlink_key(w.symlink))),
    "a back-link too few": (5, lambda w, t: t.delete(schema.link_key(w.linked, w.d))),
    "a charge where no name is": (5, lambda w, t: change(t, w.linked, parent=w.sub)),
    "a nameless inode that nobody holds": (6, lambda w, t: t.delete(schema.held_key(SESSION, w.held))),
    "a name of what waits for its first": (6, lambda w, t: change(t, w.file, flags=InodeFlags.LINKABLE)),
    "a held inode with a name": (6, lambda w, t: t.put(schema.held_key(SESSION, w.file), schema.encode_time(1))),
    "a slice's count": (7, lambda w, t: t.put(schema.slice_key(w.slice), schema.encode_pair(3, 30))),
    "a slice without a record": (7, lambda w, t: t.delete(schema.slice_key(w.slice))),
    "an extent beyond its slice": (7, lambda w, t: t.put(schema.slice_key(w.slice), schema.encode_pair(2, 29))),
    "a live slice in the queue": (7, lambda w, t: t.put(schema.queued_slice_key(w.slice), schema.encode_pair(1, 1))),
    "extents that overlap": (
        8,
        lambda w, t: t.put(schema.extent_key(w.file, 30), schema.encode_extent(Extent(5, 25, w.slice, 0))),
    ),
    "an extent beyond the size": (8, lambda w, t: change(t, w.file, size=29)),
    "allocated": (9, lambda w, t: change(t, w.file, allocated=21)),
    "bytes of a directory": (9, lambda w, t: t.put(schema.inline_key(w.sub), b"bytes")),
    "usage": (10, lambda w, t: t.put(schema.usage_key(w.d), schema.encode_usage(ROOT_INO, 2, 21, 0))),
    "usage of a tree without its subdirectories": (
        10,
        lambda w, t: t.put(schema.usage_key(ROOT_INO), schema.encode_usage(0, 4, 5, 0)),
    ),
    "a usage under another directory": (
        10,
        lambda w, t: t.put(schema.usage_key(w.sub), schema.encode_usage(ROOT_INO, 0, 0, 0)),
    ),
    "a directory without usage": (10, lambda w, t: t.delete(schema.usage_key(w.sub))),
    "inline bytes without their flag": (11, lambda w, t: change(t, w.inline, flags=0)),
    "an inline file shorter than its bytes": (11, lambda w, t: change(t, w.inline, size=4)),
    "the count of inodes": (12, lambda w, t: t.put(schema.INODES_COUNTER, schema.encode_pair(100, 3))),
    "the next inode number": (12, lambda w, t: t.put(schema.INODES_COUNTER, schema.encode_pair(3, 8))),
    "the next slice": (12, lambda w, t: t.put(schema.SLICES_COUNTER, schema.encode_u64(1))),
    "the bytes of allocated zeros": (12, lambda w, t: t.put(schema.ZEROS_COUNTER, schema.encode_u64(1))),
    "zeros with a place in a slice": (
        7,
        lambda w, t: t.put(schema.extent_key(w.file, 15), schema.encode_extent(Extent(10, 5, 0, 1))),
    ),
    "the count of the queue": (12, lambda w, t: t.put(schema.QUEUE_COUNTER, schema.encode_u64(1))),
    "a truncation mark that is not queued": (
        13,
        lambda w, t: t.put(schema.truncation_key(w.file), schema.encode_u64(99)),
    ),
    "a queued truncation without a mark": (13, lambda w, t: t.put(schema.queued_truncation_key(w.file), bytes(8))),
    "a quota of what is not limited": (16, lambda w, t: t.put(schema.quota_key(w.d), schema.encode_pair(9, 9))),
    "a limited directory without a quota": (
        16,
        lambda w, t: t.put(schema.usage_key(w.sub), schema.encode_usage(w.d, 0, 0, 1)),
    ),
    "a quota without a limit": (16, lambda w, t: t.put(schema.quota_key(w.limited), schema.encode_pair(0, 0))),
    "an attribute cut short": (14, lambda w, t: t.put(schema.xattr_part_key(w.inline, b"user.a", 0), b"valu")),
    "an attribute's part without a name": (14, lambda w, t: t.delete(schema.xattr_key(w.inline, b"user.a"))),
    "a capability without its attribute": (14, lambda w, t: change(t, w.file, flags=InodeFlags.CAPABILITY)),
    "a list without its flag": (17, lambda w, t: change(t, w.d, flags=0)),
    "a flag without its list": (17, lambda w, t: change(t, w.file, flags=InodeFlags.ACCESS_ACL)),
    "a mode that its list does not say": (17, lambda w, t: change(t, w.d, mode=stat.S_IFDIR | 0o705)),
    "a default list of a file": (17, lambda w, t: change(t, w.d, mode=stat.S_IFREG | 0o750)),
    "a list that is none": (17, lambda w, t: t.put(schema.xattr_part_key(w.d, DEFAULT_XATTR, 0), bytes(44))),
    "a list that says what the mode says": (17, lambda w, t: put_list(t, w.d, ((1, 7), (4, 5), (32, 0)))),
    "keys without attributes": (15, lambda w, t: t.delete(schema.inode_key(w.file))),
    "an existing inode in the queue": (15, lambda w, t: t.put(schema.queued_inode_key(w.file), bytes(8))),
    "an unknown key": (15, lambda w, t: t.put(b"?", b"")),
    "an unknown key of an inode": (15, lambda w, t: t.put(schema.inode_key(w.file)[:-1] + b"?", b"")),
}


def test_a_store_with_one_of_everything_is_clean() -> None:
    with World().store.engine.read() as txn:
        assert check(txn) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_the_damage_is_found(name: str) -> None:
    number, damage = DAMAGES[name]
    world = World()
    with world.store.engine.write() as txn:
        damage(world, txn)
        violations = check(txn)
    assert number in {violation.number for violation in violations}, [str(violation) for violation in violations]


def test_every_invariant_has_a_case() -> None:
    assert {number for number, _ in DAMAGES.values()} == set(range(1, 18))
