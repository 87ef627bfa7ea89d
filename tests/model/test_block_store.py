"""The block store against a dictionary: any operations, crashes and power cuts in any order."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blockstore.catalogue import Segment
from blockstore.files import SegmentFile
from blockstore.protocol import BlockId
from blockstore.writer import Delete, Group, Put, Writer
from tests.support.block_world import SIZES, World
from tests.support.power_disk import PowerCut
from wire.errors import BlockCorrupt, BlockExists


def random_operations(world: World, dice: random.Random, next_slice: list[int]) -> list[Put | Delete]:
    """A batch of puts and deletes; ids are mostly new, as in life, now and then a repetition."""
    operations: list[Put | Delete] = []
    for _ in range(dice.randint(1, 6)):
        known = sorted(world.acknowledged)
        if known and dice.random() < 0.4:
            operations.append(Delete(tuple(dice.sample(known, min(len(known), dice.randint(1, 4))))))
        elif known and dice.random() < 0.1:
            block = dice.choice(known)
            operations.append(world.put(block, world.acknowledged[block]))
        else:
            next_slice[0] += 1
            operations.append(world.put(BlockId(next_slice[0], 0), dice.randbytes(dice.choice(SIZES))))
    return operations


def run_until_power_is_cut(world: World, dice: random.Random, next_slice: list[int]) -> None:
    """Groups as the two threads make them: the last one is often committed in the middle of writing the next one."""
    world.disk.cut_at = world.disk.steps + dice.randint(1, 60)
    waiting: Group | None = None
    try:
        while True:
            group = Group()
            operations = random_operations(world, dice, next_slice)
            if waiting is not None:
                before = waiting
                checkpoint = dice.random() < 0.3
                world.disk.meanwhile = lambda: world.finish(before, checkpoint=checkpoint)  # noqa: B023 - called in this turn
                world.disk.meanwhile_in = dice.randint(1, 4)
            world.begin(operations, group)
            other, world.disk.meanwhile = world.disk.meanwhile, None
            if other is not None:  # It did not come in the middle, so it comes now.
                other()
            waiting = group
            if dice.random() < 0.6:
                world.finish(waiting, checkpoint=dice.random() < 0.2)
                waiting = None
            if dice.random() < 0.5:
                world.writer.reclaim()
    except PowerCut:
        return


def run_world(seed: int, directory: Path, writer_class: type[Writer] = Writer) -> None:
    dice = random.Random(seed)
    world = World(directory, writer_class)
    next_slice = [0]
    try:
        for _ in range(4):
            run_until_power_is_cut(world, dice, next_slice)
            world.crash(dice)
            world.settle()
            world.check()
            world.check_space()
            world.check()
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(60))
def test_acknowledged_blocks_survive_power_cuts_and_deleted_ones_stay_away(seed: int, tmp_path: Path) -> None:
    run_world(seed, tmp_path)


class AcknowledgesBeforeSync(Writer):
    """The planted bug: nothing is synced before it is acknowledged."""

    def _sync(self, group: Group) -> None:
        pass


class PunchesBeforeIndexCommit(Writer):
    """The planted bug: space is given back while the index still names the block."""

    def commit(self, group: Group, *, checkpoint: bool = False) -> None:
        for operation in group.operations:
            if isinstance(operation, Delete):
                for block in operation.blocks:
                    entry = self._catalogue.find(Put(block, b"", b"").key)
                    if entry is not None:
                        self._to_punch.append((entry.segment, entry.offset, entry.layout.end))
        self.reclaim()
        super().commit(group, checkpoint=checkpoint)


class CountsSegmentsTooEarly(Writer):
    """The planted bug: the number of the next segment moves before the segment is known."""

    def _make_segment(self) -> Segment:
        number = self._next_number
        files = self._catalogue.files
        create = files.create

        def create_and_count(wanted: int) -> SegmentFile:
            self._next_number = number + 1
            return create(wanted)

        files.create = create_and_count  # type: ignore[method-assign, assignment]
        try:
            return super()._make_segment()
        finally:
            files.create = create  # type: ignore[method-assign]


class ForgetsCheckpoint(Writer):
    """The planted bug: a delete does not take along what the index still lacks."""

    def _commit_index(self, doomed: dict[bytes, object]) -> None:  # type: ignore[override]
        fresh = dict(self._catalogue.fresh)
        self._catalogue.fresh = {}
        super()._commit_index(doomed)  # type: ignore[arg-type]
        self._catalogue.fresh = {key: entry for key, entry in fresh.items() if key not in doomed}


BUGS = [AcknowledgesBeforeSync, PunchesBeforeIndexCommit, ForgetsCheckpoint, CountsSegmentsTooEarly]


@pytest.mark.parametrize("bug", BUGS)
def test_power_cuts_find_a_planted_bug(bug: type[Writer], tmp_path: Path) -> None:
    for seed in range(120):  # The rarest of them shows in every twentieth world.
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            run_world(seed, directory, bug)
        except (AssertionError, BlockCorrupt):
            return
    raise AssertionError("the net has a hole")


class StoreMachine(RuleBasedStateMachine):
    """One operation at a time, closed, killed and opened again at will, with no power lost."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="blockstore-machine-"))
        self.world = World(self.directory)

    blocks = st.builds(BlockId, st.integers(0, 3), st.integers(0, 3))

    @initialize()
    def begin(self) -> None:
        self.contents: dict[BlockId, bytes] = {}

    @rule(block=blocks, size=st.sampled_from(SIZES), fill=st.integers(0, 255))
    def put(self, block: BlockId, size: int, fill: int) -> None:
        data = bytes([fill]) * size
        put = self.world.put(block, data)
        group = Group()
        self.world.writer.write([put], group)
        self.world.writer.commit(group)
        if self.contents.setdefault(block, data) == data:
            assert put.outcome is None
        else:
            assert isinstance(put.outcome, BlockExists)

    @rule(chosen=st.lists(blocks, max_size=5))
    def delete(self, chosen: list[BlockId]) -> None:
        delete = Delete(chosen)
        group = Group()
        self.world.writer.write([delete], group)
        self.world.writer.commit(group)
        here = {block for block in chosen if self.contents.pop(block, None) is not None}
        assert (delete.outcome, delete.deleted_count) == (None, len(here))

    @rule()
    def reclaim(self) -> None:
        self.world.writer.reclaim()

    @rule()
    def checkpoint(self) -> None:
        self.world.writer.commit(Group(), checkpoint=True)

    @rule()
    def kill(self) -> None:
        self.world.crash(None)

    @rule()
    def reopen(self) -> None:
        self.world.close()
        self.world.open()

    @rule(after=st.none() | blocks, count=st.integers(1, 6))
    def page(self, after: BlockId | None, count: int) -> None:
        rows = sorted((b, len(data)) for b, data in self.contents.items() if after is None or b > after)
        assert self.world.catalogue.list_page(after, count) == rows[:count]

    @invariant()
    def same_as_the_model(self) -> None:
        for slice_id in range(4):
            for index in range(4):
                block = BlockId(slice_id, index)
                assert self.world.read(block) == self.contents.get(block)

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self.directory)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
