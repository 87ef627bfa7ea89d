"""Random operations on one file, each compared with what a bytearray says; as `fsx`, which found bugs everywhere.

    python -m tests.support.exerciser DIR --shape small --seed 7 --count 5000

repeats a run: the same seed, shape and features give the same operations.  Reading, writing, mapping, truncating,
punching, zeroing, allocating, copying, two descriptors, direct I/O, fsync, closing, dropping pages, and whatever
`interrupt` does every so often (a remount).
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from tests.posix import calls
from tests.posix.features import Features

PAGE = 4096
HISTORY = 30
"""Operations told when one fails."""


@dataclass(frozen=True)
class Shape:
    """How large the file gets, and the operations on it."""

    size_max: int
    operation_max: int


SHAPES = {
    "small": Shape(size_max=40_000, operation_max=9_000),  # Around the size where a file leaves its inode.
    "medium": Shape(size_max=400_000, operation_max=70_000),
    "large": Shape(size_max=10 << 20, operation_max=200_000),  # Several blocks of 4 MiB.
}


class Mismatch(AssertionError):
    """The file is not what it should be."""


class Exerciser:
    """One file, a second one to copy from and to, and what both should contain."""

    def __init__(self, directory: Path, shape: str, seed: int, missing: Set[str]) -> None:
        self.directory = directory
        self.told = f"--shape {shape} --seed {seed}"
        self.shape = SHAPES[shape]
        self.random = random.Random(f"{shape} {seed}")
        self.model = bytearray()
        self.other_model = bytearray()
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.count = 0
        self.descriptors: list[int] = []
        self.operations = [(operation, weight) for operation, weight, needs in self.table() if needs not in missing]
        for name in ("exercised", "other"):
            os.close(os.open(directory / name, os.O_CREAT | os.O_EXCL))
        self.open()

    def table(self) -> list[tuple[Callable[[], None], int, str]]:
        """Operation, how often, and the feature that it needs."""
        return [
            (self.read, 100, ""),
            (self.write, 100, ""),
            (self.map_read, 5, ""),
            (self.map_write, 7, ""),
            (self.truncate, 10, ""),
            (self.append, 4, ""),
            (self.direct_read, 10, ""),
            (self.direct_write, 10, ""),
            (self.punch, 15, "punch-hole"),
            (self.zero, 15, "zero-range"),
            (self.allocate, 8, "fallocate"),
            (self.collapse, 8, "collapse-range"),
            (self.insert, 8, "insert-range"),
            (self.copy_within, 15, ""),
            (self.copy_out, 8, ""),
            (self.copy_in, 8, ""),
            (self.seek, 15, "seek-hole"),
            (self.sync, 3, ""),
            (self.reopen, 2, ""),
            (self.drop_pages, 8, ""),
        ]

    # --- the run ---

    def run(self, count: int, *, interrupt: Callable[[], None] | None = None, every: int = 0) -> None:
        """So many operations; every so many the file is closed, `interrupt` is called, and the file compared whole."""
        operations, weights = zip(*self.operations, strict=True)
        chosen = self.random.choices(operations, weights, k=count)
        try:
            for operation in chosen:
                self.count += 1
                operation()
                if os.fstat(self.descriptors[0]).st_size != len(self.model):
                    raise Mismatch(f"the size is {os.fstat(self.descriptors[0]).st_size}, not {len(self.model)}")
                if interrupt is not None and self.count % every == 0:
                    self.note("interrupted")
                    self.close()
                    interrupt()
                    self.open()
                    self.compare()
            self.compare()
        except (OSError, Mismatch, ValueError) as error:
            told = "\n  ".join(self.history)
            raise Mismatch(f"{self.told} --count {self.count}: {error!r} after\n  {told}") from error

    def open(self) -> None:
        """Two descriptors of the file, a direct one, and one of the other file."""
        path = self.directory / "exercised"
        flags = os.O_RDWR
        self.descriptors = [os.open(path, flags), os.open(path, flags), os.open(path, flags | os.O_DIRECT)]
        self.descriptors.append(os.open(self.directory / "other", flags))

    def close(self) -> None:
        """Close all."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def compare(self) -> None:
        """Both files whole."""
        self.check(0, os.pread(self.descriptors[0], len(self.model) + 1, 0), bytes(self.model))
        self.check(0, os.pread(self.descriptors[3], len(self.other_model) + 1, 0), bytes(self.other_model))

    # --- help ---

    def note(self, what: str) -> None:
        self.history.append(f"{self.count}: {what}")

    def descriptor(self) -> int:
        """One of the two that are buffered."""
        return self.descriptors[self.random.randrange(2)]

    def range(self, *, inside: bool) -> tuple[int, int]:
        """Offset and size; `inside`: of what there is.  Often near the edges of pages."""
        limit = len(self.model) if inside else self.shape.size_max
        offset = self.random.randrange(max(limit, 1))
        if self.random.random() < 0.3:
            offset -= offset % PAGE
        size = self.random.randint(1, self.shape.operation_max)
        if self.random.random() < 0.2:
            size = self.random.randint(1, 16)
        return offset, min(size, limit - offset)

    def some_bytes(self, size: int) -> bytes:
        return self.random.randbytes(size)

    def put(self, offset: int, data: bytes) -> None:
        """Into the model, as a write."""
        self.grow(offset)
        self.model[offset : offset + len(data)] = data

    def grow(self, size: int) -> None:
        """The model has at least this size."""
        if len(self.model) < size:
            self.model.extend(bytes(size - len(self.model)))

    def check(self, offset: int, found: bytes, expected: bytes) -> None:
        if found == expected:
            return
        if len(found) != len(expected):
            raise Mismatch(f"{len(found)} bytes at {offset}, not {len(expected)}")
        at = next(index for index, (one, two) in enumerate(zip(found, expected, strict=True)) if one != two)
        raise Mismatch(f"byte {offset + at} is {found[at : at + 16]!r}, not {expected[at : at + 16]!r}")

    # --- operations ---

    def read(self) -> None:
        offset, size = self.range(inside=False)
        self.note(f"read {size} at {offset} of {len(self.model)}")
        self.check(offset, os.pread(self.descriptor(), size, offset), bytes(self.model[offset : offset + size]))

    def write(self) -> None:
        offset, size = self.range(inside=False)
        data = self.some_bytes(size)
        self.note(f"write {size} at {offset}")
        if os.pwrite(self.descriptor(), data, offset) != size:
            raise Mismatch("a short write")
        self.put(offset, data)

    def append(self) -> None:
        size = min(self.random.randint(1, self.shape.operation_max), self.shape.size_max - len(self.model))
        if size <= 0:
            return
        data = self.some_bytes(size)
        self.note(f"append {size} at {len(self.model)}")
        with calls.descriptor(str(self.directory / "exercised"), os.O_WRONLY | os.O_APPEND) as appending:
            os.write(appending, data)
        self.put(len(self.model), data)

    def map_read(self) -> None:
        offset, size = self.range(inside=True)
        if size <= 0:
            return
        self.note(f"map_read {size} at {offset}")
        start = offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(self.descriptor(), start + size, prot=mmap.PROT_READ, offset=offset - start) as mapped:
            self.check(offset, mapped[start:], bytes(self.model[offset : offset + size]))

    def map_write(self) -> None:
        offset, size = self.range(inside=True)
        if size <= 0:
            return
        data = self.some_bytes(size)
        self.note(f"map_write {size} at {offset}")
        start = offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(self.descriptor(), start + size, offset=offset - start) as mapped:
            mapped[start:] = data
            if self.random.random() < 0.2:
                mapped.flush()
        self.put(offset, data)

    def direct_read(self) -> None:
        offset, size = self.aligned()
        buffer = mmap.mmap(-1, size)
        self.note(f"direct_read {size} at {offset}")
        got = os.preadv(self.descriptors[2], [buffer], offset)
        self.check(offset, buffer[:got], bytes(self.model[offset : offset + size]))

    def direct_write(self) -> None:
        offset, size = self.aligned()
        data = self.some_bytes(size)
        buffer = mmap.mmap(-1, size)
        buffer[:] = data
        self.note(f"direct_write {size} at {offset}")
        if os.pwritev(self.descriptors[2], [buffer], offset) != size:
            raise Mismatch("a short write")
        self.put(offset, data)

    def aligned(self) -> tuple[int, int]:
        """Whole pages."""
        offset, size = self.range(inside=False)
        return offset - offset % PAGE, max(PAGE, size - size % PAGE)

    def truncate(self) -> None:
        size = self.random.randrange(self.shape.size_max)
        self.note(f"truncate to {size} from {len(self.model)}")
        os.ftruncate(self.descriptor(), size)
        del self.model[size:]
        self.grow(size)

    def punch(self) -> None:
        offset, size = self.range(inside=False)
        self.note(f"punch {size} at {offset} of {len(self.model)}")
        calls.fallocate(self.descriptor(), calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, offset, size)
        self.clear(offset, min(offset + size, len(self.model)))

    def clear(self, start: int, end: int) -> None:
        """Zeros in the model, which does not grow."""
        if start < end:
            self.model[start:end] = bytes(end - start)

    def zero(self) -> None:
        offset, size = self.range(inside=False)
        keep = self.random.random() < 0.5
        self.note(f"zero {size} at {offset} of {len(self.model)}{', same size' if keep else ''}")
        mode = calls.FALLOC_ZERO_RANGE | (calls.FALLOC_KEEP_SIZE if keep else 0)
        calls.fallocate(self.descriptor(), mode, offset, size)
        if not keep:
            self.grow(offset + size)
        self.clear(offset, min(offset + size, len(self.model)))

    def allocate(self) -> None:
        offset, size = self.range(inside=False)
        keep = self.random.random() < 0.5
        self.note(f"allocate {size} at {offset} of {len(self.model)}{', same size' if keep else ''}")
        calls.fallocate(self.descriptor(), calls.FALLOC_KEEP_SIZE if keep else 0, offset, size)
        if not keep:
            self.grow(offset + size)

    def collapse(self) -> None:
        offset, size = self.aligned()
        if offset + size >= len(self.model):
            return
        self.note(f"collapse {size} at {offset} of {len(self.model)}")
        calls.fallocate(self.descriptor(), calls.FALLOC_COLLAPSE_RANGE, offset, size)
        del self.model[offset : offset + size]

    def insert(self) -> None:
        offset, size = self.aligned()
        if offset >= len(self.model) or len(self.model) + size > self.shape.size_max:
            return
        self.note(f"insert {size} at {offset} of {len(self.model)}")
        calls.fallocate(self.descriptor(), calls.FALLOC_INSERT_RANGE, offset, size)
        self.model[offset:offset] = bytes(size)

    def copy_within(self) -> None:
        offset, size = self.range(inside=True)
        target, _ = self.range(inside=False)
        size = min(size, self.shape.size_max - target)
        if size <= 0 or abs(target - offset) < size:
            return
        self.note(f"copy_within {size} from {offset} to {target} of {len(self.model)}")
        done = self.copy(self.descriptors[0], self.descriptors[1], size, offset, target)
        self.put(target, bytes(self.model[offset : offset + done]))

    def copy_out(self) -> None:
        offset, size = self.range(inside=True)
        target = self.random.randrange(self.shape.size_max - max(size, 0))
        if size <= 0:
            return
        self.note(f"copy_out {size} from {offset} to {target}")
        done = self.copy(self.descriptors[0], self.descriptors[3], size, offset, target)
        if len(self.other_model) < target:
            self.other_model.extend(bytes(target - len(self.other_model)))
        self.other_model[target : target + done] = self.model[offset : offset + done]

    def copy_in(self) -> None:
        offset, size = self.range(inside=False)
        source = self.random.randrange(len(self.other_model)) if self.other_model else 0
        size = min(size, len(self.other_model) - source)
        if size <= 0:
            return
        self.note(f"copy_in {size} from {source} to {offset}")
        done = self.copy(self.descriptors[3], self.descriptors[1], size, source, offset)
        self.put(offset, bytes(self.other_model[source : source + done]))

    def copy(self, source: int, target: int, size: int, at: int, to: int) -> int:
        """All of it, however many calls that takes."""
        done = 0
        while done < size:
            copied = os.copy_file_range(source, target, size - done, at + done, to + done)
            if copied == 0:
                raise Mismatch(f"copied {done} bytes of {size}")
            done += copied
        return done

    def seek(self) -> None:
        """A hole that is told is zeros, and what is not zero is told to be data."""
        offset, _ = self.range(inside=True)
        if not self.model:
            return
        self.note(f"seek from {offset}")
        descriptor = self.descriptor()
        hole = os.lseek(descriptor, offset, os.SEEK_HOLE)
        if not offset <= hole <= len(self.model):
            raise Mismatch(f"a hole at {hole}")
        try:
            data = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            data = len(self.model)  # ENXIO: no data from here on.
        if any(self.model[offset:data]):
            raise Mismatch(f"no data before {data}, it says")

    def sync(self) -> None:
        self.note("sync")
        (os.fsync if self.random.random() < 0.5 else os.fdatasync)(self.descriptor())

    def reopen(self) -> None:
        self.note("reopen")
        self.close()
        self.open()

    def drop_pages(self) -> None:
        self.note("drop_pages")
        os.posix_fadvise(self.descriptor(), 0, 0, os.POSIX_FADV_DONTNEED)


def exercise(
    directory: Path,
    shape: str,
    seed: int,
    count: int,
    missing: Set[str],
    *,
    interrupt: Callable[[], None] | None = None,
    every: int = 0,
) -> None:
    """One run in an empty directory; raises Mismatch, which tells how to repeat it."""
    exerciser = Exerciser(directory, shape, seed, missing)
    try:
        exerciser.run(count, interrupt=interrupt, every=every)
    finally:
        exerciser.close()


def main() -> int:
    """Repeat a run by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    directory.mkdir(exist_ok=True)
    missing = Features(directory, None).missing
    exercise(directory, arguments.shape, arguments.seed, arguments.count, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
