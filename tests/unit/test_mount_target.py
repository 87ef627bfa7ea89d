"""Addresses and mount targets, as people write them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mount.outcome import CommandError, Exit
from mount.target import Address, Target, parse_address, parse_target

hosts = st.one_of(
    st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)
components = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("meta:7400", Target(Address("meta", 7400))),
        ("meta", Target(Address("meta", 7400))),
        ("meta:/", Target(Address("meta", 7400))),
        ("meta:9000:/a/b/", Target(Address("meta", 9000), b"/a/b")),
        ("meta:/a//./b", Target(Address("meta", 7400), b"/a/b")),
        ("10.0.0.1:1:/x:/y", Target(Address("10.0.0.1", 1), b"/x:/y")),
        ("[::1]:7400:/x", Target(Address("::1", 7400), b"/x")),
        ("[fe80::1]", Target(Address("fe80::1", 7400))),
        ("[::1]:/x", Target(Address("::1", 7400), b"/x")),
    ],
)
def test_what_people_write_is_understood(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "HOST:PORT"),
        (":7400", "host name"),
        ("meta:", "port from 1"),
        ("meta:0", "port from 1"),
        ("meta:65536", "port from 1"),
        ("meta:ssh", "port from 1"),
        ("::1:7400", "brackets"),
        ("me ta:7400", "host name"),
        ("/dev/sda1", "host name"),
        ("meta:7400:/a/../b", ".."),
        ("meta:7400:/a\0b", "NUL"),
    ],
)
def test_a_malformed_target_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(CommandError) as refused:
        parse_target(text)
    assert refused.value.code == Exit.USAGE
    assert hint in refused.value.sentence


@given(hosts, st.integers(1, 65535), st.lists(components))
def test_a_target_reads_back_as_it_is_shown(host: str, port: int, path: list[str]) -> None:
    target = Target(Address(host, port), ("/" + "/".join(path)).encode())
    assert parse_target(str(target)) == target


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with suppress(CommandError):
        address = parse_address(text)
        assert parse_address(str(address)) == address
