"""What happens in a seed, and whether it may.

A few mounts, programs on them, and at most two faults among: connections that break; partitions, both ways or one way;
processes that stand still or are killed and started again; kernels that forget; wall clocks that jump.

At the end the faults are over, everything must go on without an error, and the record of all calls, the store and
the logs are judged.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from metadata.core import fsck
from tests.history.check import check
from tests.history.record import History, Lost, numbered
from tests.sim.nodes import SERVICE_HOST, Mount, Service
from tests.sim.programs import COUNTER, HABITS, LOG, NAMES, Program, Record
from tests.sim.seams import installed
from tests.sim.world import World

TIMEOUT_S = 8.0
"""The mounts' own bound of a call at the service."""


@dataclass(frozen=True)
class Shape:
    """How much happens in a seed."""

    mounts: int = 2
    programs: int = 2  # On each mount.
    calls: int = 3  # Of each program; each makes several system calls.
    faults: int = 2  # At most.


DEFAULT = Shape()


@dataclass
class Result:
    """What a seed has shown."""

    seed: int
    wrong: list[str] = field(default_factory=list)  # For people; empty: nothing.
    lines: list[str] = field(default_factory=list)
    digest: str = ""
    faults: list[str] = field(default_factory=list)
    virtual_s: float = 0.0
    calls: int = 0


def run_seed(seed: int, shape: Shape = DEFAULT, *, told: int = logging.WARNING) -> Result:
    """Run it; the same seed and shape do the same.

    `told`: the product's log events of this level and above are lines of the result.
    """
    world = World(seed)
    scenario = Scenario(world, shape)
    with installed(world), _Listener(scenario, told) as listener:
        try:
            trio.run(world.live, scenario.run, clock=world.clock)
        except Exception as error:  # Whatever it is, it is a finding.
            scenario.wrong.append(f"{type(error).__name__}: {error!r} because of {error.__cause__!r}")
    scenario.wrong += [*world.wrong, *listener.bugs]
    return Result(
        seed,
        scenario.wrong,
        world.lines,
        world.digest(),
        scenario.told_faults,
        scenario.over_s,
        len(scenario.record.calls),
    )


class Scenario:
    """One seed."""

    def __init__(self, world: World, shape: Shape) -> None:
        self.world = world
        self.shape = shape
        self.chance = random.Random(f"scenario {world.seed}")
        self.lease_s = self.chance.choice((2.0, 4.0))
        self.service = Service(world, lease_s=self.lease_s)
        self.all_mounts = [Mount(world, name, timeout_s=TIMEOUT_S) for name in "abcdefgh"[: shape.mounts]]
        self.mounts: list[Mount] = []  # Those that are there already.
        self.record = Record(world)
        self.habits = self.chance.choice(HABITS)
        self.programs: list[Program] = []
        self.wrong: list[str] = []
        self.told_faults: list[str] = []
        self.faults_s = 0.0
        self.over_s = 0.0

    async def run(self) -> None:
        """All of it."""
        with trio.move_on_after(600) as scope:
            await self._begin()
            async with trio.open_nursery() as nursery:
                for mount in self.all_mounts:
                    nursery.start_soon(self._live, mount)
                for _ in range(self.chance.randint(0, self.shape.faults)):
                    nursery.start_soon(self._fault, self.chance.choice(FAULTS), self.chance.uniform(0.1, 1.6))
            await self._end()
        if scope.cancelled_caught:
            self.wrong.append("it did not come to an end within 600 s")
        self.over_s = trio.current_time()
        self._judge()
        self.world.over = True

    async def _begin(self) -> None:
        await self.service.start()
        first = self.all_mounts[0]
        await first.start()
        self.mounts.append(first)
        kernel = first.kernel
        await kernel.mkdir(b"d")
        self.record.directories[b"d"] = (await kernel.stat_with_ino(b"d"))[0]
        program = Program(self.record, first, 80, self.chance)
        for path in (LOG, COUNTER, *NAMES):
            await self._make(program, path)

    async def _make(self, program: Program, path: bytes) -> None:
        kernel = program.mount.kernel
        async with program.call("excl", **program.at(path)) as call:
            file = await kernel.create(path)
            call.value = {"ino": file.inode.nodeid}
        await kernel.close(file)

    async def _live(self, mount: Mount) -> None:
        """Mount, unless it is the first, a little later than the others, and run the programs there."""
        if mount not in self.mounts:
            await trio.sleep(self.chance.uniform(0, 1.0))
            await self._mount(mount)
            self.mounts.append(mount)
        async with trio.open_nursery() as nursery:
            for number in range(self.shape.programs):
                chance = random.Random(f"program {number} of {mount.name} {self.world.seed}")
                program = Program(self.record, mount, number, chance)
                self.programs.append(program)
                nursery.start_soon(program.run, self.shape.calls, 0.4, self.habits)

    async def _mount(self, mount: Mount) -> None:
        """However long it takes."""
        while True:
            try:
                await mount.start()
                return
            except Exception as error:  # Whatever the daemon died of, as the service may be away as well.
                self.world.note(f"mounting {mount.name} failed: {error!r}")
                await trio.sleep(0.5)

    # --- faults ---

    async def _fault(self, fault: Callable[[Scenario, float], object], after_s: float) -> None:
        await trio.sleep(after_s)
        duration_s = self.chance.choice((0.3, 0.8, 1.3, 2.5)) * self.lease_s * self.chance.uniform(0.5, 1.0)
        self.told_faults.append(f"{fault.__name__} at {trio.current_time():.3f} for {duration_s:.3f} s")
        self.world.note(f"fault: {self.told_faults[-1]}")
        self.faults_s += duration_s
        await fault(self, duration_s)  # type: ignore[misc]
        self.world.note(f"over: {fault.__name__}")

    def session_ended(self, host: str) -> None:
        """The locks of the programs there are free."""
        for program in self.programs:
            if program.mount.name == host:
                program.lost_lock()

    def _lost(self, life: str, start_ns: int, *, tries_again: bool = True) -> None:
        """The session of a mount may have been ended since then (decision 0014)."""
        end_ns = self.record.now_ns + round((self.lease_s + TIMEOUT_S / 2) * 1e9)
        self.record.lost.append(Lost(life, start_ns, end_ns, tries_again))

    async def partition(self, duration_s: float) -> None:
        """Nothing gets through, in one direction or both."""
        mount = self.chance.choice(self.mounts)
        life, start_ns = mount.life, self.record.now_ns
        ways = self.chance.choice(((1, 1), (1, 0), (0, 1)))
        for way, (source, target) in zip(ways, ((mount.name, SERVICE_HOST), (SERVICE_HOST, mount.name)), strict=True):
            if way:
                self.world.network.block(source, target)
        await trio.sleep(duration_s)
        self.world.network.heal(mount.name, SERVICE_HOST)
        self.world.network.heal(SERVICE_HOST, mount.name)
        self._lost(life, start_ns)

    async def broken_connections(self, duration_s: float) -> None:
        """Connections break, several times, some of them with an answer or a request that is on its way."""
        mount = self.chance.choice(self.mounts)
        for _ in range(self.chance.randint(2, 6)):
            ways = [(mount.name, SERVICE_HOST), (SERVICE_HOST, mount.name), (SERVICE_HOST, mount.name)]
            self.world.network.break_at(*self.chance.choice(ways), self.chance.randint(1, 5))
            await trio.sleep(self.chance.uniform(0, 0.5))

    async def stopped_daemon(self, duration_s: float) -> None:
        """SIGSTOP and SIGCONT."""
        mount = self.chance.choice(self.mounts)
        life, start_ns, process = mount.life, self.record.now_ns, mount.process
        if process.alive:
            process.pause()
            await trio.sleep(duration_s)
            if process.alive:
                process.resume()
        self._lost(life, start_ns)

    async def stopped_service(self, duration_s: float) -> None:
        """SIGSTOP and SIGCONT."""
        process = self.service.process
        if process.alive:
            process.pause()
            await trio.sleep(duration_s)
            if process.alive:
                process.resume()

    async def lost_answers(self, duration_s: float) -> None:
        """Connections break when a change has become durable and has not been answered."""
        for _ in range(self.chance.randint(2, 6)):
            with trio.move_on_after(0.5):
                await self.service.committed()
                for mount in self.mounts:
                    self.world.network.break_connections(mount.name, SERVICE_HOST)
            await trio.sleep(self.chance.uniform(0, 0.2))

    async def killed_service(self, duration_s: float) -> None:
        """kill -9, and a start; half the time between a commit and its answer, or while a lock is held."""
        late: list[str] = []  # Mounts of which the new service hears last.
        with trio.move_on_after(1.0):
            when = self.chance.choice(("now", "commit", "lock", "lock"))
            if when == "commit":
                await self.service.committed()
            elif when == "lock":
                self.record.lock_taken = trio.Event()
                await self.record.lock_taken.wait()
                late = sorted({program.mount.name for program in self.programs if program.holds_lock})
        if not self.service.process.alive:
            return
        self.service.kill()
        for host in late:
            self.world.network.block(host, SERVICE_HOST)
        await trio.sleep(min(duration_s, 3.0) if self.chance.random() < 0.4 else 0.05)
        await self.service.start()
        if late:
            await trio.sleep(self.chance.uniform(0, self.lease_s / 2))
        for host in late:
            self.world.network.heal(host, SERVICE_HOST)

    async def killed_daemon(self, duration_s: float) -> None:
        """kill -9, and a mount in the same place."""
        mount = self.chance.choice(self.mounts)
        if not mount.process.alive:
            return
        life, start_ns = mount.life, self.record.now_ns
        mount.kill()
        self.session_ended(mount.name)
        await trio.sleep(duration_s if self.chance.random() < 0.5 else 0.05)
        await self._mount(mount)
        self._lost(life, start_ns, tries_again=False)

    async def forgetful_kernel(self, duration_s: float) -> None:
        """Memory is short."""
        for _ in range(3):
            self.chance.choice(self.mounts).kernel.shrink()
            await trio.sleep(self.chance.uniform(0, 0.5))

    async def clock_jump(self, duration_s: float) -> None:
        """Somebody sets the clock."""
        process = self.chance.choice([self.service.process, *(mount.process for mount in self.mounts)])
        process.clock_ahead_ns = self.chance.choice((-3600, -1, 1, 3600)) * 10**9
        await trio.lowlevel.checkpoint()

    # --- the end ---

    async def _end(self) -> None:
        """The faults are over: after a lease everything works again, at once and everywhere."""
        await trio.sleep(self.lease_s + TIMEOUT_S / 2)
        for number, mount in enumerate(self.mounts):
            program = Program(self.record, mount, 90 + number, random.Random(f"end of {mount.name} {self.world.seed}"))
            began_s = trio.current_time()
            for act in (program.count, program.write, program.read):
                try:
                    await act()
                except Program.refusals as refused:
                    if not program.is_expected(refused):
                        self.wrong.append(f"after the faults, {program.name}: {act.__name__}: {refused}")
            took_s = trio.current_time() - began_s
            if took_s > self.lease_s + 1:
                self.wrong.append(f"after the faults, {program.name} took {took_s:.1f} s")

    def _judge(self) -> None:
        record = self.record
        if not self.told_faults:
            self.wrong += [line for program in self.programs for line in program.unexpected]
        bound_s = self.faults_s + 2 * self.lease_s + 2 * TIMEOUT_S + 2
        if record.longest_s > bound_s:
            self.wrong.append(f"a call took {record.longest_s:.1f} s, the bound is {bound_s:.1f}: {record.longest}")
        roots = list(record.directories.values())
        for call in record.calls:
            if call.call == "list" and call.value:
                listed = {name for name, _ in call.value["names"]}
                call.value["names"] = [pair for pair in call.value["names"] if pair[1] not in roots]
                call.args["absent"] = [
                    name.decode() for name in NAMES if b"/" not in name and name.decode() not in listed
                ]
        history = History(roots, 16, numbered(record.calls), record.lost, self.world.seed)
        verdict = check(history)
        self.wrong += [str(one) for one in (*verdict.violations, *verdict.undecided)]
        engine = self.service.engine
        with engine.read() as txn:
            self.wrong += [f"fsck: {violation}" for violation in fsck.check(txn)]


FAULTS = (
    Scenario.partition,
    Scenario.partition,
    Scenario.broken_connections,
    Scenario.lost_answers,
    Scenario.stopped_daemon,
    Scenario.stopped_service,
    Scenario.killed_service,
    Scenario.killed_service,
    Scenario.killed_daemon,
    Scenario.forgetful_kernel,
    Scenario.clock_jump,
)


SESSION_EXPIRED = re.compile(r'metadata.sessions: session-expired session=\d+ client="(\w+) ')


class _Listener(logging.Handler):
    """The product's log: lines of the event log; and what is a bug wherever it happens."""

    def __init__(self, scenario: Scenario, level: int) -> None:
        super().__init__(level)
        self.bugs: list[str] = []
        self._scenario = scenario
        self._world = scenario.world
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """One event."""
        if self._world.over:
            return
        line = f"{record.name}: {record.getMessage()}"
        if record.exc_info:
            self.bugs.append(f"{line}: {record.exc_info[1]!r}")
        self._world.note(line)
        if (ended := SESSION_EXPIRED.match(line)) is not None:
            self._scenario.session_ended(ended.group(1))

    def __enter__(self) -> _Listener:
        for name in ("wire", "metadata", "fsd"):
            logger = logging.getLogger(name)
            self._before.append((logger, logger.level, logger.propagate))
            logger.addHandler(self)
            logger.setLevel(self.level)
            logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        for logger, level, propagate in self._before:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate
