"""Inode services for tests: one on the test's own loop, or a process of its own that can be killed.

As a program: `python -m tests.support.inode_service DIRECTORY PORT [--acknowledge-early] [--lease SECONDS]` serves
until it is killed and prints "serving HOST PORT" when it answers.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from metadata import group_commit, server
from metadata.client import Holdings, MetadataClient, open_session
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import Engine
from metadata.group_commit import GroupCommit, Job
from metadata.protocol import RecallItem
from metadata.server import InodeServiceConfig, run_inode_service
from wire.clocks import boot_time_s
from wire.rpc.client import Channel

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """A service on the test's loop, which can be stopped and started again at the same port."""

    def __init__(
        self, nursery: trio.Nursery, config: InodeServiceConfig, open_engine: Callable[[Path], Engine]
    ) -> None:
        self._nursery = nursery
        self._open_engine = open_engine
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self.config = config
        self.port = config.port

    async def start(self) -> None:
        host, self.port = await self._nursery.start(self._run)
        assert host == "127.0.0.1"

    async def _run(self, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
        config = replace(self.config, port=self.port)
        self._stopped = trio.Event()
        with trio.CancelScope() as self._scope:
            await run_inode_service(config, task_status=task_status, open_engine=self._open_engine)
        self._stopped.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()

    def client(
        self,
        mountpoint: bytes = b"/mnt",
        *,
        on_sharing: Callable[[bool], Awaitable[None]] | None = None,
        on_session_lost: Callable[[], Awaitable[None]] | None = None,
        open_inodes: Callable[[], Awaitable[Sequence[int]]] | None = None,
        on_recall: Callable[[Sequence[RecallItem]], Awaitable[None]] | None = None,
        timeout_s: float = 10.0,
        subdirectory: bytes = b"/",
        holdings: Callable[[], Holdings] = Holdings,
        on_locks_ready: Callable[[tuple[int, ...]], None] = lambda numbers: None,
        clock_s: Callable[[], float] = boot_time_s,
    ) -> AbstractAsyncContextManager[MetadataClient]:
        return connect(
            self.port,
            mountpoint,
            on_sharing=on_sharing,
            on_session_lost=on_session_lost,
            open_inodes=open_inodes,
            on_recall=on_recall,
            timeout_s=timeout_s,
            subdirectory=subdirectory,
            holdings=holdings,
            on_locks_ready=on_locks_ready,
            clock_s=clock_s,
        )


def connect(
    port: int,
    mountpoint: bytes = b"/mnt",
    *,
    on_sharing: Callable[[bool], Awaitable[None]] | None = None,
    on_session_lost: Callable[[], Awaitable[None]] | None = None,
    open_inodes: Callable[[], Awaitable[Sequence[int]]] | None = None,
    on_recall: Callable[[Sequence[RecallItem]], Awaitable[None]] | None = None,
    timeout_s: float = 10.0,
    subdirectory: bytes = b"/",
    holdings: Callable[[], Holdings] = Holdings,
    on_locks_ready: Callable[[tuple[int, ...]], None] = lambda numbers: None,
    clock_s: Callable[[], float] = boot_time_s,
) -> AbstractAsyncContextManager[MetadataClient]:
    """A session of a client that caches nothing."""

    async def ignore(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    return open_session(
        "127.0.0.1",
        port,
        client="test",
        host_boot_id="boot",
        mountpoint=mountpoint,
        subdirectory=subdirectory,
        timeout_s=timeout_s,
        on_sharing=on_sharing or ignore,
        on_session_lost=on_session_lost or ignore,
        holdings=holdings,
        on_locks_ready=on_locks_ready,
        open_inodes=open_inodes,
        clock_s=clock_s,
        on_recall=on_recall,
    )


@asynccontextmanager
async def running_service(
    directory: Path, *, open_engine: Callable[[Path], Engine] = LmdbEngine, **settings: object
) -> AsyncIterator[Service]:
    """A service in `directory`; it is stopped at the end, cleanly."""
    config = InodeServiceConfig(directory=directory, host="127.0.0.1", port=0, **settings)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        service = Service(nursery, config, open_engine)
        await service.start()
        try:
            yield service
        finally:
            with trio.CancelScope(shield=True):
                await service.stop()


@asynccontextmanager
async def channel_to(service: Service) -> AsyncIterator[Channel]:
    """A connection to it on which nobody has a session yet."""
    async with trio.open_nursery() as nursery:
        channel = Channel("127.0.0.1", service.port, service="metadata")
        await nursery.start(channel.run)
        yield channel
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Return when it is so; the test fails when that takes too long."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  (conditions of another task or process)
            await trio.sleep(0.005)


# --- a process of its own ---------------------------------------------------------------------------------------------


class ServiceProcess:
    """A service in a process of its own, at a port that stays the same."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it serves."""
        command = [sys.executable, "-m", "tests.support.inode_service", str(self.directory), str(self.port)]
        self._process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.PIPE, text=True, cwd=ROOT, stdin=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        assert line[:1] == ["serving"], f"the service did not start: {line}"
        self.port = int(line[2])

    def kill(self) -> None:
        """As a power cut of this one process: kill -9."""
        self._end(signal.SIGKILL)

    def interrupt(self) -> None:
        """Ask it to end cleanly."""
        self._end(signal.SIGINT)

    def _end(self, number: int) -> None:
        if self._process is not None:
            os.kill(self._process.pid, number)
            self._process.wait(20)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


class _EarlyCommit(GroupCommit):
    """The planted bug: every job is answered before the transaction that holds it is committed."""

    def _attempt(self, jobs: list[Job]) -> list[tuple[Job, object]]:  # type: ignore[override]
        with self._engine.write() as txn:
            batch = group_commit.Batch(self._clock_ns(), self._newest, self._opens)
            outcomes = [(job, group_commit._run_job(job, txn, batch)) for job in jobs]
            trio.from_thread.run_sync(self._finish, outcomes, trio_token=self._token)
            txn.commit()
        return []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._token = trio.lowlevel.current_trio_token()
        await super().run(task_status=task_status)


async def _serve(directory: Path, port: int, lease_s: float) -> None:
    async with trio.open_nursery() as nursery:
        config = InodeServiceConfig(directory=directory, host="127.0.0.1", port=port, lease_s=lease_s)
        host, port = await nursery.start(run_inode_service, config)
        print("serving", host, port, flush=True)  # noqa: T201  (to the parent)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--acknowledge-early", action="store_true")
    parser.add_argument("--lease", type=float, default=20.0)
    arguments = parser.parse_args()
    if arguments.acknowledge_early:
        server.__dict__["GroupCommit"] = _EarlyCommit
    try:
        trio.run(_serve, arguments.directory, arguments.port, arguments.lease)
    except* KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
