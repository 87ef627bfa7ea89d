"""Figures that need no mount: CRC, the inode service's CPU per create, a metadata round trip beside a bare TCP echo.

Run by scripts/bench against a running inode service.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from metadata.client import MetadataClient, open_session
from metadata.protocol import Create, GetAttr, MakeDirectory
from wire.checksum import crc32c

MIB = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

ECHO_SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := connection.recv(65536):
    connection.sendall(data)
"""


def crc_rate(rounds: int = 8) -> float:
    """GB/s of the checksum every byte is under; the best of some rounds."""
    data = os.urandom(32 * MIB)
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        crc32c(data)
        best = max(best, len(data) / (time.perf_counter() - started) / 1e9)
    return best


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, to the nanosecond, which its ticks are too coarse for."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def with_session(host: str, port: int, body: Callable[[MetadataClient], Awaitable[None]]) -> None:
    """A session of our own, alone on the cluster."""

    async def ignore(_alone: bool = True) -> None:
        """Nothing is cached here."""

    async with open_session(
        host,
        port,
        client="bench",
        host_boot_id=BOOT_ID,
        mountpoint=b"/bench",
        on_sharing=ignore,
        on_session_lost=ignore,
    ) as client:
        await body(client)


def create_costs(host: str, port: int, pid: int, *, in_flight: int, count: int, rounds: int) -> list[float]:
    """Microseconds of the service's CPU per flushed create, for each round of `count` creates."""
    costs: list[float] = []

    async def body(client: MetadataClient) -> None:
        for number in range(rounds):
            name = b"creates-%d-%d" % (in_flight, number)
            made = await client.mutate(
                lambda session, sequence, name=name: MakeDirectory(  # type: ignore[misc]
                    session, sequence, parent=client.root_ino, name=name, mode=0o40755
                )
            )
            numbers = iter(range(count))
            before = cpu_s(pid)
            async with trio.open_nursery() as nursery:
                for _ in range(in_flight):
                    nursery.start_soon(creator, client, made.ino, numbers)
            costs.append((cpu_s(pid) - before) / count * 1e6)

    async def creator(client: MetadataClient, parent: int, numbers: object) -> None:
        for number in numbers:  # type: ignore[attr-defined]
            name = b"file-%d" % number
            await client.mutate(
                lambda session, sequence, name=name: Create(  # type: ignore[misc]
                    session, sequence, parent=parent, name=name, mode=0o100644, exclusive=True
                )
            )

    trio.run(with_session, host, port, body)
    return costs


def round_trips(host: str, port: int, *, batch: int = 500, rounds: int = 10) -> tuple[list[float], list[float]]:
    """Microseconds per round trip, one at a time: (of GetAttr, of a bare TCP echo), in alternating batches."""
    ours: list[float] = []
    echo: list[float] = []
    server = subprocess.Popen([sys.executable, "-c", ECHO_SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    connection = socket.create_connection(("127.0.0.1", int(server.stdout.readline())))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    message = bytes(64)

    async def body(client: MetadataClient) -> None:
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(batch):
                await client.ask(lambda session: GetAttr(session, client.root_ino))
            ours.append((time.perf_counter() - started) / batch * 1e6)
            started = time.perf_counter()
            for _ in range(batch):
                connection.sendall(message)
                connection.recv(4096)
            echo.append((time.perf_counter() - started) / batch * 1e6)

    trio.run(with_session, host, port, body)
    connection.close()
    server.wait()
    server.stdout.close()
    return ours, echo


def figures(host: str, port: int, pid: int, *, quick: bool) -> dict[str, float]:
    """All of them, medians."""
    count, rounds = (4_000, 3) if quick else (20_000, 5)
    ours, echo = round_trips(host, port)
    at_64 = create_costs(host, port, pid, in_flight=64, count=count, rounds=rounds)
    return {
        "crc32c_gb_per_s": crc_rate(),
        "create_cpu_us_64_in_flight": statistics.median(at_64),
        "getattr_round_trip_us": statistics.median(ours),
        "tcp_echo_us": statistics.median(echo),
        "getattr_to_echo_ratio": statistics.median(one / other for one, other in zip(ours, echo, strict=True)),
    }
