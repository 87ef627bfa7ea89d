"""kill -9 of a real inode service under load: what was acknowledged is there exactly once, what was refused is not."""

# ruff: noqa: B023  (every lambda is called before its loop goes on)
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from metadata.client import MetadataClient
from metadata.core.fsck import check
from metadata.core.schema import NAME_SIZE_MAX
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.protocol import Create, Link, Lookup, ReadDir
from metadata.server import ENGINE_DIRECTORY
from tests.support.inode_service import ServiceProcess, connect
from wire.errors import EntryExists, NameTooLong, StoreError

MODE = 0o100644
WORKERS = 24
KILLS = 3
LIFE_S = (0.05, 0.35)


@dataclass
class Record:
    """What the service has said."""

    made: dict[bytes, int] = field(default_factory=dict)  # Name to inode, acknowledged.
    links: dict[int, int] = field(default_factory=dict)  # Inode to number of names, acknowledged.
    refused: set[bytes] = field(default_factory=set)


@pytest.fixture
def process(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path / "metadata", *getattr(request, "param", ()))
    process.start()
    yield process
    process.kill()


async def work(client: MetadataClient, worker: int, record: Record, stop: trio.Event) -> None:
    """Create, link, and now and then ask for what must be refused, without a pause."""
    number = 0
    while not stop.is_set():
        name = b"%d-%d" % (worker, number)
        # Exclusive: if a retry were carried out a second time, it would be refused.
        made = await client.mutate(lambda s, q: Create(s, q, 1, name, MODE, True))
        record.made[name] = made.ino
        record.links[made.ino] = 1
        if number % 4 == 0:
            linked = await client.mutate(lambda s, q: Link(s, q, made.ino, 1, name + b"-link"))
            record.made[name + b"-link"] = made.ino
            record.links[made.ino] = linked.inode.nlink
            assert linked.inode.nlink == 2, "a link was made twice"
        if number % 4 == 1:
            bad = b"x" * NAME_SIZE_MAX + name
            with pytest.raises(NameTooLong):
                await client.mutate(lambda s, q: Create(s, q, 1, bad, MODE, True))
            with pytest.raises(EntryExists):
                await client.mutate(lambda s, q: Link(s, q, made.ino, 1, name))
        number += 1


async def listing(client: MetadataClient) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    after, end = 0, False
    while not end:
        page = await client.ask(lambda s: ReadDir(s, 1, after, 1000))
        for entry in page.entries:
            assert entry.name not in found, "listed twice"
            found[entry.name] = entry.ino
            after = entry.cookie
        end = page.end
    return found


async def crash_again_and_again(process: ServiceProcess, seed: int) -> tuple[Record, dict[bytes, int]]:
    """Work while the service is killed KILLS times; what was acknowledged, and what is there at the end."""
    chance, record, stop = random.Random(seed), Record(), trio.Event()
    async with connect(process.port, timeout_s=30.0) as client:
        session = client.session
        async with trio.open_nursery() as nursery:
            for worker in range(WORKERS):
                nursery.start_soon(work, client, worker, record, stop)
            for _ in range(KILLS):
                before = len(record.made)
                await trio.sleep(chance.uniform(*LIFE_S))
                process.kill()
                await trio.to_thread.run_sync(process.start)
                with trio.fail_after(20):
                    while len(record.made) == before:  # noqa: ASYNC110  (of other tasks)
                        await trio.sleep(0.01)
            stop.set()
        assert client.session == session, "the session was lost"
        found = await listing(client)
        for name in list(record.made)[:: max(1, len(record.made) // 50)]:
            inode = (await client.ask(lambda s: Lookup(s, 1, name))).inode
            assert inode.nlink == record.links[record.made[name]]
    return record, found


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
async def test_everything_acknowledged_is_there_exactly_once_after_kill_9(process: ServiceProcess, seed: int) -> None:
    record, found = await crash_again_and_again(process, seed)
    assert len(record.made) > 100
    assert found == record.made
    process.kill()
    engine = LmdbEngine(process.directory / ENGINE_DIRECTORY)
    with engine.read() as txn:
        assert check(txn) == []
    engine.close()


@pytest.mark.parametrize("process", [("--acknowledge-early",)], indirect=True)
async def test_the_crash_test_catches_an_acknowledgement_before_the_commit(process: ServiceProcess) -> None:
    """The planted bug: tests/support/inode_service.py answers before it commits.

    What was acknowledged and lost shows as a missing name, as a link to an inode that is not there, or as a refusal
    that does not come.
    """
    caught = False
    for seed in range(5):
        try:
            record, found = await crash_again_and_again(process, seed)
            caught = found != record.made
        except* (StoreError, AssertionError, pytest.fail.Exception):
            caught = True
        if caught:
            return
    pytest.fail("nobody noticed")
