"""Figures for people: what `fsd status` and df(1) show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from blockstore.protocol import BlockId
from metadata.cluster_keeper import ClusterKeeper
from metadata.core import schema
from metadata.core.namespace import quotas
from metadata.engine.ports import EngineStatistics, ReadTxn
from metadata.protocol import (
    LISTED_SESSIONS_MAX,
    BadBlock,
    ClusterStatus,
    ListedSession,
    ListSessionsDone,
    ServerStatus,
    SessionStatus,
    StatFsDone,
)
from metadata.session_keeper import SessionKeeper

BAD_BLOCKS_SHOWN = 100
HELD_COUNT_MAX = 1000
"""Held inodes are counted up to this many per session."""
SESSIONS_SHOWN = 1000


def cluster_status(
    txn: ReadTxn,
    *,
    engine: EngineStatistics,
    cluster: ClusterKeeper,
    sessions: SessionKeeper,
    version: str,
    now_s: float,
    started_s: float,
) -> ClusterStatus:
    """Everything about the cluster that the inode service knows at this moment."""
    heartbeats = cluster.heartbeats
    servers = tuple(
        ServerStatus(
            server_id=server.server_id,
            seen_ms_ago=heartbeats.seen_ms_ago(server.server_id, now_s=now_s),
            status=heartbeats.status(server.server_id),
        )
        for server in cluster.map.servers
    )
    shown = tuple(
        SessionStatus(
            session=session.number,
            client=session.record.client,
            mountpoint=session.record.mountpoint,
            lease_left_ms=max(0, round((session.lease_until_s - now_s) * 1000)),
            held_inodes=len(txn.scan(*schema.held_range(session.number), HELD_COUNT_MAX)),
        )
        for session in list(sessions.table.live.values())[:SESSIONS_SHOWN]
    )
    return ClusterStatus(
        version=version,
        cluster_id=cluster.map.cluster_id,
        map=cluster.map,
        servers=servers,
        sessions=shown,
        inode_count=schema.decode_pair(txn.get(schema.INODES_COUNTER) or bytes(16))[1],
        deletion_queue=_counter(txn, schema.QUEUE_COUNTER),
        bad_block_count=_counter(txn, schema.BAD_BLOCKS_COUNTER),
        bad_blocks=_bad_blocks(txn),
        metadata_bytes=engine.used_bytes,
        metadata_free=engine.disk_free_bytes,
        uptime_ms=round((now_s - started_s) * 1000),
        session_count=len(sessions.table.live),
        fenced_count=sessions.fenced_count,
    )


def session_list(
    txn: ReadTxn, *, sessions: SessionKeeper, open_count: Callable[[int], int], now_s: float
) -> ListSessionsDone:
    """What the service knows of every session, and of those that have ended.

    Args:
        open_count: how many inodes a session has said to have open.
    """
    live, locks = sessions.table.live, sessions.locks.table
    waiting = Counter(waiter.key[0] for waiter in locks.waiters())
    shown = tuple(
        ListedSession(
            session=session.number,
            client=session.record.client,
            mountpoint=session.record.mountpoint,
            opened_ns=session.record.opened_ns,
            lease_left_ms=max(0, round((session.lease_until_s - now_s) * 1000)),
            alone=session.may_act_alone,
            reclaimed=session.number not in sessions.table.unreclaimed,
            open_inodes=open_count(session.number),
            nameless_inodes=len(txn.scan(*schema.held_range(session.number), HELD_COUNT_MAX)),
            locks=sum(1 for _ in locks.held(session.number)),
            waiting_locks=waiting[session.number],
        )
        for session in list(live.values())[:LISTED_SESSIONS_MAX]
    )
    return ListSessionsDone(
        sessions=shown,
        total=len(live),
        ended=sessions.ended(now_s=now_s),
        fenced_count=sessions.fenced_count,
        lease_ms=round(sessions.table.lease_s * 1000),
    )


def file_system_status(txn: ReadTxn, ino: int, *, space_total: int, space_free: int) -> StatFsDone:
    """What statvfs tells of a directory: of the cluster, or what the quotas at and above it say."""
    raw = txn.get(schema.inode_key(ino))  # None: somebody mounts a directory that was removed meanwhile.
    room = quotas.Room() if raw is None else quotas.room(txn, ino, schema.decode_inode(raw))
    _, inode_count = schema.decode_pair(txn.get(schema.INODES_COUNTER) or bytes(16))
    if room.bytes_total is not None and room.bytes_free is not None:
        space_total, space_free = room.bytes_total, min(room.bytes_free, space_free)
    return StatFsDone(
        space_total,
        space_free,
        inode_count,
        inodes_total=-1 if room.inodes_total is None else room.inodes_total,
        inodes_free=-1 if room.inodes_free is None else room.inodes_free,
        quota_free=-1 if room.bytes_free is None else room.bytes_free,
    )


def _counter(txn: ReadTxn, key: bytes) -> int:
    raw = txn.get(key)
    return schema.decode_number(raw) if raw else 0


def _bad_blocks(txn: ReadTxn) -> tuple[BadBlock, ...]:
    start, end = schema.BAD_BLOCK_RANGE
    shown = []
    for key, raw in txn.scan(start, end, BAD_BLOCKS_SHOWN):
        slice_id, index, server_id = schema.decode_bad_block_key(key)
        record = schema.decode_bad_block(raw)
        shown.append(BadBlock(BlockId(slice_id, index), server_id, record.reason, record.copies))
    return tuple(shown)
