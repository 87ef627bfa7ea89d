"""`fsd mount` and `fsd umount`: one mount, by a daemon of its own.

fsd.daemon is imported by the daemon alone: the command that waits for it is ready in half the time without it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from mount import config, daemon, logs, mount_table, records
from mount.cluster_state import default_data
from mount.config import LogSettings, MountSettings, Settings
from mount.console import progress, say
from mount.options import MountOptions, parse_options
from mount.outcome import CommandError, Exit
from mount.processes import end, fsd_command, identify
from mount.target import Target, parse_target

if TYPE_CHECKING:
    from fsd.daemon import MountConfig

DAEMON_END_TIMEOUT_S = 120.0
"""For a daemon to write out what it holds after it was unmounted: its budget over a slow network."""
KILL_GRACE_S = 10.0


def add_mount(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd mount`."""
    parser.add_argument("target", metavar="HOST:PORT[:/SUBDIR]", help="inode service, and what of it is to be mounted")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    add_mount_flags(parser)
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground; log to stderr")
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)  # From `fsd up`: for the mount's record.
    daemon.add_daemon_flags(parser)


def add_mount_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every command that mounts has."""
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="as of mount(8)")
    config.add_flags(parser, "mount", "log")


def add_umount(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd umount`."""
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--lazy", action="store_true", help="take it out of the tree now; it ends when nobody uses it")


def run_mount_command(flags: argparse.Namespace) -> Exit:
    """Mount; return when the mount answers, or, in the foreground, when it was unmounted."""
    target = parse_target(flags.target)
    options = parse_options(flags.options)
    flags.config = flags.config or (Path(options.config) if options.config else None)
    settings = Settings(flags)
    mine = settings.take(MountSettings, options=options.settings)
    log = settings.take(LogSettings)
    mountpoint = check_mountpoint(flags.mountpoint)
    check_fuse()
    if flags.foreground or flags.ready_fd is not None:
        return _serve(flags, target, mountpoint, mine, log, options)
    mount_in_background(target, mountpoint, flags, log, timeout_s=mine.timeout_s, data=flags.data)
    return Exit.OK


def mount_in_background(
    target: Target, mountpoint: str, flags: argparse.Namespace, log: LogSettings, *, timeout_s: float, data: str = ""
) -> None:
    """Start a daemon that mounts; return when the mount answers.

    Raises:
        CommandError: it could not; nothing is mounted, no process is left.
    """
    file = log.file or default_log(mountpoint, data)
    command = fsd_command("mount", str(target), mountpoint, *_repeated_flags(flags), "--log-file", str(file))
    if data:
        command += ["--data", data]
    with progress(f"mounting {target} at {mountpoint}"):
        spawned = daemon.Spawned(command, output=file.with_suffix(".out"))
        # The daemon gives up by itself after timeout_s; this is for one that hangs.
        spawned.wait_ready(timeout_s + 15.0, what=f"the mount at {mountpoint}")
        if mount_table.answers(mountpoint) is not True:
            raise CommandError(f"{mountpoint} was mounted but does not answer; see {file}")
    spawned.release()


def _repeated_flags(flags: argparse.Namespace) -> list[str]:
    """The flags of this command line, for the daemon's."""
    repeated: list[str] = []
    for name, value in vars(flags).items():
        section, dot, key = name.partition(".")
        if not dot or section not in ("mount", "log") or value is None or name == "log.file":
            continue
        flag = config.flag_of(section, key)
        if isinstance(value, bool):
            repeated.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            repeated += [flag, str(value)]
    for option in flags.options:
        repeated += ["-o", option]
    if flags.config:
        repeated += ["--config", os.path.abspath(flags.config)]
    return repeated


def default_log(mountpoint: str, data: str) -> Path:
    """Where the daemon of a mount logs when nobody says: with the local cluster it shows, else with the system's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", mountpoint.strip("/")) or "root"
    with_cluster = data or os.geteuid() != 0
    directory = Path(data or default_data()) / "log" if with_cluster else Path("/var/log/fsd")
    return directory / f"mount-{name[-100:]}.log"


def _serve(
    flags: argparse.Namespace,
    target: Target,
    mountpoint: str,
    settings: MountSettings,
    log: LogSettings,
    options: MountOptions,
) -> Exit:
    """Be the daemon."""
    from fsd.daemon import MountConfig

    logs.configure(log)
    allow_other = os.geteuid() == 0 if settings.allow_other is None else settings.allow_other
    mount = MountConfig(
        mountpoint=Path(mountpoint),
        host=target.address.host,
        port=target.address.port,
        subdirectory=target.subdirectory,
        budget_bytes=settings.budget_mib << 20,
        read_only=settings.read_only,
        allow_other=allow_other,
        options=options.kernel,
        timeout_s=settings.timeout_s,
        frontend=settings.frontend,
    )
    me = identify(os.getpid())
    assert me is not None
    record = records.MountRecord(mountpoint, str(target), me, flags.data, str(log.file or ""))
    try:
        return daemon.run_service("mount", partial(_recorded, record, mount), flags)
    finally:
        left = records.load(mountpoint)
        if left is not None and left.process == me:
            records.remove(mountpoint)


async def _recorded(
    record: records.MountRecord, mount: MountConfig, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """run_mount, with the record written between "it answers" and telling so."""
    from fsd.daemon import run_mount

    async with trio.open_nursery() as nursery:
        await nursery.start(run_mount, mount)
        records.save(record)
        task_status.started(None)


def run_umount_command(flags: argparse.Namespace) -> Exit:
    """Unmount, and wait until the daemon has written out what it holds."""
    unmount_and_wait(mount_table.canonical(flags.mountpoint), lazy=flags.lazy)
    return Exit.OK


def unmount_and_wait(mountpoint: str, *, lazy: bool) -> None:
    """Unmount and wait for the daemon's end.

    Raises:
        CommandError: nothing of ours is mounted there; it is busy (and still mounted); the daemon does not end.
    """
    entry = mount_table.find(mountpoint)
    if entry is None:
        if not os.path.exists(mountpoint):
            raise CommandError(f"{mountpoint} does not exist")
        raise CommandError(f"{mountpoint} is not mounted")
    if not entry.is_fsd:
        raise CommandError(f"{mountpoint} is a mount of {entry.source} ({entry.file_system}), not of fsd; use umount")
    record = records.load(mountpoint)
    dead = record is not None and not record.alive()
    with progress(f"unmounting {mountpoint}"):
        mount_table.unmount(mountpoint, lazy=lazy or dead)
    if record is None:
        return
    if not lazy:
        with progress(f"waiting for the daemon of {mountpoint} to write out what it holds"):
            if not record.process.wait_end(DAEMON_END_TIMEOUT_S):
                raise CommandError(
                    f"the daemon of {mountpoint} (pid {record.process.pid}) still runs; see {record.log}"
                )
        records.remove(mountpoint)


def clear_stale(mountpoint: str) -> bool:
    """Take a mount whose daemon is gone out of the tree, as its mount point answers nothing but ENOTCONN.

    Returns:
        True when there was one.

    Raises:
        CommandError: it cannot be unmounted.
    """
    entry = mount_table.find(mountpoint)
    if entry is None or not entry.is_fsd:
        return False
    record = records.load(mountpoint)
    dead = record is not None and not record.alive()
    if not dead and mount_table.answers(mountpoint) is not False:
        return False
    say(f"the daemon behind {mountpoint} is gone; unmounting what it left")
    mount_table.unmount(mountpoint, lazy=True)
    if record is not None:
        end(record.process, grace_s=KILL_GRACE_S)
        records.remove(mountpoint)
    return True


def check_mountpoint(path: str) -> str:
    """The canonical path of a directory on which something may be mounted; a stale mount there is cleared.

    Raises:
        CommandError: it does not exist, is no directory, or has something mounted.
    """
    mountpoint = mount_table.canonical(path)
    clear_stale(mountpoint)
    entry = mount_table.find(mountpoint)
    if entry is not None:
        kind = "an fsd mount" if entry.is_fsd else f"a mount ({entry.file_system})"
        undo = "fsd umount" if entry.is_fsd else "umount"
        raise CommandError(f"{mountpoint} is already {kind} of {entry.source}; first run: {undo} {mountpoint}")
    try:
        descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise CommandError(f"{mountpoint} does not exist; make it with: mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise CommandError(f"{mountpoint} is not a directory; a mount point must be one") from None
    except OSError as error:
        raise CommandError(f"{mountpoint} cannot be opened: {error.strerror}") from error
    os.close(descriptor)
    if os.geteuid() != 0 and not os.access(mountpoint, os.W_OK):
        raise CommandError(
            f"{mountpoint} may not be written by this user; mount on a directory of your own, or as root"
        )
    return mountpoint


def check_fuse() -> None:
    """See that a FUSE file system can be mounted at all.

    Raises:
        CommandError: there is no /dev/fuse, it may not be opened, or fusermount3 is missing and needed.
    """
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = "is missing" if error.errno == errno.ENOENT else f"cannot be opened ({error.strerror})"
        raise CommandError(
            f"/dev/fuse {why}: load the module (sudo modprobe fuse); in a container, run it with"
            " --device /dev/fuse --cap-add SYS_ADMIN"
        ) from error
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise CommandError("fusermount3 is not installed and users need it; run: sudo apt-get install fuse3")
