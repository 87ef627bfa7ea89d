"""RPC over real loopback sockets: what callers and services may rely on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

import pytest
import trio

from tests.support.rpc_service import (
    SERVICE,
    Echo,
    Echoed,
    Fail,
    Hold,
    Service,
    Unknown,
    channel_to,
    run_channel,
    serving,
    wait_until,
)
from wire.checksum import Buffer
from wire.errors import (
    DeadlineExceeded,
    NoSuchEntry,
    OutcomeUnknown,
    StoreError,
    UnknownMethod,
    Unreachable,
    WrongCluster,
)
from wire.rpc.client import Channel
from wire.rpc.server import Call

Payload = Buffer | Sequence[Buffer]


def call_text(call: Call) -> Echoed:
    """The answer to a Hold."""
    assert isinstance(call.request, Hold)
    return Echoed(call.request.text, 0)


async def nursery_channel(nursery: trio.Nursery, port: int) -> Channel:
    """A channel that outlives its server."""
    channel = Channel("127.0.0.1", port, service=SERVICE)
    await nursery.start(run_channel, channel)
    return channel


async def test_a_request_gets_its_reply() -> None:
    async with serving(Service()) as port, channel_to(port) as channel:
        assert await channel.call(Echo("hello"), timeout_s=5) == Echoed("hello", 0)


async def test_many_requests_share_one_connection_and_get_their_own_replies() -> None:
    service = Service()
    got: dict[int, str] = {}
    async with serving(service) as port, channel_to(port) as channel:

        async def ask(number: int) -> None:
            got[number] = (await channel.call(Echo(str(number)), timeout_s=10)).text

        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(ask, number)
        assert service.rpc.statistics().connections_accepted == 1
    assert got == {number: str(number) for number in range(500)}


async def test_replies_may_come_in_any_order() -> None:
    service, order = Service(), []
    async with serving(service) as port, channel_to(port) as channel:

        async def ask(text: str) -> None:
            order.append((await channel.call(Hold(text), timeout_s=10)).text)

        async with trio.open_nursery() as nursery:
            for count, text in enumerate("abc"):
                nursery.start_soon(ask, text)
                await service.wait_held(count + 1)
            for count, call in enumerate(reversed(service.held)):
                call.reply(call_text(call))
                await wait_until(partial(lambda wanted: len(order) > wanted, count))
    assert order == ["c", "b", "a"]


@pytest.mark.parametrize("size", [0, 1, 4096, 65_500, 65_536, 200_000, 4 << 20])
async def test_payloads_arrive_whole_in_both_directions(size: int) -> None:
    data = os.urandom(size)
    async with serving(Service()) as port, channel_to(port) as channel:
        payloads: list[Payload] = [data, [data[:10], memoryview(data)[10:]]]
        for payload in payloads:
            reply, back = await channel.call_for_payload(Echo("x", reply_size=-1), payload=payload, timeout_s=10)
            assert reply.payload_size == size
            assert back == data


async def test_an_error_keeps_its_class_and_detail_and_the_connection_lives_on() -> None:
    service = Service()
    async with serving(service) as port, channel_to(port) as channel:
        with pytest.raises(NoSuchEntry, match="no file x"):
            await channel.call(Fail(NoSuchEntry.code, "no file x"), timeout_s=5)
        with pytest.raises(UnknownMethod):
            await channel.call(Unknown(), timeout_s=5)
        await channel.call(Echo("still there"), timeout_s=5)
        assert service.rpc.statistics().connections_accepted == 1


async def test_a_bug_in_a_handler_is_an_error_of_that_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Service()) as port, channel_to(port) as channel:
        with pytest.raises(StoreError) as caught:
            await channel.call(Fail(0, ""), timeout_s=5)
        assert type(caught.value) is StoreError
        assert "handler_failed" in caplog.text
        await channel.call(Echo("still there"), timeout_s=5)


async def test_a_call_without_an_answer_ends_at_its_deadline() -> None:
    service = Service()
    async with serving(service) as port, channel_to(port) as channel:
        begun = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            await channel.call(Hold("x"), timeout_s=0.1)
        assert 0.09 < trio.current_time() - begun < 2
        assert 0 < service.held[0].deadline - begun < 0.2
        service.held[0].reply(Echoed("too late", 0))
        assert (await channel.call(Echo("next"), timeout_s=5)).text == "next"
        assert channel.statistics().dropped_replies == 1


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    service = Service()
    async with serving(service) as port, channel_to(port) as channel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: channel.call(Hold("x"), timeout_s=30))
            await service.wait_held(1)
            nursery.cancel_scope.cancel()
        assert channel.statistics().calls_in_flight == 0
        service.held[0].reply(Echoed("nobody listens", 0))
        assert (await channel.call(Echo("next"), timeout_s=5)).text == "next"


async def test_a_call_survives_a_restart_of_the_server() -> None:
    first, second = Service(), Service()
    async with trio.open_nursery() as nursery:
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(serving(first))
            channel = await nursery_channel(nursery, port)
            got: list[str] = []

            async def ask() -> None:
                got.append((await channel.call(Hold("x"), timeout_s=20)).text)

            nursery.start_soon(ask)
            await first.wait_held(1)
        async with serving(second, port):
            await second.wait_held(1)
            second.held[0].reply(Echoed("answered by the second", 0))
            await wait_until(lambda: bool(got))
        assert got == ["answered by the second"]
        nursery.cancel_scope.cancel()


async def test_without_retry_a_broken_connection_is_told_at_once() -> None:
    service = Service()
    async with trio.open_nursery() as nursery:
        async with serving(service) as port:
            channel = await nursery_channel(nursery, port)
            errors: list[StoreError] = []

            async def ask() -> None:
                try:
                    await channel.call(Hold("x"), timeout_s=20, retry=False)
                except StoreError as error:
                    errors.append(error)

            nursery.start_soon(ask)
            await service.wait_held(1)
        await wait_until(lambda: bool(errors))
        assert type(errors[0]) is OutcomeUnknown
        begun = trio.current_time()
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
            await channel.call(Echo("x"), timeout_s=20, retry=False)
        with pytest.raises(Unreachable):
            await channel.call(Echo("x"), timeout_s=0.2)
        assert trio.current_time() - begun < 5
        nursery.cancel_scope.cancel()


async def test_the_wrong_service_is_refused_with_a_sentence() -> None:
    async with serving(Service()) as port, channel_to(port, service="block") as channel:
        with pytest.raises(WrongCluster, match="'test' service"):
            await channel.call(Echo("x"), timeout_s=5)


async def test_an_address_that_now_is_another_instances_is_refused() -> None:
    """Else a client of one cluster might write into another one that took over the port."""
    async with serving(Service(instance="cluster b")) as port:
        for expected, is_right in (("cluster a", False), ("cluster b", True), ("", True)):
            async with channel_to(port, instance=expected) as channel:
                if is_right:
                    await channel.call(Echo("x"), timeout_s=5)
                    continue
                with pytest.raises(WrongCluster, match="cluster a"):
                    await channel.call(Echo("x"), timeout_s=5)
    service = Service()
    async with serving(service) as port, channel_to(port, instance="cluster a") as channel:
        await channel.call(Echo("a service that does not say who it is may be the one"), timeout_s=5)


async def test_an_overloaded_server_is_asked_again() -> None:
    service = Service(overloads_left=3)
    async with serving(service) as port, channel_to(port) as channel:
        assert (await channel.call(Echo("x"), timeout_s=5)).text == "x"
        assert len(service.seen) == 4
