"""The cluster map's changes and the signs of life behind them, on a virtual clock."""

from __future__ import annotations

import pytest

from blockstore.core.cluster_map import ClusterMap, ServerState
from blockstore.protocol import BlockServerStatus, RegisterServer
from metadata.core import cluster, schema
from metadata.core.cluster import Heartbeats
from metadata.engine.memory import MemoryEngine
from wire.errors import NoSuchEntry, WrongCluster


class Store:
    """An engine with a new cluster in it."""

    def __init__(self) -> None:
        self.engine = MemoryEngine()
        with self.engine.write() as txn:
            cluster.found(txn, cluster_id="the-cluster")
            txn.commit()

    def register(self, uuid: str, *, port: int = 1, cluster_id: str = "") -> tuple[int, bool]:
        with self.engine.write() as txn:
            result = cluster.register(txn, RegisterServer(uuid, cluster_id, "host", port, "", 1), now_ns=1)
            txn.commit()
        return result

    def set_states(self, states: dict[int, ServerState]) -> bool:
        with self.engine.write() as txn:
            result = cluster.set_states(txn, states)
            txn.commit()
        return result

    @property
    def map(self) -> ClusterMap:
        with self.engine.read() as txn:
            return cluster.load_map(txn)


def test_founding_twice_keeps_the_first_cluster() -> None:
    store = Store()
    with store.engine.write() as txn:
        cluster.found(txn, cluster_id="another")
        txn.commit()
    assert store.map.cluster_id == "the-cluster"


def test_a_server_keeps_its_id_and_every_change_raises_the_epoch() -> None:
    store = Store()
    assert store.map.epoch == 1
    assert store.register("a") == (1, True)
    assert store.register("b") == (2, True)
    assert store.map.epoch == 3
    assert store.register("a") == (1, False)
    assert store.map.epoch == 3
    assert store.register("a", port=2) == (1, True)
    assert store.map.epoch == 4
    assert [(s.server_id, s.port) for s in store.map.servers] == [(1, 2), (2, 1)]


def test_a_server_of_another_cluster_is_refused_and_nothing_changes() -> None:
    store = Store()
    with pytest.raises(WrongCluster):
        store.register("a", cluster_id="another")
    assert store.register("a", cluster_id="the-cluster") == (1, True)


def test_states_change_only_between_up_and_down() -> None:
    store = Store()
    store.register("a")
    assert store.set_states({1: ServerState.DOWN, 99: ServerState.DOWN})
    assert not store.set_states({1: ServerState.DOWN})
    assert [s.state for s in store.map.servers] == [ServerState.DOWN]
    store.register("a")
    assert [s.state for s in store.map.servers] == [ServerState.UP]
    with store.engine.write() as txn:  # An operator has given it up.
        record = schema.decode_server(txn.get(schema.server_key(1)) or b"")
        dead = type(record)(record.uuid, type(record.server)(1, "host", 1, "", 1, ServerState.DEAD))
        txn.put(schema.server_key(1), schema.encode_record(dead))
        txn.commit()
    assert not store.set_states({1: ServerState.UP})
    store.register("a", port=7)
    assert [s.state for s in store.map.servers] == [ServerState.DEAD]


def status(server_id: int, total: int = 100, free: int = 50, device: str = "") -> BlockServerStatus:
    return BlockServerStatus(server_id, total, free, 0, 0, device=device)


def test_silence_brings_a_server_down_and_a_heartbeat_up_again() -> None:
    store = Store()
    store.register("a")
    store.register("b")
    beats = Heartbeats(down_after_s=5)
    beats.start(now_s=100)
    assert beats.changes(store.map, now_s=104.9) == {}, "after a start everybody has time"
    beats.heard(status(1), map=store.map, now_s=104)
    assert beats.changes(store.map, now_s=105) == {2: ServerState.DOWN}
    assert beats.next_change_s(store.map) == 105
    store.set_states({2: ServerState.DOWN})
    assert beats.next_change_s(store.map) == 109
    assert beats.changes(store.map, now_s=108) == {}
    beats.heard(status(2), map=store.map, now_s=108)
    assert beats.changes(store.map, now_s=108) == {2: ServerState.UP}
    assert beats.seen_ms_ago(2, now_s=108.5) == 500
    assert beats.seen_ms_ago(3, now_s=108.5) == -1


def test_a_server_that_is_down_stays_down_over_a_restart_of_the_service() -> None:
    store = Store()
    store.register("a")
    store.set_states({1: ServerState.DOWN})
    beats = Heartbeats(down_after_s=5)
    beats.start(now_s=100)
    assert beats.changes(store.map, now_s=101) == {}
    assert beats.next_change_s(store.map) == float("inf")


def test_a_heartbeat_of_a_stranger_is_refused() -> None:
    with pytest.raises(NoSuchEntry):
        Heartbeats(5).heard(status(1), map=Store().map, now_s=1)


def test_space_is_counted_once_per_device() -> None:
    store = Store()
    for uuid in "abcd":
        store.register(uuid)
    beats = Heartbeats(5)
    for beat in (status(1, 100, 50, "x"), status(2, 100, 50, "x"), status(3, 10, 5), status(4, 20, 6)):
        beats.heard(beat, map=store.map, now_s=1)
    assert beats.space(store.map) == (130, 61)
