"""The answering end of RPC: many connections, each with many requests in flight, answered in any order.

Tasks: one accepting per listening socket; one reading per connection, in which the handler runs; one flusher, which
sends replies given outside of a batch; one janitor, which ends connections that stall; and one per connection only
while its socket refuses bytes (transport.Transport).

Shared state: a connection's counters `in_flight` and `transport.unsent_size`, and the server's `_payload_held`.  All
are touched only between awaits of the trio thread.  The reader of a connection stops before it handles the next frame
when a bound is reached, and is woken by the reply or write that falls below it.

Order of awaits: from `receive` to `flush` nothing waits except `_wait_for_room`, before which everything answered so
far has been flushed: no reply waits for a later request.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from wire.checksum import Buffer
from wire.codec import DECODE_ERRORS, decoder, encode
from wire.errors import ProtocolViolation, ServerOverloaded, StoreError, UnknownMethod
from wire.frame import Frame, FrameReader, Kind, encode_frame
from wire.log import get_logger
from wire.message import Message, Notice, Request
from wire.rpc.handshake import CONNECTION_ID, check_hello, encode_error, encode_hello
from wire.rpc.transport import Transport, Wakeup, size_of

log = get_logger("wire.rpc.server")

LISTEN_BACKLOG = 512
"""Connections the kernel holds until they are accepted: all mounts of a large cluster after a restart."""
_REQUEST, _REPLY, _NOTICE = (
    int(Kind.REQUEST),
    int(Kind.REPLY),
    int(Kind.NOTICE),
)  # Plain ints: a look-up in an enum costs as much as a checksum.
ACCEPT_PAUSE_S = 0.1
"""Before accepting again when the process is out of descriptors or memory; else that would be a busy loop."""


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one server, with their reasons."""

    connections_max: int = 2048  # Each costs a descriptor and 64 KiB.
    calls_in_flight_max: int = 2048  # Per connection; twice what a Channel sends, so that a good peer never feels it.
    unsent_bytes_max: int = 32 << 20  # Per connection: replies a slow peer has not taken; eight blocks.
    notice_behind_bytes_max: int = 1 << 20  # Unsent bytes behind which no notice is queued: it would come late.
    payload_bytes_held_max: int = 512 << 20  # Per server: payloads being received or not answered; 128 blocks.
    hello_timeout_s: float = 10.0  # For the first frame; a port scanner or half-open peer goes away after it.
    frame_timeout_s: float = 60.0  # For a frame that has begun: 4 MiB at 70 KiB/s.
    send_timeout_s: float = 60.0  # Without the peer taking any byte of its replies.
    janitor_interval_s: float = 1.0  # How late the three above may be noticed.


@dataclass(frozen=True)
class ServerStatistics:
    """Counters since the start, and what is so now."""

    connections: int
    connections_accepted: int
    connections_refused: int  # Wrong service or version, too many, not our protocol.
    requests: int  # Frames received, the HELLOs among them.
    errors: int  # Answers that were errors.
    batches: int
    notices: int
    calls_in_flight: int
    payload_bytes_held: int
    unsent_bytes: int


class Call:
    """One request in flight; answer exactly once, now or later, from the trio thread.

    After the peer has gone an answer is dropped silently: there is nobody to be told.
    """

    __slots__ = ("_connection", "_method", "_request_id", "deadline", "payload", "request")

    def __init__(self, request: Request[Message], frame: Frame, now: float, connection: _Connection) -> None:
        self.request = request
        self.payload = frame.payload  # The call's own memory; may be kept.
        self.deadline = now + frame.timeout_ms / 1000  # trio.current_time() at which the caller has given up.
        self._method = frame.method
        self._request_id = frame.request_id
        self._connection: _Connection | None = connection

    @property
    def peer(self) -> str:
        """host:port of the caller, for people."""
        return self._connection.transport.peer if self._connection else "answered"

    @property
    def connection_number(self) -> int:
        """Connections are numbered as they were accepted: of two, the caller has given up the one with the lower."""
        assert self._connection is not None
        return self._connection.number

    @property
    def line(self) -> Line:
        """The caller's connection, which may be kept beyond the answer to send notices over it."""
        assert self._connection is not None
        return self._connection.line

    @property
    def answered(self) -> bool:
        """`reply` or `fail` has been called."""
        return self._connection is None

    def reply(self, message: Message, payload: Buffer | Sequence[Buffer] = b"") -> None:
        """Answer with `message`; the payload's bytes must not change before they have left."""
        self.reply_encoded(encode(message), payload)

    def reply_encoded(self, body: bytes, payload: Buffer | Sequence[Buffer] = b"") -> None:
        """As `reply`, with a message that has been encoded already."""
        connection = self._connection
        assert connection is not None, "a call was answered twice"
        size = size_of(payload) if payload else 0
        head = encode_frame(_REPLY, method=self._method, request_id=self._request_id, body=body, payload_size=size)
        self._connection = None
        connection.answer(head, payload, len(self.payload))

    def fail(self, error: StoreError) -> None:
        """Answer with an error."""
        connection = self._connection
        assert connection is not None, "a call was answered twice"
        head = encode_error(error, method=self._method, request_id=self._request_id)
        self._connection = None
        connection.server.errors += 1
        connection.answer(head, b"", len(self.payload))


class Line:
    """One connection as those see it who have something to tell its client unasked."""

    __slots__ = ("_connection", "number")

    def __init__(self, connection: _Connection) -> None:
        self.number = connection.number  # As Call.connection_number.
        self._connection = connection

    @property
    def is_open(self) -> bool:
        """The connection has not ended, as far as this end knows."""
        return not self._connection.transport.closed

    def notify(self, notice: Notice) -> bool:
        """Queue a notice behind the answers given so far.

        Returns:
            False: it was not queued, because the connection has ended or its peer takes no bytes; what to do then is
            the caller's affair.  True says nothing about its arrival either.
        """
        return self._connection.notify(notice)


class _Connection:
    """One accepted connection."""

    def __init__(self, server: RpcServer, sock: stdlib_socket.socket, nursery: trio.Nursery) -> None:
        self.server = server
        self.number = server.accepted
        self.in_flight = 0
        self.in_batch = False  # Replies given now leave with the batch.
        self.dirty = False  # In the flusher's list.
        self.greeted = False
        self.waiting_since = trio.current_time()  # For the rest of a frame, or for the first one; 0: for nothing.
        self.stalled = ""  # Why the janitor has ended it.
        self.scope = trio.CancelScope()
        self._room = Wakeup()
        self._wants_room = False
        self._receiving_payload = 0
        self.transport = Transport(sock, nursery, reader=FrameReader(), on_written=self.maybe_room)
        self.line = Line(self)

    def answer(self, head: bytes, payload: Buffer | Sequence[Buffer], request_payload_size: int) -> None:
        """Queue one answer."""
        self.in_flight -= 1
        if request_payload_size:
            self.server.release_payload(request_payload_size)
        self.transport.send(head, payload)
        if not self.in_batch and not self.dirty:
            self.dirty = True
            self.server.flush_soon(self)
        if self._wants_room:
            self.maybe_room()

    def notify(self, notice: Notice) -> bool:
        """Queue a notice; False: it cannot be."""
        if self.transport.closed or self.transport.unsent_size > self.server.limits.notice_behind_bytes_max:
            return False
        self.transport.send(encode_frame(_NOTICE, method=notice.NOTICE, request_id=0, body=encode(notice)))
        self.server.notices += 1
        if not self.in_batch and not self.dirty:
            self.dirty = True
            self.server.flush_soon(self)
        return True

    def maybe_room(self) -> None:
        """Wake the reader if it waits and may go on."""
        if self._wants_room and self._has_room():
            self._wants_room = False
            self._room.set()

    def _has_room(self) -> bool:
        limits = self.server.limits
        return (
            self.in_flight < limits.calls_in_flight_max
            and self.transport.unsent_size < limits.unsent_bytes_max
            and (not self.transport.reader.payload_wanted or self.server.payload_fits())
        )

    async def _wait_for_room(self) -> None:
        """Wait, without reading, until every bound is kept."""
        self.waiting_since = 0.0
        while not self._has_room():
            self.transport.flush()
            if self._has_room():
                break
            self._wants_room = True
            self.server.wait_for_room(self)
            try:
                await self._room.wait()
            finally:
                self._wants_room = False
                self.server.room_found(self)

    async def run(self) -> None:
        """Read and handle until the peer goes, breaks the protocol, or stalls."""
        transport, server, limits = self.transport, self.server, self.server.limits
        reader = transport.reader
        while True:
            frames = await transport.receive()
            if frames:
                now = trio.current_time()
                self._receive_payload(0)
                self.in_batch = True
                for frame in frames:
                    if self.in_flight >= limits.calls_in_flight_max or transport.unsent_size >= limits.unsent_bytes_max:
                        self._end_batch()
                        await self._wait_for_room()
                        self.in_batch = True
                    self._handle(frame, now)
                self._end_batch()
                server.batches += 1
                server.requests += len(frames)
                self.waiting_since = now if reader.in_the_middle else 0.0
            elif not self.waiting_since:
                self.waiting_since = trio.current_time()
            if not self._has_room():
                await self._wait_for_room()
                self.waiting_since = trio.current_time() if reader.in_the_middle else 0.0
            if reader.payload_wanted:
                self._receive_payload(reader.payload_wanted)

    def _receive_payload(self, size: int) -> None:
        """A payload of `size` bytes is being received; 0: no longer (its call holds it now)."""
        if self._receiving_payload:
            self.server.release_payload(self._receiving_payload)
        if size:
            self.server.hold_payload(size)
        self._receiving_payload = size

    def _end_batch(self) -> None:
        if self.server.drained is not None:
            try:
                self.server.drained()
            except Exception:
                log.exception("drained_failed", peer=self.transport.peer)
        self.in_batch = False
        self.transport.flush()

    def _handle(self, frame: Frame, now: float) -> None:
        if frame.kind != _REQUEST or not self.greeted:
            self._greet(frame)
            return
        server = self.server
        self.in_flight += 1
        if frame.payload:
            server.hold_payload(len(frame.payload))
        decode = server.decoders.get(frame.method)
        if decode is None:
            error = UnknownMethod(f"the {server.service!r} service has no method {frame.method}")
            self._refuse(frame, error)
            return
        try:
            request = decode(frame.body)
        except DECODE_ERRORS as error:
            name = server.methods[frame.method].__name__
            self._refuse(frame, ProtocolViolation(f"not a {name}: {error}"))
            return
        call = Call(request, frame, now, self)
        try:
            server.handler(call)
        except StoreError as error:
            call.fail(error)
        except Exception:
            log.exception("handler_failed", method=type(request).__name__, peer=self.transport.peer)
            if not call.answered:
                call.fail(StoreError(f"a fault in the {server.service!r} service; its log tells more"))

    def _refuse(self, frame: Frame, error: StoreError) -> None:
        self.server.errors += 1
        head = encode_error(error, method=frame.method, request_id=frame.request_id)
        self.answer(head, b"", len(frame.payload))

    def _greet(self, frame: Frame) -> None:
        if frame.kind != Kind.HELLO or self.greeted:
            raise ProtocolViolation(f"a frame of kind {frame.kind} came where a HELLO or a REQUEST was due")
        check_hello(frame, self.server.service, self.server.instance)
        self.greeted = True
        self.transport.send(encode_hello(self.server.service, self.server.instance))

    def end(self, error: StoreError | None) -> None:
        """Close; with an error, tell it to the peer first if its socket takes it."""
        if error is not None:
            self.transport.send(encode_error(error, method=0, request_id=CONNECTION_ID))
            self.transport.flush()
        self._receive_payload(0)
        self.transport.close()

    def maybe_stalled(self, now: float) -> None:
        """End the connection if the peer has kept us waiting for too long."""
        limits = self.server.limits
        if self.waiting_since:
            bound = limits.frame_timeout_s if self.greeted else limits.hello_timeout_s
            if now - self.waiting_since > bound:
                self.stalled = f"no complete frame within {bound:g} s"
        if self.transport.has_backlog and now - self.transport.backlog_since > limits.send_timeout_s:
            self.stalled = f"no reply taken within {limits.send_timeout_s:g} s"
        if self.stalled:
            self.scope.cancel()


class RpcServer:
    """Serves one table of methods on any number of listening sockets."""

    def __init__(
        self,
        *,
        service: str,
        methods: dict[int, type[Request[Message]]],
        handler: Callable[[Call], None],
        drained: Callable[[], None] | None = None,
        limits: ServerLimits = ServerLimits(),
        instance: str = "",
    ) -> None:
        """Nothing happens before `serve`.

        Args:
            service: what clients must ask for, "metadata" or "block".
            methods: from method number to request class (wire.message.method_table).
            handler: called for each request, in the order of arrival on its connection; answers in place, or keeps
                the call and answers later.  A StoreError it raises is the answer; any other exception is logged and
                answered with StoreError (EIO).
            instance: which one of its kind this is; clients that expect another are refused with WrongCluster.
            drained: called when all requests that had arrived on a connection have been handled (to start a commit).
        """
        self.service = service
        self.instance = instance
        self.methods = methods
        self.decoders = {number: decoder(method).decode for number, method in methods.items()}
        self.handler = handler
        self.drained = drained
        self.limits = limits
        self.requests = 0
        self.errors = 0
        self.batches = 0
        self.notices = 0
        self.accepted = 0
        self._refused = 0
        self._payload_held = 0
        self._connections: set[_Connection] = set()
        self._waiting: set[_Connection] = set()  # For room.
        self._dirty: list[_Connection] = []
        self._flush = Wakeup()
        self._together = False

    def statistics(self) -> ServerStatistics:
        """Figures for people and for `fsd status`."""
        return ServerStatistics(
            connections=len(self._connections),
            connections_accepted=self.accepted,
            connections_refused=self._refused,
            requests=self.requests,
            errors=self.errors,
            batches=self.batches,
            notices=self.notices,
            calls_in_flight=sum(c.in_flight for c in self._connections),
            payload_bytes_held=self._payload_held,
            unsent_bytes=sum(c.transport.unsent_size for c in self._connections),
        )

    async def serve(
        self,
        sockets: Sequence[trio.socket.SocketType],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and answer for ever; when cancelled, close the connections and the listening `sockets`."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._flusher)
                nursery.start_soon(self._janitor)
                for sock in sockets:
                    nursery.start_soon(self._accept, sock, nursery)
                task_status.started()
        finally:
            for sock in sockets:
                sock.close()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                accepted, _ = await listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    raise  # Not a listening socket: a bug of the caller.
                if error.errno == errno.ECONNABORTED:
                    continue  # The peer was gone before it was accepted.
                log.warning("accept_failed", error=error)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            self.accepted += 1
            sock = stdlib_socket.socket(fileno=accepted.detach())
            nursery.start_soon(self._run_connection, sock, nursery)

    async def _run_connection(self, sock: stdlib_socket.socket, nursery: trio.Nursery) -> None:
        """The life of one connection; whatever happens to it ends it alone."""
        try:
            connection = _Connection(self, sock, nursery)
        except OSError as error:  # It is gone already.
            log.debug("connection_lost", error=error)
            sock.close()
            return
        peer, told = connection.transport.peer, None
        self._connections.add(connection)
        log.debug("connection_opened", peer=peer, service=self.service)
        try:
            with connection.scope:
                if len(self._connections) > self.limits.connections_max:
                    raise ServerOverloaded(f"there are {self.limits.connections_max} connections already")
                await connection.run()
        except (OSError, EOFError) as error:
            log.debug("connection_closed", peer=peer, error=connection.transport.failure or error)
        except StoreError as error:
            self._refused += 1
            told = error
            log.warning("connection_refused", peer=peer, service=self.service, error=error)
        finally:
            if connection.stalled:
                log.warning("connection_stalled", peer=peer, service=self.service, reason=connection.stalled)
            self._connections.discard(connection)
            connection.end(told)

    async def _janitor(self) -> None:
        while True:
            await trio.sleep(self.limits.janitor_interval_s)
            now = trio.current_time()
            for connection in self._connections:
                connection.maybe_stalled(now)

    async def _flusher(self) -> None:
        while True:
            await self._flush.wait()
            self._flush_dirty()

    # --- for connections ---------------------------------------------------------------------------------------------

    def answer_together(self, answer: Callable[[], None]) -> None:
        """Run `answer`, which answers many calls outside of a batch, and send all of it in this turn of the loop."""
        self._together = True
        try:
            answer()
        finally:
            self._together = False
            self._flush_dirty()

    def flush_soon(self, connection: _Connection) -> None:
        """An answer was given outside of a batch: send it, with all others of this turn of the loop."""
        if not self._dirty and not self._together:
            self._flush.set()
        self._dirty.append(connection)

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.dirty = False
            connection.transport.flush()

    def payload_fits(self) -> bool:
        """One more payload may be taken into memory."""
        return self._payload_held < self.limits.payload_bytes_held_max

    def hold_payload(self, size: int) -> None:
        """A payload is taken into memory."""
        self._payload_held += size

    def release_payload(self, size: int) -> None:
        """A payload was answered, or will never be complete."""
        self._payload_held -= size
        if self._waiting:
            for connection in list(self._waiting):
                connection.maybe_room()

    def wait_for_room(self, connection: _Connection) -> None:
        """The connection's reader waits."""
        self._waiting.add(connection)

    def room_found(self, connection: _Connection) -> None:
        """It does no longer."""
        self._waiting.discard(connection)


async def open_listener(host: str, port: int) -> trio.socket.SocketType:
    """A listening TCP socket at `host`:`port`; port 0: any free one (see its getsockname()).

    Raises:
        OSError: the address is taken, not ours, or unknown; the message says which address.
    """
    try:
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(errno.EADDRNOTAVAIL, f"cannot listen on {host}:{port}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    sock = trio.socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        await sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        number = error.errno or errno.EIO
        reason = "another process listens there" if number == errno.EADDRINUSE else os.strerror(number)
        raise OSError(number, f"cannot listen on {host}:{port}: {reason}") from error
    return sock
