"""The file-system object: what it answers from memory, what it must not, what it tells the service and the kernel."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from msgspec.structs import replace

import fsd.nodes
from fsd.frontend.ports import Answer, Changes, Entry, KernelName
from metadata.core import posix_acl
from metadata.core.schema import ROOT_INO
from metadata.protocol import (
    FS_APPEND_FL,
    FS_IMMUTABLE_FL,
    Caller,
    Create,
    GetAttr,
    GetLayout,
    GetXattr,
    Link,
    Lookup,
    MakeDirectory,
    ReadDir,
    ReadDirDone,
    RecallItem,
    RecallKind,
    ReleaseInode,
    Rename,
    RenameFlags,
    SetAttr,
    SetFlags,
    Unlink,
    WriteInline,
)
from tests.support.file_system import CALLER, LEASE_S, ROOT, Mounted, at_once, mounted, needs_network, soon
from tests.support.local_services import failing
from wire.errors import (
    DeadlineExceeded,
    EntryExists,
    NoSpace,
    NoSuchAttribute,
    NoSuchEntry,
    NotPermitted,
    NotSupported,
    StaleInode,
    StoreError,
)
from wire.message import Message

# --- alone: answers from memory -------------------------------------------------------------------


async def test_alone_a_name_that_was_looked_up_is_answered_at_once() -> None:
    async with mounted() as m:
        reply = m.metadata.create(b"f")
        first = await soon(m.fs.lookup(ROOT, b"f"))
        again = at_once(m.fs.lookup(ROOT, b"f"))
        assert (first.nodeid, again.nodeid) == (reply.ino, reply.ino)
        assert (first.entry_timeout_s, first.attr_timeout_s) == (LEASE_S, LEASE_S)
        assert at_once(m.fs.getattr(reply.ino)).inode == reply.inode
        assert m.metadata.count(Lookup) == 1


async def test_alone_a_missing_name_is_remembered_until_it_is_made() -> None:
    async with mounted() as m:
        missing = await soon(m.fs.lookup(ROOT, b"f"))
        assert (missing.nodeid, missing.entry_timeout_s) == (0, LEASE_S)
        assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == 0
        ino = await m.make(b"f")
        assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == ino
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == 0
        with pytest.raises(NoSuchEntry):
            await m.metadata.ask(lambda session: Lookup(session, ROOT_INO, b"f"))


async def test_a_directory_made_here_needs_no_look_ups() -> None:
    async with mounted() as m:
        made = await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))
        assert at_once(m.fs.lookup(made.nodeid, b"nothing")).nodeid == 0
        assert m.metadata.count(Lookup) == 0


async def test_a_directory_listed_to_its_end_needs_no_look_ups() -> None:
    async with mounted() as m:
        for number in range(700):
            m.metadata.create(b"n%d" % number)
        assert needs_network(m.fs.lookup(ROOT, b"nothing"))
        assert len(await m.list(room=100)) == 702
        assert at_once(m.fs.lookup(ROOT, b"nothing")).nodeid == 0
        assert at_once(m.fs.lookup(ROOT, b"n13")).nodeid > 0


async def test_a_directory_listed_in_part_needs_look_ups() -> None:
    async with mounted() as m:
        for number in range(700):
            m.metadata.create(b"n%d" % number)
        fh = (await soon(m.fs.opendir(ROOT))).fh
        await soon(m.fs.readdir(fh, 0, True, lambda name, entry, cookie: name in (b".", b"..")))
        assert needs_network(m.fs.lookup(ROOT, b"nothing"))


async def test_attributes_of_a_changed_directory_come_with_the_change() -> None:
    async with mounted() as m:
        before = at_once(m.fs.getattr(ROOT)).inode
        await m.make(b"f")
        after = at_once(m.fs.getattr(ROOT)).inode
        assert after.mtime_ns > before.mtime_ns
        assert after == m.metadata.layout_of_root()
        assert m.metadata.count(GetAttr) == 0


async def test_another_name_shows_the_link_count_at_once() -> None:
    async with mounted() as m:
        ino = await m.make(b"a", b"x" * 10)
        await soon(m.fs.link(ino, ROOT, b"b", CALLER))
        assert at_once(m.fs.getattr(ino)).inode.nlink == 2
        await soon(m.fs.unlink(ROOT, b"a", CALLER))
        shown = at_once(m.fs.getattr(ino)).inode
        stored = m.metadata.layout(ino).inode
        assert (shown.nlink, shown.ctime_ns) == (1, stored.ctime_ns)


async def test_a_file_removed_before_its_first_write_has_no_names_afterwards() -> None:
    """The bytes begin with what the create brought, which is older than the unlink."""
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o644, os.O_RDWR, CALLER))
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        await soon(m.fs.write(opened.fh, 0, b"bytes"))
        assert (await soon(m.fs.getattr(entry.nodeid))).inode.nlink == 0


async def test_unlinking_an_open_file_with_unflushed_bytes_keeps_its_size_and_bytes() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 50_000))
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        inode = at_once(m.fs.getattr(entry.nodeid)).inode
        assert (inode.nlink, inode.size) == (0, 50_000)
        assert bytes(await soon(m.fs.read(opened.fh, 49_990, 100))) == b"x" * 10
        await soon(m.fs.fsync(opened.fh, False))
        assert m.metadata.layout(entry.nodeid).inode.size == 50_000


async def test_attributes_are_not_kept_by_the_kernel_while_bytes_wait() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x"))
        waiting = at_once(m.fs.getattr(entry.nodeid))
        assert (waiting.inode.size, waiting.attr_timeout_s) == (1, 0.0)
        await soon(m.fs.fsync(opened.fh, False))
        assert at_once(m.fs.getattr(entry.nodeid)).attr_timeout_s == LEASE_S


async def test_a_closed_file_opens_at_once() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        opened = at_once(m.fs.open(ino, os.O_RDONLY, CALLER))
        assert opened.keep_cache
        assert bytes(await soon(m.fs.read(opened.fh, 0, 100))) == b"bytes"


async def test_what_is_not_there_is_remembered_of_extended_attributes() -> None:
    async with mounted() as m:
        ino = await m.make(b"new")
        for name in (b"security.capability", b"user.x"):
            with pytest.raises(NoSuchAttribute):
                at_once(m.fs.getxattr(ino, name, CALLER))
        with pytest.raises(NotSupported):
            at_once(m.fs.getxattr(ino, b"strange.x", CALLER))
        m.metadata.create(b"old")
        old = (await soon(m.fs.lookup(ROOT, b"old"))).nodeid
        with pytest.raises(NoSuchAttribute):
            at_once(m.fs.getxattr(old, b"security.capability", CALLER))
        for _ in range(3):
            with pytest.raises(NoSuchAttribute):
                await soon(m.fs.getxattr(old, b"user.x", CALLER))
        assert m.metadata.count(GetXattr) == 1
        await soon(m.fs.setxattr(old, b"security.capability", b"cap", 0, CALLER))
        assert await soon(m.fs.getxattr(old, b"security.capability", CALLER)) == b"cap"
        await soon(m.fs.removexattr(old, b"security.capability", CALLER))
        with pytest.raises(NoSuchAttribute):
            await soon(m.fs.getxattr(old, b"security.capability", CALLER))


async def test_times_may_be_the_services_now_each_alone() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        before = at_once(m.fs.getattr(ino)).inode
        after = (await soon(m.fs.setattr(ino, Changes(mtime_ns=5), CALLER))).inode
        assert (after.atime_ns, after.mtime_ns) == (before.atime_ns, 5)
        after = (await soon(m.fs.setattr(ino, Changes(atime_now=True), CALLER))).inode
        assert after.atime_ns > before.atime_ns
        assert after.mtime_ns == 5
        after = (await soon(m.fs.setattr(ino, Changes(atime_ns=7, mtime_now=True), CALLER))).inode
        assert after.atime_ns == 7
        assert after.mtime_ns > before.mtime_ns
        assert after == m.metadata.layout(ino).inode


async def test_bytes_that_wait_do_not_take_back_an_mtime_of_now() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 20))
        written = at_once(m.fs.getattr(entry.nodeid)).inode.mtime_ns
        touched = (await soon(m.fs.setattr(entry.nodeid, Changes(mtime_now=True), CALLER))).inode.mtime_ns
        assert touched > written
        await soon(m.fs.fsync(opened.fh, False))
        assert m.metadata.layout(entry.nodeid).inode.mtime_ns == touched


WRITES = (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND | os.O_TRUNC)


async def test_an_immutable_file_is_opened_for_reading_alone_and_not_written_by_who_has_it_open() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        ino = entry.nodeid
        await soon(m.fs.write(opened.fh, 0, b"before"))
        await soon(m.fs.set_flags(ino, FS_IMMUTABLE_FL, CALLER))
        assert m.metadata.layout(ino).inode.size == 6
        assert at_once(m.fs.get_flags(ino)) == FS_IMMUTABLE_FL
        assert m.kernel.attributes == [ino]
        with pytest.raises(NotPermitted):
            await soon(m.fs.write(opened.fh, 0, b"after"))
        for flags in (*WRITES, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(NotPermitted):
                await soon(m.fs.open(ino, flags, CALLER))
        reader = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        assert bytes(await soon(m.fs.read(reader.fh, 0, 10))) == b"before"
        await soon(m.fs.set_flags(ino, 0, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"after"))


async def test_an_append_only_file_is_opened_for_appending_alone() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        await soon(m.fs.set_flags(ino, FS_APPEND_FL, CALLER))
        for flags in WRITES:
            with pytest.raises(NotPermitted):
                await soon(m.fs.open(ino, flags, CALLER))
        appender = await soon(m.fs.open(ino, os.O_WRONLY | os.O_APPEND, CALLER))
        await soon(m.fs.write(appender.fh, 5, b" more"))
        await soon(m.fs.flush(appender.fh))
        assert m.metadata.layout(ino).inode.size == 10


async def test_flags_that_another_mount_has_set_count_at_the_next_open() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"bytes")
        m.metadata.alone = False
        await m.fs.set_alone(False)
        await m.metadata.mutate(lambda session, sequence: SetFlags(session, sequence, ino, FS_IMMUTABLE_FL))
        assert await soon(m.fs.get_flags(ino)) == FS_IMMUTABLE_FL
        with pytest.raises(NotPermitted):
            await soon(m.fs.open(ino, os.O_WRONLY, CALLER))


async def test_a_temporary_file_is_written_read_and_named() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.tmpfile(ROOT, 0o100600, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"bytes"))
        assert (entry.inode.nlink, at_once(m.fs.getattr(entry.nodeid)).inode.size) == (0, 5)
        linked = await soon(m.fs.link(entry.nodeid, ROOT, b"name", CALLER))
        assert (linked.nodeid, linked.inode.nlink) == (entry.nodeid, 1)
        await soon(m.fs.release(opened.fh))
        m.fs.forget([(entry.nodeid, 2)])
        assert (await soon(m.fs.lookup(ROOT, b"name"))).inode.size == 5
        assert m.metadata.layout(entry.nodeid).inode.nlink == 1


async def test_a_temporary_file_that_is_closed_is_released() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.tmpfile(ROOT, 0o100600, os.O_RDWR | os.O_EXCL, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"bytes"))
        with pytest.raises(NoSuchEntry):
            await soon(m.fs.link(entry.nodeid, ROOT, b"name", CALLER))
        await soon(m.fs.release(opened.fh))
        m.fs.forget([(entry.nodeid, 1)])
        while m.metadata.count(ReleaseInode) == 0:
            await trio.lowlevel.checkpoint()
        with pytest.raises(NoSuchEntry):
            m.metadata.layout(entry.nodeid)


async def test_a_whiteout_is_known_by_its_name() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        await soon(m.fs.rename(ROOT, b"f", ROOT, b"g", RenameFlags.WHITEOUT, CALLER))
        left = at_once(m.fs.lookup(ROOT, b"f"))
        assert (left.inode.mode, left.inode.rdev) == (stat.S_IFCHR, 0)
        assert at_once(m.fs.lookup(ROOT, b"g")).nodeid == ino


NO_ID = 0xFFFFFFFF
LIST = posix_acl.encode(
    tuple(map(posix_acl.Entry, (1, 2, 4, 16, 32), (7, 7, 5, 7, 0), (NO_ID, 1000, NO_ID, NO_ID, NO_ID)))
)


async def test_that_there_is_no_access_control_list_is_answered_at_once_while_alone() -> None:
    async with mounted() as m:
        m.metadata.create(b"f")
        ino = (await soon(m.fs.lookup(ROOT, b"f"))).nodeid
        for name in posix_acl.XATTR_NAMES:
            with pytest.raises(NoSuchAttribute):
                at_once(m.fs.getxattr(ino, name, CALLER))
        m.metadata.alone = False
        await m.fs.set_alone(False)
        with pytest.raises(NoSuchAttribute):
            await soon(m.fs.getxattr(ino, posix_acl.ACCESS_XATTR, CALLER))
        assert m.metadata.count(GetXattr) == 1


async def test_an_access_control_list_changes_the_mode_and_chmod_changes_the_list() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        await soon(m.fs.setxattr(ino, posix_acl.ACCESS_XATTR, LIST, 0, CALLER))
        assert stat.S_IMODE(at_once(m.fs.getattr(ino)).inode.mode) == 0o770
        assert await soon(m.fs.listxattr(ino, CALLER)) == (posix_acl.ACCESS_XATTR,)
        assert await soon(m.fs.getxattr(ino, posix_acl.ACCESS_XATTR, CALLER)) == LIST
        await soon(m.fs.setattr(ino, Changes(mode=0o640), CALLER))
        changed = posix_acl.decode(await soon(m.fs.getxattr(ino, posix_acl.ACCESS_XATTR, CALLER)))
        assert [entry.perm for entry in changed] == [6, 7, 5, 4, 0]
        await soon(m.fs.removexattr(ino, posix_acl.ACCESS_XATTR, CALLER))
        with pytest.raises(NoSuchAttribute):
            at_once(m.fs.getxattr(ino, posix_acl.ACCESS_XATTR, CALLER))


async def test_what_inherits_an_access_control_list_is_not_said_to_have_no_attributes() -> None:
    async with mounted() as m:
        directory = (await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))).nodeid
        assert at_once(m.fs.listxattr(directory, CALLER)) == ()
        await soon(m.fs.setxattr(directory, posix_acl.DEFAULT_XATTR, LIST, 0, CALLER))
        masked = Caller(0, 0, umask=0o077)
        made = await soon(m.fs.mkdir(directory, b"sub", 0o777, masked))
        assert stat.S_IMODE(made.inode.mode) == 0o770
        assert await soon(m.fs.listxattr(made.nodeid, CALLER)) == posix_acl.XATTR_NAMES
        assert await soon(m.fs.getxattr(made.nodeid, posix_acl.DEFAULT_XATTR, CALLER)) == LIST
        plain = await soon(m.fs.mkdir(ROOT, b"e", 0o777, masked))
        assert stat.S_IMODE(plain.inode.mode) == 0o700


async def test_what_a_trusted_attribute_says_is_asked_for_by_everybody_anew() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        await soon(m.fs.setxattr(ino, b"trusted.x", b"secret", 0, CALLER))
        assert await soon(m.fs.getxattr(ino, b"trusted.x", CALLER)) == b"secret"
        assert needs_network(m.fs.getxattr(ino, b"trusted.x", CALLER))


# --- answers that crossed a change ----------------------------------------------------------------


async def test_attributes_that_crossed_an_unlink_are_not_believed() -> None:
    async with mounted() as m:
        ino = m.metadata.create(b"a").ino
        m.metadata.apply(Link(1, 500, ino=ino, parent=ROOT_INO, name=b"b"))
        await soon(m.fs.lookup(ROOT, b"b"))
        gate = m.metadata.held_replies[Lookup] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(soon, m.fs.lookup(ROOT, b"a"))
            await trio.testing.wait_all_tasks_blocked()
            await soon(m.fs.unlink(ROOT, b"b", CALLER))
            gate.set()
        assert (await soon(m.fs.getattr(ino))).inode.nlink == 1


async def test_an_answer_that_crossed_the_end_of_being_alone_is_for_its_moment_only() -> None:
    async with mounted() as m:
        m.metadata.create(b"f")
        gate = m.metadata.held_replies[Lookup] = trio.Event()
        found: list[Entry] = []

        async def look() -> None:
            found.append(await soon(m.fs.lookup(ROOT, b"f")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            await m.fs.set_alone(False)
            await m.fs.set_alone(True)
            gate.set()
        assert (found[0].entry_timeout_s, found[0].attr_timeout_s) == (0.0, 0.0)
        assert needs_network(m.fs.lookup(ROOT, b"f"))


async def test_a_listing_in_hand_does_not_bring_back_a_replaced_name() -> None:
    async with mounted() as m:
        for number in range(20):
            m.metadata.create(b"n%d" % number)
        fh = (await soon(m.fs.opendir(ROOT))).fh
        got: list[tuple[bytes, int, int]] = []

        def add(name: bytes, entry: Entry, cookie: int) -> bool:
            if len(got) % 6 == 5:
                return False
            got.append((name, entry.nodeid, cookie))
            return True

        await soon(m.fs.readdir(fh, 0, True, add))
        left = {b"n%d" % number for number in range(20)} - {name for name, _, _ in got}
        new = {}
        for name in left:
            await soon(m.fs.unlink(ROOT, name, CALLER))
            new[name] = await m.make(name)
        after = got[-1][2]
        got.clear()
        listed: dict[bytes, int] = {}
        await soon(m.fs.readdir(fh, after, True, lambda name, entry, cookie: not listed.update({name: entry.nodeid})))
        assert listed == new


async def test_a_listing_may_be_kept_unless_it_may_be_old() -> None:
    """The one that a recall met on its way to the kernel may have come after the kernel had dropped what it had."""
    async with mounted() as m:
        assert (await soon(m.fs.opendir(ROOT))).keep_cache
        await m.fs.set_alone(False)
        assert (await soon(m.fs.opendir(ROOT))).keep_cache
        async with held_reply(m, ReadDir, m.list()):
            m.metadata.create(b"new")
            await m.fs.recall([RecallItem(ROOT_INO, RecallKind.NAME, b"new")])
        assert not (await soon(m.fs.opendir(ROOT))).keep_cache
        assert (await soon(m.fs.opendir(ROOT))).keep_cache


# --- sharing --------------------------------------------------------------------------------------


@asynccontextmanager
async def held_reply(m: Mounted, kind: type[Message], asking: Answer[Any]) -> AsyncIterator[None]:
    """While the block runs, the question is answered at the service, and its answer on its way."""
    gate = m.metadata.held_replies[kind] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(soon, asking)
        await trio.testing.wait_all_tasks_blocked()
        yield
        del m.metadata.held_replies[kind]
        gate.set()


async def test_sharing_names_and_attributes_are_kept_under_the_lease() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await m.fs.set_alone(False)
        m.metadata.lease_s = 12.7
        entry = await soon(m.fs.lookup(ROOT, b"f"))
        assert (entry.entry_timeout_s, entry.attr_timeout_s) == (12.0, 12.0)
        assert (await soon(m.fs.lookup(ROOT, b"no"))).entry_timeout_s == 12.0
        for _ in range(2):
            assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == ino
            assert at_once(m.fs.lookup(ROOT, b"no")).nodeid == 0
            assert at_once(m.fs.getattr(ino)).inode.size == 1


async def test_when_the_lease_is_over_nothing_is_believed_until_it_is_known_to_have_gone_on() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        for alone in (True, False):
            if not alone:
                await m.fs.set_alone(False)
            await soon(m.fs.lookup(ROOT, b"f"))
            m.metadata.lease_s = -1.0
            m.fs.woken()
            assert needs_network(m.fs.getattr(ino))
            assert needs_network(m.fs.lookup(ROOT, b"f"))
            entry = await soon(m.fs.lookup(ROOT, b"f"))
            assert (entry.entry_timeout_s, entry.attr_timeout_s) == (0.0, 0.0)
            m.metadata.lease_s = 5.0
            m.fs.woken()
            assert at_once(m.fs.getattr(ino)).attr_timeout_s == 5.0
            assert (await soon(m.fs.lookup(ROOT, b"f"))).entry_timeout_s == 5.0
            assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == ino


async def test_a_change_while_the_lease_was_over_is_not_forgotten_when_it_goes_on() -> None:
    async with mounted() as m:
        await m.make(b"f", b"x")
        await soon(m.fs.lookup(ROOT, b"f"))
        m.metadata.lease_s = -1.0
        m.fs.woken()
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        m.metadata.lease_s = 5.0
        m.fs.woken()
        assert (await soon(m.fs.lookup(ROOT, b"f"))).nodeid == 0


async def test_when_sharing_begins_the_kernel_forgets_all_it_was_told() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        await soon(m.fs.lookup(ROOT, b"no"))
        made = await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))
        await m.make(b"g", parent=made.nodeid)
        await m.fs.set_alone(False)
        ((nodeids, entries),) = m.kernel.everything
        assert {ROOT, ino, made.nodeid} <= set(nodeids)
        names = {KernelName(ROOT, b"f"), KernelName(ROOT, b"no"), KernelName(made.nodeid, b"g")}
        assert set(entries) == names | {KernelName(ROOT, b"d", is_directory=True)}


@pytest.mark.parametrize("read_here", [True, False])
async def test_the_kernel_drops_pages_of_an_open_file_when_others_are_seen_to_have_changed_it(read_here: bool) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"old")
        await m.fs.set_alone(False)
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        if read_here:
            await soon(m.fs.read(opened.fh, 0, 9))
        await soon(m.fs.getattr(ino))
        assert m.kernel.pages == []
        m.metadata.apply(WriteInline(1, 77, ino, 0, b"new", 0))
        await m.fs.recall([RecallItem(ino, RecallKind.ATTRS)])
        await soon(m.fs.getattr(ino))
        assert m.kernel.pages == [(ino, 0, 0)]
        assert bytes(await soon(m.fs.read(opened.fh, 0, 9))) == b"new"
        await soon(m.fs.release(opened.fh))


async def test_pages_are_kept_over_an_open_unless_they_were_read_while_nothing_was_believed() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"one")
        await m.fs.set_alone(False)

        async def is_kept(*, read: bool = False) -> bool:
            opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
            if read:
                await soon(m.fs.read(opened.fh, 0, 9))
            await soon(m.fs.release(opened.fh))
            return opened.keep_cache

        assert await is_kept(read=True)
        m.metadata.lease_s = -1.0
        m.fs.woken()
        assert not await is_kept(read=True)
        m.metadata.lease_s = 5.0
        m.fs.woken()
        assert not await is_kept()
        assert await is_kept()


async def test_alone_again_open_files_are_asked_for_before_anything_is_believed() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"long content")
        await m.fs.set_alone(False)
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        await soon(m.fs.read(opened.fh, 0, 100))
        m.metadata.apply(SetAttr(1, 600, ino=ino, mask=8, size=4))
        await m.fs.set_alone(True)
        assert len(m.kernel.everything) == 2
        assert (await soon(m.fs.getattr(ino))).inode.size == 4
        assert bytes(await soon(m.fs.read(opened.fh, 0, 100))) == b"long"


async def test_alone_again_a_file_that_others_removed_is_gone() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await m.fs.set_alone(False)
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        m.metadata.apply(Unlink(1, 600, ROOT_INO, b"f", closed_ino=ino))
        await m.fs.set_alone(True)
        assert at_once(m.fs.getattr(ino)).inode.nlink == 0
        with pytest.raises(StaleInode):
            await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        await soon(m.fs.release(opened.fh))


# --- unlink and open ------------------------------------------------------------------------------


def last_unlink(m: Mounted) -> Unlink:
    return [request for request in m.metadata.log if isinstance(request, Unlink)][-1]


async def test_a_closed_file_is_removed_at_once() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        assert last_unlink(m).closed_ino == ino
        assert at_once(m.fs.getattr(ino)).inode.nlink == 0
        with pytest.raises(StaleInode):
            await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        m.fs.forget([(ino, 1)])
        assert m.metadata.count(ReleaseInode) == 0


async def test_an_open_file_is_held_until_it_is_closed_and_forgotten() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        assert last_unlink(m).closed_ino == 0
        assert m.fs.statistics().held_inodes == 1
        await soon(m.fs.release(opened.fh))
        await trio.testing.wait_all_tasks_blocked()
        assert m.metadata.count(ReleaseInode) == 0
        m.fs.forget([(ino, 1)])
        await trio.testing.wait_all_tasks_blocked()
        assert m.metadata.count(ReleaseInode) == 1
        assert m.fs.statistics().held_inodes == 0
        with pytest.raises(NoSuchEntry):
            m.metadata.layout(ino)


async def test_a_name_that_is_not_known_is_held_and_released() -> None:
    async with mounted() as m:
        m.metadata.create(b"f")
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        assert last_unlink(m).closed_ino == 0
        await trio.testing.wait_all_tasks_blocked()
        assert m.metadata.count(ReleaseInode) == 1


# --- opens that the service is told of ----------------------------------------------------------


def layouts_asked(m: Mounted) -> list[GetLayout]:
    return [request for request in m.metadata.log if isinstance(request, GetLayout)]


async def test_alone_nothing_is_told_of_opens() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        at_once(m.fs.release(opened.fh))
        assert not [request for request in m.metadata.log if isinstance(request, Create) and request.open]
        await m.fs.close(10)
        assert m.metadata.count(ReleaseInode) == 0


async def test_while_sharing_opens_and_closes_are_told(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        await m.fs.set_alone(False)
        ino = await m.make(b"f", b"x")
        assert [request.open for request in m.metadata.log if isinstance(request, Create)] == [True]
        await trio.sleep(1)
        opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        again = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
        assert [request.open for request in layouts_asked(m)] == [True, True]
        at_once(m.fs.release(opened.fh))
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 1  # Of the create; it is still open.
        at_once(m.fs.release(again.fh))
        await trio.sleep(1)
        assert [request.inos for request in m.metadata.log if isinstance(request, ReleaseInode)] == [(ino,), (ino,)]


async def test_what_was_read_and_closed_is_opened_again_without_asking_until_somebody_changes_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mounted() as m:
        reply = m.metadata.create(b"f")
        await m.fs.set_alone(False)
        ino = (await soon(m.fs.lookup(ROOT, b"f"))).nodeid
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        at_once(m.fs.release(opened.fh))
        await trio.sleep(3600)
        opened = at_once(m.fs.open(ino, os.O_RDONLY, CALLER))
        assert opened.keep_cache
        await soon(m.fs.release(opened.fh))
        assert m.metadata.count(ReleaseInode) == 0
        await m.fs.recall([RecallItem(ino, RecallKind.ATTRS)])
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 1, "it must not keep what others remove, nor them from writing behind"
        assert needs_network(m.fs.open(reply.ino, os.O_RDONLY, CALLER))


async def test_a_file_that_is_opened_again_at_once_is_not_told_closed(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        await m.fs.set_alone(False)
        ino = await m.make(b"f", b"x")
        opened = await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 0
        at_once(m.fs.release(opened.fh))


async def test_an_open_waits_for_the_close_that_is_on_its_way(autojump_clock: trio.testing.MockClock) -> None:
    """Else the service might hear of the open first, and take the file for closed."""
    async with mounted() as m:
        await m.fs.set_alone(False)
        ino = await m.make(b"f", b"x")
        gate = m.metadata.held_replies[ReleaseInode] = trio.Event()
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 1
        async with trio.open_nursery() as nursery:

            async def open_again() -> None:
                opened = await soon(m.fs.open(ino, os.O_RDWR, CALLER))
                at_once(m.fs.release(opened.fh))

            nursery.start_soon(open_again)
            await trio.sleep(1)
            assert layouts_asked(m) == []
            gate.set()
        assert [request.open for request in layouts_asked(m)] == [True]
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 2


async def test_what_is_open_or_held_or_being_created_is_told_when_sharing_begins() -> None:
    async with mounted() as m:
        kept, closed = await m.make(b"kept"), await m.make(b"closed")
        removed = await m.make(b"removed")
        await soon(m.fs.open(kept, os.O_RDONLY, CALLER))
        opened = await soon(m.fs.open(removed, os.O_RDONLY, CALLER))
        await soon(m.fs.unlink(ROOT, b"removed", CALLER))
        at_once(m.fs.release(opened.fh))
        gate = m.metadata.held_replies[Create] = trio.Event()
        async with trio.open_nursery() as nursery:
            created: list[int] = []

            async def create() -> None:
                created.append((await soon(m.fs.create(ROOT, b"new", 0o100644, os.O_RDWR, CALLER)))[1].nodeid)

            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked()
            await m.fs.set_alone(False)
            told: list[int] = []

            async def tell() -> None:
                told.extend(await m.fs.open_inodes())

            nursery.start_soon(tell)
            await trio.testing.wait_all_tasks_blocked()
            assert told == []
            gate.set()
        assert told == sorted([kept, removed, *created])
        assert closed not in told


async def test_an_open_waits_for_the_unlink_under_way() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        gate = m.metadata.held_replies[Unlink] = trio.Event()
        told: list[str] = []

        async def open_it() -> None:
            with pytest.raises(StaleInode):
                await soon(m.fs.open(ino, os.O_RDONLY, CALLER))
            told.append("stale")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(soon, m.fs.unlink(ROOT, b"f", CALLER))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(open_it)
            await trio.testing.wait_all_tasks_blocked()
            assert told == []
            gate.set()
        assert told == ["stale"]


async def test_an_unlink_sees_the_open_under_way() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await m.fs.set_alone(False)
        await soon(m.fs.lookup(ROOT, b"f"))
        gate = trio.Event()
        m.metadata.held_replies[GetLayout] = gate
        async with trio.open_nursery() as nursery:
            nursery.start_soon(soon, m.fs.open(ino, os.O_RDONLY, CALLER))
            await trio.testing.wait_all_tasks_blocked()
            await soon(m.fs.unlink(ROOT, b"f", CALLER))
            gate.set()
        assert last_unlink(m).closed_ino == 0
        assert m.metadata.layout(ino).inode.nlink == 0


async def test_a_replaced_file_is_removed_or_held_as_unlink_does() -> None:
    async with mounted() as m:
        closed, open_one = await m.make(b"closed"), await m.make(b"open")
        await m.make(b"a")
        await m.make(b"b")
        opened = await soon(m.fs.open(open_one, os.O_RDONLY, CALLER))
        await soon(m.fs.rename(ROOT, b"a", ROOT, b"closed", 0, CALLER))
        await soon(m.fs.rename(ROOT, b"b", ROOT, b"open", 0, CALLER))
        with pytest.raises(NoSuchEntry):
            m.metadata.layout(closed)
        assert m.metadata.layout(open_one).inode.nlink == 0
        assert at_once(m.fs.lookup(ROOT, b"a")).nodeid == 0
        assert at_once(m.fs.lookup(ROOT, b"b")).nodeid == 0
        await soon(m.fs.release(opened.fh))


async def test_exchanged_names_are_followed() -> None:
    async with mounted() as m:
        a, b = await m.make(b"a"), await m.make(b"b")
        await soon(m.fs.rename(ROOT, b"a", ROOT, b"b", 2, CALLER))
        assert at_once(m.fs.lookup(ROOT, b"a")).nodeid == b
        assert at_once(m.fs.lookup(ROOT, b"b")).nodeid == a


async def test_another_mount_made_the_name_first() -> None:
    async with mounted() as m:
        await soon(m.fs.lookup(ROOT, b"f"))
        m.metadata.create(b"f")
        with pytest.raises(EntryExists):
            await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_CREAT | os.O_EXCL, CALLER))
        with pytest.raises(StaleInode):
            await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_CREAT, CALLER))
        assert (await soon(m.fs.lookup(ROOT, b"f"))).nodeid > 0


# --- faults ---------------------------------------------------------------------------------------


async def test_after_a_change_of_unknown_outcome_a_directory_is_doubted_and_not_forgotten() -> None:
    """Programs may stand in it."""
    async with mounted() as m:
        await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))
        m.metadata.mutations.after.append(DeadlineExceeded("lost"))
        with pytest.raises(DeadlineExceeded):
            await soon(m.fs.rmdir(ROOT, b"d", CALLER))
        told = [entry for entry in m.kernel.entries if entry.name == b"d"]
        assert told
        assert all(entry.is_directory for entry in told)


async def test_what_took_the_name_of_a_directory_is_not_removed_in_its_place() -> None:
    """The kernel would take the one that it looked up for removed, and let nothing be made in it any more."""
    async with mounted() as m:
        made = await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))
        await soon(m.fs.mkdir(ROOT, b"empty", 0o755, CALLER))
        await m.fs.set_alone(False)
        for name in (b"d", b"empty"):
            await soon(m.fs.lookup(ROOT, name))
        await m.metadata.mutate(lambda session, sequence: Rename(session, sequence, ROOT, b"d", ROOT, b"moved"))
        await m.metadata.mutate(lambda session, sequence: MakeDirectory(session, sequence, ROOT, b"d", 0o40755))
        await m.fs.recall([RecallItem(ROOT_INO, RecallKind.NAME, name) for name in (b"d", b"moved")])
        with pytest.raises(StaleInode):
            await soon(m.fs.rmdir(ROOT, b"d", CALLER))
        with pytest.raises(StaleInode):
            await soon(m.fs.rename(ROOT, b"d", ROOT, b"new", 0, CALLER))
        with pytest.raises(StaleInode):
            await soon(m.fs.rename(ROOT, b"empty", ROOT, b"d", 0, CALLER))
        assert (await soon(m.fs.lookup(ROOT, b"moved"))).nodeid == made.nodeid
        assert (await soon(m.fs.lookup(ROOT, b"d"))).nodeid not in (0, made.nodeid)
        await soon(m.fs.rename(ROOT, b"empty", ROOT, b"d", 0, CALLER))
        await soon(m.fs.rmdir(ROOT, b"d", CALLER))


async def test_after_a_change_of_unknown_outcome_nothing_is_believed() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        m.metadata.mutations.after.append(DeadlineExceeded("lost"))
        with pytest.raises(DeadlineExceeded):
            await soon(m.fs.unlink(ROOT, b"f", CALLER))
        assert KernelName(ROOT, b"f") in m.kernel.entries
        assert ino in m.kernel.attributes
        assert (ROOT, 0, 0) in m.kernel.pages  # The listing that it may keep.
        assert (await soon(m.fs.lookup(ROOT, b"f"))).nodeid == 0
        assert needs_network(m.fs.getattr(ino))


async def test_a_refusal_changes_nothing_that_is_known() -> None:
    async with mounted() as m:
        ino = await m.make(b"f")
        m.metadata.mutations.before.append(EntryExists("no"))
        with pytest.raises(EntryExists):
            await soon(m.fs.link(ino, ROOT, b"f", CALLER))
        assert at_once(m.fs.lookup(ROOT, b"f")).nodeid == ino
        assert m.kernel.entries == []


async def test_each_handle_is_told_of_a_failed_flush_once() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        other = at_once(m.fs.open(entry.nodeid, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100_000))
        with failing(m.world.blocks.puts, NoSpace("full")), pytest.raises(NoSpace):
            await soon(m.fs.flush(opened.fh))
        await soon(m.fs.flush(opened.fh))
        with pytest.raises(NoSpace):
            await soon(m.fs.fsync(other.fh, False))
        await soon(m.fs.fsync(other.fh, False))
        assert m.metadata.layout(entry.nodeid).inode.size == 100_000


async def test_bytes_that_a_failed_close_left_behind_do_not_come_back_after_a_truncation() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100_000))
        with failing(m.world.blocks.puts, NoSpace("full")):
            with pytest.raises(NoSpace):
                await soon(m.fs.flush(opened.fh))
            await soon(m.fs.release(opened.fh))
        changed = await soon(m.fs.setattr(entry.nodeid, Changes(size=10), CALLER))
        assert changed.inode.size == 10
        await m.fs.close(10)
        assert m.metadata.layout(entry.nodeid).inode.size == 10
        assert await m.world.content(entry.nodeid) == b"x" * 10


async def test_a_release_that_failed_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    async with mounted() as m:
        m.metadata.create(b"f")
        await soon(m.fs.unlink(ROOT, b"f", CALLER))
        m.metadata.mutations.before.append(DeadlineExceeded("away"))
        await trio.sleep(1)
        assert m.metadata.count(ReleaseInode) == 0
        await trio.sleep(10)
        assert m.metadata.count(ReleaseInode) == 1


async def test_an_unknown_handle_is_an_error() -> None:
    async with mounted() as m:
        with pytest.raises(StoreError) as raised:
            await soon(m.fs.read(99, 0, 1))
        assert raised.value.errno == errno.EIO


# --- attributes -----------------------------------------------------------------------------------


async def test_the_empty_setattr_takes_privileges_away() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await soon(m.fs.setattr(ino, Changes(mode=0o6755), CALLER))
        entry = await soon(m.fs.setattr(ino, Changes(), CALLER))
        assert stat.S_IMODE(entry.inode.mode) == 0o755
        assert stat.S_IMODE(m.metadata.layout(ino).inode.mode) == 0o755


@pytest.mark.parametrize("alone", [True, False])
async def test_a_write_without_the_right_to_keep_privileges_takes_them_away(alone: bool) -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"x")
        await soon(m.fs.setattr(ino, Changes(mode=0o6755), CALLER))
        if not alone:
            await m.fs.set_alone(False)
        opened = await soon(m.fs.open(ino, os.O_WRONLY, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"y"))
        await soon(m.fs.flush(opened.fh))
        assert stat.S_IMODE(m.metadata.layout(ino).inode.mode) == 0o6755
        await soon(m.fs.write(opened.fh, 0, b"z", kill_privileges=True))
        await soon(m.fs.flush(opened.fh))
        assert stat.S_IMODE(m.metadata.layout(ino).inode.mode) == 0o755
        assert m.kernel.attributes == [ino]
        await soon(m.fs.release(opened.fh))


@pytest.mark.parametrize(("kill_privileges", "mode"), [(True, 0o755), (False, 0o6755)])
async def test_truncations_take_privileges_away_when_told_to(kill_privileges: bool, mode: int) -> None:
    async with mounted() as m:
        for name in (b"by open", b"by setattr"):
            ino = await m.make(name, b"x")
            await soon(m.fs.setattr(ino, Changes(mode=0o6755), CALLER))
            if name == b"by open":
                flags = os.O_WRONLY | os.O_TRUNC
                opened = await soon(m.fs.open(ino, flags, CALLER, kill_privileges=kill_privileges))
                await soon(m.fs.release(opened.fh))
            else:
                await soon(m.fs.setattr(ino, Changes(size=0, kill_privileges=kill_privileges), CALLER))
            assert stat.S_IMODE(m.metadata.layout(ino).inode.mode) == mode


async def test_pages_written_back_through_an_appending_handle_stay_where_they_are() -> None:
    async with mounted() as m:
        ino = await m.make(b"f", b"12")
        opened = await soon(m.fs.open(ino, os.O_RDWR | os.O_APPEND, CALLER))
        await soon(m.fs.write(opened.fh, 4, b"56", from_pages=True))
        await soon(m.fs.write(opened.fh, 99, b"7"))
        assert bytes(await soon(m.fs.read(opened.fh, 0, 100))) == b"12\0\x0056" + b"7"
        await soon(m.fs.release(opened.fh))


async def test_a_time_set_on_an_open_file_outlives_the_flush() -> None:
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"f", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"x" * 100))
        await soon(m.fs.setattr(entry.nodeid, Changes(mtime_ns=5), CALLER))
        await soon(m.fs.flush(opened.fh))
        await soon(m.fs.release(opened.fh))
        assert m.metadata.layout(entry.nodeid).inode.mtime_ns == 5


# --- bounds ---------------------------------------------------------------------------------------


async def test_nodes_are_bounded_and_open_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsd.nodes, "NODE_COUNT_MAX", 40)
    async with mounted() as m:
        opened, entry = await soon(m.fs.create(ROOT, b"open", 0o100644, os.O_RDWR, CALLER))
        await soon(m.fs.write(opened.fh, 0, b"bytes"))
        for number in range(200):
            await m.make(b"f%d" % number)
        assert m.fs.statistics().nodes <= 41
        assert at_once(m.fs.getattr(entry.nodeid)).inode.size == 5
        for number in range(200):
            assert (await soon(m.fs.lookup(ROOT, b"f%d" % number))).nodeid


async def test_names_are_bounded_and_the_kernel_is_told_of_those_that_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsd.nodes, "NAME_COUNT_MAX", 100)
    async with mounted() as m:
        told = set()
        for directory in range(10):
            made = await soon(m.fs.mkdir(ROOT, b"d%d" % directory, 0o755, CALLER))
            for number in range(20):
                entry = await soon(m.fs.lookup(made.nodeid, b"no%d" % number))
                if entry.entry_timeout_s:
                    told.add(KernelName(made.nodeid, b"no%d" % number))
                await m.make(b"f%d" % number, parent=made.nodeid)
                told.add(KernelName(made.nodeid, b"f%d" % number))
            told.add(KernelName(ROOT, b"d%d" % directory, is_directory=True))
        assert m.fs.statistics().names <= 101
        await m.fs.set_alone(False)
        ((_, entries),) = m.kernel.everything
        made_names = {entry for entry in told if entry.name.startswith((b"f", b"d"))}
        assert made_names <= set(entries) | set(m.kernel.entries)


# --- listings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 7, 300])
async def test_a_listing_in_small_replies_has_every_name_once(room: int) -> None:
    async with mounted() as m:
        names = [b"n%d" % number for number in range(300)]
        for name in names:
            m.metadata.create(name)
        assert sorted(await m.list(room=room)) == sorted([b".", b"..", *names])
        assert m.metadata.count(ReadDir) <= 3


async def test_entries_of_one_cookie_are_not_lost_between_two_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mounted() as m:
        for number in range(30):
            m.metadata.create(b"n%d" % number)
        ask = m.metadata.ask
        everything = (await ask(lambda session: ReadDir(session, ROOT_INO, after=0, count=4096, plus=True))).entries
        listed = [replace(entry, cookie=100 + index // 5) for index, entry in enumerate(everything)]

        async def with_equal_cookies(make: Callable[[int], Any]) -> object:
            request = make(1)
            if not isinstance(request, ReadDir):
                return await ask(make)
            return ReadDirDone(tuple(entry for entry in listed if entry.cookie > request.after), True)

        monkeypatch.setattr(m.metadata, "ask", with_equal_cookies)
        for room in (2, 3, 7):
            names = await m.list(room=room)
            assert len(names) == len(set(names)) == 32


async def test_look_ups_of_a_listing_are_counted_and_given_back() -> None:
    async with mounted() as m:
        inos = [m.metadata.create(b"n%d" % number).ino for number in range(10)]
        await m.list()
        await m.list()
        assert m.fs.statistics().kernel_inodes == 10
        m.fs.forget([(ino, 1) for ino in inos])
        assert m.fs.statistics().kernel_inodes == 10
        m.fs.forget([(ino, 1) for ino in inos])
        assert m.fs.statistics().kernel_inodes == 0


async def test_creating_asks_exactly_once() -> None:
    async with mounted() as m:
        made = await soon(m.fs.mkdir(ROOT, b"d", 0o755, CALLER))
        m.metadata.log.clear()
        at_once(m.fs.lookup(made.nodeid, b"f"))
        await m.make(b"f", parent=made.nodeid)
        at_once(m.fs.getattr(made.nodeid))
        assert [type(request) for request in m.metadata.log] == [Create]
