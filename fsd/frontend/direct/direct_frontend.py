"""One mount of the direct front end: mounted, INIT answered, served, taken away.

Tasks: the loop's; and one that waits for `stop`, has the kernel write back what is in mappings, and stops the loop.
Threads: the notifier's, and one for a moment each when mounting, syncing and unmounting, as those calls block.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterable
from typing import Final

import trio

from fsd.frontend.direct import mounting, replies
from fsd.frontend.direct.loop import DeviceLoop, End
from fsd.frontend.direct.mounting import Mounted, MountFailed
from fsd.frontend.direct.negotiation import Agreement, VersionTooOld, agree, init_reply
from fsd.frontend.direct.protocol import Opcode
from fsd.frontend.direct.requests import HEADER_SIZE, IN_HEADER
from fsd.frontend.kernel_notifier import ThreadNotifier
from fsd.frontend.ports import Operations
from wire.log import get_logger

INIT_TIMEOUT_S: Final = 10.0
"""The kernel puts INIT on the device before mount(2) returns."""
INIT_SIZE_MAX: Final = 8192
"""FUSE_MIN_READ_BUFFER: the kernel gives nothing to a smaller buffer."""
SYNC_TIMEOUT_S: Final = 30.0
"""For the kernel to write back the pages of mappings when the daemon is told to end."""

log = get_logger("fsd.frontend")


class DeviceChannel:
    """Notifications on the device (see kernel_notifier.Channel)."""

    def __init__(self, device: int) -> None:
        self._device = device

    def forget_attributes(self, nodeid: int) -> None:
        """See kernel_notifier.Channel."""
        os.write(self._device, replies.forget_attributes(nodeid))

    def forget_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See kernel_notifier.Channel."""
        os.write(self._device, replies.forget_pages(nodeid, offset, size))

    def forget_entry(self, parent: int, name: bytes) -> None:
        """See kernel_notifier.Channel."""
        os.write(self._device, replies.forget_entry(parent, name))

    def doubt_entry(self, parent: int, name: bytes) -> None:
        """See kernel_notifier.Channel."""
        os.write(self._device, replies.doubt_entry(parent, name))

    def forget_all_names(self) -> None:
        """See kernel_notifier.Channel."""
        os.write(self._device, replies.forget_all_names())


class DirectMount:
    """One mount; any number of them in a process."""

    def __init__(self, mountpoint: str, options: Iterable[str]) -> None:
        """Mount and agree with the kernel; requests wait until `serve`.  Blocks for a moment.

        Raises:
            MountFailed: nothing is mounted.
        """
        self._mounted = mounting.mount(mountpoint, options)
        try:
            self.agreement = _shake_hands(self._mounted.device)
        except (MountFailed, OSError) as error:
            _take_away(self._mounted)
            os.close(self._mounted.device)
            raise MountFailed(str(error)) from error
        device = self._mounted.device
        self.loop = DeviceLoop(device, extended_setxattr=self.agreement.extended_setxattr)
        self.notifier = ThreadNotifier(DeviceChannel(device))
        self.notifier.start()
        self._end: End | None = None
        self._stop_wanted = trio.Event()

    async def serve(self, operations: Operations) -> None:
        """Answer requests until the file system is unmounted or `stop` is called."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_wanted)
            self._end = await self.loop.serve(operations)
            nursery.cancel_scope.cancel()
        if self._end is End.ABORTED:
            log.warning("connection_aborted", mountpoint=self._mounted.mountpoint)

    def stop(self) -> None:
        """Make `serve` return when the kernel has written back what is in mappings; the mount stays until `close`."""
        self._stop_wanted.set()

    async def _stop_when_wanted(self) -> None:
        await self._stop_wanted.wait()
        with trio.move_on_after(SYNC_TIMEOUT_S) as scope:
            await trio.to_thread.run_sync(self._mounted.sync, abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.warning("mappings_not_written_back", mountpoint=self._mounted.mountpoint, seconds=SYNC_TIMEOUT_S)
        self.loop.stop()

    def close(self) -> None:
        """Unmount if that has not been done (who still uses it gets ENOTCONN), and let go of the device."""
        if self._end is not End.UNMOUNTED:
            _take_away(self._mounted)
        self.notifier.stop()
        os.close(self._mounted.device)


def _take_away(mounted: Mounted) -> None:
    try:
        mounted.unmount()
    except MountFailed as error:
        log.warning("not_unmounted", mountpoint=mounted.mountpoint, error=error)


def _shake_hands(device: int) -> Agreement:
    """Answer INIT; what was agreed on."""
    until = time.monotonic() + INIT_TIMEOUT_S
    poll = select.poll()
    poll.register(device, select.POLLIN)
    while (left_s := until - time.monotonic()) > 0:
        poll.poll(left_s * 1000)
        try:
            message = os.read(device, INIT_SIZE_MAX)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            raise
        header = IN_HEADER.unpack_from(message)
        if header[1] != Opcode.INIT:
            os.write(device, replies.error(header[2], errno.EIO))
            continue
        try:
            agreement = agree(message[HEADER_SIZE:])
        except VersionTooOld as error:
            os.write(device, replies.error(header[2], errno.EPROTO))
            raise MountFailed(str(error)) from error
        os.write(device, init_reply(header[2], agreement))
        if agreement is not None:
            return agreement
    raise MountFailed(f"the kernel did not begin within {INIT_TIMEOUT_S} s")


__all__ = ["DirectMount", "MountFailed"]
