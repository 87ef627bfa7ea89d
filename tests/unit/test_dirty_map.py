"""DirtyMap against an array with one entry per byte, and its three invariants after every step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fsd.core.dirty_map import DirtyMap
from fsd.core.upload_queue import SliceAllocator, Upload
from tests.support.small_world import BLOCK, small_world

SIZE = 4 * BLOCK
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SIZE), st.one_of(st.integers(1, 50), st.integers(1, 2 * BLOCK))),
        st.tuples(st.just("truncate"), st.integers(0, SIZE), st.just(0)),
        st.tuples(st.just("seal"), st.just(0), st.just(0)),
        st.tuples(st.just("sent"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("take_back"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("drop"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


class Twin:
    """A DirtyMap, and the bytes it should have."""

    def __init__(self) -> None:
        self.dirty, self.slices = DirtyMap(), SliceAllocator()
        self.model: dict[int, int] = {}
        self.sending: list[Upload] = []
        self.blocks: dict[Upload, bytes] = {}

    def step(self, kind: str, a: int, b: int) -> None:
        getattr(self, kind)(a, b)
        self.dirty.check()
        assert self.dirty.end == max(self.model, default=-1) + 1

    def write(self, offset: int, size: int) -> None:
        data = bytes((size + 7 * n) % 251 for n in range(size))
        self.dirty.write(offset, data)
        self.model.update(zip(range(offset, offset + size), data, strict=True))

    def truncate(self, size: int, _: int) -> None:
        self.dirty.truncate(size)
        self.model = {at: value for at, value in self.model.items() if at < size}

    def seal(self, *_: int) -> None:
        for upload in self.dirty.seal(None, self.slices.take):
            self.sending.append(upload)
            self.blocks[upload] = b"".join(upload.payload)
            assert upload.size == len(self.blocks[upload]) <= BLOCK
            assert len(upload.parts) <= 8
        assert self.dirty.dirty_bytes == 0

    def drop(self, *_: int) -> None:
        pieces = self.dirty.freeze_small(BLOCK)
        if pieces is not None:
            self.dirty.drop(set(pieces))
            self.model.clear()

    def sent(self, which: int, _: int) -> None:
        if self.sending:
            self.dirty.sent(self.sending.pop(which % len(self.sending)))

    def take_back(self, which: int, _: int) -> None:
        if self.sending:
            self.dirty.take_back(self.sending.pop(which % len(self.sending)))

    def found(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for piece in self.dirty.lookup(0, SIZE * 2):
            size = piece.end - piece.start
            if piece.chunk is not None:
                data = bytes(piece.view(piece.start, piece.end))
            else:
                assert piece.upload is not None
                data = self.blocks[piece.upload][piece.upload_offset : piece.upload_offset + size]
            found.update(zip(range(piece.start, piece.end), data, strict=True))
        return found


@settings(deadline=None)
@given(steps)
def test_every_byte_is_the_last_one_written_and_no_memory_stays(script: list[tuple[str, int, int]]) -> None:
    with small_world():
        twin = Twin()
        for step in script:
            twin.step(*step)
        assert twin.found() == twin.model
        for upload in twin.sending:
            twin.dirty.sent(upload)
        twin.dirty.clear()
        assert twin.dirty.charged == 0, "F3"
