"""Block servers of either kind, real or in memory, the map that shows them, and a BlockClient in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from blockstore.client import BlockClient
from blockstore.core.cluster_map import ClusterMap, Server, ServerState
from blockstore.core.placement import placement
from blockstore.protocol import BlockId, DeleteBlocks, GetBlock
from blockstore.server import BlockServerConfig, run_block_server
from tests.support.block_cluster import ReportService, channel_to, report_service
from tests.support.memory_block_service import MemoryBlockService
from wire.errors import NoSuchBlock

BLOCK = BlockId(42, 3)


class Service(Protocol):
    """What a test does to a server, whichever kind it is."""

    server_id: int
    port: int

    async def stop(self) -> None: ...

    async def start(self) -> None: ...

    def damage(self, data: bytes, at: int) -> None: ...


class MemoryService(MemoryBlockService):
    """In memory."""

    nursery: trio.Nursery

    async def start(self) -> None:
        await self.nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.run(task_status=task_status)

    def damage(self, data: bytes, at: int) -> None:
        for stored, _ in self.blocks.values():
            if stored == data:
                stored[at] ^= 1


@dataclass
class RealService:
    """A block server in this process, on a directory of its own."""

    directory: Path
    metadata_port: int
    nursery: trio.Nursery
    server_id: int = 0
    port: int = 0

    async def start(self) -> None:
        _, self.port = await self.nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
        config = BlockServerConfig(
            self.directory,
            "127.0.0.1",
            self.port,
            advertise_host="127.0.0.1",
            metadata_host="127.0.0.1",
            metadata_port=self.metadata_port,
        )
        self._stopped = trio.Event()
        with trio.CancelScope() as self._scope:
            await run_block_server(config, task_status=task_status)
        self._stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    def damage(self, data: bytes, at: int) -> None:
        """Flip a bit of it on the disk."""
        for path in self.directory.rglob("*"):
            if path.is_file() and (found := path.read_bytes().find(data)) >= 0:
                with path.open("r+b") as file:
                    file.seek(found + at)
                    file.write(bytes([data[at] ^ 1]))
                return
        raise AssertionError("the block is in no file")


@dataclass
class World:
    """Services, their map, and a client; `newer` are the maps that refreshing brings."""

    services: dict[int, Service]
    map: ClusterMap
    newer: list[ClusterMap] = field(default_factory=list)
    reports: list[tuple[BlockId, int, bool]] = field(default_factory=list)
    refreshed: int = 0
    told: trio.Event = field(default_factory=trio.Event)  # Set it after a change of `map`.

    def __post_init__(self) -> None:
        self.client = BlockClient(
            current_map=lambda: self.map,
            refresh_map=self.refresh,
            report_bad_copy=lambda block, server_id, corrupt: self.reports.append((block, server_id, corrupt)),
            wait_map_changed=self.wait_map_changed,
        )

    async def wait_map_changed(self) -> None:
        await self.told.wait()
        self.told = trio.Event()

    async def refresh(self) -> ClusterMap:
        self.refreshed += 1
        if self.newer:
            self.map = self.newer.pop(0)
        return self.map

    def order(self, block: BlockId = BLOCK) -> list[Service]:
        return [self.services[server.server_id] for server in placement(self.map, block)]

    def with_states(self, states: dict[int, ServerState]) -> ClusterMap:
        servers = tuple(
            msgspec.structs.replace(s, state=states.get(s.server_id, ServerState.UP)) for s in self.map.servers
        )
        return msgspec.structs.replace(self.map, epoch=self.map.epoch + 1, servers=servers)

    def set_state(self, service: Service, state: ServerState) -> None:
        self.map = self.with_states({service.server_id: state})

    async def holders(self, block: BlockId = BLOCK) -> list[bool]:
        """Which of the servers, in the block's order, have it; all of them must be up."""
        return [await has(service, block) for service in self.order(block)]

    async def get(self, size: int, block: BlockId = BLOCK) -> bytes:
        return bytes(await self.client.get(block, offset=0, size=size, replicas=2, timeout_s=10))

    def block_led_by(self, service: Service) -> BlockId:
        """Another block whose first server that is."""
        return next(BlockId(1, n) for n in range(200) if self.order(BlockId(1, n))[0] is service)


async def has(service: Service, block: BlockId) -> bool:
    async with channel_to("127.0.0.1", service.port) as channel:
        try:
            await channel.call(GetBlock(block, 0, 1), timeout_s=10)
        except NoSuchBlock:
            return False
        return True


async def drop(service: Service, block: BlockId) -> None:
    """The server loses its copy."""
    async with channel_to("127.0.0.1", service.port) as channel:
        assert (await channel.call(DeleteBlocks((block,)), timeout_s=10)).deleted_count == 1


@asynccontextmanager
async def memory_world(count: int) -> AsyncIterator[World]:
    """Servers in memory."""
    async with trio.open_nursery() as nursery:
        services: list[MemoryService] = []
        for number in range(count):
            service = MemoryService(number + 1)
            service.nursery = nursery
            await service.start()
            services.append(service)
        async with _client_of(list(services), nursery) as world:
            yield world


@asynccontextmanager
async def real_world(count: int, directory: Path) -> AsyncIterator[World]:
    """Real servers, which register with a small inode service."""
    reports = ReportService()
    async with report_service(reports) as metadata_port, trio.open_nursery() as nursery:
        services: list[Service] = []
        for number in range(count):
            service = RealService(directory / f"server{number}", metadata_port, nursery)
            await service.start()
            service.server_id = next(s.server_id for s in reports.map.servers if s.port == service.port)
            services.append(service)
        async with _client_of(services, nursery, cluster_id=reports.cluster_id) as world:
            yield world


@asynccontextmanager
async def _client_of(services: list[Service], nursery: trio.Nursery, *, cluster_id: str = "c") -> AsyncIterator[World]:
    servers = tuple(Server(s.server_id, "127.0.0.1", s.port) for s in services)
    # An epoch that no server finds old, unless a test gives it a newer one.
    world = World({s.server_id: s for s in services}, ClusterMap(1000, cluster_id, 64, servers))
    await nursery.start(world.client.run)
    yield world
    nursery.cancel_scope.cancel()
