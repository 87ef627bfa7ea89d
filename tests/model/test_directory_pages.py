"""A listing in pages sees what was there all the time exactly once, while entries come and go."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata import protocol
from metadata.core import schema
from metadata.core.dispatch import apply
from metadata.core.schema import ROOT_INO
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.protocol import FIRST_COOKIE, ReadDir
from tests.support.store import SESSION, Store


def change_all(store: Store, requests: list[protocol.Mutation[protocol.Removed] | protocol.Create]) -> None:
    """Many changes in one transaction, without Store.change's look at the whole store for each."""
    with store.engine.write() as txn:
        for request in requests:
            apply(txn, request, now_ns=store.now_ns)
        txn.commit()


def create(name: bytes) -> protocol.Create:
    return protocol.Create(SESSION, 1, ROOT_INO, name, 0o644, True)


def unlink(name: bytes) -> protocol.Unlink:
    return protocol.Unlink(SESSION, 1, ROOT_INO, name)


def test_a_hundred_thousand_entries_are_listed_once_while_others_come_and_go(tmp_path: Path) -> None:
    store = Store(LmdbEngine(tmp_path / "engine"))
    chance = random.Random(7)
    staying = [b"stays-%d" % number for number in range(100_000)]
    going = [b"goes-%d" % number for number in range(2_000)]
    change_all(store, [create(name) for name in staying + going])
    seen: list[bytes] = []
    after, pages = 0, 0
    while True:
        page = store.ask(ReadDir(SESSION, ROOT_INO, after, chance.randint(1, 4096)))
        seen += [entry.name for entry in page.entries]
        if page.end:
            break
        after = page.entries[-1].cookie
        pages += 1
        chance.shuffle(going)
        change_all(store, [unlink(going.pop()) for _ in range(10)])
        change_all(store, [create(b"comes-%d-%d" % (pages, number)) for number in range(10)])
    assert pages > 20
    assert len(seen) == len(set(seen))
    assert set(staying) <= set(seen)
    store.engine.close()


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 30), st.data())
def test_entries_of_equal_cookie_are_never_cut_apart(hashes: int, entries: int, data: st.DataObject) -> None:
    """With a hash of very few values, pages of any size still list every entry exactly once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "name_hash", lambda name: FIRST_COOKIE + len(name) * 31 % hashes)
        store = Store()
        names = [b"n" * (number + 1) for number in range(entries)]
        change_all(store, [create(name) for name in names])
        seen: list[bytes] = []
        after, end = 0, False
        while not end:
            page = store.ask(ReadDir(SESSION, ROOT_INO, after, data.draw(st.integers(1, 8)), plus=True))
            end = page.end
            cookies = [entry.cookie for entry in page.entries]
            assert cookies == sorted(cookies)
            assert all(cookie > after for cookie in cookies)
            for entry in page.entries:
                assert entry.inode is not None
                seen.append(entry.name)
            after = cookies[-1] if cookies else after
        assert sorted(seen) == sorted(names)
