"""Clients, a lossy, duplicating and delaying network, and the session table, in random orders on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from metadata.core.schema import SessionRecord
from metadata.core.sessions import Opening, Session, SessionTable
from metadata.protocol import OpenSession, RenewSession
from wire.errors import SessionExpired

STEPS = 10_000
COPIES_KEPT = 12
"""Renewals that may still arrive, again too."""
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
    is_being_admitted: bool = False

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

    def give_up(self, client: Client) -> None:
        if client.opening is not None:
            self.table.abandon(client.opening)
            client.opening, client.is_being_admitted = None, False

    def close(self, client: Client) -> None:
        if client.session:
            client.acts_alone = False
            self.table.end(client.session)
            self.table.ended(client.session)
            client.session, client.waits_for = 0, None

    def begin_admission(self, client: Client) -> None:
        """The last look at whom the opening waits for; its record is being made durable from now on."""
        opening = client.opening
        if opening is not None and not self.table.waits_for(opening):
            client.is_being_admitted = True

    def admit(self, client: Client) -> None:
        opening = client.opening
        if opening is None or not client.is_being_admitted:
            return
        assert not any(other.acts_alone for other in self.clients), "admitted while another acts alone"
        self.last_session += 1
        record = SessionRecord("c", "boot", client.place, "", 1, 0)
        session = self.table.admit(opening, self.last_session, record, now_s=self.now_s)
        self.give_up(client)
        client.session = self.last_session
        client.acts_alone, client.turn = self.table.tell(session, now_s=self.now_s)
        client.lease_from_s = self.now_s

    def renew(self, client: Client) -> None:
        """As it mostly goes."""
        if client.session:
            self.send(client)
            self.arrive(-1, answer_arrives=True)

    def send(self, client: Client) -> None:
        if client.session:
            client.waits_for = RenewSession(client.session, 0, client.acts_alone, 0, client.turn)
            client.sent_s = self.now_s
            self.wire.append((client, client.waits_for))
            del self.wire[:-COPIES_KEPT]

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
        self.table = type(self.table)(LEASE_S)
        self.table.restore(records, now_s=self.now_s)
        self.wire.clear()
        for client in self.clients:
            client.opening, client.is_being_admitted = None, False
            if client.waits_for is not None:  # It asks again over a new connection.
                self.wire.append((client, client.waits_for))

    def check(self) -> None:
        alone = [client for client in self.clients if client.acts_alone]
        assert len(alone) <= 1, "two act alone"
        for client in alone:
            assert {session.place for session in self.table.live.values()} <= {("boot", client.place)}, "acts alone"


def step(world: World, chance: random.Random) -> None:
    """One thing that may happen; those that end a session are rare, so that there is much to be told."""
    client = chance.choice(world.clients)
    happenings: list[tuple[float, Callable[[], None]]] = [
        (2 if client.session == 0 else 0.1, lambda: world.begin_opening(client)),
        (4, lambda: world.begin_admission(client)),
        (4, lambda: world.admit(client)),
        (0.3, lambda: world.give_up(client)),
        (8, lambda: world.renew(client)),
        (1, lambda: world.send(client)),
        (4, lambda: world.arrive(chance.randrange(-COPIES_KEPT, 0), answer_arrives=True)),
        (1, lambda: world.arrive(-1, answer_arrives=False)),
        (0.7, lambda: world.close(client)),
        (1, lambda: world.advance(chance.randint(1, 6))),
        (0.05, world.restart),
    ]
    weights, calls = zip(*happenings, strict=True)
    chance.choices(calls, weights)[0]()
    world.check()


def walk(table: type[SessionTable], seed: int) -> World:
    world, chance = World(table(LEASE_S)), random.Random(seed)
    for _ in range(STEPS):
        step(world, chance)
    return world


@pytest.mark.parametrize("seed", range(4))
def test_nobody_acts_alone_beside_another_session(seed: int) -> None:
    world = walk(SessionTable, seed)
    assert world.last_session > STEPS / 100, "the walk has gone nowhere"


class IgnoresTurns(SessionTable):
    """The planted bug: a delayed copy of an older renewal counts as an acknowledgement."""

    def renew(self, request: RenewSession, *, now_s: float) -> Session:
        session = super().renew(request, now_s=now_s)
        session.may_act_alone = request.alone
        return session


class TellsTooEarly(SessionTable):
    """The planted bug: a session is told that it is alone while another is being opened."""

    def is_alone(self, session: Session) -> bool:
        return len(self.live) == 1


@pytest.mark.parametrize("table", [IgnoresTurns, TellsTooEarly])
@pytest.mark.parametrize("seed", range(2))
def test_the_walk_catches_a_planted_bug(table: type[SessionTable], seed: int) -> None:
    with pytest.raises(AssertionError, match=r"acts? alone"):
        walk(table, seed)


@pytest.mark.parametrize("seed", range(4))
def test_an_opening_never_waits_longer_than_one_lease(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(30):
        world = World()
        for _ in range(100):
            step(world, chance)
        client = chance.choice(world.clients)
        world.give_up(client)
        world.begin_opening(client)
        world.advance(LEASE_S)
        world.begin_admission(client)
        world.admit(client)
        assert client.session in world.table.live
