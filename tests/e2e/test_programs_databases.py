"""sqlite and LMDB keep their databases on the mount: locks, journals, shared memory maps."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from tests.e2e.places import Place
from tests.support.programs import need, run

pytestmark = pytest.mark.mounted

ROW_COUNT = 300
WRITER_COUNT = 3

SQLITE_WRITER = """
import sqlite3, sys
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
connection = sqlite3.connect(path, timeout=60, isolation_level=None)
for number in range(count):
    connection.execute("begin immediate")
    connection.execute("insert into rows values (?, ?, ?)", (name, number, name.encode() * 50 * (number % 40)))
    connection.execute("update total set n = n + 1")
    connection.execute("commit")
connection.close()
"""


def start_writer(path: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SQLITE_WRITER, str(path), name, str(ROW_COUNT // WRITER_COUNT)]
    return subprocess.Popen(command)


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_sqlite_with_several_writers_loses_nothing(place: Place, journal: str) -> None:
    path = place.directory / "rows.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        connection.execute("create table rows (writer text, number integer, data blob, primary key (writer, number))")
        connection.execute("create table total (n integer)")
        connection.execute("insert into total values (0)")
        connection.commit()
    writers = [start_writer(path, f"writer{number}") for number in range(WRITER_COUNT)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * WRITER_COUNT

    def check() -> None:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert connection.execute("select n from total").fetchone() == (ROW_COUNT,)
            assert connection.execute("select count(*) from rows").fetchone() == (ROW_COUNT,)
        assert run(need("sqlite3"), path, "pragma integrity_check; select count(*) from rows;").split() == [
            "ok",
            str(ROW_COUNT),
        ]

    check()
    place.remount()
    check()


def test_sqlite_rolls_back_what_a_killed_writer_left(place: Place) -> None:
    """A hot journal is on the mount, its owner is dead: the next reader finds the last commit."""
    path = place.directory / "rows.sqlite"
    script = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("pragma cache_size=5")
connection.execute("create table rows (data blob)")
connection.execute("insert into rows values (zeroblob(100))")
connection.execute("begin")
for _ in range(200):
    connection.execute("insert into rows values (zeroblob(5000))")
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(sys.executable, "-c", script, path, status=[-9])
    assert (place.directory / "rows.sqlite-journal").stat().st_size > 0
    place.remount()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert connection.execute("select count(*) from rows").fetchone() == (1,)


def test_sqlite_on_the_command_line_dumps_and_restores(place: Place) -> None:
    script = "create table t(a integer primary key, b text);" + "".join(
        f"insert into t(b) values ('{'x' * (n % 300)}');" for n in range(1000)
    )
    for name, journal in (("one", "delete"), ("two", "wal")):
        run(need("sqlite3"), place.directory / name, stdin=f"pragma journal_mode={journal};begin;{script}commit;")
    assert run("sqlite3", place.directory / "one", ".dump") == run("sqlite3", place.directory / "two", ".dump")
    run("sqlite3", place.directory / "one", f".backup {place.directory / 'three'}")
    assert run("sqlite3", place.directory / "three", "pragma integrity_check").strip() == "ok"


LMDB_READER = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True, map_size=64 << 20) as environment, environment.begin() as txn:
    print(txn.stat()["entries"], sum(len(value) for _, value in txn.cursor()))
"""


@pytest.mark.parametrize("writemap", [False, True])
def test_an_lmdb_environment_on_the_mount(place: Place, writemap: bool) -> None:
    """Written by pwrite and through a shared map, read by another process while open, and after a remount."""
    path = str(place.directory / "environment")
    expected = 0
    with lmdb.open(path, map_size=64 << 20, writemap=writemap) as environment:
        for number in range(60):
            with environment.begin(write=True) as txn:
                for key in range(20):
                    value = b"%d" % number * (key * 13)
                    expected += len(value)
                    txn.put(b"%d-%d" % (number, key), value)
        assert run(sys.executable, "-c", LMDB_READER, path).split() == ["1200", str(expected)]
    place.remount()
    assert run(sys.executable, "-c", LMDB_READER, path).split() == ["1200", str(expected)]
    with lmdb.open(path, map_size=64 << 20, writemap=writemap) as environment:
        main = environment.open_db()
        with environment.begin(write=True) as txn:
            txn.drop(main, delete=False)
        with environment.begin() as txn:
            assert txn.stat()["entries"] == 0
