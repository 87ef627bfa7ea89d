"""A real local cluster for the mounted tests: made by `fsd up`, its parts killed and waited for by name.

Use the fixtures by importing them into a conftest:

    cluster        one for the whole run, mounted at cluster.mountpoint
    directory      an empty directory on it, for one test
    own_cluster    one for this test alone, not started yet; for tests that kill, break or measure

Parts are "supervisor", "metadata", "block-1" ... and "mount" (the FUSE daemon).  Everything lies below a temporary
directory, records of mounts included, so that tests never see the user's own clusters.  At the end every mount is
taken away, lazily if need be, and every process is ended, whatever the test did.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mount import mount_table
from mount.cluster_state import ClusterDirectory, ClusterState
from mount.config import MountSettings
from mount.processes import ProcessId, end, fsd_command, fsd_environment
from mount.records import MountRecord

FRONTEND = os.environ.get("FSD_TEST_FRONTEND", MountSettings().frontend)
"""FSD_TEST_FRONTEND=pyfuse3 (or direct) makes every mount of the tests use that front end."""
COMMAND_TIMEOUT_S = 180.0
WAIT_TIMEOUT_S = 60.0
POLL_S = 0.02
MEMORY_FREE_MIN = 10 << 30
"""Bytes: two copies of the 2 GiB that one test writes, what the others write, and as much again for all processes."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> float:
    """Wait for a condition of another process; how long it took, s.  Fails the test after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(POLL_S)
    return time.monotonic() - began


class LocalCluster:
    """One data directory, one mount point, and the processes of both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.runtime = directory / "run"
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir(parents=True)
        self._state = ClusterDirectory(self.data)

    # --- commands -----------------------------------------------------------------------------------------------

    def fsd(
        self, *arguments: str | Path, status: Sequence[int] = (0,), timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `fsd` with its records in this cluster's directory; any other exit code than `status` fails the test."""
        command = fsd_command(*(str(one) for one in arguments))
        done = subprocess.run(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        told = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        assert done.returncode in status, told + self.logs_tail()
        return done

    def environment(self) -> dict[str, str]:
        """The environment of its processes."""
        return {**fsd_environment(), "FSD_RUNTIME_DIR": str(self.runtime)}

    def up(self, *flags: str, mountpoint: Path | None = None) -> str:
        """`fsd up`; what it printed."""
        return self.fsd("up", mountpoint or self.mountpoint, "--data", self.data, "--frontend", FRONTEND, *flags).stdout

    def down(self, *flags: str) -> str:
        """`fsd down` of its own mount point."""
        return self.fsd("down", self.mountpoint, "--data", self.data, *flags).stdout

    def umount(self) -> None:
        """Unmount; the services go on."""
        self.fsd("umount", self.mountpoint)

    def mount(self, *flags: str) -> None:
        """Mount again what `umount` or a killed daemon left unmounted, with `fsd mount`'s flags."""
        self.fsd("mount", self.address, self.mountpoint, "--data", str(self.data), "--frontend", FRONTEND, *flags)

    def remount(self, *flags: str) -> None:
        """Unmount and mount again: no cache of the client is left."""
        self.umount()
        self.mount(*flags)

    def status(self) -> dict[str, Any]:
        """`fsd status --json`."""
        report: dict[str, Any] = json.loads(self.fsd("status", "--data", self.data, "--json", status=(0, 3)).stdout)
        return report

    # --- parts --------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """HOST:PORT of the inode service."""
        child = self.state().children[0]
        return f"{child.host}:{child.port}"

    def state(self) -> ClusterState:
        """What the supervisor wrote last."""
        state = self._state.state()
        assert state is not None, f"no cluster was started in {self.data}"
        return state

    def process(self, part: str) -> ProcessId:
        """The process of a part; fails when it does not run."""
        found = self.maybe_process(part)
        assert found is not None, f"{part} does not run"
        assert found.alive(), f"{part} does not run"
        return found

    def maybe_process(self, part: str) -> ProcessId | None:
        """The process of a part as last recorded; None when there is none."""
        if part == "supervisor":
            return self.state().supervisor
        if part == "mount":
            record = self.record()
            return record.process if record else None
        return next(one.process for one in self.state().children if one.name == part)

    def record(self) -> MountRecord | None:
        """The record of the mount at `mountpoint`."""
        return next((one for one in self.records() if one.mountpoint == str(self.mountpoint)), None)

    def records(self) -> list[MountRecord]:
        """All mounts made from this cluster's environment."""
        files = sorted((self.runtime / "mounts").glob("*.json"))
        return [msgspec.json.decode(one.read_bytes(), type=MountRecord) for one in files]

    def kill(self, part: str, number: signal.Signals = signal.SIGKILL) -> ProcessId:
        """Send a signal to a part, and for SIGKILL wait until it is gone; the process that it was."""
        process = self.process(part)
        assert process.signal(number)
        if number == signal.SIGKILL:
            assert process.wait_end(WAIT_TIMEOUT_S), f"{part} survived SIGKILL"
        return process

    def wait_back(self, part: str, before: ProcessId, timeout_s: float = WAIT_TIMEOUT_S) -> float:
        """Wait until the supervisor has a new process of `part` that serves; how long it took, s."""

        def back() -> bool:
            child = next(one for one in self.state().children if one.name == part)
            return child.state == "ready" and child.process not in (None, before)

        return wait_until(back, f"{part} serves again", timeout_s)

    def wait_healthy(self, timeout_s: float = WAIT_TIMEOUT_S) -> float:
        """Wait until `fsd status` finds all block servers up and no bad block; how long it took, s."""
        return wait_until(lambda: bool(self.status()["healthy"]), "the cluster is healthy", timeout_s)

    def log_text(self, part: str) -> str:
        """All that a part has logged, in all its lives (as far as the files go back)."""
        pattern = "mount-*.log*" if part == "mount" else f"{part}.log*"
        files = sorted((self.data / "log").glob(pattern), reverse=True)
        return "".join(one.read_text(errors="replace") for one in files)

    def logs_tail(self, count: int = 15) -> str:
        """The end of every log, for a failing test's message."""
        text = ""
        for file in sorted((self.data / "log").glob("*")):
            lines = file.read_text(errors="replace").splitlines()
            if lines:
                text += f"\n--- {file.name}\n" + "\n".join(lines[-count:])
        return text

    # --- the end ------------------------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """Take every mount below its directory away and end every process, by force if need be."""
        below = str(self.directory) + "/"
        for entry in reversed([one for one in mount_table.all_mounts() if one.mountpoint.startswith(below)]):
            subprocess.run(
                mount_table.unmount_command(entry.mountpoint, lazy=True), stdin=subprocess.DEVNULL, check=False
            )
        for record in self.records():
            if not record.process.wait_end(10.0):
                end(record.process, grace_s=5.0)
        state = self._state.state()
        if state is None:
            return
        if state.supervisor.signal(signal.SIGTERM) and not state.supervisor.wait_end(30.0):
            end(state.supervisor, grace_s=0.0)
        for child in (self._state.state() or state).children:
            if child.process is not None and not child.process.wait_end(5.0):
                end(child.process, grace_s=5.0)


def fail_without_fuse() -> None:
    """Fail, in one line, where FUSE cannot be used: a mounted test that is skipped has shown nothing."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.fail(f"/dev/fuse cannot be opened: {error.strerror}", pytrace=False)


def place_for_clusters() -> Path | None:
    """Where clusters of tests lie: FSD_TEST_CLUSTERS, or in memory where there is room for it; None: the usual one.

    What the tests assert does not depend on the disk under a cluster, but how long they take does: each file made
    costs several flushes.  Loss of power is tested elsewhere, on recorded writes.
    """
    told = os.environ.get("FSD_TEST_CLUSTERS")
    if told:
        return Path(told)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free >= MEMORY_FREE_MIN
    return memory if roomy and available_memory() >= MEMORY_FREE_MIN else None


def available_memory() -> int:
    """Bytes that programs may take before the kernel has to swap (MemAvailable of proc(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


@contextmanager
def new_cluster() -> Iterator[LocalCluster]:
    """A cluster that is not started yet; cleaned up at the end, whatever happened."""
    fail_without_fuse()
    directory = Path(tempfile.mkdtemp(prefix="fsd-test-", dir=place_for_clusters())).resolve()
    directory.chmod(0o755)
    made = LocalCluster(directory)
    try:
        yield made
    finally:
        made.clean_up()
        # Never through a mount that could not be taken away: that would remove what it shows.
        if not any(one.mountpoint.startswith(f"{directory}/") for one in mount_table.all_mounts()):
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """One cluster, mounted, for the whole run."""
    with new_cluster() as made:
        made.up()
        yield made
        made.down()


@pytest.fixture
def directory(cluster: LocalCluster) -> Iterator[Path]:
    """An empty directory on the mount; removed afterwards."""
    made = Path(tempfile.mkdtemp(prefix="test-", dir=cluster.mountpoint))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def own_cluster() -> Iterator[LocalCluster]:
    """A cluster for this test alone, not started yet."""
    with new_cluster() as made:
        yield made
