"""The cluster map and its changes, and what was heard of the block servers lately.

Durable: the cluster's record (its name, the epoch, the number of groups, the next server id) and one record per
server, changed by the functions here inside the service's write transactions; each change raises the epoch by one.
Not durable: when each server was last heard from and what it reported (Heartbeats); `now_s` is a monotonic clock.

Invariant: a server id is given out once, to one uuid, for ever.
Invariant: of two maps of one cluster, the one with the higher epoch is the newer; equal epochs are equal maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from blockstore.core.cluster_map import SERVER_COUNT_MAX, ClusterMap, Server, ServerState
from blockstore.protocol import BlockServerStatus, RegisterServer
from metadata.core import schema
from metadata.core.schema import ClusterRecord, ServerRecord
from metadata.engine.ports import ReadTxn, WriteTxn
from wire.errors import NoSuchEntry, QuotaExceeded, WrongCluster

GROUP_COUNT = 4096
"""Placement groups of a new cluster: about 100 per server and replica for clusters of some dozens of servers."""


# --- what is durable --------------------------------------------------------------------------------------------------


def found(txn: WriteTxn, *, cluster_id: str) -> None:
    """Make the record of a new cluster; nothing if there is one."""
    if txn.get(schema.CLUSTER_KEY) is None:
        txn.put(schema.CLUSTER_KEY, schema.encode_record(ClusterRecord(cluster_id, 1, GROUP_COUNT)))


def load_map(txn: ReadTxn) -> ClusterMap:
    """The map as it is stored."""
    cluster = _cluster(txn)
    servers = tuple(record.server for record in _servers(txn))
    return ClusterMap(cluster.epoch, cluster.cluster_id, cluster.group_count, servers)


def register(txn: WriteTxn, request: RegisterServer, *, now_ns: int) -> tuple[int, bool]:
    """Take a server in, or note its new address; (its id, whether the map has changed).

    A server that registers is up, unless it was given up or is being emptied: those states are an operator's.
    Raises: WrongCluster, QuotaExceeded (SERVER_COUNT_MAX); nothing was changed.
    """
    cluster = _cluster(txn)
    if request.cluster_id not in ("", cluster.cluster_id):
        raise WrongCluster(f"the block server's directory belongs to cluster {request.cluster_id}")
    servers = _servers(txn)
    before = next((record for record in servers if record.uuid == request.uuid), None)
    if before is None:
        if len(servers) >= SERVER_COUNT_MAX:
            raise QuotaExceeded(f"the cluster has {SERVER_COUNT_MAX} servers already")
        server_id, state, joined_ns = cluster.next_server_id, ServerState.UP, now_ns
        cluster = msgspec.structs.replace(cluster, next_server_id=server_id + 1)
    else:
        server_id, state, joined_ns = before.server.server_id, before.server.state, before.joined_ns
        if state is ServerState.DOWN:
            state = ServerState.UP
    server = Server(server_id, request.host, request.port, request.rack, request.weight, state)
    after = ServerRecord(request.uuid, server, joined_ns)
    if after == before:
        return server_id, False
    txn.put(schema.server_key(server_id), schema.encode_record(after))
    _raise_epoch(txn, cluster)
    return server_id, True


def set_states(txn: WriteTxn, states: Mapping[int, ServerState]) -> bool:
    """Servers come or go: UP becomes DOWN and DOWN becomes UP, other states stay.  True: the map has changed."""
    changed = False
    for server_id, state in states.items():
        raw = txn.get(schema.server_key(server_id))
        if raw is None:
            continue
        record = schema.decode_server(raw)
        if {record.server.state, state} == {ServerState.UP, ServerState.DOWN}:
            server = msgspec.structs.replace(record.server, state=state)
            txn.put(schema.server_key(server_id), schema.encode_record(msgspec.structs.replace(record, server=server)))
            changed = True
    if changed:
        _raise_epoch(txn, _cluster(txn))
    return changed


def _cluster(txn: ReadTxn) -> ClusterRecord:
    raw = txn.get(schema.CLUSTER_KEY)
    assert raw is not None, "the directory was not made ready"
    return schema.decode_cluster(raw)


def _servers(txn: ReadTxn) -> list[ServerRecord]:
    start, end = schema.SERVER_RANGE
    return [schema.decode_server(raw) for _, raw in txn.scan(start, end, SERVER_COUNT_MAX)]


def _raise_epoch(txn: WriteTxn, cluster: ClusterRecord) -> None:
    txn.put(schema.CLUSTER_KEY, schema.encode_record(msgspec.structs.replace(cluster, epoch=cluster.epoch + 1)))


# --- what is not ------------------------------------------------------------------------------------------------------


@dataclass
class Heartbeats:
    """Signs of life of the servers of a map."""

    down_after_s: float
    _heard_s: dict[int, float] = field(default_factory=dict)  # From registration on, or from the service's start.
    _status: dict[int, BlockServerStatus] = field(default_factory=dict)
    _waiting_since_s: float = 0.0

    def start(self, *, now_s: float) -> None:
        """The service begins: servers it has not heard from are given their time from now on."""
        self._waiting_since_s = now_s

    def registered(self, server_id: int, *, now_s: float) -> None:
        """The server has registered."""
        self._heard_s[server_id] = now_s

    def heard(self, status: BlockServerStatus, *, map: ClusterMap, now_s: float) -> None:
        """A heartbeat came.  Raises: NoSuchEntry (it is not in the map)."""
        if all(server.server_id != status.server_id for server in map.servers):
            raise NoSuchEntry(f"block server {status.server_id} is not registered")
        self._heard_s[status.server_id] = now_s
        self._status[status.server_id] = status

    def changes(self, map: ClusterMap, *, now_s: float) -> dict[int, ServerState]:
        """The servers whose state should change: silent ones go down, those that speak again come up."""
        states: dict[int, ServerState] = {}
        for server in map.servers:
            silent = now_s >= self._down_at_s(server.server_id)
            if server.state is ServerState.UP and silent:
                states[server.server_id] = ServerState.DOWN
            elif server.state is ServerState.DOWN and not silent and server.server_id in self._heard_s:
                states[server.server_id] = ServerState.UP
        return states

    def next_change_s(self, map: ClusterMap) -> float:
        """When the next server that is up goes down if it stays silent; infinity if none."""
        return min(
            (self._down_at_s(s.server_id) for s in map.servers if s.state is ServerState.UP), default=float("inf")
        )

    def _down_at_s(self, server_id: int) -> float:
        return self._heard_s.get(server_id, self._waiting_since_s) + self.down_after_s

    def seen_ms_ago(self, server_id: int, *, now_s: float) -> int:
        """-1: not since the service started."""
        heard = self._heard_s.get(server_id)
        return -1 if heard is None else max(0, round((now_s - heard) * 1000))

    def status(self, server_id: int) -> BlockServerStatus | None:
        """What the server reported last, if it has since the service started."""
        return self._status.get(server_id)

    def space(self, map: ClusterMap) -> tuple[int, int]:
        """(total, free) bytes under all servers that are not given up; a shared file system counts once."""
        total = free = 0
        devices: set[str] = set()
        for server in map.servers:
            status = self._status.get(server.server_id)
            if status is None or server.state is ServerState.DEAD or status.device in devices:
                continue
            if status.device:
                devices.add(status.device)
            total += status.space_total
            free += status.space_free
        return total, free
