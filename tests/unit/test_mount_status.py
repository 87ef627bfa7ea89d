"""`fsd status`: the report that programs read, what people see, and that the reference tells both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockstore.core.cluster_map import ClusterMap, Server, ServerState
from blockstore.protocol import BlockId, BlockServerStatus
from metadata.protocol import BadBlock, ClusterStatus, ServerStatus, SessionStatus
from mount.cli import COMMANDS
from mount.outcome import Exit
from mount.status import as_report, show, size_text, time_text
from mount.target import Address

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
ADDRESS = Address("meta1", 7400)


def report(*states: ServerState, bad: tuple[BadBlock, ...] = ()) -> dict[str, Any]:
    servers = tuple(Server(n, "store", 7400 + n, "r", 9, state) for n, state in enumerate(states, start=1))
    figures = BlockServerStatus(1, space_total=10 << 30, space_free=5 << 30, block_count=3, block_bytes=4096)
    status = ClusterStatus(
        version="0.1.0",
        cluster_id="c1",
        map=ClusterMap(7, "c1", 4096, servers),
        servers=(ServerStatus(1, 1500, figures),),
        sessions=(SessionStatus(5, "host pid 3", b"/mnt/\xff", 18_000, 2),),
        inode_count=12,
        deletion_queue=4,
        bad_block_count=len(bad),
        bad_blocks=bad,
        metadata_bytes=1 << 20,
        metadata_free=1 << 40,
        uptime_ms=7_260_000,
        session_count=3,
        fenced_count=2,
        slowest_session=5,
        slowest_ms=4200,
    )
    return as_report(status, ADDRESS)


@pytest.mark.parametrize(
    ("states", "healthy"),
    [
        ([ServerState.UP, ServerState.UP], True),
        ([ServerState.UP, ServerState.DOWN], False),
        ([ServerState.UP, ServerState.DRAINING, ServerState.DEAD], True),
        ([], False),
    ],
)
def test_healthy_means_that_what_should_be_up_is(states: list[ServerState], healthy: bool) -> None:
    assert report(*states)["healthy"] is healthy


def test_a_bad_block_wants_attention(capsys: pytest.CaptureFixture[str]) -> None:
    made = report(ServerState.UP, bad=(BadBlock(BlockId(8, 2), 3, "corrupt"),))
    assert made["healthy"] is False
    assert made["bad_blocks"] == [{"block": "8:2", "server_id": 3, "reason": "corrupt", "copies": 0}]
    show(made)
    told = capsys.readouterr().out
    assert "ATTENTION: 1 blocks wait for repair" in told
    assert "8:2" in told


def test_people_see_every_server_unfolded(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(ServerState.UP, ServerState.DOWN))
    lines = capsys.readouterr().out.splitlines()
    assert any("store:7401" in line and "up" in line and "5.0 GiB" in line and "1.5 s ago" in line for line in lines)
    assert any("store:7402" in line and "DOWN" in line and "never" in line for line in lines)
    assert "ATTENTION: block server 2 is down" in lines
    assert any("/mnt/\\xff" in line for line in lines)


def test_people_see_who_was_fenced_and_who_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(ServerState.UP))
    lines = capsys.readouterr().out.splitlines()
    assert "3 sessions; 2 ended as they were silent, or by hand" in lines
    assert "session 5 is waited for since 4.2 s to drop what it caches (fsd sessions)" in lines


def test_the_reference_tells_every_field() -> None:
    text = REFERENCE.read_text()
    made = report(ServerState.UP, bad=(BadBlock(BlockId(8, 2), 3, "corrupt"),))
    fields = [*made, *made["servers"][0], *made["sessions"][0], *made["bad_blocks"][0]]
    assert not [field for field in fields if f"`{field}`" not in text]


def test_the_reference_tells_every_command_and_exit_code() -> None:
    text = REFERENCE.read_text()
    assert not [one.name for one in COMMANDS if one.help and f"| `fsd {one.name}" not in text]
    assert not [int(code) for code in Exit if f"| {int(code)} | " not in text]


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (200 << 20, "200 MiB"), (3 << 60, "3.0 EiB")],
)
def test_sizes_for_people(size: int | None, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0, "0.0 s"), (18_000, "18 s"), (600_000, "10 min"), (7_260_000, "2 h 1 min")]
)
def test_times_for_people(milliseconds: int, text: str) -> None:
    assert time_text(milliseconds) == text
