"""Sockets, and the wires between them: delays, breaks, partitions in one direction or both, connections to the dead.

A `Wire` is one direction of a connection: bytes arrive in order, each after a delay. In a partition they wait (as
TCP sends again and again) and arrive when it is healed, unless one of the kernels has given the connection up before
that: after UNACKNOWLEDGED_S with bytes under way, after KEEPALIVE_S without; what wire/rpc/transport.py sets for
real sockets.
"""

from __future__ import annotations

import errno
import heapq
import os
import random
from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio

from tests.sim.world import Process, current_process
from wire.rpc.transport import KEEPALIVE_COUNT, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, UNACKNOWLEDGED_MS_MAX

if TYPE_CHECKING:
    from tests.sim.world import World

WINDOW = 256 << 10
"""Bytes that a socket takes before the other side has read them."""
UNACKNOWLEDGED_S = UNACKNOWLEDGED_MS_MAX / 1000
KEEPALIVE_S = KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT
Delay = Callable[[random.Random], float]


def lan(chance: random.Random) -> float:
    """0.1 to 0.4 ms, now and then up to 20."""
    return chance.uniform(0.0001, 0.0004) if chance.random() < 0.97 else chance.uniform(0.0004, 0.02)


class Network:
    """All sockets of a world."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.delay: Delay = lan
        self._world = world
        self._chance = chance
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_count = 0
        self._scope = trio.CancelScope()
        self._listeners: dict[int, SimListener] = {}
        self._sockets: dict[int, SimSocket] = {}  # By number, open ones.
        self._lingering: dict[int, SimSocket] = {}  # Closed ones that still have something to send.
        self._blocked: dict[tuple[str, str], float] = {}  # (from host, to host) -> since when.
        self._healed = trio.Event()
        self._traps: dict[tuple[str, str], int] = {}
        self._socket_count = 0
        self._over = False

    # --- time ---

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do it then."""
        self._event_count += 1
        heapq.heappush(self._events, (when, self._event_count, what))
        if when < self._scope.deadline:
            self._scope.deadline = when

    async def run(self) -> None:
        """Let things arrive."""
        events = self._events
        while True:
            with trio.CancelScope(deadline=events[0][0] if events else inf) as self._scope:
                await trio.sleep_forever()
            now = trio.current_time()
            while events and events[0][0] <= now:
                heapq.heappop(events)[2]()

    # --- faults ---

    def is_blocked(self, source: str, target: str) -> bool:
        """Nothing gets from one host to the other."""
        return (source, target) in self._blocked

    def block(self, source: str, target: str) -> None:
        """From now on nothing gets from one host to the other; nobody is told."""
        since = self._blocked.setdefault((source, target), trio.current_time())
        for socket in list(self._sockets.values()):
            if {socket.host, socket.peer.host} == {source, target}:
                self.at(since + KEEPALIVE_S, lambda socket=socket: self._give_up(socket, source, target, since))  # type: ignore[misc]
                if socket.unread:
                    self._watch(socket)

    def heal(self, source: str, target: str) -> None:
        """What was sent arrives, if its connection still is."""
        if self._blocked.pop((source, target), None) is None:
            return
        for socket in [*self._sockets.values(), *self._lingering.values()]:
            if socket.host == source and socket.peer.host == target:
                waiting, socket.stuck = socket.stuck, deque()
                self._lingering.pop(socket.number, None)
                for what in waiting:
                    self._send(socket, what)
        self._healed.set()
        self._healed = trio.Event()

    def break_connections(self, host: str, other: str) -> None:
        """A middlebox forgets them: both ends are told at their next packet, here at once."""
        for socket in list(self._sockets.values()):
            if (socket.host, socket.peer.host) == (host, other):
                socket.fail(errno.ECONNRESET)
                socket.peer.fail(errno.ECONNRESET)

    def break_at(self, source: str, target: str, count: int) -> None:
        """The connection on which the next thing but `count - 1` is sent that way breaks, and that does not arrive."""
        self._traps[source, target] = count

    def _is_trapped(self, socket: SimSocket) -> bool:
        way = socket.host, socket.peer.host
        count = self._traps.pop(way, 0)
        if count > 1:
            self._traps[way] = count - 1
        return count == 1

    def process_died(self, process: Process) -> None:
        """Its kernel closes what it had open."""
        for port, listener in list(self._listeners.items()):
            if listener.process is process:
                del self._listeners[port]
        for socket in list(self._sockets.values()):
            if socket.process is process:
                self._closed(socket, errno.ECONNRESET)

    def end(self) -> None:
        """Nothing is sent or accepted any more, and everybody is told: the world ends."""
        self._over = True
        for socket in list(self._sockets.values()):
            socket.fail(errno.ENETDOWN)
        self._healed.set()

    # --- connections ---

    async def connect(self, host: str, port: int) -> SimStream:
        """In the place of trio.open_tcp_stream; ECONNREFUSED when nobody listens there, no answer in a partition."""
        process = current_process()
        await trio.sleep(2 * self.delay(self._chance))
        while self.is_blocked(process.host, host) or self.is_blocked(host, process.host):
            await self._healed.wait()
            await trio.sleep(self.delay(self._chance))
        listener = self._listeners.get(port)
        if self._over:
            await trio.sleep_forever()
        if listener is None:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        here, there = SimSocket(self, process), SimSocket(self, listener.process)
        here.peer, there.peer = there, here
        for socket in (here, there):
            self._socket_count += 1
            socket.number = self._socket_count
            self._sockets[socket.number] = socket
        listener.arrive(there)
        return SimStream(here)

    async def listen(self, host: str, port: int) -> SimListener:
        """In the place of wire.rpc.server.open_listener."""
        await trio.lowlevel.checkpoint()
        assert port not in self._listeners, "the port is taken"
        listener = self._listeners[port] = SimListener(self, current_process(), host, port)
        return listener

    def stop_listening(self, listener: SimListener) -> None:
        """It was closed."""
        if self._listeners.get(listener.port) is listener:
            del self._listeners[listener.port]

    def find(self, number: int) -> SimSocket:
        """The socket behind a number that `detach` gave."""
        return self._sockets[number]

    # --- bytes ---

    def transmit(self, socket: SimSocket, what: Callable[[], None]) -> None:
        """Let `what` happen at the other end of the socket's connection, in its turn."""
        if self._over:
            return
        if self._traps and self._is_trapped(socket):
            socket.fail(errno.ECONNRESET)
            socket.peer.fail(errno.ECONNRESET)
            return
        if socket.stuck or self.is_blocked(socket.host, socket.peer.host):
            socket.stuck.append(what)
            self._watch(socket)
        else:
            self._send(socket, what)
            if self.is_blocked(socket.peer.host, socket.host):
                self._watch(socket)

    def mark(self, socket: SimSocket, data: bytes) -> None:
        """Every byte on the wire is part of what a replay must repeat."""
        self._world.mark(f"{socket.number} {trio.current_time()!r} ".encode())
        self._world.mark(data)

    def _send(self, socket: SimSocket, what: Callable[[], None]) -> None:
        socket.last_arrival = max(trio.current_time() + self.delay(self._chance), socket.last_arrival)
        self.at(socket.last_arrival, what)

    def _watch(self, socket: SimSocket) -> None:
        """No acknowledgement comes for what was sent: give up in time."""
        for source, target in ((socket.host, socket.peer.host), (socket.peer.host, socket.host)):
            since = self._blocked.get((source, target))
            if since is not None:
                when = trio.current_time() + UNACKNOWLEDGED_S
                self.at(when, lambda s=source, t=target, b=since: self._give_up(socket, s, t, b))  # type: ignore[misc]

    def _give_up(self, socket: SimSocket, source: str, target: str, since: float) -> None:
        if self._blocked.get((source, target)) == since:
            socket.fail(errno.ETIMEDOUT)

    def closed(self, socket: SimSocket) -> None:
        """A process has closed it: the peer reads to the end of what was sent."""
        self._closed(socket, 0)

    def _closed(self, socket: SimSocket, error: int) -> None:
        if self._sockets.pop(socket.number, None) is not None:
            socket.closed = True
            peer = socket.peer
            self.transmit(socket, (lambda: peer.fail(error)) if error else peer.arrive_end)
            if socket.stuck:
                self._lingering[socket.number] = socket


class SimSocket:
    """What wire.rpc uses of socket.socket."""

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self.host = process.host
        self.peer: SimSocket
        self.number = 0
        self.closed = False
        self.unread = 0  # Bytes sent from here that the peer has not read.
        self.stuck: deque[Callable[[], None]] = deque()  # In a partition.
        self.last_arrival = 0.0
        self._network = network
        self._inbox = bytearray()
        self._ended = False
        self._error = 0
        self._reader: trio.lowlevel.Task | None = None
        self._writer: trio.lowlevel.Task | None = None

    # --- what the kernel of this end does ---

    def arrive(self, data: bytes) -> None:
        """Bytes have come."""
        if self.closed:
            if not self._error:  # RST: nobody will read this.
                self._error = errno.ECONNRESET
                self._network.transmit(self, lambda: self.peer.fail(errno.ECONNRESET))
            return
        self._inbox += data
        self._wake()

    def arrive_end(self) -> None:
        """The peer has closed."""
        self._ended = True
        self._wake()

    def fail(self, error: int) -> None:
        """The connection is gone."""
        if not self.closed and not self._error:
            self._error = error
            self.stuck.clear()
            self._wake()
            self._wake_writer()

    def _wake(self) -> None:
        if self._reader is not None:
            task, self._reader = self._reader, None
            trio.lowlevel.reschedule(task)

    def _wake_writer(self) -> None:
        if self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task)

    # --- system calls ---

    def setblocking(self, flag: bool) -> None:
        """As socket.socket."""

    def setsockopt(self, *args: object) -> None:
        """As socket.socket."""

    def getpeername(self) -> tuple[str, int]:
        """As socket.socket."""
        return self.peer.host, self.peer.number

    def fileno(self) -> int:
        """As socket.socket."""
        return -1 if self.closed else self.number

    def recv_into(self, buffer: memoryview) -> int:
        """As socket.socket, non-blocking."""
        size = min(len(self._inbox), len(buffer))
        if size:
            buffer[:size] = self._inbox[:size]
            del self._inbox[:size]
            self.peer.unread -= size
            self.peer._wake_writer()
            return size
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
        if self._ended:
            return 0
        raise BlockingIOError

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """As socket.socket, non-blocking."""
        if self.closed or self._error:
            number = self._error or errno.EBADF
            raise OSError(number, os.strerror(number))
        size = min(len(data), WINDOW - self.unread)
        if size <= 0:
            raise BlockingIOError
        sent, peer = bytes(data[:size]), self.peer
        self._network.mark(self, sent)
        self.unread += size
        self._network.transmit(self, lambda: peer.arrive(sent))
        return size

    def sendmsg(self, buffers: list[bytes | bytearray | memoryview]) -> int:
        """As socket.socket, non-blocking."""
        return self.send(b"".join(buffers))

    def shutdown(self, how: int) -> None:
        """As socket.socket; only called on what has failed."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """As socket.socket."""
        self._network.closed(self)

    # --- what trio.lowlevel has for sockets ---

    async def wait_readable(self) -> None:
        """As trio.lowlevel.wait_readable."""
        if self.closed:
            raise trio.ClosedResourceError("closed")
        if self._inbox or self._ended or self._error:
            await trio.lowlevel.checkpoint()
            return
        assert self._reader is None, "two tasks read from one socket"
        self._reader = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._reader = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if self.closed:
            raise trio.ClosedResourceError("closed")

    async def wait_writable(self) -> None:
        """As trio.lowlevel.wait_writable."""
        if self.closed or self._error or self.unread < WINDOW:
            await trio.lowlevel.checkpoint()
            return
        self._writer = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def notify_closing(self) -> None:
        """As trio.lowlevel.notify_closing: `close` follows at once."""
        self.closed = True
        self._wake()
        self._wake_writer()


class SimStream:
    """What wire.rpc.client uses of the stream that it opens, and wire.rpc.server of what it has accepted."""

    def __init__(self, socket: SimSocket) -> None:
        self.socket = self
        self._socket = socket

    def detach(self) -> int:
        """As socket.socket."""
        return self._socket.number


class SimListener:
    """What wire.rpc.server and metadata.server use of a listening socket."""

    def __init__(self, network: Network, process: Process, host: str, port: int) -> None:
        self.process = process
        self.host = host
        self.port = port
        self._network = network
        self._arrived: deque[SimSocket] = deque()
        self._filled = trio.Event()

    def arrive(self, socket: SimSocket) -> None:
        """Somebody has connected."""
        self._arrived.append(socket)
        self._filled.set()

    def getsockname(self) -> tuple[str, int]:
        """As socket.socket."""
        return self.host, self.port

    async def accept(self) -> tuple[SimStream, tuple[str, int]]:
        """As trio.socket."""
        while not self._arrived:
            self._filled = trio.Event()
            await self._filled.wait()
        await trio.lowlevel.checkpoint()
        socket = self._arrived.popleft()
        return SimStream(socket), socket.getpeername()

    def close(self) -> None:
        """As socket.socket."""
        self._network.stop_listening(self)
