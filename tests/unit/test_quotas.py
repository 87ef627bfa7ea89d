"""Quotas of directory trees: what they refuse, exactly, and what they never refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from metadata import protocol
from metadata.core import schema
from metadata.core.exactly_once import apply_once
from metadata.core.fsck import check
from metadata.core.namespace import quotas
from metadata.core.schema import ROOT_INO, Extent
from metadata.protocol import Caller, RenameFlags, SetXattrMode
from metadata.status import file_system_status
from tests.support.store import SESSION, Store
from wire.errors import (
    AccessDenied,
    EntryExists,
    InvalidArgument,
    NoSuchAttribute,
    NotDirectory,
    NotPermitted,
    NotSupported,
    QuotaExceeded,
)

USER = Caller(1000, 1000, (), True)


class QuotaStore(Store):
    """A store with quotas and contents in one line."""

    def limit(self, ino: int, *, bytes_max: int | None = None, inodes_max: int | None = None) -> None:
        for name, limit in ((b"fsd.quota.bytes", bytes_max), (b"fsd.quota.inodes", inodes_max)):
            if limit is not None:
                self.change(protocol.SetXattr(SESSION, 1, ino, name, b"%d" % limit))

    def xattr(self, ino: int, name: bytes, caller: Caller = Caller()) -> bytes:  # noqa: B008
        return self.ask(protocol.GetXattr(SESSION, ino, name, caller)).value

    def usage(self, ino: int) -> tuple[int, int]:
        """Bytes and inodes, as the attributes tell them."""
        return int(self.xattr(ino, b"fsd.usage.bytes")), int(self.xattr(ino, b"fsd.usage.inodes"))

    def write(self, ino: int, data: bytes, offset: int = 0) -> None:
        self.change(protocol.WriteInline(SESSION, 1, ino, offset, data, 0))

    def commit(self, ino: int, *extents: tuple[int, int]) -> None:
        """Commit extents (offset, length) of a slice of their own."""
        first = self.change(protocol.AllocateSlices(SESSION, 1, 1)).first
        made, at = [], 0
        for offset, length in extents:
            made.append(Extent(offset, length, first, at))
            at += length
        self.change(protocol.CommitExtents(SESSION, 1, ino, tuple(made), ((first, at),), 0, 0))


@pytest.fixture
def store() -> QuotaStore:
    return QuotaStore()


def refused(act: Callable[[], object]) -> None:
    with pytest.raises(QuotaExceeded):
        act()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 3])
def test_every_way_to_make_an_inode_stops_exactly_at_the_limit(store: QuotaStore, depth: int) -> None:
    top = deep = store.mkdir(b"d")
    for _ in range(depth):
        deep = store.mkdir(b"d", parent=deep)
    store.limit(top, inodes_max=depth + 1)
    makes: list[Callable[[], object]] = [
        lambda: store.create(b"f", parent=deep),
        lambda: store.mkdir(b"f", parent=deep),
        lambda: store.change(protocol.MakeNode(SESSION, 1, deep, b"f", 0o010644, 0)),
        lambda: store.change(protocol.MakeSymlink(SESSION, 1, deep, b"f", b"t")),
    ]
    store.create(b"last", parent=deep)
    for make in makes:
        refused(make)
    store.create(b"beside it")
    store.unlink(b"last", parent=deep)
    makes[0]()


def test_inline_bytes_stop_exactly_at_the_limit(store: QuotaStore) -> None:
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.limit(d, bytes_max=100)
    store.write(ino, bytes(100))
    refused(lambda: store.write(ino, b"x", offset=100))
    assert store.inode(ino).size == 100
    store.write(ino, b"over what is there", offset=50)
    store.truncate(ino, 60)
    store.write(ino, bytes(40), offset=60)
    assert store.usage(d) == (100, 1)


def test_extents_stop_exactly_at_the_limit_and_only_new_bytes_count(store: QuotaStore) -> None:
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.limit(d, bytes_max=1000)
    store.commit(ino, (0, 400), (5000, 600))
    refused(lambda: store.commit(ino, (399, 2)))
    store.commit(ino, (0, 400), (5100, 500))
    store.truncate(ino, 5000)
    refused(lambda: store.commit(ino, (400, 601)))
    store.commit(ino, (400, 600))
    store.truncate(ino, 1 << 40)
    assert store.usage(d) == (1000, 1)


def test_every_quota_on_the_way_up_counts(store: QuotaStore) -> None:
    outer = store.mkdir(b"outer")
    inner = store.mkdir(b"inner", parent=outer)
    ino = store.create(b"f", parent=inner)
    store.limit(ROOT_INO, bytes_max=30)
    store.limit(outer, bytes_max=20)
    store.limit(inner, bytes_max=10)
    refused(lambda: store.write(ino, bytes(11)))
    store.limit(inner, bytes_max=0)
    store.write(ino, bytes(11))
    refused(lambda: store.write(ino, bytes(21)))
    store.limit(outer, bytes_max=0)
    refused(lambda: store.write(ino, bytes(31)))
    store.write(ino, bytes(30))


def test_a_rename_into_a_quota_needs_room_for_the_whole_tree(store: QuotaStore) -> None:
    quota, tree = store.mkdir(b"quota"), store.mkdir(b"tree")
    sub = store.mkdir(b"sub", parent=tree)
    store.write(store.create(b"f", parent=sub), bytes(50))
    for bytes_max, inodes_max in ((49, 3), (50, 2)):
        store.limit(quota, bytes_max=bytes_max, inodes_max=inodes_max)
        refused(lambda: store.rename(b"tree", b"t", new_parent=quota))
    store.limit(quota, bytes_max=50, inodes_max=3)
    store.rename(b"tree", b"t", new_parent=quota)
    assert store.usage(quota) == (50, 3)
    assert store.usage(ROOT_INO) == (50, 4)


def test_a_rename_that_replaces_counts_what_goes(store: QuotaStore) -> None:
    quota = store.mkdir(b"quota")
    store.write(store.create(b"old", parent=quota), bytes(20))
    store.write(store.create(b"smaller"), bytes(19))
    store.write(store.create(b"larger"), bytes(21))
    store.limit(quota, bytes_max=10, inodes_max=1)  # It has more already.
    refused(lambda: store.rename(b"larger", b"old", new_parent=quota))
    store.rename(b"smaller", b"old", new_parent=quota)
    assert store.usage(quota) == (19, 1)


def test_an_exchange_counts_the_difference(store: QuotaStore) -> None:
    quota = store.mkdir(b"quota")
    store.write(store.create(b"in", parent=quota), bytes(20))
    store.write(store.create(b"out"), bytes(25))
    store.limit(quota, bytes_max=24, inodes_max=1)
    refused(lambda: store.rename(b"in", b"out", parent=quota, flags=RenameFlags.EXCHANGE))
    store.limit(quota, bytes_max=25)
    store.rename(b"in", b"out", parent=quota, flags=RenameFlags.EXCHANGE)
    assert store.usage(quota) == (25, 1)


def test_renames_within_a_quota_are_free_even_above_the_limit(store: QuotaStore) -> None:
    quota = store.mkdir(b"quota")
    a, b = store.mkdir(b"a", parent=quota), store.mkdir(b"b", parent=quota)
    store.write(store.create(b"f", parent=a), bytes(20))
    linked = store.create(b"g", parent=a)
    store.link(linked, b"outside")
    store.limit(quota, bytes_max=1, inodes_max=1)
    store.rename(b"f", b"f", parent=a, new_parent=b)
    store.rename(b"g", b"g", parent=a, new_parent=b)
    store.rename(b"a", b"a", parent=quota, new_parent=b)
    store.rename(b"f", b"f2", parent=b, new_parent=b)
    assert store.usage(quota) == (20, 4)


# --- what is not refused ----------------------------------------------------------------------------------------------


def test_what_shrinks_or_stays_is_never_refused_above_the_limit(store: QuotaStore) -> None:
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.write(ino, bytes(100))
    big = store.create(b"big", parent=d)
    store.commit(big, (0, 5000))
    store.limit(d, bytes_max=10, inodes_max=1)
    store.write(ino, b"x")
    store.truncate(ino, 90)
    store.commit(big, (100, 50))
    store.truncate(big, 4000)
    store.truncate(big, 1 << 30)
    store.change(protocol.SetAttr(SESSION, 1, ino, protocol.SetAttrMask.MODE, mode=0o600))
    store.change(protocol.SetXattr(SESSION, 1, ino, b"user.a", b"value"))
    refused(lambda: store.commit(big, (100, 5000)))
    store.rename(b"f", b"out", parent=d)
    store.unlink(b"big", parent=d)
    assert store.usage(d) == (0, 0)


def test_a_limit_of_one_kind_does_not_stop_the_other(store: QuotaStore) -> None:
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.write(ino, bytes(100))
    store.limit(d, bytes_max=10)
    store.create(b"g", parent=d)
    store.limit(d, bytes_max=0, inodes_max=1)
    store.write(ino, bytes(200))


def test_an_unlink_may_bring_a_file_into_a_quota_where_it_has_its_last_name(store: QuotaStore) -> None:
    """link has asked for the room; what was added since then cannot be refused to an unlink."""
    quota = store.mkdir(b"quota")
    store.limit(quota, bytes_max=100, inodes_max=1)
    ino = store.create(b"f")
    store.write(ino, bytes(100))
    store.link(ino, b"f", parent=quota)
    assert store.usage(quota) == (0, 0)
    store.write(ino, bytes(10), offset=100)
    store.unlink(b"f")
    assert store.usage(quota) == (110, 1)
    refused(lambda: store.write(ino, bytes(1), offset=110))


def test_a_link_into_a_quota_needs_room_for_the_file(store: QuotaStore) -> None:
    quota = store.mkdir(b"quota")
    inside = store.create(b"inside", parent=quota)
    store.write(inside, bytes(60))
    ino = store.create(b"f")
    store.write(ino, bytes(50))
    store.limit(quota, bytes_max=100)
    refused(lambda: store.link(ino, b"f", parent=quota))
    store.truncate(ino, 40)
    store.link(ino, b"f", parent=quota)
    store.link(inside, b"again", parent=quota)
    assert store.usage(quota) == (60, 1)


def test_a_rename_of_one_of_several_names_asks_as_a_link_does(store: QuotaStore) -> None:
    quota, a, b = store.mkdir(b"quota"), store.mkdir(b"a"), store.mkdir(b"b")
    ino = store.create(b"one", parent=a)
    store.write(ino, bytes(50))
    store.link(ino, b"two", parent=a)
    store.limit(quota, bytes_max=49)
    refused(lambda: store.rename(b"two", b"two", parent=a, new_parent=quota))
    store.limit(quota, bytes_max=50)
    store.rename(b"two", b"two", parent=a, new_parent=quota)
    assert store.usage(quota) == (0, 0)
    store.rename(b"one", b"one", parent=a, new_parent=b)
    assert (store.usage(quota), store.usage(b)) == ((0, 0), (50, 1)), "charged to where the name went"


def test_files_without_a_name_are_charged_to_nobody(store: QuotaStore) -> None:
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.limit(d, bytes_max=10)
    store.write(ino, bytes(10))
    assert store.unlink(b"f", parent=d).held
    store.write(ino, bytes(100))
    assert store.usage(d) == (0, 0)


# --- attributes -------------------------------------------------------------------------------------------------------


def test_limits_are_set_read_and_removed(store: QuotaStore) -> None:
    d = store.mkdir(b"d")

    def set_limit(name: bytes, value: bytes, how: SetXattrMode = SetXattrMode.EITHER) -> None:
        store.change(protocol.SetXattr(SESSION, 1, d, name, value, how))

    for name in quotas.QUOTA:
        with pytest.raises(NoSuchAttribute):
            store.xattr(d, name)
        with pytest.raises(NoSuchAttribute):
            store.change(protocol.RemoveXattr(SESSION, 1, d, name))
        with pytest.raises(NoSuchAttribute):
            set_limit(name, b"1", SetXattrMode.REPLACE)
        set_limit(name, b"2K", SetXattrMode.CREATE)
        assert store.xattr(d, name) == b"2048"
        with pytest.raises(EntryExists):
            set_limit(name, b"1", SetXattrMode.CREATE)
        set_limit(name, b"7", SetXattrMode.REPLACE)
    assert store.ask(protocol.ListXattr(SESSION, d)).names == ()
    set_limit(b"fsd.quota.bytes", b"0")
    assert store.xattr(d, b"fsd.quota.inodes") == b"7"
    store.change(protocol.RemoveXattr(SESSION, 1, d, b"fsd.quota.inodes"))
    assert not [key for key, _ in store.pairs() if key.startswith(b"u")]


def test_only_root_sets_limits_and_whoever_may_read_the_directory_sees_them(store: QuotaStore) -> None:
    d, secret = store.mkdir(b"d"), store.mkdir(b"secret", mode=0o700)
    f = store.create(b"f", parent=d)
    store.limit(d, bytes_max=9)
    with pytest.raises(NotPermitted):
        store.change(protocol.SetXattr(SESSION, 1, d, b"fsd.quota.bytes", b"1", SetXattrMode.EITHER, USER))
    with pytest.raises(NotPermitted):
        store.change(protocol.RemoveXattr(SESSION, 1, d, b"fsd.quota.bytes", USER))
    with pytest.raises(NotPermitted):
        store.change(protocol.SetXattr(SESSION, 1, d, b"fsd.usage.bytes", b"1"))
    assert store.xattr(d, b"fsd.quota.bytes", USER) == b"9"
    with pytest.raises(AccessDenied):
        store.xattr(secret, b"fsd.usage.bytes", USER)
    with pytest.raises(NoSuchAttribute):
        store.xattr(f, b"fsd.usage.bytes")
    with pytest.raises(NotDirectory):
        store.limit(f, bytes_max=1)
    with pytest.raises(NotSupported):
        store.xattr(d, b"fsd.other")


@pytest.mark.parametrize(
    ("text", "limit"),
    [(b"0", 0), (b"12", 12), (b"1k", 1024), (b"3M", 3 << 20), (b"10G", 10 << 30), (b"7E", 7 << 60), (b"5\n", 5)],
)
def test_limits_may_end_in_a_unit(text: bytes, limit: int) -> None:
    assert quotas.parse_limit(text) == limit


@pytest.mark.parametrize("text", [b"", b"-1", b"1.5G", b"K", b"1KB", b"1 K", b"0x10", b"8E", b"9" * 20, b"\xff"])
def test_what_is_no_limit_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        quotas.parse_limit(text)


def test_a_quota_goes_with_its_directory(store: QuotaStore) -> None:
    for name in (b"removed", b"replaced"):
        store.limit(store.mkdir(name), inodes_max=5)
    store.mkdir(b"other")
    store.rmdir(b"removed")
    store.rename(b"other", b"replaced")
    assert store.ask(protocol.ListQuotas()).quotas == ()
    with store.engine.read() as txn:
        assert check(txn) == []


# --- lists and df -----------------------------------------------------------------------------------------------------


def test_all_quotas_are_listed_with_paths_and_usage_in_pages(store: QuotaStore) -> None:
    a = store.mkdir(b"a")
    b = store.mkdir(b"b", parent=a)
    store.write(store.create(b"f", parent=b), bytes(5))
    store.limit(ROOT_INO, inodes_max=100)
    store.limit(a, bytes_max=1000)
    store.limit(b, bytes_max=50, inodes_max=7)
    pages: list[protocol.QuotaStatus] = []
    after = 0
    while True:
        page = store.ask(protocol.ListQuotas(after, 1))
        pages += page.quotas
        if page.end:
            break
        after = page.quotas[-1].ino
    assert [(one.path, one.bytes_max, one.inodes_max, one.bytes_used, one.inodes_used) for one in pages] == [
        (b"/", 0, 100, 5, 3),
        (b"/a", 1000, 0, 5, 2),
        (b"/a/b", 50, 7, 5, 1),
    ]


def test_a_path_that_would_take_too_long_to_find_is_not_told(
    store: QuotaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(50):
        store.mkdir(b"d%d" % index)
    for index in range(50):
        store.limit(store.lookup(b"d%d" % index), bytes_max=1)
    monkeypatch.setattr(quotas, "NAMES_MAX", 100)
    paths = [one.path for one in store.ask(protocol.ListQuotas()).quotas]
    assert paths[0] == b"/d0"
    assert paths[-1] is None


def test_df_shows_the_nearest_limit_and_what_the_tightest_quota_leaves(store: QuotaStore) -> None:
    outer = store.mkdir(b"outer")
    inner = store.mkdir(b"inner", parent=outer)
    ino = store.create(b"f", parent=inner)
    store.write(ino, bytes(400))

    def df(at: int, space_free: int = 1 << 40) -> tuple[int, int, int, int]:
        with store.engine.read() as txn:
            told = file_system_status(txn, at, space_total=1 << 41, space_free=space_free)
        return told.space_total, told.space_free, told.inodes_total, told.inodes_free

    assert df(inner) == (1 << 41, 1 << 40, -1, -1)
    store.limit(outer, bytes_max=1000, inodes_max=10)
    assert df(inner) == df(outer) == df(ino) == (1000, 600, 10, 8)
    assert df(ROOT_INO) == (1 << 41, 1 << 40, -1, -1)
    store.limit(inner, bytes_max=5000, inodes_max=2)
    assert df(inner) == (5000, 600, 2, 1)
    assert df(inner, space_free=77) == (5000, 77, 2, 1)
    store.limit(inner, bytes_max=100)
    assert df(inner) == (100, 0, 2, 1)


def test_a_refused_change_of_an_operation_is_rolled_back_by_the_service_too(store: QuotaStore) -> None:
    """Through apply_once, as the service does it: the refusal is kept, and nothing else."""
    d = store.mkdir(b"d")
    ino = store.create(b"f", parent=d)
    store.limit(d, bytes_max=10)
    first = store.change(protocol.AllocateSlices(SESSION, 1, 1)).first
    request = protocol.CommitExtents(SESSION, 9, ino, (Extent(0, 11, first, 0),), ((first, 11),), 0, 0)
    before = store.pairs()

    class Nothing:
        def get(self, session: int) -> int | None:
            return 8

        def set(self, session: int, sequence: int) -> None:
            assert sequence == 9

    with store.engine.write() as txn:
        answer = apply_once(txn, request, newest=Nothing(), now_ns=1)
        assert isinstance(answer, QuotaExceeded)
        txn.commit()
    assert [pair for pair in store.pairs() if pair[0] != schema.answer_key(SESSION, 9)] == before
