"""The `fsd` command: which commands there are, and how each ends.

Modules are imported when their command runs: `fsd version` and `fsd --help` need neither FUSE nor LMDB.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mount.console import say
from mount.outcome import CommandError, Exit
from wire.version import VERSION


@dataclass(frozen=True)
class Command:
    """One command: its functions lie in `module`."""

    name: str
    module: str
    add_flags: str
    run: str
    help: str  # One line, for `fsd --help`; "" for what is not for people.


COMMANDS = (
    Command("up", "mount.local_cluster", "add_up", "run_up", "start a cluster on this machine and mount it"),
    Command("down", "mount.local_cluster", "add_down", "run_down", "unmount it and stop the cluster; the data stay"),
    Command("status", "mount.status", "add", "run", "servers, space, sessions, blocks that want attention"),
    Command("quota", "mount.quota", "add", "run", "limits of directory trees: set, show, clear, list"),
    Command("locks", "mount.locks", "add", "run", "locks that programs hold and wait for, on every mount"),
    Command("sessions", "mount.sessions", "add", "run", "mounts of a cluster, what they hold, who is waited for"),
    Command("evict", "mount.sessions", "add_evict", "run_evict", "end the session of a mount by hand"),
    Command("mount", "mount.mounting", "add_mount", "run_mount_command", "mount a cluster that runs somewhere"),
    Command("umount", "mount.mounting", "add_umount", "run_umount_command", "unmount, after all is written out"),
    Command("metadata", "mount.services", "add_metadata", "run_metadata", "run an inode service in the foreground"),
    Command("block", "mount.services", "add_block", "run_block", "run a block server in the foreground"),
    Command("supervise", "mount.supervisor", "add_flags", "run", ""),
)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; with `only`, the flags of that one command alone (the others stay unimported)."""
    parser = argparse.ArgumentParser(
        prog="fsd",
        description="A distributed POSIX file system.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done in part or something wants attention.",
    )
    parser.add_argument("--version", action="version", version=f"fsd {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        shown: dict[str, Any] = {"help": command.help} if command.help else {}
        one = commands.add_parser(command.name, description=command.help or None, **shown)
        if only in (None, command.name):
            getattr(importlib.import_module(command.module), command.add_flags)(one)
    commands.add_parser("version", help="show the version")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = {command.name for command in COMMANDS}
    first = next((word for word in words if not word.startswith("-")), "")
    flags = build_parser(only=first if first in names else "version").parse_args(words)
    if flags.command == "version":
        print(f"fsd {VERSION}")
        return Exit.OK
    command = next(one for one in COMMANDS if one.name == flags.command)
    return run_guarded("fsd " + command.name, command, flags)


def run_guarded(prefix: str, command: Command, flags: argparse.Namespace) -> int:
    """Run a command; an expected failure is one sentence on stderr and an exit code, never a traceback."""
    try:
        code = int(getattr(importlib.import_module(command.module), command.run)(flags))
        sys.stdout.flush()
        return code
    except CommandError as error:
        say(f"{prefix}: {error.sentence}")
        return error.code
    except BrokenPipeError:  # Whoever read our output (`head`) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # For the flush at exit.
        return 128 + signal.SIGPIPE
    except PermissionError as error:
        say(f"{prefix}: {error.filename or 'this'}: {error.strerror}; it needs its owner or root")
        return Exit.FAILURE
    except KeyboardInterrupt:
        say(f"{prefix}: interrupted")
        return Exit.FAILURE
