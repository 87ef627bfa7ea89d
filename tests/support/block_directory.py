"""A block store in a real directory, run step by step in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blockstore.files import DiskFiles, SegmentFiles
from blockstore.protocol import CHECKSUM_UNIT, BlockId
from blockstore.reader import Reader
from blockstore.store import open_catalogue
from blockstore.writer import SEGMENT_SIZE_MAX, Delete, Group, Put, Writer
from wire.checksum import first_bad_unit, unit_checksums
from wire.errors import BlockCorrupt, NoSuchBlock


class Directory:
    """The parts of a store, open."""

    def __init__(
        self, path: Path, *, files: SegmentFiles | None = None, segment_size_max: int = SEGMENT_SIZE_MAX
    ) -> None:
        (path / "segments").mkdir(parents=True, exist_ok=True)
        self.files = files if files is not None else DiskFiles(path / "segments")
        self.catalogue, recovered = open_catalogue(path, self.files)
        self.reader = Reader(self.catalogue)
        self.writer = Writer(
            self.catalogue,
            self.reader,
            next_number=recovered.next_number,
            active=recovered.active,
            to_punch=recovered.to_punch,
            segment_size_max=segment_size_max,
        )

    def run(self, operations: Sequence[Put | Delete], *, checkpoint: bool = False) -> None:
        group = Group()
        self.writer.write(operations, group)
        self.writer.commit(group, checkpoint=checkpoint)

    def put(self, blocks: dict[BlockId, bytes], *, checkpoint: bool = False) -> None:
        """Store them; every one must succeed."""
        puts = [put_of(block, data) for block, data in blocks.items()]
        self.run(puts, checkpoint=checkpoint)
        assert [put.outcome for put in puts] == [None] * len(puts)

    def delete(self, blocks: Sequence[BlockId]) -> Delete:
        delete = Delete(blocks)
        self.run([delete])
        self.writer.reclaim()
        return delete

    def read(self, block: BlockId) -> bytes | None:
        """Its bytes as a client accepts them; None: not here, or damaged and known to be."""
        try:
            units = self.reader.read(block, offset=0, size=1 << 22)
        except (NoSuchBlock, BlockCorrupt):
            return None
        if first_bad_unit(units.data, units.checksums, CHECKSUM_UNIT) is None:
            return bytes(units.data)
        try:
            self.reader.verify(block)
        except BlockCorrupt:
            return None
        raise AssertionError("verify did not see the damage")

    def close(self) -> None:
        """As a killed process does: nothing is brought up to date."""
        self.catalogue.close()


def put_of(block: BlockId, data: bytes) -> Put:
    return Put(block, unit_checksums(data, CHECKSUM_UNIT), data)
