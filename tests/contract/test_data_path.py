"""DataPath on the real services over loopback: what was flushed is there for another mount, whatever went down."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from fsd.file_data import DataPath, FileData
from metadata.client import MetadataClient
from metadata.core.schema import ROOT_INO
from metadata.protocol import Caller, Create
from tests.support.real_services import RealServices, real_services
from wire.errors import StoreError

MIB = 1 << 20


async def create(path: DataPath, metadata: MetadataClient, name: bytes) -> FileData:
    layout = await metadata.mutate(
        lambda session, sequence: Create(session, sequence, ROOT_INO, name, 0o100644, exclusive=True)
    )
    return path.file(layout.ino, layout)


async def content(cluster: RealServices, ino: int) -> bytes:
    """As a mount reads it that has nothing in memory."""
    async with cluster.mount(b"/other") as (path, _):
        data = path.file(ino, None)
        found = bytes(await data.read(0, 1 << 40))
        await data.close()
        return found


async def test_small_large_and_sparse_files_come_back(tmp_path: Path) -> None:
    async with real_services(tmp_path) as cluster:
        wanted: dict[int, bytes] = {}
        async with cluster.mount() as (path, metadata):
            for name, pieces in {
                b"small": [(0, b"hello")],
                b"grown": [(0, b"a" * 10_000), (9_000, b"b" * 40_000)],
                b"large": [(at, bytes([at // MIB + 1]) * MIB) for at in range(0, 9 * MIB, MIB)],
                b"scattered": [(n * 7001, bytes([n % 255 + 1]) * 100) for n in range(300)],
            }.items():
                data = await create(path, metadata, name)
                expected = bytearray()
                for offset, piece in pieces:
                    await data.write(offset, piece)
                    expected.extend(bytes(max(0, offset + len(piece) - len(expected))))
                    expected[offset : offset + len(piece)] = piece
                    if name == b"grown":
                        await data.flush()
                await data.truncate(len(expected) - 3, Caller())
                wanted[data.ino] = bytes(expected[:-3])
                await data.close()
            for ino, expected_bytes in wanted.items():
                data = path.file(ino, None)
                assert await data.read(0, 1 << 40) == expected_bytes
                await data.close()
        for ino, expected_bytes in wanted.items():
            assert await content(cluster, ino) == expected_bytes


async def test_a_block_server_may_go_down_in_the_middle_of_a_write(tmp_path: Path) -> None:
    async with real_services(tmp_path) as cluster:
        async with cluster.mount() as (path, metadata):
            data = await create(path, metadata, b"f")
            for at in range(0, 40 * MIB, MIB):
                await data.write(at, bytes([at // MIB]) * MIB)
                if at == 16 * MIB:
                    cluster.scopes[0].cancel()
            await data.flush()
            await data.close()
            ino = data.ino
        found = await content(cluster, ino)
        assert found == b"".join(bytes([n]) * MIB for n in range(40))


async def test_the_inode_service_may_restart_in_the_middle_of_a_flush(tmp_path: Path) -> None:
    async with real_services(tmp_path) as cluster:
        async with cluster.mount() as (path, metadata):
            data = await create(path, metadata, b"f")
            await data.write(0, b"x" * 3 * MIB)
            async with trio.open_nursery() as nursery:
                await cluster.service.stop()
                nursery.start_soon(data.flush)
                nursery.start_soon(cluster.service.start)
            assert not data.unflushed
            await data.close()
            ino = data.ino
        assert await content(cluster, ino) == b"x" * 3 * MIB


@pytest.mark.slow
async def test_with_no_block_server_a_flush_fails_in_time_and_the_bytes_stay(tmp_path: Path) -> None:
    async with real_services(tmp_path, server_count=0) as cluster, cluster.mount() as (path, metadata):
        data = await create(path, metadata, b"f")
        await data.write(0, b"y" * 100_000)
        with trio.fail_after(40), pytest.raises(StoreError):
            await data.flush()
        assert await data.read(0, 3) == b"yyy"
        assert data.unflushed
