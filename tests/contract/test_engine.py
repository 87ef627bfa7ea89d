"""What every engine promises (metadata/engine/ports.py), run against each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadata.core.schema import VALUE_SIZE_MAX
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import KEY_SIZE_MAX, Engine, RunAgain, WriteTxn

LAST = b"\xff" * 8


@pytest.fixture(params=["memory", "lmdb"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    made: Engine = MemoryEngine() if request.param == "memory" else LmdbEngine(tmp_path / "engine")
    yield made
    made.close()


def pairs(engine: Engine) -> list[tuple[bytes, bytes]]:
    with engine.read() as txn:
        return txn.scan(b"\0", LAST, 1 << 30)


def fill(engine: Engine, *keys: bytes) -> None:
    with engine.write() as txn:
        for key in keys:
            txn.put(key, b"value of " + key)
        txn.commit()


def test_what_was_committed_is_read_and_what_was_aborted_is_not(engine: Engine) -> None:
    fill(engine, b"kept")
    txn = engine.write()
    txn.put(b"lost", b"1")
    txn.delete(b"kept")
    txn.abort()
    with engine.write() as txn:
        txn.put(b"lost too", b"1")
    assert pairs(engine) == [(b"kept", b"value of kept")]


def test_delete_tells_whether_the_key_was_there(engine: Engine) -> None:
    fill(engine, b"a")
    with engine.write() as txn:
        assert txn.delete(b"a")
        assert not txn.delete(b"a")
        assert not txn.delete(b"b")
        txn.commit()
    assert pairs(engine) == []


def test_an_empty_value_is_there(engine: Engine) -> None:
    with engine.write() as txn:
        txn.put(b"a", b"")
        assert txn.get(b"a") == b""
        mark = txn.savepoint()
        assert txn.delete(b"a")
        txn.rollback_to(mark)
        assert txn.get(b"a") == b""
        txn.commit()
    assert pairs(engine) == [(b"a", b"")]


def test_the_largest_key_and_value_fit(engine: Engine) -> None:
    with engine.write() as txn:
        txn.put(b"k" * KEY_SIZE_MAX, b"v" * VALUE_SIZE_MAX)
        txn.commit()
    assert pairs(engine) == [(b"k" * KEY_SIZE_MAX, b"v" * VALUE_SIZE_MAX)]


def test_a_value_above_the_limit_is_a_bug(engine: Engine) -> None:
    with engine.write() as txn, pytest.raises(AssertionError):
        txn.put(b"k", b"v" * (VALUE_SIZE_MAX + 1))


def test_scan_goes_forward_from_start_inclusive_to_end_exclusive(engine: Engine) -> None:
    fill(engine, b"a", b"b", b"b\0", b"b\xff", b"c", b"d")
    with engine.read() as txn:
        assert [key for key, _ in txn.scan(b"b", b"c", 100)] == [b"b", b"b\0", b"b\xff"]
        assert [key for key, _ in txn.scan(b"b", b"c", 2)] == [b"b", b"b\0"]
        assert txn.scan(b"b", b"c", 0) == []
        assert txn.scan(b"c", b"b", 9) == []
        assert [key for key, _ in txn.scan(b"aa", LAST, 1)] == [b"b"]


def test_a_snapshot_does_not_change(engine: Engine) -> None:
    fill(engine, b"a")
    with engine.read() as before:
        fill(engine, b"b")
        fill(engine, b"c")
        assert before.scan(b"\0", LAST, 9) == [(b"a", b"value of a")]
        assert before.get(b"b") is None
        with engine.read() as after:
            assert [key for key, _ in after.scan(b"\0", LAST, 9)] == [b"a", b"b", b"c"]
        fill(engine, b"d")
        assert before.get(b"d") is None


def test_uncommitted_writes_are_not_read_by_others(engine: Engine) -> None:
    with engine.write() as txn:
        txn.put(b"a", b"1")
        assert pairs(engine) == []
        txn.commit()
    assert pairs(engine) == [(b"a", b"1")]


def test_a_scan_stands_while_its_keys_are_deleted(engine: Engine) -> None:
    fill(engine, b"a", b"b", b"c")
    with engine.write() as txn:
        for key, _ in txn.scan(b"a", b"z", 9):
            assert txn.delete(key)
        txn.commit()
    assert pairs(engine) == []


def test_a_second_write_transaction_is_a_bug(engine: Engine) -> None:
    with engine.write(), pytest.raises(AssertionError):
        engine.write()


def test_a_transaction_is_not_committed_under_an_open_savepoint(engine: Engine) -> None:
    with engine.write() as txn:
        txn.savepoint()
        with pytest.raises(AssertionError):
            txn.commit()


def test_reads_go_on_in_other_threads_during_a_write(engine: Engine) -> None:
    fill(engine, b"a")
    seen: list[list[tuple[bytes, bytes]]] = []
    with engine.write() as txn:
        txn.put(b"b", b"2")
        reader = threading.Thread(target=lambda: seen.append(pairs(engine)))
        reader.start()
        reader.join(10)
        txn.commit()
    assert seen == [[(b"a", b"value of a")]]


def test_statistics_count(engine: Engine) -> None:
    fill(engine, b"a", b"b")
    engine.write().abort()
    pairs(engine)
    told = engine.statistics()
    assert (told.key_count, told.commit_count, told.abort_count, told.read_count) == (2, 1, 1, 1)
    assert told.used_bytes > 0


# --- random transactions against a dictionary ------------------------------------------------------------------------

KEYS = st.sampled_from([bytes([letter]) * size for letter in b"abc" for size in (1, 2)])
Step = tuple[str, bytes, bytes]
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(
        st.sampled_from(["put", "often", "often", "delete", "mark", "undo", "keep", "look", "commit", "abort"]),
        KEYS,
        st.binary(max_size=2),
    ),
    max_size=40,
)


class Model:
    """What an engine's write transaction is: a stack of dictionaries."""

    def __init__(self) -> None:
        self.committed: dict[bytes, bytes] = {}
        self.now: dict[bytes, bytes] = {}
        self.marks: list[tuple[int, dict[bytes, bytes]]] = []

    def run(self, engine: Engine, txn: WriteTxn, step: Step) -> WriteTxn:
        kind, key, value = step
        if kind == "put":
            txn.put(key, value)
            self.now[key] = value
        elif kind == "often":
            txn.put_often(key, value)
            self.now[key] = value
        elif kind == "delete":
            assert txn.delete(key) == (self.now.pop(key, None) is not None)
        elif kind == "mark":
            self.marks.append((txn.savepoint(), dict(self.now)))
        elif kind == "undo" and self.marks:
            mark, self.now = self.marks.pop()
            txn.rollback_to(mark)
        elif kind == "keep" and self.marks:
            txn.release(self.marks.pop()[0])
        elif kind in ("commit", "abort"):
            return self.end(engine, txn, kind)
        return txn

    def end(self, engine: Engine, txn: WriteTxn, kind: str) -> WriteTxn:
        while self.marks:
            txn.release(self.marks.pop()[0])
        if kind == "commit":
            txn.commit()
            self.committed = dict(self.now)
        else:
            txn.abort()
            self.now = dict(self.committed)
        assert pairs(engine) == sorted(self.committed.items())
        return engine.write()


def agrees(engine: Engine, steps: list[Step], start: bytes, limit: int) -> None:
    with engine.write() as old:
        for key, _ in old.scan(b"\0", LAST, 1 << 30):
            old.delete(key)
        old.commit()
    model = Model()
    txn = engine.write()
    for step in steps:
        txn = model.run(engine, txn, step)
        if step[0] == "look":  # Not always: a scan may write what was put often.
            wanted = sorted((key, value) for key, value in model.now.items() if start <= key < b"cc")
            assert txn.scan(start, b"cc", limit) == wanted[:limit]
        assert txn.get(start) == model.now.get(start)
    model.end(engine, txn, "commit").abort()


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_any_sequence_of_writes_and_savepoints_agrees_with_a_dictionary(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine: Engine = MemoryEngine() if kind == "memory" else LmdbEngine(tmp_path_factory.mktemp("engine") / "e")

    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(STEPS, KEYS, st.integers(1, 4))
    def run(steps: list[Step], start: bytes, limit: int) -> None:
        agrees(engine, steps, start, limit)

    run()
    engine.close()


# --- LMDB only -------------------------------------------------------------------------------------------------------


def test_lmdb_keeps_what_was_committed_when_it_is_opened_again(tmp_path: Path) -> None:
    engine = LmdbEngine(tmp_path / "engine")
    fill(engine, b"a", b"b")
    engine.close()
    engine.close()
    again = LmdbEngine(tmp_path / "engine")
    assert [key for key, _ in pairs(again)] == [b"a", b"b"]
    again.close()


def test_the_lmdb_map_grows_before_it_is_full(tmp_path: Path) -> None:
    engine = LmdbEngine(tmp_path / "engine", map_size=1 << 20, headroom_bytes=1 << 19)
    for turn in range(64):
        with engine.write() as txn:
            for index in range(8):
                txn.put(b"%d/%d" % (turn, index), b"x" * 16_000)
            txn.commit()
    told = engine.statistics()
    assert (told.key_count, told.abort_count) == (64 * 8, 0)
    assert told.growth_count >= 3
    engine.close()


def test_a_batch_that_fills_the_lmdb_map_may_run_again_and_then_succeeds(tmp_path: Path) -> None:
    engine = LmdbEngine(tmp_path / "engine", map_size=1 << 18, headroom_bytes=0)
    turns = 0
    while turns < 20:
        turns += 1
        txn = engine.write()
        try:
            for index in range(100):
                txn.put(b"%d" % index, b"x" * 16_000)
            txn.commit()
            break
        except RunAgain:
            assert pairs(engine) == []
    assert 1 < turns < 20
    assert len(pairs(engine)) == 100
    engine.close()


def test_values_that_were_put_often_may_fill_the_lmdb_map_at_the_commit(tmp_path: Path) -> None:
    engine = LmdbEngine(tmp_path / "engine", map_size=1 << 18, headroom_bytes=0)
    turns = 0
    while turns < 20:
        turns += 1
        with engine.write() as txn:
            for _ in range(3):
                for index in range(100):
                    txn.put_often(b"%d" % index, b"x" * 16_000)
            try:
                txn.commit()
                break
            except RunAgain:
                assert pairs(engine) == []
    assert 1 < turns < 20
    assert len(pairs(engine)) == 100
    engine.close()


def test_the_lmdb_map_grows_only_while_no_snapshot_is_open(tmp_path: Path) -> None:
    """A reader in another thread holds its snapshot; the writer must wait for it instead of moving the map."""
    engine = LmdbEngine(tmp_path / "engine", map_size=1 << 20, headroom_bytes=1 << 30)
    began, may_end, wrote = threading.Event(), threading.Event(), threading.Event()

    def read() -> None:
        with engine.read() as txn:
            began.set()
            assert may_end.wait(10)
            assert txn.get(b"a") is None

    def write() -> None:
        fill(engine, b"a")
        wrote.set()

    reader, writer = threading.Thread(target=read), threading.Thread(target=write)
    reader.start()
    assert began.wait(10)
    writer.start()
    assert not wrote.wait(0.1)
    may_end.set()
    reader.join(10)
    writer.join(10)
    assert wrote.is_set()
    assert [key for key, _ in pairs(engine)] == [b"a"]
    engine.close()
