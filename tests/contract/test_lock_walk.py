"""Programs on mounts that come and go lock at random, while the service is restarted and sessions are lost.

Each program notes what it believes to hold: from the moment a request has succeeded until it begins to unlock.  Beliefs
must never conflict.  At the end, when all have let go and the last restart is over, everybody can have everything.
"""

from __future__ import annotations

import itertools
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from fsd.frontend.ports import FileLock
from fsd.locks import Mode
from metadata.core.locks import LAST_BYTE, LockKind
from metadata.lock_keeper import LockKeeper
from tests.contract.test_lock_mounts import Mount, eventually, listed, mount
from tests.support.file_system import soon
from tests.support.inode_service import Service, running_service
from wire.errors import Deadlock, WouldBlock

READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
BLOCKS = 6
MOUNTS = 3
PROGRAMS = 3
"""On each mount."""
STEPS = 40


class Belief(NamedTuple):
    """What a program thinks that it holds."""

    flock: bool
    kind: LockKind
    start: int
    end: int

    def conflicts(self, other: Belief) -> bool:
        return (
            self.flock == other.flock
            and self.start <= other.end
            and other.start <= self.end
            and WRITE in (self.kind, other.kind)
        )


@dataclass
class World:
    """All that is believed."""

    service: Service
    chance: random.Random
    beliefs: dict[int, set[Belief]] = field(default_factory=dict)  # By program.
    grants: int = 0
    refusals: int = 0
    circles: int = 0
    cancelled: int = 0

    def believe(self, program: int, belief: Belief) -> None:
        for other, held in self.beliefs.items():
            conflicting = [one for one in held if other != program and one.conflicts(belief)]
            assert not conflicting, f"{program} got {belief}, and {other} holds {conflicting}"
        self.beliefs.setdefault(program, set()).add(belief)
        self.grants += 1


numbers = itertools.count(1)


async def program(world: World, one: Mount, steps: int) -> None:
    """One process: it locks blocks, or the whole file by flock, and lets all go before it ends."""
    number = next(numbers)
    chance = random.Random(world.chance.random())
    fh = await one.open()
    for _ in range(steps):
        await trio.sleep(chance.random() * 0.01)
        held = world.beliefs.setdefault(number, set())
        if held and chance.random() < 0.5:
            await unlock(world, one, fh, number, chance.choice(sorted(held)))
        else:
            await lock(world, one, fh, number, chance)
    world.beliefs.pop(number, None)
    await soon(one.fs.flush(fh, number))
    await soon(one.fs.release(fh, lock_owner=number, flock=True))


async def lock(world: World, one: Mount, fh: int, number: int, chance: random.Random) -> None:
    flock = chance.random() < 0.3
    start = 0 if flock else chance.randrange(BLOCKS)
    belief = Belief(flock, chance.choice((READ, WRITE)), start, BLOCKS - 1 if flock else start)
    held = world.beliefs[number]
    for before in [other for other in held if other.flock == flock and other.start == start]:
        if flock or before.kind is WRITE:
            held.discard(before)  # A flock of another kind goes first; a weaker range is weaker from now on.
    may_wait = not held or not (flock or any(other.flock for other in held))  # Nobody looks for circles of flocks.
    wanted = FileLock(belief.kind, belief.start, LAST_BYTE if flock else belief.end, number)
    with trio.CancelScope() as scope:
        scope.deadline = trio.current_time() + (chance.random() * 0.05 if chance.random() < 0.3 else 60)
        try:
            await soon(one.fs.set_lock(fh, number, wanted, flock=flock, wait=may_wait and chance.random() < 0.7))
        except WouldBlock:
            world.refusals += 1
            return
        except Deadlock:
            world.circles += 1
            for other in list(held):  # Like any program that wants to go on.
                await unlock(world, one, fh, number, other)
            return
        for before in [other for other in held if other.flock == flock and other.start == start]:
            held.discard(before)
        world.believe(number, belief)
    world.cancelled += scope.cancelled_caught
    if scope.cancelled_caught and flock:
        held.difference_update([other for other in held if other.flock])
    if scope.cancelled_caught or chance.random() < 0.4:
        for other in list(held):
            await unlock(world, one, fh, number, other)


async def unlock(world: World, one: Mount, fh: int, number: int, belief: Belief) -> None:
    world.beliefs[number].discard(belief)
    end = LAST_BYTE if belief.flock else belief.end
    await soon(one.fs.set_lock(fh, number, FileLock(UNLOCK, belief.start, end, number), flock=belief.flock, wait=False))


async def life_of_a_mount(world: World, mountpoint: bytes, lives: int) -> None:
    for _ in range(lives):
        async with mount(world.service, mountpoint) as one:
            async with trio.open_nursery() as nursery:
                for _ in range(PROGRAMS):
                    nursery.start_soon(program, world, one, STEPS)
            assert not list(one.locks.table.held())
            assert not list(one.locks.table.waiters())
            assert not one.locks._waiting
        await trio.sleep(world.chance.random() * 0.2)


async def walk(directory: Path, seed: int, restarts: int) -> World:
    await trio.Path(directory).mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(directory / "metadata", lease_s=6.0))
        world = World(service, random.Random(seed))
        async with mount(service, b"/first") as first:
            await soon(first.fs.release(await first.open()))
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for number in range(MOUNTS):
                    nursery.start_soon(life_of_a_mount, world, b"/%d" % number, 2)
                for _ in range(restarts):
                    await trio.sleep(0.3 + world.chance.random())
                    await service.stop()
                    await service.start()
        async with mount(service, b"/last") as last, mount(service, b"/other") as other:
            fh = await last.open()
            assert await last.set(fh, 1, WRITE)
            assert await last.set(fh, 1, WRITE, flock=True)
            assert not await other.set(await other.open(), 1, READ)
            await eventually(lambda: last.locks._mode is Mode.SHARING)
            found = (await listed(service)).locks
            assert {one.session for one in found} == {last.metadata.session}
    return world


@pytest.mark.parametrize(("seed", "restarts"), [(1, 0), (2, 2), (3, 4)])
async def test_beliefs_never_conflict(
    seed: int, restarts: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = await walk(tmp_path, seed, restarts)
    assert "locks-in-conflict" not in caplog.text
    assert world.grants > MOUNTS * PROGRAMS * STEPS / 3
    assert world.refusals > 10
    assert world.cancelled > 0


def _no_grace(self: LockKeeper) -> None:
    """The planted bug: new locks are granted while others have not told theirs."""


async def test_the_walk_catches_locks_granted_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockKeeper, "_refuse_in_grace", _no_grace)

    async def walks() -> None:
        for seed in range(10):
            await walk(tmp_path / f"{seed}", seed, 4)

    with pytest.raises(BaseExceptionGroup) as caught:
        await walks()
    assert caught.value.subgroup(lambda error: isinstance(error, AssertionError) and " holds " in str(error))
