"""A real block server on a disk that fills up, or that fails: what was acknowledged stays, and the server goes on.

Each test mounts a small file system of its own; that takes root, not FUSE.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockstore.protocol import BLOCK_SIZE_MAX, CHECKSUM_UNIT, BlockId, DeleteBlocks, GetBlock, GetBlockDone, GetStatus
from tests.support.block_cluster import ReportService, channel_to, put_request, report_service
from tests.support.block_server_process import ServerProcess, server_process
from wire.checksum import first_bad_unit
from wire.errors import NoSpace, StoreError
from wire.rpc.client import Channel

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
TIMEOUT_S = 30.0
Blocks = dict[BlockId, bytes]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(params=["ext4", "tmpfs"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """128 MiB: an ext4 on a loop device, and a tmpfs, which has neither direct I/O nor reads that do not wait."""
    place = tmp_path / "small"
    place.mkdir()
    if request.param == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place))
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(128 << 20)
        run("mkfs.ext4", "-q", "-m", "0", str(image))
        run("mount", "-o", "loop", str(image), str(place))
    yield place
    run("umount", str(place))


@pytest.fixture
def lying_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 512 MiB on an image for which only 48 MiB are there: write(2) succeeds, the sync fails."""
    below, place = tmp_path / "below", tmp_path / "ext4"
    below.mkdir()
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(below))
    image = below / "image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    run("mkfs.ext4", "-q", str(image))
    run("mount", "-o", "loop", str(image), str(place))
    yield place
    run("umount", str(place))
    run("umount", str(below))


@asynccontextmanager
async def served(directory: Path, metadata_port: int) -> AsyncIterator[tuple[ServerProcess, Channel]]:
    async with server_process(directory, metadata_port) as server, channel_to("127.0.0.1", server.port) as channel:
        yield server, channel


async def fill(channel: Channel, dice: random.Random, first_slice: int = 1) -> Blocks:
    """Put blocks until one is refused; those that were acknowledged."""
    stored: Blocks = {}
    for number in range(first_slice, first_slice + 100_000):
        block, data = BlockId(number, 0), dice.randbytes(dice.choice([3000, 20_000, 1 << 20, BLOCK_SIZE_MAX]))
        try:
            await channel.call(put_request(block, data), payload=data, timeout_s=TIMEOUT_S)
        except NoSpace:
            return stored
        stored[block] = data
    raise AssertionError("the disk never filled up")


def take_all_space(ballast: Path) -> None:
    """Write until not a page is left."""
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while wrote_a_page(fd):
            pass
    finally:
        os.close(fd)


def wrote_a_page(fd: int) -> bool:
    try:
        return os.write(fd, bytes(1 << 12)) > 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


async def put_until_it_fails(channel: Channel, stored: Blocks) -> None:
    dice = random.Random(3)
    for number in range(1, 10_000):
        block, data = BlockId(number, 0), dice.randbytes(dice.choice([20_000, 1 << 20]))
        await channel.call(put_request(block, data), payload=data, timeout_s=TIMEOUT_S)
        stored[block] = data


async def check(channel: Channel, blocks: Blocks) -> None:
    for block, data in blocks.items():
        reply, payload = await channel.call_for_payload(GetBlock(block, 0, BLOCK_SIZE_MAX), timeout_s=TIMEOUT_S)
        assert isinstance(reply, GetBlockDone)
        assert first_bad_unit(payload, reply.checksums, CHECKSUM_UNIT) is None
        assert payload == data


async def test_a_full_disk_refuses_puts_until_blocks_are_deleted(small_disk: Path) -> None:
    dice = random.Random(1)
    async with report_service(ReportService()) as metadata_port:
        async with served(small_disk / "block", metadata_port) as (_, channel):
            stored = await fill(channel, dice)
            assert sum(map(len, stored.values())) > 64 << 20
            await check(channel, stored)
            gone = sorted(stored)[::2]
            await channel.call(DeleteBlocks(tuple(gone)), timeout_s=TIMEOUT_S)
            for block in gone:
                del stored[block]
            more = await fill(channel, dice, first_slice=1_000_000)
            assert sum(map(len, more.values())) > 16 << 20, "the deleted blocks' space did not come back"
            stored |= more
        async with served(small_disk / "block", metadata_port) as (_, channel):
            await check(channel, stored)


async def test_deletes_work_on_a_disk_that_others_have_filled_to_the_last_byte(small_disk: Path) -> None:
    async with report_service(ReportService()) as metadata_port:
        async with served(small_disk / "block", metadata_port) as (_, channel):
            stored = await fill(channel, random.Random(2))
            take_all_space(small_disk / "ballast")
            victims = sorted(stored)
            for start in range(0, len(victims) - 1, 2):
                await channel.call(DeleteBlocks(tuple(victims[start : start + 1])), timeout_s=TIMEOUT_S)
                del stored[victims[start]]
            await check(channel, stored)
        os.unlink(small_disk / "ballast")
        async with served(small_disk / "block", metadata_port) as (_, channel):
            await check(channel, stored)
            status = await channel.call(GetStatus(), timeout_s=TIMEOUT_S)
            assert (status.block_count, status.block_bytes) == (len(stored), sum(map(len, stored.values())))


async def test_a_disk_that_fails_its_syncs_loses_nothing_that_was_acknowledged(lying_disk: Path) -> None:
    stored: Blocks = {}
    async with (
        report_service(ReportService()) as metadata_port,
        served(lying_disk / "block", metadata_port) as (_, channel),
    ):
        with pytest.raises(StoreError):
            await put_until_it_fails(channel, stored)
        assert len(stored) > 5
        await check(channel, stored)
