"""What a local cluster keeps about itself in its data directory, and where.

DATA/cluster.json     what it is: format, ports, number of servers; survives, changes seldom
DATA/metadata/        the inode service's data
DATA/block-1/ ...     the block servers' data
DATA/log/             one log per process
DATA/run/state.json   what runs now: processes and their state; meaningless after they have ended
DATA/run/supervisor.lock   held by the one supervisor for its life
DATA/run/command.lock      held by one `fsd up` or `fsd down` at a time
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import msgspec

from mount.files import FileLock, make_directory, read_json, write_json
from mount.outcome import CommandError
from mount.processes import ProcessId
from wire.version import VERSION

FORMAT = 1
"""Of cluster.json and of what lies beside it; raised when an older fsd must not touch it."""
HOST = "127.0.0.1"
PORT_FIRST = 20_000
"""Ports from here to the first ephemeral one: a service whose port is ephemeral may find, after a crash, that its
own client's attempts to reconnect were given that port and connected to themselves."""
PORT_TRIES_MAX = 200


class ClusterIdentity(msgspec.Struct):
    """cluster.json."""

    format: int
    version: str  # Of the fsd that wrote it last.
    replicas: int
    metadata_port: int
    block_ports: list[int]  # One per block server; block-N is the N-th, from 1.


class ChildState(msgspec.Struct):
    """One service of a running cluster."""

    name: str
    host: str
    port: int
    state: str  # "starting", "ready", "restarting", "stopped"
    process: ProcessId | None = None
    restarts: int = 0
    last_error: str = ""


class ClusterState(msgspec.Struct):
    """state.json."""

    supervisor: ProcessId
    version: str
    children: list[ChildState]
    ready: bool = False


class ClusterDirectory:
    """The paths in one data directory, and what is in them."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data / "log"
        self.run = data / "run"
        self.identity_file = data / "cluster.json"
        self.state_file = self.run / "state.json"
        self.supervisor_lock = FileLock(self.run / "supervisor.lock")
        self.command_lock = FileLock(self.run / "command.lock")

    def make(self) -> None:
        """Make what is missing.

        Raises:
            CommandError: it cannot be made, or is not ours to write.
        """
        make_directory(self.data, "the cluster's data")
        make_directory(self.log, "logs")
        make_directory(self.run, "the cluster's state")

    def identity(self) -> ClusterIdentity | None:
        """What the cluster is; None: there is none here yet.

        Raises:
            CommandError: it is of a newer format, or damaged.
        """
        found: ClusterIdentity | None = read_json(self.identity_file, ClusterIdentity)
        if found is not None and found.format > FORMAT:
            raise CommandError(
                f"{self.data} was written by fsd {found.version} (format {found.format}); this is {VERSION},"
                f" which reads up to format {FORMAT}: use that version or a newer one"
            )
        return found

    def save_identity(self, identity: ClusterIdentity) -> None:
        """Replace cluster.json."""
        write_json(self.identity_file, identity)

    def state(self) -> ClusterState | None:
        """What ran when it was last written; None: nothing was started here."""
        found: ClusterState | None = read_json(self.state_file, ClusterState)
        return found

    def save_state(self, state: ClusterState) -> None:
        """Replace state.json."""
        write_json(self.state_file, state)

    def running(self) -> bool:
        """True while a supervisor has this directory."""
        return self.supervisor_lock.held_by_another()


def default_data() -> Path:
    """Where a local cluster's data lie when nobody says."""
    if os.geteuid() == 0:
        return Path("/var/lib/fsd")
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "fsd"


def runtime_directory() -> Path:
    """Where the records of this user's mounts lie; emptied by a reboot, as are the mounts."""
    chosen = os.environ.get("FSD_RUNTIME_DIR")
    if chosen:
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/fsd")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "fsd"
    # Never /tmp: what is read here decides which processes get signals.  A home may be shared between hosts.
    return Path(os.path.expanduser("~/.local/state/fsd")) / socket.gethostname()


def port_is_free(port: int, host: str = HOST) -> bool:
    """Nobody listens there and nothing is bound to it now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose_port(taken: set[int]) -> int:
    """A free port, below the ephemeral ones, that is none of `taken`.

    Raises:
        CommandError: none was found.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    last = ephemeral - 1 if ephemeral > PORT_FIRST + PORT_TRIES_MAX else 65_535
    for _ in range(PORT_TRIES_MAX):
        port = random.randint(PORT_FIRST, last)
        if port not in taken and port_is_free(port):
            return port
    raise CommandError(f"no free port found between {PORT_FIRST} and {last} on {HOST}")
