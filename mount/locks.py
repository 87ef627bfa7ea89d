"""`fsd locks`: which programs hold and wait for locks, on every mount of a cluster."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from metadata.core.locks import LAST_BYTE, LockKind, LockSpace
from metadata.protocol import ListedLock, ListLocks, ListLocksDone
from mount.console import say
from mount.inquiry import ask
from mount.outcome import CommandError, Exit
from mount.status import FILE_WIDTH, find_address, table
from mount.target import Address

JSON_FORMAT = 1
"""Version of the --json output; raised when a field goes or changes its meaning."""
CALLS = {LockSpace.POSIX: "fcntl", LockSpace.FLOCK: "flock"}


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd locks`."""
    parser.add_argument(
        "what",
        metavar="MOUNTPOINT|FILE|HOST:PORT",
        nargs="?",
        help="of a file on a mount, only its locks; default: the local cluster, else the only mount",
    )
    parser.add_argument("--data", type=Path, help="a local cluster by its data directory")
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/reference/cli.md)")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="seconds to wait for the service (default: 5)")


def run(flags: argparse.Namespace) -> Exit:
    """Show the locks; PARTIAL when a mount did not tell its own."""
    address = find_address(flags.what, flags.data)
    listed = trio.run(partial(ask, address, ListLocks(_inode(flags.what)), timeout_s=flags.timeout_s))
    report = as_report(listed, address)
    if flags.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return Exit.OK if report["complete"] else Exit.PARTIAL


def _inode(what: str | None) -> int:
    """The inode that is asked about, if it is a file on a mount; 0: all."""
    if what is None or not os.path.exists(what) or os.path.isdir(what):
        return 0
    try:
        return os.stat(what).st_ino
    except OSError as error:
        raise CommandError(f"{what}: {error.strerror}") from error


def as_report(listed: ListLocksDone, address: Address) -> dict[str, Any]:
    """What --json prints; docs/reference/cli.md describes it."""
    holders = {holder.session: holder for holder in listed.holders}
    silent = [_session(holder.session, holders) for holder in listed.holders if not holder.answered]
    return {
        "format": JSON_FORMAT,
        "address": str(address),
        "complete": not silent and not listed.grace and listed.total == len(listed.locks),
        "grace": listed.grace,
        "silent": silent,
        "total": listed.total,
        "locks": [{**_lock(one), **_session(one.session, holders)} for one in listed.locks],
    }


def _session(number: int, holders: dict[int, Any]) -> dict[str, Any]:
    holder = holders.get(number)
    return {
        "session": number,
        "client": holder.client if holder else "",
        "mountpoint": holder.mountpoint.decode("utf-8", "backslashreplace") if holder else "",
    }


def _lock(one: ListedLock) -> dict[str, Any]:
    lock = one.lock
    return {
        "inode": lock.ino,
        "call": CALLS[lock.space],
        "kind": "write" if lock.kind is LockKind.WRITE else "read",
        "start": lock.start,
        "end": None if lock.end == LAST_BYTE else lock.end,
        "pid": lock.pid,
        "owner": f"{lock.owner:016x}",
        "state": "waits" if one.waiting else "held",
    }


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    if report["locks"]:
        locks = table("inode", "call", "kind", "bytes", "state", "pid", "session", "mounted at", "client")
        for one in report["locks"]:
            text = "all" if (one["start"], one["end"]) == (0, None) else f"{one['start']}-{_end(one['end'])}"
            row = (one["inode"], one["call"], one["kind"], text, one["state"], one["pid"], one["session"])
            locks.add_row(*map(str, row), one["mountpoint"], one["client"])
        console.print(locks)
    else:
        console.print("no locks", markup=False)
    for one in report["silent"]:
        say(f"session {one['session']} ({one['client']}, {one['mountpoint']}) did not tell its locks in time")
    if report["grace"]:
        say("the inode service was started again and waits for some mounts to tell their locks")
    if report["total"] > len(report["locks"]):
        say(f"the first {len(report['locks'])} of {report['total']}")


def _end(end: int | None) -> str:
    return "" if end is None else str(end)
