"""Which reads are taken for a stream, and how far ahead of it is fetched."""

from __future__ import annotations

import random
from itertools import pairwise

from fsd.core.read_ahead import WINDOW_MAX, ReadAhead

MIB = 1 << 20


def fetched(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ahead = ReadAhead()
    return [wish for wish in (ahead.observe(offset, size) for offset, size in reads) if wish is not None]


def test_a_stream_is_fetched_once_in_whole_blocks_and_never_read_uncovered() -> None:
    ahead, covered = ReadAhead(), 0
    for offset in range(0, 256 * MIB, MIB):
        wish = ahead.observe(offset, MIB)
        if wish is not None:
            assert wish[0] == max(covered, offset + MIB), "nothing twice, nothing left out"
            covered = wish[1]
            assert covered - offset - MIB <= WINDOW_MAX
        if offset >= 32 * MIB:
            assert covered % (4 * MIB) == 0
            assert covered >= offset + MIB + 8 * MIB, "some blocks are always under way"


def test_the_kernel_may_send_its_reads_out_of_order() -> None:
    reads = [(n * 131072, 131072) for n in range(64)]
    swapped = [reads[n ^ 1] for n in range(64)]
    wishes = fetched(swapped)
    assert wishes[-1][1] >= 8 * MIB
    assert all(before[1] == after[0] for before, after in pairwise(wishes))


def test_random_reads_fetch_hardly_anything_ahead() -> None:
    chance = random.Random(1)
    reads = [(chance.randrange(1, 1 << 18) * 4096, 4096) for _ in range(2000)]
    assert sum(end - start for start, end in fetched(reads)) < 2000 * 4096


def test_strided_reads_fetch_nothing_ahead() -> None:
    assert fetched([(n * 10 * MIB, 65536) for n in range(1, 500)]) == []


def test_several_streams_in_one_file_are_told_apart() -> None:
    reads = [(stream * (1 << 40) + n * MIB, MIB) for n in range(32) for stream in range(1, 6)]
    for stream in range(1, 6):
        ends = [end for _, end in fetched(reads) if end // (1 << 40) == stream]
        assert max(ends) >= stream * (1 << 40) + 40 * MIB
