"""What is mounted where, and unmounting; from /proc/self/mountinfo, never by touching a mount that may hang."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mount.outcome import CommandError
from mount.processes import users_of

FILE_SYSTEM_TYPE = "fuse.fsd"
ANSWER_TIMEOUT_S = 5.0
"""A mount that does not answer statvfs for this long is told to the user as hanging."""
UMOUNT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class MountEntry:
    """One line of mountinfo."""

    mountpoint: str
    file_system: str
    source: str
    options: str

    @property
    def is_fsd(self) -> bool:
        """Mounted by this program."""
        return self.file_system == FILE_SYSTEM_TYPE


def parse_mountinfo(text: str) -> Iterator[MountEntry]:
    """The entries of mountinfo's text, in order of mounting.  Source: proc(5)."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(rest) >= 3:
            yield MountEntry(_unescape(fields[4]), rest[0], _unescape(rest[1]), fields[5])


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def all_mounts() -> list[MountEntry]:
    """What this process's mount namespace shows."""
    return list(parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")))


def find(mountpoint: str) -> MountEntry | None:
    """What is mounted on top at exactly this (canonical) path."""
    return next((entry for entry in reversed(all_mounts()) if entry.mountpoint == mountpoint), None)


def canonical(path: str) -> str:
    """The absolute path without symlinks, as mountinfo shows it; the last component is not touched if it is a mount."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    joined = os.path.join(os.path.realpath(parent), name) if name else "/"
    return joined if find(joined) is not None else os.path.realpath(joined)


def answers(mountpoint: str, timeout_s: float = ANSWER_TIMEOUT_S) -> bool | None:
    """True: the mount answers; False: its daemon is gone; None: no answer within the time (it hangs)."""
    outcome: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            outcome.append(error.errno not in (errno.ENOTCONN, errno.ECONNABORTED))
        else:
            outcome.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # It may never return; it must not keep the process alive.
    thread.start()
    thread.join(timeout_s)
    return outcome[0] if outcome else None


def unmount_command(mountpoint: str, *, lazy: bool) -> list[str]:
    """umount(8) as root, else fusermount3.

    Raises:
        CommandError: fusermount3 is not installed.
    """
    if os.geteuid() == 0:
        umount = shutil.which("umount") or "/bin/umount"
        # -i: no helper; -c: the path is canonical, and asking a hanging mount about it would hang too.
        return [umount, "-i", "-c", *(["-l"] if lazy else []), mountpoint]
    fusermount = shutil.which("fusermount3")
    if fusermount is None:
        raise CommandError("fusermount3 is not installed; install it with: sudo apt-get install fuse3")
    return [fusermount, "-u", *(["-z"] if lazy else []), mountpoint]


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at `mountpoint` (canonical).

    Raises:
        CommandError: it is busy (the sentence names the processes), or may not be unmounted by this user; it is still
            mounted.
    """
    try:
        done = subprocess.run(
            unmount_command(mountpoint, lazy=lazy),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=UMOUNT_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise CommandError(
            f"{mountpoint} does not let itself be unmounted within {UMOUNT_TIMEOUT_S:.0f} s; take it away with --lazy"
        ) from None
    if done.returncode == 0:
        return
    complaint = (done.stderr or done.stdout).strip().splitlines()
    if any("busy" in line for line in complaint):
        users = [f"{name} (pid {pid})" for pid, name in users_of(mountpoint)]
        shown = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
        by = f" by {shown}" if users else ""
        raise CommandError(
            f"{mountpoint} is in use{by}; end that (or leave the directory) and try again, or use --lazy"
        )
    raise CommandError(
        f"{mountpoint} could not be unmounted: {complaint[-1] if complaint else 'umount gave no reason'}"
    )
