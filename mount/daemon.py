"""Running a service as a process: from `started` to a clean end, in the foreground or detached.

A parent that waits for a daemon gives it the write end of a pipe (`--ready-fd`).  The daemon writes one JSON line when
it serves, or one with the sentence that says why it cannot, and closes the pipe; a pipe that closes without a line
means that the process died.  A supervisor also gives its children the read end of a pipe that it never writes to
(`--lifeline-fd`): when it closes, the supervisor is gone, however it ended, and the child ends cleanly.

Tasks of run_service: the service itself; one that waits for SIGTERM or SIGINT; one that waits for the lifeline.  All
end by cancelling the one nursery.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from mount import logs
from mount.outcome import CommandError, Exit, leaves
from mount.processes import ProcessId, fsd_environment, identify, raise_file_limit
from wire.errors import StoreError
from wire.log import get_logger

logger = get_logger("mount.daemon")


class Ready(msgspec.Struct):
    """The line a daemon writes to its ready pipe: either an address (it serves) or an error."""

    host: str = ""
    port: int = 0
    error: str = ""
    exit_code: int = 0
    port_taken: bool = False


class PortTaken(CommandError):
    """The port a service was told to listen at is in use."""


def add_daemon_flags(parser: argparse.ArgumentParser) -> None:
    """The two pipes; for parents, not for people."""
    parser.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--lifeline-fd", type=int, default=None, help=argparse.SUPPRESS)


def describe(error: BaseException) -> CommandError | None:
    """An expected failure as a sentence; None when it is a bug, whose traceback is wanted."""
    found = leaves(error)
    for one in found:
        if not isinstance(one, CommandError | StoreError | OSError | trio.Cancelled):
            return None
    for one in found:
        if isinstance(one, CommandError):
            return one
        if isinstance(one, OSError) and one.errno == errno.EADDRINUSE:
            return PortTaken(f"the port is taken ({one.strerror}): stop what listens there, or choose another --port")
        if isinstance(one, OSError):
            where = f"{one.filename}: " if one.filename else ""
            return CommandError(f"{where}{one.strerror or one}")
        if isinstance(one, StoreError):
            return CommandError(one.detail or type(one).__name__)
    return None


class ReadyPipe:
    """The daemon's side of the pipe on which its parent waits."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def tell(self, ready: Ready) -> None:
        """Write the line, once; later calls and a parent that has gone are ignored."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.write(descriptor, msgspec.json.encode(ready) + b"\n")
        except BrokenPipeError:
            logger.debug("nobody_waits")
        finally:
            os.close(descriptor)


Start = Callable[..., Awaitable[Any]]


def run_service(name: str, service: Start, flags: argparse.Namespace, *, stop: Start | None = None) -> Exit:
    """Run `service(task_status=...)` until SIGTERM, SIGINT or the end of the lifeline.

    Args:
        service: what trio's Nursery.start takes; `started((host, port))` or `started(None)` once it serves.  When it
            returns by itself, the process ends well.
        stop: asked to end the service on a signal, as unmounting does; when it answers False, or is None, the service
            is cancelled.

    Returns:
        OK after a clean end.

    Raises:
        CommandError: it could not start or had to give up; a parent on the ready pipe was told the same.
    """
    pipe = ReadyPipe(flags.ready_fd)
    os.umask(0o077)
    raise_file_limit()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        trio.run(_run, name, service, pipe, flags.lifeline_fd, stop)
    except BaseException as error:
        expected = describe(error)
        if expected is None:
            pipe.tell(Ready(error=f"{type(error).__name__}: {error} (a bug; see the log)", exit_code=Exit.FAILURE))
            logger.exception("service_failed", service=name)
            raise
        taken = isinstance(expected, PortTaken)
        pipe.tell(Ready(error=expected.sentence, exit_code=expected.code, port_taken=taken))
        logger.error("service_gave_up", service=name, reason=expected.sentence)
        raise expected from error
    return Exit.OK


async def _run(name: str, service: Start, pipe: ReadyPipe, lifeline: int | None, stop: Start | None) -> None:
    async with trio.open_nursery() as nursery:
        ending = trio.Event()
        nursery.start_soon(_wait_signal, ending)
        if lifeline is not None:
            nursery.start_soon(_wait_lifeline, lifeline, ending)
        async with trio.open_nursery() as inner:
            inner.start_soon(_end_when, ending, inner.cancel_scope, stop, name)
            address = await inner.start(_to_its_end, service, inner.cancel_scope)
            where = "{}:{}".format(*address) if address else ""
            logger.info("service_ready", service=name, pid=os.getpid(), address=where)
            pipe.tell(Ready(*(address or ())))
        logger.info("service_ended", service=name)
        nursery.cancel_scope.cancel()


async def _to_its_end(
    service: Start, scope: trio.CancelScope, *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
) -> None:
    await service(task_status=task_status)
    scope.cancel()


async def _wait_signal(ending: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            logger.info("signal", number=number)
            ending.set()


async def _wait_lifeline(descriptor: int, ending: trio.Event) -> None:
    await trio.lowlevel.wait_readable(descriptor)
    logger.warning("supervisor_gone")
    ending.set()


async def _end_when(ending: trio.Event, scope: trio.CancelScope, stop: Start | None, name: str) -> None:
    await ending.wait()
    logger.info("service_ending", service=name)
    if stop is None or not await stop():
        scope.cancel()


class Spawned:
    """A detached daemon that a command has started, until it serves."""

    def __init__(self, command: list[str], *, output: Path) -> None:
        """Start `command` in a session of its own, without a terminal, its output in a file, with a ready pipe."""
        self.output = output
        log = logs.open_output(output)
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, "--ready-fd", str(write_end)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=fsd_environment(),
                start_new_session=True,
                umask=0o077,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)
            os.close(log)
        self._pipe = read_end
        self.identity: ProcessId | None = identify(self._process.pid)

    def wait_ready(self, timeout_s: float, *, what: str) -> Ready:
        """Wait for its line.

        Raises:
            CommandError: it said why it cannot serve, died without a word, or is not ready in time (then it was ended).
        """
        deadline = time.monotonic() + timeout_s
        line = b""
        try:
            while not line.endswith(b"\n"):
                readable, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
                if not readable:
                    self._process.terminate()
                    raise CommandError(f"{what} did not get ready within {timeout_s:.0f} s; see {self.output}")
                piece = os.read(self._pipe, 65536)
                if not piece:
                    status = self._process.wait()
                    tail = logs.last_lines(self.output)
                    raise CommandError(f"{what} died (exit code {status}); the end of {self.output}:\n{tail}")
                line += piece
        finally:
            os.close(self._pipe)
        ready: Ready = msgspec.json.decode(line, type=Ready)
        if ready.error:
            self._process.wait()
            raise CommandError(ready.error, Exit(ready.exit_code))
        return ready

    def release(self) -> None:
        """Let it live on without this process; it is not waited for any more."""
        self._process.returncode = 0  # Else Popen warns that its child still runs.
