"""What the bodies of requests may have wrong, and that everything else comes back; listings as they fill."""

from __future__ import annotations

import contextlib
import stat
import struct
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsd.frontend.direct import dispatch, replies, requests
from fsd.frontend.direct.dispatch import Request
from fsd.frontend.direct.protocol import Opcode
from fsd.frontend.direct.requests import BATCH_FORGET_IN, FORGET_ONE, Malformed
from fsd.frontend.ports import Entry, Operations
from metadata.core.schema import Inode
from tests.support.noting_operations import NotingOperations
from wire.errors import StoreError

names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name and b"/" not in name)


def request(opcode: Opcode, *, extensions: int = 0) -> Request:
    return (0, opcode, 1, 9, 1000, 100, 77, extensions)


# --- what surrounds names -----------------------------------------------------------------------------------------


@given(names, st.binary(max_size=16))
def test_a_name_comes_back(name: bytes, before: bytes) -> None:
    assert requests.name_at(before + name + b"\0", len(before)) == name


@given(names, names)
def test_two_names_come_back(first: bytes, second: bytes) -> None:
    assert requests.names_at(bytes(8) + first + b"\0" + second + b"\0", 8) == (first, second)


@given(names, st.binary(max_size=100))
def test_a_name_and_its_value_come_back(name: bytes, value: bytes) -> None:
    assert requests.name_and_value(bytes(16) + name + b"\0" + value, 16, len(value)) == (name, value)


@given(st.lists(st.tuples(st.integers(1, 1 << 63), st.integers(1, 1 << 63)), max_size=20))
def test_a_batch_of_forgets_comes_back(given_back: list[tuple[int, int]]) -> None:
    body = BATCH_FORGET_IN.pack(len(given_back)) + b"".join(FORGET_ONE.pack(*one) for one in given_back)
    assert requests.forgotten(body) == given_back


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=9), st.binary(max_size=40))
def test_groups_come_back_and_other_extensions_are_passed_over(groups: list[int], other: bytes) -> None:
    def extension(kind: int, data: bytes) -> bytes:
        return struct.pack("=II", 8 + len(data), kind) + data + bytes(-len(data) % 8)

    packed = struct.pack(f"=I{len(groups)}I", len(groups), *groups)
    extensions = extension(1, other) + extension(32, packed)
    assert requests.cut_extensions(b"body" + extensions, len(extensions) // 8) == (b"body", tuple(groups))


@pytest.mark.parametrize("body", [b"", b"\0", b"no end", b"a\0b\0", b"a\0\0"])
def test_what_is_not_one_name_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        requests.name_at(body, 0)


@pytest.mark.parametrize("body", [b"", b"a\0", b"a\0b", b"a\0b\0c\0", b"\0b\0", b"a\0\0"])
def test_what_is_not_two_names_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        requests.names_at(body, 0)


@pytest.mark.parametrize("units", [1, 2, 3, 1 << 15])
@pytest.mark.parametrize("size", [0, 7, 25, 1 << 31])
def test_extensions_that_do_not_fit_are_malformed(units: int, size: int) -> None:
    with pytest.raises((Malformed, struct.error)):
        requests.cut_extensions(struct.pack("=IIII", size, 32, 1 << 30, 0), units)


@given(st.sampled_from(sorted(dispatch.TABLE)), st.binary(max_size=200), st.integers(0, 30))
def test_no_body_makes_a_row_fail_in_a_way_the_loop_does_not_know(opcode: Opcode, body: bytes, extensions: int) -> None:
    """Whatever the bytes: a call with arguments of the right kinds, or one of the errors that become an errno."""
    operations = cast(Operations, NotingOperations())
    with contextlib.suppress(Malformed, struct.error, StoreError):
        dispatch.TABLE[opcode].call(operations, request(opcode, extensions=extensions), body)


# --- listings -----------------------------------------------------------------------------------------------------

INODE = Inode(mode=stat.S_IFDIR | 0o755, nlink=2, uid=0, gid=0, size=0, atime_ns=0, mtime_ns=0, ctime_ns=0, btime_ns=0)
entries = st.lists(st.tuples(st.integers(1, 1 << 62), names), max_size=30)


@given(entries, st.integers(0, 4096))
def test_a_listing_takes_what_fits_and_knows_what_it_counted(listed: list[tuple[int, bytes]], room: int) -> None:
    filled, taken = replies.ListingPlus(room), []
    for cookie, (nodeid, name) in enumerate([(1, b"."), (1, b".."), *listed], start=1):
        before = len(filled.content)
        if not filled.add(name, Entry(nodeid, INODE, 1.0, 1.0), cookie):
            assert len(filled.content) == before
            break
        taken.append((nodeid, name))
    assert len(filled.content) <= room
    assert len(filled.content) % 8 == 0
    assert filled.counted() == [nodeid for nodeid, name in taken if name not in (b".", b"..")]
