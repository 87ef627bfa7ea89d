"""The asking end of RPC: one multiplexed connection to one service, made again when it breaks.

Tasks: `run` connects when somebody wants it and reads replies; `_flusher` sends what several callers queued in the
same turn of the loop; `_timer` sleeps until the first deadline of all calls, so that a call needs no cancel scope of
its own; callers are parked, and woken with their answer by the reader or the timer.

Shared state: `_pending`, from request id to the parked call.  An entry leaves it exactly once, together with the
decision to wake its task (answer, error, deadline) or with the task's own cancellation; a reply that finds no entry is
dropped.  Between taking an entry out and rescheduling its task nothing waits.

A request keeps its id and its bytes when it is sent again over a new connection; only `timeout_ms` is made anew.
"""

from __future__ import annotations

import random
import socket as stdlib_socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import outcome
import trio

from wire.checksum import Buffer
from wire.codec import DECODE_ERRORS, decode, decoder, encode
from wire.errors import (
    DeadlineExceeded,
    OutcomeUnknown,
    ProtocolViolation,
    ServerOverloaded,
    StoreError,
    Unreachable,
    WrongCluster,
    WrongVersion,
)
from wire.frame import TIMEOUT_MS_MAX, Frame, FrameReader, Kind, encode_frame
from wire.log import get_logger
from wire.message import Message, Notice, Request
from wire.rpc.handshake import CONNECTION_ID, check_hello, decode_error, encode_hello
from wire.rpc.transport import Transport, Wakeup, size_of

log = get_logger("wire.rpc.client")

R = TypeVar("R", bound=Message)
Result = tuple[Any, memoryview]
_REQUEST, _REPLY, _ERROR = int(Kind.REQUEST), int(Kind.REPLY), int(Kind.ERROR)  # Plain ints are compared faster.


@dataclass(frozen=True)
class ChannelLimits:
    """Bounds of one channel, with their reasons."""

    calls_in_flight_max: int = 1024  # Further callers wait for their turn; half of what the server takes.
    connect_timeout_s: float = 5.0  # For TCP and the exchange of HELLOs; three SYNs go out in that time.
    backoff_first_s: float = 0.02  # After the first failed connection: a service that restarts is soon found again.
    backoff_max_s: float = 1.0  # After many: a dead host costs each client one SYN a second.
    overload_backoff_max_s: float = 1.0  # Before a request that was refused as too much is sent again.
    silence_max_s: float = 10.0  # A call that runs out of time on a connection silent for this long condemns it.


@dataclass(frozen=True)
class ChannelStatistics:
    """Counters since the start, and what is so now."""

    connected: bool
    connections: int  # Made in all.
    calls: int
    calls_in_flight: int
    resent: int  # Requests sent again over a new connection or after an overload.
    timeouts: int
    dropped_replies: int  # Whose caller had gone.
    unsent_bytes: int


class _Pending:
    """One parked call."""

    __slots__ = (
        "attempts",
        "body",
        "channel",
        "deadline",
        "maybe_done",
        "method",
        "not_before",
        "payload",
        "payload_size",
        "reply_kind",
        "request_id",
        "retry",
        "sent",
        "sent_at",
        "task",
    )  # fmt: skip

    def __init__(
        self,
        channel: Channel,
        request: Request[Message],
        payload: Buffer | Sequence[Buffer],
        payload_size: int,
        deadline: float,
        retry: bool,
    ) -> None:
        self.channel = channel
        self.method = request.METHOD
        self.reply_kind = request.REPLY
        self.body = encode(request)
        self.payload = payload
        self.payload_size = payload_size
        self.deadline = deadline
        self.retry = retry
        self.sent = False  # Some of it may have left this host.
        self.maybe_done = False  # A connection that it was sent over has ended without an answer.
        self.sent_at = 0.0  # The last time.
        self.attempts = 0
        self.not_before = 0.0  # Above 0: waits until then to be sent again.
        self.request_id = 0
        self.task = trio.lowlevel.current_task()

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """The caller is cancelled: forget the call; its reply will be dropped."""
        self.channel.forget(self.request_id)
        return trio.lowlevel.Abort.SUCCEEDED

    def head(self, now: float) -> bytes:
        """Header and body of its frame, if sent now."""
        timeout_ms = int((self.deadline - now) * 1000)
        return encode_frame(
            _REQUEST,
            method=self.method,
            request_id=self.request_id,
            body=self.body,
            timeout_ms=min(max(timeout_ms, 1), TIMEOUT_MS_MAX),
            payload_size=self.payload_size,
        )


class Channel:
    """One connection to the service at `host`:`port`, shared by any number of callers.

    Start `run` in a nursery, once; calls made before wait for it.  It connects when first used, reconnects with bounded
    backoff while somebody waits, and closes when it is cancelled; calls then fail with Unreachable.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        service: str,
        instance: str = "",
        notices: Mapping[int, type[Notice]] | None = None,
        on_notice: Callable[[Notice], None] = lambda notice: None,
        limits: ChannelLimits = ChannelLimits(),
    ) -> None:
        """Nothing happens before `run`.

        Args:
            service: which kind of service to ask for.
            instance: which one of that kind; any other is WrongCluster.  "": whichever is there.
            notices: those that are understood; others are passed over.
            on_notice: called by the reader for each of them, in the order of the frames: answers that came before it
                have been handed to their callers, who have not run yet.  It must not wait, and not raise.
        """
        self._host = host
        self._port = port
        self._service = service
        self._instance = instance
        self._notices = notices or {}
        self._on_notice = on_notice
        self._limits = limits
        self._running = False
        self._closed = False
        self._transport: Transport | None = None  # Greeted and ready.
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._wanted = Wakeup()  # `run` waits for work.
        self._flush = Wakeup()
        self._flush_pending = False
        self._turn = trio.lowlevel.ParkingLot()  # Callers beyond calls_in_flight_max.
        self._timer_scope = trio.CancelScope()
        self._backoff_s = 0.0
        self._last_error = Unreachable(f"{self.peer}: not connected yet")
        self._refusing_until = 0.0  # After a failed connection: calls without retry fail at once until then.
        self._heard_at = 0.0
        self._connections = self._calls = self._resent = self._timeouts = self._dropped = 0

    @property
    def peer(self) -> str:
        """host:port, for people."""
        return f"{self._host}:{self._port}"

    def expect(self, instance: str) -> None:
        """From the next connection on accept only that instance of the service."""
        self._instance = instance

    @property
    def is_connected(self) -> bool:
        """There is a connection at this moment, as far as this end knows."""
        return self._transport is not None

    @property
    def connection_count(self) -> int:
        """Connections made in all: if it has grown during a call, the call may have been sent more than once."""
        return self._connections

    def statistics(self) -> ChannelStatistics:
        """Figures for people."""
        return ChannelStatistics(
            connected=self._transport is not None,
            connections=self._connections,
            calls=self._calls,
            calls_in_flight=len(self._pending),
            resent=self._resent,
            timeouts=self._timeouts,
            dropped_replies=self._dropped,
            unsent_bytes=self._transport.unsent_size if self._transport else 0,
        )

    # --- calls -------------------------------------------------------------------------------------------------------

    async def call(
        self,
        request: Request[R],
        *,
        payload: Buffer | Sequence[Buffer] = b"",
        timeout_s: float,
        retry: bool = True,
    ) -> R:
        """Ask, and wait for the answer; see `call_for_payload`."""
        reply, _ = await self.call_for_payload(request, payload=payload, timeout_s=timeout_s, retry=retry)
        return reply

    async def call_for_payload(
        self,
        request: Request[R],
        *,
        payload: Buffer | Sequence[Buffer] = b"",
        timeout_s: float,
        retry: bool = True,
    ) -> tuple[R, memoryview]:
        """Ask, and wait for the answer and its payload, which is the caller's own memory.

        Args:
            payload: sent after the request without being copied; must not change until this returns or raises.  (If
                it changes after that, its own checksums tell the server.)
            timeout_s: for everything, connecting and retries included.
            retry: True: send again over a new connection when one breaks, until the time is over.  Every request of
                fsd may be repeated.  False: raise as soon as something goes wrong, to ask another replica.

        Raises:
            Unreachable: no connection could be made (at once without retry, else until the deadline); never sent.
            OutcomeUnknown: without retry: the connection broke after the request was sent.
            DeadlineExceeded: the time is over and the request was sent.
            WrongCluster, WrongVersion: the peer is not one to talk to.
            StoreError: what the service answered; ServerOverloaded only without retry or at the deadline.
        """
        now = trio.current_time()
        deadline = now + timeout_s
        if len(self._pending) >= self._limits.calls_in_flight_max:
            await self._wait_for_turn(deadline)
            now = trio.current_time()
        size = size_of(payload) if payload else 0
        call = _Pending(self, request, payload, size, deadline, retry)
        self._calls += 1
        self._last_id += 1
        call.request_id = self._last_id
        transport = self._transport
        if transport is not None:
            self._send(transport, call, now)
        else:
            self._want_connection(call, now)
        self._pending[call.request_id] = call
        if deadline < self._timer_scope.deadline:
            self._timer_scope.deadline = deadline
        result: Result = await trio.lowlevel.wait_task_rescheduled(call.abort)
        return result

    def _send(self, transport: Transport, call: _Pending, now: float) -> None:
        """Queue the request; alone it leaves at once, among others with them at the end of this turn of the loop."""
        call.sent = True
        call.sent_at = now
        transport.send(call.head(now), call.payload)
        if not self._pending:
            transport.flush()
        elif not self._flush_pending:
            self._flush_pending = True
            self._flush.set()

    def _want_connection(self, call: _Pending, now: float) -> None:
        """There is no connection: have one made, or refuse at once if one was tried in vain a moment ago."""
        if self._closed:
            raise Unreachable(f"{self.peer}: this channel is closed")
        if not call.retry and now < self._refusing_until:
            raise Unreachable(self._last_error.detail)
        if not self._pending:
            self._wanted.set()

    async def _wait_for_turn(self, deadline: float) -> None:
        with trio.move_on_at(deadline):
            try:
                while len(self._pending) >= self._limits.calls_in_flight_max:
                    await self._turn.park()
            except trio.Cancelled:
                self._turn.unpark()  # The turn may have been given to this caller: pass it on.
                raise
            return
        raise Unreachable(
            f"{self.peer}: {self._limits.calls_in_flight_max} calls in flight for all of the time allowed"
        )

    def forget(self, request_id: int) -> _Pending | None:
        """Take a call out of those in flight; None: it is none of them."""
        call = self._pending.pop(request_id, None)
        if call is not None and self._turn:
            self._turn.unpark()
        return call

    def _finish(self, call: _Pending, result: outcome.Outcome[Result]) -> None:
        """Wake a caller; the call has just been forgotten."""
        trio.lowlevel.reschedule(call.task, result)

    def _fail(self, call: _Pending, error: StoreError) -> None:
        self.forget(call.request_id)
        self._finish(call, outcome.Error(error))

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connection; started at once, ends when cancelled."""
        assert not self._running, "a channel runs once"
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._timer)
                nursery.start_soon(self._flusher)
                task_status.started()
                while True:
                    while not self._pending:
                        await self._wanted.wait()
                    await self._connect_and_read(nursery)
        finally:
            self._closed = True
            for call in list(self._pending.values()):
                kind = OutcomeUnknown if call.sent else Unreachable
                self._fail(call, kind(f"{self.peer}: the channel was closed"))

    async def _connect_and_read(self, nursery: trio.Nursery) -> None:
        """One connection from its beginning to its end, and the pause after it if it came to nothing."""
        transport: Transport | None = None
        failure: BaseException
        heard = False
        try:
            with trio.fail_after(self._limits.connect_timeout_s):
                transport = await self._connect(nursery)
                frames = await self._greet(transport)
            self._opened(transport)
            while True:
                for frame in frames:
                    self._receive(frame)
                    heard = True
                frames = await transport.receive()
                self._heard_at = trio.current_time()
        except trio.TooSlowError:
            failure = Unreachable(f"no connection within {self._limits.connect_timeout_s:g} s")
        except (OSError, EOFError, StoreError, UnicodeError) as error:  # UnicodeError: not the name of a host.
            failure = error
        finally:
            was_open, self._transport = self._transport is not None, None
            if transport is not None:
                transport.close()
        self._ended(failure, was_open=was_open)
        if heard:
            self._backoff_s = 0.0
            return
        # Not even one answer: wait before trying again, between half and all of the backoff, so that many do not
        # come at once.
        self._backoff_s = min(max(self._backoff_s * 2, self._limits.backoff_first_s), self._limits.backoff_max_s)
        pause_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._refusing_until = trio.current_time() + pause_s
        await trio.sleep(pause_s)

    async def _connect(self, nursery: trio.Nursery) -> Transport:
        stream = await trio.open_tcp_stream(self._host, self._port)
        sock = stdlib_socket.socket(fileno=stream.socket.detach())
        try:
            return Transport(sock, nursery, reader=FrameReader(), on_written=_nothing)
        except OSError:
            sock.close()
            raise

    async def _greet(self, transport: Transport) -> list[Frame]:
        """Exchange HELLOs; returns what came behind the server's."""
        transport.send(encode_hello(self._service, self._instance))
        transport.flush()
        frames: list[Frame] = []
        try:
            while not frames:
                frames = await transport.receive()
        except BaseException:
            transport.close()
            raise
        first = frames.pop(0)
        try:
            if first.kind == Kind.ERROR:
                raise decode_error(first)
            if first.kind != Kind.HELLO:
                raise ProtocolViolation(f"the server began with a frame of kind {first.kind}")
            check_hello(first, self._service, self._instance)
        except StoreError:
            transport.close()
            raise
        return frames

    def _opened(self, transport: Transport) -> None:
        """Ready: send everything that waits."""
        self._transport = transport
        self._connections += 1
        now = self._heard_at = trio.current_time()
        log.debug("connected", peer=transport.peer, service=self._service, waiting=len(self._pending))
        for call in self._pending.values():
            call.maybe_done |= call.sent and not call.not_before
            self._resend(transport, call, now)
        transport.flush()

    def _resend(self, transport: Transport, call: _Pending, now: float) -> None:
        self._resent += call.sent
        call.sent = True
        call.sent_at = now
        call.not_before = 0.0
        transport.send(call.head(now), call.payload)

    def _ended(self, failure: BaseException, *, was_open: bool) -> None:
        """The connection ended, or could not be made: those who do not retry are told; the others wait."""
        reason = f"{self.peer}: {failure or type(failure).__name__}"
        if isinstance(failure, OSError) and not was_open:
            reason = f"{self.peer}: cannot connect: {_os_reason(failure)}"
        if isinstance(failure, ProtocolViolation):
            log.warning("connection_ended", peer=self.peer, service=self._service, error=failure)
        else:
            log.debug("connection_ended", peer=self.peer, service=self._service, error=failure)
        self._last_error = Unreachable(reason)
        final = type(failure)(reason) if isinstance(failure, WrongCluster | WrongVersion) else None
        for call in list(self._pending.values()):
            if final is not None:
                self._fail(call, final)
            elif not call.retry:
                self._fail(call, OutcomeUnknown(reason) if call.sent else Unreachable(reason))

    def _receive(self, frame: Frame) -> None:
        """A frame came from the server."""
        kind = frame.kind
        if kind != _REPLY and (kind != _ERROR or frame.request_id == CONNECTION_ID):
            if kind == Kind.NOTICE:
                self._noticed(frame)
                return
            if kind == Kind.ERROR:
                raise decode_error(frame)
            raise ProtocolViolation(f"the server sent a frame of kind {kind}")
        call = self.forget(frame.request_id)
        if call is None:
            self._dropped += 1
            return
        result: outcome.Outcome[Result]
        if kind == _ERROR:
            error = _told(frame)
            if isinstance(error, ServerOverloaded) and call.retry:
                self._postpone(call)
                return
            result = outcome.Error(error)
        else:
            try:
                result = outcome.Value((decoder(call.reply_kind).decode(frame.body), frame.payload))
            except DECODE_ERRORS as error:
                result = outcome.Error(ProtocolViolation(f"{self.peer}: not a {call.reply_kind.__name__}: {error}"))
        self._finish(call, result)

    def _noticed(self, frame: Frame) -> None:
        """The server tells something unasked; one that this client does not know needs no answer."""
        kind = self._notices.get(frame.method)
        if kind is not None:
            self._on_notice(decode(kind, frame.body))

    def _postpone(self, call: _Pending) -> None:
        """The server has too much to do: send the request again after a while, twice as long each time."""
        backoff_s = min(self._limits.backoff_first_s * 2**call.attempts, self._limits.overload_backoff_max_s)
        call.attempts += 1
        call.not_before = trio.current_time() + backoff_s * random.uniform(0.5, 1.0)
        self._pending[call.request_id] = call
        self._timer_scope.deadline = min(self._timer_scope.deadline, call.not_before)

    async def _flusher(self) -> None:
        while True:
            await self._flush.wait()
            self._flush_pending = False
            if self._transport is not None:
                self._transport.flush()

    async def _timer(self) -> None:
        """Wake callers whose time is over and send postponed requests; sleeps until the first of either."""
        while True:
            with self._timer_scope:
                await trio.sleep_forever()
            now = trio.current_time()
            next_at = inf
            for call in list(self._pending.values()):
                if call.deadline <= now:
                    self._time_over(call, now)
                    continue
                if call.not_before and call.not_before <= now and self._transport is not None:
                    self._resend(self._transport, call, now)
                next_at = min(next_at, call.deadline, call.not_before if call.not_before > now else inf)
            if self._transport is not None:
                self._transport.flush()
            self._timer_scope = trio.CancelScope(deadline=next_at)

    def _time_over(self, call: _Pending, now: float) -> None:
        self._timeouts += 1
        if not call.sent:
            self._fail(call, Unreachable(f"{self._last_error.detail} (until the deadline)"))
        elif call.not_before and not call.maybe_done:
            self._fail(call, ServerOverloaded(f"{self.peer}: too much to do (until the deadline)"))
        else:
            self._fail(call, DeadlineExceeded(f"{self.peer}: no answer in time to {call.method}"))
            silent_since = max(self._heard_at, call.sent_at)
            if self._transport is not None and now - silent_since > self._limits.silence_max_s:
                log.warning("connection_silent", peer=self.peer, service=self._service)
                self._transport.close()


def _told(frame: Frame) -> StoreError:
    """The error that answers a call; one that cannot be understood is an answer as well."""
    try:
        return decode_error(frame)
    except ProtocolViolation as violation:
        return violation


def _nothing() -> None:
    """Nobody waits for the client's backlog to shrink: its size is bounded by what the callers hold."""


def _os_reason(error: OSError) -> str:
    """Why a connection could not be made; trio tells about several addresses in a group below the error."""
    causes = error.__cause__
    if isinstance(causes, BaseExceptionGroup):
        return "; ".join(str(cause) for cause in causes.exceptions)
    return str(causes or error)
