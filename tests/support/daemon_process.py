"""A second mount of a cluster, by a process of its own that a test can patch, watch and end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cluster import FRONTEND, LocalCluster

ROOT = Path(__file__).resolve().parents[2]

DAEMON = """
import signal, sys, trio
from pathlib import Path
import fsd.daemon
from fsd.daemon import MountConfig, run_mount
{extra}
async def serve(scope):
    async with trio.open_nursery() as nursery:
        host, port, front_end = sys.argv[2], int(sys.argv[3]), sys.argv[4]
        config = MountConfig(Path(sys.argv[1]), host, port, timeout_s=20, frontend=front_end)
        await nursery.start(run_mount, config)
        print("mounted", flush=True)
    scope.cancel()
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, nursery.cancel_scope)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
trio.run(main)
"""


def address(cluster: LocalCluster) -> tuple[str, int]:
    host, _, port = cluster.address.rpartition(":")
    return host, int(port.split("/")[0])


@contextmanager
def daemon(cluster: LocalCluster, extra: str = "") -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A second mount of the cluster by a process of its own, with some lines of Python before it mounts."""
    with tempfile.TemporaryDirectory(prefix="fsd-daemon-") as directory:
        mountpoint = Path(directory) / "mnt"
        mountpoint.mkdir()
        host, port = address(cluster)
        process = subprocess.Popen(
            [sys.executable, "-c", DAEMON.format(extra=extra), str(mountpoint), host, str(port), FRONTEND],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mounted\n"
            yield process, mountpoint
        finally:
            subprocess.run(["umount", "-l", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
            try:
                process.communicate(timeout=5)  # It ends by itself, and SIGTERM may come when it is past catching it.
            except subprocess.TimeoutExpired:
                process.terminate()
                process.communicate(timeout=60)
