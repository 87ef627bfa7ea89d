"""The device loop: takes requests from /dev/fuse, answers what memory can, and starts tasks for the rest.

Tasks: the one that runs `serve` reads the device and never waits for anything but it (and for the bound of tasks);
for each answer that needs the network, one task in its nursery.

The wait for the device is the loop's own where trio has had nothing else to do for a while (idle.py): then a request
costs no turn of trio's loop.  DRAIN_COUNT requests at most are taken before tasks that can run get their turn.

An answer that is there is written before the next request is read; a task writes its own.  Between an answer and the
write of its reply there is no await, so the validity times in it are true.  A reply that the kernel does not take (the
request was aborted) is taken back: look-ups are un-counted, handles released.

The bound: at most TASKS_MAX tasks whose end does not depend on other programs.  At the bound the device is not read
until one of them has ended.  They end without help of the kernel, as the services' deadlines bound each of them, so
no request that waits unread in the device can be what they wait for.  Waits for locks may last for ever and do not
count: the unlock, the FORGET or the INTERRUPT that ends them is always read.

INTERRUPT: the kernel queues one only after the request itself was read, and this is the only reader, so a request that
is not found has been answered; nothing is remembered (EAGAIN, of which fuse.rst speaks, is for several readers).

Exceptions: a StoreError is its errno; a malformed request EINVAL; anything else EIO and a line in the log.  None ends
the mount.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Final, NoReturn

import trio

from fsd.frontend.direct import dispatch, replies
from fsd.frontend.direct.dispatch import Interruptible, Reply, Request, Row
from fsd.frontend.direct.idle import Idle, attach
from fsd.frontend.direct.protocol import WRITE_SIZE_MAX, Opcode
from fsd.frontend.direct.requests import HEADER_SIZE, IN_HEADER, INTERRUPT_IN, WRITE_IN, Malformed
from fsd.frontend.ports import Operations
from wire.errors import StoreError
from wire.log import get_logger

DRAIN_COUNT: Final = 64
"""Requests taken in a row before other tasks get their turn: about 200 us."""
CROWD: Final = 3
"""Requests found at once from which on more are looked for."""
QUIET: Final = 4
"""Wake-ups in a row that started no task, after which the loop waits for the device by itself."""
PROBE: Final = 16
"""Requests that come one by one, after which it is looked whether more wait."""
TASKS_MAX: Final = 1024
"""Requests under way that count; the kernel's own bounds (64 in the background, one per calling thread) are lower."""
FINISH_TIMEOUT_S: Final = 30.0
"""For requests under way when the mount ends; the services' own deadlines are about as long."""
COMPLAINTS_MAX: Final = 20
"""Lines in the log within COMPLAINT_WINDOW_S about requests that cannot be understood or carried out."""
COMPLAINT_WINDOW_S: Final = 10.0

_HEAD_SIZE: Final = HEADER_SIZE + WRITE_IN.size
_unpack_header: Final = IN_HEADER.unpack_from
_WRITE: Final = int(Opcode.WRITE)
_FORGET: Final = int(Opcode.FORGET)
_BATCH_FORGET: Final = int(Opcode.BATCH_FORGET)
_INTERRUPT: Final = int(Opcode.INTERRUPT)
_WITHOUT_REPLY: Final = frozenset({_FORGET, _BATCH_FORGET, _INTERRUPT})
_NOT_TAKEN: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ECONNABORTED})
"""From a write of a reply: nobody waits for it any more."""

log = get_logger("fsd.frontend")


class End(enum.Enum):
    """Why `serve` returned."""

    UNMOUNTED = "unmounted"
    ABORTED = "aborted"  # Through /sys/fs/fuse/connections; the mount is still in the table.
    STOPPED = "stopped"  # By `stop`.


class DeviceLoop:
    """Serves one mount."""

    def __init__(self, device: int, *, extended_setxattr: bool) -> None:
        """`device`: a descriptor of /dev/fuse that does not block, INIT answered."""
        self._device = device
        self._rows = dispatch.rows(extended_setxattr=extended_setxattr)
        # A WRITE's bytes begin where its head ends, and so lie at the beginning of a buffer of their own.
        self._head = bytearray(_HEAD_SIZE)
        self._rest = bytearray(WRITE_SIZE_MAX)
        self._body = memoryview(self._head)[HEADER_SIZE:]
        self._content = memoryview(self._rest)
        self._buffers = (self._head, self._rest)
        self._under_way: dict[int, trio.CancelScope] = {}  # By unique: those that an INTERRUPT may end,
        self._callers: dict[int, tuple[Interruptible, int]] = {}  # how, and who waits for them.
        self._task_count = 0  # Of those that count.
        self._task_ended = trio.Event()
        self._stopping = trio.CancelScope()
        self._complaints = 0
        self._complaints_until = 0.0
        self.request_count = 0
        self.started_count = 0
        self.untaken_count = 0

    def stop(self) -> None:
        """Make `serve` return; what is under way is finished first."""
        self._stopping.cancel()

    async def serve(self, operations: Operations) -> End:
        """Answer requests until the file system is unmounted, aborted, or `stop` is called."""
        self._operations = operations
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            end = End.STOPPED
            with self._stopping:
                end = await self._take_requests()
            for unique, (interruptible, _) in list(self._callers.items()):
                if interruptible is Interruptible.SIGNALLED:
                    self._under_way[unique].cancel()
            nursery.cancel_scope.deadline = trio.current_time() + FINISH_TIMEOUT_S
        return end

    # --- requests -----------------------------------------------------------------------------------------------

    async def _take_requests(self) -> End:
        idle = attach(self._device)
        try:
            await self._take_in_turns(idle)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return End.UNMOUNTED
            if error.errno == errno.ECONNABORTED:
                return End.ABORTED
            raise
        finally:
            if idle is not None:
                idle.detach()

    async def _take_in_turns(self, idle: Idle | None) -> NoReturn:
        """Take all that is there for each wake-up; when QUIET wake-ups have started no task, wait without trio.

        While tasks come and go, turns of trio's loop are needed anyway, and looking for the moment when no other task
        is due would cost more of them.
        """
        quiet = 0
        while True:
            await trio.lowlevel.wait_readable(self._device)
            self._operations.woken()
            started, count = self.started_count, 0
            while self._take_one():
                count += 1
                if count % DRAIN_COUNT == 0 or self._task_count >= TASKS_MAX:
                    await trio.lowlevel.checkpoint()
                    await self._keep_bound()
                    self._operations.woken()
            quiet = quiet + 1 if self.started_count == started else 0
            if idle is not None and quiet >= QUIET:
                quiet = 0
                if await idle.turn():
                    self._take_while_idle(idle)

    def _take_while_idle(self, idle: Idle) -> None:
        """Take requests until a task can run; no other was due when this began.

        A read that finds nothing costs more than a wait that finds something: while requests come one by one no such
        read is made, but after each PROBE requests, to learn whether they still do.
        """
        count, is_crowded, must_give_way = 0, False, False
        while not must_give_way:
            is_requested, must_give_way = idle.wait()
            if is_requested:
                self._operations.woken()
            before = count
            while is_requested and self._take_one():
                count += 1
                if count % DRAIN_COUNT == 0 or self._task_count >= TASKS_MAX:
                    break
                if not (is_crowded or idle.must_give_way or count % PROBE == 0):
                    break
            is_crowded = count - before >= CROWD
            must_give_way = must_give_way or idle.must_give_way or self._task_count >= TASKS_MAX

    async def _keep_bound(self) -> None:
        while self._task_count >= TASKS_MAX:
            self._task_ended = trio.Event()
            await self._task_ended.wait()

    def _take_one(self) -> bool:
        """Take a request from the device and deal with it; False when none waits."""
        while True:
            try:
                size = os.readv(self._device, self._buffers)
            except BlockingIOError:
                return False
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.ENOENT:  # The request was withdrawn while it was being read.
                    continue
                raise
            self._take(size)
            return True

    def _take(self, size: int) -> None:
        """Deal with the request of `size` bytes in the buffers; whatever it is, the mount goes on.

        What this costs, every answer from memory costs: no part of it is a function of its own that need not be.
        """
        self.request_count += 1
        request = _unpack_header(self._head)
        opcode = request[1]
        try:
            if request[0] != size:
                raise Malformed(f"{size} bytes of {request[0]}")
            body = self._body[: size - HEADER_SIZE].tobytes()
            row = self._rows.get(opcode)
            if opcode == _WRITE and row is not None:
                content = self._content[: max(size - _HEAD_SIZE, 0)].tobytes()
                answer = dispatch.write(self._operations, request, body, content)
            else:
                if size > _HEAD_SIZE:
                    body += self._content[: size - _HEAD_SIZE]
                if row is None:
                    self._take_special(request, body)
                    return
                answer = row.call(self._operations, request, body)
            if type(answer) is CoroutineType:
                self._start(row, request, answer)
            else:
                self._reply(row, request, answer)
        except StoreError as error:
            self._write(replies.error(request[2], error.errno))
        except Exception as error:
            self._failed(request, error)

    def _take_special(self, request: Request, body: bytes) -> None:
        """What no operation answers."""
        opcode = request[1]
        if opcode in (_FORGET, _BATCH_FORGET):
            dispatch.forget(self._operations, request, body)
        elif opcode == _INTERRUPT:
            self._interrupt(*INTERRUPT_IN.unpack_from(body))
        else:
            self._complain("request_unknown", opcode=opcode, size=request[0])
            self._write(replies.error(request[2], errno.ENOSYS))

    def _failed(self, request: Request, error: Exception) -> None:
        """A request could not be understood, or its handler has a bug."""
        opcode = request[1]
        if isinstance(error, Malformed | struct.error):
            code = errno.EINVAL
            self._complain("request_malformed", opcode=opcode, size=request[0], error=error)
        else:
            code = errno.EIO
            self._complain("handler_failed", log.exception, opcode=opcode)
        if opcode not in _WITHOUT_REPLY:
            self._write(replies.error(request[2], code))

    def _complain(self, event: str, write: Callable[..., None] = log.warning, **fields: object) -> None:
        """Log it, but not more than COMPLAINTS_MAX times within the window."""
        now = trio.current_time()
        if now >= self._complaints_until:
            self._complaints = 0
            self._complaints_until = now + COMPLAINT_WINDOW_S
        self._complaints += 1
        if self._complaints <= COMPLAINTS_MAX:
            write(event, **fields)

    # --- tasks --------------------------------------------------------------------------------------------------

    def _start(self, row: Row, request: Request, answer: Coroutine[Any, Any, Any]) -> None:
        self.started_count += 1
        if row.is_bounded:
            self._task_count += 1
        finish = self._finish if row.interruptible is Interruptible.NEVER else self._finish_or_interrupt
        self._nursery.start_soon(finish, row, request, answer)

    async def _finish(self, row: Row, request: Request, answer: Coroutine[Any, Any, Any]) -> None:
        """Wait for the answer and reply."""
        try:
            self._reply(row, request, await answer)
        except StoreError as error:
            self._write(replies.error(request[2], error.errno))
        except Exception as error:
            self._failed(request, error)
        finally:
            if row.is_bounded:
                self._task_count -= 1
                self._task_ended.set()

    async def _finish_or_interrupt(self, row: Row, request: Request, answer: Coroutine[Any, Any, Any]) -> None:
        """As `_finish`; an INTERRUPT may end it with EINTR."""
        unique = request[2]
        with trio.CancelScope() as scope:
            self._under_way[unique] = scope
            self._callers[unique] = row.interruptible, request[6]
            try:
                await self._finish(row, request, answer)
            finally:
                del self._under_way[unique], self._callers[unique]
        if scope.cancelled_caught:
            self._write(replies.error(unique, errno.EINTR))

    def _interrupt(self, unique: int) -> None:
        """A signal has reached whoever waits for this request."""
        found = self._callers.get(unique)
        if found is None:
            return
        interruptible, thread = found
        if interruptible is Interruptible.SIGNALLED or is_being_killed(thread):
            self._under_way[unique].cancel()

    async def _undo(self, rest: Coroutine[Any, Any, None]) -> None:
        try:
            await rest
        except StoreError as error:
            log.warning("release_of_untaken_handle_failed", error=error)

    # --- replies ------------------------------------------------------------------------------------------------

    def _reply(self, row: Row, request: Request, answer: object) -> None:
        try:
            reply = row.reply(request[2], answer)
        except Exception:  # An answer that cannot be told is a bug of who gave it.
            self._complain("reply_failed", log.exception, opcode=request[1])
            self._untake(row, answer)
            self._write(replies.error(request[2], errno.EIO))
            return
        if not self._write(reply):
            self._untake(row, answer)

    def _untake(self, row: Row, answer: object) -> None:
        """The kernel does not have this answer."""
        self.untaken_count += 1
        if row.untake is not None:
            rest = row.untake(self._operations, answer)
            if rest is not None:
                self._nursery.start_soon(self._undo, rest)

    def _write(self, reply: Reply) -> bool:
        """Whether the kernel has taken the reply."""
        try:
            if isinstance(reply, bytes):
                os.write(self._device, reply)
            else:
                os.writev(self._device, reply)
        except OSError as error:
            if error.errno not in _NOT_TAKEN:
                self._complain("reply_refused", error=error)
            return False
        return True


def is_being_killed(thread: int) -> bool:
    """Whether a thread of this machine has SIGKILL pending: it will not see the answer to anything.

    A signal that ends a process is that, for each of its threads.  One in another PID namespace has the number 0: then
    nobody knows.
    """
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            status = file.read()
    except OSError:
        return False
    at = status.find(b"SigPnd:\t")
    return at >= 0 and bool(int(status[at + 8 : at + 24], 16) & 1 << 8)
