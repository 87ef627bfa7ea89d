"""Group commit: what shares a transaction, what is told when, and what is left behind when things go wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import Engine, EngineBroken, EngineFault, RunAgain, WriteTxn
from metadata.group_commit import Batch, GroupCommit, GroupCommitLimits
from tests.support.engines import Gate, Twisted
from wire.errors import EntryExists, NoSpace, ServerOverloaded, StoreError


class Put:
    """Puts one key; raises `error` after it, if there is one, having left no trace."""

    def __init__(self, key: bytes, told: list[tuple[bytes, object]], error: Exception | None = None) -> None:
        self.key = key
        self.told = told
        self.error = error
        self.runs = 0

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        self.runs += 1
        savepoint = txn.savepoint()
        txn.put(self.key, b"there")
        if self.error is not None:
            txn.rollback_to(savepoint)
            raise self.error
        txn.release(savepoint)
        return "done"

    def finish(self, result: object) -> None:
        self.told.append((self.key, result))


@asynccontextmanager
async def running(engine: Engine, limits: GroupCommitLimits | None = None) -> AsyncIterator[GroupCommit]:
    commits = GroupCommit(engine, clock_ns=lambda: 1, limits=limits)
    async with trio.open_nursery() as nursery:
        await nursery.start(commits.run)
        yield commits
        nursery.cancel_scope.cancel()


def keys(engine: Engine) -> list[bytes]:
    with engine.read() as txn:
        return [key for key, _ in txn.scan(b"", b"\xff", 10_000)]


def submit(commits: GroupCommit, jobs: Sequence[Put]) -> None:
    for job in jobs:
        commits.submit(job)
    commits.kick()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  (conditions of another thread)
            await trio.sleep(0.001)


async def test_what_waits_while_a_batch_is_flushed_shares_the_next_flush() -> None:
    gate, told = Gate(), list[tuple[bytes, object]]()
    engine = Twisted(MemoryEngine(), gate)
    async with running(engine) as commits:
        submit(commits, [Put(b"first", told)])
        await until(gate.reached.is_set)
        submit(commits, [Put(b"%03d" % n, told) for n in range(100)])
        assert told == [], "answered before the commit"
        gate.opened.set()
        await until(lambda: len(told) == 101)
    assert gate.commits == 2
    assert commits.statistics.batch_size_max == 100
    assert [key for key, _ in told] == [b"first", *(b"%03d" % n for n in range(100))], "answers in order"


async def test_a_batch_is_bounded() -> None:
    told: list[tuple[bytes, object]] = []
    async with running(MemoryEngine(), GroupCommitLimits(batch_max=10)) as commits:
        submit(commits, [Put(b"%03d" % n, told) for n in range(25)])
        await until(lambda: len(told) == 25)
    assert commits.statistics.batch_size_max == 10


async def test_a_full_queue_refuses_at_once_and_changes_nothing() -> None:
    gate, told = Gate(), list[tuple[bytes, object]]()
    engine = Twisted(MemoryEngine(), gate)
    async with running(engine, GroupCommitLimits(queue_max=5)) as commits:
        submit(commits, [Put(b"first", told)])
        await until(gate.reached.is_set)
        submit(commits, [Put(b"%03d" % n, told) for n in range(5)])
        with pytest.raises(ServerOverloaded):
            commits.submit(Put(b"too much", told))
        gate.opened.set()
        await until(lambda: len(told) == 6)
    assert b"too much" not in keys(engine)


async def test_a_refused_job_leaves_no_trace_and_the_others_go_on() -> None:
    told: list[tuple[bytes, object]] = []
    engine, refusal = MemoryEngine(), EntryExists("no")
    async with running(engine) as commits:
        submit(commits, [Put(b"a", told), Put(b"b", told, refusal), Put(b"c", told)])
        await until(lambda: len(told) == 3)
    assert told == [(b"a", "done"), (b"b", refusal), (b"c", "done")]
    assert keys(engine) == [b"a", b"c"]


async def test_a_bug_in_one_job_is_its_own_error_only() -> None:
    told: list[tuple[bytes, object]] = []
    engine = MemoryEngine()
    async with running(engine) as commits:
        submit(commits, [Put(b"a", told), Put(b"b", told, ZeroDivisionError("planted")), Put(b"c", told)])
        await until(lambda: len(told) == 3)
    assert type(told[1][1]) is StoreError
    assert keys(engine) == [b"a", b"c"]


async def test_run_again_runs_the_whole_batch_again() -> None:
    told: list[tuple[bytes, object]] = []
    failures = [RunAgain("grown"), RunAgain("grown")]

    def fail_twice() -> None:
        if failures:
            raise failures.pop()

    engine = Twisted(MemoryEngine(), fail_twice)
    jobs = [Put(b"%03d" % n, told) for n in range(3)]
    async with running(engine) as commits:
        submit(commits, jobs)
        await until(lambda: len(told) == 3)
    assert [job.runs for job in jobs] == [3, 3, 3]
    assert [result for _, result in told] == ["done"] * 3
    assert keys(engine) == [b"000", b"001", b"002"]


@pytest.mark.parametrize("error", [NoSpace("full"), EngineFault("a bad sector")])
async def test_a_failing_disk_is_the_answer_of_the_whole_batch_and_the_service_lives_on(error: StoreError) -> None:
    told: list[tuple[bytes, object]] = []
    failures = [error]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    engine = Twisted(MemoryEngine(), fail_once)
    async with running(engine) as commits:
        submit(commits, [Put(b"a", told), Put(b"b", told)])
        await until(lambda: len(told) == 2)
        assert [result for _, result in told] == [error, error]
        assert keys(engine) == []
        submit(commits, [Put(b"c", told)])
        await until(lambda: len(told) == 3)
    assert keys(engine) == [b"c"]


async def test_a_broken_engine_ends_the_run_and_everybody_is_told() -> None:
    told: list[tuple[bytes, object]] = []

    def broken() -> None:
        raise EngineBroken("planted")

    commits = GroupCommit(Twisted(MemoryEngine(), broken), clock_ns=lambda: 1)
    waited: list[object] = []

    async def wait() -> None:
        try:
            await commits.change(lambda txn, batch: None)
        except StoreError as error:
            waited.append(error)

    with pytest.RaisesGroup(EngineBroken):
        async with trio.open_nursery() as nursery:
            await nursery.start(commits.run)
            nursery.start_soon(wait)
            submit(commits, [Put(b"a", told)])
    assert isinstance(told[0][1], EngineBroken)
    assert len(waited) == 1
    with pytest.raises(ServerOverloaded):
        commits.submit(Put(b"b", told))


async def test_cancelling_commits_what_was_queued() -> None:
    told: list[tuple[bytes, object]] = []
    engine = MemoryEngine()
    async with running(engine) as commits:
        submit(commits, [Put(b"%03d" % n, told) for n in range(2000)])
    assert len(told) == 2000
    assert len(keys(engine)) == 2000


async def test_change_tells_its_result_after_the_commit_and_undoes_its_errors() -> None:
    engine = MemoryEngine()

    def half(txn: WriteTxn, batch: Batch) -> object:
        txn.put(b"half", b"")
        raise EntryExists("planted")

    def whole(txn: WriteTxn, batch: Batch) -> object:
        txn.put(b"whole", b"")
        return 42

    async with running(engine) as commits:
        with pytest.raises(EntryExists):
            await commits.change(half)
        assert await commits.change(whole) == 42
        assert keys(engine) == [b"whole"]
