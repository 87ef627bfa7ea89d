"""The FUSE daemon: one mount, from opening its session to closing it.

Tasks of `run_mount`: the caller's, which waits for the end and can be cancelled; and one below a shield, which owns
everything (session, block client, data path, front end) and takes it down in the one order that loses nothing: stop
answering the kernel, flush every file, release held inodes, close the session.  A cancellation from outside only asks
that task to end.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from blockstore.client import BlockClient
from fsd.core.access_times import UNKNOWN_TO_LIBFUSE, rule_of_options
from fsd.file_data import DataPath
from fsd.filesystem import FileSystem
from fsd.frontend.direct.direct_frontend import DirectMount, MountFailed
from fsd.frontend.kernel_notifier import ThreadNotifier
from fsd.frontend.ports import Operations
from metadata.client import Holdings, MetadataClient, open_session
from metadata.protocol import RecallItem
from wire.errors import StoreError
from wire.log import get_logger
from wire.version import VERSION

READ_AHEAD_KIB = 4096
"""The kernel caps read-ahead at 128 KiB whatever is negotiated; four requests of 1 MiB keep a stream busy."""
BACKGROUND_MAX = 64
"""Read-ahead requests under way that the kernel allows (its default is 12)."""
ANSWER_TIMEOUT_S = 30.0
"""For the mount to answer its first stat."""
FLUSH_TIMEOUT_S = 110.0
"""For all dirty bytes to leave when the mount ends; the services' own deadlines are shorter."""

log = get_logger("fsd.daemon")


class MountError(StoreError):
    """The mount could not be made; the detail says why, for people."""


@dataclass(frozen=True)
class MountConfig:
    """What is to be mounted, where and how."""

    mountpoint: Path
    host: str
    port: int
    subdirectory: bytes = b"/"
    budget_bytes: int = 512 << 20
    read_only: bool = False
    allow_other: bool = dataclasses.field(default_factory=lambda: os.geteuid() == 0)
    options: tuple[str, ...] = ()  # For mount(2): "noexec", "nosuid" ...
    timeout_s: float = 30.0  # For the inode service to answer.
    frontend: str = "direct"  # "direct": fsd itself speaks with the kernel (decision 0006); "pyfuse3": libfuse does.


class FrontEnd(Protocol):
    """What speaks with the kernel for one mount."""

    @property
    def notifier(self) -> ThreadNotifier:
        """Tells the kernel what it must forget."""
        ...

    async def serve(self, operations: Operations) -> None:
        """Answer requests until the file system is unmounted or `stop` is called."""
        ...

    def stop(self) -> None:
        """Make `serve` return, if it runs."""
        ...

    def close(self) -> None:
        """Unmount if that has not been done, and let go of the device; may block for a moment."""
        ...


class _Mount:
    """One mount in the making, at work, and at its end."""

    def __init__(self, config: MountConfig) -> None:
        self.config = config
        self.file_system: FileSystem | None = None
        self.front_end: FrontEnd | None = None
        self.ended = trio.Event()

    async def on_sharing(self, alone: bool) -> None:
        """The service says whether others have a session."""
        log.info("alone" if alone else "sharing", mountpoint=self.config.mountpoint)
        if self.file_system is not None:
            await self.file_system.set_alone(alone)

    async def on_session_lost(self) -> None:
        """The lease has run out."""
        log.warning("session_lost", mountpoint=self.config.mountpoint)
        if self.file_system is not None:
            await self.file_system.session_lost()

    def holdings(self) -> Holdings:
        """What the service is told to be held here when it has forgotten it."""
        return Holdings() if self.file_system is None else self.file_system.holdings()

    def on_locks_ready(self, numbers: tuple[int, ...]) -> None:
        """Locks that programs wait for may be had."""
        if self.file_system is not None:
            self.file_system.locks_ready(numbers)

    async def open_inodes(self) -> list[int]:
        """The service does not know what is open here."""
        return [] if self.file_system is None else await self.file_system.open_inodes()

    async def on_recall(self, items: Sequence[RecallItem]) -> None:
        """The service lets others change these."""
        if self.file_system is not None:
            await self.file_system.recall(items)

    def stop(self) -> None:
        """End as if unmounted."""
        if self.front_end is not None:
            self.front_end.stop()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Mount, serve, and take down; not cancelled from outside."""
        config = self.config
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(check_mountpoint, config.mountpoint)
                session = open_session(
                    config.host,
                    config.port,
                    client=f"{socket.gethostname()} pid {os.getpid()} fsd {VERSION}",
                    host_boot_id=await trio.to_thread.run_sync(boot_id),
                    mountpoint=os.fsencode(config.mountpoint),
                    subdirectory=config.subdirectory,
                    timeout_s=config.timeout_s,
                    on_sharing=self.on_sharing,
                    on_session_lost=self.on_session_lost,
                    holdings=self.holdings,
                    on_locks_ready=self.on_locks_ready,
                    open_inodes=self.open_inodes,
                    on_recall=self.on_recall,
                )
                async with session as metadata, self._data_path(metadata) as data:
                    await self._serve(metadata, data, task_status)
        finally:
            self.ended.set()

    @asynccontextmanager
    async def _data_path(self, metadata: MetadataClient) -> AsyncIterator[DataPath]:
        blocks = BlockClient(
            current_map=lambda: metadata.map,
            refresh_map=metadata.refresh_map,
            report_bad_copy=metadata.report_bad_copy,
            wait_map_changed=metadata.wait_map_changed,
        )
        data = DataPath(metadata=metadata, blocks=blocks, budget_bytes=self.config.budget_bytes)
        async with trio.open_nursery() as nursery:
            await nursery.start(blocks.run)
            await nursery.start(data.run)
            yield data
            nursery.cancel_scope.cancel()

    async def _serve(self, metadata: MetadataClient, data: DataPath, task_status: trio.TaskStatus[None]) -> None:
        config = self.config
        front_end = self.front_end = await self._mount()
        try:
            file_system = self.file_system = FileSystem(
                metadata=metadata,
                data=data,
                notifier=front_end.notifier,
                access_times=rule_of_options(config.options, read_only=config.read_only),
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file_system.run)
                nursery.start_soon(self._announce, task_status)
                await front_end.serve(file_system)
                nursery.cancel_scope.cancel()
            log.info("unmounted", mountpoint=config.mountpoint)
        finally:
            await self._take_down(front_end)

    async def _mount(self) -> FrontEnd:
        config = self.config
        mountpoint, options = os.fspath(config.mountpoint), mount_options(config)
        try:
            if config.frontend == "pyfuse3":
                from fsd.frontend.pyfuse3_frontend import Pyfuse3Mount  # libfuse is not needed otherwise.

                return Pyfuse3Mount(mountpoint, [one for one in options if one not in UNKNOWN_TO_LIBFUSE])
            return await trio.to_thread.run_sync(DirectMount, mountpoint, options)
        except (RuntimeError, MountFailed) as error:
            raise MountError(
                f"cannot mount at {mountpoint}: {error}; is fusermount3 installed and /dev/fuse allowed?"
            ) from error

    async def _announce(self, task_status: trio.TaskStatus[None]) -> None:
        """Wait until the mount answers, set what the kernel lets us set only now, and say that it is there."""
        mountpoint = self.config.mountpoint
        with trio.fail_after(ANSWER_TIMEOUT_S):
            found = await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
        await trio.to_thread.run_sync(tune_kernel, found.st_dev)
        log.info("mounted", mountpoint=mountpoint, service=f"{self.config.host}:{self.config.port}")
        task_status.started(None)

    async def _take_down(self, front_end: FrontEnd) -> None:
        file_system = self.file_system
        if file_system is not None:
            await file_system.close(FLUSH_TIMEOUT_S)
        self.file_system = None
        await trio.to_thread.run_sync(front_end.close)


async def run_mount(config: MountConfig, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Mount and serve until unmounted; `started` is told when the mount answers.

    When cancelled, everything written is flushed, and the mount taken away (lazily), before the cancellation goes on.

    Raises:
        MountError: it could not be mounted; nothing is.
        StoreError: the inode service is away (Unreachable, DeadlineExceeded), of another version or cluster, or has no
            such directory; nothing is mounted.
    """
    mount = _Mount(config)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(mount.run)
            task_status.started(None)
            try:
                await mount.ended.wait()
            finally:
                mount.stop()
    except BaseExceptionGroup as group:
        raise only_error(group) from group


def only_error(error: BaseException) -> BaseException:
    """The one error in nested groups, or the group if there are several."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def check_mountpoint(mountpoint: Path) -> None:
    """Raise MountError, with a sentence, if nothing can be mounted there."""
    try:
        found = os.stat(mountpoint)
    except FileNotFoundError as error:
        raise MountError(f"the mount point {mountpoint} does not exist") from error
    except OSError as error:
        raise MountError(f"the mount point {mountpoint} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise MountError(f"the mount point {mountpoint} is not a directory")
    if os.path.ismount(mountpoint):
        raise MountError(f"the mount point {mountpoint} is busy: something is mounted there")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise MountError(f"/dev/fuse cannot be opened: {error.strerror}") from error


def mount_options(config: MountConfig) -> list[str]:
    """Options for the front end, as libfuse takes them; a later one counts."""
    subdirectory = config.subdirectory.decode("ascii", "backslashreplace")
    name = f"{config.host}:{config.port}:{subdirectory}".replace("\\", "\\\\").replace(",", "\\,")
    options = ["default_permissions", f"fsname={name}", "subtype=fsd"]
    if os.geteuid() == 0:  # libfuse would forbid both unless told otherwise; mount(8) allows them to root.
        options += [plain for plain in ("suid", "dev") if f"no{plain}" not in config.options]
    options += config.options
    if config.read_only:
        options.append("ro")
    if config.allow_other:
        options.append("allow_other")
    return options


def boot_id() -> str:
    """Names this host's uptime: a session of the same one and mount point was our predecessor's."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def tune_kernel(device: int) -> None:
    """Raise read-ahead and background requests of the mount, where that is allowed (as root)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for path, value in (
        (f"/sys/class/bdi/{number}/read_ahead_kb", READ_AHEAD_KIB),
        (f"/sys/fs/fuse/connections/{device_number(device)}/max_background", BACKGROUND_MAX),
    ):
        try:
            Path(path).write_text(str(value))
        except OSError as error:
            log.info("kernel_not_tuned", path=path, reason=error.strerror)


def device_number(device: int) -> int:
    """The number under which fusectl shows a mount: the kernel's encoding of its anonymous device."""
    return os.major(device) << 20 | os.minor(device)


__all__ = ["MountConfig", "MountError", "run_mount"]
