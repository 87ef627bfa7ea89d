"""The supervisor: one process per data directory that runs a local cluster's services and starts them again.

Tasks: one `_keep` per service (start, wait until it serves, wait until it ends, pause, again), and the waiting for a
signal in mount.daemon.  Shared: the one ClusterState, changed only between awaits and written to state.json after each
change.  Order: the inode service serves before block servers start, as they register with it; at the end the block
servers go first, so that the inode service hears of nothing odd.

Children live no longer than the supervisor: each holds the read end of a pipe that closes with it (see mount.daemon),
kill -9 included, and ends cleanly then.  One that hangs is ended by the next `fsd up`, through state.json; directory
locks keep two of a kind apart in any case.
"""

from __future__ import annotations

import argparse
import os
import subprocess

import msgspec
import trio

from mount import config, daemon, logs
from mount.cluster_state import (
    FORMAT,
    HOST,
    ChildState,
    ClusterDirectory,
    ClusterIdentity,
    ClusterState,
    choose_port,
    port_is_free,
)
from mount.config import LogSettings, Settings, UpSettings, needed
from mount.daemon import Ready
from mount.outcome import CommandError, Exit
from mount.processes import fsd_command, fsd_environment, identify
from wire.log import get_logger
from wire.version import VERSION

logger = get_logger("mount.supervisor")

PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 5.0
"""Between two starts of a service that keeps dying; doubled each time from PAUSE_FIRST_S."""
STEADY_AFTER_S = 10.0
"""A service that lived this long has recovered: its next death is a first one."""
FIRST_STARTS_MAX = 3
"""A service that has never served and failed this often will not: `fsd up` is told why."""
PORT_CHANGES_MAX = 10
SERVERS_DEFAULT = 3
"""Block servers of a new cluster: one more than copies, so that one may be down and new blocks still get all theirs."""
STOP_GRACE_S = 20.0
"""From SIGTERM to SIGKILL: a service flushes what it has, which a slow disk makes long."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd supervise`, which `fsd up` starts."""
    config.add_flags(parser, "up", "log")
    daemon.add_daemon_flags(parser)


def run(flags: argparse.Namespace) -> Exit:
    """Be the supervisor of --data until told to end."""
    settings = Settings(flags)
    logs.configure(settings.take(LogSettings))
    up = settings.take(UpSettings)
    directory = ClusterDirectory(needed(up.data, "--data"))
    directory.make()
    if not directory.supervisor_lock.acquire_nowait():
        raise CommandError(f"{directory.data} has a supervisor already")
    supervisor = Supervisor(directory, up, settings.take(LogSettings))
    return daemon.run_service("supervisor", supervisor.run, flags)


def plan(directory: ClusterDirectory, settings: UpSettings) -> ClusterIdentity:
    """What the cluster is to be: as it was, with the servers asked for, on ports that are free.

    Raises:
        CommandError: fewer servers than before.
    """
    before = directory.identity()
    ports = [before.metadata_port, *before.block_ports] if before else []
    count = settings.servers or (len(before.block_ports) if before else SERVERS_DEFAULT)
    if before and count < len(before.block_ports):
        raise CommandError(
            f"{directory.data} has {len(before.block_ports)} block servers with data on them;"
            f" it cannot run with {count}"
        )
    wanted = 1 + count
    chosen: list[int] = []
    for index in range(wanted):
        kept = index < len(ports) and ports[index] not in chosen and port_is_free(ports[index])
        chosen.append(ports[index] if kept else choose_port({*ports, *chosen}))
    replicas = before.replicas if before else settings.replicas
    return ClusterIdentity(FORMAT, VERSION, replicas, chosen[0], chosen[1:])


class Supervisor:
    """Runs the services of one data directory."""

    def __init__(self, directory: ClusterDirectory, settings: UpSettings, log: LogSettings) -> None:
        self._directory = directory
        self._log = log
        self._new = directory.identity() is None
        self._identity = plan(directory, settings)
        self._lease_s = settings.lease_s
        children = [ChildState("metadata", HOST, self._identity.metadata_port, "starting")]
        for number, port in enumerate(self._identity.block_ports, start=1):
            children.append(ChildState(f"block-{number}", HOST, port, "starting"))
        me = identify(os.getpid())
        assert me is not None
        self._state = ClusterState(me, VERSION, children)
        self._lifeline, self._lifeline_writer = os.pipe()
        self._ending = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all services until `stop`; then end the block servers, and after them the inode service.

        Raises:
            CommandError: a service could not be started even once.
        """
        self._directory.save_identity(self._identity)
        self._save()
        metadata, *blocks = self._state.children
        async with trio.open_nursery() as for_metadata:
            await for_metadata.start(self._keep, metadata)
            async with trio.open_nursery() as for_blocks:
                async with trio.open_nursery() as starting:
                    for child in blocks:
                        if self._new:  # One after the other, so that block-1 becomes server 1.
                            await for_blocks.start(self._keep, child)
                        else:
                            starting.start_soon(for_blocks.start, self._keep, child)
                self._state.ready = True
                self._save()
                task_status.started((HOST, metadata.port))
                await self._ending.wait()
                for_blocks.cancel_scope.cancel()
            for_metadata.cancel_scope.cancel()

    async def stop(self) -> bool:
        """End `run` in order; False while it is still starting (it is to be cancelled then)."""
        self._ending.set()
        return self._state.ready

    async def _keep(self, child: ChildState, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run one service again and again; `started` when it serves for the first time.

        Raises:
            CommandError: it has never served, and failed FIRST_STARTS_MAX times.
        """
        pause, failures, port_changes, served = PAUSE_FIRST_S, 0, 0, False
        while True:
            began = trio.current_time()
            told = await self._run_once(child, task_status if not served else None)
            served = served or told.port > 0
            if not served and told.port_taken and port_changes < PORT_CHANGES_MAX:
                port_changes += 1
                self._move(child)
                continue
            failures += not served
            if failures >= FIRST_STARTS_MAX:
                where = self._directory.log / f"{child.name}.{'log' if told.exit_code else 'out'}"
                raise CommandError(f"{child.name} does not start: {told.error}; see {where}")
            if trio.current_time() - began > STEADY_AFTER_S:
                pause = PAUSE_FIRST_S
            child.state, child.process, child.last_error = "restarting", None, told.error
            child.restarts += 1
            self._save()
            logger.warning("service_died", name=child.name, reason=told.error, restarts=child.restarts, pause_s=pause)
            await trio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX_S)

    async def _run_once(self, child: ChildState, task_status: trio.TaskStatus[None] | None) -> Ready:
        """One life of a service, to its end; what it told on its ready pipe, with `error` set in any case.

        When cancelled the service is ended first, cleanly if it can.
        """
        read_end, write_end = os.pipe()
        output = logs.open_output(self._directory.log / f"{child.name}.out")
        try:
            process = await trio.lowlevel.open_process(
                [*self._command(child), "--ready-fd", str(write_end), "--lifeline-fd", str(self._lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=fsd_environment(),
                start_new_session=True,
                pass_fds=(write_end, self._lifeline),
            )
        finally:
            os.close(write_end)
            os.close(output)
        try:
            child.state, child.process = "starting", identify(process.pid)
            self._save()
            told = await _read_ready(read_end)
            if told.port:
                child.state = "ready"
                self._save()
                logger.info("service_ready", name=child.name, pid=process.pid, port=child.port)
                if task_status is not None:
                    task_status.started()
            code = await process.wait()
            return msgspec.structs.replace(told, error=told.error or f"exit code {code}")
        finally:
            with trio.CancelScope(shield=True):
                await self._end(child, process)

    async def _end(self, child: ChildState, process: trio.Process) -> None:
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(STOP_GRACE_S):
                await process.wait()
        if process.returncode is None:
            logger.warning("service_killed", name=child.name, pid=process.pid, grace_s=STOP_GRACE_S)
            process.kill()
            await process.wait()
        child.state, child.process = "stopped", None
        self._save()

    def _command(self, child: ChildState) -> list[str]:
        log = ["--log-file", str(self._directory.log / f"{child.name}.log"), "--log-level", self._log.level]
        log += ["--log-size-mib", str(self._log.size_mib)]
        where = ["--directory", str(self._directory.data / child.name), "--host", HOST, "--port", str(child.port)]
        metadata = self._state.children[0]
        if child is metadata:
            terms = ["--replicas", str(self._identity.replicas), "--lease-s", str(self._lease_s)]
            return fsd_command("metadata", *where, *terms, *log)
        return fsd_command("block", *where, "--metadata", f"{HOST}:{metadata.port}", *log)

    def _move(self, child: ChildState) -> None:
        """Another port for a service whose own is taken."""
        index = self._state.children.index(child)
        old, child.port = child.port, choose_port({one.port for one in self._state.children})
        if index == 0:
            self._identity.metadata_port = child.port
        else:
            self._identity.block_ports[index - 1] = child.port
        self._directory.save_identity(self._identity)
        logger.warning("port_taken", name=child.name, old=old, new=child.port)

    def _save(self) -> None:
        self._directory.save_state(self._state)


async def _read_ready(descriptor: int) -> Ready:
    """The line from a service's ready pipe; an empty one when it died without a word."""
    line = b""
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        async for piece in pipe:
            line += piece
    return msgspec.json.decode(line, type=Ready) if line else Ready()
