"""`fsd metadata` and `fsd block`: one service in this process; each imports only what it runs."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import trio

from mount import config, daemon, logs
from mount.config import BlockSettings, LogSettings, MetadataSettings, Settings, needed
from mount.files import FileLock, make_directory
from mount.outcome import CommandError, Exit

LOCK_NAME = "fsd.lock"
LOCK_WAIT_S = 5.0
"""How long a service waits for its directory: its own former life may still be flushing."""
LOCK_POLL_S = 0.05


def add_metadata(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd metadata`."""
    config.add_flags(parser, "metadata", "log")
    daemon.add_daemon_flags(parser)


def add_block(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd block`."""
    config.add_flags(parser, "block", "log")
    daemon.add_daemon_flags(parser)


def run_metadata(flags: argparse.Namespace) -> Exit:
    """Run the inode service until it is told to end."""
    from metadata.server import InodeServiceConfig, run_inode_service

    settings = Settings(flags)
    logs.configure(settings.take(LogSettings))
    mine = settings.take(MetadataSettings)
    directory = needed(mine.directory, "--directory")
    service = InodeServiceConfig(
        directory=directory,
        host=mine.host,
        port=mine.port,
        lease_s=mine.lease_s,
        server_down_after_s=mine.server_down_after_s,
        replicas=mine.replicas,
        owner_uid=os.geteuid(),
        owner_gid=os.getegid(),
    )
    return daemon.run_service("metadata", partial(_locked, directory, partial(run_inode_service, service)), flags)


def run_block(flags: argparse.Namespace) -> Exit:
    """Run a block server until it is told to end."""
    from blockstore.server import BlockServerConfig, run_block_server

    settings = Settings(flags)
    logs.configure(settings.take(LogSettings))
    mine = settings.take(BlockSettings)
    directory = needed(mine.directory, "--directory")
    metadata_host, metadata_port = config.metadata_address(mine)
    service = BlockServerConfig(
        directory=directory,
        host=mine.host,
        port=mine.port,
        advertise_host=_advertised(mine),
        metadata_host=metadata_host,
        metadata_port=metadata_port,
        rack=mine.rack,
        weight=mine.weight,
    )
    return daemon.run_service("block", partial(_locked, directory, partial(run_block_server, service)), flags)


def _advertised(settings: BlockSettings) -> str:
    """The address that mounts are told.

    Raises:
        CommandError: it listens at all addresses and nobody said which one others can reach (exit code 2).
    """
    if settings.advertise_host:
        return settings.advertise_host
    if settings.host in ("0.0.0.0", "::", ""):
        raise CommandError(f"--advertise-host is needed: others cannot reach {settings.host or '*'!r}", Exit.USAGE)
    return settings.host


async def _locked(
    directory: Path,
    service: daemon.Start,
    *,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the service while this process alone has the directory: two of them on one would destroy it.

    Raises:
        CommandError: another process has it, for longer than one that is just ending.
    """
    make_directory(directory, "the service's data")
    lock = FileLock(directory / LOCK_NAME)
    with trio.move_on_after(LOCK_WAIT_S) as scope:
        while not lock.acquire_nowait():  # noqa: ASYNC110 - flock has no wait with a deadline.
            await trio.sleep(LOCK_POLL_S)
    if scope.cancelled_caught:
        raise CommandError(
            f"{directory} is in use by another fsd process; stop that one first, or use another directory"
        )
    try:
        await service(task_status=task_status)
    finally:
        lock.close()
