"""Recorded calls, and the file in which a history is kept: one JSON object a line.

    {"roots": [2, 3], "stride": 16, "seed": 7}                                          the first line
    {"n": 12, "client": "a1", "mount": "a", "call": "open", "args": {"dir": 2, "name": "n0"},
     "start": 1000, "end": 1450, "value": {"ino": 9}, "error": null}              one call
    {"lost": "a", "start": 5000, "end": 7000}      the session of mount a was ended at some time in between

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of one machine share.  A call without an end (its program
was killed) or with an error of UNKNOWN may have taken effect at any time after its start, or never.

calls, with what is in `args` -> `value`; `dir`, `to_dir` and `ino` are inode numbers:

    create, excl    dir name -> ino         open(2) with O_CREAT, with O_EXCL too
    open, opendir   dir name -> ino
    mkdir, unlink, rmdir    dir name
    rename          dir name to_dir to_name
    link            ino to_dir to_name      of an open file
    stat            dir name -> ino kind nlink size      kind: file, directory
    list            dir -> names: [[name, ino], ...]
    fstat           ino -> nlink size
    read            ino cell -> token       0: a hole; null: behind the end; -1: neither one token nor another
    readall         ino -> tokens           all cells of a file that lies in one page
    write           ino cell token
    append          ino token
    truncate        ino cells
    fsync           ino
    lock, unlock    file                    exclusive; `lock` may fail with EAGAIN
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

UNKNOWN = frozenset({"EIO", "ETIMEDOUT", "ENOTCONN", "ECONNABORTED", "ENODEV"})
"""Errors after which nobody knows whether the call took effect."""
TELLS_NOTHING = frozenset({"ESTALE", "EINTR", "ENOLCK"})
"""Errors of calls that changed nothing, whatever the state was."""


@dataclass
class Call:
    """One call of one program."""

    n: int
    client: str
    mount: str
    call: str
    args: dict[str, Any]
    start: int
    end: int | None = None
    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def known(self) -> bool:
        """Whether it is known to have taken effect, or not to."""
        return self.end is not None and self.error not in UNKNOWN

    def __str__(self) -> str:
        """As a person would write it."""
        args = " ".join(f"{name}={value}" for name, value in self.args.items() if name != "fd")
        if self.end is None:
            told = "never returned"
        elif self.error:
            told = self.error
        else:
            told = " ".join(f"{name}={value}" for name, value in self.value.items()) or "ok"
        return f"{self.client:4} {self.call} {args} -> {told}"


@dataclass(frozen=True)
class Lost:
    """The session of a mount ended at some time between `start` and `end`; what it had not flushed may be lost."""

    mount: str
    start: int
    end: int
    tries_again: bool = (
        False  # The mount lives on, and changes of unknown outcome may still be made by its next session.
    )


@dataclass
class History:
    """All calls of one run."""

    roots: list[int]  # The directories below which everything happened; empty at the start.
    stride: int  # Bytes from one cell of a file to the next.
    calls: list[Call] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    seed: int = 0

    def save(self, path: Path) -> None:
        """Write it to a file."""
        lines: list[dict[str, Any]] = [{"roots": self.roots, "stride": self.stride, "seed": self.seed}]
        lines += [
            {"lost": one.mount, "start": one.start, "end": one.end, "tries_again": one.tries_again} for one in self.lost
        ]
        lines += [asdict(call) for call in self.calls]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def load(path: Path) -> History:
    """Read what `save` has written."""
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    history = History(**head)
    for line in lines:
        if "lost" in line:
            history.lost.append(Lost(line["lost"], line["start"], line["end"], line.get("tries_again", False)))
        else:
            history.calls.append(Call(**line))
    return history


def read_log(path: Path, client: str, mount: str) -> list[Call]:
    """The calls that one agent recorded: a line when a call begins and one when it ends, the last maybe cut off."""
    begun: dict[int, Call] = {}
    lines = path.read_text().split("\n")[:-1]
    for line in map(json.loads, lines):
        number = line[0]
        if len(line) == 4:
            begun[number] = Call(number, client, mount, call=line[1], args=line[2], start=line[3])
        else:
            call = begun[number]
            call.start, call.end, call.error, call.value = line[1], line[2], line[3], line[4] or {}
    return list(begun.values())


def numbered(calls: Iterable[Call]) -> list[Call]:
    """In the order of their starts, with numbers of their own."""
    ordered = sorted(calls, key=lambda call: call.start)
    for number, call in enumerate(ordered, start=1):
        call.n = number
    return ordered
