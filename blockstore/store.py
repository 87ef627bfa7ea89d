"""The block store of one directory: what the block server serves.

Tasks and threads:

- Two writing threads take turns (`_work`): one writes a group of operations into a segment, waits until the other has
  committed its own, then commits, while the other gathers and writes the next group.  `_write_lock` is let go only
  after `_commit_lock` was taken, so groups are committed in the order in which they were written: the writer's
  checkpoints rest on that.  A thread that has waited for `_commit_lock` takes along what has come meanwhile.
- The trio thread queues operations, is called back with their outcomes (one wake-up per group), and reads what lies in
  the page cache at once.  Other reads, lists and verifications run in trio's worker threads.

Shared state: `_queue` and its sizes, under `_gathered`; the rest is in catalogue.py and writer.py.
A bug in a writing thread ends `run` with its exception: a store that cannot write must not look alive.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from blockstore.catalogue import Catalogue
from blockstore.files import DiskFiles, Reserve, SegmentFiles, sync_directory
from blockstore.index import Index, IndexDamaged
from blockstore.protocol import BlockId
from blockstore.reader import Reader, Units
from blockstore.recovery import Recovered, recover
from blockstore.writer import SEGMENT_SIZE_MAX, Delete, Group, Put, Writer
from wire.checksum import Buffer
from wire.errors import ServerOverloaded
from wire.log import get_logger

QUEUE_BYTES_MAX = 256 << 20
QUEUE_COUNT_MAX = 16384
"""Operations that wait; more are refused with ServerOverloaded, to be sent again."""
GROUP_BYTES = 16 << 20
GROUP_COUNT = 1024
"""One group: some milliseconds of writing, so that the next one is written while this one is synced."""
LATE_BYTES = 1 << 20
"""What may still join a group whose turn to sync has come."""
IDLE_CHECKPOINT_S = 2.0
"""After so long without an operation the index is brought up to date."""
RESERVE_SIZE = 8 << 20
"""Bytes for the index on a full disk: a commit of 4,096 deletes rewrites a few hundred pages of 4 KiB."""
FREE_BYTES_KEPT = 32 << 20
"""Puts leave this much of the disk free, or 2 % of it on a small one."""
READ_THREADS_MAX = 16
"""Reads that wait for the disk at a time: a queue depth at which disks are at their best."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = get_logger("blockstore")


@dataclass(frozen=True)
class Figures:
    """What the store tells of itself, sizes in bytes."""

    space_total: int
    space_free: int
    block_count: int
    block_bytes: int
    corrupt_count: int


def open_catalogue(directory: Path, files: SegmentFiles) -> tuple[Catalogue, Recovered]:
    """Open a store directory; a damaged index is set aside and made again from the segments.

    Raises:
        WrongVersion: it was written by a newer version of fsd.
        OSError: a disk does not read or write.
    """
    try:
        return _open_index(directory, files)
    except IndexDamaged as error:
        aside = directory / "index.damaged"
        log.error("index_damaged", reason=str(error), set_aside=str(aside))
        shutil.rmtree(aside, ignore_errors=True)
        (directory / "index").rename(aside)
        sync_directory(directory)
        return _open_index(directory, files)


def _open_index(directory: Path, files: SegmentFiles) -> tuple[Catalogue, Recovered]:
    path = directory / "index"
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(directory)
    catalogue = Catalogue(files, Index(path))
    try:
        return catalogue, recover(catalogue)
    except BaseException:
        catalogue.close()
        raise


class BlockStore:
    """An open store; make it with `open_store`, then start `run`."""

    def __init__(self, directory: Path, *, segment_size_max: int = SEGMENT_SIZE_MAX) -> None:
        """Open or make the store in `directory`, which exists.  Blocks (recovery); for a thread.

        Raises:
            WrongVersion: it was written by a newer version of fsd.
            OSError: a disk does not read or write.
        """
        self._directory = directory
        self.device = device_of(directory)
        segments = directory / "segments"
        segments.mkdir(mode=0o700, exist_ok=True)
        self._files = DiskFiles(segments)
        self._reserve = Reserve(directory / "reserve", RESERVE_SIZE)
        self._catalogue, recovered = open_catalogue(directory, self._files)
        self._reader = Reader(self._catalogue)
        total, _ = self._space()
        self._reserve.make()
        self._writer = Writer(
            self._catalogue,
            self._reader,
            next_number=recovered.next_number,
            active=recovered.active,
            to_punch=recovered.to_punch,
            reserve_bytes=min(FREE_BYTES_KEPT, total // 50),
            segment_size_max=segment_size_max,
            release_reserve=self._reserve.release,
        )
        self._queue: deque[Put | Delete] = deque()
        self._queue_bytes = 0
        self._gathered = threading.Condition()
        self._write_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._stopping = False
        self._kicked = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._crash: BaseException | None = None
        self._crashed = trio.Event()
        self._read_limiter = trio.CapacityLimiter(READ_THREADS_MAX)

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then finish what is queued, bring the index up to date and close."""
        self._token = trio.lowlevel.current_trio_token()
        threads = [threading.Thread(target=self._work, name=f"blockstore-{n}", daemon=True) for n in (1, 2)]
        for thread in threads:
            thread.start()
        try:
            task_status.started()
            await self._crashed.wait()
            assert self._crash is not None
            raise self._crash
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._stop, threads)

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        with self._gathered:
            self._stopping = True
            self._gathered.notify_all()
        for thread in threads:
            thread.join()
        if self._crash is None:
            self._writer.commit(Group(), checkpoint=True)
            self._writer.reclaim()
        self._catalogue.close()

    # --- writing ----------------------------------------------------------------------------------------------------

    def put_nowait(self, block: BlockId, checksums: bytes, data: Buffer, done: Callable[[Put], None]) -> None:
        """Store a block; `done` is called in the trio thread when its outcome is true.  `kick` starts the work.

        `data` must not change before that.

        Raises:
            ServerOverloaded: the queue is full; nothing was begun.
        """
        self._enqueue(Put(block, checksums, data, done))

    def delete_nowait(self, blocks: Sequence[BlockId], done: Callable[[Delete], None]) -> None:
        """Forget blocks; as `put_nowait`."""
        self._enqueue(Delete(blocks, done))

    def _enqueue(self, operation: Put | Delete) -> None:
        if len(self._queue) >= QUEUE_COUNT_MAX or self._queue_bytes + operation.size > QUEUE_BYTES_MAX:
            raise ServerOverloaded(f"{len(self._queue)} operations wait for the disk")
        with self._gathered:
            self._queue.append(operation)
            self._queue_bytes += operation.size

    def kick(self) -> None:
        """Let a thread begin with what was queued.  Called once per batch of requests, so that they share a sync."""
        if self._queue:
            with self._gathered:
                self._gathered.notify()

    async def put(self, block: BlockId, checksums: bytes, data: Buffer) -> None:
        """Store a block; returns when it is durable.

        Raises:
            BlockCorrupt: the bytes do not match `checksums`.
            BlockExists: another content is stored under this id.
            NoSpace: the disk is full.
            ServerOverloaded: the queue is full, or the block is just being deleted.
            StoreError: the disk fails.
        """
        finished = trio.Event()
        await self._perform(Put(block, checksums, data, lambda _: finished.set()), finished)

    async def delete(self, blocks: Sequence[BlockId]) -> int:
        """Forget blocks, durably; how many of them were here.

        Raises:
            ServerOverloaded: the queue is full; nothing was begun.
            NoSpace, StoreError: the index cannot be written; all of them are still here.
        """
        finished = trio.Event()
        operation = Delete(blocks, lambda _: finished.set())
        await self._perform(operation, finished)
        return operation.deleted_count

    async def _perform(self, operation: Put | Delete, finished: trio.Event) -> None:
        self._enqueue(operation)
        self.kick()
        await finished.wait()
        if operation.outcome is not None:
            raise operation.outcome

    def _take(self, bytes_max: int) -> list[Put | Delete]:
        """Operations from the head of the queue, in order."""
        taken: list[Put | Delete] = []
        size = 0
        with self._gathered:
            while self._queue and len(taken) < GROUP_COUNT and size < bytes_max:
                operation = self._queue.popleft()
                self._queue_bytes -= operation.size
                size += operation.size
                taken.append(operation)
        return taken

    def _work(self) -> None:
        """A writing thread."""
        try:
            while self._wait_for_work():
                self._turn()
        except BaseException as error:
            self._crash = error
            with self._gathered:
                self._stopping = True
                self._gathered.notify_all()
            assert self._token is not None
            self._token.run_sync_soon(self._crashed.set)
            raise

    def _wait_for_work(self) -> bool:
        """Wait for an operation, or for the time of an idle checkpoint; False: stop."""
        with self._gathered:
            if not self._queue and not self._stopping:
                self._gathered.wait(IDLE_CHECKPOINT_S if self._writer.wants_checkpoint else None)
            return bool(self._queue) or not self._stopping

    def _turn(self) -> None:
        """Write and commit one group; a checkpoint when there is nothing to write."""
        group = Group()
        with self._write_lock:
            operations = self._take(GROUP_BYTES)
            self._writer.write(operations, group)
            self._commit_lock.acquire()
            try:
                self._writer.write(self._take(LATE_BYTES), group)
            except BaseException:
                self._commit_lock.release()
                raise
        try:
            self._writer.commit(group, checkpoint=not group.operations and self._writer.wants_checkpoint)
        finally:
            self._commit_lock.release()
        if group.operations and self._token is not None:
            self._token.run_sync_soon(_deliver, group.operations)
        self._writer.reclaim()

    # --- reading ----------------------------------------------------------------------------------------------------

    def get_nowait(self, block: BlockId, *, offset: int, size: int) -> Units | None:
        """The checksum units covering the range if no disk is needed for them; None: ask `get`.

        Raises: as `get`.
        """
        return self._reader.read_nowait(block, offset=offset, size=size)

    async def get(self, block: BlockId, *, offset: int, size: int) -> Units:
        """The checksum units covering [offset, offset + size), cut at the block's end; not verified.

        Raises:
            NoSuchBlock: it is not here.
            InvalidArgument: `offset` is at or past its end.
            BlockCorrupt: the disk fails the read, or what describes the block is damaged.
        """
        units = self._reader.read_nowait(block, offset=offset, size=size)
        if units is not None:
            return units
        return await trio.to_thread.run_sync(
            lambda: self._reader.read(block, offset=offset, size=size), limiter=self._read_limiter
        )

    async def verify(self, block: BlockId) -> int:
        """Read the whole block and hold it against its checksums; its size.

        Raises:
            NoSuchBlock: it is not here.
            BlockCorrupt: it is damaged; counted.
        """
        return await trio.to_thread.run_sync(self._reader.verify, block, limiter=self._read_limiter)

    async def list_page(self, after: BlockId | None, count: int) -> list[tuple[BlockId, int]]:
        """Up to `count` blocks with ids above `after`, ascending, with their sizes (0: its index row is damaged)."""
        return await trio.to_thread.run_sync(self._catalogue.list_page, after, count, limiter=self._read_limiter)

    def figures(self) -> Figures:
        """Counts of this moment."""
        segments = list(self._catalogue.segments.values())
        total, free = self._space()
        return Figures(
            space_total=total,
            space_free=free,
            block_count=sum(segment.live_count for segment in segments),
            block_bytes=sum(segment.live_bytes for segment in segments),
            corrupt_count=len(self._catalogue.corrupt),
        )

    def _space(self) -> tuple[int, int]:
        found = os.statvfs(self._directory)
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _deliver(operations: Sequence[Put | Delete]) -> None:
    """Tell the outcomes, in the trio thread."""
    for operation in operations:
        if isinstance(operation, Put):
            if operation.done is not None:
                operation.done(operation)
        elif operation.done is not None:
            operation.done(operation)


async def open_store(directory: Path, *, segment_size_max: int = SEGMENT_SIZE_MAX) -> BlockStore:
    """Open or make the store in `directory`, in a thread; see BlockStore."""
    return await trio.to_thread.run_sync(lambda: BlockStore(directory, segment_size_max=segment_size_max))


def device_of(directory: Path) -> str:
    """Host boot id and device number of the file system under `directory`; "" where the kernel does not tell."""
    try:
        boot_id = BOOT_ID.read_text().strip()
    except OSError:
        return ""
    return f"{boot_id}:{os.stat(directory).st_dev}"
