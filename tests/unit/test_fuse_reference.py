"""docs/reference/fuse.md has the flags of INIT as the code chooses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsd.frontend.direct.negotiation import CHOICES, Agreement, VersionTooOld, agree
from fsd.frontend.direct.protocol import MINOR, InitFlags
from fsd.frontend.direct.requests import INIT_IN, INIT_IN_SHORT

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "fuse.md"
ALL = sum(InitFlags)


def test_the_table_of_flags_is_the_codes() -> None:
    lines = ["| flag | we | why |", "|---|---|---|"]
    lines += [f"| {flag.name} | {'yes' if wanted else 'no'} | {why} |" for flag, wanted, why in CHOICES]
    table = "\n".join(lines)
    assert table in REFERENCE.read_text(), "replace the table of docs/reference/fuse.md by:\n" + table


def test_every_flag_is_chosen_once() -> None:
    assert [flag for flag, _, _ in CHOICES] == list(InitFlags)


def test_only_what_the_kernel_offers_and_we_want_is_agreed_on() -> None:
    everything = agree(INIT_IN.pack(7, 99, 4096, ALL & 0xFFFFFFFF, ALL >> 32))
    assert everything == Agreement(MINOR, sum(flag for flag, wanted, _ in CHOICES if wanted), 4096)
    little = agree(INIT_IN_SHORT.pack(7, 31, 4096, InitFlags.ASYNC_READ | InitFlags.WRITEBACK_CACHE))
    assert little == Agreement(31, InitFlags.ASYNC_READ, 4096)
    assert not little.extended_setxattr


def test_flags_beyond_32_count_only_where_the_kernel_says_that_they_are_there() -> None:
    agreed = agree(INIT_IN.pack(7, 40, 0, InitFlags.ASYNC_READ, ALL >> 32))
    assert agreed is not None
    assert agreed.flags == InitFlags.ASYNC_READ


def test_a_later_kernel_is_asked_to_speak_our_version_and_an_older_one_is_refused() -> None:
    assert agree(INIT_IN.pack(8, 0, 0, 0, 0)) is None
    for major, minor in ((7, 30), (6, 99)):
        with pytest.raises(VersionTooOld):
            agree(INIT_IN.pack(major, minor, 0, 0, 0))
