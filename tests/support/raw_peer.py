"""The far end of a connection by hand: a client that sends bytes of its choice, and a network that damages them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from tests.support.rpc_service import SERVICE
from wire.codec import encode
from wire.frame import Frame, FrameReader, Kind, encode_frame
from wire.message import Message, Request
from wire.rpc.handshake import encode_hello


class RawPeer:
    """A client without any manners but those of its test."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.reader = FrameReader()
        self._frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def hello(self) -> None:
        await self.send(encode_hello(SERVICE))
        assert (await self.frame()).kind == Kind.HELLO

    async def frame(self) -> Frame:
        """The next frame; EndOfStream when the server ends the connection."""
        while not self._frames:
            data = await self.stream.receive_some(1 << 16)
            if not data:
                raise trio.EndOfChannel
            at = 0
            while at < len(data):
                buffer = self.reader.buffer()
                piece = bytes(data[at : at + len(buffer)])
                buffer[: len(piece)] = piece
                self._frames += [
                    Frame(f.kind, f.method, f.request_id, f.timeout_ms, memoryview(bytes(f.body)), f.payload)
                    for f in self.reader.received(len(piece))
                ]
                at += len(piece)
        return self._frames.pop(0)


def request_frame(request: Request[Message], request_id: int, payload: bytes = b"") -> bytes:
    head = encode_frame(
        Kind.REQUEST,
        method=request.METHOD,
        request_id=request_id,
        body=encode(request),
        timeout_ms=30_000,
        payload_size=len(payload),
    )
    return head + payload


@asynccontextmanager
async def raw_peer(port: int) -> AsyncIterator[RawPeer]:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        yield RawPeer(stream)


@asynccontextmanager
async def proxy(port: int, treat: Callable[[bytes], bytes | None]) -> AsyncIterator[int]:
    """A network between client and server: `treat` returns what becomes of a piece of bytes; None cuts both sides."""

    async def pump(source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(30_000):
                treated = treat(bytes(data))
                if treated is None:
                    break
                await target.send_all(treated)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # One side has gone: the other one goes, too.
        scope.cancel()

    async def connection(client: trio.SocketStream) -> None:
        try:
            server = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            return
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(pump, client, server, nursery.cancel_scope)
            nursery.start_soon(pump, server, client, nursery.cancel_scope)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connection, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
