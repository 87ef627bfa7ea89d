"""Random operations in a tree with quotas: sums and refusals are those that walking the tree gives.

Each operation is carried out on a twin without quotas first.  Sums over the twin, made by walking its names, tell what
the usage must be and whether a quota must refuse the operation; then the twin is put back.
"""

from __future__ import annotations

import random
import stat
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from metadata import protocol
from metadata.core import schema
from metadata.core.fsck import check
from metadata.core.namespace import inodes, rename
from metadata.core.namespace.inodes import Charges
from metadata.core.namespace.remove import move_directory
from metadata.core.schema import ROOT_INO, Extent, Inode
from metadata.engine.memory import MemoryEngine
from metadata.engine.ports import WriteTxn
from metadata.protocol import Mutation, RenameFlags
from tests.support.effort import EFFORT
from tests.support.store import SESSION, Store
from wire.errors import QuotaExceeded, StoreError
from wire.message import Message

STEPS = 250 * EFFORT
NAMES = [b"a", b"b", b"c", b"d", b"e"]

Sums = dict[int, tuple[int, int]]
"""Bytes and inodes below each directory."""


class World:
    """The store with quotas, and what its twin says."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = Store()
        self.twin = Store()
        self.quotas: dict[int, tuple[int, int]] = {}
        self.refusals = 0

    # --- walking ---

    def walk(self, store: Store) -> tuple[Sums, dict[int, Inode]]:
        """Sums by walking names from the root; every inode counts once, where it is charged."""
        inodes: dict[int, Inode] = {}
        above: dict[int, list[int]] = {ROOT_INO: [ROOT_INO]}
        for directory in (reached := [ROOT_INO]):
            for entry in store.ask(protocol.ReadDir(SESSION, directory, 0, 4096, plus=True)).entries:
                assert entry.inode is not None
                inodes[entry.ino] = entry.inode
                if stat.S_ISDIR(entry.file_type):
                    above[entry.ino] = [entry.ino, *above[directory]]
                    reached.append(entry.ino)
        sums = dict.fromkeys(above, (0, 0))
        for inode in inodes.values():
            for directory in above[inode.parent]:
                before = sums[directory]
                sums[directory] = (before[0] + inode.allocated, before[1] + 1)
        return sums, inodes

    # --- one step ---

    def step(self) -> None:
        sums, inodes = self.walk(self.store)
        request = self.any_request(sorted(sums), inodes)
        pairs = self.twin.pairs()
        try:
            self.twin.change(request)
            wanted: type[StoreError] | None = None
        except StoreError as error:
            wanted = type(error)
        after, inodes_after = self.walk(self.twin)
        did_something = wanted is None and self.twin.pairs() != pairs  # A rename of a file's name to another: nothing.
        if did_something and self.must_refuse(request, sums, after, inodes_after):
            wanted = QuotaExceeded
            self.twin.engine = MemoryEngine()
            with self.twin.engine.write() as txn:
                for key, value in pairs:
                    txn.put(key, value)
                txn.commit()
        got: type[StoreError] | None = None
        try:
            self.store.change(request)
        except StoreError as error:
            got = type(error)
        assert got is wanted, f"{request}: {got} instead of {wanted}"
        self.refusals += got is QuotaExceeded
        self.compare()
        if self.chance.random() < 0.1:
            self.set_quota()

    def compare(self) -> None:
        sums, _ = self.walk(self.twin)
        for ino, (allocated, count) in sums.items():
            told = self.store.ask(protocol.GetUsage(ino))
            assert (told.allocated, told.inodes) == (allocated, count), f"usage of directory {ino}"
        with self.store.engine.read() as txn:
            assert [str(violation) for violation in check(txn)] == []
        self.quotas = {ino: quota for ino, quota in self.quotas.items() if ino in sums}

    def set_quota(self) -> None:
        sums, _ = self.walk(self.store)
        ino = self.chance.choice(sorted(sums))
        allocated, count = sums[ino]
        quota = self.chance.choice(
            [(0, 0), (allocated, 0), (0, count + 1), (allocated + 30, count + 2), (allocated // 2 or 1, count or 1)]
        )
        for name, limit in zip((b"fsd.quota.bytes", b"fsd.quota.inodes"), quota, strict=True):
            self.store.change(protocol.SetXattr(SESSION, 1, ino, name, b"%d" % limit))
        self.quotas[ino] = quota

    # --- the oracle ---

    def must_refuse(
        self,
        request: Mutation[Message],
        before: Sums,
        after: Sums,
        inodes_after: dict[int, Inode],
    ) -> bool:
        """Whether the operation, as the twin has carried it out, grows a sum above its limit."""
        if isinstance(request, protocol.Unlink):
            return False
        changed = dict(after)
        for new, old, file in self.arrivals(request):
            for directory in self.above(new) - self.above(old):
                allocated, count = changed[directory]
                changed[directory] = (allocated + inodes_after[file].allocated, count + 1)
        for ino, limits in self.quotas.items():
            for at, limit in enumerate(limits):
                old, new = before[ino][at], changed.get(ino, (0, 0))[at]
                if limit and new > limit and new > old:
                    return True
        return False

    def arrivals(self, request: Mutation[Message]) -> Iterator[tuple[int, int, int]]:
        """Files that got a name in a directory and are charged elsewhere: (directory, where it comes from, file).

        They count as if they were charged there.
        """
        places: list[tuple[int, int, bytes]] = []
        if isinstance(request, protocol.Link):
            places = [(request.parent, self.twin.inode(request.ino).parent, request.name)]
        elif isinstance(request, protocol.Rename):
            places = [(request.new_parent, request.parent, request.new_name)]
            if request.flags & RenameFlags.EXCHANGE:
                places.append((request.parent, request.new_parent, request.name))
        for new, old, name in places:
            ino = self.twin.lookup(name, parent=new)
            inode = self.twin.inode(ino)
            if not stat.S_ISDIR(inode.mode) and inode.parent != new:
                yield new, old, ino

    def above(self, directory: int) -> set[int]:
        found = {directory}
        while directory != ROOT_INO:
            directory = self.twin.inode(directory).parent
            found.add(directory)
        return found

    # --- operations ---

    def any_request(self, directories: list[int], inodes: dict[int, Inode]) -> Mutation[Message]:
        pick, name = self.chance.choice, self.chance.choice(NAMES)
        parent, new_parent, new_name = pick(directories), pick(directories), pick(NAMES)
        there = self.store.names(parent)
        if there and self.chance.random() < 0.7:
            name = pick(sorted(there))
        inodes = inodes | self.nameless()
        files = [ino for ino, inode in inodes.items() if stat.S_ISREG(inode.mode)] or [ROOT_INO]
        inline = [ino for ino in files if inodes.get(ino) and not (inodes[ino].allocated and not inodes[ino].flags & 1)]
        makes: list[Callable[[], Mutation[Message]]] = [
            lambda: protocol.Create(SESSION, 1, parent, name, 0o644, True),
            lambda: protocol.MakeDirectory(SESSION, 1, parent, name, 0o755),
            lambda: protocol.MakeDirectory(SESSION, 1, parent, name, 0o755),
            lambda: protocol.MakeTemporary(SESSION, 1, parent, 0o644),
            lambda: protocol.MakeSymlink(SESSION, 1, parent, name, b"t"),
            lambda: protocol.Link(SESSION, 1, pick(files), parent, name),
            lambda: protocol.Unlink(SESSION, 1, parent, name, self.closed_ino(parent, name)),
            lambda: protocol.RemoveDirectory(SESSION, 1, parent, name),
            lambda: protocol.Rename(
                SESSION, 1, parent, name, new_parent, new_name, pick([0, 0, RenameFlags.EXCHANGE, RenameFlags.WHITEOUT])
            ),
            lambda: protocol.Rename(
                SESSION, 1, parent, name, new_parent, new_name, pick([0, 0, RenameFlags.EXCHANGE, RenameFlags.WHITEOUT])
            ),
            lambda: protocol.WriteInline(
                SESSION, 1, pick(inline or files), self.chance.randrange(40), bytes(self.chance.randrange(60)), 0
            ),
            lambda: self.commit(pick(files)),
            lambda: protocol.SetAttr(
                SESSION, 1, pick(files), protocol.SetAttrMask.SIZE, size=self.chance.randrange(120)
            ),
            lambda: protocol.ChangeRange(
                SESSION,
                1,
                pick(files),
                pick(list(protocol.RangeOperation)),
                self.chance.randrange(100),
                self.chance.randrange(1, 60),
            ),
            lambda: protocol.CopyRange(
                SESSION,
                1,
                pick(files),
                self.chance.randrange(60),
                pick(files),
                self.chance.randrange(100),
                self.chance.randrange(1, 60),
            ),
        ]
        return pick(makes)()

    def nameless(self) -> dict[int, Inode]:
        """Files without a name, which are charged to nobody until they get one."""
        held = (schema.decode_held_key(key)[1] for key, _ in self.store.pairs() if key.startswith(b"h"))
        return {ino: self.store.inode(ino) for ino in held}

    def closed_ino(self, parent: int, name: bytes) -> int:
        try:
            return self.store.lookup(name, parent=parent)
        except StoreError:
            return 0

    def commit(self, ino: int) -> Mutation[Message]:
        first = 0
        for store in (self.store, self.twin):
            first = store.change(protocol.AllocateSlices(SESSION, 1, 1)).first
        length, offset = self.chance.randrange(1, 60), self.chance.randrange(100)
        return protocol.CommitExtents(
            SESSION, 1, ino, (Extent(offset, length, first, 0),), ((first, length),), 0, 0, inline_moved=True
        )


def run(seed: int, steps: int = STEPS) -> World:
    world = World(seed)
    for _ in range(steps):
        world.step()
    return world


def run_many() -> None:
    """Enough for every operation to meet what it depends on."""
    for seed in range(10):
        run(seed)


@pytest.mark.parametrize("seed", range(6))
def test_usage_and_refusals_are_those_that_walking_the_tree_gives(seed: int) -> None:
    assert run(seed).refusals > STEPS // 50


def forgets_the_old_ancestors(txn: WriteTxn, ino: int, inode: Inode, directory: int, charges: Charges) -> Inode:
    """The planted bug: what a directory takes along is not taken from where it was."""
    first = len(charges)
    moved = move_directory(txn, ino, inode, directory, charges)
    del charges[first]
    return moved


def keeps_its_old_way_up(txn: WriteTxn, ino: int, inode: Inode, directory: int, charges: Charges) -> Inode:
    """The planted bug: later changes below a directory that was moved go to where it was."""
    moved = move_directory(txn, ino, inode, directory, charges)
    _, *rest = schema.decode_usage(txn.get(schema.usage_key(ino)) or b"")
    txn.put(schema.usage_key(ino), schema.encode_usage(inode.parent, *rest))
    return moved


@pytest.mark.parametrize("bug", [forgets_the_old_ancestors, keeps_its_old_way_up])
def test_the_walk_catches_a_planted_bug(bug: Callable[..., Inode]) -> None:
    with mock.patch.object(rename, "move_directory", bug), pytest.raises(AssertionError, match=r"usage|M10"):
        run_many()


def test_the_walk_catches_a_quota_that_is_off_by_one() -> None:
    """The planted bug: every limit is taken for one more."""
    real = inodes.load_quota

    def lax(txn: WriteTxn, directory: int) -> tuple[int, int]:
        bytes_max, inodes_max = real(txn, directory)
        return bytes_max and bytes_max + 1, inodes_max and inodes_max + 1

    with mock.patch.object(inodes, "load_quota", lax), pytest.raises(AssertionError, match=r"instead of"):
        run_many()
