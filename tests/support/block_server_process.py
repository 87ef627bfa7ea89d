"""A block server as a process of its own, to be killed: `python -m tests.support.block_server_process DIR METAPORT`.

Prints its port when it serves.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from blockstore.server import run_block_server
from tests.support.block_cluster import server_config

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    process: trio.Process
    port: int

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def server_process(directory: Path, metadata_port: int) -> AsyncIterator[ServerProcess]:
    """Start one and wait until it serves; killed at the end, if it still runs."""
    command = [sys.executable, "-m", "tests.support.block_server_process", str(directory), str(metadata_port)]
    process = await trio.lowlevel.open_process(command, stdout=-1, cwd=ROOT)
    server = ServerProcess(process, 0)
    try:
        line = b""
        assert process.stdout is not None
        while not line.endswith(b"\n"):
            part = await process.stdout.receive_some(100)
            assert part, "the server ended before it served"
            line += part
        server.port = int(line)
        yield server
    finally:
        with trio.CancelScope(shield=True):
            await server.kill()
        if process.stdout is not None:
            await process.stdout.aclose()


async def main(directory: Path, metadata_port: int) -> None:
    async with trio.open_nursery() as nursery:
        _, port = await nursery.start(run_block_server, server_config(directory, metadata_port))
        print(port, flush=True)  # noqa: T201


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
