"""A block server's standing with the inode service: registration, heartbeats, and the newest cluster map.

One task, `Registration.run`: registers, retrying for ever with bounded back-off, then sends heartbeats at the
interval that it was told, and registers again when the service does not know it.  `map` is replaced only by a map of a
higher epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from blockstore.core.cluster_map import ClusterMap
from blockstore.identity import Identity, save_identity
from blockstore.protocol import BlockServerStatus, Heartbeat, RegisterServer
from wire.errors import NoSuchEntry, StoreError, WrongCluster
from wire.log import get_logger
from wire.rpc.client import Channel

CALL_TIMEOUT_S = 5.0
"""For one registration or heartbeat; the service answers in milliseconds when it is there."""
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 5.0
"""Between attempts: a service that restarts is found soon, one that is away for a day costs little."""
HEARTBEAT_MIN_S = 0.05

log = get_logger("blockstore.registration")


class Registration:
    """Keeps the server in the cluster map."""

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        *,
        address: tuple[str, int],
        rack: str,
        weight: int,
        metadata: tuple[str, int],
        status: Callable[[], BlockServerStatus],
    ) -> None:
        self._directory = directory
        self._address = address
        self._rack = rack
        self._weight = weight
        self._metadata = metadata
        self._status = status
        self._due = trio.Event()  # A heartbeat is wanted now.
        self._refused: WrongCluster | None = None
        self.identity = identity
        self.map: ClusterMap | None = None
        self.registered = trio.Event()

    @property
    def epoch(self) -> int:
        """Of the map that is held; 0 before the first one."""
        return self.map.epoch if self.map is not None else 0

    def refresh_soon(self) -> None:
        """Somebody has a newer map: ask for it now instead of at the next heartbeat."""
        self._due.set()

    def adopt(self, new: ClusterMap) -> None:
        """Take a map if it is newer."""
        if new.epoch > self.epoch or self.map is None:
            self.map = new

    async def run(self) -> None:
        """Register and send heartbeats for ever.

        Raises:
            WrongCluster: the directory belongs to another cluster.
        """
        async with trio.open_nursery() as nursery:
            channel = Channel(*self._metadata, service="metadata", instance=self.identity.cluster_id)
            await nursery.start(channel.run)
            try:
                while True:
                    interval_s = await self._register(channel)
                    await self._beat(channel, interval_s)
            except WrongCluster as error:
                self._refused = error  # Raised below, outside of the nursery, which would wrap it into a group.
            nursery.cancel_scope.cancel()
        if self._refused is not None:
            raise self._refused

    async def _register(self, channel: Channel) -> float:
        """Register until it succeeds; the interval of heartbeats in seconds."""
        pause_s = RETRY_FIRST_S
        while True:
            host, port = self._address
            request = RegisterServer(self.identity.uuid, self.identity.cluster_id, host, port, self._rack, self._weight)
            try:
                reply = await channel.call(request, timeout_s=CALL_TIMEOUT_S)
            except WrongCluster:
                raise
            except StoreError as error:
                log.warning("register_failed", service=channel.peer, error=error, next_try_s=pause_s)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
                continue
            await self._settle(reply.map.cluster_id, reply.server_id)
            self.adopt(reply.map)
            self.registered.set()
            log.info("registered", server_id=reply.server_id, epoch=self.epoch, cluster=reply.map.cluster_id)
            return max(reply.heartbeat_interval_ms / 1000, HEARTBEAT_MIN_S)

    async def _settle(self, cluster_id: str, server_id: int) -> None:
        """Hold the answer against the identity, or write it there the first time."""
        known = self.identity
        if known.cluster_id not in ("", cluster_id):
            raise WrongCluster(
                f"{self._directory} belongs to cluster {known.cluster_id}, but the inode service at "
                f"{self._metadata[0]}:{self._metadata[1]} is that of cluster {cluster_id}"
            )
        settled = msgspec.structs.replace(known, cluster_id=cluster_id, server_id=server_id)
        if settled != known:
            await trio.to_thread.run_sync(save_identity, self._directory, settled)
            self.identity = settled

    async def _beat(self, channel: Channel, interval_s: float) -> None:
        """Send heartbeats until the service does not know this server."""
        failing = False
        while True:
            self._due = trio.Event()
            with trio.move_on_after(interval_s):
                await self._due.wait()
            try:
                reply = await channel.call(Heartbeat(self._status()), timeout_s=CALL_TIMEOUT_S)
            except NoSuchEntry:
                return
            except WrongCluster:
                raise
            except StoreError as error:
                if not failing:
                    log.warning("heartbeat_failed", service=channel.peer, error=error)
                failing = True
                await trio.sleep(RETRY_FIRST_S)
                continue
            failing = False
            if reply.map is not None:
                self.adopt(reply.map)
