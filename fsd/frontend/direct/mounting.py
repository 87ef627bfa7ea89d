"""Mounting and unmounting: mount(2) as root, fusermount3 otherwise, and who is mounted where.

Options are as mount(8) writes them, without the comma: `noexec`, `fsname=HOST:PORT:/`.  Nothing here knows the
protocol: what comes back is a descriptor of /dev/fuse on which the kernel has put INIT.  All of it blocks for a moment.
"""

from __future__ import annotations

import array
import ctypes
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterable
from typing import Final

from fsd.core.access_times import UNKNOWN_TO_LIBFUSE

FUSE_DEVICE: Final = "/dev/fuse"
FUSERMOUNT_TIMEOUT_S: Final = 30.0

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME, MS_RELATIME, MS_STRICTATIME = 128, 1024, 2048, 1 << 21, 1 << 24
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

# What each option sets and clears (mount(8)); a later one counts.
_FLAGS: Final[dict[str, tuple[int, int]]] = {
    "ro": (MS_RDONLY, 0),
    "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0),
    "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0),
    "dev": (0, MS_NODEV),
    "noexec": (MS_NOEXEC, 0),
    "exec": (0, MS_NOEXEC),
    "sync": (MS_SYNCHRONOUS, 0),
    "async": (0, MS_SYNCHRONOUS),
    "dirsync": (MS_DIRSYNC, 0),
    "noatime": (MS_NOATIME, 0),
    "atime": (0, MS_NOATIME),
    "nodiratime": (MS_NODIRATIME, 0),
    "diratime": (0, MS_NODIRATIME),
    "relatime": (MS_RELATIME, 0),
    "norelatime": (0, MS_RELATIME),
    "strictatime": (MS_STRICTATIME, 0),
}
# Options that mount(2) takes as text, of the file system itself.
_TEXT: Final = re.compile(r"(default_permissions|allow_other|max_read=\d+|blksize=\d+)")

_libc = ctypes.CDLL(None, use_errno=True)


class MountFailed(Exception):
    """It is not mounted; the message says why, for people."""


class Mounted:
    """A mount that was made here."""

    def __init__(self, mountpoint: str, device: int, number: str) -> None:
        """`device`: the descriptor; `number`: major:minor under which the mount is known, "" if it is gone already."""
        self.mountpoint = mountpoint
        self.device = device
        self.number = number

    def is_there(self) -> bool:
        """Whether it is what is mounted at its place."""
        return bool(self.number) and topmost(self.mountpoint) == self.number

    def unmount(self) -> None:
        """Take it away, whoever uses it; nothing if it is not there any more.

        Whoever waits for an answer, or asks for one later, gets ENOTCONN or ECONNABORTED: as root at once (MNT_FORCE is
        FUSE's abort, and frees a thread that is held up in a notification); else when the device is closed.

        Raises:
            MountFailed: it stays.
        """
        if not self.is_there():
            return  # What is mounted there now is somebody else's.
        if os.geteuid() == 0:
            if _libc.umount2(os.fsencode(self.mountpoint), MNT_FORCE | MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
                raise MountFailed(f"umount2: {os.strerror(ctypes.get_errno())}")
        else:
            _run_fusermount(["-u", "-q", "-z", "--", self.mountpoint])

    def sync(self) -> None:
        """Have the kernel write back what programs have changed through mappings; somebody must serve meanwhile."""
        if not self.is_there():
            return
        try:
            descriptor = os.open(self.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # Unmounted or aborted in this moment: there is nobody to write anything.
        try:
            _libc.syncfs(descriptor)
        finally:
            os.close(descriptor)


def mount(mountpoint: str, options: Iterable[str]) -> Mounted:
    """Mount an empty fuse file system.

    Raises:
        MountFailed: nothing is mounted.
    """
    device = _mount_as_root(mountpoint, options) if os.geteuid() == 0 else _mount_as_user(mountpoint, options)
    os.set_blocking(device, False)
    os.set_inheritable(device, False)
    return Mounted(mountpoint, device, topmost(mountpoint))


# --- as root ------------------------------------------------------------------------------------------------------


def mount_arguments(options: Iterable[str]) -> tuple[str, str, int, list[str]]:
    """For mount(2): source, type, flags, and the options it takes as text.

    Raises:
        MountFailed: an option is not known.
    """
    source, kind, flags, text = "fsd", "fuse", 0, []
    for option in options:
        name, _, value = option.partition("=")
        if name == "fsname":
            source = re.sub(r"\\(.)", r"\1", value)
        elif name == "subtype":
            kind = f"fuse.{value}"
        elif option in _FLAGS:
            sets, clears = _FLAGS[option]
            flags = flags & ~clears | sets
        elif _TEXT.fullmatch(option):
            text.append(option)
        else:
            raise MountFailed(f"mount option {option!r} is not known")
    return source, kind, flags, text


def _mount_as_root(mountpoint: str, options: Iterable[str]) -> int:
    source, kind, flags, text = mount_arguments(options)
    try:
        mode = os.stat(mountpoint).st_mode
        device = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountFailed(f"{error.filename}: {error.strerror}") from error
    data = ",".join(
        [f"fd={device}", f"rootmode={stat.S_IFMT(mode):o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}", *text]
    )
    arguments = (os.fsencode(source), os.fsencode(mountpoint), kind.encode(), ctypes.c_ulong(flags), data.encode())
    if _libc.mount(*arguments) != 0:
        number = ctypes.get_errno()
        os.close(device)
        raise MountFailed(f"mount(2): {os.strerror(number)}")
    return device


# --- as a user ----------------------------------------------------------------------------------------------------


def _mount_as_user(mountpoint: str, options: Iterable[str]) -> int:
    """fusermount3 opens the device, mounts, and sends the descriptor over a socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            known = [one for one in options if one not in UNKNOWN_TO_LIBFUSE]
            _run_fusermount(["-o", ",".join(known), "--", mountpoint], theirs.fileno())
        ours.settimeout(FUSERMOUNT_TIMEOUT_S)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int(array.array("i", data[:4])[0])
    raise MountFailed("fusermount3 sent no descriptor")


def _run_fusermount(arguments: list[str], descriptor: int | None = None) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountFailed("fusermount3 is not installed")
    environment = dict(os.environ)
    if descriptor is not None:
        environment["_FUSE_COMMFD"] = str(descriptor)
    try:
        ended = subprocess.run(
            [program, *arguments],
            env=environment,
            pass_fds=() if descriptor is None else (descriptor,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FUSERMOUNT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountFailed(f"fusermount3: {error}") from error
    if ended.returncode != 0:
        said = ended.stderr.decode(errors="replace").strip()
        raise MountFailed(said or f"fusermount3 ended with {ended.returncode}")


# --- what is mounted ----------------------------------------------------------------------------------------------


def topmost(mountpoint: str) -> str:
    """major:minor of what is mounted at a path, as the kernel lists it; "" when nothing is.  Touches no mount."""
    number = ""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split(b" ")
            if _unescape(fields[4]) == os.fsencode(mountpoint):
                number = fields[2].decode()
    return number


def _unescape(field: bytes) -> bytes:
    r"""Undo the kernel's \040 for a space, and the like."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
