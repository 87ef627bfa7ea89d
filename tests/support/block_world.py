"""A block store on a disk that loses power, run step by step in one thread, beside a model that is a dictionary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from blockstore.catalogue import Catalogue
from blockstore.core.index_rows import Entry
from blockstore.core.segment import whole_pages
from blockstore.index import Changes, Index
from blockstore.protocol import CHECKSUM_UNIT, BlockId
from blockstore.reader import Reader
from blockstore.recovery import recover
from blockstore.writer import Delete, Group, Put, Writer
from tests.support.power_disk import PowerCut, PowerDisk
from wire.checksum import unit_checksums
from wire.errors import NoSuchBlock, ServerOverloaded

SEGMENT_SIZE = 200 << 10
SIZES = (1, 90, 4095, 4096, 5000, CHECKSUM_UNIT, CHECKSUM_UNIT + 1, 20_000, 66_000)


class SteppedIndex(Index):
    """An index whose commits are steps of the disk: the power may go right before and right after one."""

    def __init__(self, directory: Path, disk: PowerDisk) -> None:
        super().__init__(directory)
        self._disk = disk

    def commit(self, changes: Changes) -> None:
        self._disk.step()
        super().commit(changes)
        self._disk.step()


class World:
    """The store, the model, and what is not certain."""

    def __init__(self, directory: Path, writer_class: type[Writer] = Writer) -> None:
        self.directory = directory
        self.writer_class = writer_class
        self.disk = PowerDisk()
        self.acknowledged: dict[BlockId, bytes] = {}
        self.unsure: dict[BlockId, bytes] = {}  # Put or deleted without an answer: there or not, never other bytes.
        self.deleted: set[BlockId] = set()
        self.dead: list[Entry] = []  # Where deleted blocks were.
        self.dying: dict[BlockId, Entry] = {}
        self.open()

    def open(self) -> None:
        index = SteppedIndex(self.directory, self.disk)
        self.catalogue = Catalogue(self.disk, index)
        try:
            recovered = recover(self.catalogue)
        except BaseException:
            self.catalogue.close()
            raise
        self.reader = Reader(self.catalogue)
        self.writer = self.writer_class(
            self.catalogue,
            self.reader,
            next_number=recovered.next_number,
            active=recovered.active,
            to_punch=recovered.to_punch,
            segment_size_max=SEGMENT_SIZE,
        )

    def crash(self, dice: random.Random | None) -> None:
        """Lose power, or without dice only the process; then open again, losing power meanwhile now and then."""
        self.catalogue.close()
        if dice is None:
            self.disk.cut_at = None
            self.open()
            return
        while True:
            self.disk.lose_power(dice)
            self.disk.cut_at = self.disk.steps + dice.randint(1, 6) if dice.random() < 0.3 else None
            try:
                self.open()
            except PowerCut:
                continue
            self.disk.cut_at = None
            return

    def close(self) -> None:
        self.writer.commit(Group(), checkpoint=True)
        self.writer.reclaim()
        self.catalogue.close()

    # --- operations -------------------------------------------------------------------------------------------------

    def put(self, block: BlockId, data: bytes) -> Put:
        return Put(block, unit_checksums(data, CHECKSUM_UNIT), data)

    def begin(self, operations: Sequence[Put | Delete], group: Group) -> None:
        """The write stage; from now on the outcome is not certain."""
        for operation in operations:
            if isinstance(operation, Put):
                if operation.block not in self.acknowledged:
                    self.unsure[operation.block] = bytes(operation.data)
            else:
                for block in operation.blocks:
                    if block in self.acknowledged:
                        self.unsure[block] = self.acknowledged.pop(block)
                        self.dying[block] = self.catalogue.locate(block)[1]
        self.writer.write(operations, group)

    def finish(self, group: Group, *, checkpoint: bool = False) -> None:
        """The commit stage, and what it acknowledges."""
        self.writer.commit(group, checkpoint=checkpoint)
        for operation in group.operations:
            if isinstance(operation, Put):
                self._put_done(operation)
            else:
                self._delete_done(operation)

    def _put_done(self, put: Put) -> None:
        if put.block in self.dying:
            return  # A delete behind it is under way: not certain again.
        if put.outcome is None:
            self.unsure.pop(put.block, None)
            self.acknowledged[put.block] = bytes(put.data)
            self.deleted.discard(put.block)
        else:
            assert isinstance(put.outcome, ServerOverloaded) or self.disk.capacity < 1 << 40, put.outcome

    def _delete_done(self, delete: Delete) -> None:
        assert delete.outcome is None
        for block in delete.blocks:
            self.unsure.pop(block, None)
            self.deleted.add(block)
            if block in self.dying:
                self.dead.append(self.dying.pop(block))

    def run(self, operations: Sequence[Put | Delete]) -> None:
        group = Group()
        self.begin(operations, group)
        self.finish(group)

    # --- what must hold ---------------------------------------------------------------------------------------------

    def read(self, block: BlockId) -> bytes | None:
        try:
            units = self.reader.read(block, offset=0, size=1 << 22)
        except NoSuchBlock:
            return None
        assert bytes(units.checksums) == unit_checksums(units.data, CHECKSUM_UNIT)
        return bytes(units.data)

    def settle(self) -> None:
        """After a crash: what was not certain is now, one way or the other."""
        for block, data in self.unsure.items():
            found = self.read(block)
            assert found in (None, data)
            if found is not None:
                self.acknowledged[block] = data
        self.unsure.clear()
        self.dying.clear()

    def check(self) -> None:
        for block, data in self.acknowledged.items():
            if block not in self.unsure:
                assert self.read(block) == data, f"acknowledged {block} is not there"
                assert self.reader.verify(block) == len(data)
        for block in self.deleted - self.unsure.keys():
            assert self.read(block) is None, f"deleted {block} is back"
        listed = dict(self.catalogue.list_page(None, 1 << 20))
        expected = {block: len(data) for block, data in self.acknowledged.items()}
        assert expected.items() <= listed.items()
        assert listed.keys() - expected.keys() <= self.unsure.keys()
        figures = list(self.catalogue.segments.values())
        assert sum(segment.live_count for segment in figures) == len(listed)
        assert sum(segment.live_bytes for segment in figures) == sum(listed.values())

    def check_space(self) -> None:
        """The pages of every deleted block are given back."""
        self.writer.commit(Group(), checkpoint=True)
        self.writer.reclaim()
        for entry in self.dead:
            content = self.disk.names.get(entry.segment)
            pages = whole_pages(entry.offset, entry.layout.end)
            if content is not None and pages is not None:
                assert not any(content.cache[pages[0] : pages[1]]), f"space of {entry} is not given back"
