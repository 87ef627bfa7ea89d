"""What POSIX and Linux promise of names and attributes, one promise per test."""

from __future__ import annotations

import stat

import pytest

from metadata.core.schema import ROOT_INO
from metadata.protocol import RenameFlags
from tests.support.store import Store
from wire import errors


@pytest.fixture
def store() -> Store:
    return Store()


def test_a_directory_counts_its_subdirectories_and_entries(store: Store) -> None:
    sub = store.mkdir(b"sub")
    store.create(b"file")
    store.mkdir(b"deep", parent=sub)
    assert (store.inode(ROOT_INO).nlink, store.inode(ROOT_INO).size) == (3, 2)
    assert store.inode(sub).nlink == 3
    store.rename(b"deep", b"deep", parent=sub, new_parent=ROOT_INO)
    assert (store.inode(ROOT_INO).nlink, store.inode(sub).nlink) == (4, 2)
    assert store.inode(store.lookup(b"deep")).parent == ROOT_INO


def test_an_unlinked_file_is_held_unless_it_is_known_to_be_closed(store: Store) -> None:
    one, two = store.create(b"one"), store.create(b"two")
    assert store.unlink(b"one").held
    assert store.inode(one).nlink == 0
    assert not store.unlink(b"two", closed_ino=two).held
    with pytest.raises(errors.NoSuchEntry):
        store.inode(two)


def test_rename_into_its_own_subtree_is_refused(store: Store) -> None:
    a = store.mkdir(b"a")
    b = store.mkdir(b"b", parent=a)
    with pytest.raises(errors.InvalidArgument):
        store.rename(b"a", b"c", new_parent=b)
    with pytest.raises(errors.InvalidArgument):
        store.rename(b"a", b"c", new_parent=a)
    with pytest.raises(errors.NotEmpty):
        store.rename(b"b", b"a", parent=a)


def test_exchange_of_a_file_and_a_directory_fixes_both_link_counts(store: Store) -> None:
    a = store.mkdir(b"a")
    sub, file = store.mkdir(b"sub"), store.create(b"file", parent=a)
    store.rename(b"sub", b"file", new_parent=a, flags=RenameFlags.EXCHANGE)
    assert (store.lookup(b"sub"), store.lookup(b"file", parent=a)) == (file, sub)
    assert (store.inode(ROOT_INO).nlink, store.inode(a).nlink) == (3, 3)
    assert store.inode(sub).parent == a
    assert stat.S_ISREG(store.inode(store.lookup(b"sub")).mode)
