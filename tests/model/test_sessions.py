"""Clients, a lossy, duplicating and delaying network, and the session table, in random orders on a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from metadata.core.schema import SessionRecord
from metadata.core.sessions import Opening, SessionTable
from metadata.protocol import OpenSession, RenewSession
from wire.errors import SessionExpired

LEASE_S = 20.0
WATCH_S = 15.0


@dataclass
class Client:
    """What a mount does, as metadata/client.py, without waiting."""

    place: bytes
    session: int = 0
    acts_alone: bool = False
    turn: int = 0
    lease_from_s: float = 0.0
    waits_for: RenewSession | None = None  # The one renewal under way.
    sent_s: float = 0.0
    opening: Opening | None = None

    def watch(self, now_s: float) -> None:
        if now_s - self.lease_from_s >= WATCH_S:
            self.acts_alone = False


@dataclass
class World:
    """The table, its clients, and every renewal ever sent: each may arrive at any time, any number of times."""

    table: SessionTable = field(default_factory=lambda: SessionTable(LEASE_S))
    clients: list[Client] = field(default_factory=lambda: [Client(b"%d" % n) for n in range(3)])
    wire: list[tuple[Client, RenewSession]] = field(default_factory=list)
    now_s: float = 1000.0
    last_session: int = 0

    def begin_opening(self, client: Client) -> None:
        if client.opening is None:
            client.acts_alone, client.session, client.waits_for = False, 0, None  # A new daemon.
            client.opening = self.table.begin_opening(OpenSession("c", "boot", client.place))

    def maybe_admit(self, client: Client) -> None:
        opening = client.opening
        if opening is None or self.table.waits_for(opening):
            return
        assert not any(other.acts_alone for other in self.clients), "admitted while another acts alone"
        self.last_session += 1
        record = SessionRecord("c", "boot", client.place, "", 1, 0)
        session = self.table.admit(opening, self.last_session, record, now_s=self.now_s)
        self.table.abandon(opening)
        client.opening = None
        client.session = self.last_session
        client.acts_alone, client.turn = self.table.tell(session, now_s=self.now_s)
        client.lease_from_s = self.now_s

    def send(self, client: Client) -> None:
        if client.session:
            client.waits_for = RenewSession(client.session, 0, client.acts_alone, 0, client.turn)
            client.sent_s = self.now_s
            self.wire.append((client, client.waits_for))

    def arrive(self, index: int, *, answer_arrives: bool) -> None:
        if not self.wire:
            return
        client, request = self.wire[index % len(self.wire)]
        try:
            session = self.table.renew(request, now_s=self.now_s)
        except SessionExpired:
            if client.waits_for is request and answer_arrives:
                client.session, client.acts_alone, client.waits_for = 0, False, None
            return
        alone, turn = self.table.tell(session, now_s=self.now_s)
        if client.waits_for is request and answer_arrives:
            client.waits_for, client.acts_alone, client.turn = None, alone, turn
            client.lease_from_s = client.sent_s
            client.watch(self.now_s)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for client in self.clients:
            client.watch(self.now_s)
        for session in self.table.expire(now_s=self.now_s):
            self.table.ended(session.number)

    def restart(self) -> None:
        """The service was killed: connections and openings are gone, durable records come back."""
        records = [(number, session.record) for number, session in self.table.live.items()]
        self.table = SessionTable(LEASE_S)
        self.table.restore(records, now_s=self.now_s)
        self.wire.clear()
        for client in self.clients:
            client.opening = None
            if client.waits_for is not None:  # It asks again over a new connection.
                self.wire.append((client, client.waits_for))

    def check(self) -> None:
        alone = [client for client in self.clients if client.acts_alone]
        assert len(alone) <= 1
        for client in alone:
            assert set(self.table.live) <= {client.session} | {
                n for n, s in self.table.live.items() if s.place == (("boot"), client.place)
            }


steps = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 2)),
    st.tuples(st.just("admit"), st.integers(0, 2)),
    st.tuples(st.just("send"), st.integers(0, 2)),
    st.tuples(st.just("arrive"), st.integers(0, 30)),
    st.tuples(st.just("arrive"), st.integers(-3, -1)),
    st.tuples(st.just("answer lost"), st.integers(0, 30)),
    st.tuples(st.just("advance"), st.integers(1, 12)),
    st.tuples(st.just("restart"), st.just(0)),
)


@given(st.lists(steps, max_size=60))
def test_nobody_acts_alone_beside_another_session(script: list[tuple[str, int]]) -> None:
    world = World()
    for step, number in script:
        match step:
            case "open":
                world.begin_opening(world.clients[number])
            case "admit":
                world.maybe_admit(world.clients[number])
            case "send":
                world.send(world.clients[number])
            case "arrive":
                world.arrive(number, answer_arrives=True)
            case "answer lost":
                world.arrive(number, answer_arrives=False)
            case "advance":
                world.advance(number)
            case "restart":
                world.restart()
        world.check()


@given(st.lists(steps, max_size=40), st.integers(0, 2))
def test_an_opening_never_waits_longer_than_one_lease(script: list[tuple[str, int]], number: int) -> None:
    world = World()
    for step, n in script:
        if step == "open":
            world.begin_opening(world.clients[n])
        elif step == "admit":
            world.maybe_admit(world.clients[n])
        elif step == "send":
            world.send(world.clients[n])
        elif step == "arrive":
            world.arrive(n, answer_arrives=True)
    world.begin_opening(world.clients[number])
    world.advance(LEASE_S)
    world.maybe_admit(world.clients[number])
    assert world.clients[number].session in world.table.live
