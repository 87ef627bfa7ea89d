"""Sessions that open, close, remove, end and restart in random orders: an inode lives as long as somebody uses it.

The model knows two sets for each file: its names, and the sessions that have it open.  The store goes through the
transactions of the group commit: some are aborted after they ran, and the service is started again now and then, which
loses the table of opens; each session then tells what it has open when its turn comes.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import pytest

from metadata.core import schema
from metadata.core.dispatch import open_inode, register_opens
from metadata.core.exactly_once import apply_once
from metadata.core.fsck import check
from metadata.core.namespace import held
from metadata.core.namespace.inodes import destroy
from metadata.core.opens import UNTOLD, Opens
from metadata.core.reclaim import end_session
from metadata.core.schema import ROOT_INO
from metadata.engine.ports import WriteTxn
from metadata.group_commit import Newest
from metadata.protocol import Create, GetLayout, Link, Mutation, RegisterOpens, ReleaseInode, Removed, Rename, Unlink
from tests.support.effort import EFFORT
from tests.support.store import Store
from wire.errors import EntryExists, NoSuchEntry
from wire.message import Message

STEPS = 300
NAMES = [b"a", b"b", b"c"]
FIRST_SESSIONS = 3


@dataclass
class Mount:
    """What a mount knows itself."""

    opened: Counter[int] = field(default_factory=Counter)  # Handles by inode.
    closed: set[int] = field(default_factory=set)  # The service is still to be told.
    sequence: int = 0
    knows_restart: bool = True


class Aborted(Exception):
    """The transaction is not committed."""


class World:
    """The service and its mounts; every step is one transaction."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = Store()
        self.opens = Opens()
        self.newest = Newest()
        self.mounts = {number: Mount() for number in range(1, FIRST_SESSIONS + 1)}
        self.next_session = FIRST_SESSIONS + 1
        self.names: dict[bytes, int] = {}
        self.seen: Counter[str] = Counter()

    # --- the group commit ---

    def once(self, request: Mutation[Message]) -> Message | Exception:
        """Through apply_once, with an abort before it now and then; the reply or the refusal."""
        engine, self.store.now_ns = self.store.engine, self.store.now_ns + 1
        for is_last in (*([False] if self.chance.random() < 0.1 else []), True):
            with engine.write() as txn:
                got = apply_once(txn, request, newest=self.newest, now_ns=self.store.now_ns, opens=self.opens)
                if is_last:
                    txn.commit()
                    self.newest.committed()
                    self.opens.committed()
                else:
                    txn.abort()
                    self.newest.aborted()
                    self.opens.aborted()
        if isinstance(got, bytes):
            return msgspec.msgpack.decode(got, type=request.REPLY)
        return got

    def change(self, session: int, request: Mutation[Message]) -> Message | Exception:
        """A mutation whose answer may be lost, so that it is sent again, to a service that may be another by then."""
        reply = self.once(request)
        if self.chance.random() < 0.1:
            if self.chance.random() < 0.3:
                self.restart()
            self.seen["retry"] += 1
            again = self.once(request)
            assert type(again) is type(reply)
        return reply

    def sequence(self, session: int) -> int:
        self.mounts[session].sequence += 1
        return self.mounts[session].sequence

    # --- steps ---

    def pick(self) -> tuple[int, Mount, bytes]:
        session = self.chance.choice(sorted(self.mounts))
        return session, self.mounts[session], self.chance.choice(NAMES)

    def create(self) -> None:
        session, mount, name = self.pick()
        request = Create(session, self.sequence(session), ROOT_INO, name, 0o644, True, open=True)
        reply = self.change(session, request)
        if name in self.names:
            assert isinstance(reply, EntryExists)
            return
        assert isinstance(reply, Create.REPLY)
        ino: int = reply.ino  # type: ignore[attr-defined]
        self.names[name] = ino
        mount.opened[ino] += 1

    def open(self) -> None:
        """By the number that the kernel has from a look-up, or from another descriptor."""
        session, mount, _ = self.pick()
        inos = [*self.names.values(), *mount.opened, *range(2, 6)]
        ino = self.chance.choice(inos)
        if ino in mount.closed and self.chance.random() < 0.5:
            self.tell_closes(session)
        mount.closed.discard(ino)
        self.store.now_ns += 1
        with self.store.engine.write() as txn:
            try:
                reply = open_inode(txn, GetLayout(session, ino, open=True), opens=self.opens, now_ns=self.store.now_ns)
            except NoSuchEntry:
                assert ino not in self.alive()
                return
            txn.commit()
            self.opens.committed()
        assert reply.inode.nlink == list(self.names.values()).count(ino)  # type: ignore[attr-defined]
        mount.opened[ino] += 1
        self.seen["open without a name"] += ino not in self.names.values()

    def close(self) -> None:
        _, mount, _ = self.pick()
        if mount.opened:
            ino = self.chance.choice(sorted(mount.opened))
            mount.opened[ino] -= 1
            if not mount.opened[ino]:
                del mount.opened[ino]
                mount.closed.add(ino)

    def tell_closes(self, session: int | None = None) -> None:
        session = self.pick()[0] if session is None else session
        mount = self.mounts[session]
        if mount.closed:
            request = ReleaseInode(session, self.sequence(session), inos=tuple(sorted(mount.closed)))
            assert isinstance(self.change(session, request), ReleaseInode.REPLY)
            mount.closed.clear()

    def lost_a_name(self, session: int, removed: Removed, closed_ino: int) -> None:
        mount = self.mounts[session]
        if removed.ino and removed.nlink == 0:
            assert removed.held or removed.ino == closed_ino
            if removed.held and removed.ino not in mount.opened:
                mount.closed.add(removed.ino)

    def closed_ino(self, mount: Mount, name: bytes) -> int:
        """What a mount says of a name: it may not know it, or be wrong."""
        ino = self.chance.choice([self.names.get(name, 0), 0, 3])
        return 0 if ino in mount.opened else ino

    def unlink(self) -> None:
        session, mount, name = self.pick()
        closed_ino = self.closed_ino(mount, name)
        reply = self.change(session, Unlink(session, self.sequence(session), ROOT_INO, name, closed_ino))
        if name not in self.names:
            assert isinstance(reply, NoSuchEntry)
            return
        assert isinstance(reply, Removed)
        assert reply.ino == self.names.pop(name)
        self.lost_a_name(session, reply, closed_ino)

    def rename(self) -> None:
        session, mount, name = self.pick()
        new_name = self.chance.choice(NAMES)
        closed_ino = self.closed_ino(mount, new_name)
        request = Rename(session, self.sequence(session), ROOT_INO, name, ROOT_INO, new_name, closed_ino=closed_ino)
        reply = self.change(session, request)
        if name not in self.names:
            assert isinstance(reply, NoSuchEntry)
            return
        assert isinstance(reply, Rename.REPLY)
        if self.names.get(new_name) == self.names[name]:
            return
        self.names[new_name] = self.names.pop(name)
        self.lost_a_name(session, reply.removed, closed_ino)  # type: ignore[attr-defined]

    def link(self) -> None:
        session, _, name = self.pick()
        new_name = self.chance.choice(NAMES)
        if name in self.names and new_name not in self.names:
            request = Link(session, self.sequence(session), self.names[name], ROOT_INO, new_name)
            assert isinstance(self.change(session, request), Link.REPLY)
            self.names[new_name] = self.names[name]

    def end(self) -> None:
        """A session ends; another one comes."""
        if self.chance.random() < 0.3:
            session = self.pick()[0]
            del self.mounts[session]
            self.opens.forget(session)
            self.clean_up_after(session)
            self.let_go_of_untold()
            self.mounts[self.next_session] = Mount()
            self.next_session += 1

    def restart(self) -> None:
        """The service is started again: its memory is gone."""
        self.opens, self.newest = Opens(unreclaimed=self.mounts), Newest()
        for mount in self.mounts.values():
            mount.knows_restart = False
        self.seen["restart"] += 1

    def tell_opens(self) -> None:
        session, mount, _ = self.pick()
        if mount.knows_restart and self.chance.random() < 0.9:
            return
        mount.knows_restart = True
        inos = sorted({*mount.opened, *mount.closed})
        middle = len(inos) // 2
        for page, complete in ((inos[:middle], False), (inos[middle:], True)):
            with self.store.engine.write() as txn:
                request = RegisterOpens(session, tuple(page), complete)
                register_opens(txn, request, opens=self.opens, now_ns=self.store.now_ns)
                txn.commit()
                self.opens.committed()
        self.let_go_of_untold()

    def let_go_of_untold(self) -> None:
        """As the service does when the last session has told or ended."""
        if not self.opens.unreclaimed:
            self.clean_up_after(UNTOLD)

    def clean_up_after(self, session: int) -> None:
        over = False
        while not over:
            with self.store.engine.write() as txn:
                over = end_session(txn, session, now_ns=self.store.now_ns)
                txn.commit()

    def maybe_restart(self) -> None:
        if self.chance.random() < 0.2:
            self.restart()

    # --- what must be so ---

    def alive(self) -> set[int]:
        """Inodes that the model says exist; those of closes that are not told yet may exist."""
        with self.store.engine.read() as txn:
            return {ino for ino in range(2, 200) if txn.get(schema.inode_key(ino)) is not None}

    def check(self) -> None:
        alive = self.alive()
        opened = {ino for mount in self.mounts.values() for ino in mount.opened}
        wanted = set(self.names.values()) | opened
        assert wanted <= alive, f"inodes {wanted - alive} are used and gone"
        self.seen["held"] += bool(opened - set(self.names.values()))
        if all(not mount.closed and mount.knows_restart for mount in self.mounts.values()):
            assert alive == wanted, f"inodes {alive - wanted} are of no use"
            self.seen["exact"] += 1
        with self.store.engine.read() as txn:
            assert check(txn) == []


def run(seed: int) -> Counter[str]:
    world = World(seed)
    steps = [world.create, world.open, world.open, world.close, world.close, world.tell_closes, world.tell_closes]
    steps += [world.unlink, world.unlink, world.rename, world.link, world.end, world.tell_opens, world.tell_opens]
    steps += [world.tell_opens, world.maybe_restart]
    for _ in range(STEPS):
        world.chance.choice(steps)()
        world.check()
    return world.seen


def test_an_inode_lives_as_long_as_somebody_uses_it() -> None:
    seen = sum((run(seed) for seed in range(10 * EFFORT)), Counter[str]())
    for what in ("held", "exact", "retry", "restart", "open without a name"):
        assert seen[what] > 10, f"the test has hardly seen: {what}"


# --- the net, proven once ---------------------------------------------------------------------------------------------


def caught(seeds: range) -> bool:
    for seed in seeds:
        try:
            run(seed)
        except AssertionError:
            return True
    return False


def test_an_end_of_an_inode_that_another_holds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def let_go(txn: WriteTxn, ino: int, *, session: int, now_ns: int) -> None:
        if txn.delete(schema.held_key(session, ino)):
            destroy(txn, ino, now_ns=now_ns)

    monkeypatch.setattr(held, "let_go", let_go)
    assert caught(range(10))


def test_an_unlink_that_asks_nobody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opens, "of_inode", lambda self, ino, asking: set())
    assert caught(range(10))


def test_a_restart_that_takes_all_for_closed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "restart", lambda self: setattr(self, "opens", Opens()))
    assert caught(range(10))
