"""Group commit: jobs that wait at the same moment share one write transaction and one flush.

Tasks and threads: `run` is the one task; it owns one thread, which alone ever holds the write transaction, from its
begin to its commit (an LMDB transaction belongs to its thread, and its flush must not stop the loop).  While that
thread flushes, the next batch gathers in `_pending`.

Shared state: `_pending` is appended to by the loop and taken from by the thread (both ends of a deque are atomic);
`_kicked` is set by the loop and cleared by the thread *before* it takes, so that a job which was added after the taking
always finds it cleared and wakes the thread again.  Everything else belongs to one side.

Order: jobs run in the order in which they were submitted, and are finished (on the loop, in the same order) only after
the commit that holds them has returned.  There is no await between a submit and its place in the queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from metadata.core.exactly_once import ENGINE_ERRORS
from metadata.core.opens import Opens
from metadata.engine.ports import Engine, EngineBroken, EngineFault, RunAgain, WriteTxn
from wire.errors import NoSpace, ServerOverloaded, StoreError
from wire.log import get_logger

log = get_logger("metadata.commit")

RUN_AGAIN_COUNT_MAX = 40
"""Growths of the map that one batch may cause; each doubles it, so more means that the engine lies."""


class Newest:
    """Highest sequence number answered, by session: what is committed, and over it what this batch adds."""

    __slots__ = ("_committed", "_staged")

    def __init__(self) -> None:
        self._committed: dict[int, int] = {}
        self._staged: dict[int, int] = {}

    def get(self, session: int) -> int | None:
        """The highest number known, or None: not looked up since the service started."""
        staged = self._staged.get(session)
        return self._committed.get(session) if staged is None else staged

    def set(self, session: int, sequence: int) -> None:
        """To be kept if the batch commits."""
        self._staged[session] = sequence

    def forget(self, session: int) -> None:
        """The session has ended; a late look-up reads the ring again."""
        self._committed.pop(session, None)
        self._staged.pop(session, None)

    def committed(self) -> None:
        """What was staged stands."""
        self._committed.update(self._staged)
        self._staged.clear()

    def aborted(self) -> None:
        """What was staged never was."""
        self._staged.clear()


@dataclass
class Batch:
    """What a job sees besides the transaction."""

    now_ns: int
    newest: Newest
    opens: Opens = field(default_factory=Opens)


class Job(Protocol):
    """One unit of change."""

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        """Make the change, in the writer's thread; may run again after an abort, so it keeps nothing to itself.

        When it raises anything but one of the engine's errors, it must have left no trace in the transaction.
        """
        ...

    def finish(self, result: object) -> None:
        """On the loop: the commit has returned, and this is what `run` returned; or a StoreError, and nothing of this
        job was or ever will be seen; or EngineBroken, and nobody knows.  Must not raise.
        """
        ...


@dataclass(frozen=True)
class GroupCommitLimits:
    """Bounds of the queue and of a batch."""

    queue_max: int = 8192  # Jobs that wait; most are below 1 KiB, the largest about 100 KiB.
    batch_max: int = 512  # Jobs in one transaction: 5 ms of work beside a flush of 1 to 10 ms.


@dataclass
class GroupCommitStatistics:
    """Since the start; times in seconds."""

    batch_count: int = 0
    job_count: int = 0
    batch_size_max: int = 0
    queue_max: int = 0
    refused_count: int = 0  # Jobs that found the queue full.
    run_s: float = 0.0  # Spent on jobs.
    commit_s: float = 0.0  # Spent in commits, flushes included.
    commit_s_max: float = 0.0
    run_again_count: int = 0
    no_space_count: int = 0  # Batches.
    fault_count: int = 0


class GroupCommit:
    """The queue of changes and the thread that makes them durable."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock_ns: Callable[[], int],
        limits: GroupCommitLimits | None = None,
        opens: Opens | None = None,
        around_answers: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Nothing happens before `run`.

        Args:
            clock_ns: read once per batch.
            opens: the table that jobs see, the thread's from now on; None: an empty one.
            around_answers: called with what finishes all jobs of a batch, and calls that.
        """
        self._engine = engine
        self._clock_ns = clock_ns
        self.around_answers = around_answers or _just_call
        self._limits = limits or GroupCommitLimits()
        self._pending: deque[Job] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._kicked = False
        self._stopping = False
        self._newest = Newest()
        self._opens = Opens() if opens is None else opens
        self._failure: BaseException | None = None
        self._ended = trio.Event()
        self.statistics = GroupCommitStatistics()

    # --- on the loop --------------------------------------------------------------------------------------------------

    @property
    def queue_size(self) -> int:
        """Jobs that wait for the thread."""
        return len(self._pending)

    def open_count(self, session: int) -> int:
        """How many inodes a session has said to have open; for people (a count is atomic)."""
        return self._opens.count(session)

    def submit(self, job: Job) -> None:
        """Queue a job; it starts at the next kick() at the latest.

        Raises: ServerOverloaded (the queue is full, or the service is stopping); the job was not begun.
        """
        waiting = len(self._pending)
        if waiting >= self._limits.queue_max or self._stopping:
            self.statistics.refused_count += 1
            raise ServerOverloaded("the service is stopping" if self._stopping else f"{waiting} changes are waiting")
        self._pending.append(job)
        if waiting >= self.statistics.queue_max:
            self.statistics.queue_max = waiting + 1

    def kick(self) -> None:
        """Wake the thread if there is something to do."""
        if self._pending and not self._kicked:
            self._kicked = True
            self._wake.put(None)

    async def change(self, operation: Callable[[WriteTxn, Batch], object]) -> object:
        """Submit `operation` as a job of its own, wait for its commit and return its result.

        The operation needs no savepoint of its own.  When the waiting is cancelled, the change is made all the same.
        Raises: what the operation or the commit raised (nothing was changed), ServerOverloaded.
        """
        job = _Waited(operation)
        self.submit(job)
        self.kick()
        await job.done.wait()
        if isinstance(job.result, StoreError):
            raise job.result
        return job.result

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the thread until cancelled; then commit what is queued, and return when the thread has ended.

        Raises: EngineBroken (or a bug of the thread's): nothing can be written any more; the jobs of the last batch,
        of which it is not known whether they took effect, and those behind it were finished with EngineBroken.
        """
        token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=self._thread, args=(token,), name="group-commit")
        thread.start()
        try:
            task_status.started()
            await self._ended.wait()
        finally:
            self._stopping = True
            self._wake.put(None)
            with trio.CancelScope(shield=True):
                await self._ended.wait()
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _finish(self, outcomes: Sequence[tuple[Job, object]]) -> None:
        self.around_answers(partial(_finish_all, outcomes))

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _thread(self, token: trio.lowlevel.TrioToken) -> None:
        batch: list[Job] = []
        try:
            while not (self._stopping and not self._pending):
                self._wake.get()
                self._kicked = False
                while batch := self._take():
                    token.run_sync_soon(self._finish, self._run_batch(batch))
        except BaseException as error:  # Carried to `run`, which raises it.
            self._failure = error
            self._stopping = True
            broken = EngineBroken(f"the writer has stopped: {error}")
            token.run_sync_soon(self._finish, [(job, broken) for job in (*batch, *self._pending)])
        token.run_sync_soon(self._ended.set)

    def _take(self) -> list[Job]:
        count = min(len(self._pending), self._limits.batch_max)
        return [self._pending.popleft() for _ in range(count)]

    def _run_batch(self, jobs: Sequence[Job]) -> Sequence[tuple[Job, object]]:
        """Run and commit; RunAgain starts over, a full or failing disk is the answer of every job."""
        statistics = self.statistics
        statistics.batch_count += 1
        statistics.job_count += len(jobs)
        statistics.batch_size_max = max(statistics.batch_size_max, len(jobs))
        for _ in range(RUN_AGAIN_COUNT_MAX):
            try:
                outcomes = self._attempt(jobs)
            except RunAgain:
                self._aborted()
                statistics.run_again_count += 1
            except (NoSpace, EngineFault) as error:
                self._aborted()
                statistics.no_space_count += isinstance(error, NoSpace)
                statistics.fault_count += isinstance(error, EngineFault)
                log.error("batch-failed", jobs=len(jobs), error=error)
                return [(job, error) for job in jobs]
            else:
                self._newest.committed()
                self._opens.committed()
                return outcomes
        raise EngineBroken(f"a batch of {len(jobs)} jobs was to run again {RUN_AGAIN_COUNT_MAX} times")

    def _aborted(self) -> None:
        self._newest.aborted()
        self._opens.aborted()

    def _attempt(self, jobs: Sequence[Job]) -> Sequence[tuple[Job, object]]:
        began = time.perf_counter()
        with self._engine.write() as txn:
            batch = Batch(self._clock_ns(), self._newest, self._opens)
            outcomes = [(job, _run_job(job, txn, batch)) for job in jobs]
            ran = time.perf_counter()
            txn.commit()
        committed = time.perf_counter()
        self.statistics.run_s += ran - began
        self.statistics.commit_s += committed - ran
        self.statistics.commit_s_max = max(self.statistics.commit_s_max, committed - ran)
        return outcomes


def _just_call(answer: Callable[[], None]) -> None:
    answer()


def _finish_all(outcomes: Sequence[tuple[Job, object]]) -> None:
    for job, result in outcomes:
        try:
            job.finish(result)
        except Exception as error:  # A bug in one answer must not end the loop; its caller's time will run out.
            log.exception("finish-failed", job=type(job).__name__, error=error)


def _run_job(job: Job, txn: WriteTxn, batch: Batch) -> object:
    """One job; what concerns only itself becomes its result."""
    try:
        return job.run(txn, batch)
    except ENGINE_ERRORS:
        raise
    except StoreError as error:
        return error
    except Exception as error:  # A bug in one operation, which has left no trace, must not stop all the others.
        log.exception("job-failed", job=type(job).__name__, error=error)
        return StoreError("internal error, see the inode service's log")


class _Waited:
    """A job that somebody awaits."""

    __slots__ = ("_operation", "done", "result")

    def __init__(self, operation: Callable[[WriteTxn, Batch], object]) -> None:
        self._operation = operation
        self.done = trio.Event()
        self.result: object = None

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        savepoint = txn.savepoint()
        try:
            result = self._operation(txn, batch)
        except ENGINE_ERRORS:
            raise  # The transaction is gone.
        except BaseException:
            txn.rollback_to(savepoint)
            raise
        txn.release(savepoint)
        return result

    def finish(self, result: object) -> None:
        self.result = result
        self.done.set()
