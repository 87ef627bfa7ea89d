"""Processes by identity: started detached, known by pid and start time, ended and waited for.

A pid alone may have been given to somebody else meanwhile; with the start time it names one process for ever (until
the next boot, which gives another boot id).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import site
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mount

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessId:
    """One process: its pid, when it started (clock ticks since boot), and in which boot."""

    pid: int
    start_ticks: int
    boot_id: str

    def alive(self) -> bool:
        """True while it runs; a zombie does not."""
        return identify(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; False when the process has ended.

        Raises:
            PermissionError: it belongs to another user.
        """
        pidfd = self._open()
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def wait_end(self, timeout_s: float) -> bool:
        """Wait until it has ended; False when it still runs after `timeout_s`."""
        pidfd = self._open()
        if pidfd is None:
            return True
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        finally:
            os.close(pidfd)

    def _open(self) -> int | None:
        """A descriptor of the process, checked after it was opened, so that it cannot be a successor's."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.alive():
            os.close(pidfd)
            return None
        return pidfd


def boot_id() -> str:
    """The kernel's name for this boot."""
    return BOOT_ID_FILE.read_text().strip()


def identify(pid: int) -> ProcessId | None:
    """Who runs under this pid now; None: nobody, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # The name in parentheses may contain spaces.
    if fields[0] in "ZX":
        return None
    return ProcessId(pid, int(fields[19]), boot_id())


def end(process: ProcessId, *, grace_s: float) -> bool:
    """SIGTERM, and SIGKILL when it still runs after `grace_s`; False when even that did not end it."""
    if not process.signal(signal.SIGTERM) or process.wait_end(grace_s):
        return True
    process.signal(signal.SIGKILL)
    return process.wait_end(5.0)


def fsd_command(*arguments: str) -> list[str]:
    """The command line that runs `fsd` with this interpreter, wherever the shell's PATH leads."""
    return [sys.executable, "-P", "-m", "mount", *arguments]


def fsd_environment() -> dict[str, str]:
    """The environment for fsd_command: it finds this very code, also when it runs from a checkout."""
    environment = dict(os.environ)
    root = str(Path(mount.__file__).resolve().parent.parent)
    if root not in site.getsitepackages():
        earlier = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{earlier}" if earlier else root
    return environment


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def users_of(mountpoint: str) -> Iterator[tuple[int, str]]:
    """(pid, name) of processes with a working directory, root or file open below `mountpoint`, as far as visible."""
    prefix = mountpoint.rstrip("/") + "/"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        for link in _open_paths(entry):
            if (link + "/").startswith(prefix):
                yield int(entry.name), _name(entry)
                break


def _open_paths(process: Path) -> Iterator[str]:
    """Paths a process holds; it may end while we look, and others' processes may not be looked into."""
    links = [process / "cwd", process / "root"]
    try:
        links += list((process / "fd").iterdir())
    except OSError:
        links = links[:2]
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "?"
