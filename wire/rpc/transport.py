"""One connected socket with frames on it; what the two ends of a connection have in common.

Tasks: whoever reads (one task) awaits `receive`; anyone may `send` and `flush`, which never wait.  Bytes that the
socket does not take at once are written by a task of their own, `_write_backlog`, that lives only as long as there
are such bytes.

Shared state: `_out` holds what was sent and not flushed; `_backlog` what was flushed and not taken.  While there is a
backlog, only its task writes to the socket; `flush` leaves `_out` alone and the task takes it up in turn, so the order
of frames is the order of `send`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence

import trio

from wire.checksum import Buffer
from wire.frame import Frame, FrameReader

BATCHES_WITHOUT_CHECKPOINT_MAX = 8
"""Receives that may follow one another without letting other tasks run: 64 KiB or one payload each."""
JOIN_SIZE_MAX = 64 << 10
"""Frames up to this many bytes together are joined for one send: cheaper than a list of buffers."""
BUFFERS_PER_SEND_MAX = 512
"""Of the 1,024 (IOV_MAX) that Linux takes."""
KEEPALIVE_IDLE_S = 20
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
"""A host that is gone without a word is noticed after 35 s, when the connection is idle ..."""
UNACKNOWLEDGED_MS_MAX = 20_000
"""... and after 20 s when bytes are under way (TCP_USER_TIMEOUT); an outage of a switch's restart is survived."""


def configure_socket(sock: socket.socket) -> None:
    """Non-blocking, without delay, and sure to notice a host that is gone."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS_MAX)


def size_of(payload: Buffer | Sequence[Buffer]) -> int:
    """Bytes of a payload in one piece or several."""
    return len(payload) if isinstance(payload, bytes | bytearray | memoryview) else sum(map(len, payload))


def peer_name(sock: socket.socket) -> str:
    """host:port of the other end, for people."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "gone"
    return f"{host}:{port}"


class Transport:
    """Frames in, buffers out, over one socket."""

    def __init__(
        self, sock: socket.socket, nursery: trio.Nursery, *, reader: FrameReader, on_written: Callable[[], None]
    ) -> None:
        """Take over `sock`; `nursery` runs the backlog's task; `on_written` is told when a backlog has become less."""
        configure_socket(sock)
        self.peer = peer_name(sock)
        self.reader = reader
        self.closed = False
        self.failure: OSError | None = None  # Of the first send that failed; the reader ends the connection.
        self.unsent_size = 0  # Bytes sent and not yet taken by the socket.
        self.backlog_since = 0.0  # When the socket last took bytes of the backlog, or began to refuse them.
        self._socket = sock
        self._nursery = nursery
        self._on_written = on_written
        self._out: list[Buffer] = []
        self._out_size = 0
        self._backlog: list[Buffer] = []
        self._try_at_once = True
        self._batches = 0

    @property
    def has_backlog(self) -> bool:
        """The socket refuses to take what was flushed."""
        return bool(self._backlog)

    async def receive(self) -> list[Frame]:
        """Wait for bytes; the frames that they complete, which may be none.

        Raises:
            EOFError: the peer has ended the connection.
            OSError: the connection broke.
            ProtocolViolation: what came are not frames.
        """
        while True:
            view = self.reader.buffer()
            self._batches += 1
            if self._batches >= BATCHES_WITHOUT_CHECKPOINT_MAX:
                self._batches = 0
                await trio.lowlevel.checkpoint()
            elif not self._try_at_once:
                await self._wait_readable()
            try:
                size = self._socket.recv_into(view)
            except BlockingIOError:
                await self._wait_readable()
                continue
            if size == 0:
                raise EOFError("the peer ended the connection")
            # A socket that gave less than it was asked for is empty: asking again at once would be for nothing.
            self._try_at_once = size == len(view)
            return self.reader.received(size)

    async def _wait_readable(self) -> None:
        self._batches = 0
        if self.closed and self.failure is None:
            raise ConnectionAbortedError("the connection was closed here")
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except trio.ClosedResourceError as error:
            raise ConnectionAbortedError("the connection was closed here") from error

    def send(self, head: bytes, payload: Buffer | Sequence[Buffer] = b"") -> None:
        """Queue one frame; it leaves with the next flush.  The payload must not change before it has left."""
        if self.closed:
            return
        self._out.append(head)
        size = len(head)
        if payload:
            if isinstance(payload, bytes | bytearray | memoryview):
                self._out.append(payload)
            else:
                self._out.extend(payload)
            size += size_of(payload)
        self._out_size += size
        self.unsent_size += size

    def flush(self) -> None:
        """Give everything queued to the socket; start the backlog's task if it does not take all of it."""
        if not self._out or self._backlog or self.closed:
            return
        if self._out_size <= JOIN_SIZE_MAX:
            data = b"".join(self._out) if len(self._out) > 1 else self._out[0]
            self._out = []
            size, self._out_size = self._out_size, 0
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._fail(error)
                return
            self.unsent_size -= sent
            if sent == size:
                return
            self._backlog = [memoryview(data)[sent:]]
        else:
            self._backlog, self._out, self._out_size = self._out, [], 0
            if self._write() and not self._backlog:
                return
        if not self.closed:
            self.backlog_since = trio.current_time()
            self._nursery.start_soon(self._write_backlog)

    def _write(self) -> bool:
        """Give the backlog to the socket until it refuses; whether it took any."""
        took = False
        while self._backlog:
            try:
                sent = self._socket.sendmsg(self._backlog[:BUFFERS_PER_SEND_MAX])
            except BlockingIOError:
                return took
            except OSError as error:
                self._fail(error)
                return took
            took = True
            self.unsent_size -= sent
            count = 0
            for buffer in self._backlog:
                if sent < len(buffer):
                    break
                sent -= len(buffer)
                count += 1
            del self._backlog[:count]
            if sent:
                self._backlog[0] = memoryview(self._backlog[0])[sent:]
        return took

    async def _write_backlog(self) -> None:
        """Write the backlog, and what was queued behind it, until there is none."""
        while self._backlog and not self.closed:
            try:
                await trio.lowlevel.wait_writable(self._socket)
            except (trio.ClosedResourceError, OSError):
                return  # The connection is being closed; its queues are forgotten there.
            if self._write():
                self.backlog_since = trio.current_time()
            if not self._backlog and not self.closed:
                self._backlog, self._out, self._out_size = self._out, [], 0
            self._on_written()

    def _fail(self, error: OSError) -> None:
        """A send failed: forget what was queued and wake the reader, which ends the connection."""
        self.failure = error
        self._forget()
        with contextlib.suppress(OSError):  # It is broken already; then the reader has been woken by that.
            self._socket.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        self.closed = True
        self._out, self._backlog = [], []
        self._out_size = self.unsent_size = 0

    def close(self) -> None:
        """End the connection; what was not sent is forgotten.  Idempotent."""
        self._forget()
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


class Wakeup:
    """Wakes one waiting task; cheaper than an Event, and it remembers a wake-up that came before the wait."""

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._set = False

    def set(self) -> None:
        """Wake the task that waits, or let the next wait return at once."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
        else:
            self._set = True

    async def wait(self) -> None:
        """Wait for the next `set`; only one task may wait."""
        if self._set:
            self._set = False
            await trio.lowlevel.checkpoint()
            return
        assert self._task is None, "two tasks wait for one Wakeup"
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
