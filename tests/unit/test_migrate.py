"""A store of each earlier schema becomes one of this, in steps that may be interrupted anywhere."""

from __future__ import annotations

import contextlib
import random
import stat
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
from metadata.protocol import GetUsage, RenameFlags, WriteInline
from tests.support.inode_service import running_service
from tests.support.store import EVERYTHING, SESSION, Store
from wire.errors import StoreError

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


def taken_back_to_schema_1(engine: Engine) -> Engine:
    """The same file system as schema 1 has it; without quotas, which it has not."""
    pairs = dict(everything(engine))
    old = {key: value for key, value in pairs.items() if key[9:10] not in (b"R", b"O") or key[:1] != b"i"}
    inodes = {schema.decode_ino(key): schema.decode_inode(value) for key, value in pairs.items() if is_inode(key)}
    for ino, inode in inodes.items():
        if stat.S_ISDIR(inode.mode):
            own = [one for at, one in inodes.items() if one.parent == ino and at != ROOT_INO]
            usage = schema.encode_pair(len(own), sum(one.allocated for one in own))
            old[schema.usage_key_1(ino)] = usage
    old[schema.VERSION_KEY] = schema.encode_u32(1)
    made = MemoryEngine()
    with made.write() as txn:
        for key, value in old.items():
            if key[:1] != b"u":
                txn.put(key, value)
        txn.commit()
    return made


def is_inode(key: bytes) -> bool:
    return len(key) == 10 and key[:1] == b"i" and key[9:] == b"A"


@pytest.mark.parametrize("seed", range(4))
def test_any_tree_gets_the_sums_that_it_would_have_had(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store after random work, taken back to schema 1 and migrated, is as it was."""
    monkeypatch.setattr(migrate, "INODES_PER_STEP", 3)
    store = random_store(seed)
    engine = taken_back_to_schema_1(store.engine)
    assert begin(engine)
    while step(engine) is not None:
        pass
    assert everything(engine) == everything(store.engine)


def random_store(seed: int) -> Store:
    chance = random.Random(seed)
    store = Store()
    directories = [ROOT_INO]
    for index in range(150):
        parent, name = chance.choice(directories), b"%d" % index
        kind = chance.random()
        if kind < 0.3:
            directories.append(store.mkdir(name, parent=parent))
        elif kind < 0.6:
            ino = store.create(name, parent=parent)
            store.change(WriteInline(SESSION, 1, ino, 0, bytes(chance.randrange(100)), 0))
            if chance.random() < 0.3:
                store.link(ino, b"l" + name, parent=chance.choice(directories))
        else:
            try_to_move(store, chance, directories)
        if chance.random() < 0.1:
            store.create(b"held", parent=parent)
            store.unlink(b"held", parent=parent)
    return store


def try_to_move(store: Store, chance: random.Random, directories: list[int]) -> None:
    parent, new_parent = chance.choice(directories), chance.choice(directories)
    names = sorted(store.names(parent))
    if names:
        name = chance.choice(names)
        with contextlib.suppress(StoreError):  # Into itself, or the name is taken.
            store.rename(name, b"m" + name[-8:], parent=parent, new_parent=new_parent, flags=RenameFlags.NOREPLACE)


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
