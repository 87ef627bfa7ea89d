"""`fsd quota`: limits of directory trees, set and shown through a mount, or listed for a whole cluster."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from metadata.core.namespace.quotas import parse_limit
from metadata.protocol import ListQuotas, QuotaStatus
from mount import mount_table
from mount.console import say
from mount.inquiry import ask
from mount.outcome import CommandError, Exit
from mount.status import FILE_WIDTH, find_address, size_text, table
from mount.target import Address
from wire.errors import InvalidArgument

JSON_FORMAT = 1
"""Version of the --json output; raised when a field goes or changes its meaning."""
KINDS = ("bytes", "inodes")


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `fsd quota` and its own commands."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = commands.add_parser("set", help="limit what the tree below a directory may use (root only)")
    one.add_argument("path", metavar="DIRECTORY", help="on a mount")
    limit = "a number, or one with K, M, G, T (powers of 1024); none: no limit"
    one.add_argument("--bytes", type=_limit, metavar="SIZE", help=f"bytes of all files: {limit}")
    one.add_argument("--inodes", type=_limit, metavar="COUNT", help=f"files, directories and all else: {limit}")
    one = commands.add_parser("show", help="usage of a directory's tree, and the quotas that hold for it")
    one.add_argument("path", metavar="DIRECTORY", help="on a mount")
    one.add_argument("--json", action="store_true", help="one JSON object (docs/reference/cli.md)")
    one = commands.add_parser("clear", help="take a directory's limits away (root only)")
    one.add_argument("path", metavar="DIRECTORY", help="on a mount")
    one = commands.add_parser("list", help="every quota of the cluster")
    one.add_argument(
        "what", metavar="MOUNTPOINT|HOST:PORT", nargs="?", help="default: the local cluster, else the only mount"
    )
    one.add_argument("--data", type=Path, help="a local cluster by its data directory")
    one.add_argument("--json", action="store_true", help="one JSON object (docs/reference/cli.md)")
    one.add_argument("--timeout-s", type=float, default=5.0, help="seconds to wait for the service (default: 5)")


def run(flags: argparse.Namespace) -> Exit:
    """Run one of them."""
    actions: dict[str, Callable[[argparse.Namespace], Exit]] = {
        "set": run_set,
        "show": run_show,
        "clear": run_clear,
        "list": run_list,
    }
    return actions[flags.action](flags)


def _limit(text: str) -> int:
    if text == "none":
        return 0
    try:
        return parse_limit(text.encode("utf-8", "surrogateescape"))
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(error.detail) from error


# --- one directory ----------------------------------------------------------------------------------------------------


def run_set(flags: argparse.Namespace) -> Exit:
    """Set the limits that are named; what is used already may be more."""
    limits = {kind: getattr(flags, kind) for kind in KINDS if getattr(flags, kind) is not None}
    if not limits:
        raise CommandError("say what to limit: --bytes SIZE, --inodes COUNT, or both", Exit.USAGE)
    with _explained(flags.path):
        for kind, limit in limits.items():
            os.setxattr(flags.path, f"fsd.quota.{kind}", b"%d" % limit)
    told = describe(flags.path)
    for kind in KINDS:
        most, used = told[f"{kind}_max"], told[f"{kind}_used"]
        if kind in limits and most is not None and used > most:
            say(f"{flags.path} uses {_text(kind, used)} already: nothing can be added before it is below that limit")
    return Exit.OK


def run_clear(flags: argparse.Namespace) -> Exit:
    """Take both limits away; harmless when there are none."""
    with _explained(flags.path):
        for kind in KINDS:
            _remove(flags.path, f"fsd.quota.{kind}")
    return Exit.OK


def run_show(flags: argparse.Namespace) -> Exit:
    """Show usage and limits of one directory, and the quotas above it on this mount."""
    told = describe(flags.path)
    told["above"] = [one for one in map(describe, _above(flags.path)) if one["bytes_max"] or one["inodes_max"]]
    if flags.json:
        print(json.dumps({"format": JSON_FORMAT, **told}, indent=1))
    else:
        _show([told, *told["above"]])
    return Exit.OK


def describe(path: str) -> dict[str, Any]:
    """Usage and limits of a directory; a limit that is not set is None."""
    told: dict[str, Any] = {"path": os.path.abspath(path)}
    with _explained(path):
        for kind in KINDS:
            told[f"{kind}_used"] = _value(path, f"fsd.usage.{kind}")
            told[f"{kind}_max"] = _value(path, f"fsd.quota.{kind}")
    return told


def _above(path: str) -> list[str]:
    """The directories above one, up to the root of its mount."""
    place, found = mount_table.canonical(path), []
    while place != "/" and not os.path.ismount(place):
        place = os.path.dirname(place)
        found.append(place)
    return found


def _value(path: str, name: str) -> int | None:
    try:
        return int(os.getxattr(path, name))
    except OSError as error:
        if error.errno == errno.ENODATA and name.startswith("fsd.quota.") and os.path.isdir(path):
            return None
        raise


def _remove(path: str, name: str) -> None:
    try:
        os.removexattr(path, name)
    except OSError as error:
        if error.errno != errno.ENODATA or not os.path.isdir(path):
            raise


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What goes wrong with a directory on a mount becomes a CommandError, with a sentence that says why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTDIR):
            raise CommandError(f"{path} is not a directory: quotas are of directories") from error
        if error.errno == errno.EOPNOTSUPP:
            raise CommandError(
                f"{path} is not on an fsd mount (or its inode service is of a version without quotas)"
            ) from error
        if error.errno == errno.EPERM:
            raise CommandError(f"{path}: only root sets quotas") from error
        raise CommandError(f"{path}: {error.strerror}") from error


# --- all of a cluster -------------------------------------------------------------------------------------------------


def run_list(flags: argparse.Namespace) -> Exit:
    """Show every quota of a cluster; paths are those from the root of its file system."""
    address = find_address(flags.what, flags.data)
    quotas = [_as_row(one) for one in trio.run(_all, address, flags.timeout_s)]
    quotas.sort(key=lambda row: row["path"] or "")
    if flags.json:
        print(json.dumps({"format": JSON_FORMAT, "address": str(address), "quotas": quotas}, indent=1))
    elif quotas:
        _show(quotas)
    else:
        say(f"no directory of the cluster at {address} has a quota; set one with: fsd quota set DIRECTORY --bytes SIZE")
    return Exit.OK


async def _all(address: Address, timeout_s: float) -> list[QuotaStatus]:
    found: list[QuotaStatus] = []
    while True:
        page = await ask(address, ListQuotas(after=found[-1].ino if found else 0), timeout_s=timeout_s)
        found += page.quotas
        if page.end:
            return found


def _as_row(one: QuotaStatus) -> dict[str, Any]:
    return {
        "path": None if one.path is None else one.path.decode("utf-8", "backslashreplace"),
        "inode": one.ino,
        "bytes_used": one.bytes_used,
        "bytes_max": one.bytes_max or None,
        "inodes_used": one.inodes_used,
        "inodes_max": one.inodes_max or None,
    }


# --- for people -------------------------------------------------------------------------------------------------------


def _show(rows: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    shown = table("directory", "used", "of", "left", "inodes", "of", "left")
    for row in rows:
        cells = [row["path"] or f"(inode {row['inode']})"]
        for kind in KINDS:
            used, most = row[f"{kind}_used"], row[f"{kind}_max"]
            cells.append(_text(kind, used))
            cells.append("-" if most is None else _text(kind, most))
            cells.append("-" if most is None else _text(kind, max(most - used, 0)))
        shown.add_row(*cells)
    console.print(shown)


def _text(kind: str, amount: int) -> str:
    return size_text(amount) if kind == "bytes" else f"{amount:,}"
