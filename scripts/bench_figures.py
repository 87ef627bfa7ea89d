"""Figures that need no mount: CRC, the inode service's CPU per create, a metadata round trip beside a bare TCP echo.

Run by scripts/bench against a running inode service.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from metadata.client import MetadataClient, open_session
from metadata.protocol import Create, GetAttr, MakeDirectory
from wire.checksum import crc32c

MIB = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

WARM_ROUNDS = 10

TRIO_ECHO_SERVER = """
import trio
async def serve(stream):
    while data := await stream.receive_some(65536):
        await stream.send_all(data)
async def main():
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    stream = await listener.accept()
    await serve(stream)
trio.run(main)
"""
"""An echo between two event loops, which is what any asynchronous service can come near to."""

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


@contextmanager
def echo_server(program: str) -> Iterator[int]:
    """A process that sends back what it gets on one connection; its port."""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield int(server.stdout.readline())
    server.wait()
    server.stdout.close()


def round_trips(host: str, port: int, *, batch: int = 300, rounds: int = 12) -> dict[str, float]:
    """Microseconds per round trip, one at a time, in alternating batches, best of the rounds: ours and two echoes."""
    best = {"getattr_round_trip_us": 1e9, "tcp_echo_us": 1e9, "trio_tcp_echo_us": 1e9}
    message = bytes(64)

    def note(name: str, started: float) -> None:
        best[name] = min(best[name], (time.perf_counter() - started) / batch * 1e6)

    with echo_server(ECHO_SERVER) as plain_port, echo_server(TRIO_ECHO_SERVER) as trio_port:
        plain = socket.create_connection(("127.0.0.1", plain_port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def body(client: MetadataClient) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", trio_port)
            for _ in range(rounds):
                started = time.perf_counter()
                for _ in range(batch):
                    await client.ask(lambda session: GetAttr(session, client.root_ino))
                note("getattr_round_trip_us", started)
                started = time.perf_counter()
                for _ in range(batch):
                    plain.sendall(message)
                    plain.recv(4096)
                note("tcp_echo_us", started)
                started = time.perf_counter()
                for _ in range(batch):
                    await stream.send_all(message)
                    await stream.receive_some(4096)
                note("trio_tcp_echo_us", started)
            await stream.aclose()

        trio.run(with_session, host, port, body)
        plain.close()
    best["getattr_to_echo_ratio"] = best["getattr_round_trip_us"] / best["tcp_echo_us"]
    return best


def read_rate(path: Path, size: int) -> float:
    """MiB per second of re-reading a file that the kernel has cached, in reads of `size` bytes."""
    buffer = bytearray(size)
    descriptor = os.open(path, os.O_RDONLY)
    started, done = time.perf_counter(), 0
    while count := os.readv(descriptor, [buffer]):
        done += count
    os.close(descriptor)
    return done / (time.perf_counter() - started) / MIB


def warm_reads(mountpoint: Path) -> dict[str, float]:
    """Warm re-reads by the mount, beside the local file system's and, where there is one, a memory file system's.

    FUSE and tmpfs keep files in pages of 4 KiB, ext4 in larger ones: what that costs is the kernel's, not ours, and
    shows where reads are large.
    """
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as local, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        files = {
            name: Path(place) / "warm" for name, place in (("mount", mountpoint), ("native", local), ("tmpfs", memory))
        }
        for file in files.values():
            file.write_bytes(os.urandom(64 * MIB))
            file.read_bytes()
        for size, label in ((4 << 10, "4k"), (128 << 10, "128k"), (MIB, "1m")):
            for _ in range(WARM_ROUNDS):  # In turns: what else the machine does falls on all of them.
                for name, file in files.items():
                    key = f"warm_read_{label}_{name}_mib_per_s"
                    rates[key] = max(rates.get(key, 0.0), read_rate(file, size))
        files["mount"].unlink()
    return rates


def figures(host: str, port: int, pid: int, *, quick: bool) -> dict[str, float]:
    """All of them, each the best of its rounds: what else a machine does only ever adds."""
    count, rounds = (4_000, 3) if quick else (20_000, 5)
    trips = round_trips(host, port)
    at_64 = create_costs(host, port, pid, in_flight=64, count=count, rounds=rounds)
    return {
        "crc32c_gb_per_s": crc_rate(),
        "create_cpu_us_64_in_flight": min(at_64),
        **trips,
    }
