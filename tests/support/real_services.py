"""The real inode service and real block servers on loopback, in this process, and clients of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from blockstore.client import BlockClient
from blockstore.server import run_block_server
from fsd.file_data import DataPath
from metadata.client import MetadataClient
from tests.support.block_cluster import server_config
from tests.support.inode_service import Service, running_service


@dataclass
class RealServices:
    """A small cluster."""

    service: Service
    scopes: list[trio.CancelScope] = field(default_factory=list)  # One per block server: cancel it, and it is gone.

    @asynccontextmanager
    async def clients(self, mountpoint: bytes) -> AsyncIterator[tuple[MetadataClient, BlockClient]]:
        """A session, and a block client that uses its map."""
        async with self.service.client(mountpoint) as metadata, trio.open_nursery() as nursery:
            blocks = BlockClient(
                current_map=lambda: metadata.map,
                refresh_map=metadata.refresh_map,
                report_bad_copy=metadata.report_bad_copy,
            )
            await nursery.start(blocks.run)
            with trio.fail_after(10):
                while len((await metadata.refresh_map()).servers) < len(self.scopes):  # noqa: ASYNC110 (far away)
                    await trio.sleep(0.01)
            yield metadata, blocks
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def mount(self, mountpoint: bytes = b"/mnt") -> AsyncIterator[tuple[DataPath, MetadataClient]]:
        """A running data path and its session."""
        async with self.clients(mountpoint) as (metadata, blocks), trio.open_nursery() as nursery:
            path = DataPath(metadata=metadata, blocks=blocks, budget_bytes=64 << 20)
            await nursery.start(path.run)
            yield path, metadata
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def real_services(directory: Path, server_count: int = 3) -> AsyncIterator[RealServices]:
    """Run a cluster in `directory`."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(directory / "metadata"))
        services = RealServices(service)
        nursery = await stack.enter_async_context(trio.open_nursery())
        for number in range(server_count):
            scope = trio.CancelScope()
            services.scopes.append(scope)
            await nursery.start(_run_block_server, scope, directory / f"block{number}", service.port)
        yield services
        nursery.cancel_scope.cancel()


async def _run_block_server(
    scope: trio.CancelScope, directory: Path, metadata_port: int, *, task_status: trio.TaskStatus[object]
) -> None:
    with scope:
        await run_block_server(server_config(directory, metadata_port), task_status=task_status)
