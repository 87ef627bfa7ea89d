"""Block servers for tests, over real sockets, with a small inode service that keeps nothing but their map."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from blockstore.core.cluster_map import ClusterMap, Server
from blockstore.protocol import (
    CHECKSUM_UNIT,
    REPORT_METHODS,
    BlockId,
    BlockServerStatus,
    Heartbeat,
    HeartbeatDone,
    PutBlock,
    RegisterServer,
    RegisterServerDone,
)
from blockstore.server import BlockServerConfig, run_block_server
from wire.checksum import unit_checksums
from wire.errors import NoSuchEntry, WrongCluster
from wire.rpc.client import Channel
from wire.rpc.server import Call, RpcServer, open_listener

CLUSTER_ID = "5d7f6a52-0c2b-4d4f-9d5e-000000000001"
HEARTBEAT_INTERVAL_MS = 50


@dataclass
class ReportService:
    """Keeps the map of the servers that registered."""

    cluster_id: str = CLUSTER_ID
    map: ClusterMap = field(default_factory=lambda: ClusterMap(1, CLUSTER_ID, 64))
    ids: dict[str, int] = field(default_factory=dict)
    heartbeats: list[BlockServerStatus] = field(default_factory=list)
    registered: trio.Event = field(default_factory=trio.Event)  # Somebody has registered.
    forgetful: bool = False  # Knows nobody: servers have to register again.

    def handle(self, call: Call) -> None:
        request = call.request
        if isinstance(request, RegisterServer):
            call.reply(self.register(request))
        elif isinstance(request, Heartbeat):
            if self.forgetful:
                raise NoSuchEntry("register first")
            self.heartbeats.append(request.status)
            call.reply(HeartbeatDone(self.map if self.map.epoch > request.status.epoch else None))

    def register(self, request: RegisterServer) -> RegisterServerDone:
        if request.cluster_id not in ("", self.cluster_id):
            raise WrongCluster(f"this is cluster {self.cluster_id}, the server belongs to {request.cluster_id}")
        server_id = self.ids.setdefault(request.uuid, len(self.ids) + 1)
        others = tuple(server for server in self.map.servers if server.server_id != server_id)
        new = Server(server_id, request.host, request.port, request.rack, request.weight)
        self.map = ClusterMap(self.map.epoch + 1, self.cluster_id, 64, (*others, new))
        self.forgetful = False
        self.registered.set()
        return RegisterServerDone(server_id, HEARTBEAT_INTERVAL_MS, self.map)

    def raise_epoch(self) -> None:
        self.map = ClusterMap(self.map.epoch + 1, self.cluster_id, 64, self.map.servers)


@asynccontextmanager
async def report_service(service: ReportService, *, port: int = 0) -> AsyncIterator[int]:
    """Run it; its port."""
    with await open_listener("127.0.0.1", port) as listener:
        async with trio.open_nursery() as nursery:
            rpc = RpcServer(
                service="metadata", methods=REPORT_METHODS, handler=service.handle, instance=service.cluster_id
            )
            await nursery.start(rpc.serve, [listener])
            yield listener.getsockname()[1]
            nursery.cancel_scope.cancel()


def server_config(directory: Path, metadata_port: int) -> BlockServerConfig:
    return BlockServerConfig(
        directory, "127.0.0.1", 0, advertise_host="127.0.0.1", metadata_host="127.0.0.1", metadata_port=metadata_port
    )


@asynccontextmanager
async def block_server(directory: Path, metadata_port: int) -> AsyncIterator[Channel]:
    """Run a block server in this process; a channel to it.  At the end it is shut down cleanly."""
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(run_block_server, server_config(directory, metadata_port))
        async with channel_to(host, port) as channel:
            yield channel
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def channel_to(host: str, port: int) -> AsyncIterator[Channel]:
    async with trio.open_nursery() as nursery:
        channel = Channel(host, port, service="block")
        await nursery.start(channel.run)
        yield channel
        nursery.cancel_scope.cancel()


def put_request(block: BlockId, data: bytes, *, epoch: int = 1 << 32) -> PutBlock:
    """With an epoch that is never too old, unless told."""
    return PutBlock(block, epoch, unit_checksums(data, CHECKSUM_UNIT))
