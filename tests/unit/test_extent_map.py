"""ExtentMap and RangeSet against an array with one entry per byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fsd.core.extent_map import INFINITY, ExtentMap, RangeSet
from metadata.core.schema import Extent

SIZE = 64
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 20))
changes = st.lists(
    st.one_of(
        st.tuples(st.just("overlay"), ranges),
        st.tuples(st.just("learn"), ranges),
        st.tuples(st.just("truncate"), ranges),
        st.tuples(st.just("clear"), ranges),
    ),
    max_size=20,
)


@given(changes)
def test_the_map_answers_what_was_committed_last(script: list[tuple[str, tuple[int, int]]]) -> None:
    extents = ExtentMap()
    model: list[tuple[int, int] | str | None] = ["unknown"] * (SIZE + 20)
    for number, (kind, (start, length)) in enumerate(script):
        end = start + length
        extent = Extent(start, length, number, 7)
        if kind == "clear":
            extents.clear()
            model = ["unknown"] * len(model)
        elif kind == "truncate":
            extents.truncate(start)
            model[start:] = [None] * (len(model) - start)
        elif kind == "overlay":
            extents.overlay([extent])
            model[start:end] = [(number, 7 + n) for n in range(length)]
        else:
            half = Extent(start, max(length // 2, 1), number, 7)
            extents.learn(start, end, [half])
            model[start:end] = [None] * length
            model[start : start + half.length] = [(number, 7 + n) for n in range(half.length)]
    found: list[tuple[int, int] | str | None] = []
    for at in range(len(model)):
        if extents.first_unknown(at, at + 1) is not None:
            found.append("unknown")
            continue
        hits = extents.lookup(at, at + 1)
        found.append((hits[0].slice_id, hits[0].slice_offset + at - hits[0].offset) if hits else None)
    assert found == model


@given(st.lists(ranges), st.integers(0, SIZE), st.integers(0, SIZE))
def test_the_first_missing_byte_is_found(added: list[tuple[int, int]], start: int, end: int) -> None:
    known = RangeSet()
    model: set[int] = set()
    for low, length in added:
        known.add(low, low + length)
        model.update(range(low, low + length))
    missing = [at for at in range(start, end) if at not in model]
    assert known.first_missing(start, end) == (missing[0] if missing else None)


def test_neighbours_in_file_and_slice_become_one() -> None:
    extents = ExtentMap()
    extents.overlay([Extent(0, 10, 1, 0), Extent(10, 10, 1, 10), Extent(20, 10, 2, 20)])
    assert list(extents) == [Extent(0, 20, 1, 0), Extent(20, 10, 2, 20)]


def test_a_map_that_grows_too_large_forgets_and_goes_on() -> None:
    extents = ExtentMap()
    page = 4096
    for first in range(0, 40 * page, page):
        extents.learn(first * 2, (first + page) * 2, [Extent((first + n) * 2, 1, first + n, 0) for n in range(page)])
        assert len(extents) <= (64 << 10) + page
        assert extents.first_unknown(first * 2, (first + page) * 2) is None
    assert extents.first_unknown(0, INFINITY) == 0
