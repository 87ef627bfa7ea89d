"""An inode service, a block server and mounts, each a process of the test's own: to stop, kill, break or move.

`fsd up` (tests/support/cluster.py) starts what users start.  Here nothing is supervised: each process may run on a
machine of its own (tests/support/netns.py), with other settings, or with a bug planted into it
(tests/support/planted.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mount import mount_table
from mount.processes import fsd_environment
from tests.support.cluster import COMMAND_TIMEOUT_S, FRONTEND, fail_without_fuse, place_for_clusters, wait_until
from tests.support.netns import SERVICE_ADDRESS, Machine, Network

END_TIMEOUT_S = 60.0


class Part:
    """One process."""

    def __init__(self, name: str, argv: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self.log = name, log
        self._argv, self._environment = list(argv), environment
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; for SIGKILL, wait until it is gone."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(END_TIMEOUT_S)

    def restart(self) -> None:
        """Start it again, after its end."""
        assert self.process.poll() is not None
        self.process = self._started()

    def end(self) -> None:
        """By SIGTERM, and by force if that takes long; also when it stands still."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_TIMEOUT_S)

    def log_tail(self, count: int = 25) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return f"--- {self.name}\n" + "\n".join(lines[-count:])


class BareCluster:
    """Processes below one directory."""

    def __init__(self, directory: Path, net: Network | None) -> None:
        self.directory, self.net = directory, net
        self.host = SERVICE_ADDRESS if net else "127.0.0.1"
        self.port, self._block_port = (7400, 7401) if net else (free_port(), free_port())
        self.parts: list[Part] = []
        self._environment = {**fsd_environment(), "FSD_RUNTIME_DIR": str(directory / "run")}

    def start(self, name: str, *arguments: str, machine: Machine | None = None, bugs: Sequence[str] = ()) -> Part:
        """Run `fsd ARGUMENTS`, with these bugs."""
        module = ["-m", "tests.support.planted", ",".join(bugs)] if bugs else ["-m", "mount"]
        argv = [sys.executable, "-P", *module, *arguments]
        part = Part(
            name, machine.command(*argv) if machine else argv, self.directory / f"{name}.log", self._environment
        )
        self.parts.append(part)
        return part

    def service(self, *, lease_s: float, bugs: Sequence[str] = (), with_blocks: bool = True) -> Part:
        """Start the inode service and, for files above 16 KiB, the block server; wait until they can be used."""
        machine = self.net.service if self.net else None
        where = ["--host", "0.0.0.0" if self.net else self.host]
        directory = str(self.directory / "metadata")
        port = str(self.port)
        part = self.start(
            *("service", "metadata", "--directory", directory, *where, "--port", port),
            *("--lease-s", str(lease_s), "--replicas", "1"),
            machine=machine,
            bugs=bugs,
        )
        wait_until(lambda: "serving" in part.log.read_text(), f"the service answers\n{self.logs()}")
        if not with_blocks:
            return part
        address = f"{self.host}:{self.port}"
        block = self.start(
            *("block", "block", "--directory", str(self.directory / "blocks"), "--metadata", address, *where),
            *("--port", str(self._block_port), "--advertise-host", self.host, "--weight", "1"),
            machine=machine,
        )
        wait_until(lambda: "registered" in block.log.read_text(), f"the block server is known\n{self.logs()}")
        return part

    def mount(self, letter: str, *, machine: Machine | None = None, bugs: Sequence[str] = ()) -> tuple[Part, Path]:
        """Mount it; the daemon and the mount point."""
        mountpoint = self.directory / f"mnt-{letter}"
        mountpoint.mkdir(exist_ok=True)
        part = self.start(
            *(f"mount-{letter}", "mount", f"{self.host}:{self.port}", str(mountpoint), "--foreground"),
            *("--frontend", FRONTEND),
            machine=machine,
            bugs=bugs,
        )

        def mounted() -> bool:
            assert part.process.poll() is None, part.log_tail()
            return os.path.ismount(mountpoint) and "mounted" in part.log.read_text()

        wait_until(mounted, f"mount {letter} is there\n{self.logs()}")
        return part, mountpoint

    def fsd(self, *arguments: str, machine: Machine | None = None) -> str:
        """What an `fsd` command prints."""
        argv = [sys.executable, "-P", "-m", "mount", *arguments]
        done = subprocess.run(
            machine.command(*argv) if machine else argv,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode in (0, 3), done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        """The ends of all logs, for a failing test's message."""
        return "\n".join(part.log_tail() for part in self.parts)

    def close(self) -> None:
        """Take away the mounts, end the processes: mounts first, so that they can flush."""
        for part in self.parts:
            if part.process.poll() is None:
                part.process.send_signal(signal.SIGCONT)
        for entry in reversed(mount_table.all_mounts()):
            if entry.mountpoint.startswith(f"{self.directory}/"):
                subprocess.run(
                    mount_table.unmount_command(entry.mountpoint, lazy=True), stdin=subprocess.DEVNULL, check=False
                )
        for part in reversed(self.parts):
            part.end()


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def bare_cluster(net: Network | None = None) -> Iterator[BareCluster]:
    """Without a process yet; at the end none is left, and no mount."""
    fail_without_fuse()
    directory = Path(tempfile.mkdtemp(prefix="fsd-bare-", dir=place_for_clusters())).resolve()
    directory.chmod(0o755)
    with contextlib.ExitStack() as stack:
        cluster = BareCluster(directory, net)
        stack.callback(cluster.close)
        yield cluster
    if not any(one.mountpoint.startswith(f"{directory}/") for one in mount_table.all_mounts()):
        shutil.rmtree(directory, ignore_errors=True)
