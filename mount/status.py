"""`fsd status`: what a cluster says about itself, for people and, with --json, for programs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from blockstore.core.cluster_map import Server, ServerState
from metadata.protocol import ClusterStatus, ServerStatus
from mount import mount_table, records
from mount.cluster_state import HOST, ClusterDirectory, default_data
from mount.inquiry import cluster_status
from mount.outcome import CommandError, Exit
from mount.target import Address, parse_target
from wire.version import VERSION

JSON_FORMAT = 1
"""Version of the --json output; raised when a field goes or changes its meaning."""
FILE_WIDTH = 200


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd status`."""
    parser.add_argument(
        "what", metavar="MOUNTPOINT|HOST:PORT", nargs="?", help="default: the local cluster, else the only mount"
    )
    parser.add_argument("--data", type=Path, help="a local cluster by its data directory")
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/reference/cli.md)")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="seconds to wait for the service (default: 5)")


def run(flags: argparse.Namespace) -> Exit:
    """Show the status; PARTIAL when something in the cluster wants attention."""
    address = find_address(flags.what, flags.data)
    try:
        status = cluster_status(address, timeout_s=flags.timeout_s)
    except CommandError as error:
        told = "".join(f"\n{line}" for line in _supervisor_says(address, flags.data))
        raise CommandError(error.sentence + told) from error
    report = as_report(status, address)
    if flags.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return Exit.OK if report["healthy"] else Exit.PARTIAL


def find_address(what: str | None, data: Path | None) -> Address:
    """The inode service that is meant.

    Raises:
        CommandError: nothing is mounted there, or the local cluster does not run.
    """
    if what is not None and data is None:
        if os.path.exists(what) or "/" in what.partition(":/")[0]:
            return _of_mount(what)
        return parse_target(what).address
    directory = ClusterDirectory(Path(os.path.abspath(data or default_data())))
    if directory.run.is_dir() and directory.running():
        state = directory.state()
        if state is not None:
            return Address(HOST, state.children[0].port)
    sources = {entry.source for entry in mount_table.all_mounts() if entry.is_fsd} if data is None else set()
    if len(sources) == 1:
        return parse_target(sources.pop()).address
    if sources:
        raise CommandError(f"several file systems are mounted: {', '.join(sorted(sources))}; name one")
    raise CommandError(f"no cluster runs in {directory.data}; start it with: fsd up MOUNTPOINT")


def _supervisor_says(address: Address, data: Path | None) -> Iterator[str]:
    """Why the services of a local cluster do not run, as far as its supervisor knows."""
    known = [Path(record.data) for record in records.all_records() if record.data]
    for place in {data or default_data(), *known}:
        directory = ClusterDirectory(place)
        state = directory.state()
        if state is None or address != Address(HOST, state.children[0].port):
            continue
        if not directory.running():
            yield f"the local cluster in {directory.data} is not running; start it again with: fsd up MOUNTPOINT"
        for child in state.children:
            if directory.running() and child.state != "ready":
                why = f", last: {child.last_error}" if child.last_error else ""
                yield f"{child.name} is {child.state} (restarted {child.restarts} times{why}); see {directory.log}"


def _of_mount(path: str) -> Address:
    """The service behind the mount that holds a path."""
    place = mount_table.canonical(path)
    while True:
        entry = mount_table.find(place)
        if entry is not None and entry.is_fsd:
            return parse_target(entry.source).address
        if entry is not None or place == "/":
            break
        place = os.path.dirname(place)
    record = records.load(mount_table.canonical(path))
    if record is not None:
        raise CommandError(f"{path} was mounted from {record.target} and is not any more; fsd up or fsd mount it again")
    raise CommandError(f"{path} is not on an fsd mount")


def as_report(status: ClusterStatus, address: Address) -> dict[str, Any]:
    """What --json prints; docs/reference/cli.md describes it."""
    figures = {one.server_id: one for one in status.servers}
    servers = [_server(one, figures.get(one.server_id)) for one in status.map.servers]
    mounts = [entry.mountpoint for entry in mount_table.all_mounts() if entry.is_fsd and _shows(entry.source, address)]
    expected_up = [one for one in servers if one["state"] not in ("draining", "dead")]
    healthy = bool(servers) and all(one["state"] == "up" for one in expected_up) and not status.bad_block_count
    return {
        "format": JSON_FORMAT,
        "healthy": healthy,
        "address": str(address),
        "version": status.version,
        "command_version": VERSION,
        "cluster_id": status.cluster_id,
        "uptime_ms": status.uptime_ms,
        "epoch": status.map.epoch,
        "placement_groups": status.map.group_count,
        "servers": servers,
        "sessions": [
            {
                "session": one.session,
                "client": one.client,
                "mountpoint": one.mountpoint.decode("utf-8", "backslashreplace"),
                "lease_left_ms": one.lease_left_ms,
                "held_inodes": one.held_inodes,
            }
            for one in status.sessions
        ],
        "session_count": max(status.session_count, len(status.sessions)),
        "fenced_count": status.fenced_count,
        "slowest_session": status.slowest_session or None,
        "slowest_ms": status.slowest_ms,
        "inodes": status.inode_count,
        "deletion_queue": status.deletion_queue,
        "bad_block_count": status.bad_block_count,
        "bad_blocks": [
            {
                "block": f"{one.block.slice_id}:{one.block.index}",
                "server_id": one.server_id,
                "reason": one.reason,
                "copies": one.copies,
            }
            for one in status.bad_blocks
        ],
        "metadata_bytes": status.metadata_bytes,
        "metadata_free": status.metadata_free,
        "mounts_here": mounts,
    }


def _shows(source: str, address: Address) -> bool:
    try:
        return parse_target(source).address == address
    except CommandError:
        return False


def _server(server: Server, heard: ServerStatus | None) -> dict[str, Any]:
    figures = heard.status if heard is not None else None
    return {
        "server_id": server.server_id,
        "address": str(Address(server.host, server.port)),
        "state": ServerState(server.state).name.lower(),
        "rack": server.rack,
        "weight": server.weight,
        "seen_ms_ago": heard.seen_ms_ago if heard is not None else -1,
        "space_total": figures.space_total if figures else None,
        "space_free": figures.space_free if figures else None,
        "block_count": figures.block_count if figures else None,
        "block_bytes": figures.block_bytes if figures else None,
        "corrupt_count": figures.corrupt_count if figures else None,
    }


def size_text(size: int | None) -> str:
    """Bytes for people: three digits and a binary unit; "-" for None."""
    if size is None:
        return "-"
    amount, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    while amount >= 1024 and unit != "EiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def time_text(milliseconds: int) -> str:
    """A duration for people."""
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)  # A pipe has no width; nothing is to be folded there.
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)
    servers = table("server", "address", "state", "rack", "free", "of", "blocks", "bytes", "seen")
    for one in report["servers"]:
        seen = "never" if one["seen_ms_ago"] < 0 else f"{time_text(one['seen_ms_ago'])} ago"
        sizes = [size_text(one[name]) for name in ("space_free", "space_total", "block_bytes")]
        count = "-" if one["block_count"] is None else str(one["block_count"])
        state = one["state"].upper() if one["state"] != "up" else "up"
        row = (str(one["server_id"]), one["address"], state, one["rack"], sizes[0], sizes[1], count, sizes[2], seen)
        servers.add_row(*row)
    console.print(servers)
    if report["sessions"]:
        sessions = table("session", "mounted at", "client", "lease left", "held inodes")
        for one in report["sessions"]:
            left = time_text(one["lease_left_ms"])
            sessions.add_row(str(one["session"]), one["mountpoint"], one["client"], left, str(one["held_inodes"]))
        console.print(sessions)
    if report["bad_blocks"]:
        bad = table("block", "server", "reason", "copies")
        for one in report["bad_blocks"]:
            bad.add_row(one["block"], str(one["server_id"] or "-"), one["reason"], str(one["copies"] or "-"))
        console.print(bad)


def table(*columns: str) -> Table:
    """An empty table in the style of all commands."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, no_wrap=column != "client")
    return made


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"inode service {report['address']}, fsd {report['version']}, up {time_text(report['uptime_ms'])}"
    yield f"cluster {report['cluster_id']}, epoch {report['epoch']}, {report['placement_groups']} placement groups"
    size, free = size_text(report["metadata_bytes"]), size_text(report["metadata_free"])
    yield f"{report['inodes']} inodes in {size} of metadata ({free} free), {report['deletion_queue']} to be reclaimed"
    fenced = f"; {report['fenced_count']} ended as they were silent, or by hand" if report["fenced_count"] else ""
    yield f"{report['session_count']} sessions{fenced}"
    if report["slowest_session"]:
        waited = time_text(report["slowest_ms"])
        yield f"session {report['slowest_session']} is waited for since {waited} to drop what it caches (fsd sessions)"
    if report["mounts_here"]:
        yield f"mounted here at {', '.join(report['mounts_here'])}"
    down = [str(one["server_id"]) for one in report["servers"] if one["state"] == "down"]
    if report["healthy"]:
        yield "healthy"
    if not report["servers"]:
        yield "ATTENTION: no block server has registered; only files up to 16 KiB can be written"
    if down:
        yield f"ATTENTION: block server {', '.join(down)} is down"
    if report["bad_block_count"]:
        yield f"ATTENTION: {report['bad_block_count']} blocks wait for repair"
