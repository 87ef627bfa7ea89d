"""A disk in memory that loses power: it keeps what was synced, and of the rest whatever the dice say.

Stricter than any real file system: an unsynced write may be there in part, in sectors of 512 bytes, or not at all,
independently of later ones; a new name may be missing and a removed one back until the directory is synced.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from wire.checksum import Buffer

SECTOR = 512


class PowerCut(BaseException):
    """Everything ends here; not an Exception, so that nothing catches it."""


@dataclass
class Content:
    """The bytes of one file: as programs see them, and as a power cut would leave them."""

    cache: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Callable[[bytearray, random.Random | None], None]] = field(default_factory=list)

    def change(self, operation: Callable[[bytearray, random.Random | None], None]) -> None:
        operation(self.cache, None)
        self.pending.append(operation)

    def sync(self) -> None:
        self.durable = bytearray(self.cache)
        self.pending.clear()

    def lose_power(self, dice: random.Random) -> None:
        share = dice.choice([0.0, 0.3, 0.9, 1.0])
        for operation in self.pending:
            if dice.random() < share:
                operation(self.durable, dice)
        self.cache = bytearray(self.durable)
        self.pending.clear()


@dataclass
class PowerDisk:
    """The disk, and the directory of segments on it (the port blockstore.files.SegmentFiles)."""

    capacity: int = 1 << 40
    names: dict[int, Content] = field(default_factory=dict)
    durable_names: dict[int, Content] = field(default_factory=dict)
    steps: int = 0
    cut_at: int | None = None  # The power goes at this step.
    sync_errors: int = 0  # So many of the next syncs fail.
    meanwhile: Callable[[], None] | None = None  # What another thread does ...
    meanwhile_in: int = 0  # ... so many steps from now.

    def step(self) -> None:
        """One more event at which the power can go."""
        self.steps += 1
        if self.cut_at is not None and self.steps >= self.cut_at:
            raise PowerCut
        if self.meanwhile is not None:
            self.meanwhile_in -= 1
            if self.meanwhile_in <= 0:
                other, self.meanwhile = self.meanwhile, None
                other()

    def lose_power(self, dice: random.Random) -> None:
        """What is left afterwards."""
        names = dict(self.durable_names)
        for number in self.names.keys() ^ self.durable_names.keys():
            if dice.random() < 0.5:
                if number in self.names:
                    names[number] = self.names[number]
                else:
                    del names[number]
        self.names = names
        self.durable_names = dict(names)
        for content in names.values():
            content.lose_power(dice)
        self.cut_at = None
        self.meanwhile = None

    @property
    def used(self) -> int:
        return sum(len(content.cache) for content in self.names.values())

    # --- the port ---------------------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        return sorted(self.names)

    def create(self, number: int) -> PowerFile:
        assert number not in self.names
        self.step()
        self.names[number] = Content()
        return PowerFile(self, self.names[number])

    def open(self, number: int) -> PowerFile:
        if number not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such segment")
        return PowerFile(self, self.names[number])

    def remove(self, number: int) -> None:
        self.step()
        del self.names[number]

    def set_aside(self, number: int) -> None:
        del self.names[number]

    def sync_directory(self) -> None:
        self.step()
        self.durable_names = dict(self.names)

    def free_bytes(self) -> int:
        return self.capacity - self.used


class PowerFile:
    """One open file (the port blockstore.files.SegmentFile)."""

    def __init__(self, disk: PowerDisk, content: Content) -> None:
        self._disk = disk
        self.content = content

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        room = self._disk.capacity - self._disk.used
        grown = offset + len(data) - len(self.content.cache)
        full = grown > room
        if full:
            data = data[: max(0, len(data) - (grown - room))]

        def operation(target: bytearray, dice: random.Random | None) -> None:
            for start in range(0, len(data), SECTOR) if dice is not None else (0,):
                if dice is None or dice.random() < 0.9:
                    part = data[start : start + SECTOR] if dice is not None else data
                    _put(target, offset + start, part)

        self.content.change(operation)
        self._disk.step()
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_past_cache(self, buffers: Sequence[Buffer], offset: int) -> None:
        assert offset % 4096 == 0
        assert sum(map(len, buffers)) % 4096 == 0
        self.write(buffers, offset)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        part = self.content.cache[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def read_nowait(self, buffer: bytearray | memoryview, offset: int) -> int:
        return self.read_into(buffer, offset)

    def sync(self) -> None:
        self._disk.step()
        if self._disk.sync_errors:
            self._disk.sync_errors -= 1
            self.content.pending.clear()  # As Linux does: the pages count as clean afterwards.
            raise OSError(errno.EIO, "Input/output error")
        self.content.sync()
        self._disk.step()

    def size(self) -> int:
        return len(self.content.cache)

    def truncate(self, size: int) -> None:
        def operation(target: bytearray, dice: random.Random | None) -> None:
            del target[size:]

        self.content.change(operation)
        self._disk.step()

    def punch(self, start: int, end: int) -> None:
        def operation(target: bytearray, dice: random.Random | None) -> None:
            stop = min(end, len(target))
            if start < stop:
                target[start:stop] = bytes(stop - start)

        self.content.change(operation)
        self._disk.step()


def _put(target: bytearray, offset: int, data: bytes) -> None:
    if len(target) < offset:
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(data)] = data
