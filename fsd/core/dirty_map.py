"""The bytes of one file that are newer than its committed layout: what was written here and not yet committed.

The file is cut into file blocks of 4 MiB; each keeps its *pieces* in ascending order.  A piece is dirty (in memory,
nobody sends it), sending (in memory, part of an upload), or sent (durable on block servers as part of an upload, its
memory given back, waiting for the commit).  A newer write cuts what it covers out of older pieces, whatever state they
are in; their uploads go on, and the order of commits (upload_queue.py) sees to it that the newer bytes win.

Memory is counted by *chunk*, not by piece: a chunk is one buffer that pieces and uploads refer to, and it is charged
until the last of them has let go.

Invariant F2: pieces do not overlap, and each lies in its file block.
Invariant F3: `charged` is the sum over the chunks that a piece or an upload refers to.
Invariant F4: `dirty_bytes` is the sum of the sizes of the dirty pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter

from blockstore.protocol import BLOCK_SIZE_MAX
from fsd.core.upload_queue import PARTS_PER_SLICE_MAX, Chunk, Slot, Upload

OWN_SIZE_MIN = 32 << 10
"""Writes of at least this many bytes are kept as they came; shorter ones are gathered, to save objects and parts."""
GATHER_SIZE_MAX = 256 << 10
"""A gathered buffer grows to this: growing it copies each byte about once more."""
PIECE_OVERHEAD = 256
"""Bytes charged for a chunk besides its data: the objects around it (sys.getsizeof: 230 for piece, chunk, ints)."""
PARTS_JOINED_MIN = 16
"""An upload of more parts than this, short ones, is copied into one buffer: a send takes at most 1,024 parts."""
PART_SIZE_SMALL = 64 << 10

_START = attrgetter("start")


class Piece:
    """Bytes [start, end) of the file."""

    __slots__ = ("chunk", "chunk_offset", "end", "start", "upload", "upload_offset")

    def __init__(self, start: int, end: int, chunk: Chunk | None, chunk_offset: int) -> None:
        self.start = start
        self.end = end
        self.chunk = chunk  # None: sent; the bytes are in the upload's block at upload_offset.
        self.chunk_offset = chunk_offset
        self.upload: Upload | None = None  # None: dirty.
        self.upload_offset = 0

    def view(self, start: int, end: int) -> memoryview | bytes:
        """The bytes [start, end) of the file, which are in this piece and in memory; they will not change."""
        assert self.chunk is not None
        low = self.chunk_offset + start - self.start
        data = self.chunk.data
        if type(data) is bytearray:  # It may grow, which it cannot while a view of it is out.
            return bytes(data[low : low + end - start])
        return memoryview(data)[low : low + end - start]


class _FileBlock:
    """The pieces of one file block."""

    __slots__ = ("dirty", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.dirty = 0  # Bytes in dirty pieces.


class DirtyMap:
    """All uncommitted bytes of one file."""

    def __init__(self) -> None:
        self._blocks: dict[int, _FileBlock] = {}
        self._tail: Piece | None = None  # The piece last written, which the next small write may make longer.
        self.end = 0  # One past the last byte of the last piece.
        self.dirty_bytes = 0
        self.charged = 0  # Bytes of memory.

    def __bool__(self) -> bool:
        """True while anything is uncommitted."""
        return bool(self._blocks)

    # --- writing -------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`, over whatever was there.  Large `bytes` are kept as they are, all else is copied."""
        size = len(data)
        assert size > 0
        end = offset + size
        self.end = max(self.end, end)
        if size < OWN_SIZE_MIN and self._lengthen(offset, end, data):
            return
        if size < OWN_SIZE_MIN:
            chunk = Chunk(bytearray(data), PIECE_OVERHEAD)
        else:
            chunk = Chunk(data if type(data) is bytes else bytes(data), PIECE_OVERHEAD)
        at = offset
        while at < end:
            index = at // BLOCK_SIZE_MAX
            stop = min(end, (index + 1) * BLOCK_SIZE_MAX)
            piece = Piece(at, stop, chunk, at - offset)
            self._insert(index, piece)
            at = stop
        self._tail = piece if size < OWN_SIZE_MIN else None

    def _lengthen(self, offset: int, end: int, data: bytes | bytearray | memoryview) -> bool:
        """Append to the buffer of the piece that ends at `offset`, if it is the one last written and can grow."""
        tail = self._tail
        if tail is None or tail.end != offset or tail.upload is not None or tail.chunk is None:
            return False
        chunk, size = tail.chunk, end - offset
        held = tail.chunk_offset + tail.end - tail.start
        if held != len(chunk.data) or held + size > GATHER_SIZE_MAX or type(chunk.data) is not bytearray:
            return False
        index = tail.start // BLOCK_SIZE_MAX
        if (end - 1) // BLOCK_SIZE_MAX != index:
            return False
        block = self._blocks[index]
        if block.pieces[-1] is not tail:
            self._clear(block, offset, end)
        chunk.data += data
        chunk.charge += size
        self.charged += size
        tail.end = end
        block.dirty += size
        self.dirty_bytes += size
        return True

    def _insert(self, index: int, piece: Piece) -> None:
        block = self._blocks.get(index)
        if block is None:
            block = self._blocks[index] = _FileBlock()
        pieces = block.pieces
        if not pieces or pieces[-1].end <= piece.start:
            pieces.append(piece)
        else:
            pieces.insert(self._clear(block, piece.start, piece.end), piece)
        assert piece.chunk is not None
        self._refer(piece.chunk)
        size = piece.end - piece.start
        block.dirty += size
        self.dirty_bytes += size

    def _clear(self, block: _FileBlock, start: int, end: int) -> int:
        """Cut [start, end) out of the pieces; return the index where a piece that begins at `start` belongs."""
        pieces = block.pieces
        first = bisect_left(pieces, start, key=_START)
        if first and pieces[first - 1].end > start:
            before = pieces[first - 1]
            if before.end > end:
                pieces.insert(first, self._split(before, end))
                self._shorten(block, before, start, end)
                return first
            self._shorten(block, before, start, before.end)
        last = bisect_left(pieces, end, first, key=_START)
        if last > first and pieces[last - 1].end > end:
            after = self._split(pieces[last - 1], end)
            pieces.insert(last, after)
        for piece in pieces[first:last]:
            self._shorten(block, piece, piece.start, piece.end)
            self._let_go(piece)
        del pieces[first:last]
        return first

    def _split(self, piece: Piece, at: int) -> Piece:
        """Cut `piece` in two at `at`; the right one is returned and not yet in its list."""
        right = Piece(at, piece.end, piece.chunk, piece.chunk_offset + at - piece.start)
        right.upload = piece.upload
        right.upload_offset = piece.upload_offset + at - piece.start
        if right.chunk is not None:
            self._refer(right.chunk)
        piece.end = at
        return right

    def _split_in_place(self, piece: Piece, at: int) -> None:
        """Cut `piece` in two, the right one following it in its list."""
        pieces = self._blocks[piece.start // BLOCK_SIZE_MAX].pieces
        pieces.insert(bisect_left(pieces, at, key=_START), self._split(piece, at))

    def _shorten(self, block: _FileBlock, piece: Piece, start: int, end: int) -> None:
        """Count [start, end) out; the piece ends at `start` from now on (and may be empty: its caller removes it)."""
        if piece.upload is None:
            block.dirty -= end - start
            self.dirty_bytes -= end - start
        piece.end = min(piece.end, start)

    def truncate(self, size: int) -> None:
        """Drop what lies at or beyond `size`."""
        if size >= self.end:
            return
        for index in [index for index in self._blocks if (index + 1) * BLOCK_SIZE_MAX > size]:
            block = self._blocks[index]
            self._clear(block, max(size, index * BLOCK_SIZE_MAX), (index + 1) * BLOCK_SIZE_MAX)
            if not block.pieces:
                del self._blocks[index]
        self._find_end()

    # --- reading -------------------------------------------------------------------------------------------------

    def lookup(self, start: int, end: int) -> list[Piece]:
        """The pieces that overlap [start, end), ascending."""
        if start >= self.end:
            return []
        found: list[Piece] = []
        for index in range(start // BLOCK_SIZE_MAX, (min(end, self.end) - 1) // BLOCK_SIZE_MAX + 1):
            block = self._blocks.get(index)
            if block is None:
                continue
            pieces = block.pieces
            first = bisect_left(pieces, start, key=_START)
            if first and pieces[first - 1].end > start:
                first -= 1
            found += pieces[first : bisect_left(pieces, end, first, key=_START)]
        return found

    def next_start(self, at: int) -> int | None:
        """The first offset from `at` on that a piece has; None: there is none."""
        for index in sorted(index for index in self._blocks if (index + 1) * BLOCK_SIZE_MAX > at):
            for piece in self._blocks[index].pieces:
                if piece.end > at:
                    return max(piece.start, at)
        return None

    def end_of_run(self, at: int) -> int:
        """Where the pieces that follow each other without a gap from `at` on end; `at` if none has it."""
        while (block := self._blocks.get(at // BLOCK_SIZE_MAX)) is not None:
            before = at
            for piece in block.pieces:
                if piece.start <= at < piece.end:
                    at = piece.end
            if at == before or at % BLOCK_SIZE_MAX:
                break
        return at

    def total_bytes(self) -> int:
        """Bytes in all pieces, whatever state they are in."""
        return sum(piece.end - piece.start for block in self._blocks.values() for piece in block.pieces)

    def full_blocks(self, start: int, end: int) -> list[int]:
        """The file blocks that [start, end) touches and whose every byte is dirty: they can leave."""
        blocks = range(start // BLOCK_SIZE_MAX, (end - 1) // BLOCK_SIZE_MAX + 1)
        return [index for index in blocks if self._is_full(index)]

    def all_full_blocks(self) -> list[int]:
        """All file blocks whose every byte is dirty, ascending."""
        return sorted(index for index in self._blocks if self._is_full(index))

    def _is_full(self, index: int) -> bool:
        block = self._blocks.get(index)
        return block is not None and block.dirty == BLOCK_SIZE_MAX

    # --- uploads -------------------------------------------------------------------------------------------------

    def seal(self, indexes: Iterable[int] | None, take_slot: Callable[[int, int], Slot]) -> list[Upload]:
        """Pack the dirty pieces, of all or of some file blocks, into uploads of at most 4 MiB, in file order.

        The pieces are sending from now on; a later write to them begins new ones.  `take_slot(size, part_count)`
        gives the place of an upload in a slice.
        """
        chosen = sorted(self._blocks) if indexes is None else indexes
        uploads: list[Upload] = []
        group: list[Piece] = []
        room, runs = BLOCK_SIZE_MAX, 0
        for piece in self._dirty_pieces(chosen):
            begins_run = not group or group[-1].end != piece.start
            if begins_run and runs == PARTS_PER_SLICE_MAX:
                uploads.append(self._make_upload(group, runs, take_slot))
                group, room, runs = [], BLOCK_SIZE_MAX, 0
            if piece.end - piece.start > room:
                self._split_in_place(piece, piece.start + room)  # Its right half comes next.
            group.append(piece)
            room -= piece.end - piece.start
            runs += begins_run
            if room == 0:
                uploads.append(self._make_upload(group, runs, take_slot))
                group, room, runs = [], BLOCK_SIZE_MAX, 0
        if group:
            uploads.append(self._make_upload(group, runs, take_slot))
        return uploads

    def seal_range(self, start: int, end: int, take_slot: Callable[[int, int], Slot]) -> list[Upload]:
        """As `seal`, for the dirty bytes inside [start, end), which lies in one file block."""
        index = start // BLOCK_SIZE_MAX
        block = self._blocks.get(index)
        if block is None:
            return []
        assert (end - 1) // BLOCK_SIZE_MAX == index
        for at in (start, end):
            for piece in self.lookup(at, at + 1):
                if piece.start < at:
                    self._split_in_place(piece, at)
        group = [p for p in block.pieces if p.upload is None and start <= p.start and p.end <= end]
        return [self._make_upload(group, len(group), take_slot)] if group else []

    def _dirty_pieces(self, indexes: Iterable[int]) -> Iterator[Piece]:
        """Dirty pieces in file order; the caller may split the one it was just given."""
        for index in indexes:
            if self._blocks[index].dirty:
                for piece in self._blocks[index].pieces:
                    if piece.upload is None:
                        yield piece

    def _make_upload(self, group: list[Piece], runs: int, take_slot: Callable[[int, int], Slot]) -> Upload:
        size = sum(piece.end - piece.start for piece in group)
        if len(group) > PARTS_JOINED_MIN and size < len(group) * PART_SIZE_SMALL:
            self._maybe_join(group)
        upload = Upload(take_slot(size, runs), size)
        at = 0
        for piece in group:
            length = piece.end - piece.start
            chunk = piece.chunk
            assert chunk is not None
            upload.add(
                piece.start, length, at, memoryview(chunk.data)[piece.chunk_offset : piece.chunk_offset + length]
            )
            self._refer(chunk)
            upload.chunks.append(chunk)
            piece.upload, piece.upload_offset = upload, at
            self._blocks[piece.start // BLOCK_SIZE_MAX].dirty -= length
            at += length
        self.dirty_bytes -= size
        self._tail = None
        return upload

    def _maybe_join(self, group: list[Piece]) -> None:
        """Copy the group's bytes into one buffer, unless other pieces would keep the old buffers alive beside it."""
        held: dict[Chunk, int] = {}
        for piece in group:
            assert piece.chunk is not None
            held[piece.chunk] = held.get(piece.chunk, 0) + 1
        if any(chunk.references != count for chunk, count in held.items()):
            return
        chunk = Chunk(b"".join([piece.view(piece.start, piece.end) for piece in group]), PIECE_OVERHEAD)
        at = 0
        for piece in group:
            self._refer(chunk)
            self._let_go(piece)
            piece.chunk, piece.chunk_offset = chunk, at
            at += piece.end - piece.start

    def sent(self, upload: Upload) -> None:
        """The upload's block is durable: its pieces give back their memory and are read from there."""
        for piece in self._pieces_of(upload):
            self._let_go(piece)
        self._let_go_payload(upload)

    def take_back(self, upload: Upload) -> None:
        """The upload failed: what no newer write has covered is dirty again."""
        for piece in self._pieces_of(upload):
            piece.upload, piece.upload_offset = None, 0
            size = piece.end - piece.start
            self._blocks[piece.start // BLOCK_SIZE_MAX].dirty += size
            self.dirty_bytes += size
        self._let_go_payload(upload)

    def committed(self, uploads: Collection[Upload]) -> None:
        """The file's layout names these uploads now: their pieces are no longer needed."""
        for index in {index for upload in uploads for index in upload.file_blocks()}:
            block = self._blocks.get(index)
            if block is None:
                continue
            kept = []
            for piece in block.pieces:
                if piece.upload is not None and piece.upload in uploads:
                    assert piece.chunk is None
                else:
                    kept.append(piece)
            block.pieces = kept
            if not kept:
                del self._blocks[index]
        self._find_end()

    def clear(self) -> None:
        """Drop everything that no upload holds."""
        for block in self._blocks.values():
            for piece in block.pieces:
                self._let_go(piece)
        self._blocks.clear()
        self._tail = None
        self.dirty_bytes = 0
        self.end = 0

    def freeze_small(self, size_max: int) -> list[Piece] | None:
        """All pieces, if they are dirty and end at or below `size_max`, which is inside the first file block.

        They stay where they are, but grow no more: `drop` removes what of them no newer write has covered.
        """
        block = self._blocks.get(0)
        if block is None or self.end > size_max or any(piece.upload is not None for piece in block.pieces):
            return None
        self._tail = None
        return block.pieces.copy()

    def drop(self, pieces: Collection[Piece]) -> None:
        """The inode service has these pieces of the first file block now."""
        block = self._blocks.get(0)
        if block is None:
            return
        kept = []
        for piece in block.pieces:
            if piece in pieces and piece.upload is None:
                self._shorten(block, piece, piece.start, piece.end)
                self._let_go(piece)
            else:
                kept.append(piece)
        block.pieces = kept
        if not kept:
            del self._blocks[0]
        self._find_end()

    def check(self) -> None:
        """Assert F2, F3 and F4 (for tests: it looks at everything)."""
        chunks: dict[int, Chunk] = {}
        dirty = 0
        for index, block in self._blocks.items():
            assert block.pieces
            at = index * BLOCK_SIZE_MAX
            for piece in block.pieces:
                assert at <= piece.start < piece.end <= (index + 1) * BLOCK_SIZE_MAX, "F2"
                at = piece.end
                if piece.chunk is not None:
                    chunks[id(piece.chunk)] = piece.chunk
                if piece.upload is not None:
                    chunks.update((id(chunk), chunk) for chunk in piece.upload.chunks)
            own = sum(piece.end - piece.start for piece in block.pieces if piece.upload is None)
            assert own == block.dirty, "F4"
            dirty += own
        assert dirty == self.dirty_bytes, "F4"
        assert sum(chunk.charge for chunk in chunks.values()) <= self.charged, "F3"

    # --- accounting ----------------------------------------------------------------------------------------------

    def _pieces_of(self, upload: Upload) -> Iterator[Piece]:
        for index in upload.file_blocks():
            block = self._blocks.get(index)
            if block is not None:
                yield from [piece for piece in block.pieces if piece.upload is upload]

    def _find_end(self) -> None:
        self.end = self._blocks[max(self._blocks)].pieces[-1].end if self._blocks else 0

    def _refer(self, chunk: Chunk) -> None:
        if chunk.references == 0:
            self.charged += chunk.charge
        chunk.references += 1

    def _release(self, chunk: Chunk) -> None:
        chunk.references -= 1
        if chunk.references == 0:
            self.charged -= chunk.charge

    def _let_go(self, piece: Piece) -> None:
        if piece.chunk is not None:
            self._release(piece.chunk)
            piece.chunk = None

    def _let_go_payload(self, upload: Upload) -> None:
        upload.payload.clear()
        for chunk in upload.chunks:
            self._release(chunk)
        upload.chunks.clear()
