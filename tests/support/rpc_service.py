"""A small service for the tests of RPC, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import trio

from wire.errors import ServerOverloaded, from_code
from wire.message import Message, Notice, Request, method_table, notice_table
from wire.rpc.client import Channel, ChannelLimits
from wire.rpc.server import Call, RpcServer, ServerLimits, open_listener

SERVICE = "test"


class Echoed(Message, frozen=True, array_like=True):
    text: str
    payload_size: int


class Echo(Request[Echoed], frozen=True, array_like=True):
    """Answered at once, with `reply_size` bytes of payload; with reply_size -1 the request's own payload."""

    METHOD: ClassVar[int] = 1
    REPLY: ClassVar[type[Message]] = Echoed

    text: str
    reply_size: int = 0


class Hold(Request[Echoed], frozen=True, array_like=True):
    """Kept by the service until the test answers it."""

    METHOD: ClassVar[int] = 2
    REPLY: ClassVar[type[Message]] = Echoed

    text: str


class Fail(Request[Echoed], frozen=True, array_like=True):
    """Refused with the error of that code; 0: a bug of the handler."""

    METHOD: ClassVar[int] = 3
    REPLY: ClassVar[type[Message]] = Echoed

    code: int
    detail: str


class Unknown(Request[Echoed], frozen=True, array_like=True):
    """In nobody's table."""

    METHOD: ClassVar[int] = 99
    REPLY: ClassVar[type[Message]] = Echoed


class News(Notice, frozen=True, array_like=True):
    """Something that nobody asked for."""

    NOTICE: ClassVar[int] = 3

    text: str


class OtherNews(Notice, frozen=True, array_like=True):
    """Not in the clients' table."""

    NOTICE: ClassVar[int] = 4


METHODS = method_table([Echo, Hold, Fail])
NOTICES = notice_table([News])


@dataclass
class Service:
    """The handler and what it has seen."""

    limits: ServerLimits = field(default_factory=ServerLimits)
    held: list[Call] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    overloads_left: int = 0
    instance: str = ""
    drained_count: int = 0

    def __post_init__(self) -> None:
        self.rpc = self.make()
        self._arrived = trio.Event()

    def make(self) -> RpcServer:
        return RpcServer(
            service=SERVICE,
            methods=METHODS,
            handler=self.handle,
            drained=self.drained,
            limits=self.limits,
            instance=self.instance,
        )

    def drained(self) -> None:
        self.drained_count += 1

    def handle(self, call: Call) -> None:
        request: Any = call.request
        self.seen.append(request)
        if self.overloads_left:
            self.overloads_left -= 1
            raise ServerOverloaded("not now")
        if isinstance(request, Echo):
            payload = call.payload if request.reply_size == -1 else bytes(request.reply_size)
            call.reply(Echoed(request.text, len(call.payload)), payload)
        elif isinstance(request, Hold):
            self.held.append(call)
            self._arrived.set()
            self._arrived = trio.Event()
        else:
            assert request.code, "a planted bug"
            raise from_code(request.code, request.detail)

    async def wait_held(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.held) < count:
                await self._arrived.wait()


@asynccontextmanager
async def serving(service: Service, port: int = 0) -> AsyncIterator[int]:
    """Run the service on a loopback port; its connections and listener are closed at the end."""
    listener = await open_listener("127.0.0.1", port)
    bound: int = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(run_server, service.rpc, [listener])
        yield bound
        nursery.cancel_scope.cancel()


async def run_server(
    rpc: RpcServer, sockets: list[trio.socket.SocketType], *, task_status: trio.TaskStatus[None]
) -> None:
    await rpc.serve(sockets, task_status=task_status)


@asynccontextmanager
async def channel_to(
    port: int,
    *,
    service: str = SERVICE,
    instance: str = "",
    limits: ChannelLimits | None = None,
    on_notice: Callable[[Notice], None] = lambda notice: None,
) -> AsyncIterator[Channel]:
    channel = Channel(
        "127.0.0.1",
        port,
        service=service,
        instance=instance,
        notices=NOTICES,
        on_notice=on_notice,
        limits=limits or ChannelLimits(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(run_channel, channel)
        yield channel
        nursery.cancel_scope.cancel()


async def run_channel(channel: Channel, *, task_status: trio.TaskStatus[None]) -> None:
    await channel.run(task_status=task_status)


async def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let other tasks run until the condition holds."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  (it lies inside what is tested, which offers no event)
            await trio.sleep(0.001)
