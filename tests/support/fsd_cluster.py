"""A real cluster with a real mount, driven by the `fsd` command as its users drive it.

Everything lies in one directory; every process is a real one, can be killed by its name, and is ended by `down`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 150
POLL_S = 0.02
RESTART_TIMEOUT_S = 30.0
MIB = 1 << 20


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = RESTART_TIMEOUT_S) -> None:
    """Wait until the condition holds; fail when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what}"
        time.sleep(POLL_S)


class FsdCluster:
    """`fsd up` with its data, its mount point and its records in `base`."""

    def __init__(self, base: Path, *, servers: int = 3, replicas: int = 2, options: tuple[str, ...] = ()) -> None:
        self.base = base
        self.data = base / "data"
        self.mountpoint = base / "mnt"
        self.runtime = base / "run"
        self.up_arguments = ("--servers", str(servers), "--replicas", str(replicas))
        self.options = options
        for directory in (base, self.mountpoint, self.runtime):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)

    def fsd(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; unless `check` is False it must succeed."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "FSD_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", "mount", *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if check:
            told = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            assert done.returncode == 0, f"fsd {' '.join(map(str, arguments))} ended with {done.returncode}:\n{told}"
        return done

    def up(self) -> None:
        """Start what does not run, and mount."""
        self.fsd(
            "up", self.mountpoint, "--data", self.data, "--log-file", self.mount_log, *self.up_arguments, *self.options
        )

    @contextmanager
    def second_mount(self) -> Iterator[Path]:
        """Another mount of the same cluster, with a daemon and a session of its own."""
        other = self.base / "mnt2"
        other.mkdir(exist_ok=True)
        service = self.services()["metadata"]
        address = f"{service['host']}:{service['port']}"
        self.fsd("mount", address, other, "--log-file", self.base / "mount2.log", *self.options)
        try:
            yield other
        finally:
            self.fsd("umount", other)

    def umount(self) -> None:
        """Unmount; the services go on."""
        self.fsd("umount", self.mountpoint)

    def remount(self) -> None:
        """Unmount and mount again: no cache and no buffer of the client is left."""
        self.umount()
        self.up()

    def down(self) -> None:
        """Unmount and end every process; the data stay."""
        self.fsd("down", "--data", self.data)

    def destroy(self) -> None:
        """End everything, even when it does not work any more, and remove the data."""
        try:
            if self.data.exists():
                self.down()
        finally:
            for process in self.processes():
                os.kill(process, signal.SIGKILL)
            if os.path.ismount(self.mountpoint) or self.mountpoint_is_stale():
                subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)
            shutil.rmtree(self.base, ignore_errors=True)

    def mountpoint_is_stale(self) -> bool:
        """A mount whose daemon is gone."""
        return f" {self.mountpoint} " in Path("/proc/mounts").read_text()

    # --- what runs -----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """`fsd status --json`."""
        found: dict[str, Any] = json.loads(self.fsd("status", self.mountpoint, "--json").stdout)
        return found

    def state(self) -> dict[str, Any]:
        """The supervisor's state file."""
        found: dict[str, Any] = json.loads((self.data / "run" / "state.json").read_text())
        return found

    def services(self) -> dict[str, dict[str, Any]]:
        """The services by name: `metadata`, `block-1` and so on."""
        return {child["name"]: child for child in self.state()["children"]}

    def pid(self, name: str) -> int:
        """Process number of a service, of the `supervisor`, or of the `mount`."""
        if name == "mount":
            return self.mount_pid()
        process = self.state()["supervisor"] if name == "supervisor" else self.services()[name]["process"]
        return int(process["pid"])

    def mount_pid(self) -> int:
        """The FUSE daemon behind the mount point."""
        for path in (self.runtime / "mounts").glob("*.json"):
            record = json.loads(path.read_text())
            if record["mountpoint"] == str(self.mountpoint):
                return int(record["process"]["pid"])
        raise AssertionError(f"no record of a mount at {self.mountpoint}")

    def kill(self, name: str) -> int:
        """kill -9; returns the process number that was."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), f"{name} to end")
        return pid

    def wait_restarted(self, name: str, old_pid: int) -> None:
        """Wait until the supervisor has started a service again and it serves."""

        def serves() -> bool:
            child = self.services()[name]
            return bool(child["state"] == "ready" and child["process"]["pid"] != old_pid)

        wait_until(serves, f"{name} to be started again")

    def processes(self) -> Iterator[int]:
        """Every process that has this cluster's directory in its command line."""
        mark = str(self.base).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if mark in command and b"mount\0" in command:
                    yield int(entry.name)

    # --- logs ------------------------------------------------------------------------------------------------------

    @property
    def mount_log(self) -> Path:
        """Where the FUSE daemon logs."""
        return self.base / "mount.log"

    def complaints(self) -> list[str]:
        """Lines of all logs that tell of an error or a traceback."""
        logs = [*self.base.glob("*.log"), *(self.data / "log").glob("*")]
        lines = (line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines())
        return [line for line in lines if re.search(r"\bERROR\b|\bCRITICAL\b|Traceback|AssertionError", line)]


def runs(pid: int) -> bool:
    """It exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def memory_peak(pid: int) -> int:
    """The most bytes of memory the process ever had resident (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
