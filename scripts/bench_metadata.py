"""Measure the metadata operations on LMDB: CPU microseconds each, alone and in batches.

    python scripts/bench_metadata.py [--directory DIR] [--count N] [--rounds R]

The best of R rounds is printed: CPU time of the process, with the engine's own in it.  What takes wall time besides is
the flush, one per transaction.  DIR decides what a flush costs; on tmpfs (/dev/shm) it costs nothing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from metadata import protocol
from metadata.core.dispatch import answer, apply
from metadata.core.format import format_store
from metadata.core.schema import ROOT_INO, Extent
from metadata.engine.lmdb_engine import LmdbEngine
from wire.message import Message, Request

NOW = 1_700_000_000_000_000_000
Work = Callable[[], protocol.Mutation[Message]]


class Bench:
    """One store with 10,000 files in each of 10 directories."""

    def __init__(self, directory: Path, number: int, rounds: int) -> None:
        self.engine = LmdbEngine(directory)
        self.number = number
        self.rounds = rounds
        self.names: Iterator[int] = count()
        with self.engine.write() as txn:
            format_store(txn, now_ns=NOW)
            self.parents = [
                apply(txn, protocol.MakeDirectory(1, 1, ROOT_INO, b"d%d" % index, 0o755), now_ns=NOW).ino  # type: ignore[attr-defined]
                for index in range(10)
            ]
            self.deep = [ROOT_INO]  # By depth; each is in the one before.
            for _ in range(12):
                request = protocol.MakeDirectory(1, 1, self.deep[-1], b"deep", 0o755)
                self.deep.append(apply(txn, request, now_ns=NOW).ino)  # type: ignore[attr-defined]
            self.files = [
                apply(txn, protocol.Create(1, 1, parent, b"f%d" % index, 0o644, True), now_ns=NOW).ino  # type: ignore[attr-defined]
                for parent in self.parents
                for index in range(10_000)
            ]
            txn.commit()

    def best(self, work: Callable[[], None]) -> float:
        """CPU microseconds per operation, `number` of them in `work`."""
        figures = []
        for _ in range(self.rounds):
            start = time.process_time()
            work()
            figures.append((time.process_time() - start) / self.number * 1e6)
        return min(figures)

    def reads(self, make: Callable[[int], Request[Message]]) -> tuple[float, float]:
        """One snapshot for each; one for 64."""
        requests = [make(random.randrange(100_000)) for _ in range(self.number)]

        def alone() -> None:
            for request in requests:
                with self.engine.read() as txn:
                    answer(txn, request)

        def batched() -> None:
            for at in range(0, self.number, 64):
                with self.engine.read() as txn:
                    for request in requests[at : at + 64]:
                        answer(txn, request)

        return self.best(alone), self.best(batched)

    def changes(self, make: Work) -> tuple[float, float]:
        """One transaction for each; one for 64, each operation under a savepoint of its own."""

        def run(batch: int) -> Callable[[], None]:
            def work() -> None:
                requests = [make() for _ in range(self.number)]
                for at in range(0, self.number, batch):
                    with self.engine.write() as txn:
                        for request in requests[at : at + batch]:
                            mark = txn.savepoint()
                            apply(txn, request, now_ns=NOW)
                            txn.release(mark)
                        txn.commit()

            return work

        return self.best(run(1)), self.best(run(64))

    def extents(self) -> Callable[[], protocol.Mutation[Message]]:
        """Commits of 64 random pages of a file of 1 GiB that has been written in random pages before."""
        ino = self.files[0]
        with self.engine.write() as txn:
            first = apply(txn, protocol.AllocateSlices(1, 1, 65_536), now_ns=NOW).first  # type: ignore[attr-defined]
            txn.commit()
        slices = count(first)

        def make() -> protocol.Mutation[Message]:
            pages = sorted(random.sample(range(1 << 18), 64))
            slice_id = next(slices)
            extents = tuple(Extent(page << 12, 4096, slice_id, index << 12) for index, page in enumerate(pages))
            return protocol.CommitExtents(1, 1, ino, extents, ((slice_id, 64 << 12),), 0, 0)

        with self.engine.write() as txn:
            for _ in range(1000):
                apply(txn, make(), now_ns=NOW)
            txn.commit()
        return make


def measure(directory: Path, number: int, rounds: int) -> None:
    """Print the table."""
    bench = Bench(directory, number, rounds)
    parent = bench.parents[3]
    names = bench.names
    rows: dict[str, tuple[float, float]] = {
        "getattr": bench.reads(lambda index: protocol.GetAttr(1, bench.files[index])),
        "lookup": bench.reads(
            lambda index: protocol.Lookup(1, bench.parents[index // 10_000], b"f%d" % (index % 10_000))
        ),
        "layout of an empty file": bench.reads(lambda index: protocol.GetLayout(1, bench.files[index])),
    }
    rows["create"] = bench.changes(lambda: protocol.Create(1, 1, parent, b"c%d" % next(names), 0o644, True))
    for depth in (2, 6, 12):
        rows[f"create, {depth} directories deep"] = bench.changes(
            lambda depth=depth: protocol.Create(1, 1, bench.deep[depth], b"c%d" % next(names), 0o644, True)  # type: ignore[misc]
        )
    rows["mkdir"] = bench.changes(lambda: protocol.MakeDirectory(1, 1, parent, b"c%d" % next(names), 0o755))
    rows["chmod"] = bench.changes(
        lambda: protocol.SetAttr(1, 1, bench.files[next(names) % 100_000], protocol.SetAttrMask.MODE, mode=0o600)
    )
    rows["write 4 KiB inline"] = bench.changes(
        lambda: protocol.WriteInline(1, 1, bench.files[20_000 + next(names) % 50_000], 0, bytes(4096), 0)
    )
    victims = iter([(bench.parents[9], b"f%d" % index) for index in range(10_000)])
    unlinks = min(number, 10_000 // (2 * rounds) // 64 * 64)
    bench.number = unlinks
    rows["unlink"] = bench.changes(lambda: protocol.Unlink(1, 1, *next(victims)))
    moved = iter([(bench.parents[8], b"f%d" % index) for index in range(10_000)])
    rows["rename"] = bench.changes(lambda: protocol.Rename(1, 1, *next(moved), bench.parents[7], b"r%d" % next(names)))
    bench.number = max(number // 64, 64)
    rows["commit 64 random pages"] = bench.changes(bench.extents())
    print("| operation | alone | in batches of 64 |\n|---|---|---|")
    for name, (alone, batched) in rows.items():
        print(f"| {name} | {alone:.1f} | {batched:.1f} |")
    bench.engine.close()


def main() -> None:
    """Measure in a directory of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="/dev/shm")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    place = tempfile.mkdtemp(prefix="fsd-bench-", dir=chosen.directory)
    try:
        measure(Path(place) / "engine", chosen.count, chosen.rounds)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
