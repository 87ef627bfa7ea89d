"""Random writes, commits, truncations, allocations, holes and copies against arrays of bytes, on both engines.

A byte of a file is named by where it comes from: (slice, offset in the slice), an inline byte, or None for a zero.
The sizes are small and the bound of one transaction is 3 extents, so that truncations leave work behind, and ranges
are worked on in several steps.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from blockstore.protocol import BlockId
from metadata import protocol
from metadata.core import reclaim, schema
from metadata.core.fsck import check
from metadata.core.namespace import data, inodes, ranges
from metadata.core.schema import FILE_SIZE_MAX, INLINE_SIZE_MAX, Extent
from metadata.engine.lmdb_engine import LmdbEngine
from metadata.engine.ports import Engine
from metadata.protocol import RangeOperation
from tests.support.effort import EFFORT
from tests.support.store import SESSION, Store
from wire.errors import (
    FileTooLarge,
    InvalidArgument,
    MovedOutOfLine,
    NoSuchEntry,
    NotSupported,
    ServerOverloaded,
)

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
    allocated: set[int] = field(default_factory=set)  # Offsets; some may lie beyond the size.

    def grow(self, size: int) -> None:
        self.bytes_ += [None] * (size - len(self.bytes_))

    def zero(self, start: int, end: int) -> None:
        end = min(end, len(self.bytes_))
        self.bytes_[start:end] = [None] * (end - start)


class DataLayout(RuleBasedStateMachine):
    """Two files, and what their bytes should be."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (data, inodes, reclaim):
            self.patch.setattr(module, "KEYS_PER_STEP", STEP)
        self.patch.setattr(ranges, "EXTENTS_PER_STEP", STEP)
        self.patch.setattr(ranges, "SLICE_SIZE_MAX", 8)  # Of zeros only; real slices are what commits make of them.
        self.store = Store(self.engine())
        self.files = [File(self.store.create(b"0")), File(self.store.create(b"1"))]
        self.written = 0

    def engine(self) -> Engine | None:
        return None

    def teardown(self) -> None:
        self.store.engine.close()
        self.patch.undo()

    # --- writing -----------------------------------------------------------------------------------------------------

    @rule(pick=FILES, offset=OFFSETS, size=st.integers(0, 20), append=st.booleans())
    def write_inline(self, pick: int, offset: int, size: int, append: bool) -> None:
        """Each inline byte has a value of its own, so that the bytes tell where they come from."""
        file = self.files[pick]
        values = [(self.written + index) % 255 + 1 for index in range(size)]
        request = protocol.WriteInline(SESSION, 1, file.ino, offset, bytes(values), 0, append=append)
        offset += len(file.bytes_) if append else 0
        if self.has_extents(file):
            with pytest.raises(MovedOutOfLine):
                self.store.change(request)
            return
        self.store.change(request)
        self.written += size
        if size:
            file.grow(offset + size)
            file.bytes_[offset : offset + size] = [(0, value) for value in values]
            file.allocated.update(range(offset + size))

    def has_extents(self, file: File) -> bool:
        inode = self.store.inode(file.ino)
        return bool(inode.allocated) and not inode.flags & 1

    @rule(
        pick=FILES,
        ranges=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 15), st.booleans()), min_size=1, max_size=6),
        offset=OFFSETS,
        slack=st.integers(0, 5),
        append=st.booleans(),
    )
    def commit(self, pick: int, ranges: list[tuple[int, int, bool]], offset: int, slack: int, append: bool) -> None:
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
            SESSION, 1, file.ino, tuple(extents), tuple(sizes.items()), offset + slack, 0, inline_moved, append=append
        )
        at = len(file.bytes_) if append else 0
        try:
            self.store.change(request)
        except ServerOverloaded:
            assert self.queue(b"T")
            self.reclaim_all()
            self.store.change(request)
        if inline_moved:
            file.bytes_ = [None] * len(file.bytes_)
            file.allocated.clear()
        file.grow(at + offset + slack)
        for extent in extents:
            start, end = at + extent.offset, at + extent.offset + extent.length
            file.allocated.update(range(start, end))
            file.bytes_[start:end] = [(extent.slice_id, extent.slice_offset + index) for index in range(extent.length)]
        with pytest.raises(InvalidArgument):
            self.store.change(request)  # Its slices have been committed.

    @rule(pick=FILES, size=OFFSETS)
    def truncate(self, pick: int, size: int) -> None:
        file = self.files[pick]
        inode = self.store.truncate(file.ino, size)
        assert inode.size == size
        if size <= len(file.bytes_):
            file.allocated = {offset for offset in file.allocated if offset < size}
        del file.bytes_[size:]
        file.grow(size)

    # --- ranges ------------------------------------------------------------------------------------------------------

    def is_inline(self, file: File) -> bool:
        return bool(self.store.inode(file.ino).flags & 1)

    @rule(
        pick=FILES,
        operation=st.sampled_from(RangeOperation),
        offset=OFFSETS,
        length=st.integers(1, 70),
        keep_size=st.booleans(),
    )
    def change_range(self, pick: int, operation: RangeOperation, offset: int, length: int, keep_size: bool) -> None:
        """In as many steps as it takes; each of them changes only what it says."""
        file = self.files[pick]
        grows = operation is not RangeOperation.PUNCH and not keep_size
        at, end = offset, offset + length
        if self.is_inline(file) and operation is not RangeOperation.PUNCH and not grows and end > len(file.bytes_):
            with pytest.raises(MovedOutOfLine):
                self.step(protocol.ChangeRange(SESSION, 1, file.ino, operation, offset, length, keep_size))
            return
        while at < end:
            was_inline = self.is_inline(file)
            done = self.step(protocol.ChangeRange(SESSION, 1, file.ino, operation, at, end - at, keep_size))
            assert done > 0
            self.range_changed(file, operation, at, at + done, was_inline or self.is_inline(file))
            if grows:
                file.grow(at + done)
            self.the_bytes_are_right()
            at += done
        assert at == end

    def range_changed(self, file: File, operation: RangeOperation, at: int, end: int, is_inline: bool) -> None:
        """Inline bytes are allocated from the beginning, without holes."""
        if operation is not RangeOperation.PUNCH:
            file.allocated.update(range(0 if is_inline else at, end))
        elif not is_inline or end >= len(file.allocated):
            file.allocated.difference_update(range(at, end))
        if operation is not RangeOperation.ALLOCATE:
            file.zero(at, end)

    def step(self, request: protocol.ChangeRange | protocol.CopyRange) -> int:
        """One step; an older truncation may have to be carried out before it."""
        try:
            reply = self.store.change(request)
        except ServerOverloaded:
            assert self.queue(b"T")
            self.reclaim_all()
            reply = self.store.change(request)
        assert isinstance(reply, protocol.RangeDone)
        assert 0 <= reply.done <= request.length
        return reply.done

    @rule(pick=FILES, other=FILES, offset=OFFSETS, target_offset=OFFSETS, length=st.integers(1, 70))
    def copy_range(self, pick: int, other: int, offset: int, target_offset: int, length: int) -> None:
        source, target = self.files[pick], self.files[other]
        while length:
            request = protocol.CopyRange(SESSION, 1, source.ino, offset, target.ino, target_offset, length)
            refusal = self.refusal_of_copy(source, target, request)
            if refusal is not None:
                with pytest.raises(refusal):
                    self.store.change(request)
                return
            done = self.step(request)
            assert bool(done) == (offset < len(source.bytes_))
            if not done:
                return
            self.copied(target, target_offset, source.bytes_[offset : offset + done], self.is_inline(source))
            self.the_bytes_are_right()
            offset, target_offset, length = offset + done, target_offset + done, length - done

    def refusal_of_copy(
        self, source: File, target: File, request: protocol.CopyRange
    ) -> type[InvalidArgument | MovedOutOfLine | NotSupported] | None:
        if source is target and abs(request.offset - request.target_offset) < request.length:
            return InvalidArgument
        if request.offset >= len(source.bytes_):
            return None
        if self.is_inline(source):
            return NotSupported if self.has_extents(target) else None
        return MovedOutOfLine if self.is_inline(target) else None

    @staticmethod
    def copied(target: File, start: int, bytes_: list[Byte], is_inline: bool) -> None:
        end = start + len(bytes_)
        target.grow(end)
        target.bytes_[start:end] = bytes_
        target.allocated.difference_update(range(start, end))
        target.allocated.update(start + index for index, byte in enumerate(bytes_) if byte)
        if is_inline:
            target.allocated.update(range(end))

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
            assert self.read(file.ino, 0, 1 << 12) == file.bytes_
            with self.store.engine.read() as txn:
                if txn.get(schema.truncation_key(file.ino)) is None:  # Dead extents still count.
                    assert inodes.load(txn, file.ino).allocated == len(file.allocated)

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


# --- ranges -----------------------------------------------------------------------------------------------------------


def written(store: Store, name: bytes, *lengths: int) -> int:
    """A file of extents with holes of one byte between them, each on a slice of its own."""
    ino = store.create(name)
    first = store.change(protocol.AllocateSlices(SESSION, 1, len(lengths))).first
    extents, at = [], 0
    for index, length in enumerate(lengths):
        extents.append(Extent(at, length, first + index, 0))
        at += length + 1
    commit(store, ino, extents, [(extent.slice_id, extent.length) for extent in extents])
    return ino


def extents_of(store: Store, ino: int) -> list[Extent]:
    with store.engine.read() as txn:
        return [schema.decode_extent(*pair) for pair in txn.scan(*schema.extent_range(ino), 1 << 20)]


def is_sound(store: Store) -> bool:
    with store.engine.read() as txn:
        return check(txn) == []


def test_extents_cut_off_and_not_yet_deleted_are_not_copied(store: Store) -> None:
    source = written(store, b"source", *[10] * 6)
    target = written(store, b"target", 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "KEYS_PER_STEP", 2)
        store.truncate(source, 11)
    store.truncate(source, 60)
    assert len(extents_of(store, source)) == 4
    done = store.change(protocol.CopyRange(SESSION, 1, source, 0, target, 0, 1000)).done
    assert done == 60
    assert [(extent.offset, extent.length) for extent in extents_of(store, target)] == [(0, 10), (60, 40)]
    assert is_sound(store)


@pytest.mark.parametrize("operation", RangeOperation)
def test_a_step_of_a_range_is_bounded(store: Store, operation: RangeOperation) -> None:
    """Long lists take several requests, whether they are in the source or in what is replaced."""
    fragmented = written(store, b"fragmented", *[1] * 3000)
    whole = written(store, b"whole", 6000)
    for request in (
        protocol.CopyRange(SESSION, 1, fragmented, 0, whole, 0, 6000),
        protocol.CopyRange(SESSION, 1, whole, 0, fragmented, 0, 6000),
        protocol.ChangeRange(SESSION, 1, fragmented, operation, 0, 6000),
    ):
        copy = replace(request)
        assert 0 < store.change(copy).done <= 2 * ranges.EXTENTS_PER_STEP
        assert is_sound(store)


def test_a_copied_slice_lives_as_long_as_one_of_its_files(store: Store) -> None:
    source = written(store, b"source", 10)
    target = store.create(b"target")
    assert store.change(protocol.CopyRange(SESSION, 1, source, 0, target, 0, 10)).inode.size == 10
    slice_id = extents_of(store, source)[0].slice_id
    store.unlink(b"source", closed_ino=source)
    assert [key for key, _ in store.pairs() if key == schema.queued_slice_key(slice_id)] == []
    assert extents_of(store, target) == [Extent(0, 10, slice_id, 0)]
    with pytest.raises(InvalidArgument):  # Nobody may commit it again meanwhile.
        commit(store, target, [Extent(0, 10, slice_id, 0)], [(slice_id, 10)])
    store.unlink(b"target", closed_ino=target)
    assert [key for key, _ in store.pairs() if key == schema.queued_slice_key(slice_id)] != []
    assert is_sound(store)


def test_files_with_unlike_numbers_of_copies_share_no_blocks(store: Store) -> None:
    source, target = written(store, b"source", 10), store.create(b"target")
    with store.engine.write() as txn:
        txn.put(schema.inode_key(target), schema.encode_record(replace(inodes.load(txn, target), replicas=3)))
        txn.commit()
    with pytest.raises(NotSupported):
        store.change(protocol.CopyRange(SESSION, 1, source, 0, target, 0, 10))


def test_ranges_beyond_the_largest_file_are_refused(store: Store) -> None:
    source, target = written(store, b"source", 10), store.create(b"target")
    with pytest.raises(FileTooLarge):
        store.change(protocol.ChangeRange(SESSION, 1, target, RangeOperation.ALLOCATE, FILE_SIZE_MAX, 1))
    with pytest.raises(FileTooLarge):
        store.change(protocol.CopyRange(SESSION, 1, source, 0, target, FILE_SIZE_MAX - 5, 10))


@pytest.mark.parametrize("keep", [False, True])
def test_a_changed_range_takes_suid_and_sgid_as_a_write_does(store: Store, keep: bool) -> None:
    source, target = written(store, b"source", 10), store.create(b"target")
    for request in (
        protocol.ChangeRange(SESSION, 1, target, RangeOperation.ALLOCATE, 0, 5, keep_privileges=keep),
        protocol.CopyRange(SESSION, 1, source, 0, target, 0, 10, keep_privileges=keep),
    ):
        store.unlink(b"target", closed_ino=target)
        target = store.create(b"target")
        store.change(protocol.SetAttr(SESSION, 1, target, protocol.SetAttrMask.MODE, mode=0o6755))
        before = store.inode(target)
        inode = store.change(
            replace(request, **{"ino" if "operation" in request.__struct_fields__ else "target": target})
        ).inode
        assert inode.mode & 0o7777 == (0o6755 if keep else 0o755)
        assert min(inode.mtime_ns, inode.ctime_ns) > before.ctime_ns
        assert (inode.version, inode.data_version) == (before.version + 1, before.data_version + 1)


def test_zeros_that_follow_each_other_are_one_extent(store: Store) -> None:
    """A database that extends its file a little at a time leaves no trail."""
    ino = store.create(b"f")
    for at in range(0, 1 << 20, 8192):
        store.change(protocol.ChangeRange(SESSION, 1, ino, RangeOperation.ALLOCATE, (1 << 20) + at, 8192))
    assert extents_of(store, ino) == [Extent(1 << 20, 1 << 20, 0, 0)]
    assert store.inode(ino).allocated == 1 << 20
    assert store.ask(protocol.GetLayout(SESSION, ino)).extents == ()


def test_what_is_missing_is_counted_for_the_check_of_free_space(store: Store) -> None:
    ino = written(store, b"f", 10, 10)
    with store.engine.read() as txn:
        assert ranges.bytes_missing(txn, ino=ino, offset=0, length=100) == 80
        assert ranges.bytes_missing(txn, ino=ino, offset=5, length=10) == 1
    small = store.create(b"small")
    store.change(protocol.WriteInline(SESSION, 1, small, 0, b"12345", 0))
    with store.engine.read() as txn:
        assert ranges.bytes_missing(txn, ino=small, offset=2, length=100) == 97
