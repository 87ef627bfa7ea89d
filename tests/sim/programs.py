"""Programs on the mounts, and the record of all they were told (tests/history/record.py)."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import trio

from tests.history.record import Call, Lost
from tests.sim.kernel import Kernel, OpenFile, Refused
from tests.sim.nodes import Mount
from tests.sim.world import World

STRIDE = 16
CELLS = 3
NAMES = (b"n0", b"n1", b"d/n2")
LOG, COUNTER = b"log", b"counter"
MIXED = {"write": 5, "read": 6, "stat": 2, "make": 3, "unlink": 2, "rename": 1, "append": 2, "count": 2, "list": 1}
HABITS = (
    MIXED,
    MIXED,
    {"count": 5, "read": 1},
    {"append": 3, "read": 2},
    {"make": 3, "unlink": 2, "rename": 2, "stat": 2},
)
"""What the programs of a seed do, and how often each relative to the others."""


class Record:
    """Every call of every program, with its times."""

    def __init__(self, world: World) -> None:
        self.calls: list[Call] = []
        self.lost: list[Lost] = []
        self.longest_s = 0.0
        self.longest = ""
        self.directories: dict[bytes, int] = {b"": 1}
        self.lock_taken = trio.Event()  # Replaced by whoever wants to know of the next time.
        self._world = world
        self._tokens = 0

    def token(self) -> int:
        """One that nobody has written before."""
        self._tokens += 1
        return self._tokens

    @property
    def now_ns(self) -> int:
        """Of the record's clock."""
        return round(trio.current_time() * 1e9)

    def began(self, client: str, mount: str, call: str, args: dict[str, Any]) -> Call:
        """A call begins."""
        made = Call(len(self.calls) + 1, client, mount, call, args, self.now_ns)
        self.calls.append(made)
        return made

    def ended(self, call: Call, error: str | None = None) -> None:
        """It is answered."""
        call.end, call.error = self.now_ns, error
        took_s = (call.end - call.start) / 1e9
        if took_s > self.longest_s:
            self.longest_s, self.longest = took_s, str(call)
        self._world.note(f"{call} ({took_s * 1000:.1f} ms)")


class Program:
    """One program on one mount."""

    def __init__(self, record: Record, mount: Mount, number: int, chance: random.Random) -> None:
        self.record = record
        self.mount = mount
        self.name = f"{mount.name}{number}"
        self.chance = chance
        self.owner = 1000 + number
        self.unexpected: list[str] = []
        self.holds_lock = False

    async def run(self, count: int, pause_s: float, habits: dict[str, int]) -> None:
        """Do `count` things, with pauses of twice `pause_s` at most between them."""
        kinds, weights = list(habits), list(habits.values())
        for _ in range(count):
            await trio.sleep(self.chance.uniform(0, 2 * pause_s))
            kind = self.chance.choices(kinds, weights)[0]
            try:
                await self._acts[kind](self)
            except Refused as refused:
                if not self.is_expected(refused):
                    self.unexpected.append(f"{self.name}: {kind}: {refused}")

    refusals = Refused

    @staticmethod
    def is_expected(refused: Refused) -> bool:
        """It says how things are, and no fault."""
        return refused.errno in (errno.ENOENT, errno.EEXIST, errno.ESTALE)

    @asynccontextmanager
    async def call(self, kind: str, **args: object) -> AsyncIterator[Call]:
        """Around one system call."""
        call = self.record.began(self.name, self.mount.life, kind, args)
        try:
            yield call
        except Refused as refused:
            call.value = {}
            self.record.ended(call, str(refused))
            raise
        self.record.ended(call)

    def at(self, path: bytes, prefix: str = "") -> dict[str, Any]:
        """`dir` and `name` of a path, as the record has them."""
        directory, _, name = path.rpartition(b"/")
        first, second = ("dir", "name") if not prefix else ("to_dir", "to_name")
        return {first: self.record.directories[directory], second: name.decode()}

    # --- calls ---

    async def opened(self, path: bytes, flags: int = os.O_RDWR) -> tuple[Kernel, OpenFile, int]:
        """open(2); the kernel, the file, and when the call began."""
        kernel = self.mount.kernel
        async with self.call("open", **self.at(path)) as call:
            file = await kernel.open(path, flags)
            call.value = {"ino": file.inode.nodeid}
        return kernel, file, call.start

    async def closed(self, kernel: Kernel, file: OpenFile) -> None:
        """close(2), which makes durable what was written."""
        async with self.call("fsync", ino=file.inode.nodeid):
            await kernel.close(file, self.owner)

    async def make(self) -> None:
        """A new file."""
        path, kernel = self.chance.choice(NAMES), self.mount.kernel
        async with self.call("excl", **self.at(path)) as call:
            file = await kernel.create(path)
            call.value = {"ino": file.inode.nodeid}
        await self.closed(kernel, file)

    async def write(self) -> None:
        """A token into one cell."""
        kernel, file, _ = await self.opened(self.chance.choice(NAMES))
        cell, token = self.chance.randrange(CELLS), self.record.token()
        call = self.record.began(
            self.name, self.mount.life, "write", {"ino": file.inode.nodeid, "cell": cell, "token": token}
        )
        await self._write_and_close(kernel, file, call, _cell(token), cell * STRIDE)

    async def append(self) -> None:
        """A token to the end."""
        kernel, file, _ = await self.opened(LOG, os.O_WRONLY | os.O_APPEND)
        token = self.record.token()
        call = self.record.began(self.name, self.mount.life, "append", {"ino": file.inode.nodeid, "token": token})
        await self._write_and_close(kernel, file, call, _cell(token), 0)

    async def _write_and_close(self, kernel: Kernel, file: OpenFile, call: Call, data: bytes, offset: int) -> None:
        """Others see what was written when the file has been closed, at the latest."""
        try:
            await kernel.write(file, data, offset)
        except Refused as refused:
            self.record.ended(call, str(refused))
            await kernel.close(file, self.owner)
            raise
        try:
            await kernel.close(file, self.owner)
        except Refused as refused:
            self.record.ended(call, str(refused))
            raise
        self.record.ended(call)

    async def read(self) -> None:
        """All cells."""
        path = self.chance.choice((*NAMES, LOG))
        kernel, file, start = await self.opened(path, os.O_RDONLY)
        async with self.call("readall", ino=file.inode.nodeid) as call:
            call.start = start
            call.value = {"tokens": _tokens(await kernel.read(file))}
        await kernel.close(file, self.owner)

    async def stat(self) -> None:
        """stat(2)."""
        path = self.chance.choice(NAMES)
        async with self.call("open", **self.at(path)) as call:  # Of what it tells, only which inode the name is.
            call.value = {"ino": (await self.mount.kernel.stat_with_ino(path))[0]}

    async def unlink(self) -> None:
        """unlink(2)."""
        path = self.chance.choice(NAMES)
        async with self.call("unlink", **self.at(path)):
            await self.mount.kernel.unlink(path)

    async def rename(self) -> None:
        """rename(2)."""
        path, new_path = self.chance.sample(NAMES, 2)
        async with self.call("rename", **self.at(path), **self.at(new_path, "to")):
            await self.mount.kernel.rename(path, new_path)

    async def list(self) -> None:
        """A listing of the root directory."""
        async with self.call("list", dir=1) as call:
            found = await self.mount.kernel.list(b"")
            call.value = {"names": [[name.decode(), ino] for name, ino in found]}

    async def count(self) -> None:
        """One more in a counter, under a lock."""
        kernel, file, _ = await self.opened(COUNTER)
        try:
            async with self.call("lock", file="counter"):
                await kernel.lock(file, self.owner)
                self.holds_lock = True
                self.record.lock_taken.set()
            await trio.sleep(self.chance.choice((0.0, 0.0, 1.0)) * self.chance.random())
            async with self.call("readall", ino=file.inode.nodeid) as call:
                before = await kernel.read(file)
                call.value = {"tokens": _tokens(before)}
            token = self.record.token()
            async with self.call("append", ino=file.inode.nodeid, token=token):
                await kernel.write(file, _cell(token), len(before))
            await self._unlock(kernel, file)
        finally:
            if self.holds_lock:  # Close takes it away, when it has written what was protected.
                self.lost_lock()
            await kernel.close(file, self.owner)

    async def _unlock(self, kernel: Kernel, file: OpenFile) -> None:
        if not self.holds_lock:  # Whatever this is answered, it is no end of holding it.
            await kernel.unlock(file, self.owner)
            return
        async with self.call("unlock", file="counter"):
            self.holds_lock = False
            await kernel.unlock(file, self.owner)

    def lost_lock(self) -> None:
        """From now on others may have it, if they do not yet."""
        if self.holds_lock:
            self.holds_lock = False
            self.record.began(self.name, self.mount.life, "unlock", {"file": "counter"})

    _acts: ClassVar[dict[str, Callable[[Program], Awaitable[None]]]] = {
        "make": make,
        "write": write,
        "append": append,
        "read": read,
        "stat": stat,
        "unlink": unlink,
        "rename": rename,
        "list": list,
        "count": count,
    }


def _cell(token: int) -> bytes:
    return b"%0*d" % (STRIDE, token)


def _tokens(data: bytes) -> list[int]:
    cells = [data[at : at + STRIDE] for at in range(0, len(data), STRIDE)]
    return [_token(cell) for cell in cells]


def _token(cell: bytes) -> int:
    if cell == bytes(STRIDE):
        return 0
    return int(cell) if len(cell) == STRIDE and cell.isdigit() else -1
