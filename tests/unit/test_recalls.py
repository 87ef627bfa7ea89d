"""Recalls at the mount: what is not believed any more, what the kernel is told, and what waits for what."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from fsd import files, recalls
from fsd.frontend.ports import Entry, KernelName, Opened
from metadata.core.schema import ROOT_INO
from metadata.protocol import (
    CommitExtents,
    Create,
    GetAttr,
    GetLayout,
    Lookup,
    ReadDir,
    RecallItem,
    RecallKind,
    Rename,
    SetAttr,
    WriteInline,
)
from tests.support.file_system import CALLER, LEASE_S, ROOT, Mounted, at_once, mounted, needs_network, soon
from tests.support.lease_world import plant_belief_in_older_answers
from wire.message import Message

ATTRS, CONTENT, NAME, FLUSH = RecallKind.ATTRS, RecallKind.CONTENT, RecallKind.NAME, RecallKind.FLUSH


@asynccontextmanager
async def sharing() -> AsyncIterator[Mounted]:
    async with mounted() as m:
        await m.fs.set_alone(False)
        m.kernel.everything.clear()
        yield m


@asynccontextmanager
async def held(m: Mounted, kind: type[Message], *asking: object) -> AsyncIterator[None]:
    """The questions are answered at the service; the answers arrive when the block has ended."""
    gate = m.metadata.held_replies[kind] = trio.Event()
    async with trio.open_nursery() as nursery:
        for one in asking:
            nursery.start_soon(soon, one)
        await trio.testing.wait_all_tasks_blocked()
        yield
        del m.metadata.held_replies[kind]
        gate.set()


async def recall(m: Mounted, ino: int, kind: RecallKind, name: bytes = b"") -> None:
    await m.fs.recall([RecallItem(ino, kind, name)])


# --- attributes -------------------------------------------------------------------------------------------------------


async def test_recalled_attributes_are_asked_for_and_the_kernel_drops_its_own() -> None:
    async with sharing() as m:
        ino = m.metadata.create(b"f").ino
        await soon(m.fs.lookup(ROOT, b"f"))
        m.metadata.apply(SetAttr(1, 600, ino=ino, mask=1, mode=0o600))
        await recall(m, ino, ATTRS)
        assert m.kernel.dropped == [([ino], [])]
        assert needs_network(m.fs.getattr(ino))
        assert (await soon(m.fs.getattr(ino))).inode.mode & 0o777 == 0o600
        assert at_once(m.fs.getattr(ino)).attr_timeout_s == LEASE_S


async def test_what_is_asked_for_while_the_kernel_drops_it_is_told_for_no_time() -> None:
    async with sharing() as m:
        ino = m.metadata.create(b"f").ino
        await soon(m.fs.lookup(ROOT, b"f"))
        m.kernel.dropping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recall, m, ino, ATTRS)
            await trio.testing.wait_all_tasks_blocked()
            assert (await soon(m.fs.getattr(ino))).attr_timeout_s == 0.0
            m.kernel.dropping.set()
        assert needs_network(m.fs.getattr(ino))


async def crossing(m: Mounted) -> bool:
    """Whether an answer to a question from before a recall is believed after it."""
    ino = m.metadata.create(b"f").ino
    await soon(m.fs.lookup(ROOT, b"f"))
    await recall(m, ino, ATTRS)
    async with held(m, GetAttr, m.fs.getattr(ino)):
        await recall(m, ino, ATTRS)
    return not needs_network(m.fs.getattr(ino))


async def test_an_answer_that_crossed_the_recall_is_not_believed() -> None:
    async with sharing() as m:
        assert not await crossing(m)


async def test_the_net_catches_a_fact_believed_that_was_asked_for_before_the_recall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant_belief_in_older_answers(monkeypatch)
    async with sharing() as m:
        assert await crossing(m)


async def test_of_an_inode_that_was_evicted_no_older_answer_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sharing() as m:
        ino = m.metadata.create(b"f").ino
        async with held(m, Lookup, m.fs.lookup(ROOT, b"f")):
            await recall(m, ino, ATTRS)
        assert needs_network(m.fs.getattr(ino))


# --- names ------------------------------------------------------------------------------------------------------------


async def test_a_recalled_name_is_asked_for_and_the_others_are_not() -> None:
    async with sharing() as m:
        one, two = m.metadata.create(b"one").ino, m.metadata.create(b"two").ino
        await m.list()
        m.metadata.unlink(b"one", one)
        await recall(m, ROOT_INO, NAME, b"one")
        assert m.kernel.dropped_names == [KernelName(ROOT, b"one")]
        assert m.kernel.dropped == [([], [ROOT])], "the listing"
        assert at_once(m.fs.lookup(ROOT, b"two")).nodeid == two
        assert at_once(m.fs.lookup(ROOT, b"never was")).nodeid == 0
        assert (await soon(m.fs.lookup(ROOT, b"one"))).nodeid == 0
        assert at_once(m.fs.lookup(ROOT, b"one")).entry_timeout_s == LEASE_S


async def test_a_name_that_the_kernel_was_not_told_costs_it_nothing() -> None:
    async with sharing() as m:
        await soon(m.fs.lookup(ROOT, b"another"))
        await recall(m, ROOT_INO, NAME, b"f")
        assert m.kernel.dropped_names == []
        m.kernel.is_idle = False  # A directory's names may just be leaving.
        await recall(m, ROOT_INO, NAME, b"f")
        assert m.kernel.dropped_names == [KernelName(ROOT, b"f")]


async def test_absence_that_a_complete_listing_showed_is_told_to_the_kernel_and_dropped_there() -> None:
    async with sharing() as m:
        await m.list()
        assert at_once(m.fs.lookup(ROOT, b"new")).entry_timeout_s == LEASE_S
        ino = m.metadata.create(b"new").ino
        await recall(m, ROOT_INO, NAME, b"new")
        assert m.kernel.dropped_names == [KernelName(ROOT, b"new")]
        assert (await soon(m.fs.lookup(ROOT, b"new"))).nodeid == ino


async def test_a_listing_that_a_recall_crossed_does_not_show_what_is_absent() -> None:
    for number in (0, 600):
        async with sharing() as m:
            for each in range(number):
                m.metadata.create(b"n%d" % each)
            async with held(m, ReadDir, m.list()):
                ino = m.metadata.create(b"new").ino
                await recall(m, ROOT_INO, NAME, b"new")
            assert (await soon(m.fs.lookup(ROOT, b"new"))).nodeid == ino


async def test_changes_of_our_own_that_crossed_a_recall_are_not_believed() -> None:
    """Made here, and removed elsewhere before the answer has come."""
    async with sharing() as m:
        async with held(m, Create, m.fs.create(ROOT, b"f", 0o644, os.O_RDWR, CALLER)):
            m.metadata.unlink(b"f", (await soon(m.fs.lookup(ROOT, b"f"))).nodeid)
            await recall(m, ROOT_INO, NAME, b"f")
        assert (await soon(m.fs.lookup(ROOT, b"f"))).nodeid == 0
        m.metadata.create(b"a")
        await soon(m.fs.lookup(ROOT, b"a"))
        async with held(m, Rename, m.fs.rename(ROOT, b"a", ROOT, b"b", 0, CALLER)):
            m.metadata.unlink(b"b", (await soon(m.fs.lookup(ROOT, b"b"))).nodeid)
            await recall(m, ROOT_INO, NAME, b"b")
        assert (await soon(m.fs.lookup(ROOT, b"b"))).nodeid == 0
        assert m.kernel.void_count >= 1


async def test_where_a_change_is_under_way_all_names_are_void_instead() -> None:
    async with sharing() as m:
        m.metadata.create(b"f")
        await soon(m.fs.lookup(ROOT, b"f"))
        m.kernel.dropping_names = trio.Event()  # The kernel holds the directory's lock for the change.
        async with held(m, Create, m.fs.create(ROOT, b"mine", 0o644, os.O_RDWR, CALLER)):
            await recall(m, ROOT_INO, NAME, b"f")
            assert (m.kernel.void_count, m.kernel.dropped_names) == (1, [])
        entry = await soon(m.fs.lookup(ROOT, b"f"))
        assert entry.entry_timeout_s == 0.0
        assert entry.attr_timeout_s == LEASE_S
        await recall(m, ROOT_INO, NAME, b"f")
        assert (m.kernel.void_count, m.kernel.dropped_names) == (1, []), "the kernel keeps no name there for a while"


async def test_a_name_that_the_kernel_does_not_drop_soon_makes_all_void(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with sharing() as m:
        await soon(m.fs.lookup(ROOT, b"f"))
        m.kernel.dropping_names = trio.Event()
        before = trio.current_time()
        await recall(m, ROOT_INO, NAME, b"f")
        assert trio.current_time() - before == pytest.approx(recalls.NAMES_S)
        assert m.kernel.void_count == 1
        assert (await soon(m.fs.lookup(ROOT, b"f"))).entry_timeout_s == 0.0
        await trio.sleep(10.1)
        assert at_once(m.fs.lookup(ROOT, b"f")).entry_timeout_s == LEASE_S


async def test_a_kernel_that_cannot_make_names_void_is_waited_for() -> None:
    async with sharing() as m:
        await soon(m.fs.lookup(ROOT, b"f"))
        m.kernel.can_make_void = False
        gate = m.kernel.dropping_names = trio.Event()
        async with trio.open_nursery() as nursery:
            over = trio.Event()

            async def obey() -> None:
                await recall(m, ROOT_INO, NAME, b"f")
                over.set()

            nursery.start_soon(obey)
            await trio.sleep(recalls.NAMES_S * 2)
            assert not over.is_set()
            gate.set()
        assert m.kernel.dropped_names == [KernelName(ROOT, b"f")]


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CONTENT, ATTRS])
async def test_a_reader_sees_what_others_wrote_its_end_too(kind: RecallKind) -> None:
    """Of a file that is open here the recall of attributes counts as one of content: no other will come."""
    async with sharing() as m:
        ino = await m.make(b"f", b"old")
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        assert bytes(await soon(m.fs.read(opened.fh, 0, 100))) == b"old"
        m.metadata.apply(WriteInline(1, 77, ino, 0, b"new and longer", -1))
        await recall(m, ino, kind)
        assert m.kernel.dropped == [([], [ino])]
        assert bytes(await soon(m.fs.read(opened.fh, 0, 100))) == b"new and longer"
        assert bytes(at_once(m.fs.read(opened.fh, 0, 100))) == b"new and longer"
        await soon(m.fs.release(opened.fh))


async def test_a_layout_that_crossed_the_recall_is_asked_for_again() -> None:
    async with sharing() as m:
        ino = await m.make(b"f", b"old")
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        await soon(m.fs.read(opened.fh, 0, 100))
        await recall(m, ino, CONTENT)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await soon(m.fs.read(opened.fh, 0, 100))))

        async with held(m, GetLayout, read()):
            m.metadata.apply(WriteInline(1, 77, ino, 0, b"new", -1))
            await recall(m, ino, CONTENT)
        assert got == [b"new"]
        assert bytes(at_once(m.fs.read(opened.fh, 0, 100))) == b"new"
        await soon(m.fs.release(opened.fh))


async def test_pages_of_a_closed_file_outlive_the_recall_of_its_attributes_if_the_content_is_the_same() -> None:
    async with sharing() as m:
        ino = m.metadata.create(b"f").ino
        await soon(m.fs.lookup(ROOT, b"f"))
        for changes, kept in ((False, True), (True, False)):
            opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
            await soon(m.fs.release(opened.fh))
            await recall(m, ino, ATTRS)
            assert m.kernel.dropped[-1] == ([ino], [])
            if changes:  # Nobody tells: the service has noted that nothing is believed here.
                m.metadata.apply(SetAttr(1, 600, ino=ino, mask=8, size=5))
            opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
            assert opened.keep_cache == kept
            await soon(m.fs.release(opened.fh))


# --- writing ----------------------------------------------------------------------------------------------------------


def committed(m: Mounted) -> int:
    return m.metadata.count(WriteInline) + m.metadata.count(CommitExtents)


async def test_a_write_without_the_lease_is_committed_before_it_returns() -> None:
    async with sharing() as m:
        ino = await m.make(b"f")
        opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        assert opened.direct_io
        for number in (1, 2):
            await soon(m.fs.write(opened.fh, number * 10, b"bytes"))
            assert m.metadata.layout(ino).inode.size == number * 10 + 5
        await soon(m.fs.release(opened.fh))


async def test_with_the_lease_writes_stay_in_memory_until_they_are_recalled() -> None:
    async with sharing() as m:
        ino = await m.make(b"f")
        m.metadata.gives_write_leases = True
        opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        assert not opened.direct_io
        assert at_once(m.fs.write(opened.fh, 0, b"behind")) == 6
        assert committed(m) == 0
        await recall(m, ino, FLUSH)
        assert m.metadata.layout(ino).inode.size == 6
        assert m.kernel.dropped == [([], [ino])], "mappings are written back first"
        m.metadata.gives_write_leases = False
        assert needs_network(m.fs.write(opened.fh, 0, b"again"))
        await soon(m.fs.write(opened.fh, 6, b" through"))
        assert m.metadata.layout(ino).inode.size == 14
        await soon(m.fs.release(opened.fh))


async def test_a_lease_that_was_recalled_on_its_way_is_not_had() -> None:
    async with sharing() as m:
        ino = await m.make(b"f")
        m.metadata.gives_write_leases = True
        opened: list[Opened] = []

        async def open_it() -> None:
            opened.append(await soon(m.fs.open(ino, os.O_RDWR, CALLER)))

        async with held(m, GetLayout, open_it()):
            await recall(m, ino, FLUSH)
        m.metadata.gives_write_leases = False
        assert opened[0].direct_io
        await soon(m.fs.write(opened[0].fh, 0, b"through"))
        assert m.metadata.layout(ino).inode.size == 7
        await soon(m.fs.release(opened[0].fh))


async def test_the_lease_is_asked_for_again_when_nobody_has_recalled_anything_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with sharing() as m:
        ino = await m.make(b"f")
        opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        m.metadata.gives_write_leases = True
        await soon(m.fs.write(opened.fh, 0, b"1"))
        assert committed(m) == 1
        await trio.sleep(files.LEASE_PAUSE_S * 0.9)
        await recall(m, ino, ATTRS)
        await trio.sleep(files.LEASE_PAUSE_S * 0.9)
        await soon(m.fs.write(opened.fh, 0, b"2"))
        assert committed(m) == 2
        await trio.sleep(files.LEASE_PAUSE_S * 0.2)
        await soon(m.fs.write(opened.fh, 0, b"3"))
        at_once(m.fs.write(opened.fh, 0, b"4"))
        assert committed(m) == 2
        await soon(m.fs.flush(opened.fh))
        assert committed(m) == 3
        await soon(m.fs.release(opened.fh))


# --- everything -------------------------------------------------------------------------------------------------------


async def test_everything_is_dropped_written_bytes_are_flushed_and_then_it_begins_anew() -> None:
    async with sharing() as m:
        ino = await m.make(b"f")
        m.metadata.gives_write_leases = True
        opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        at_once(m.fs.write(opened.fh, 0, b"behind"))
        await soon(m.fs.lookup(ROOT, b"f"))
        await m.fs.recall([RecallItem(0, RecallKind.EVERYTHING)])
        ((inos, names),) = m.kernel.everything
        assert ino in inos
        assert KernelName(ROOT, b"f") in names
        assert m.metadata.layout(ino).inode.size == 6
        found: Entry = await soon(m.fs.lookup(ROOT, b"f"))
        assert found.entry_timeout_s == LEASE_S
        assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == ino
        await soon(m.fs.release(opened.fh))
