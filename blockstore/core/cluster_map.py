"""The cluster map: which block servers there are, where, how large, in what state; versioned by its epoch.

The inode service keeps the one true map and raises its epoch with every change; everybody else holds a copy.
Placement (placement.py) is a pure function of a map and a block id.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from wire.message import Message

SERVER_COUNT_MAX = 4096
"""Servers in one map; a map of that many is about 300 KiB on the wire, below the frame's bound for a body."""

HostName = Annotated[str, msgspec.Meta(max_length=255)]
RackName = Annotated[str, msgspec.Meta(max_length=64)]


class ServerState(enum.IntEnum):
    """What the cluster expects of a server."""

    UP = 1  # Takes new blocks and serves old ones.
    DOWN = 2  # Not heard from for a while; may come back with all it had.
    DRAINING = 3  # Serves what it has, takes nothing new.
    DEAD = 4  # Given up: its copies count as lost.


class Server(Message, frozen=True, array_like=True):
    """One block server as the map shows it."""

    server_id: int
    host: HostName
    port: int
    rack: RackName = ""
    weight: int = 1  # Share of the blocks it gets, relative to others: its capacity in GiB, at least 1.
    state: ServerState = ServerState.UP


class ClusterMap(Message, frozen=True, array_like=True):
    """All servers at one epoch."""

    epoch: int
    cluster_id: str  # UUID of the cluster, made when the inode service first started.
    group_count: int  # Placement groups; fixed for the life of a cluster.
    servers: Annotated[tuple[Server, ...], msgspec.Meta(max_length=SERVER_COUNT_MAX)] = ()
