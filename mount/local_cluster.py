"""`fsd up` and `fsd down`: a local cluster with its mounts, made, found again and ended."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from blockstore.core.cluster_map import ServerState
from metadata.protocol import ClusterStatus, GetClusterStatus
from mount import config, daemon, mount_table, mounting, records
from mount.cluster_state import HOST, ClusterDirectory, ClusterState, default_data
from mount.config import LogSettings, MountSettings, Settings, UpSettings
from mount.console import progress, say
from mount.inquiry import ask
from mount.options import parse_options
from mount.outcome import CommandError, Exit
from mount.processes import ProcessId, end, fsd_command
from mount.supervisor import STOP_GRACE_S
from mount.target import Address, Target

POLL_S = 0.05
LEFTOVER_GRACE_S = 5.0
"""For a service whose supervisor is gone to end by itself, and once more after SIGTERM."""


def add_up(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd up`."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    mounting.add_mount_flags(parser)
    config.add_section_flags(parser, "up")


def add_down(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd down`."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="default: all mounts of the cluster")
    parser.add_argument("--data", type=Path, help="the cluster's data directory (default: that of the mount)")
    parser.add_argument("--lazy", action="store_true", help="take busy mounts out of the tree instead of refusing")


def run_up(flags: argparse.Namespace) -> Exit:
    """Start the cluster unless it runs, and mount it unless it is mounted there."""
    options = parse_options(flags.options)
    flags.config = flags.config or (Path(options.config) if options.config else None)
    settings = Settings(flags)
    up = settings.take(UpSettings)
    mine = settings.take(MountSettings, options=options.settings)
    log = settings.take(LogSettings)
    directory = ClusterDirectory(up.data or default_data())
    already = _mounted_cluster(flags.mountpoint)
    mountpoint = already[0] if already else mounting.check_mountpoint(flags.mountpoint)
    mounting.check_fuse()
    _check_apart(directory.data, mountpoint)
    directory.make()
    with _alone(directory):
        address = _running(directory, timeout_s=up.ready_timeout_s)
        if address is None:
            address = _start(directory, up, log)
        else:
            _check_count(directory, up)
        status = wait_servers(address, timeout_s=up.ready_timeout_s)
        _tell_servers(status)
        if already is None:
            data = str(directory.data)
            target = Target(address)
            mounting.mount_in_background(target, mountpoint, flags, log, timeout_s=mine.timeout_s, data=data)
        elif already[1] != str(Target(address)):
            raise CommandError(
                f"{mountpoint} already shows {already[1]}, not the cluster in {directory.data};"
                f" first run: fsd umount {mountpoint}"
            )
    print(f"{mountpoint}: {'mounted' if already is None else 'is mounted already'}; data in {directory.data},"
          f" inode service at {address}, {len(status.map.servers)} block servers")  # fmt: skip
    return Exit.OK


def _mounted_cluster(path: str) -> tuple[str, str] | None:
    """(mount point, source) of a living fsd mount there; one whose daemon is gone is cleared away."""
    mountpoint = mount_table.canonical(path)
    mounting.clear_stale(mountpoint)
    entry = mount_table.find(mountpoint)
    return (mountpoint, entry.source) if entry is not None and entry.is_fsd else None


def _check_apart(data: Path, mountpoint: str) -> None:
    place = mount_table.canonical(str(data))
    if (place + "/").startswith(mountpoint.rstrip("/") + "/"):
        raise CommandError(f"the data directory {place} is inside the mount point {mountpoint}; choose another --data")


@contextmanager
def _alone(directory: ClusterDirectory) -> Iterator[None]:
    """One `up` or `down` of a data directory at a time."""
    if not directory.command_lock.acquire_nowait():
        with progress(f"waiting for another fsd up or down of {directory.data}"):
            directory.command_lock.acquire()
    try:
        yield
    finally:
        directory.command_lock.close()


def _running(directory: ClusterDirectory, *, timeout_s: float) -> Address | None:
    """The inode service's address when the cluster runs; None when there is no supervisor.

    A supervisor that is starting (its `fsd up` was interrupted) or ending is waited for.

    Raises:
        CommandError: it is still neither there nor gone after `timeout_s`.
    """

    async def poll() -> Address | None:
        with trio.fail_after(timeout_s):
            while directory.running():
                state = directory.state()
                if state is not None and state.ready and state.supervisor.alive():
                    return Address(HOST, state.children[0].port)
                await trio.sleep(POLL_S)  # Another process's file; there is nothing to wait on.
        return None

    try:
        with progress(f"waiting for the supervisor of {directory.data}"):
            return trio.run(poll)
    except trio.TooSlowError:
        log = directory.log / "supervisor.log"
        raise CommandError(f"the supervisor of {directory.data} is neither ready nor gone; see {log}") from None


def _check_count(directory: ClusterDirectory, up: UpSettings) -> None:
    """A running cluster has the servers it has; to ignore --servers silently would be worse than to refuse it."""
    state = directory.state()
    count = len(state.children) - 1 if state else 0
    if up.servers is not None and up.servers != count:
        raise CommandError(
            f"the cluster in {directory.data} runs with {count} block servers; for {up.servers}, first run:"
            f" fsd down --data {directory.data}"
        )


def _start(directory: ClusterDirectory, up: UpSettings, log: LogSettings) -> Address:
    """Start a supervisor, after ending what a dead one may have left; return when every service answers."""
    before = directory.state()
    if before is not None:
        left = _end_children(before)
        if left:
            raise CommandError(f"processes of an earlier run of {directory.data} do not end: {left}")
    directory.identity()  # Data of a newer version are told before anything is started.
    command = fsd_command("supervise", "--data", str(directory.data), "--replicas", str(up.replicas))
    command += ["--servers", str(up.servers)] if up.servers else []
    command += ["--lease-s", str(up.lease_s)]
    command += ["--log-file", str(directory.log / "supervisor.log")]
    command += ["--log-level", log.level, "--log-size-mib", str(log.size_mib)]
    with progress("starting the inode service and the block servers"):
        spawned = daemon.Spawned(command, output=directory.log / "supervisor.out")
        ready = spawned.wait_ready(up.ready_timeout_s, what="the local cluster")
    spawned.release()
    return Address(ready.host, ready.port)


def _end_children(state: ClusterState) -> str:
    """End services that outlived their supervisor: block servers first; what does not end, for people."""
    left = []
    for child in reversed(state.children):
        if child.process is None or not child.process.alive():
            continue
        with progress(f"ending {child.name} (pid {child.process.pid}) of an earlier run"):
            if not child.process.wait_end(LEFTOVER_GRACE_S) and not end(child.process, grace_s=LEFTOVER_GRACE_S):
                left.append(f"{child.name} (pid {child.process.pid})")
    return ", ".join(left)


def wait_servers(address: Address, *, timeout_s: float) -> ClusterStatus:
    """Wait until all block servers that the map knows are up and have told their space, without which df shows none.

    After `timeout_s`, what there is by then.

    Raises:
        CommandError: the inode service does not answer.
    """

    async def poll() -> ClusterStatus:
        deadline = trio.current_time() + timeout_s
        while True:
            status = await ask(address, GetClusterStatus(), timeout_s=timeout_s)
            heard = {one.server_id for one in status.servers if one.status is not None}
            awaited = [one for one in status.map.servers if one.state in (ServerState.UP, ServerState.DOWN)]
            ready = all(one.state == ServerState.UP and one.server_id in heard for one in awaited)
            if (awaited and ready) or trio.current_time() >= deadline:
                return status
            await trio.sleep(POLL_S)  # The service has no call that waits for this.

    with progress("waiting for the block servers"):
        return trio.run(poll)


def _tell_servers(status: ClusterStatus) -> None:
    down = [one for one in status.map.servers if one.state == ServerState.DOWN]
    if down:
        say(f"note: {len(down)} of {len(status.map.servers)} block servers are down; fsd status tells which")


def run_down(flags: argparse.Namespace) -> Exit:
    """Unmount, and end the cluster when no mount of it is left."""
    mountpoint = mount_table.canonical(flags.mountpoint) if flags.mountpoint else None
    record = records.load(mountpoint) if mountpoint else None
    data = flags.data or (Path(record.data) if record and record.data else None)
    if data is None and record is not None:
        raise CommandError(
            f"{mountpoint} shows {record.target}, which fsd up did not start; run: fsd umount {mountpoint}"
        )
    directory = ClusterDirectory(Path(os.path.abspath(data or default_data())))
    if not directory.run.is_dir():
        raise CommandError(f"no cluster was ever started in {directory.data}; give the right --data")
    with _alone(directory):
        state = directory.state()
        _check_belongs(mountpoint, directory, state)
        if mountpoint:
            _take_down(mountpoint, lazy=flags.lazy)
        others = mounts_of(directory, state)
        if mountpoint and others:
            print(f"{mountpoint}: unmounted; the cluster stays up for {', '.join(others)}")
            return Exit.OK
        for other in others:
            _take_down(other, lazy=flags.lazy)
        return _stop(directory, state)


def _check_belongs(mountpoint: str | None, directory: ClusterDirectory, state: ClusterState | None) -> None:
    """A mount of something else is not taken down by a command for this cluster."""
    entry = mount_table.find(mountpoint) if mountpoint else None
    if entry is not None and mountpoint not in mounts_of(directory, state):
        raise CommandError(
            f"{mountpoint} shows {entry.source}, not the cluster in {directory.data}; give the right --data"
        )
    if mountpoint and entry is None and not os.path.isdir(mountpoint):
        raise CommandError(f"{mountpoint} does not exist; fsd down without it stops the cluster in {directory.data}")


def mounts_of(directory: ClusterDirectory, state: ClusterState | None) -> list[str]:
    """Mount points that show this cluster."""
    data = str(directory.data)
    known = {record.mountpoint for record in records.all_records() if record.data == data}
    prefix = f"{HOST}:{state.children[0].port}:/" if state else None
    found = []
    for entry in mount_table.all_mounts():
        shows = prefix is not None and entry.source.startswith(prefix)
        if entry.is_fsd and (entry.mountpoint in known or shows):
            found.append(entry.mountpoint)
    return found


def _take_down(mountpoint: str, *, lazy: bool) -> None:
    if mount_table.find(mountpoint) is not None and not mounting.clear_stale(mountpoint):
        mounting.unmount_and_wait(mountpoint, lazy=lazy)
    records.remove(mountpoint)


def _stop(directory: ClusterDirectory, state: ClusterState | None) -> Exit:
    """End supervisor and services; PARTIAL when something does not end."""
    if state is None:
        print(f"{directory.data}: nothing is running")
        return Exit.OK
    was_running = directory.running()
    left = []
    with progress("stopping the block servers and the inode service"):
        # The supervisor ends its services in order, each within its grace; twice that is one that hangs itself.
        if not _end_supervisor(state.supervisor, grace_s=(len(state.children) + 1) * STOP_GRACE_S):
            left.append(f"supervisor (pid {state.supervisor.pid})")
        children = _end_children(directory.state() or state)
        if children:
            left.append(children)
    if left:
        say(f"{directory.data}: still running: {', '.join(left)}")
        return Exit.PARTIAL
    print(f"{directory.data}: {'stopped' if was_running else 'nothing was running'}; the data stay")
    return Exit.OK


def _end_supervisor(supervisor: ProcessId, *, grace_s: float) -> bool:
    if not supervisor.signal(signal.SIGTERM):
        return True
    return supervisor.wait_end(grace_s) or end(supervisor, grace_s=0.0)
