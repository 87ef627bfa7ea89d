"""Random writes, commits and truncations of files against arrays of bytes, on both engines.

A byte of a file is named by where it comes from: (slice, offset in the slice), an inline byte, or None for a zero.
The sizes are small and the bound of one transaction is 3 extents, so that truncations leave work behind.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockstore.protocol import BlockId
from metadata import protocol
from metadata.core import reclaim
from metadata.core.fsck import check
from metadata.core.namespace import data, inodes
from metadata.core.schema import FILE_SIZE_MAX, INLINE_SIZE_MAX, Extent
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import Engine
from tests.support.effort import EFFORT
from tests.support.store import SESSION, Store
from wire.errors import FileTooLarge, InvalidArgument, MovedOutOfLine, NoSuchEntry, ServerOverloaded

STEP = 3
SPAN = 60  # Bytes of a file that the model plays with.
Byte = tuple[int, int] | None
FILES = st.integers(0, 1)
OFFSETS = st.integers(0, SPAN)


@dataclass
class File:
    """What a file should be."""

    ino: int
    bytes_: list[Byte] = field(default_factory=list)

    def grow(self, size: int) -> None:
        self.bytes_ += [None] * (size - len(self.bytes_))


class DataLayout(RuleBasedStateMachine):
    """Two files, and what their bytes should be."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (data, inodes, reclaim):
            self.patch.setattr(module, "KEYS_PER_STEP", STEP)
        self.store = Store(self.engine())
        self.files = [File(self.store.create(b"0")), File(self.store.create(b"1"))]
        self.written = 0

    def engine(self) -> Engine | None:
        return None

    def teardown(self) -> None:
        self.store.engine.close()
        self.patch.undo()

    # --- writing -----------------------------------------------------------------------------------------------------

    @rule(pick=FILES, offset=OFFSETS, size=st.integers(0, 20))
    def write_inline(self, pick: int, offset: int, size: int) -> None:
        """Each inline byte has a value of its own, so that the bytes tell where they come from."""
        file = self.files[pick]
        values = [(self.written + index) % 255 + 1 for index in range(size)]
        request = protocol.WriteInline(SESSION, 1, file.ino, offset, bytes(values), 0)
        if self.has_extents(file):
            with pytest.raises(MovedOutOfLine):
                self.store.change(request)
            return
        self.store.change(request)
        self.written += size
        if size:
            file.grow(offset + size)
            file.bytes_[offset : offset + size] = [(0, value) for value in values]

    def has_extents(self, file: File) -> bool:
        inode = self.store.inode(file.ino)
        return bool(inode.allocated) and not inode.flags & 1

    @rule(
        pick=FILES,
        ranges=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 15), st.booleans()), min_size=1, max_size=6),
        offset=OFFSETS,
        slack=st.integers(0, 5),
    )
    def commit(self, pick: int, ranges: list[tuple[int, int, bool]], offset: int, slack: int) -> None:
        """Ranges are (gap before, length, begins a new slice)."""
        file = self.files[pick]
        first = self.store.change(protocol.AllocateSlices(SESSION, 1, len(ranges))).first
        extents: list[Extent] = []
        sizes: dict[int, int] = {}
        slice_id = first
        for gap, length, new_slice in ranges:
            offset += gap
            slice_id += 1 if new_slice and sizes else 0
            extents.append(Extent(offset, length, slice_id, sizes.get(slice_id, 0)))
            sizes[slice_id] = sizes.get(slice_id, 0) + length
            offset += length
        inline_moved = bool(self.store.inode(file.ino).flags & 1)
        request = protocol.CommitExtents(
            SESSION, 1, file.ino, tuple(extents), tuple(sizes.items()), offset + slack, 0, inline_moved
        )
        try:
            self.store.change(request)
        except ServerOverloaded:
            assert self.queue(b"T")
            self.reclaim_all()
            self.store.change(request)
        if inline_moved:
            file.bytes_ = [None] * len(file.bytes_)
        file.grow(offset + slack)
        for extent in extents:
            file.bytes_[extent.offset : extent.offset + extent.length] = [
                (extent.slice_id, extent.slice_offset + index) for index in range(extent.length)
            ]
        with pytest.raises(InvalidArgument):
            self.store.change(request)  # Its slices have been committed.

    @rule(pick=FILES, size=OFFSETS)
    def truncate(self, pick: int, size: int) -> None:
        file = self.files[pick]
        inode = self.store.truncate(file.ino, size)
        assert inode.size == size
        del file.bytes_[size:]
        file.grow(size)

    @rule(pick=FILES, held=st.booleans())
    def remove_and_make_again(self, pick: int, held: bool) -> None:
        file = self.files[pick]
        name = b"%d" % pick
        self.store.unlink(name, closed_ino=0 if held else file.ino)
        if held:
            self.store.truncate(file.ino, 5)
            self.store.change(protocol.ReleaseInode(SESSION, 1, (file.ino,)))
        with pytest.raises(NoSuchEntry):
            self.store.inode(file.ino)
        self.files[pick] = File(self.store.create(name))

    # --- the deletion queue ------------------------------------------------------------------------------------------

    def queue(self, kind: bytes) -> list[bytes]:
        return [key for key, _ in self.store.pairs() if key.startswith(b"q" + kind)]

    @precondition(lambda self: self.queue(b""))
    @rule()
    def reclaim_one_step(self) -> None:
        with self.store.engine.write() as txn:
            reclaim.next_step(txn, now_ns=self.store.now_ns)
            txn.commit()

    @rule()
    def reclaim_all(self) -> None:
        more = True
        while more:
            with self.store.engine.write() as txn:
                more = reclaim.next_step(txn, now_ns=self.store.now_ns)
                txn.commit()
        dead = set()
        with self.store.engine.read() as reading:
            for one in reclaim.slices_to_delete(reading, count=1 << 20):
                assert one.size > 0
                dead.add(one.slice_id)
        assert not dead & {byte[0] for file in self.files for byte in file.bytes_ if byte}
        with self.store.engine.write() as txn:
            reclaim.slices_deleted(txn, dead)
            txn.commit()
        assert self.queue(b"") == []

    # --- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def every_invariant_holds(self) -> None:
        with self.store.engine.read() as txn:
            assert [str(violation) for violation in check(txn)] == []

    @invariant()
    def the_bytes_are_right(self) -> None:
        for file in self.files:
            assert self.read(file.ino, 0, SPAN * 4) == file.bytes_

    @rule(pick=FILES, offset=OFFSETS, length=st.integers(0, 40))
    def read_a_part(self, pick: int, offset: int, length: int) -> None:
        file = self.files[pick]
        assert self.read(file.ino, offset, length) == file.bytes_[offset : offset + length]

    def read(self, ino: int, offset: int, length: int) -> list[Byte]:
        """The bytes of a range as a client would find them, asking for few extents at a time."""
        with self.store.engine.read() as txn:
            inode = inodes.load(txn, ino)
            found: list[Byte] = [None] * max(min(inode.size, offset + length) - offset, 0)
            at = offset
            while at < offset + length:
                reply = data.layout(txn, ino, inode, offset=at, length=offset + length - at, count=2)
                for index, value in enumerate(reply.inline or b""):
                    self.place(found, index - offset, (0, value) if value else None)
                for extent in reply.extents:
                    assert extent.offset < offset + length
                    assert extent.offset + extent.length > at
                    for index in range(extent.length):
                        self.place(
                            found, extent.offset + index - offset, (extent.slice_id, extent.slice_offset + index)
                        )
                assert reply.complete_until > at
                at = reply.complete_until
            return found

    @staticmethod
    def place(found: list[Byte], index: int, value: Byte) -> None:
        if 0 <= index < len(found):
            found[index] = value


class DataLayoutOnLmdb(DataLayout):
    """The same on LMDB."""

    def engine(self) -> Engine | None:
        self.directory = tempfile.TemporaryDirectory(prefix="metacore-", dir="/dev/shm")
        return LmdbEngine(Path(self.directory.name) / "engine", map_size=1 << 22, headroom_bytes=1 << 20)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestDataLayout = DataLayout.TestCase
TestDataLayout.settings = settings(max_examples=100 * EFFORT, stateful_step_count=40, deadline=None)
TestDataLayoutOnLmdb = DataLayoutOnLmdb.TestCase
TestDataLayoutOnLmdb.settings = settings(max_examples=15 * EFFORT, stateful_step_count=30, deadline=None)


# --- refusals and limits ---------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Store:
    return Store()


def commit(
    store: Store, ino: int, extents: list[Extent], sizes: list[tuple[int, int]], *, size_min: int = 0
) -> protocol.InodeReply:
    return store.change(
        protocol.CommitExtents(SESSION, 1, ino, tuple(extents), tuple(sizes), size_min, 0, inline_moved=False)
    )


def test_extents_that_do_not_fit_their_slices_are_refused(store: Store) -> None:
    ino = store.create(b"f")
    first = store.change(protocol.AllocateSlices(SESSION, 1, 2)).first
    one = Extent(0, 10, first, 0)
    for extents, sizes in (
        ([one], [(first, 9)]),
        ([one], []),
        ([one], [(first, 10), (first + 1, 10)]),
        ([one], [(first, 10), (first, 11)]),
        ([one, Extent(9, 1, first, 9)], [(first, 10)]),
        ([Extent(20, 1, first, 9), one], [(first, 10)]),
        ([Extent(0, 10, first + 2, 0)], [(first + 2, 10)]),
        ([Extent(0, 10, 0, 0)], [(0, 10)]),
    ):
        with pytest.raises(InvalidArgument):
            commit(store, ino, extents, sizes)
    with pytest.raises(FileTooLarge):
        commit(store, ino, [Extent(FILE_SIZE_MAX - 9, 10, first, 0)], [(first, 10)])
    with pytest.raises(FileTooLarge):
        commit(store, ino, [one], [(first, 10)], size_min=FILE_SIZE_MAX + 1)
    assert commit(store, ino, [one], [(first, 10)]).inode.size == 10


def test_an_inline_file_moves_out_only_when_the_caller_has_moved_its_bytes(store: Store) -> None:
    ino = store.create(b"f")
    store.change(protocol.WriteInline(SESSION, 1, ino, 0, b"abc", 0))
    first = store.change(protocol.AllocateSlices(SESSION, 1, 1)).first
    with pytest.raises(MovedOutOfLine):
        commit(store, ino, [Extent(0, 10, first, 0)], [(first, 10)])
    with pytest.raises(MovedOutOfLine):
        store.change(protocol.WriteInline(SESSION, 1, ino, INLINE_SIZE_MAX, b"x", 0))
    assert store.ask(protocol.GetLayout(SESSION, ino)).inline == b"abc"


def test_degraded_blocks_are_queued_for_repair_with_the_commit(store: Store) -> None:
    ino = store.create(b"f")
    first = store.change(protocol.AllocateSlices(SESSION, 1, 1)).first
    request = protocol.CommitExtents(
        SESSION,
        1,
        ino,
        (Extent(0, 10, first, 0),),
        ((first, 10),),
        10,
        0,
        degraded=(protocol.DegradedBlock(BlockId(first, 0), 1),),
    )
    store.change(request)
    bad = [key for key, _ in store.pairs() if key.startswith(b"b")]
    assert len(bad) == 1
    store.unlink(b"f", closed_ino=ino)
    with store.engine.write() as txn:
        reclaim.slices_deleted(txn, [first])
        assert check(txn) == []
        txn.commit()
    assert [key for key, _ in store.pairs() if key.startswith((b"b", b"q"))] == []


def test_the_end_of_a_session_takes_what_it_held(store: Store) -> None:
    for index in range(5):
        store.create(b"%d" % index)
        assert store.unlink(b"%d" % index).held
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reclaim, "INODES_PER_STEP", 2)
        steps = 1
        with store.engine.write() as txn:
            while not reclaim.end_session(txn, SESSION, now_ns=store.now_ns):
                steps += 1
            assert check(txn) == []
            assert reclaim.held_count(txn, SESSION) == 0
            txn.commit()
    assert steps == 3
