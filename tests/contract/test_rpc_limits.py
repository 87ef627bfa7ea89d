"""RPC with peers that are broken, slow, greedy or cut off: it stays within its bounds and serves the others."""

from __future__ import annotations

import random
from functools import partial

import pytest
import trio

from tests.support.raw_peer import proxy, raw_peer, request_frame
from tests.support.rpc_service import (
    SERVICE,
    Echo,
    Echoed,
    Hold,
    Service,
    channel_to,
    serving,
    wait_until,
)
from wire.codec import encode
from wire.errors import (
    DeadlineExceeded,
    ProtocolViolation,
    ServerOverloaded,
    StoreError,
    Unreachable,
    WrongCluster,
    WrongVersion,
)
from wire.frame import PAYLOAD_SIZE_MAX, Kind, encode_frame
from wire.rpc.client import Channel, ChannelLimits
from wire.rpc.handshake import Hello, decode_error, encode_hello
from wire.rpc.server import ServerLimits, open_listener

HELLO = encode_hello(SERVICE)
ECHO = request_frame(Echo("x"), 1)


def hello_of(service: str, low: int, high: int) -> bytes:
    return encode_frame(Kind.HELLO, method=0, request_id=0, body=encode(Hello(service, low, high)))


@pytest.mark.parametrize(
    ("sent", "told", "sentence"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", ProtocolViolation, "does not speak this protocol"),
        (b"\x16\x03\x01\x02\x00" + bytes(300), ProtocolViolation, "does not speak this protocol"),
        (HELLO[:4] + b"\x02" + HELLO[5:], ProtocolViolation, "frames of version 2"),
        (HELLO[:-1] + b"\xff", ProtocolViolation, "checksum of a message"),
        (ECHO, ProtocolViolation, "where a HELLO"),
        (HELLO + HELLO, ProtocolViolation, "where a HELLO or a REQUEST"),
        (hello_of("other", 1, 1), WrongCluster, "'test' service"),
        (hello_of(SERVICE, 2, 9), WrongVersion, "versions 2 to 9, this program 1 to 1"),
        (encode_frame(Kind.HELLO, method=0, request_id=0, body=b"\xc1"), ProtocolViolation, "not a Hello"),
        (HELLO + ECHO[:20] + b"\xff" + ECHO[21:], ProtocolViolation, "checksum of a frame's header"),
    ],
)
async def test_a_broken_peer_is_told_why_and_leaves_the_others_unharmed(
    sent: bytes, told: type[StoreError], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    async with serving(service) as port, channel_to(port) as good:
        await good.call(Echo("before"), timeout_s=5)
        async with raw_peer(port) as peer:
            await peer.send(sent)
            with trio.fail_after(5):
                frame = await peer.frame()
                if frame.kind == Kind.HELLO:
                    frame = await peer.frame()
                error = decode_error(frame)
                assert (type(error), frame.request_id) == (told, 0)
                assert sentence in error.detail
                with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
                    await peer.frame()
        assert "connection_refused" in caplog.text
        await good.call(Echo("after"), timeout_s=5)
        assert good.statistics().connections == 1
        assert service.rpc.statistics().connections_refused == 1


async def test_a_request_that_is_no_message_is_refused_alone() -> None:
    async with serving(Service()) as port, raw_peer(port) as peer:
        await peer.hello()
        await peer.send(
            encode_frame(Kind.REQUEST, method=1, request_id=5, body=b"\x91\x07") + request_frame(Echo("x"), 6)
        )
        first, second = await peer.frame(), await peer.frame()
        assert (first.kind, first.request_id, type(decode_error(first))) == (Kind.ERROR, 5, ProtocolViolation)
        assert (second.kind, second.request_id) == (Kind.REPLY, 6)


@pytest.mark.parametrize(
    "sent", [b"", HELLO[:10], HELLO + ECHO[:20], HELLO + request_frame(Echo("x"), 1, bytes(99_999))[:-1]]
)
async def test_a_peer_that_stops_in_the_middle_is_let_go(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(hello_timeout_s=0.1, frame_timeout_s=0.1, janitor_interval_s=0.02)
    service = Service(limits=limits)
    async with serving(service) as port, channel_to(port) as good, raw_peer(port) as peer:
        await good.call(Echo("x"), timeout_s=5)
        if sent:
            await peer.send(sent)
        await wait_until(lambda: "connection_stalled" in caplog.text)
        await wait_until(lambda: service.rpc.statistics().connections == 1)
        assert service.rpc.statistics().payload_bytes_held == 0
        await good.call(Echo("an idle connection is none that stalls"), timeout_s=5)
        assert good.statistics().connections == 1


async def test_a_peer_that_takes_no_replies_is_bounded_and_then_served() -> None:
    limits = ServerLimits(unsent_bytes_max=4 << 20)
    service = Service(limits=limits)
    size, count = 1 << 20, 60
    async with serving(service) as port, raw_peer(port) as peer, channel_to(port) as good:
        await peer.hello()
        await peer.send(b"".join(request_frame(Echo("x", reply_size=size), n) for n in range(count)))
        await wait_until(lambda: service.rpc.statistics().unsent_bytes >= limits.unsent_bytes_max)
        await good.call(Echo("others are served"), timeout_s=5)
        assert service.rpc.statistics().unsent_bytes <= limits.unsent_bytes_max + size + 100
        assert len(service.seen) < count
        with trio.fail_after(20):
            got = [(await peer.frame()).request_id for _ in range(count)]
        assert got == list(range(count))
        assert service.rpc.statistics().unsent_bytes == 0


async def test_a_peer_that_never_takes_its_replies_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(send_timeout_s=0.1, janitor_interval_s=0.02)
    service = Service(limits=limits)
    async with serving(service) as port, raw_peer(port) as peer:
        await peer.hello()
        await peer.send(b"".join(request_frame(Echo("x", reply_size=1 << 20), n) for n in range(60)))
        await wait_until(lambda: "no reply taken" in caplog.text)
        await wait_until(lambda: service.rpc.statistics().connections == 0)


async def test_calls_in_flight_of_one_connection_are_bounded_at_the_server() -> None:
    service = Service(limits=ServerLimits(calls_in_flight_max=4))
    async with serving(service) as port, raw_peer(port) as peer, channel_to(port) as good:
        await peer.hello()
        await peer.send(b"".join(request_frame(Hold("x"), n) for n in range(20)))
        await service.wait_held(4)
        await good.call(Echo("others are served"), timeout_s=5)
        for answered in range(20):
            assert len(service.held) <= answered + 4
            await service.wait_held(answered + 1)
            service.held[answered].reply(Echoed("x", 0))
            assert (await peer.frame()).request_id == answered


async def test_payloads_held_by_the_server_are_bounded() -> None:
    size = 1 << 20
    service = Service(limits=ServerLimits(payload_bytes_held_max=2 * size))
    async with serving(service) as port, trio.open_nursery() as nursery:
        done: list[str] = []

        async def send_one(text: str) -> None:
            async with channel_to(port) as channel:
                await channel.call(Hold(text), payload=bytes(size), timeout_s=20)
                done.append(text)

        for number in range(6):
            nursery.start_soon(send_one, str(number))
        for answered in range(6):
            await service.wait_held(answered + 1)
            assert service.rpc.statistics().payload_bytes_held <= 3 * size
            assert len(service.held) <= answered + 3
            service.held[answered].reply(Echoed("x", 0))
            await wait_until(partial(lambda count: len(done) > count, answered))
        assert service.rpc.statistics().payload_bytes_held == 0


async def test_connections_are_bounded_and_the_next_is_told() -> None:
    service = Service(limits=ServerLimits(connections_max=2))
    async with serving(service) as port, channel_to(port) as first, channel_to(port) as second:
        await first.call(Echo("x"), timeout_s=5)
        await second.call(Echo("x"), timeout_s=5)
        async with raw_peer(port) as third:
            assert type(decode_error(await third.frame())) is ServerOverloaded
        async with channel_to(port) as fourth:
            with pytest.raises(Unreachable, match="2 connections already"):
                await fourth.call(Echo("x"), timeout_s=5, retry=False)
        await first.call(Echo("x"), timeout_s=5)


async def test_callers_beyond_the_channels_bound_wait_for_their_turn() -> None:
    service = Service()
    async with serving(service) as port, channel_to(port, limits=ChannelLimits(calls_in_flight_max=3)) as channel:

        async def hold(number: int) -> None:
            await channel.call(Hold(str(number)), timeout_s=20)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(hold, number)
            for answered in range(10):
                await service.wait_held(answered + 1)
                assert channel.statistics().calls_in_flight <= 3
                service.held[answered].reply(Echoed("x", 0))
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(hold, number)
            await service.wait_held(13)
            with pytest.raises(Unreachable, match="3 calls in flight"):
                await channel.call(Echo("x"), timeout_s=0.1)
            with trio.move_on_after(0.1):
                await channel.call(Echo("x"), timeout_s=10)
            nursery.cancel_scope.cancel()
        await channel.call(Echo("x"), timeout_s=5)


@pytest.mark.parametrize("seed", range(4))
async def test_calls_survive_a_network_that_cuts_connections(seed: int) -> None:
    """Every call gets its own right answer although pieces are lost with their connections now and then."""
    chance = random.Random(seed)
    service = Service()
    sizes = [0, 100, 70_000, 300_000]

    def treat(data: bytes) -> bytes | None:
        return None if chance.random() < 0.02 else data

    limits = ChannelLimits(backoff_max_s=0.02)
    async with serving(service) as port, proxy(port, treat) as between, channel_to(between, limits=limits) as channel:

        async def ask(number: int) -> None:
            payload = bytes([number]) * sizes[number % len(sizes)]
            for turn in range(5):
                text = f"{number} {turn}"
                request = Echo(text, reply_size=-1)
                reply, back = await channel.call_for_payload(request, payload=payload, timeout_s=30)
                assert reply == Echoed(text, len(payload))
                assert back == payload

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(ask, number)
        assert channel.statistics().connections > 1
        assert channel.statistics().resent > 0


@pytest.mark.parametrize("seed", range(4))
async def test_flipped_bits_never_reach_a_caller(seed: int) -> None:
    """Without payloads everything is under a checksum: a flip costs the connection, never a wrong answer."""
    chance = random.Random(seed)
    service = Service()

    def treat(data: bytes) -> bytes | None:
        damaged = bytearray(data)
        if chance.random() < 0.1:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        return bytes(damaged)

    limits = ChannelLimits(backoff_max_s=0.02, connect_timeout_s=0.3)
    async with serving(service) as port, proxy(port, treat) as between, channel_to(between, limits=limits) as channel:
        for number in range(60):
            text = f"{number} " + "text" * chance.randrange(30)
            try:
                assert await channel.call(Echo(text), timeout_s=1) == Echoed(text, 0)
            except StoreError:
                continue  # A flipped size makes the other end wait for the rest until the time is over.
        seen = {request.text.split()[0] for request in service.seen}
        assert seen <= {str(number) for number in range(60)}
        assert len(seen) > 30


async def test_a_connection_that_has_fallen_silent_is_replaced() -> None:
    """But not one that was merely idle before a call with little time."""
    service = Service()
    limits = ChannelLimits(silence_max_s=0.1)
    async with serving(service) as port, channel_to(port, limits=limits) as channel:
        await channel.call(Echo("x"), timeout_s=5)
        await trio.sleep(0.15)
        with pytest.raises(DeadlineExceeded):
            await channel.call(Hold("x"), timeout_s=0.02)
        await channel.call(Echo("x"), timeout_s=5)
        assert channel.statistics().connections == 1
        with pytest.raises(DeadlineExceeded):
            await channel.call(Hold("x"), timeout_s=0.2)
        await channel.call(Echo("x"), timeout_s=5)
        assert channel.statistics().connections == 2


async def test_a_name_that_is_no_host_is_unreachable() -> None:
    async with trio.open_nursery() as nursery:
        for name in ("a..b", "x" * 100, "name.invalid"):
            channel = Channel(name, 1, service=SERVICE)
            await nursery.start(channel.run)
            with pytest.raises(Unreachable):
                await channel.call(Echo("x"), timeout_s=10, retry=False)
        nursery.cancel_scope.cancel()


async def test_a_payload_above_the_bound_is_a_bug_of_the_caller_and_harms_nobody() -> None:
    async with serving(Service()) as port, channel_to(port) as channel:
        await channel.call(Echo("x"), timeout_s=5)
        with pytest.raises(AssertionError):
            await channel.call(Echo("x"), payload=bytes(PAYLOAD_SIZE_MAX + 1), timeout_s=5)
        await channel.call(Echo("x"), payload=bytes(PAYLOAD_SIZE_MAX), timeout_s=5)
        assert channel.statistics().calls_in_flight == 0


async def test_a_taken_port_is_told_by_its_address() -> None:
    async with serving(Service()) as port:
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: another process listens there"):
            await open_listener("127.0.0.1", port)
