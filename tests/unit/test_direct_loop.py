"""The device loop, on a socket that keeps messages apart in the place of /dev/fuse: nothing ends the mount."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import fsd.frontend.direct.loop
from fsd.frontend.direct import dispatch
from fsd.frontend.direct.dispatch import Interruptible, Row
from fsd.frontend.direct.loop import DeviceLoop, End, is_being_killed
from fsd.frontend.direct.protocol import Opcode
from fsd.frontend.direct.requests import CREATE_IN, FLUSH_IN, FORGET_IN, INTERRUPT_IN, OPEN_IN, READ_IN, WRITE_IN
from fsd.frontend.ports import Entry, Opened, Operations
from metadata.core.schema import Inode
from tests.support.noting_operations import NotingOperations
from wire.errors import NoSuchEntry

INODE = Inode(mode=0o100644, nlink=1, uid=0, gid=0, size=0, atime_ns=0, mtime_ns=0, ctime_ns=0, btime_ns=0)


def message(opcode: int, body: bytes = b"", *, unique: int = 2, pid: int = 0, size: int | None = None) -> bytes:
    """A request, its length field right unless `size` says otherwise."""
    return struct.pack("=IIQQIIIHH", size or 40 + len(body), opcode, unique, 9, 0, 0, pid, 0, 0) + body


class Kernel:
    """The other end of the device."""

    def __init__(self, ours: socket.socket, loop: DeviceLoop) -> None:
        self._socket = ours
        self.loop = loop

    async def send(self, data: bytes) -> None:
        self._socket.send(data)
        await trio.testing.wait_all_tasks_blocked(0.001)

    async def reply(self) -> tuple[int, int, bytes]:
        """(unique, errno, body) of the next reply."""
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self._socket)
        data = self._socket.recv(1 << 20)
        size, error, unique = struct.unpack_from("=IiQ", data)
        assert size == len(data)
        return unique, -error, data[16:]

    async def ask(self, data: bytes) -> tuple[int, int, bytes]:
        await self.send(data)
        return await self.reply()

    def has_replied(self) -> bool:
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True

    def vanish(self) -> None:
        """No reply is taken any more."""
        self._socket.close()


@asynccontextmanager
async def serving(operations: object) -> AsyncIterator[Kernel]:
    if isinstance(operations, SimpleNamespace):
        operations.woken = lambda: None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        loop = DeviceLoop(theirs.fileno(), extended_setxattr=True)
        async with trio.open_nursery() as nursery:
            ends: list[End] = []

            async def serve() -> None:
                ends.append(await loop.serve(cast(Operations, operations)))

            nursery.start_soon(serve)
            await trio.testing.wait_all_tasks_blocked()
            yield Kernel(ours, loop)
            loop.stop()
        assert ends == [End.STOPPED]


def later(answer: object, gate: trio.Event) -> Callable[..., object]:
    """An operation that answers when the gate opens."""

    async def operation(*arguments: object, **more: object) -> object:
        await gate.wait()
        return answer

    return operation


def raises(error: Exception) -> Callable[..., None]:
    def operation(*arguments: object) -> None:
        raise error

    return operation


# --- answers ------------------------------------------------------------------------------------------------------


async def test_answers_that_are_there_and_those_that_come_are_replied_alike() -> None:
    gate = trio.Event()
    gate.set()
    for operation in (lambda *arguments: b"target", later(b"target", gate)):
        async with serving(SimpleNamespace(readlink=operation)) as kernel:
            assert await kernel.ask(message(Opcode.READLINK, unique=6)) == (6, 0, b"target")


async def test_a_request_that_waits_does_not_hold_up_others() -> None:
    gate = trio.Event()
    operations = SimpleNamespace(readlink=later(b"late", gate), flush=lambda fh, owner: None)
    async with serving(operations) as kernel:
        await kernel.send(message(Opcode.READLINK, unique=6))
        assert await kernel.ask(message(Opcode.FLUSH, FLUSH_IN.pack(5, 0), unique=8)) == (8, 0, b"")
        gate.set()
        assert await kernel.reply() == (6, 0, b"late")


async def test_a_writes_bytes_are_those_that_were_sent_however_many() -> None:
    taken: list[bytes] = []

    def write(fh: int, offset: int, data: bytes, **more: object) -> int:
        taken.append(bytes(data))
        return len(data)

    async with serving(SimpleNamespace(write=write)) as kernel:
        contents = [os.urandom(size) for size in (0, 1, 4096, 100_000, 1)]
        for content in contents:
            request = message(Opcode.WRITE, WRITE_IN.pack(5, 0, len(content), 0, 0, 0) + content)
            assert (await kernel.ask(request))[1:] == (0, struct.pack("=II", len(content), 0))
        assert taken == contents


async def test_a_name_of_any_length_arrives_whole() -> None:
    noting = NotingOperations()
    async with serving(noting) as kernel:
        for length in (1, 39, 40, 41, 255):
            await kernel.ask(message(Opcode.UNLINK, b"n" * length + b"\0"))
    assert [arguments[1] for _, arguments, _ in noting.calls] == [b"n" * length for length in (1, 39, 40, 41, 255)]


async def test_a_forget_has_no_reply() -> None:
    noting = NotingOperations()
    async with serving(noting) as kernel:
        await kernel.send(message(Opcode.FORGET, FORGET_IN.pack(3)))
        assert not kernel.has_replied()
    assert noting.calls == [("forget", (((9, 3),),), {})]


# --- what goes wrong ----------------------------------------------------------------------------------------------


async def test_a_refusal_is_its_errno_at_once_and_later() -> None:
    async def refuse(*arguments: object) -> None:
        raise NoSuchEntry("gone")

    for operation in (raises(NoSuchEntry("gone")), refuse):
        async with serving(SimpleNamespace(getattr=operation)) as kernel:
            assert await kernel.ask(message(Opcode.GETATTR, bytes(16))) == (2, errno.ENOENT, b"")


async def test_a_bug_is_eio_and_a_line_in_the_log_and_the_mount_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*arguments: object) -> None:
        raise ZeroDivisionError("oops")

    for operation in (raises(ZeroDivisionError("oops")), fail, lambda nodeid: "no entry"):
        caplog.clear()
        async with serving(SimpleNamespace(getattr=operation, readlink=lambda nodeid: b"x")) as kernel:
            with caplog.at_level(logging.ERROR):
                assert await kernel.ask(message(Opcode.GETATTR, bytes(16))) == (2, errno.EIO, b"")
            assert len(caplog.records) == 1
            assert await kernel.ask(message(Opcode.READLINK)) == (2, 0, b"x")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (message(99), errno.ENOSYS),
        (message(1 << 31), errno.ENOSYS),
        (message(7), errno.ENOSYS),
        (message(Opcode.INIT, bytes(64)), errno.ENOSYS),
        (message(Opcode.LOOKUP, b"no end"), errno.EINVAL),
        (message(Opcode.READ, b"short"), errno.EINVAL),
        (message(Opcode.GETATTR, bytes(16), size=41), errno.EINVAL),
        (message(Opcode.WRITE, WRITE_IN.pack(5, 0, 9, 0, 0, 0) + b"four"), errno.EINVAL),
    ],
)
async def test_what_cannot_be_understood_gets_an_errno_and_a_line(
    data: bytes, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(NotingOperations()) as kernel:
        with caplog.at_level(logging.WARNING):
            assert await kernel.ask(data) == (2, code, b"")
    assert len(caplog.records) == 1


async def test_complaints_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(NotingOperations()) as kernel:
        with caplog.at_level(logging.WARNING):
            for _ in range(3 * fsd.frontend.direct.loop.COMPLAINTS_MAX):
                await kernel.ask(message(99))
    assert len(caplog.records) == fsd.frontend.direct.loop.COMPLAINTS_MAX


headers = st.tuples(st.one_of(st.sampled_from(sorted(Opcode)), st.integers(0, (1 << 32) - 1)), st.booleans())
ANY_MESSAGE = st.builds(
    lambda header, body, size: message(header[0], body, size=None if header[1] else size),
    headers,
    st.binary(max_size=200),
    st.integers(1, (1 << 32) - 1),
)
WITHOUT_REPLY = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}


async def send_all(messages: list[bytes]) -> None:
    """Each message gets one reply, unless it is of a kind that has none; then the loop still answers."""
    async with serving(NotingOperations()) as kernel:
        for data in [*messages, message(Opcode.FLUSH, FLUSH_IN.pack(5, 0))]:
            await kernel.send(data)
            if struct.unpack_from("=I", data, 4)[0] not in WITHOUT_REPLY:
                assert (await kernel.reply())[0] == 2
            assert not kernel.has_replied()


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_MESSAGE, min_size=1, max_size=30))
def test_no_message_ends_the_mount(messages: list[bytes]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        trio.run(send_all, messages)
    finally:
        logging.disable(logging.NOTSET)


def test_the_net_catches_a_loop_that_lets_a_failure_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a malformed request is not turned into an errno."""

    def let_through(self: DeviceLoop, request: object, error: Exception) -> None:
        raise error

    monkeypatch.setattr(DeviceLoop, "_failed", let_through)
    with pytest.raises(BaseExceptionGroup):
        trio.run(send_all, [message(Opcode.LOOKUP, b"no end")])


# --- replies that are not taken -----------------------------------------------------------------------------------


class Counting:
    """Operations that count what the kernel must give back."""

    def __init__(self, gate: trio.Event) -> None:
        self.lookups = 0
        self.handles = 0
        self._gate = gate

    def _entry(self) -> Entry:
        self.lookups += 1
        return Entry(10, INODE, 1.0, 1.0)

    def _handle(self) -> Opened:
        self.handles += 1
        return Opened(5, False)

    def woken(self) -> None:
        """Nothing is believed here."""

    async def lookup(self, parent: int, name: bytes) -> Entry:
        await self._gate.wait()
        return self._entry()

    async def create(self, *arguments: object) -> tuple[Opened, Entry]:
        await self._gate.wait()
        return self._handle(), self._entry()

    async def open(self, *arguments: object, **more: object) -> Opened:
        await self._gate.wait()
        return self._handle()

    async def opendir(self, nodeid: int) -> Opened:
        await self._gate.wait()
        return self._handle()

    async def readdir(self, fh: int, cookie: int, plus: bool, add: Callable[[bytes, Entry, int], bool]) -> None:
        await self._gate.wait()
        for number in range(3):
            assert add(b"n", self._entry(), number + 1)

    def forget(self, forgotten: list[tuple[int, int]]) -> None:
        self.lookups -= sum(count for _, count in forgotten)

    async def release(self, fh: int) -> None:
        await trio.lowlevel.checkpoint()
        self.handles -= 1

    def releasedir(self, fh: int) -> None:
        self.handles -= 1


UNTAKEN = {
    Opcode.LOOKUP: b"n\0",
    Opcode.CREATE: CREATE_IN.pack(0, 0, 0, 0) + b"n\0",
    Opcode.OPEN: OPEN_IN.pack(0, 0),
    Opcode.OPENDIR: OPEN_IN.pack(0, 0),
    Opcode.READDIRPLUS: READ_IN.pack(5, 0, 4096, 0, 0, 0),
}


async def vanish_before_the_reply(opcode: Opcode) -> tuple[int, int]:
    """Look-ups and handles that are left when the kernel has not taken the reply."""
    gate = trio.Event()
    operations = Counting(gate)
    logging.disable(logging.CRITICAL)
    try:
        async with serving(operations) as kernel:
            await kernel.send(message(opcode, UNTAKEN[opcode]))
            kernel.vanish()
            gate.set()
            kernel.loop.stop()
    finally:
        logging.disable(logging.NOTSET)
    return operations.lookups, operations.handles


@pytest.mark.parametrize("opcode", UNTAKEN)
async def test_what_a_reply_counted_that_was_not_taken_is_given_back(opcode: Opcode) -> None:
    assert await vanish_before_the_reply(opcode) == (0, 0)


async def test_the_net_catches_a_look_up_that_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: look-ups stay counted."""
    row = dispatch.TABLE[Opcode.LOOKUP]
    monkeypatch.setitem(dispatch.TABLE, Opcode.LOOKUP, Row(row.call, row.reply))
    assert await vanish_before_the_reply(Opcode.LOOKUP) == (1, 0)


# --- interrupts and bounds ----------------------------------------------------------------------------------------


def with_rows(monkeypatch: pytest.MonkeyPatch, **rows: Row) -> None:
    for name, row in rows.items():
        monkeypatch.setitem(dispatch.TABLE, Opcode[name], row)


def readlink_row(interruptible: Interruptible, *, is_bounded: bool = True) -> Row:
    row = dispatch.TABLE[Opcode.READLINK]
    return Row(row.call, row.reply, interruptible=interruptible, is_bounded=is_bounded)


@pytest.mark.parametrize(
    ("interruptible", "ends"),
    [(Interruptible.SIGNALLED, True), (Interruptible.KILLED, False), (Interruptible.NEVER, False)],
)
async def test_an_interrupt_ends_what_a_signal_may_end(
    interruptible: Interruptible, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rows(monkeypatch, READLINK=readlink_row(interruptible))
    gate = trio.Event()
    async with serving(SimpleNamespace(readlink=later(b"late", gate))) as kernel:
        await kernel.send(message(Opcode.READLINK, unique=6, pid=os.getpid()))
        await kernel.send(message(Opcode.INTERRUPT, INTERRUPT_IN.pack(6), unique=7))
        gate.set()
        assert await kernel.reply() == ((6, errno.EINTR, b"") if ends else (6, 0, b"late"))
        assert not kernel.has_replied()


async def test_an_interrupt_of_what_was_answered_does_nothing() -> None:
    async with serving(SimpleNamespace(readlink=lambda nodeid: b"x")) as kernel:
        await kernel.ask(message(Opcode.READLINK, unique=6))
        await kernel.send(message(Opcode.INTERRUPT, INTERRUPT_IN.pack(6), unique=7))
        assert not kernel.has_replied()


def test_a_thread_that_is_being_killed_is_known() -> None:
    assert not is_being_killed(os.getpid())
    assert not is_being_killed(0)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        assert not is_being_killed(child.pid)
        child.send_signal(signal.SIGSTOP)
        assert not is_being_killed(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not is_being_killed(child.pid)


async def test_at_the_bound_nothing_is_read_until_a_task_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsd.frontend.direct.loop, "TASKS_MAX", 3)
    gate = trio.Event()
    operations = SimpleNamespace(readlink=later(b"late", gate), flush=lambda fh, owner: None)
    async with serving(operations) as kernel:
        for number in range(3):
            await kernel.send(message(Opcode.READLINK, unique=2 * number))
        await kernel.send(message(Opcode.FLUSH, FLUSH_IN.pack(5, 0), unique=100))
        assert not kernel.has_replied()
        gate.set()
        assert {(await kernel.reply())[0] for _ in range(4)} == {0, 2, 4, 100}


async def test_waits_without_an_end_of_their_own_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten locks are waited for where three tasks are allowed; what lets them go is still read."""
    monkeypatch.setattr(fsd.frontend.direct.loop, "TASKS_MAX", 3)
    with_rows(monkeypatch, READLINK=readlink_row(Interruptible.SIGNALLED, is_bounded=False))
    gate = trio.Event()

    def unlock(fh: int, owner: int) -> None:
        gate.set()

    async with serving(SimpleNamespace(readlink=later(b"locked", gate), flush=unlock)) as kernel:
        for number in range(10):
            await kernel.send(message(Opcode.READLINK, unique=2 * number))
        await kernel.send(message(Opcode.FLUSH, FLUSH_IN.pack(5, 0), unique=100))
        assert len({(await kernel.reply())[0] for _ in range(11)}) == 11


async def test_when_it_ends_what_is_under_way_is_finished_and_what_waits_for_a_lock_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = dispatch.TABLE[Opcode.GETATTR]
    with_rows(monkeypatch, GETATTR=Row(row.call, row.reply, interruptible=Interruptible.SIGNALLED, is_bounded=False))
    gate = trio.Event()
    operations = SimpleNamespace(readlink=later(b"late", gate), getattr=later(None, trio.Event()))
    async with serving(operations) as kernel:
        await kernel.send(message(Opcode.READLINK, unique=6))
        await kernel.send(message(Opcode.GETATTR, bytes(16), unique=8))
        kernel.loop.stop()
        assert await kernel.reply() == (8, errno.EINTR, b"")
        gate.set()
        assert await kernel.reply() == (6, 0, b"late")
