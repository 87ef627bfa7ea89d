"""The processes of a simulated cluster: the inode service on its disk, and daemons, each with its kernel.

Both are the product's own main functions (`run_inode_service`, `run_mount`), with the seams of seams.py below them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from blockstore.protocol import BlockId
from fsd.daemon import MountConfig, run_mount
from metadata.core import schema
from metadata.engine.memory import MemoryEngine, _State
from metadata.engine.ports import EngineBroken
from metadata.server import InodeServiceConfig, run_inode_service
from tests.sim.fibers import block, in_fiber
from tests.sim.kernel import FrontEnd, Kernel
from tests.sim.world import Process, World, current_process
from wire.checksum import Buffer
from wire.errors import DataLost
from wire.rpc.server import ServerLimits

SERVICE_HOST = "service"
SERVICE_PORT = 7000
FLUSH_S = (0.0005, 0.004)
"""A commit's flush; now and then FLUSH_SLOW_S."""
FLUSH_SLOW_S = (0.02, 0.2)
BLOCK_S = (0.001, 0.006)
ANSWER = schema.answer_key(0, 0)[:1]


class Disk:
    """What survives kill -9 of the service: the state as it was last committed."""

    def __init__(self) -> None:
        self.state = _State({}, [])
        self.committed = trio.Event()  # Replaced by each commit.


class DiskEngine(MemoryEngine):
    """The engine in memory, of one life of the service: a commit takes time, and is durable at some moment of it."""

    def __init__(self, disk: Disk, process: Process) -> None:
        super().__init__()
        self._state = disk.state.copy()
        self._disk = disk
        self._process = process

    def _merge(self, changes: dict[bytes, bytes | None]) -> None:
        self._flush()
        if not self._process.alive:
            raise EngineBroken("the process was killed before its commit was durable")
        self._refuse_the_fenced(changes)
        super()._merge(changes)
        self._disk.state = self._state
        self._disk.committed.set()
        self._disk.committed = trio.Event()
        self._flush()

    def _refuse_the_fenced(self, changes: dict[bytes, bytes | None]) -> None:
        """Whatever a session changes leaves an answer: there must be none of a session that had ended before."""
        for key, value in changes.items():
            if value is None or not key.startswith(ANSWER):
                continue
            session = int.from_bytes(key[1:9], "big")
            raw = self._state.values.get(schema.session_key(session))
            if raw is None or schema.decode_session(raw).ended:
                self._process.world.wrong.append(f"session {session} has changed something after its end")

    def _flush(self) -> None:
        if in_fiber():
            chance = self._process.world.random
            low, high = FLUSH_S if chance.random() < 0.97 else FLUSH_SLOW_S
            duration_s = chance.uniform(low, high)
            block(partial(trio.sleep, duration_s))


class Service:
    """The inode service: one life of it after another, on one disk."""

    def __init__(self, world: World, *, lease_s: float) -> None:
        self.disk = Disk()
        self.lease_s = lease_s
        self.process: Process
        self._world = world

    async def start(self) -> None:
        """Returns when it serves, or was killed."""
        self.process = process = self._world.process(SERVICE_HOST, "inode service")
        config = InodeServiceConfig(
            directory=Path("/simulated"),
            host=SERVICE_HOST,
            port=SERVICE_PORT,
            lease_s=self.lease_s,
            rpc_limits=ServerLimits(janitor_interval_s=5.0),
        )
        started = trio.Event()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: run_inode_service(
                        config, task_status=task_status, open_engine=lambda _: DiskEngine(self.disk, process)
                    )
                )
                started.set()

        process.start(main)
        await _either(started, process.ended)

    async def committed(self) -> None:
        """Returns when the next commit has become durable, before anybody is answered."""
        await self.disk.committed.wait()

    @property
    def engine(self) -> MemoryEngine:
        """What is on the disk."""
        engine = MemoryEngine()
        engine._state = self.disk.state
        return engine

    def kill(self) -> None:
        """kill -9; what was not durable is gone."""
        self.process.kill()


class MemoryBlocks:
    """In the place of BlockClient: blocks in the world's memory, a moment away."""

    def __init__(self, **_: object) -> None:
        self._world = current_process().world

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Nothing to do."""
        task_status.started()
        await trio.sleep_forever()

    async def put(
        self, block: BlockId, data: Buffer | Sequence[Buffer], *, replicas: int, timeout_s: float = 30.0
    ) -> PutResult:
        """As BlockClient.put."""
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        content = b"".join(pieces)
        await self._wait()
        assert _blocks(self._world).setdefault(block, content) == content, f"{block} was written twice"
        return PutResult(replicas, degraded=False)

    async def get(
        self, block: BlockId, *, offset: int, size: int, replicas: int, timeout_s: float = 30.0
    ) -> memoryview:
        """As BlockClient.get."""
        await self._wait()
        content = _blocks(self._world).get(block)
        if content is None:
            raise DataLost(f"no server has {block}")
        return memoryview(content)[offset : offset + size]

    async def delete(self, blocks: Sequence[BlockId], *, timeout_s: float = 30.0) -> bool:
        """As BlockClient.delete."""
        await self._wait()
        for one in blocks:
            _blocks(self._world).pop(one, None)
        return True

    async def _wait(self) -> None:
        await trio.sleep(self._world.random.uniform(*BLOCK_S))


def _blocks(world: World) -> dict[BlockId, bytes]:
    return world.__dict__.setdefault("blocks", {})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PutResult:
    """As blockstore.client.PutResult."""

    copies: int
    degraded: bool


KERNELS: dict[Process, Kernel] = {}
"""The kernel that a daemon of the running world mounts in."""


def mount_in_kernel(mountpoint: str, options: object) -> FrontEnd:
    """In the place of DirectMount()."""
    return FrontEnd(KERNELS[current_process()])


class Mount:
    """One place where the file system is mounted: one daemon after another, each mounting anew."""

    def __init__(self, world: World, name: str, *, timeout_s: float) -> None:
        self.name = name
        self.lives = 0
        self.process: Process
        self.kernel: Kernel
        self._world = world
        self._timeout_s = timeout_s

    async def start(self) -> None:
        """Returns when it is mounted, or was killed.  Raises: what the daemon died of."""
        self.lives += 1
        self.process = process = self._world.process(self.name, f"daemon of {self.name}")
        self.kernel = KERNELS[process] = Kernel(self._world, process)
        config = MountConfig(
            mountpoint=Path("/mnt") / self.name,
            host=SERVICE_HOST,
            port=SERVICE_PORT,
            budget_bytes=16 << 20,
            allow_other=False,
            timeout_s=self._timeout_s,
        )
        mounted = trio.Event()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(lambda task_status: run_mount(config, task_status=task_status))
                mounted.set()

        process.start(main)
        await _either(mounted, process.ended)
        if process.exit is not None:
            raise process.exit

    @property
    def life(self) -> str:
        """Names this daemon among those that were mounted here."""
        return f"{self.name}.{self.lives}"

    def kill(self) -> None:
        """kill -9 of the daemon."""
        self.process.kill()
        self.kernel.disconnect()


async def _either(one: trio.Event, other: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)


async def run_in_place(function: Callable[..., Any], *args: object, **_: object) -> Any:  # noqa: ANN401
    """In the place of trio.to_thread.run_sync: what is called there is simulated as well, and does not block."""
    await trio.lowlevel.checkpoint()
    return function(*args)
