"""Where the copies of a block belong: a pure function of the cluster map and the block's id.

block id -> placement group (a stable hash modulo the map's group_count) -> all servers that are not dead, ordered by
weighted rendezvous hashing and then dealt out rack by rack.  The order does not depend on which servers are up, so
that a server which comes back finds its blocks where they are looked for.

Invariants, each checked by tests/unit/test_placement.py:
- B1: the first k servers are on min(k, racks) different racks; a server without a rack is a rack of its own.
- B2: one more server among n takes over about its share (its weight) of the copies, and hardly any copy moves between
  the other servers.
- B3: the order depends on the ids, racks and weights of the servers alone.
"""

from __future__ import annotations

from math import log

from blockstore.core.cluster_map import ClusterMap, Server, ServerState
from blockstore.protocol import BlockId

_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """A 64-bit hash of a 64-bit number: every input bit changes half of the output's.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    Never to be changed: it says where blocks are.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def group_of(block: BlockId, group_count: int) -> int:
    """The placement group of a block, 0 to group_count - 1; the blocks of one slice spread over all groups."""
    return mix(mix(block.slice_id & _MASK) + block.index & _MASK) % group_count


def _score(group: int, server: Server) -> float:
    """The server's draw for the group: the highest wins, in proportion to the weights.

    Source: Schindelhauer, Schomaker: Weighted Distributed Hash Tables, 2005 (the logarithmic method).
    """
    draw = (mix(mix(group) ^ mix(server.server_id << 1 | 1)) >> 11) + 0.5  # 0.5 to 2**53 - 0.5, exact in a float
    return server.weight / -log(draw / (1 << 53))


def order_of_group(cluster_map: ClusterMap, group: int) -> tuple[Server, ...]:
    """All servers that are not dead, in the group's order of preference.

    First comes the best server of every rack, the racks in the order of their best, then the second of every rack ...
    """
    living = [server for server in cluster_map.servers if server.state != ServerState.DEAD]
    drawn = sorted(((-_score(group, server), server.server_id, server) for server in living), key=lambda d: d[:2])
    rank_in_rack: dict[str, int] = {}
    dealt: list[tuple[int, int, Server]] = []
    for position, (_, _, server) in enumerate(drawn):
        rank = 0
        if server.rack:
            rank = rank_in_rack.get(server.rack, 0)
            rank_in_rack[server.rack] = rank + 1
        dealt.append((rank, position, server))
    return tuple(server for _, _, server in sorted(dealt, key=lambda d: d[:2]))


def placement(cluster_map: ClusterMap, block: BlockId) -> tuple[Server, ...]:
    """All servers that are not dead, in the block's order of preference; the caller may cache it by `group_of`."""
    return order_of_group(cluster_map, group_of(block, cluster_map.group_count))


def wanted(order: tuple[Server, ...], replicas: int) -> tuple[Server, ...]:
    """The servers on which the copies of a block with that order belong, be they up or down.

    Draining servers are on their way out: their copies belong on those that follow.
    """
    return tuple(server for server in order if server.state != ServerState.DRAINING)[:replicas]


class PlacementCache:
    """`placement`, computed once per group of one map."""

    def __init__(self) -> None:
        self._map: ClusterMap | None = None
        self._orders: dict[int, tuple[Server, ...]] = {}

    def order(self, cluster_map: ClusterMap, block: BlockId) -> tuple[Server, ...]:
        """As `placement`; another map object empties the cache."""
        if cluster_map is not self._map:
            self._map = cluster_map
            self._orders.clear()
        group = group_of(block, cluster_map.group_count)
        order = self._orders.get(group)
        if order is None:
            order = self._orders[group] = order_of_group(cluster_map, group)
        return order
