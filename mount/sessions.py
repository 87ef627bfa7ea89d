"""`fsd sessions` and `fsd evict`: which mounts a cluster has, what they hold up, and the end of one by hand."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from metadata.protocol import EndedSession, EvictSession, ListedSession, ListSessions, ListSessionsDone
from mount.console import say
from mount.inquiry import ask
from mount.outcome import CommandError, Exit
from mount.status import FILE_WIDTH, find_address, table, time_text
from mount.target import Address

JSON_FORMAT = 1
"""Version of the --json output; raised when a field goes or changes its meaning."""
ENDED_SHOWN_S = 3600
"""People see sessions that ended within the last hour; programs see all that the service remembers."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd sessions`."""
    _add_service(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object (docs/reference/cli.md)")


def add_evict(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd evict`."""
    parser.add_argument("session", metavar="SESSION", type=int, help="its number, as fsd sessions shows it")
    _add_service(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="MOUNTPOINT|HOST:PORT", nargs="?", help="default: the local cluster, else the only mount"
    )
    parser.add_argument("--data", type=Path, help="a local cluster by its data directory")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="seconds to wait for the service (default: 5)")


def run(flags: argparse.Namespace) -> Exit:
    """Show the sessions."""
    address = find_address(flags.what, flags.data)
    listed = trio.run(partial(ask, address, ListSessions(), timeout_s=flags.timeout_s))
    report = as_report(listed, address)
    if flags.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return Exit.OK


def run_evict(flags: argparse.Namespace) -> Exit:
    """End one session, after asking if a person is there."""
    address = find_address(flags.what, flags.data)
    listed = trio.run(partial(ask, address, ListSessions(), timeout_s=flags.timeout_s))
    one = chosen(as_report(listed, address), flags.session)
    if not flags.yes and not _agreed(one):
        raise CommandError(f"session {one['session']} was left as it is")
    trio.run(partial(ask, address, EvictSession(flags.session), timeout_s=flags.timeout_s))
    print(f"session {one['session']} ({_whose(one)}) has ended: {CONSEQUENCES}")
    return Exit.OK


CONSEQUENCES = (
    "nothing that its mount sends as this session changes anything any more, and its locks are free; "
    "if the mount lives, it drops its caches and goes on with a new session; what it had written and not flushed "
    "is kept where nobody else has changed the file, and is otherwise lost, which fsync and close tell there (EIO)"
)


def chosen(report: dict[str, Any], number: int) -> dict[str, Any]:
    """The live session of that number.

    Raises:
        CommandError: there is none; the sentence says what became of it, as far as that is known.
    """
    for one in report["sessions"]:
        if one["session"] == number:
            return dict(one)
    for one in report["ended"]:
        if one["session"] == number:
            ago = time_text(one["ended_ms_ago"])
            raise CommandError(f"session {number} ({_whose(one)}) has ended already, {ago} ago: {one['how']}")
    raise CommandError(f"no session has the number {number}; fsd sessions {report['address']} lists them")


def _agreed(one: dict[str, Any]) -> bool:
    """Whether the person at the terminal wants it.

    Raises:
        CommandError: nobody is there to be asked.
    """
    if not sys.stdin.isatty():
        raise CommandError("nobody is there to be asked; say --yes to do it without asking", Exit.USAGE)
    say(f"This ends session {one['session']}, {_whose(one)}: {CONSEQUENCES}.")
    print("End it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _whose(one: dict[str, Any]) -> str:
    return f"{one['mountpoint']}, {one['client']}"


def as_report(listed: ListSessionsDone, address: Address) -> dict[str, Any]:
    """What --json prints; docs/reference/cli.md describes it."""
    return {
        "format": JSON_FORMAT,
        "address": str(address),
        "lease_ms": listed.lease_ms,
        "total": listed.total,
        "fenced_count": listed.fenced_count,
        "sessions": [_live(one) for one in listed.sessions],
        "ended": [_ended(one) for one in listed.ended],
    }


def _live(one: ListedSession) -> dict[str, Any]:
    return {
        "session": one.session,
        "mountpoint": one.mountpoint.decode("utf-8", "backslashreplace"),
        "client": one.client,
        "since": datetime.fromtimestamp(one.opened_ns // 10**9, UTC).isoformat(),
        "lease_left_ms": one.lease_left_ms,
        "state": "alone" if one.alone else "shares",
        "reclaimed": one.reclaimed,
        "open_inodes": one.open_inodes,
        "nameless_inodes": one.nameless_inodes,
        "locks": one.locks,
        "waiting_locks": one.waiting_locks,
        "leases": one.leases,
        "recalls": one.recalls,
        "recall_age_ms": one.recall_age_ms,
    }


def _ended(one: EndedSession) -> dict[str, Any]:
    return {
        "session": one.session,
        "mountpoint": one.mountpoint.decode("utf-8", "backslashreplace"),
        "client": one.client,
        "how": one.how.name.lower(),
        "ended_ms_ago": one.ended_ms_ago,
        "cleaned": one.cleaned,
    }


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    if report["sessions"]:
        columns = (
            "session",
            "mounted at",
            "client",
            "since",
            "lease left",
            "state",
            "leases",
            "open",
            "locks",
            "waits",
        )
        sessions = table(*columns, "recalls", "for")
        for one in report["sessions"]:
            sessions.add_row(*_row(one))
        console.print(sessions)
    else:
        console.print("no sessions", markup=False)
    recent = [one for one in report["ended"] if one["ended_ms_ago"] < ENDED_SHOWN_S * 1000]
    if recent:
        ended = table("ended", "mounted at", "client", "how", "ago", "cleaned up")
        for one in recent:
            row = (str(one["session"]), one["mountpoint"], one["client"], one["how"], time_text(one["ended_ms_ago"]))
            ended.add_row(*row, "yes" if one["cleaned"] else "not yet")
        console.print(ended)
    if report["total"] > len(report["sessions"]):
        say(f"the first {len(report['sessions'])} of {report['total']}")


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    alone = one["state"] == "alone"
    state = one["state"] if one["reclaimed"] else f"{one['state']}, not heard of since the service was started"
    counts = [one["leases"], one["open_inodes"], one["locks"], one["waiting_locks"]]
    return (
        str(one["session"]),
        one["mountpoint"],
        one["client"],
        one["since"][:19].replace("T", " "),
        time_text(one["lease_left_ms"]),
        state,
        *("-" if alone and not count else str(count) for count in counts),
        str(one["recalls"]) if one["recalls"] else "",
        time_text(one["recall_age_ms"]) if one["recalls"] else "",
    )
