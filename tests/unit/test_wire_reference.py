"""docs/reference/wire.md tells the limits that the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from wire.frame import BODY_SIZE_MAX, PAYLOAD_SIZE_MAX
from wire.rpc.client import ChannelLimits
from wire.rpc.server import ServerLimits
from wire.rpc.transport import KEEPALIVE_COUNT, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, UNACKNOWLEDGED_MS_MAX

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "wire.md").read_text()
SERVER, CHANNEL = ServerLimits(), ChannelLimits()


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("body of a frame", f"{BODY_SIZE_MAX >> 20} MiB"),
        ("payload of a frame", f"{PAYLOAD_SIZE_MAX >> 20} MiB + {(PAYLOAD_SIZE_MAX & 0xFFFFF) >> 10} KiB"),
        ("connections of one server", f"{SERVER.connections_max:,}"),
        (
            "calls in flight on one connection",
            f"{CHANNEL.calls_in_flight_max:,} at the client, {SERVER.calls_in_flight_max:,} at the server",
        ),
        ("replies a peer has not taken", f"{SERVER.unsent_bytes_max >> 20} MiB per connection"),
        ("a notice behind replies not taken", f"{SERVER.notice_behind_bytes_max >> 20} MiB per connection"),
        ("payloads being received or not answered", f"{SERVER.payload_bytes_held_max >> 20} MiB per server"),
        ("time until HELLO", f"{SERVER.hello_timeout_s:g} s"),
        ("time for a frame that has begun", f"{SERVER.frame_timeout_s:g} s"),
        ("time without taking any reply", f"{SERVER.send_timeout_s:g} s"),
        (
            "a host that is gone",
            f"{UNACKNOWLEDGED_MS_MAX // 1000} s to {KEEPALIVE_IDLE_S + KEEPALIVE_COUNT * KEEPALIVE_INTERVAL_S} s",
        ),
    ],
)
def test_the_reference_tells_the_limit(limit: str, value: str) -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in REFERENCE.splitlines() if row[:1] == "|"]
    assert [row[1] for row in rows if row[0] == limit] == [value]
