"""Notices: what a server tells its client unasked, over real loopback sockets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from tests.support.raw_peer import raw_peer, request_frame
from tests.support.rpc_service import (
    Echo,
    Echoed,
    Hold,
    News,
    OtherNews,
    Service,
    channel_to,
    serving,
    wait_until,
)
from wire.codec import decode
from wire.errors import DeadlineExceeded
from wire.frame import Kind
from wire.message import Notice, notice_table
from wire.rpc.server import Call, Line, ServerLimits


def text_of(notice: Notice) -> str:
    assert isinstance(notice, News)
    return notice.text


async def held_line(service: Service, ask: Callable[[], Awaitable[object]], nursery: trio.Nursery) -> tuple[Call, Line]:
    """A call that is under way, and its connection."""
    nursery.start_soon(ask)
    await service.wait_held(1)
    call = service.held[0]
    return call, call.line


async def test_notices_arrive_in_order_among_the_answers() -> None:
    """Some are sent while a batch is handled, some outside of one, some after the answer of the call they came by."""
    service, heard = Service(), []
    async with (
        serving(service) as port,
        channel_to(port, on_notice=lambda notice: heard.append(text_of(notice))) as channel,
        trio.open_nursery() as nursery,
    ):
        ask = partial(channel.call, Hold("x"), timeout_s=10)
        call, line = await held_line(service, partial(ask), nursery)
        assert line.notify(News("first"))
        call.reply(Echoed("x", 0))
        assert line.notify(News("second"))
        await channel.call(Echo("y"), timeout_s=5)
        assert heard == ["first", "second"]
        for number in range(500):
            line.notify(News(str(number)))
        await wait_until(lambda: len(heard) == 502)
        assert heard[2:] == [str(number) for number in range(500)]
        assert service.rpc.statistics().notices == 502
        assert line.is_open
        assert line.number == 1


async def test_a_notice_that_a_client_does_not_know_is_passed_over() -> None:
    service, heard = Service(), []
    async with (
        serving(service) as port,
        channel_to(port, on_notice=lambda notice: heard.append(text_of(notice))) as channel,
        trio.open_nursery() as nursery,
    ):
        call, line = await held_line(service, partial(channel.call, Hold("x"), timeout_s=10), nursery)
        assert line.notify(OtherNews())
        assert line.notify(News("known"))
        call.reply(Echoed("x", 0))
        await wait_until(lambda: heard == ["known"])
        assert channel.statistics().connections == 1


async def test_a_notice_to_a_peer_that_has_gone_is_refused() -> None:
    service = Service()
    async with serving(service) as port:
        async with raw_peer(port) as peer:
            await peer.hello()
            await peer.send(request_frame(Hold("x"), 1))
            await service.wait_held(1)
            line = service.held[0].line
        await wait_until(lambda: not line.is_open)
        assert not line.notify(News("too late"))


async def test_notices_to_a_peer_that_reads_nothing_stay_within_a_bound() -> None:
    """It is told by False, and the notices taken before arrive in order when it reads again."""
    service = Service(limits=ServerLimits(notice_behind_bytes_max=10_000))
    async with serving(service) as port, raw_peer(port) as peer:
        await peer.hello()
        await peer.send(request_frame(Hold("x"), 1))
        await service.wait_held(1)
        line, taken = service.held[0].line, 0
        while line.notify(News("n" * 1000)):
            taken += 1
            if taken % 10 == 0:
                await trio.lowlevel.checkpoint()  # The flusher's turn.
            assert taken < 100_000
        assert service.rpc.statistics().unsent_bytes < 12_000
        for _ in range(taken):
            frame = await peer.frame()
            assert (frame.kind, frame.method, frame.request_id) == (Kind.NOTICE, News.NOTICE, 0)
            assert decode(News, frame.body).text == "n" * 1000
        await wait_until(lambda: line.notify(News("again")))


async def test_bytes_that_are_not_the_notice_they_should_be_end_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class NotNews(Notice, frozen=True, array_like=True):
        NOTICE = News.NOTICE
        number: int

    service = Service()
    async with serving(service) as port, channel_to(port) as channel, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(DeadlineExceeded):
                await channel.call(Hold("x"), timeout_s=0.5)

        _, line = await held_line(service, ask, nursery)
        assert line.notify(NotNews(7))
        await wait_until(lambda: channel.statistics().connections == 2)
        assert not line.is_open
        assert "connection_ended" in caplog.text


def test_numbers_of_notices_are_used_once() -> None:
    with pytest.raises(AssertionError, match="News: notice number taken"):
        notice_table([News, News])
