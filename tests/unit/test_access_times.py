"""Access times: which reads change them, when that is seen, and how it comes to the inode service."""

from __future__ import annotations

import os
import stat

import pytest
import trio
import trio.testing

from fsd.access_times import DELAY_S
from fsd.core.access_times import DAY_NS, AccessTimeMode, AccessTimeRule, rule_of_options
from fsd.frontend.ports import Changes, Entry
from metadata.core.schema import ROOT_INO, Inode
from metadata.protocol import RecallItem, RecallKind, SetAttr, TouchAtimes
from tests.support.file_system import CALLER, ROOT, Mounted, at_once, mounted, soon
from tests.support.local_services import failing
from wire.errors import DeadlineExceeded

S_NS = 1_000_000_000
FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
ALWAYS = AccessTimeRule(AccessTimeMode.ALWAYS)
NEVER = AccessTimeRule(AccessTimeMode.NEVER)


# --- the rule -------------------------------------------------------------------------------------


def inode(atime_ns: int, mtime_ns: int, ctime_ns: int, mode: int = FILE) -> Inode:
    return Inode(mode, 1, 0, 0, 0, atime_ns=atime_ns, mtime_ns=mtime_ns, ctime_ns=ctime_ns, btime_ns=0)


@pytest.mark.parametrize(
    ("atime", "mtime", "ctime", "now", "due"),
    [
        (100, 100, 100, 101, True),  # As after its creation.
        (101, 100, 100, 102, False),
        (101, 102, 100, 103, True),
        (101, 101, 100, 103, True),
        (101, 100, 102, 103, True),
        (101, 100, 101, 103, True),
        (101, 100, 100, 101 + DAY_NS, True),
        (101, 100, 100, 100 + DAY_NS, False),
        (500, 100, 100, 200, False),  # In the future.
        (500, 600, 100, 200, True),
    ],
)
def test_relatime_is_that_of_linux(atime: int, mtime: int, ctime: int, now: int, due: bool) -> None:
    assert AccessTimeRule().is_due(inode(atime, mtime, ctime), now) == due
    assert not NEVER.is_due(inode(atime, mtime, ctime), now)
    assert ALWAYS.is_due(inode(atime, mtime, ctime), now) == (now > atime)


def test_nodiratime_spares_directories_only() -> None:
    rule = AccessTimeRule(directories=False)
    assert not rule.is_due(inode(1, 1, 1, DIRECTORY), 2)
    assert rule.is_due(inode(1, 1, 1), 2)


@pytest.mark.parametrize(
    ("options", "mode", "directories"),
    [
        ((), AccessTimeMode.RELATIVE, True),
        (("noexec", "noatime"), AccessTimeMode.NEVER, True),
        (("noatime", "relatime"), AccessTimeMode.RELATIVE, True),
        (("noatime", "atime", "nodiratime"), AccessTimeMode.RELATIVE, False),
        (("strictatime", "nodiratime", "diratime"), AccessTimeMode.ALWAYS, True),
        (("norelatime",), AccessTimeMode.ALWAYS, True),
    ],
)
def test_options_of_mount_8(options: tuple[str, ...], mode: AccessTimeMode, directories: bool) -> None:
    assert rule_of_options(options, read_only=False) == AccessTimeRule(mode, directories)
    assert rule_of_options(options, read_only=True).mode is AccessTimeMode.NEVER


# --- reads and opens ------------------------------------------------------------------------------


def atime(m: Mounted, ino: int) -> int:
    """As this mount tells it, which must be at once."""
    return at_once(m.fs.getattr(ino)).inode.atime_ns


def pass_time(m: Mounted, seconds: float = 1.0) -> int:
    m.metadata.now_ns += round(seconds * S_NS)
    return m.metadata.now_ns


async def cat(m: Mounted, ino: int, flags: int = os.O_RDONLY, *, warm: bool = False) -> None:
    """As cat(1); `warm`: the kernel answers the reads."""
    opened = await soon(m.fs.open(ino, flags, CALLER))
    if not warm:
        await soon(m.fs.read(opened.fh, 0, 100))
    await soon(m.fs.release(opened.fh))


async def test_a_file_that_was_written_is_read_once_with_relatime() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        now = pass_time(m)
        await cat(m, ino, warm=True)
        assert atime(m, ino) == now
        assert m.kernel.attributes == [ino]
        pass_time(m)
        opened = at_once(m.fs.open(ino, os.O_RDONLY, CALLER))
        assert opened.keep_cache
        await soon(m.fs.read(opened.fh, 0, 100))
        assert atime(m, ino) == now
        assert m.kernel.attributes == [ino]


async def test_after_the_next_change_it_is_read_again() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        pass_time(m)
        await cat(m, ino)
        pass_time(m)
        await soon(m.fs.setattr(ino, Changes(mode=0o600), CALLER))
        now = pass_time(m)
        await cat(m, ino, warm=True)
        assert atime(m, ino) == now
        now = pass_time(m, 24 * 3600)
        await cat(m, ino, warm=True)
        assert atime(m, ino) == now


async def test_an_empty_file_is_read_by_opening_it() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        now = pass_time(m)
        await cat(m, ino, os.O_RDWR, warm=True)
        assert atime(m, ino) < now
        await cat(m, ino, warm=True)
        assert atime(m, ino) == now


async def test_of_a_file_that_the_kernel_has_no_pages_of_only_reads_count() -> None:
    async with mounted() as m:
        m.metadata.create(b"f")
        ino = (await soon(m.fs.lookup(ROOT, b"f"))).nodeid
        m.metadata.apply(SetAttr(1, 900, ino=ino, mask=8, size=10))
        await soon(m.fs.setattr(ino, Changes(mode=0o600), CALLER))
        before, now = atime(m, ino), pass_time(m)
        await cat(m, ino, warm=True)
        assert atime(m, ino) == before
        await cat(m, ino)
        assert atime(m, ino) == now


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_NOATIME, os.O_WRONLY, os.O_RDWR | os.O_TRUNC])
async def test_opens_that_do_not_read_do_not_count(flags: int) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        before = atime(m, ino)
        pass_time(m)
        opened = await soon(m.fs.open(ino, flags, CALLER))
        if flags & os.O_NOATIME:
            await soon(m.fs.read(opened.fh, 0, 100))
        await soon(m.fs.release(opened.fh))
        assert atime(m, ino) == before
        assert m.kernel.attributes == []


async def test_noatime_never_and_strictatime_always() -> None:
    for rule, count in ((NEVER, 0), (ALWAYS, 3)):
        async with mounted(access_times=rule) as m:
            ino = await m.make(b"f", b"bytes")
            seen = {atime(m, ino)}
            for _ in range(3):
                pass_time(m)
                await cat(m, ino, warm=True)
                seen.add(atime(m, ino))
            assert len(seen) == 1 + count


async def test_a_clock_that_is_behind_the_services_does_not_make_every_read_count() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        pass_time(m, -3600)
        await cat(m, ino)
        told = at_once(m.fs.getattr(ino)).inode
        assert told.atime_ns == told.ctime_ns + 1
        at_once(m.fs.open(ino, os.O_RDONLY, CALLER))


async def test_directories_and_symlinks_have_access_times() -> None:
    async with mounted() as m:
        directory = (await soon(m.fs.mkdir(ROOT, b"d", 0o40755, CALLER))).nodeid
        link = (await soon(m.fs.symlink(ROOT, b"l", b"target", CALLER))).nodeid
        now = pass_time(m)
        assert await m.list(directory) == [b".", b".."]
        assert await soon(m.fs.readlink(link)) == b"target"
        assert (atime(m, directory), atime(m, link)) == (now, now)
        pass_time(m)
        await m.list(directory)
        await soon(m.fs.readlink(link))
        assert (atime(m, directory), atime(m, link)) == (now, now)
        await m.make(b"f", parent=directory)
        now = pass_time(m)
        await m.list(directory)
        assert atime(m, directory) == now


async def test_listings_show_what_was_read() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        now = pass_time(m)
        await cat(m, ino)
        fh = (await soon(m.fs.opendir(ROOT))).fh
        told: dict[bytes, int] = {}

        def add(name: bytes, entry: Entry, after: int) -> bool:
            told[name] = entry.inode.atime_ns
            return True

        await soon(m.fs.readdir(fh, 0, True, add))
        assert told[b"f"] == now


# --- the way to the service -----------------------------------------------------------------------


async def test_times_come_to_the_service_together_and_late(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        inos = [await m.make(b"f%d" % number, b"x") for number in range(20)]
        now = pass_time(m)
        for ino in inos:
            await cat(m, ino)
        assert m.metadata.count(TouchAtimes) == 0
        before = [m.metadata.layout(ino).inode for ino in inos]
        await trio.sleep(DELAY_S + 1)
        assert m.metadata.count(TouchAtimes) == 1
        for ino, old in zip(inos, before, strict=True):
            new = m.metadata.layout(ino).inode
            assert (new.atime_ns, new.mtime_ns, new.ctime_ns) == (now, old.mtime_ns, old.ctime_ns)
            assert new.data_version == old.data_version
            assert atime(m, ino) == now
        await trio.sleep(60)
        assert m.metadata.count(TouchAtimes) == 1


async def test_a_full_message_leaves_at_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsd.access_times.TOUCHES_PER_MESSAGE_MAX", 4)
    async with mounted() as m:
        for number in range(10):
            await cat(m, await m.make(b"f%d" % number, b"x"))
        await trio.sleep(DELAY_S / 2)
        assert m.metadata.count(TouchAtimes) == 2
        await trio.sleep(DELAY_S)
        assert m.metadata.count(TouchAtimes) == 3


async def test_a_service_that_is_away_delays_times_and_no_read(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        with failing(m.metadata.mutations, DeadlineExceeded("away")):
            now = pass_time(m)
            await cat(m, ino)
            await trio.sleep(30)
            assert atime(m, ino) == now
        await trio.sleep(30)
        assert m.metadata.layout(ino).inode.atime_ns == now


async def test_a_message_whose_answer_was_lost_is_sent_again(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        now = pass_time(m)
        await cat(m, ino)
        m.metadata.forget_answers_of.append(TouchAtimes)
        await trio.sleep(60)
        assert m.metadata.count(TouchAtimes) == 2
        assert (m.metadata.layout(ino).inode.atime_ns, atime(m, ino)) == (now, now)


@pytest.mark.parametrize("is_under_way", [False, True])
async def test_a_time_that_is_set_has_the_last_word(is_under_way: bool, autojump_clock: trio.testing.MockClock) -> None:
    """As tar --atime-preserve does it: back to what it was."""
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        original = atime(m, ino)
        pass_time(m)
        await cat(m, ino)
        gate = m.metadata.held_replies[TouchAtimes] = trio.Event()
        if is_under_way:
            await trio.sleep(DELAY_S + 1)
            assert m.metadata.count(TouchAtimes) == 1
        async with trio.open_nursery() as nursery:

            async def utimens() -> None:
                changed = await soon(m.fs.setattr(ino, Changes(atime_ns=original), CALLER))
                assert changed.inode.atime_ns == original

            nursery.start_soon(utimens)
            await trio.sleep(1)
            gate.set()
        await trio.sleep(60)
        assert (m.metadata.layout(ino).inode.atime_ns, atime(m, ino)) == (original, original)


async def test_a_time_that_another_mount_has_set_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await m.fs.set_alone(False)
        now = pass_time(m)
        await cat(m, ino)
        assert (await soon(m.fs.getattr(ino))).inode.atime_ns == now
        m.metadata.apply(SetAttr(1, 900, ino=ino, mask=16, atime_ns=5))
        await m.fs.recall([RecallItem(ino, RecallKind.ATTRS)])
        assert (await soon(m.fs.getattr(ino))).inode.atime_ns == 5
        await trio.sleep(60)
        assert m.metadata.layout(ino).inode.atime_ns == 5


async def test_a_read_while_its_last_time_is_under_way_goes_from_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mounted(access_times=ALWAYS) as m:
        ino = await m.make(b"f", b"x")
        pass_time(m)
        await cat(m, ino)
        gate = m.metadata.held_replies[TouchAtimes] = trio.Event()
        await trio.sleep(DELAY_S + 1)
        now = pass_time(m)
        await cat(m, ino)
        gate.set()
        assert atime(m, ino) == now
        await trio.sleep(60)
        assert m.metadata.count(TouchAtimes) == 2
        assert (m.metadata.layout(ino).inode.atime_ns, atime(m, ino)) == (now, now)


async def test_what_waits_is_told_when_sharing_begins_and_at_the_end() -> None:
    async with mounted() as m:
        first, second = await m.make(b"f", b"x"), await m.make(b"g", b"x")
        now = pass_time(m)
        await cat(m, first)
        await m.fs.set_alone(False)
        await m.fs.open_inodes()
        assert m.metadata.layout(first).inode.atime_ns == now
        now = pass_time(m)
        await cat(m, second)
        await m.fs.close(10)
        assert m.metadata.layout(second).inode.atime_ns == now


async def test_what_is_gone_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        removed, kept = await m.make(b"f", b"x"), await m.make(b"g", b"x")
        now = pass_time(m)
        await cat(m, removed)
        await cat(m, kept)
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        await trio.sleep(DELAY_S + 1)
        assert m.metadata.layout(kept).inode.atime_ns == now
        assert m.metadata.layout(ROOT_INO).inode.size == 1
