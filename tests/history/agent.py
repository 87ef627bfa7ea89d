"""A program that makes random calls on one mount and records each: its start, its end, what it was answered.

Run as a file of its own, with one argument in JSON; it needs nothing but the standard library.  It prints "ready",
waits for a line with the time (ns of CLOCK_MONOTONIC) at which to end, works, and ends.  Names lie in directories that
are open, so that no call walks a path of several parts.  Each token is written once: it is made of the client's number
and that of the write.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CELL = 16
CELLS = 4
"""Cells that writes go to; appends make more of them."""
SIZE_MAX = 40
"""Cells; a longer file is truncated."""
OPEN_MAX = 5
CLIENTS_MAX = 1000

WEIGHTS = {
    "open": 8,
    "fresh_read": 10,
    "make": 5,
    "read": 24,
    "readall": 6,
    "write": 14,
    "append": 4,
    "truncate": 2,
    "fsync": 2,
    "stat": 14,
    "fstat": 6,
    "list": 5,
    "rename": 6,
    "unlink": 4,
    "link": 3,
    "mkdir": 1,
    "opendir": 2,
    "rmdir": 1,
    "flock": 3,
    "plock": 3,
}
"""How often each is done, of the sum of all."""


@dataclass
class Opened:
    """A descriptor; `uses` are left until it is closed."""

    fd: int
    ino: int
    writes: bool
    appends: bool
    uses: int


class Agent:
    """What one program has open, and what it does next."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.chance = random.Random(config["seed"])
        self.client: int = config["client"]
        self.stride: int = config["stride"]
        self.names = [f"n{number}" for number in range(config["names"])]
        self.weights = {**WEIGHTS, **config["weights"]}
        self.log = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        top = os.open(config["top"], os.O_RDONLY | os.O_DIRECTORY)
        self.roots = [inode_and(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)) for name in ("d0", "d1")]
        self.subdirectories: list[tuple[int, int]] = []
        self.counters: dict[str, Opened] = {}
        for name in ("flock", "plock"):
            fd = os.open(name, os.O_RDWR, dir_fd=top)
            self.counters[name] = Opened(fd, inode_and(fd)[1], writes=True, appends=False, uses=1 << 60)
        self.opened: list[Opened] = []
        self.count = 0

    # --- recording --------------------------------------------------------------------------------------------------

    def put(self, line: list[Any]) -> None:
        os.write(self.log, json.dumps(line).encode() + b"\n")

    def call(
        self,
        kind: str,
        args: dict[str, Any],
        do: Callable[[], Any],
        value_of: Callable[[Any], dict[str, Any]] = lambda told: {},
    ) -> Any:  # noqa: ANN401  (what the call returned)
        """Make a call and record it; None when it was refused."""
        self.count += 1
        self.put([self.count, kind, args, time.monotonic_ns()])
        told, error = None, None
        start = time.monotonic_ns()
        try:
            told = do()
        except OSError as raised:
            end = time.monotonic_ns()
            error = errno.errorcode[raised.errno or 0]
        else:
            end = time.monotonic_ns()
        value = value_of(told) if error is None else None
        self.put([self.count, start, end, error, value])
        return told

    # --- choosing ---------------------------------------------------------------------------------------------------

    def run(self, until_ns: int) -> None:
        kinds, weights = list(self.weights), list(self.weights.values())
        while time.monotonic_ns() < until_ns:
            kind = self.chance.choices(kinds, weights)[0]
            getattr(self, kind)()

    def place(self) -> tuple[int, dict[str, Any]]:
        """A directory's descriptor, and the args that tell of a name in it."""
        directories = self.roots * 3 + self.subdirectories
        fd, ino = self.chance.choice(directories)
        return fd, {"dir": ino, "name": self.chance.choice(self.names)}

    def some_open(self, wanted: Callable[[Opened], bool]) -> Opened | None:
        candidates = [one for one in [*self.opened, *self.counters.values()] if wanted(one)]
        if not candidates:
            return None
        one = self.chance.choice(candidates)
        one.uses -= 1
        if one.uses < 0:
            self.opened.remove(one)
            os.close(one.fd)
            return None
        return one

    def keep(self, fd: int, ino: int, flags: int) -> None:
        """For a few calls, or for many."""
        uses = self.chance.choice([3, 10, 100])
        if len(self.opened) == OPEN_MAX:
            os.close(self.opened.pop(self.chance.randrange(OPEN_MAX)).fd)
        self.opened.append(Opened(fd, ino, flags & os.O_ACCMODE != os.O_RDONLY, bool(flags & os.O_APPEND), uses))

    def flags(self) -> int:
        return self.chance.choice([os.O_RDONLY] * 4 + [os.O_RDWR] * 3 + [os.O_RDWR | os.O_APPEND])

    # --- names ------------------------------------------------------------------------------------------------------

    def opened_call(self, kind: str, flags: int) -> tuple[int, int] | None:
        """The descriptor and the inode number."""
        fd, args = self.place()
        got = self.call(kind, args, lambda: os.open(args["name"], flags, 0o644, dir_fd=fd), lambda new: ino_value(new))
        return None if got is None else inode_and(got)

    def open(self) -> None:
        flags = self.flags()
        got = self.opened_call("open", flags)
        if got is None:
            return
        one = Opened(*got, writes=False, appends=False, uses=1)
        if flags & os.O_ACCMODE == os.O_RDONLY and self.read_of(one) is None:
            os.close(one.fd)  # A directory.
        else:
            self.keep(*got, flags)

    def make(self) -> None:
        exclusive = self.chance.random() < 0.6
        flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0)
        got = self.opened_call("excl" if exclusive else "create", flags)
        if got is not None:
            self.keep(*got, flags)

    def fresh_read(self) -> None:
        got = self.opened_call("open", os.O_RDONLY)
        if got is not None:
            self.read_of(Opened(*got, writes=False, appends=False, uses=1))
            os.close(got[0])

    def stat(self) -> None:
        fd, args = self.place()

        def told(found: os.stat_result) -> dict[str, Any]:
            kind = "directory" if stat.S_ISDIR(found.st_mode) else "file"
            return {"ino": found.st_ino, "kind": kind, "nlink": found.st_nlink, "size": found.st_size}

        self.call("stat", args, lambda: os.stat(args["name"], dir_fd=fd), told)

    def list(self) -> None:
        fd, args = self.place()

        def listed() -> list[tuple[str, int]]:
            with os.scandir(fd) as entries:
                return [(entry.name, entry.inode()) for entry in entries]

        self.call("list", {"dir": args["dir"]}, listed, lambda names: {"names": sorted(names)})

    def rename(self) -> None:
        (fd, args), (to_fd, to) = self.place(), self.place()
        args |= {"to_dir": to["dir"], "to_name": to["name"]}
        self.call(
            "rename", args, lambda: os.rename(args["name"], to["name"], src_dir_fd=fd, dst_dir_fd=to_fd), lambda _: {}
        )

    def unlink(self) -> None:
        fd, args = self.place()
        self.call("unlink", args, lambda: os.unlink(args["name"], dir_fd=fd))

    def link(self) -> None:
        one = self.some_open(lambda one: one not in self.counters.values())
        if one is None:
            return
        fd, place = self.place()
        args = {"ino": one.ino, "to_dir": place["dir"], "to_name": place["name"]}
        source = f"/proc/self/fd/{one.fd}"
        self.call("link", args, lambda: os.link(source, place["name"], dst_dir_fd=fd, follow_symlinks=True))

    def mkdir(self) -> None:
        fd, args = self.place()
        self.call("mkdir", args, lambda: os.mkdir(args["name"], dir_fd=fd))

    def rmdir(self) -> None:
        fd, args = self.place()
        self.call("rmdir", args, lambda: os.rmdir(args["name"], dir_fd=fd))

    def opendir(self) -> None:
        if len(self.subdirectories) == 2:
            os.close(self.subdirectories.pop(0)[0])
        got = self.opened_call("opendir", os.O_RDONLY | os.O_DIRECTORY)
        if got is not None:
            self.subdirectories.append(got)

    # --- contents ---------------------------------------------------------------------------------------------------

    def read(self) -> None:
        one = self.some_open(lambda one: True)
        if one is not None:
            self.read_of(one)

    def read_of(self, one: Opened) -> bytes | None:
        """Of any cell; None when it was refused, as by a directory."""
        cell = self.chance.randrange(CELLS)
        data: bytes | None = self.call(
            "read",
            {"ino": one.ino, "cell": cell},
            lambda: os.pread(one.fd, CELL, cell * self.stride),
            lambda data: {"token": token_of(data)},
        )
        return data

    def readall(self) -> None:
        one = self.some_open(lambda one: True)
        if one is None or self.stride != CELL:
            return
        self.call(
            "readall",
            {"ino": one.ino},
            lambda: os.pread(one.fd, 4096, 0),
            lambda data: {"tokens": [token_of(data[at : at + CELL]) for at in range(0, len(data), CELL)]},
        )

    def token(self) -> int:
        return self.count * CLIENTS_MAX + self.client + CLIENTS_MAX

    def write(self) -> None:
        one = self.some_open(lambda one: one.writes and not one.appends)
        if one is not None:
            self.write_to(one, self.chance.randrange(CELLS))

    def write_to(self, one: Opened, cell: int) -> None:
        token = self.token()
        data = b"%016d" % token * (self.stride // CELL)
        self.call(
            "write",
            {"ino": one.ino, "cell": cell, "token": token},
            lambda: whole(os.pwrite(one.fd, data, cell * self.stride), data),
        )

    def append(self) -> None:
        one = self.some_open(lambda one: one.appends)
        if one is None:
            return
        token = self.token()
        data = b"%016d" % token * (self.stride // CELL)
        self.call("append", {"ino": one.ino, "token": token}, lambda: whole(os.write(one.fd, data), data))
        size = self.fstat_of(one)
        if size is not None and size > SIZE_MAX * self.stride:
            self.truncate_to(one, 1)

    def truncate(self) -> None:
        one = self.some_open(lambda one: one.writes)
        if one is not None:
            self.truncate_to(one, self.chance.randrange(CELLS + 1))

    def truncate_to(self, one: Opened, cells: int) -> None:
        self.call("truncate", {"ino": one.ino, "cells": cells}, lambda: os.ftruncate(one.fd, cells * self.stride))

    def fsync(self) -> None:
        one = self.some_open(lambda one: one.writes)
        if one is not None:
            self.call("fsync", {"ino": one.ino}, lambda: os.fsync(one.fd))

    def fstat(self) -> None:
        one = self.some_open(lambda one: one not in self.counters.values())
        if one is not None:
            self.fstat_of(one)

    def fstat_of(self, one: Opened) -> int | None:
        found: os.stat_result | None = self.call(
            "fstat",
            {"ino": one.ino},
            lambda: os.fstat(one.fd),
            lambda found: {"nlink": found.st_nlink, "size": found.st_size},
        )
        return None if found is None else found.st_size

    # --- locks ------------------------------------------------------------------------------------------------------

    def flock(self) -> None:
        self.under_lock("flock", lambda fd, how: fcntl.flock(fd, how))

    def plock(self) -> None:
        self.under_lock("plock", lambda fd, how: fcntl.lockf(fd, how))

    def under_lock(self, name: str, change: Callable[[int, int], None]) -> None:
        """Read what the lock's file says, and write something new."""
        one = self.counters[name]
        how = fcntl.LOCK_EX | (fcntl.LOCK_NB if self.chance.random() < 0.5 else 0)

        def lock() -> bool:
            change(one.fd, how)
            return True

        if self.call("lock", {"file": name}, lock) is None:
            return
        self.read_of(one)
        self.write_to(one, self.chance.randrange(CELLS))
        self.call("unlock", {"file": name}, lambda: change(one.fd, fcntl.LOCK_UN))


def inode_and(fd: int) -> tuple[int, int]:
    """(descriptor, inode number), without asking the file system."""
    return fd, ino_value(fd)["ino"]


def ino_value(fd: int) -> dict[str, Any]:
    """The inode number of a descriptor as the kernel knows it."""
    with open(f"/proc/self/fdinfo/{fd}") as told:
        return {"ino": next(int(line.split()[1]) for line in told if line.startswith("ino:"))}


def token_of(data: bytes) -> int | None:
    """What stands in a cell."""
    if not data:
        return None
    if data == bytes(CELL):
        return 0
    return int(data) if len(data) == CELL and data.isdigit() else -1


def whole(written: int, data: bytes) -> bool:
    """All of it was written."""
    assert written == len(data), f"{written} of {len(data)} bytes"
    return True


def main() -> None:
    """See the module's docstring."""
    agent = Agent(json.loads(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    until = sys.stdin.readline()
    if until:
        agent.run(int(until))


if __name__ == "__main__":
    main()
