"""The inode service's process: one directory, one listening port, and the tasks between them.

Tasks, from the outermost in: the group commit, which must outlive everything that submits to it; around the rest, one
nursery with the keepers of sessions and of the cluster map, the reaper with its channels to the block servers, and
the RPC server.  Cancelling `run_inode_service` stops all but the group commit at once; that first commits what is
queued, then the engine is closed and the directory's lock let go.

Nothing here blocks the loop but the start, before anything is served.
"""

from __future__ import annotations

import fcntl
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from blockstore.core.cluster_map import ClusterMap
from metadata.causes import single_cause
from metadata.cluster_keeper import ClusterKeeper
from metadata.core import cluster, format, migrate, sessions
from metadata.core.opens import Opens
from metadata.core.schema import SCHEMA_VERSION
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import Engine, RunAgain
from metadata.group_commit import GroupCommit, GroupCommitLimits
from metadata.lock_keeper import LockKeeper
from metadata.reaper import Reaper
from metadata.service import SERVICE_METHODS, InodeService
from metadata.session_keeper import SessionKeeper
from metadata.snapshot import Snapshot
from wire.errors import StoreError
from wire.log import get_logger
from wire.rpc.server import RpcServer, ServerLimits, open_listener
from wire.version import VERSION

log = get_logger("metadata.server")

SERVICE = "metadata"
LOCK_FILE = "lock"
ENGINE_DIRECTORY = "lmdb"
SWITCH_INTERVAL_S = 0.0005
"""How long the writer's thread may keep the interpreter while the loop wants it (the default is ten times as long)."""


MIGRATION_TOLD_EVERY_S = 2.0
"""A line of the log about how far a migration has come."""


class DirectoryInUse(StoreError):
    """Another inode service runs on this directory."""


@dataclass(frozen=True)
class InodeServiceConfig:
    """What a service needs to know; everything else is in its directory."""

    directory: Path  # Made if it is not there; its parent must be.
    host: str  # To listen on.
    port: int  # 0: any free one.
    lease_s: float = 20.0  # A session that is not renewed for this long ends.
    server_down_after_s: float = 5.0  # A block server that is silent for this long is marked down.
    delete_after_s: float = 10.0  # Blocks that nobody refers to are kept this long, for readers with an old layout.
    replicas: int = 2  # Copies of the blocks of new files, set in the root directory at the first start.
    owner_uid: int = 0  # Of the root directory, at the first start.
    owner_gid: int = 0
    commit_limits: GroupCommitLimits = field(default_factory=GroupCommitLimits)
    rpc_limits: ServerLimits = field(default_factory=ServerLimits)


class Clock:
    """The wall clock in nanoseconds, but never going backwards while the service lives."""

    def __init__(self) -> None:
        self._last_ns = 0

    def now_ns(self) -> int:
        """Nanoseconds since 1970; equal or later than every time given out before."""
        self._last_ns = max(self._last_ns, time.time_ns())
        return self._last_ns


async def run_inode_service(
    config: InodeServiceConfig,
    *,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
    open_engine: Callable[[Path], Engine] = LmdbEngine,
) -> None:
    """Serve until cancelled; `task_status.started((host, port))` once it answers.

    Raises:
        DirectoryInUse: another service runs on the directory.
        WrongVersion: the directory was written by a later version, whose schema this one does not know.
        OSError: the directory cannot be made or the port not be had; the message says which.
        EngineBroken: the store has failed in a way that needs it to be opened again; start the service again.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with _locked(config.directory):
        engine = open_engine(config.directory / ENGINE_DIRECTORY)
        try:
            await _run(config, engine, task_status)
        except BaseExceptionGroup as group:
            raise single_cause(group) from None
        finally:
            engine.close()


async def _run(config: InodeServiceConfig, engine: Engine, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
    clock = Clock()
    prepare(engine, config, now_ns=clock.now_ns())
    await migrate_store(engine)
    snapshot = Snapshot(engine)
    with snapshot.fresh() as txn:
        map, records = cluster.load_map(txn), sessions.load(txn)
    opens = Opens(unreclaimed=[number for number, record in records if not record.ended])
    commits = GroupCommit(engine, clock_ns=clock.now_ns, limits=config.commit_limits, opens=opens)
    cluster_keeper = ClusterKeeper(
        commits=commits,
        map=map,
        on_change=lambda: session_keeper.map_changed(),
        down_after_s=config.server_down_after_s,
    )
    lock_keeper = LockKeeper(snapshot=snapshot, life=uuid.uuid4().hex)
    session_keeper = SessionKeeper(
        commits=commits,
        snapshot=snapshot,
        current_map=lambda: cluster_keeper.map,
        lease_s=config.lease_s,
        locks=lock_keeper,
        unreclaimed=opens.unreclaimed,
    )
    session_keeper.restore(records)
    reaper = Reaper(
        commits=commits,
        snapshot=snapshot,
        current_map=lambda: cluster_keeper.map,
        clock_ns=clock.now_ns,
        delete_after_s=config.delete_after_s,
    )
    service = InodeService(
        engine=engine,
        commits=commits,
        snapshot=snapshot,
        sessions=session_keeper,
        cluster=cluster_keeper,
        version=VERSION,
    )
    rpc = RpcServer(
        service=SERVICE,
        methods=SERVICE_METHODS,
        handler=service.handle,
        drained=service.drained,
        limits=config.rpc_limits,
        instance=map.cluster_id,
    )
    commits.around_answers = rpc.answer_together
    listener = await open_listener(config.host, config.port)
    host, port = listener.getsockname()[:2]
    async with trio.open_nursery() as outer:
        await outer.start(commits.run)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(cluster_keeper.run)
                await nursery.start(lock_keeper.run)
                await nursery.start(session_keeper.run)
                await nursery.start(reaper.run)
                await nursery.start(rpc.serve, [listener])
                log.info("serving", host=host, port=port, directory=config.directory, cluster=map.cluster_id)
                task_status.started((host, port))
        finally:
            outer.cancel_scope.cancel()
            _log_statistics(commits, rpc, engine, reaper)


def prepare(engine: Engine, config: InodeServiceConfig, *, now_ns: int) -> ClusterMap:
    """Make a file system if the store is new; returns its map.

    Raises: WrongVersion; nothing was changed.
    """
    with engine.write() as txn:
        if not format.is_formatted(txn):
            format.format_store(
                txn, now_ns=now_ns, replicas=config.replicas, uid=config.owner_uid, gid=config.owner_gid
            )
            log.info("formatted", directory=config.directory, replicas=config.replicas)
        cluster.found(txn, cluster_id=str(uuid.uuid4()))
        txn.commit()
    with engine.read() as reading:
        return cluster.load_map(reading)


async def migrate_store(engine: Engine) -> None:
    """Bring a store of an earlier schema to this program's, in steps; when cancelled, the next start goes on.

    Raises: NoSpace, EngineFault, EngineBroken; the steps before are kept.
    """
    with engine.write() as txn:
        if not migrate.begin(txn):
            return
        txn.commit()
    told_s = -math.inf
    while True:
        try:
            with engine.write() as txn:
                progress = migrate.advance(txn)
                txn.commit()
        except RunAgain:
            continue
        if progress is None:
            log.info("migrated", to_schema=SCHEMA_VERSION)
            return
        if trio.current_time() - told_s >= MIGRATION_TOLD_EVERY_S:
            told_s = trio.current_time()
            log.info("migrating", to_schema=SCHEMA_VERSION, **asdict(progress))
        await trio.lowlevel.checkpoint()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel lets go of it when the process dies, however it dies."""
    directory.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
            raise DirectoryInUse(f"another inode service (process {holder}) runs on {directory}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _log_statistics(commits: GroupCommit, rpc: RpcServer, engine: Engine, reaper: Reaper) -> None:
    log.info("commit-statistics", **asdict(commits.statistics))
    log.info("rpc-statistics", **asdict(rpc.statistics()))
    log.info("engine-statistics", **asdict(engine.statistics()))
    log.info("reaper-statistics", **asdict(reaper.statistics))
