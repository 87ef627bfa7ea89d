"""What POSIX and Linux promise of names and attributes, one promise per test."""

from __future__ import annotations

import stat

import pytest

from metadata import protocol
from metadata.core import schema
from metadata.core.fsck import check
from metadata.core.namespace import create, data, inodes, remove
from metadata.core.opens import Opens
from metadata.core.schema import FILE_SIZE_MAX, ROOT_INO, SYMLINK_SIZE_MAX, Extent
from metadata.protocol import Caller, RenameFlags, SetAttrMask
from tests.support.store import SESSION, Store
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


def test_a_directory_that_has_taken_another_s_name_is_neither_removed_nor_replaced_nor_moved(store: Store) -> None:
    """A kernel takes for removed what it had looked up, and lets nothing be made in it any more."""
    meant, other, file = store.mkdir(b"meant"), store.mkdir(b"other"), store.create(b"file")

    def rmdir(name: bytes, expected: int) -> object:
        return store.change(protocol.RemoveDirectory(SESSION, 1, ROOT_INO, name, expected_ino=expected))

    def rename(name: bytes, new_name: bytes, flags: int = 0, expected: int = 0, target: int = 0) -> object:
        return store.change(
            protocol.Rename(
                SESSION, 1, ROOT_INO, name, ROOT_INO, new_name, flags, expected_ino=expected, expected_target=target
            )
        )

    with pytest.raises(errors.StaleInode):
        rmdir(b"other", meant)
    with pytest.raises(errors.StaleInode):
        rename(b"other", b"new", expected=meant)
    with pytest.raises(errors.StaleInode):
        rename(b"meant", b"other", expected=meant, target=file)
    with pytest.raises(errors.StaleInode):
        rename(b"meant", b"gone", expected=meant, target=other)
    with pytest.raises(errors.StaleInode):
        rename(b"file", b"other", RenameFlags.EXCHANGE, expected=file, target=meant)
    assert [store.lookup(name) for name in (b"meant", b"other", b"file")] == [meant, other, file]
    rename(b"meant", b"other", expected=meant, target=other)
    rmdir(b"other", meant)
    assert violations(store) == []


def test_a_file_may_replace_another_one_than_was_meant(store: Store) -> None:
    file, old, new = store.create(b"file"), store.create(b"old"), store.create(b"new")
    store.change(
        protocol.Rename(SESSION, 1, ROOT_INO, b"file", ROOT_INO, b"new", expected_ino=file, expected_target=old)
    )
    assert store.lookup(b"new") == file
    assert (store.inode(new).nlink, store.inode(old).nlink) == (0, 1)


ALICE = Caller(1000, 1000, (2000,), True)
BOB = Caller(1001, 1001, (), True)
ANYBODY = 0o1777


def set_attributes(store: Store, ino: int, mask: int, caller: Caller = ALICE, **values: int) -> schema.Inode:
    return store.change(protocol.SetAttr(SESSION, 1, ino, mask, caller=caller, **values)).inode


# --- files without a name ---------------------------------------------------------------------------------------------


def make_temporary(store: Store, *, linkable: bool = True, parent: int = ROOT_INO, caller: Caller = ALICE) -> int:
    return store.change(protocol.MakeTemporary(SESSION, 1, parent, 0o4644, linkable, caller)).ino


def violations(store: Store) -> list[str]:
    with store.engine.read() as txn:
        return [str(violation) for violation in check(txn)]


def test_a_temporary_file_gets_its_first_name_by_link(store: Store) -> None:
    """Until then it has none and is charged to nobody, though it has bytes; after that it is as any other."""
    d = store.mkdir(b"d", mode=0o777)
    before = store.inode(d)
    ino = make_temporary(store, parent=d)
    store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"bytes", 0, keep_privileges=True))
    inode = store.inode(ino)
    assert (inode.nlink, inode.mode, inode.uid, inode.parent) == (0, stat.S_IFREG | 0o4644, 1000, 0)
    assert store.inode(d) == before
    assert store.ask(protocol.GetUsage(d)).inodes == 0
    assert violations(store) == []
    linked = store.link(ino, b"name", parent=d)
    assert (linked.nlink, linked.parent, linked.size) == (1, d, 5)
    usage = store.ask(protocol.GetUsage(d))
    assert (usage.inodes, usage.allocated) == (1, 5)
    assert store.link(ino, b"second").nlink == 2
    store.unlink(b"second")
    assert violations(store) == []


def test_a_temporary_file_that_is_let_go_of_is_gone(store: Store) -> None:
    ino = make_temporary(store, caller=Caller())
    store.change(protocol.ReleaseInode(SESSION, 1, (ino,)))
    with pytest.raises(errors.NoSuchEntry):
        store.inode(ino)
    assert violations(store) == []


def test_an_unlinked_file_and_one_that_was_made_exclusively_get_no_name(store: Store) -> None:
    temporary = make_temporary(store, linkable=False, caller=Caller())
    linked = make_temporary(store, caller=Caller())
    store.link(linked, b"name")
    store.unlink(b"name")
    for ino in (temporary, linked):
        with pytest.raises(errors.NoSuchEntry):
            store.link(ino, b"again")
    assert violations(store) == []


def test_a_temporary_file_needs_a_directory_that_may_be_written(store: Store) -> None:
    closed, file = store.mkdir(b"closed"), store.create(b"file")
    with pytest.raises(errors.AccessDenied):
        make_temporary(store, parent=closed)
    with pytest.raises(errors.NotDirectory):
        make_temporary(store, parent=file)


def test_a_named_temporary_file_is_open_in_the_session_that_made_it(store: Store) -> None:
    """So another session's unlink leaves it to that one."""
    opens = Opens()
    with store.engine.write() as txn:
        ino = create.make_temporary(
            txn, session=5, parent=ROOT_INO, mode=0o644, linkable=True, caller=Caller(), now_ns=1
        ).ino
        create.link(txn, ino=ino, parent=ROOT_INO, name=b"n", caller=Caller(), opens=opens, now_ns=2)
        assert opens.has(5, ino)
        removed = remove.unlink(
            txn, session=6, parent=ROOT_INO, name=b"n", closed_ino=ino, caller=Caller(), opens=opens, now_ns=3
        )
        assert not removed.held
        assert inodes.load(txn, ino).nlink == 0
        assert check(txn) == []


# --- whiteouts --------------------------------------------------------------------------------------------------------


def test_a_whiteout_is_left_where_the_file_was(store: Store) -> None:
    a, b = store.mkdir(b"a"), store.mkdir(b"b")
    ino = store.create(b"file", parent=a)
    done = store.rename(b"file", b"moved", parent=a, new_parent=b, flags=RenameFlags.WHITEOUT)
    left = store.lookup(b"file", parent=a)
    assert (done.whiteout_ino, done.whiteout) == (left, store.inode(left))
    inode = store.inode(left)
    assert (inode.mode, inode.rdev, inode.nlink, inode.parent) == (stat.S_IFCHR, 0, 1, a)
    assert store.lookup(b"moved", parent=b) == ino
    assert [store.ask(protocol.GetUsage(d)).inodes for d in (a, b)] == [1, 1]
    assert violations(store) == []


@pytest.mark.parametrize("flags", [6, 3, 7, 8])
def test_exchange_goes_with_no_other_flag(store: Store, flags: int) -> None:
    store.create(b"a")
    with pytest.raises(errors.InvalidArgument):
        store.rename(b"a", b"b", flags=flags)


# --- names and nodes --------------------------------------------------------------------------------------------------


def test_a_sticky_directory_keeps_the_names_of_others(store: Store) -> None:
    shared = store.mkdir(b"shared", mode=ANYBODY)
    store.create(b"alices", parent=shared, caller=ALICE)
    with pytest.raises(errors.NotPermitted):
        store.change(protocol.Unlink(SESSION, 1, shared, b"alices", 0, BOB))
    with pytest.raises(errors.NotPermitted):
        store.change(protocol.Rename(SESSION, 1, shared, b"alices", shared, b"bobs", caller=BOB))
    store.create(b"bobs", parent=shared, caller=BOB)
    with pytest.raises(errors.NotPermitted):
        store.change(protocol.Rename(SESSION, 1, shared, b"bobs", shared, b"alices", caller=BOB))
    store.change(protocol.Unlink(SESSION, 1, shared, b"alices", 0, ALICE))


@pytest.mark.parametrize(
    ("kind", "rdev", "error"),
    [
        (stat.S_IFDIR, 0, errors.NotPermitted),
        (stat.S_IFLNK, 0, errors.InvalidArgument),
        (stat.S_IFCHR, 1 << 32, errors.InvalidArgument),
        (stat.S_IFCHR, 1, errors.NotPermitted),
    ],
)
def test_mknod_refuses(store: Store, kind: int, rdev: int, error: type[errors.StoreError]) -> None:
    with pytest.raises(error):
        store.change(protocol.MakeNode(SESSION, 1, store.mkdir(b"d", mode=0o777), b"n", kind | 0o600, rdev, ALICE))


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (b"", errors.NoSuchEntry),
        (b"t" * (SYMLINK_SIZE_MAX + 1), errors.NameTooLong),
        (b"a\0b", errors.InvalidArgument),
    ],
)
def test_symlink_refuses(store: Store, target: bytes, error: type[errors.StoreError]) -> None:
    with pytest.raises(error):
        store.change(protocol.MakeSymlink(SESSION, 1, ROOT_INO, b"l", target))


def test_a_symlink_of_the_longest_target_is_read_back(store: Store) -> None:
    target = b"t" * SYMLINK_SIZE_MAX
    ino = store.change(protocol.MakeSymlink(SESSION, 1, ROOT_INO, b"l", target)).ino
    assert store.ask(protocol.ReadLink(SESSION, ino)).target == target
    with pytest.raises(errors.InvalidArgument):
        store.ask(protocol.ReadLink(SESSION, ROOT_INO))
    with pytest.raises(errors.NotSupported):
        set_attributes(store, ino, SetAttrMask.MODE, Caller(), mode=0o600)


def test_names_that_are_none_are_refused(store: Store) -> None:
    for name in (b"a/b", b"a\0b"):
        with pytest.raises(errors.InvalidArgument):
            store.create(name)
        with pytest.raises(errors.InvalidArgument):
            store.lookup(name)
    for name in (b"", b"missing"):
        with pytest.raises(errors.NoSuchEntry):
            store.lookup(name)
    with pytest.raises(errors.NoSuchEntry):
        store.create(b"")


def test_dots_are_looked_up(store: Store) -> None:
    sub = store.mkdir(b"sub")
    assert (store.lookup(b".", parent=sub), store.lookup(b"..", parent=sub)) == (sub, ROOT_INO)
    assert store.lookup(b"..") == ROOT_INO
    with pytest.raises(errors.NotDirectory):
        store.lookup(b".", parent=store.create(b"file"))


def test_links_are_bounded_and_not_for_nameless_inodes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "LINK_COUNT_MAX", 3)
    ino = store.create(b"1")
    store.link(ino, b"2")
    store.link(ino, b"3")
    with pytest.raises(errors.TooManyLinks):
        store.link(ino, b"4")
    for name in (b"1", b"2", b"3"):
        store.unlink(name)
    with pytest.raises(errors.NoSuchEntry):
        store.link(ino, b"5")


def test_usage_follows_the_names(store: Store) -> None:
    a, b = store.mkdir(b"a"), store.mkdir(b"b")

    def usage() -> list[tuple[int, int]]:
        found = []
        for ino in (a, b):
            told = store.ask(protocol.GetUsage(ino))
            found.append((told.inodes, told.allocated))
        return found

    ino = store.create(b"f", parent=a)
    store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"12345", 0))
    assert usage() == [(1, 5), (0, 0)]
    store.link(ino, b"g", parent=b)
    assert usage() == [(1, 5), (0, 0)]
    store.unlink(b"f", parent=a)
    assert usage() == [(0, 0), (1, 5)]
    store.rename(b"g", b"h", parent=b, new_parent=a)
    assert usage() == [(1, 5), (0, 0)]
    store.unlink(b"h", parent=a)
    assert usage() == [(0, 0), (0, 0)]


def test_a_directory_without_search_permission_lists_names_only(store: Store) -> None:
    ino = store.mkdir(b"d", mode=0o744)
    store.create(b"f", parent=ino)
    page = store.ask(protocol.ReadDir(SESSION, ino, 0, 10, plus=True, caller=ALICE))
    assert [(entry.name, entry.inode) for entry in page.entries] == [(b"f", None)]
    with pytest.raises(errors.AccessDenied):
        store.ask(protocol.Lookup(SESSION, ino, b"f", ALICE))


# --- attributes -------------------------------------------------------------------------------------------------------


def test_sizes_and_owners_that_are_none_are_refused(store: Store) -> None:
    ino = store.create(b"f")
    with pytest.raises(errors.FileTooLarge):
        store.truncate(ino, FILE_SIZE_MAX + 1)
    with pytest.raises(errors.InvalidArgument):
        set_attributes(store, ino, SetAttrMask.UID, Caller(), uid=(1 << 32) - 1)
    assert store.truncate(ino, FILE_SIZE_MAX).size == FILE_SIZE_MAX


def test_one_time_now_is_the_owners_both_are_also_the_writers(store: Store) -> None:
    ino = store.create(b"f", mode=0o666)
    with pytest.raises(errors.NotPermitted):
        set_attributes(store, ino, SetAttrMask.MTIME_NOW)
    assert set_attributes(store, ino, SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW).mtime_ns == store.now_ns
    store.change(protocol.SetAttr(SESSION, 1, ino, SetAttrMask.MODE, mode=0o644))
    with pytest.raises(errors.AccessDenied):
        set_attributes(store, ino, SetAttrMask.ATIME_NOW | SetAttrMask.MTIME_NOW)


def test_times_go_through_unchanged_also_before_1970(store: Store) -> None:
    mask = SetAttrMask.ATIME | SetAttrMask.MTIME | SetAttrMask.CTIME
    inode = set_attributes(store, store.create(b"f"), mask, Caller(), atime_ns=-1, mtime_ns=1 << 62, ctime_ns=7)
    assert (inode.atime_ns, inode.mtime_ns, inode.ctime_ns) == (-1, 1 << 62, 7)


def test_an_empty_mask_changes_nothing(store: Store) -> None:
    ino = store.create(b"f")
    before = store.pairs()
    set_attributes(store, ino, 0)
    assert store.pairs() == before


def test_a_write_drops_privileges_and_capabilities_unless_they_are_to_be_kept(store: Store) -> None:
    ino = store.create(b"f", mode=0o6755)
    store.change(protocol.SetXattr(SESSION, 1, ino, b"security.capability", b"cap"))
    store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"x", 0, keep_privileges=True))
    assert store.inode(ino).mode & 0o7777 == 0o6755
    store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"x", 0))
    assert store.inode(ino).mode & 0o7777 == 0o755
    assert store.ask(protocol.ListXattr(SESSION, ino)).names == ()
    with store.engine.read() as txn:
        assert check(txn) == []


def test_trusted_attributes_are_for_root_only(store: Store) -> None:
    ino = store.create(b"f", mode=0o666)
    store.change(protocol.SetXattr(SESSION, 1, ino, b"trusted.t", b"v"))
    assert store.ask(protocol.ListXattr(SESSION, ino)).names == (b"trusted.t",)
    assert store.ask(protocol.ListXattr(SESSION, ino, ALICE)).names == ()
    with pytest.raises(errors.NoSuchAttribute):
        store.ask(protocol.GetXattr(SESSION, ino, b"trusted.t", ALICE))


def test_the_list_of_attributes_is_bounded(store: Store) -> None:
    ino = store.create(b"f")
    made = 0
    with pytest.raises(errors.NoRoom):  # noqa: PT012
        for number in range(400):
            store.change(protocol.SetXattr(SESSION, 1, ino, b"user.%0245d" % number, b""))
            made += 1
    assert made == schema.XATTR_LIST_SIZE_MAX // 251


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_only_files_have_bytes(store: Store) -> None:
    fifo = store.change(protocol.MakeNode(SESSION, 1, ROOT_INO, b"p", stat.S_IFIFO | 0o600, 0)).ino
    with pytest.raises(errors.IsDirectory):
        store.change(protocol.WriteInline(SESSION, 1, ROOT_INO, 0, b"x", 0))
    with pytest.raises(errors.InvalidArgument):
        store.change(protocol.WriteInline(SESSION, 1, fifo, 0, b"x", 0))
    with pytest.raises(errors.InvalidArgument):
        store.truncate(fifo, 0)


def test_a_commit_beyond_a_long_truncation_waits_or_finishes_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never does a byte from before the truncation come back."""
    for module in (data, inodes):
        monkeypatch.setattr(module, "KEYS_PER_STEP", 4)
    ino = store.create(b"f")
    first = store.change(protocol.AllocateSlices(SESSION, 1, 9)).first

    def commit(slice_id: int, *extents: Extent) -> None:
        store.change(protocol.CommitExtents(SESSION, 1, ino, extents, ((slice_id, 100),), 0, 0))

    commit(first, *(Extent(10 * index, 5, first, 5 * index) for index in range(20)))
    store.truncate(ino, 20)
    with pytest.raises(errors.ServerOverloaded):
        commit(first + 1, Extent(100, 5, first + 1, 0))
    commit(first + 1, Extent(0, 5, first + 1, 0))
    for _ in range(3):
        with store.engine.write() as txn:
            data.continue_truncation(txn, ino, now_ns=store.now_ns)
            assert check(txn) == []
            txn.commit()
    store.truncate(ino, 200)
    assert len(store.ask(protocol.GetLayout(SESSION, ino)).extents) == 2
    commit(first + 2, Extent(100, 5, first + 2, 0))
    layout = store.ask(protocol.GetLayout(SESSION, ino))
    assert [extent.offset for extent in layout.extents] == [0, 10, 100]
    with store.engine.read() as reading:
        assert check(reading) == []
