"""A store of each earlier schema becomes one of this, in steps that may be interrupted anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from metadata import server
from metadata.core import migrate, schema
from metadata.core.format import is_formatted
from metadata.core.fsck import check
from metadata.core.schema import ROOT_INO
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import Engine, ReadTxn
from metadata.protocol import GetUsage
from tests.support.inode_service import running_service
from tests.support.store import EVERYTHING, Store

GOLDEN = Path(__file__).parent / "golden"
OLD_VERSIONS = range(1, schema.SCHEMA_VERSION)


def old_store(version: int, engine: Engine | None = None) -> Engine:
    """A store as the last program of that schema has left it."""
    engine = engine or MemoryEngine()
    with engine.write() as txn:
        for line in (GOLDEN / f"schema-{version}.txt").read_text().splitlines():
            if not line.startswith("#"):
                key, value = line.split()
                txn.put(bytes.fromhex(key), b"" if value == "-" else bytes.fromhex(value))
        txn.commit()
    return engine


def step(engine: Engine) -> migrate.Progress | None:
    with engine.write() as txn:
        progress = migrate.advance(txn)
        txn.commit()
    return progress


def begin(engine: Engine) -> bool:
    with engine.write() as txn:
        begun = migrate.begin(txn)
        txn.commit()
    return begun


def everything(engine: Engine) -> list[tuple[bytes, bytes]]:
    with engine.read() as txn:
        return txn.scan(*EVERYTHING, 1 << 30)


def migrated(version: int) -> Engine:
    engine = old_store(version)
    assert begin(engine)
    while step(engine) is not None:
        pass
    return engine


def usage(txn: ReadTxn, *path: bytes) -> tuple[int, int]:
    ino = ROOT_INO
    for name in path:
        raw = txn.get(schema.dirent_key(ino, name))
        assert raw is not None
        ino, _ = schema.decode_dirent(raw)
    raw = txn.get(schema.usage_key(ino))
    assert raw is not None
    return schema.decode_usage(raw)[1:3]


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_a_store_of_an_older_schema_keeps_every_invariant_when_it_was_migrated(version: int) -> None:
    engine = migrated(version)
    with engine.read() as txn:
        assert is_formatted(txn)
        assert check(txn) == []
        assert txn.get(schema.MIGRATION_KEY) is None
    assert not begin(engine)


@pytest.mark.parametrize("version", OLD_VERSIONS)
@pytest.mark.parametrize("inodes_per_step", [1, 2, 3, 5])
def test_a_migration_may_be_interrupted_after_any_step(
    version: int, inodes_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step by a program that was started again, and that was killed in the middle of its next one."""
    wanted = everything(migrated(version))
    monkeypatch.setattr(migrate, "INODES_PER_STEP", inodes_per_step)
    engine = old_store(version)
    steps = 1
    begin(engine)
    while True:
        assert begin(engine), "the version is the new one, and there is still something to do"
        with engine.write() as txn:
            migrate.advance(txn)  # Never committed.
        if step(engine) is None:
            break
        steps += 1
    assert everything(engine) == wanted
    assert steps > 12 // inodes_per_step


def test_a_program_of_the_old_version_refuses_what_is_half_migrated() -> None:
    engine = old_store(1)
    begin(engine)
    with engine.read() as txn:
        raw = txn.get(schema.VERSION_KEY)
    assert raw is not None
    assert schema.decode_number(raw) == schema.SCHEMA_VERSION


def test_directories_have_the_sums_of_their_trees() -> None:
    """The golden store of schema 1: /top/a/b/c with two inline files, one of them linked from /other, and so on."""
    with migrated(1).read() as txn:
        assert usage(txn, b"top", b"a", b"b", b"c") == (2, 12)
        assert usage(txn, b"top", b"a") == (4, 12)
        assert usage(txn, b"top") == (7, 150_012)
        assert usage(txn, b"other") == (1, 0)
        assert usage(txn) == (10, 150_012)


def test_a_new_store_needs_no_migration() -> None:
    assert not begin(Store().engine)


async def test_the_service_migrates_at_its_start_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On LMDB, cancelled after each single step; the usage is asked of the service that comes up in the end."""
    monkeypatch.setattr(migrate, "INODES_PER_STEP", 1)
    directory = tmp_path / "metadata"
    directory.mkdir()
    old_store(1, LmdbEngine(directory / server.ENGINE_DIRECTORY)).close()
    starts = 0
    while True:
        engine = LmdbEngine(directory / server.ENGINE_DIRECTORY)
        with trio.CancelScope() as scope:
            scope.cancel()  # Takes effect at the first checkpoint, after a step.
            await server.migrate_store(engine)
        starts += 1
        with engine.read() as txn:
            over = txn.get(schema.MIGRATION_KEY) is None
            violations = check(txn)
        engine.close()
        if over:
            break
    assert violations == []
    assert starts > 12
    async with running_service(directory) as service, service.client() as client:
        told = await client.ask(lambda session: GetUsage(ROOT_INO))
    assert (told.inodes, told.allocated) == (10, 150_012)
