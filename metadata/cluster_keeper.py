"""The cluster map in action: registrations, heartbeats, servers that fall silent.

Tasks: `run`, which marks silent servers down and speaking ones up.

Shared state: `map`, replaced after each commit that changed it, never by an older one; Heartbeats.  Both change only
between awaits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from blockstore.core.cluster_map import ClusterMap, ServerState
from blockstore.protocol import Heartbeat, HeartbeatDone, RegisterServer, RegisterServerDone
from metadata.core import cluster
from metadata.core.cluster import Heartbeats
from metadata.engine.ports import WriteTxn
from metadata.group_commit import Batch, GroupCommit
from wire.errors import StoreError
from wire.log import get_logger
from wire.rpc.server import Call

log = get_logger("metadata.cluster")

GRACE_S = 0.25
"""Before a server is called down, what has arrived meanwhile is handled for so long: this process may have slept."""
RETRY_S = 1.0
"""After a full disk or an overload, before the next try to change the map."""
HEARTBEATS_PER_DOWN = 5
"""Heartbeats that have to be missing before a server counts as down."""


class ClusterKeeper:
    """Owner of the one true cluster map."""

    def __init__(
        self, *, commits: GroupCommit, map: ClusterMap, on_change: Callable[[], None], down_after_s: float
    ) -> None:
        self.map = map
        self.heartbeats = Heartbeats(down_after_s)
        self._commits = commits
        self._on_change = on_change
        self._scope = trio.CancelScope()

    # --- handlers -----------------------------------------------------------------------------------------------------

    def register(self, call: Call, request: RegisterServer) -> None:
        """RegisterServer: answered when the server is in the map, durably."""
        self._commits.submit(_Register(self, call, request))

    def heartbeat(self, call: Call, request: Heartbeat) -> None:
        """Heartbeat: answered at once."""
        status = request.status
        self.heartbeats.heard(status, map=self.map, now_s=trio.current_time())
        if self.map.servers and any(
            server.server_id == status.server_id and server.state is ServerState.DOWN for server in self.map.servers
        ):
            self._scope.cancel()  # `run` looks again, and brings it up.
        call.reply(HeartbeatDone(self.map if status.epoch < self.map.epoch else None))

    def heartbeat_interval_ms(self) -> int:
        """What servers are told."""
        return max(1, round(self.heartbeats.down_after_s * 1000 / HEARTBEATS_PER_DOWN))

    # --- the map ------------------------------------------------------------------------------------------------------

    def publish(self, map: ClusterMap) -> None:
        """A commit has changed the map."""
        if map.epoch > self.map.epoch:
            self.map = map
            self._scope.cancel()  # `run` computes its next look anew.
            self._on_change()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self.heartbeats.start(now_s=trio.current_time())
        task_status.started()
        while True:
            now_s = trio.current_time()
            states = self.heartbeats.changes(self.map, now_s=now_s)
            if ServerState.DOWN in states.values():
                await trio.sleep(GRACE_S)
                states = self.heartbeats.changes(self.map, now_s=now_s)
            if states:
                await self._set_states(states)
                continue
            with trio.CancelScope(deadline=self.heartbeats.next_change_s(self.map)) as self._scope:
                await trio.sleep_forever()

    async def _set_states(self, states: dict[int, ServerState]) -> None:
        try:
            map = await self._commits.change(partial(_set_states, states))
        except StoreError as error:
            log.warning("map-change-delayed", error=error)
            await trio.sleep(RETRY_S)
            return
        assert isinstance(map, ClusterMap)
        for server_id, state in states.items():
            (log.warning if state is ServerState.DOWN else log.info)(
                "server-state", server=server_id, state=state, epoch=map.epoch
            )
        self.publish(map)


def _set_states(states: dict[int, ServerState], txn: WriteTxn, batch: Batch) -> ClusterMap:
    cluster.set_states(txn, states)
    return cluster.load_map(txn)


class _Register:
    """Takes a server in and answers it."""

    __slots__ = ("_call", "_keeper", "_request")

    def __init__(self, keeper: ClusterKeeper, call: Call, request: RegisterServer) -> None:
        self._keeper = keeper
        self._call = call
        self._request = request

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        server_id, _ = cluster.register(txn, self._request, now_ns=batch.now_ns)
        return server_id, cluster.load_map(txn)

    def finish(self, result: object) -> None:
        if isinstance(result, StoreError):
            self._call.fail(result)
            return
        assert isinstance(result, tuple)
        server_id, map = result
        request, keeper = self._request, self._keeper
        log.info("server-registered", server=server_id, host=request.host, port=request.port, epoch=map.epoch)
        keeper.heartbeats.registered(server_id, now_s=trio.current_time())
        keeper.publish(map)
        self._call.reply(RegisterServerDone(server_id, keeper.heartbeat_interval_ms(), keeper.map))
